"""Scores of responses, from one of four sources, behind one interface.

    module:function         any Python function of (prompt, response) that returns a number: a verifier
    FOLDER or hub id        a reward model: a sequence classifier with one label
    implicit:FOLDER         beta (log pi(y|x) - log pi_ref(y|x)) of a run of fastpref, or of a checkpoint of one
    judge:openai:URL#MODEL  win rate against other responses to the prompt, as a judge has it (judge.py)

    with load_scorer("checks:exact", timeout=5) as scorer:
        scores = scorer.score(prompts, responses)          # None where it failed
        print(scorer.report())                             # "2 of 64 not scored: 2 raised (first: KeyError ...)"

A function runs in a process of its own (scorer_worker.py): one that hangs, exits or crashes costs its response and a
restart, not the run.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from fastpref.data import Example, Rendering, collate, eval_order, records_from_rows, tokenize_records
from fastpref.errors import UserError, first_line

from . import ranks
from .checkpoint import random_state, restore_random_state, verify
from .config import load_config_of_run
from .judge import Judge, Judging, circle
from .model import Policy, load_policy, load_tokenizer, pad_token, pick_device
from .prompts import Prompt
from .rendering import ends_of_generation, rendering_of
from .run_folder import recorded_reference, reference_again, run_of, weights_of_run
from .source import load_whole, put_adapter, source_of

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FORMS = "module:function, the folder or hub id of a reward model, implicit:FOLDER, or judge:openai:URL#MODEL"
START_TIMEOUT = 120.0  # seconds that a function's module may take to import


class Scorer:
    """A context manager. What fails is counted and never raised; the first message of each kind is kept.

    Kinds: "raised", "not a number", "not finite", "timed out", "died" (a function whose process exits or crashes),
    "empty response" (models: there is nothing to score), "no verdict" (a judge). A judge's server that fails raises.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.scored = 0  # responses asked for so far, failures included
        self.failures: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.counts: Counter[str] = Counter()  # what else there is to tell: a judge's

    def against(self, rivals: Callable[[], Mapping[str, Sequence[str]]]) -> Scorer:
        """What scores responses by comparison with `rivals`, other responses by `prompt_key`; where a score is one
        response's own, the same scorer."""
        return self

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Future[list[float | None]]:
        """Starts scoring. A function's process works beside the caller, in the order of the calls; a model has scored
        when this returns."""
        future: Future[list[float | None]] = Future()
        future.set_result(self._score(prompts, responses))
        return future

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """One score a response, None where it failed. prompts: one a response."""
        return self.submit(prompts, responses).result()

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        raise NotImplementedError

    def failed(self, kind: str, message: str) -> None:
        self.failures[kind] += 1
        self.first.setdefault(kind, message)

    def report(self) -> str:
        """One line."""
        kinds = [f"{count:,} {kind} (first: {self.first[kind]})" for kind, count in self.failures.most_common()]
        return f"{self.failures.total():,} of {self.scored:,} not scored{': ' * bool(kinds)}{'; '.join(kinds)}"

    def total(self) -> Scorer:
        """What those of all ranks have come to together: all have to ask."""
        found = Scorer(self.name)
        for scored, failures, first, counts in ranks.told((self.scored, self.failures, self.first, self.counts)):
            found.scored += scored
            found.failures.update(failures)
            found.first = first | found.first
            found.counts.update(counts)
        return found

    def close(self) -> None:
        pass

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_scorer(spec: str, *, timeout: float | None = 10.0, batch_size: int = 8,
                trust_remote_code: bool = False, judging: Judging | None = None) -> Scorer:
    """timeout: seconds that a function may take for one response, or a judge for an answer; None: as long as it likes.
    batch_size: responses at once, of a model.

    A reward model reads prompt + response + EOS as in training (messages: through its chat template). The implicit
    reward of a run is that of its model/, or its newest checkpoint; of a checkpoint's folder, that of the checkpoint.
    beta and the reference are those of the loss of the stage that the weights come from; where the loss has none, beta
    is 1 and the reference is what the stage started from. trust_remote_code: whether that run may run code that comes
    with its model.

    Raises UserError for a spec that is none of the four, a function that cannot be imported, a model that cannot be
    loaded or is no reward model, a folder that is no run, and a judge that is not there.
    """
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise UserError(f"timeout is {timeout!r}; it takes seconds, above 0, or none")
    kind, _, folder = spec.partition(":")
    if kind == "implicit":
        return ImplicitReward(spec, Path(folder), batch_size, trust_remote_code)
    if FUNCTION.fullmatch(spec):
        return FunctionScorer(spec, timeout)
    if kind == "judge":
        return WinRate(spec, Judge(spec, timeout, judging or Judging()))
    if ":" in spec and not Path(spec).exists():
        raise UserError(f"scorer {spec!r}: it takes {FORMS}")
    return RewardModel(spec, batch_size)


