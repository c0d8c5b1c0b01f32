"""A server that samples for the rounds: it is given the policy's weights whenever they have changed, and looked at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastpref.files import write_text
from fastpref.train import checkpoint, ranks, sharding
from fastpref.train.model import Policy, fingerprint, save_model
from fastpref.train.sample import InMemory
from fastpref.train.server_engine import Probe, Server, client, reload

from .config import RoundsConfig

SERVED = "sampler"  # the folder in a run's
PROBES = 8  # prompts


def reach(settings: RoundsConfig) -> None:
    """Raises UserError where the server of `rounds.sampler` is not there, unless sampler_reload is to start it."""
    if settings.sampler and not settings.sampler_reload:
        client(settings.sampler.removeprefix("openai:"), "", settings.sampler_timeout).reach()


class Served:
    """The server of `rounds.sampler`, with which the first rank speaks.

    folder: <run>/sampler, which holds the weights that the server was given last, in a folder named by their
    fingerprint, and probe.json: what it and the policy answered then.
    """

    def __init__(self, folder: Path, settings: RoundsConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.settings, self.tokenizer = folder, settings, tokenizer
        self.url = (settings.sampler or "").removeprefix("openai:")
        self.ready: tuple[str, Server] | None = None  # of these weights

    def engine(self, policy: Policy, prompts: Sequence[list[int]]) -> Server:
        """The server, with the policy's weights. Raises UserError where it answers with others."""
        mark = fingerprint(policy.model)[:16]
        if self.ready is None or self.ready[0] != mark:
            self.ready = mark, self._hand_over(policy, prompts[:PROBES], mark)
        return self.ready[1]

    def _hand_over(self, policy: Policy, prompts: Sequence[list[int]], mark: str) -> Server:
        weights, settings, own = self.folder / mark, self.settings, InMemory(policy, self.tokenizer)
        server = Server(self.url, settings.sampler_model or str(weights.resolve()), self.tokenizer, own.stops,
                        own.positions, timeout=settings.sampler_timeout, concurrency=settings.generation_batch_size)
        whole = sharding.to_save(policy)

        def write(part: Path) -> None:
            save_model(policy, self.tokenizer, part, whole)
            # Servers take from it what a request leaves out: `transformers serve` whether to sample at all, vLLM top_k
            # and penalties.
            GenerationConfig(do_sample=True, top_k=0, eos_token_id=sorted(own.stops)).save_pretrained(part)

        def give() -> None:
            if not weights.is_dir():
                checkpoint.save(weights, write)
            if settings.sampler_reload:
                reload(settings.sampler_reload, weights)

        ranks.on_first(give)
        with sharding.unsharded(policy):
            ranks.on_first(lambda: self._look(own, server, prompts, weights))
        return server

    def _look(self, own: InMemory, server: Server, prompts: Sequence[list[int]], weights: Path) -> None:
        known = self.folder / "probe.json"
        before = Probe(*json.loads(known.read_text(encoding="utf-8"))) if known.is_file() else None
        probe = Probe.take(own, server, prompts)
        probe.check(before, self.url)
        for older in self.folder.iterdir():
            if older.is_dir() and older != weights:
                checkpoint.remove(older)
        write_text(known, json.dumps(list(probe)))
