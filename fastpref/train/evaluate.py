"""Held-out evaluation: loss and preference metrics, and exact match of greedy generations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Kind, eval_order
from fastpref.losses import BradleyTerry, Loss
from fastpref.rows import exact_dtype

from . import ranks
from .display import Tick
from .micro_batches import collated, loss_inputs, sequence_logps, totals_of
from .model import Policy
from .pair_metrics import MetricSums, StartLogps, metrics_of_pairs, take_correlation, to_sums
from .prompts import Question
from .reference import ReferenceLogps
from .sample import Sampling, sample


@torch.no_grad()
def evaluate(policy: Policy, examples: Sequence[Example], kind: Kind, loss: Loss | BradleyTerry, batch_size: int,
             pad: int, reference: ReferenceLogps | None, tick: Tick,
             start: StartLogps | None = None) -> dict[str, float]:
    """Loss over the whole set (its own denominators) and the means of `fastpref.losses.metrics` under TRL's names; of a
    reward model those of `RewardPolicy.compute_loss`, accuracy on the held-out pairs among them.

    Also the `metrics_of_pairs`: with a reference the mean of `spread_kl` as `watch/kl`, and with `start`, which the
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
    sums, value = MetricSums(), torch.zeros((), device=policy.device, dtype=exact_dtype(policy.device))
    for done, ((batch, indices), counts) in enumerate(ranks.share(list(zip(batches, order)))):
        tick(done * ranks.size(), len(batches))
        batch = batch.to(policy.device)
        out = policy.compute_loss(batch, loss, totals, **loss_inputs(loss, batch, kl_logps, ref_kl_logps))
        value += out.loss * counts
        sums.add(out.metrics, counts)
        begun = None if start is None or out.logps is None else start.of(indices, out.logps, counts)
        sums.add(metrics_of_pairs(kind, out, batch, begun), counts)
    policy.model.train(was_training)
    if start is not None:
        start.complete()
    found = sums.read(loss=ranks.total(value))
    to_sums(found, float(totals.pairs))
    return found | take_correlation(found)


# ---- exact match -----------------------------------------------------------------------------------------------------


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
    """Share of generations that are right, of all that have an answer and of each task; nothing where none has."""
    groups: dict[str, list[bool]] = {}
    for question, text in zip(questions, texts, strict=True):
        if question.answer is None:
            continue
        right = is_right(text, question.answer)
        groups.setdefault("exact_match", []).append(right)
        if question.task is not None:
            groups.setdefault(f"exact_match/{question.task}", []).append(right)
    return {name: sum(hits) / len(hits) for name, hits in groups.items()}