# ---- a function ------------------------------------------------------------------------------------------------------


class FunctionScorer(Scorer):
    """`module:function`, called in one process after the other: at most one at a time."""

    def __init__(self, spec: str, timeout: float | None) -> None:
        super().__init__(spec)
        self.timeout = math.inf if timeout is None else timeout
        self.closed = False
        self.unusable = ""  # why the process does not start again
        self.worker: _Worker | None = None
        try:
            self.worker = _Worker(spec)
        except _Unusable as error:
            raise UserError(f"scorer {spec!r}: {error}") from None
        self.thread = ThreadPoolExecutor(1, "fastpref-scorer")

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Future[list[float | None]]:
        return self.thread.submit(self._score, prompts, responses)

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        return [self._one(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _one(self, prompt: Prompt, response: str) -> float | None:
        self.scored += 1
        try:
            request = json.dumps({"prompt": prompt, "response": response})
            reply = self._running().ask(request, self.timeout)
            if "score" in reply:
                return float(reply["score"])
            self.failed(reply["failed"], reply["message"])
        except TypeError as error:  # messages with something that JSON does not know
            self.failed("raised", f"the prompt cannot be handed over: {error}")
        except TimeoutError:
            self._stop()
            self.failed("timed out", f"no score after {self.timeout:g} s")
        except EOFError:
            self.failed("died", self._stop(wait=1.0))
        except _Unusable as error:
            self.unusable = str(error)
            self.failed("died", f"does not start again: {error}")
        return None

    def _running(self) -> _Worker:
        if self.unusable or self.closed:
            raise _Unusable(self.unusable or "closed")
        if self.worker is None:
            self.worker = _Worker(self.name)
        return self.worker

    def _stop(self, wait: float = 0.0) -> str:
        """How the process ended, or that it had to be killed; `wait` seconds for it to end by itself."""
        worker, self.worker = self.worker, None
        return worker.end(wait) if worker else "closed"

    def close(self) -> None:
        self.closed = True
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self.worker:
            self.worker.kill()  # the thread then sees that it has ended, and does the rest
        self.thread.shutdown()
        self._stop()


class _Unusable(Exception):
    """A process that did not start, and why."""


class _Worker:
    """The process, and the connection to it. Nothing here waits longer than it is told to."""

    def __init__(self, spec: str) -> None:
        self.socket, theirs = socket.socketpair()
        self.connection = Connection(os.dup(self.socket.fileno()))
        command = [sys.executable, str(Path(__file__).with_name("scorer_worker.py")), spec, str(theirs.fileno())]
        # A session of its own: Ctrl-C is for the run to decide about, and what the function starts ends with it.
        # It finds no input, and what it prints goes to stderr.
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
            )
        try:
            reply = self.ask("", START_TIMEOUT)
        except TimeoutError:
            self.end()
            raise _Unusable(f"its module is not imported after {START_TIMEOUT:g} s") from None
        except EOFError:
            raise _Unusable(f"importing its module ended Python: {self.end(1.0)}") from None
        except BaseException:
            self.end()
            raise
        if "unusable" in reply:
            self.end()
            raise _Unusable(reply["unusable"])

    def ask(self, request: str, timeout: float) -> dict[str, Any]:
        """Sends the request (none for ""), returns the reply. Raises TimeoutError, and EOFError if there is none."""
        until = time.monotonic() + timeout
        # Ends a send that is not read as well as a reply that does not come, whoever else holds the other end.
        limit = threading.Timer(min(timeout, threading.TIMEOUT_MAX), self.socket.shutdown, [socket.SHUT_RDWR])
        limit.daemon = True
        limit.start()
        reply = None
        try:
            if request:
                self.connection.send_bytes(request.encode())
            reply = self.connection.recv_bytes()
        except (EOFError, OSError):
            pass
        finally:
            limit.cancel()
        if time.monotonic() >= until:
            raise TimeoutError
        if reply is None:
            raise EOFError
        found: dict[str, Any] = json.loads(reply)
        return found

    def kill(self) -> None:
        """With all that it started."""
        if self.process.returncode is None:  # not yet waited for, so its number is not another's
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def end(self, wait: float = 0.0) -> str:
        """Kills it, if it does not end by itself in `wait` seconds, and what it started; how it ended."""
        until = time.monotonic() + wait
        while not (by_itself := self._has_ended()) and time.monotonic() < until:
            time.sleep(0.005)
        self.kill()
        code = self.process.wait()
        self.connection.close()
        self.socket.close()
        if not by_itself:
            return "killed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# ---- a judge ---------------------------------------------------------------------------------------------------------


def prompt_key(prompt: Prompt) -> str:
    return json.dumps(prompt, ensure_ascii=False)


class WinRate(Scorer):
    """The share of its comparisons that a response wins, a tie being half a win: with its neighbours in a circle of the
    responses to its prompt, which stand together, or with rivals. A response that is alone has 0.5."""

    def __init__(self, spec: str, judge: Judge) -> None:
        super().__init__(spec)
        self.judge, self.counts = judge, judge.counts
        self.rivals: Callable[[], Mapping[str, Sequence[str]]] | None = None
        self.thread = ThreadPoolExecutor(1, "fastpref-judge")

    def against(self, rivals: Callable[[], Mapping[str, Sequence[str]]]) -> Scorer:
        other = copy.copy(self)  # which counts in the same counters
        other.rivals = rivals
        return other

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Future[list[float | None]]:
        return self.thread.submit(self._score, prompts, responses)

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        self.scored += len(responses)
        wanted: list[tuple[int, int | None, str]] = []  # a response, the one it is compared with, and its text
        n = self.judge.judging.comparisons
        rivals = self.rivals() if self.rivals else None
        for key, group in itertools.groupby(range(len(responses)), lambda i: prompt_key(prompts[i])):
            own = [i for i in group if responses[i].strip()]
            if rivals is None:
                wanted += [(own[a], own[b], responses[own[b]]) for a, b in circle(len(own), n)]
            elif theirs := rivals.get(key, ()):
                wanted += [(i, None, theirs[(place + step) % len(theirs)])
                           for place, i in enumerate(own) for step in range(min(n, len(theirs)))]
        verdicts = self.judge.compare([(prompts[i], responses[i], text) for i, _, text in wanted])
        found: list[list[float | None]] = [[] for _ in responses]
        for (i, other, _), value in zip(wanted, verdicts, strict=True):
            found[i].append(value)
            if other is not None:
                found[other].append(None if value is None else 1 - value)
        return [self._rate(response, values) for response, values in zip(responses, found, strict=True)]

    def _rate(self, response: str, verdicts: list[float | None]) -> float | None:
        known = [value for value in verdicts if value is not None]
        if not response.strip():
            self.failed("empty response", "nothing but white space")
        elif verdicts and not known:
            self.failed("no verdict", f"such as {self.judge.unparsed}")
        else:
            return sum(known) / len(known) if known else 0.5
        return None

    def close(self) -> None:
        self.judge.closed = True
        self.thread.shutdown(wait=False, cancel_futures=True)


# ---- models ----------------------------------------------------------------------------------------------------------


class _ModelScorer(Scorer):
    """What has a tokenizer, and scores tokenised responses in batches."""

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    batch_size: int
    max_length: int
    vocab: int  # rows of the embedding

    def _rewards(self, examples: list[Example]) -> list[float]:
        """Of one batch."""
        raise NotImplementedError

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = [None] * len(responses)
        self.scored += len(responses)
        there = [i for i, text in enumerate(responses) if text.strip()]
        for _ in range(len(responses) - len(there)):
            self.failed("empty response", "nothing but white space")
        examples: list[Example] = []
        try:
            rows = [{"prompt": prompts[i], "completion": responses[i]} for i in there]
            if rows:
                examples, _ = tokenize_records(
                    records_from_rows(rows, self.name), self.tokenizer, "sft",
                    max_length=self.max_length, overlong_response="truncate", rendering=self.rendering,
                )
        except ValueError as error:  # no chat template, a prompt that is not one
            for _ in there:
                self.failed("raised", str(error))
            return scores
        for _ in range(len(there) - len(examples)):
            self.failed("empty response", "no tokens")
        known = [e for e in examples if max(*e.prompt_ids, *e.responses[0]) < self.vocab]
        for _ in range(len(examples) - len(known)):
            self.failed("raised", f"a token beyond the model's vocabulary of {self.vocab}")
        examples = known
        order = eval_order(examples, self.batch_size)
        for batch in order if examples else []:
            for example, reward in zip((examples[i] for i in batch), self._rewards([examples[i] for i in batch])):
                if math.isfinite(reward):
                    scores[there[example.record_id]] = reward
                else:
                    self.failed("not finite", f"the model gives {reward}")
        return scores


class RewardModel(_ModelScorer):
    """A sequence classifier with one label, as transformers and TRL save it."""

    def __init__(self, name: str, batch_size: int) -> None:
        super().__init__(name)
        self.batch_size = batch_size
        source = Path(name)
        self.rendering = Rendering(stops=ends_of_generation(name))
        if (source / "config.yaml").is_file() and (source / "model").is_dir():  # a run of ours
            config = load_config_of_run(source, trust_remote_code=True)  # read, and nothing of it run
            self.rendering = rendering_of(config.stage_configs()[-1])
            source = source / "model"
        verify(source)
        try:
            self.model = _classifier(str(source))
            tokenizer, revision = source_of(str(source)).tokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, revision=revision)
        except Exception as error:  # missing files, the hub, the network, an unknown class: each its own kind
            line = first_line(error)
            raise UserError(f"scorer {name!r}: no reward model that loads ({line}); it takes {FORMS}") from error
        if self.model.config.num_labels != 1:
            raise UserError(f"scorer {name!r}: has {self.model.config.num_labels} labels; a reward model has one")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"scorer {name!r}: its tokenizer has no EOS token to end responses with")
        self.model.to(pick_device()).eval()
        self.vocab = self.model.get_input_embeddings().num_embeddings
        eos = self.tokenizer.eos_token_id
        text = self.model.config.get_text_config()
        self.pad = text.pad_token_id
        if self.pad is None:
            # The score is read at the last token that is not this one: with EOS, it would not be the last of all.
            self.pad = next(i for i in (self.tokenizer.pad_token_id, 0, 1) if i not in (None, eos) and i < self.vocab)
            text.pad_token_id = self.model.config.pad_token_id = self.pad
        self.max_length = getattr(text, "max_position_embeddings", None) or 1 << 20

    def _rewards(self, examples: list[Example]) -> list[float]:
        rows = [e.prompt_ids + e.responses[0] for e in examples]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        with torch.no_grad():
            rewards = self.model(input_ids=ids, attention_mask=mask).logits
        found: list[float] = rewards[:, 0].float().tolist()
        return found


