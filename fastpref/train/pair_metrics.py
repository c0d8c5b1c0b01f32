"""What is measured of every pair, from numbers that a step or an evaluation has anyway, and its sums over batches.

Log-probs against their start, the KL on the data's responses, the correlation of margin and length: the part of the
watch on over-optimisation that is always on. docs/watch.md has every metric, its formula, and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.data import Batch, Example, Kind, identity_of
from fastpref.rows import exact_dtype

from . import ranks

FELL = 0.01  # nats by which a log-prob must be lower to have fallen: rounding is no fall
FLAT = 1e-4  # standard deviation of margins below which there is rounding to correlate, and nothing else
MOMENT = "moment/"  # before the names of the sums that a correlation is made of


def metrics_of_pairs(kind: Kind, out: Any, batch: Batch, start: Tensor | None) -> dict[str, Tensor]:
    """What is watched of one batch, one value a pair (KTO: a sequence, NaN where it is of the other kind), on the
    device and without waiting for it. out: what `Policy.compute_loss` returned; start [S]: log-probs to compare with.
    """
    found: dict[str, Tensor] = {}
    if out.logps is not None and kind != "sft":
        found["response_length"] = out.lengths.float()
        if start is not None:
            found |= changes(out.logps - start, batch.desirable)
        if batch.ref_logps is not None:
            found["watch/kl"] = spread_kl(out.logps, batch.ref_logps, out.lengths)
    if kind == "pair":
        found |= moments(_margins(out.metrics), _length_gaps(batch))
    return found


def changes(change: Tensor, desirable: Tensor | None) -> dict[str, Tensor]:
    """change [S]: log-prob minus its start, nats. desirable [S]: KTO's; None: pairs, first half chosen."""
    if desirable is None:
        chosen, rejected = change.chunk(2)
    else:
        chosen, rejected = change.where(desirable, math.nan), change.where(~desirable, math.nan)
    fell = (chosen < -FELL).float().where(~chosen.isnan(), math.nan)
    return {"watch/chosen_change": chosen, "watch/rejected_change": rejected, "watch/chosen_fell": fell}


def spread_kl(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> Tensor:
    """|y| (exp(rho) - 1 - rho), rho = (log pi(y|x) - log pi_ref(y|x)) / |y|; [S] each, nats a response, at least 0.

    The k3 estimator (J. Schulman, "Approximating KL divergence") of KL(pi_ref || pi), with the log-ratio of a response
    spread evenly over its tokens. It estimates that in so far as the responses are like the reference's own.
    """
    tokens = lengths.clamp(min=1)
    rho = (logps - ref_logps) / tokens
    return tokens * (torch.expm1(rho) - rho)


def of_kinds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Over all pairs of a desirable and an undesirable response, the share in which the desirable one has the larger
    value; [n] each, NaN where a response is of the other kind."""
    there = ~chosen.isnan()
    below = torch.searchsorted(rejected.nan_to_num(math.inf).sort().values, chosen.nan_to_num(math.inf))
    return (below * there).sum() / (there.sum() * (~rejected.isnan()).sum())


def _margins(metrics: dict[str, Tensor]) -> Tensor:
    """[P]: of implicit rewards, of a reward model's, or of log-probs where a loss has no rewards."""
    for name in ("rewards/margins", "margin"):
        if name in metrics:
            return metrics[name]
    return metrics["logps/chosen"] - metrics["logps/rejected"]


def _length_gaps(batch: Batch) -> Tensor:
    """[P] fp64 where there is one: |y_chosen| - |y_rejected|, scored tokens."""
    device = batch.input_ids.device
    lengths = torch.tensor(batch.cu_seqlens, dtype=exact_dtype(device)).diff()
    chosen, rejected = lengths.chunk(2)
    gaps = chosen - rejected
    return gaps.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else gaps


def moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Whose sums over any number of batches, ranks and steps give the correlation of all x and y."""
    x, y = x.to(exact_dtype(x.device)), y.to(exact_dtype(y.device))
    return {f"{MOMENT}{name}": value for name, value in
            (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y))}


def to_sums(values: dict[str, float], pairs: float) -> None:
    """Turns the means of `moments` over a batch of `pairs` pairs into sums, in place, and adds the count."""
    for name in [name for name in values if name.startswith(MOMENT)]:
        values[name] *= pairs
        values[f"{MOMENT}n"] = pairs


def take_correlation(sums: dict[str, float]) -> dict[str, float]:
    """Pearson's, of the sums of `moments`, which it removes: {"watch/length_correlation": r}, or nothing where the
    margins or the lengths do not vary."""
    own = {name: sums.pop(name) for name in [name for name in sums if name.startswith(MOMENT)]}
    if not own or not own[f"{MOMENT}n"]:
        return {}
    n, x, y, xx, yy, xy = (own[MOMENT + name] for name in ("n", "x", "y", "xx", "yy", "xy"))
    of_x, of_y = max(xx / n - (x / n) ** 2, 0.0), max(yy / n - (y / n) ** 2, 0.0)
    if not (of_x > FLAT**2 and of_y > 1e-9):
        return {}
    return {"watch/length_correlation": (xy / n - x / n * y / n) / math.sqrt(of_x * of_y)}


class StartLogps:
    """Log-probs of the held-out responses as a stage begins, which its first evaluation leaves here."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.data = identity_of(examples)
        responses = len(examples[0].responses) if examples else 0
        self.logps = torch.zeros(len(examples), responses)
        self.known = False  # before the first evaluation, and of other data than it was on

    def of(self, indices: Sequence[int], logps: Tensor, counts: bool) -> Tensor | None:
        """[S] of a batch of these examples, whose log-probs are now `logps`. counts: see `ranks.share`."""
        if self.known:
            return self.logps[list(indices)].t().reshape(-1).to(logps.device, non_blocking=True)
        if counts:
            self.logps[list(indices)] = logps.view(-1, len(indices)).t().float().cpu()
        return logps

    def complete(self) -> None:
        """After an evaluation, on all ranks."""
        if not self.known:
            self.logps, self.known = ranks.total(self.logps), True

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"start": {"data": self.data, "logps": self.logps}} if self.known else {}

    def restore(self, tensors: dict[str, Any]) -> None:
        saved = tensors.get("start")
        if saved and saved["data"] == self.data:
            self.logps, self.known = saved["logps"], True


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
            values = [torch.cat(parts) for parts in self.parts.values()]
            values = [x.to(exact_dtype(x.device)) for x in values]
            both = [torch.stack((x.nansum(), (~x.isnan()).sum().to(x.dtype))) for x in values]
            sums, counts = ranks.total(torch.stack(both)).unbind(1)
            scalars = dict(zip(self.parts, (sums / counts).unbind()))
            sides = [f"rewards/{side}" for side in ("chosen", "rejected")]
            if scalars.keys() >= set(sides) and not {"rewards/margins", "margin"} & scalars.keys():  # no pairs
                mine = [torch.cat(self.parts[side]) for side in sides]
                every = [torch.cat([part.to(sums.device) for part in ranks.told(one)]) for one in mine]
                scalars["rewards/margins"] = scalars[sides[0]] - scalars[sides[1]]
                scalars["rewards/accuracies"] = of_kinds(*every)
        scalars |= {name: value.to(exact_dtype(value.device)) for name, value in more.items()}
        return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True)) if scalars else {}
