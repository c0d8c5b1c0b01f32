"""A global batch in its micro-batches: denominators, the baseline of KTO, and log-probs by turns of the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.data import Batch, Example, Kind, Layout, collate, mismatched_parts
from fastpref.losses import BradleyTerry, Loss, Totals

from . import ranks
from .model import Policy


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


def by_turns(policy: Policy, batches: Sequence[Batch]) -> list[Tensor]:
    """[S] of each batch on every rank; each computes one of them."""
    if not batches:
        return []
    ((mine, _),) = ranks.share(batches)
    return ranks.gathered(policy.sequence_logps(mine.to(policy.device)), [batch.num_sequences for batch in batches])