def _classifier(name: str) -> Any:
    """A sequence classifier, or a LoRA adapter of one on its base model."""
    source = source_of(name)
    options: dict[str, Any] = {"dtype": "auto"}
    if source.adapter:
        options["num_labels"] = 1
    model = load_whole(AutoModelForSequenceClassification, source.model, new_score=bool(source.adapter),
                       revision=source.revision, **options)
    return put_adapter(model, source.adapter, source.adapter_revision, reward=True) if source.adapter else model


class ImplicitReward(_ModelScorer):
    """beta (log pi(y|x) - log pi_ref(y|x)), nats, summed over the response's tokens, EOS included."""

    def __init__(self, spec: str, folder: Path, batch_size: int, trust_remote_code: bool = False) -> None:
        super().__init__(spec)
        self.batch_size = batch_size
        try:
            run_dir = run_of(folder)
        except UserError as error:
            raise UserError(f"scorer {spec!r}: {error}") from None
        config = load_config_of_run(run_dir, trust_remote_code=trust_remote_code)
        if config.reward_model:
            raise UserError(f"scorer {spec!r}: the run trains a reward model, which is a scorer itself: {run_dir}")
        weights, index = weights_of_run(folder, len(config.stage_configs()))
        stage = config.stage_configs()[index]
        loss = stage.loss_fn
        beta = getattr(loss, "beta", None) if loss.needs_reference else None
        self.beta = float(beta) if beta else 1.0
        self.max_length, self.rendering = stage.max_length, rendering_of(stage)
        self.tokenizer = load_tokenizer(config)
        self.policy = load_policy(config, self.tokenizer, weights)
        self.vocab = self.policy.model.get_input_embeddings().num_embeddings
        before = random_state()
        expected = recorded_reference(config, index, run_dir, weights)
        self.reference = reference_again(config, index, run_dir, self.tokenizer, expected, load_policy)
        restore_random_state(before)
        self.policy.model.eval()
        self.reference.model.eval()

    def _rewards(self, examples: list[Example]) -> list[float]:
        def logps(policy: Policy) -> torch.Tensor:
            batch = collate(examples, pad_token(self.tokenizer), "sft", layout=policy.layout)
            return policy.sequence_logps(batch.to(policy.device))

        found: list[float] = (self.beta * (logps(self.policy) - logps(self.reference))).tolist()
        return found
