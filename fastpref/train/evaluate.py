"""Held-out evaluation: loss and preference metrics, and exact match of greedy generations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.data import Batch, Example, Kind, Layout, Record, collate, eval_order, mismatched_parts
from fastpref.losses import BradleyTerry, Loss, Totals

from . import ranks
from .model import Policy
from .reference import ReferenceLogps, Tick, by_turns
from .sample import Sampling, sample
from .watch import Start, take_correlation, to_sums, watched


def totals_of(batches: Sequence[Batch]) -> Totals:
    """Denominators of a batch that comes in parts: the parts' losses and gradients then add up to its own."""
    return Totals(
        sequences=sum(batch.num_sequences for batch in batches),
        tokens=sum(batch.num_tokens for batch in batches),
        chosen_tokens=sum(batch.chosen_tokens for batch in batches),
    )


def collated(
    examples: Sequence[Example], parts: Sequence[Sequence[int]], pad: int, kind: Kind, layout: Layout
) -> list[Batch]:
    """The micro-batches of one global batch, over which KTO's mismatched pairs are made."""
    others = mismatched_parts(examples, parts) if kind == "kto" else [None] * len(parts)
    return [
        collate([examples[i] for i in part], pad, kind, layout=layout, mismatched=its)
        for part, its in zip(parts, others)
    ]


class MetricSums:
    """Sums of per-pair or per-sequence metrics, on the device; `read` synchronises, once."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, metrics: dict[str, Tensor], counts: bool = True) -> None:
        """counts: False for a batch that another rank has as well."""
        for name, values in metrics.items():
            self.parts.setdefault(name, []).append(values.reshape(-1) if counts else values.new_empty(0))

    def read(self, **more: Tensor) -> dict[str, float]:
        """Means over all ranks, a NaN left out (KTO: a sequence of the other kind), and the scalars of `more`."""
        scalars = {}
        if self.parts:
            values = [torch.cat(parts).double() for parts in self.parts.values()]
            both = [torch.stack((x.nansum(), (~x.isnan()).sum().double())) for x in values]
            sums, counts = ranks.total(torch.stack(both)).unbind(1)
            scalars = dict(zip(self.parts, (sums / counts).unbind()))
        scalars |= {name: value.double() for name, value in more.items()}
        return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)) if scalars else {}


def loss_inputs(
    loss: Loss | BradleyTerry, batch: Batch, kl_logps: Tensor | None, ref_kl_logps: Tensor | None
) -> dict[str, Any]:
    """What this loss wants beside hidden rows and targets."""
    inputs: dict[str, Any] = {"ref_logps": batch.ref_logps} if loss.needs_reference else {}
    if loss.needs_desirable:
        inputs["desirable"] = batch.desirable
    if loss.needs_kl:
        inputs |= {"kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps}
    return inputs


def baseline(policy: Policy, batches: Sequence[Batch], reference: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """KTO: log-probs of the mismatched sequences of all `batches` under policy and reference, [K] each.

    Of the whole global batch: the baseline's mean must not depend on how the batch is cut. None at all: one zero each.
    """
    mismatched = [batch.kl for batch in batches if batch.kl is not None]
    own = list(sequence_logps(policy, mismatched))
    if not own:
        zero = torch.zeros(1, device=policy.device)
        return zero, zero
    return torch.cat(own), torch.cat(list(reference)).to(policy.device)


def sequence_logps(policy: Policy, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """[S] of each batch, in their order, on every rank: the ranks compute them by turns."""
    for start in range(0, len(batches), ranks.size()):
        yield from by_turns(policy, batches[start : start + ranks.size()])


@torch.no_grad()
def evaluate(policy: Policy, examples: Sequence[Example], kind: Kind, loss: Loss | BradleyTerry, batch_size: int,
             pad: int, reference: ReferenceLogps | None, tick: Tick,
             start: Start | None = None) -> dict[str, float]:
    """Loss over the whole set (its own denominators) and the means of `fastpref.losses.metrics` under TRL's names; of a
    reward model those of `RewardPolicy.score`, accuracy on the held-out pairs among them.

    Also what watch.py says of pairs: with a reference the mean of `spread_kl` as `kl`, and with `start`, which the
    first evaluation fills, the changes since then.
    """
    was_training = policy.model.training
    policy.model.eval()
    order = eval_order(examples, batch_size)
    batches = collated(examples, order, pad, kind, policy.layout)
    totals = totals_of(batches)
    kl_logps = ref_kl_logps = None
    if loss.needs_kl and reference is not None:
        mismatched = [batch.kl for batch in batches if batch.kl is not None]
        own = []
        for done, values in enumerate(sequence_logps(policy, mismatched)):
            tick(done, len(mismatched))
            own.append(values)
        kl_logps = torch.cat(own) if own else torch.zeros(1, device=policy.device)
        ref_kl_logps = reference.kl.to(policy.device) if own else kl_logps
    sums, value = MetricSums(), torch.zeros((), device=policy.device, dtype=torch.float64)
    for done, ((batch, indices), counts) in enumerate(ranks.share(list(zip(batches, order)))):
        tick(done * ranks.size(), len(batches))
        batch = batch.to(policy.device)
        out = policy.score(batch, loss, totals, **loss_inputs(loss, batch, kl_logps, ref_kl_logps))
        value += out.loss * counts
        sums.add(out.metrics, counts)
        begun = None if start is None or out.logps is None else start.of(indices, out.logps, counts)
        sums.add(watched(kind, out, batch, begun), counts)
    policy.model.train(was_training)
    if start is not None:
        start.complete()
    found = sums.read(loss=ranks.total(value))
    to_sums(found, float(totals.pairs))
    return found | take_correlation(found)


# ---- exact match -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A held-out prompt and the answer its greedy generation should be."""

    prompt: str  # for people
    prompt_ids: list[int]
    answer: str
    task: str | None  # the record's `task`, to group by


