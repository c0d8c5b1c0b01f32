"""Responses sampled from a policy, handed out batch by batch while the rest is still to come.

    for index, samples in sample(policy, tokenizer, prompts, Sampling(n=4, seed=7)):    # samples: the n of that prompt
        ...

A response depends on the weights, its prompt's tokens, and (seed, the prompt's index, its number among the n): that
triple seeds a stream of uniform numbers, one a token, and a token is read off the cumulative probabilities at its
number. So it does not depend on what was sampled before, on the prompts beside it, or on torch's global generators,
which stay as they are. The batches are cut from all prompts, those that are `done` included, so that even rounding,
which differs with the shape of a batch, is the same when an interrupted run asks for the prompts that are left.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from fastpref.errors import UserError, refuse
from fastpref.rows import exact_dtype

from . import ranks, sharding
from .display import Tick
from .keys import check_bounds, key
from .model import Policy, pad_token


@dataclass(frozen=True)
class Sample:
    """One response."""

    ids: list[int]  # its tokens, the one that ends it included
    text: str  # decoded without special tokens, and stripped
    ended: bool  # False: cut at max_new_tokens, or where a prompt of its batch has used up the model's positions
    before: str = ""  # the white space that stood before the text

    def after(self, prompt: Any) -> str:
        """The text as a scorer reads it behind `prompt`, a text or messages: with the white space before it where it
        goes on with a turn that the prompt has begun."""
        begun = isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        return self.before + self.text if begun else self.text


@dataclass(frozen=True)
class Sampling:
    """How to sample. Raises UserError for a value that it does not take."""

    n: int = key(1, "responses a prompt", "at least 1")
    temperature: float = key(1.0, "logits are divided by it; 0: the likeliest token, always", "at least 0")
    top_p: float = key(1.0, "only from the fewest tokens that hold so much of the probability", "above 0, at most 1")
    max_new_tokens: int = key(128, "of a response", "at least 1")
    batch_size: int = key(8, "sequences at once: n a prompt", "at least 1")
    seed: int = key(42, "of all responses", "at least 0")

    def __post_init__(self) -> None:
        check_bounds(self)
        refuse((self.temperature == 0 and self.n > 1,
                f"temperature is 0, so the n = {self.n} responses of a prompt would be equal: raise it"))


class Engine(Protocol):
    """What continues prompts."""

    stops: frozenset[int]  # tokens that end a response
    positions: int | None  # the most tokens of prompt and response together, where the model has such a limit

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Sampling) -> list[list[int]]:
        """The response to each prompt, up to and with the first of `stops`; drawn by its own seed (63 bits)."""


def sample(policy: Policy | None, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], settings: Sampling,
           tick: Tick | None = None, engine: Engine | None = None,
           done: Collection[int] = ()) -> Generator[tuple[int, list[Sample]], None, None]:
    """Yields (index of a prompt, its n samples) as soon as the batch that completes them is generated; longest prompts
    first. Between two of them the policy is as it was: in its own mode, attention and generation settings.

    tick: called before each batch with sequences done, and of how many; may raise to stop.
    engine: None: the policy itself, through transformers; else for example `vllm_engine.VLLM`, and no policy.
    done: indices of prompts that are left out, for a run that goes on.

    Under torchrun the ranks take the batches of a policy in turns, each with all of its weights until the last one, and
    all ranks get all samples; any other engine is the first rank's alone. So the batches, and what rounding makes of
    them, are those of one process.

    Raises UserError, before anything is sampled, for an empty prompt, and for one that fills the positions of the
    model; and where the model's probabilities are NaN.
    """
    if engine is None:
        if policy is None:
            raise ValueError("policy: got None, which takes an engine")
        engine = InMemory(policy, tokenizer)
    for index, ids in enumerate(prompts):
        if not ids:
            raise UserError(f"prompt {index} has no tokens: there is nothing to continue")
        if engine.positions is not None and len(ids) >= engine.positions:
            raise UserError(
                f"prompt {index} has {len(ids):,} tokens, and the model {engine.positions:,} positions: none is left "
                "for a response"
            )
    return _stream(engine, tokenizer, prompts, settings, tick, frozenset(done))


def _stream(engine: Engine, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], settings: Sampling,
            tick: Tick | None, done: frozenset[int]) -> Generator[tuple[int, list[Sample]], None, None]:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what does not fit in memory fails at once
    rows = [(i, number) for i in order for number in range(settings.n)]
    batches = [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    found: dict[int, list[Sample]] = defaultdict(list)

    def generated(batch: Sequence[tuple[int, int]]) -> list[list[int]]:
        seeds = [_seed(settings.seed, i, number) for i, number in batch]
        return engine.generate([prompts[i] for i, _ in batch], seeds, settings)

    left = [batch for batch in batches if not all(i in done for i, _ in batch)]
    before, own = len(rows) - sum(map(len, left)), isinstance(engine, InMemory)
    turn = ranks.size() if own else 1
    with sharding.unsharded(engine.policy) if isinstance(engine, InMemory) else nullcontext():
        for start in range(0, len(left), turn):
            if tick is not None:
                tick(before + start * settings.batch_size, len(rows))
            now = left[start : start + turn]
            if own:
                answers: Any = ranks.dealt(now, generated)
            else:
                answers = ranks.on_first(lambda: [(batch, generated(batch)) for batch in now])  # noqa: B023 - at once
            for batch, responses in answers:
                for (i, number), ids in zip(batch, responses, strict=True):
                    if i in done:
                        continue
                    found[i].append(_sample(tokenizer, ids, engine.stops))
                    if number == settings.n - 1:
                        yield i, found.pop(i)


def _sample(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: frozenset[int]) -> Sample:
    ended = ids[-1] in stops
    kept = ids[:-1] if ended else ids
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Sample(ids, text.strip(), ended, text[: len(text) - len(text.lstrip())])


def _seed(seed: int, index: int, number: int) -> int:
    """63 bits of a hash: neighbouring seeds of a generator need not give independent streams."""
    digest = hashlib.sha256(f"fastpref sample {seed} {index} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class InMemory:
    """A policy that generates through transformers, with a KV cache."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy, self.pad = policy, pad_token(tokenizer)
        model = policy.model
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.stops = stop_tokens(tokenizer, self.inner.generation_config)
        config = self.inner.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Sampling,
                 streamer: Any = None) -> list[list[int]]:
        """streamer: transformers', of one prompt."""
        policy, model, own = self.policy, self.policy.model, self.inner.generation_config
        width = max(map(len, prompts))
        limit = room(settings, width, self.positions)
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=policy.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
        draw = None if settings.temperature == 0 else Draw(seeds, settings, width, policy.device)
        was_training = model.training
        model.eval()
        # A model's own generation settings (penalties, temperature) would leak into what is to be the plain policy.
        self.inner.generation_config = GenerationConfig(
            max_new_tokens=limit, eos_token_id=sorted(self.stops), pad_token_id=self.pad,
            do_sample=False, use_cache=True,
        )
        try:
            with torch.no_grad(), policy.autocast(), policy.generating():
                chosen = LogitsProcessorList([] if draw is None else [draw])
                out = model.generate(input_ids=ids, attention_mask=mask, logits_processor=chosen, streamer=streamer)
        finally:
            self.inner.generation_config = own
            model.train(was_training)
        if draw is not None:
            draw.check()
        return [_until(tokens, self.stops) for tokens in out[:, width:].tolist()]


