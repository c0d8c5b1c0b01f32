"""A server with the OpenAI completions API as what continues prompts: vLLM, SGLang, llama.cpp, `transformers serve`.

    server = Server("http://localhost:8000/v1", model, tokenizer, timeout=120, concurrency=64)
    for index, samples in sample(None, tokenizer, prompts, settings, engine=server): ...

Every response is a request with its own seed. Prompts travel as tokens; as text to a server that takes no tokens. The
answer is text and is tokenised here: what a model samples is nearly always the tokenisation of its own text.

Which weights answer is the server's matter, so it is looked at: `Probe` compares greedy answers with the policy's own.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastpref.errors import UserError, first_line

from .openai_client import Answer, Client, Refused, at_once
from .sample import Engine, Sampling, room

PROBED = Sampling(temperature=0, max_new_tokens=24)
AGREE = 0.5  # of the probe's tokens: bf16 on another engine parts from us sooner or later, other weights at once


class Server:
    """An `Engine` of sample.py."""

    def __init__(self, url: str, model: str, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int],
                 positions: int | None, *, timeout: float, concurrency: int) -> None:
        """model: by which name the server knows it. Raises UserError without the package `openai`."""
        self.client = client(url, model, timeout)
        self.tokenizer, self.stops, self.positions, self.concurrency = tokenizer, stops, positions, concurrency
        self.takes_tokens = True
        self.seen: set[str] = set()  # ids of completions
        self.lock = threading.Lock()

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: Sampling) -> list[list[int]]:
        if self.takes_tokens:  # one alone: whether the server takes tokens is asked once
            first, prompts, seeds = [self._response(prompts[0], seeds[0], settings)], prompts[1:], seeds[1:]
        else:
            first = []
        return first + at_once(self.concurrency, lambda one: self._response(*one, settings),
                               list(zip(prompts, seeds, strict=True)))

    def _response(self, prompt: list[int], seed: int, settings: Sampling) -> list[int]:
        answer = self._ask(prompt, seed, settings)
        if answer.text is None:
            raise self.client.wrong("answered without a text")
        with self.lock:
            if answer.id in self.seen:
                raise self.client.wrong(f"gave completion {answer.id} twice: a cache between must not answer for it")
            self.seen.add(answer.id)
        ids: list[int] = self.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ended = answer.finish_reason == "stop"
        return [*ids, self.tokenizer.eos_token_id] if ended or not ids else ids

    def _ask(self, prompt: list[int], seed: int, settings: Sampling) -> Answer:
        whole: Any = prompt if self.takes_tokens else self._text(prompt)
        try:
            return self.client.ask(lambda api: api.completions.create(
                model=self.client.model, prompt=whole, max_tokens=room(settings, len(prompt), self.positions),
                temperature=settings.temperature, top_p=settings.top_p, seed=seed % 2**31,
            ))
        except Refused:
            if not self.takes_tokens:
                raise
            self.takes_tokens = False
            return self._ask(prompt, seed, settings)

    def _text(self, prompt: list[int]) -> str:
        """Without the BOS that a server's own tokenizer puts before it."""
        begins = self.tokenizer("")["input_ids"]
        kept = prompt[len(begins) :] if begins and prompt[: len(begins)] == begins else prompt
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def client(url: str, model: str, timeout: float) -> Client:
    return Client("sampler", url, model, timeout=timeout, timeout_key="rounds.sampler_timeout",
                  model_key="rounds.sampler_model")


def reload(command: str, folder: Path) -> None:
    """Runs the user's command that makes a server load the weights in `folder`, which stands for {folder} in it.

    Raises UserError where it fails."""
    words = [word.replace("{folder}", str(folder.resolve())) for word in shlex.split(command)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"rounds.sampler_reload: {words[0]}: {error.strerror}") from error
    if done.returncode:
        said = first_line(RuntimeError(done.stderr or done.stdout))
        raise UserError(f"rounds.sampler_reload ended with exit code {done.returncode} ({said}): {shlex.join(words)}")


class Probe(NamedTuple):
    """Greedy answers to a few prompts."""

    ours: list[list[int]]  # the policy's, in this process
    theirs: list[list[int]]  # the server's

    @staticmethod
    def take(policy: Engine, server: Server, prompts: Sequence[list[int]]) -> Probe:
        seeds = [0] * len(prompts)
        return Probe(policy.generate(prompts, seeds, PROBED), server.generate(prompts, seeds, PROBED))

    def check(self, before: Probe | None, url: str) -> None:
        """Raises UserError where the server answers with other weights than the policy's; before: what stood when it
        was given weights the last time."""
        if before and self.theirs == before.theirs and self.ours != before.ours:
            raise UserError(f"sampler openai:{url} answers as before it was given this round's weights: it has not "
                            "loaded them; rounds.sampler_reload is the command that makes it")
        share = agreement(self.ours, self.theirs)
        if share < AGREE:
            raise UserError(f"sampler openai:{url} answers with other weights, or reads the prompts otherwise: "
                            f"{share:.0%} of its greedy tokens are the policy's")


def agreement(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> float:
    """Share of our tokens that come before the first difference."""
    same = sum(next((n for n, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y)))
               for x, y in zip(ours, theirs, strict=True))
    return same / max(1, sum(map(len, ours)))