def questions(records: Sequence[Record], examples: Sequence[Example], limit: int | None) -> list[Question]:
    """One a prompt. The answer is the record's field `answer`, else its chosen response or good completion."""
    found: dict[int, Question] = {}
    for example in examples:
        record = records[example.record_id]
        answer = record.extra.get("answer")
        if answer is None and record.label is not False:
            answer = record.chosen if record.completion is None else record.completion
        if isinstance(answer, list):
            answer = answer[-1].get("content")
        if answer is not None and example.record_id not in found:
            task = record.extra.get("task")
            task = None if task is None else str(task)
            prompt = _text(record.prompt)
            found[example.record_id] = Question(prompt, example.prompt_ids, str(answer).strip(), task)
    return list(found.values())[:limit]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)


def generate(policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], batch_size: int,
             max_new_tokens: int, tick: Tick) -> list[str]:
    """Greedy continuations as text, in the order of the prompts."""
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens, batch_size=batch_size)
    texts = {i: responses[0].text for i, responses in sample(policy, tokenizer, prompts, greedy, tick)}
    return [texts[i] for i in range(len(prompts))]


def is_right(text: str, answer: str) -> bool:
    """Whether a generation is the answer, or ends with it as words of their own: "9+3=12, so 12" for "12"."""
    text = text.strip()
    return text.endswith(answer) and not (text.removesuffix(answer)[-1:].isalnum() and answer[:1].isalnum())


def exact_match(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """Share of generations that are right, of all and of each task."""
    groups: dict[str, list[bool]] = {"exact_match": []}
    for question, text in zip(questions, texts, strict=True):
        right = is_right(text, question.answer)
        groups["exact_match"].append(right)
        if question.task is not None:
            groups.setdefault(f"exact_match/{question.task}", []).append(right)
    return {name: sum(hits) / len(hits) for name, hits in groups.items()}