def room(settings: Sampling, prompt: int, positions: int | None) -> int:
    """Tokens that a response to a prompt of so many may have."""
    return settings.max_new_tokens if positions is None else min(settings.max_new_tokens, positions - prompt)


def _until(tokens: list[int], stops: frozenset[int]) -> list[int]:
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in stops), len(tokens))]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, own: GenerationConfig | None) -> frozenset[int]:
    """The tokenizer's EOS, and what else the model's own settings end a response with (a chat's end of turn)."""
    more: Any = None if own is None else own.eos_token_id
    return frozenset([tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])])


class Draw(LogitsProcessor):
    """Leaves each row one token, drawn by the row's own uniform numbers u: the first whose cumulative probability is
    above u. The sum is in fp64, which has no visible rounding over any vocabulary."""

    def __init__(self, seeds: Sequence[int], settings: Sampling, width: int, device: torch.device) -> None:
        self.settings, self.width = settings, width
        rows = [
            torch.rand(settings.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.uniforms = torch.stack(rows).to(device, exact_dtype(device))  # [rows, max_new_tokens]
        self.sound = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self.uniforms[:, input_ids.shape[1] - self.width, None]
        centred = scores.float() - scores.float().amax(-1, keepdim=True)  # so that a low temperature does not overflow
        probs, order = (centred / self.settings.temperature).softmax(-1), None
        last = torch.full_like(u, probs.shape[-1] - 1, dtype=torch.int64)
        if self.settings.top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
        mass = probs.cumsum(-1, dtype=self.uniforms.dtype)
        if order is not None:  # a token is in as long as those before it do not hold top_p yet
            last = ((mass - probs) < self.settings.top_p).sum(-1, keepdim=True) - 1
        total = mass.gather(1, last.clamp(min=0))
        self.sound &= total.isfinite().all()
        choice = torch.searchsorted(mass, u * total, right=True).minimum(last).clamp(min=0)
        if order is not None:
            choice = order.gather(1, choice)
        return torch.full_like(scores, -math.inf).scatter_(1, choice, 0.0)

    def check(self) -> None:
        """Once a batch, because it waits for the device."""
        if not self.sound:
            raise UserError("sampling: the policy's probabilities are NaN: its weights are damaged, or it diverged")
