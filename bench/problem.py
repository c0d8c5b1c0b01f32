"""The inputs of the head benchmarks, and the fp64 truth their results are checked against. Nothing from fastpref.

Logits like a trained model's, without one: rows of W and the base of a hidden row are Gaussian, so that the logits of a
token are normal with standard deviation 3; then the hidden row moves along the target's row of W until the target's
log-prob is -e, e drawn from an exponential distribution of mean 2 nats. That is many tokens the model is sure of, a
long tail of surprises and -2 nats on average, which is what chat models give on responses. All sequences are equally
long: padding is then free, to the advantage of implementations that project it. `LOGITS` has the other distributions
that accuracy is measured on.

Shape suffixes: N scored rows, H hidden size, V vocabulary, S sequences, T padded length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
BETA, ETA = 0.1, 0.005
LOGITS_STD = 3.0
MEAN_NLL = 2.0  # nats a token
HUGE_STD = 2500.0  # the largest of 32k-256k logits is then about 1e4
ALL_LOWER = 100.0  # one hidden feature and minus one weight in every row: every logit is 1e4 lower, exactly
WEIGHT_STD = 0.02  # what most models initialise their head with
REFERENCE_STD = 5.0  # nats a sequence between policy and reference

# name: (standard deviation of a token's logits, mean surprise in nats of the token that hidden moves to, or None)
LOGITS: dict[str, tuple[float, float | None]] = {
    "trained": (LOGITS_STD, MEAN_NLL),
    "uniform": (0.01, None),
    "peaked": (LOGITS_STD, 0.01),  # sure of the target
    "wrong": (LOGITS_STD, 0.01),  # as sure of another token
    "huge": (HUGE_STD, None),
    "negative": (LOGITS_STD, MEAN_NLL),  # as trained, all of them near -1e4
    "chat": (math.nan, None),  # as SmolLM2's on its own answers: `_chat`; `python -m bench.smollm2` compares
}
REAL = "smollm2"  # hidden rows, head and targets of that model itself (smollm2.py)
REAL_SIZES = 576, 49152  # H, V

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    rows: int  # N, scored rows
    hidden: int  # H
    vocab: int  # V
    pairs: int = 8
    prompt_share: float = 0.0  # of the padded input's rows, not scored
    softcap: float | None = None
    logits: str = "trained"  # of LOGITS, or REAL

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.rows % (2 * self.pairs):
            raise ValueError(f"rows is {self.rows}; it takes a multiple of the {2 * self.pairs} sequences")
        if not 0 <= self.prompt_share < 1:
            raise ValueError(f"prompt_share is {self.prompt_share}; it takes a number in [0, 1)")
        if self.logits not in (*LOGITS, REAL):
            raise ValueError(f"logits is {self.logits!r}; it takes {', '.join((*LOGITS, REAL))}")
        if self.logits == REAL and (self.hidden, self.vocab, self.softcap) != (*REAL_SIZES, None):
            raise ValueError(f"logits is {REAL!r}, whose H and V are {REAL_SIZES[0]} and {REAL_SIZES[1]}, not "
                             f"{self.hidden} and {self.vocab}")

    def with_logits(self, logits: str) -> Shape:
        """Those of the real model bring its sizes along."""
        sizes = dict(zip(("hidden", "vocab"), REAL_SIZES), softcap=None) if logits == REAL else {}
        return replace(self, logits=logits, **sizes)

    @property
    def sequences(self) -> int:
        return 2 * self.pairs

    @property
    def scored_length(self) -> int:
        return self.rows // self.sequences

    @property
    def padded_length(self) -> int:
        return round(self.scored_length / (1 - self.prompt_share))

    def __str__(self) -> str:
        extra = f", softcap {self.softcap:g}" if self.softcap else ""
        extra += f", {self.prompt_share:.0%} prompt" if self.prompt_share else ""
        extra += f", {self.logits} logits" if self.logits != "trained" else ""
        return f"N {self.rows}, H {self.hidden}, V {self.vocab}{extra}"


@dataclass(frozen=True, eq=False)
class Batch:
    """What every implementation is given. hidden and weight are leaves; gradients wanted are switched per run."""

    shape: Shape
    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [S, T]; the prompt's rows are IGNORE
    index: Tensor  # [N] scored rows among the S * T
    scored_targets: Tensor  # [N]
    ref_logps: Tensor  # [S] fp32
    desirable: Tensor  # [S] bool
    kl_logps: Tensor  # [S] fp32, KTO's mismatched pairs
    ref_kl_logps: Tensor  # [S] fp32

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def rows(self) -> Tensor:
        """[N, H] scored rows, differentiable; a view where every row is scored."""
        flat = self.hidden.flatten(0, 1)
        return flat if not self.shape.prompt_share else flat.index_select(0, self.index)

    def sequence_logps(self, token_logps_N: Tensor) -> Tensor:
        return token_logps_N.view(self.shape.sequences, -1).sum(1)

    def without_references(self) -> Batch:
        return replace(self, ref_logps=torch.zeros_like(self.ref_logps))


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """The same numbers for the same arguments on the same kind of device."""
    gen = torch.Generator(device=device).manual_seed(seed)
    sequences, length, prompt = shape.sequences, shape.padded_length, shape.padded_length - shape.scored_length

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, device=device)

    if shape.logits in (REAL, "chat"):
        return _with_targets_of_its_own(shape, dtype, device, gen)
    deviation, mean_nll = LOGITS[shape.logits]
    weight = normal(shape.vocab, shape.hidden).mul_(WEIGHT_STD)
    hidden = normal(sequences * length, shape.hidden).mul_(deviation / (WEIGHT_STD * math.sqrt(shape.hidden)))
    targets = torch.randint(0, shape.vocab, (sequences, length), generator=gen, device=device)
    towards = (targets + (shape.vocab // 2 if shape.logits == "wrong" else 0)) % shape.vocab
    picked = weight[towards.flatten()]
    nll = -(mean_nll or 0.0) * torch.rand(sequences * length, generator=gen, device=device).clamp_(1e-4).log_()
    # The logits of the other tokens are normal, so their log-sum-exp is log V + variance / 2; the variance grows with
    # the shift, hence the few rounds.
    base = (picked * hidden).sum(1)
    wanted = base
    shifted = hidden
    for _ in range(4 if mean_nll is not None else 0):
        shifted = hidden + picked * ((wanted - base) / picked.square().sum(1))[:, None]
        variance = (WEIGHT_STD * shifted.norm(dim=1)).square()
        wanted = math.log(shape.vocab) + variance / 2 - torch.expm1(nll).log()
        if shape.softcap is not None:
            wanted = shape.softcap * torch.atanh((wanted / shape.softcap).clamp(-0.95, 0.95))
    hidden = shifted.view(sequences, length, shape.hidden)
    if shape.logits == "negative":
        hidden[..., 0], weight[:, 0] = ALL_LOWER, -ALL_LOWER
    targets[:, :prompt] = IGNORE
    index = (targets.flatten() != IGNORE).nonzero()[:, 0]

    # References near the policy's log-probs; mismatched pairs a little less likely than under the reference.
    expected = -nll.view(sequences, length)[:, prompt:].sum(1)
    kl_logps = -5.0 * shape.scored_length + normal(sequences)
    batch = Batch(
        shape, hidden.to(dtype), weight.to(dtype), targets, index, targets.flatten()[index],
        ref_logps=expected + REFERENCE_STD * normal(sequences),
        desirable=torch.arange(sequences, device=device) % 2 == 0,
        kl_logps=kl_logps, ref_kl_logps=kl_logps - 1.5 + normal(sequences),
    )
    if shape.logits == "trained":
        return batch
    if shape.logits == "huge":  # log-probs of -1e6, whose rounding alone is nats: any reference near them is noise
        return batch.without_references()
    return replace(batch, ref_logps=(Truth(batch).logps + REFERENCE_STD * normal(sequences)).float())


def _with_targets_of_its_own(shape: Shape, dtype: torch.dtype, device: Any, gen: torch.Generator) -> Batch:
    """Rows and targets that are there, with prompts of other rows before them and references near the policy."""
    if shape.logits == REAL:
        from .smollm2 import rows_of_answers

        hidden_NH, weight, targets_N = (part.to(device) for part in rows_of_answers(shape.rows))
    else:
        hidden_NH, weight, targets_N = _chat(shape, device, gen)
    sequences, length, prompt = shape.sequences, shape.padded_length, shape.padded_length - shape.scored_length
    scored = hidden_NH.view(sequences, -1, shape.hidden)
    before = torch.arange(prompt, device=device) % shape.scored_length
    hidden = torch.cat((scored.roll(1, 0)[:, before], scored), 1)
    targets = torch.full((sequences, length), IGNORE, device=device)
    targets[:, prompt:] = targets_N.view(sequences, -1)
    noise = torch.randn(4, sequences, generator=gen, device=device)
    kl_logps = -5.0 * shape.scored_length + noise[0]
    batch = Batch(
        shape, hidden.to(dtype), weight.to(dtype), targets, (targets.flatten() != IGNORE).nonzero()[:, 0], targets_N,
        ref_logps=torch.zeros(sequences, device=device), desirable=torch.arange(sequences, device=device) % 2 == 0,
        kl_logps=kl_logps, ref_kl_logps=kl_logps - 1.5 + noise[1],
    )
    return replace(batch, ref_logps=(Truth(batch).logps + REFERENCE_STD * noise[2]).float())


def _chat(shape: Shape, device: Any, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, H], weight, targets [N]): Gaussian logits of a standard deviation of 1 to 2 times sqrt(2 log V).

    From there on a softmax is carried by its few largest logits, and the number of columns above p falls like a power
    of p, as a trained model's does. The targets are drawn at temperature 0.7, as the model's answers were.
    """
    critical = math.sqrt(2 * math.log(shape.vocab))
    weight = torch.randn(shape.vocab, shape.hidden, generator=gen, device=device).mul_(WEIGHT_STD)
    hidden = torch.randn(shape.rows, shape.hidden, generator=gen, device=device)
    deviations = critical * (1 + torch.rand(shape.rows, 1, generator=gen, device=device))
    hidden *= deviations / (WEIGHT_STD * math.sqrt(shape.hidden))
    drawn = [torch.multinomial((x @ weight.t() / 0.7).softmax(1), 1, generator=gen) for x in hidden.split(256)]
    return hidden, weight, torch.cat(drawn)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Losses on sequence log-probs, written from the papers: what implementations that only make log-probs are completed
# with, and what the truth is made of. Means over pairs (KTO: sequences).
# ---------------------------------------------------------------------------------------------------------------------


def _ratios(logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    chosen, rejected = (logps - batch.ref_logps).chunk(2)
    return chosen, rejected


def dpo(logps: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _ratios(logps, batch)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def rpo(logps: Tensor, batch: Batch) -> Tensor:
    return dpo(logps, batch) - ETA * BETA * logps.chunk(2)[0].mean()


def ipo(logps: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _ratios(logps, batch)
    return ((chosen - rejected) / batch.shape.scored_length - 1 / (2 * BETA)).square().mean()


def kto(logps: Tensor, batch: Batch) -> Tensor:
    baseline = (batch.kl_logps - batch.ref_kl_logps).mean().clamp(min=0)
    distance = BETA * (logps - batch.ref_logps - baseline)
    return torch.sigmoid(torch.where(batch.desirable, -distance, distance)).mean()


def sft(logps: Tensor, batch: Batch) -> Tensor:
    """Mean over tokens: all that cross-entropy kernels without a gradient per token can do."""
    return -logps.sum() / batch.shape.rows


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {"dpo": dpo, "rpo": rpo, "ipo": ipo, "kto": kto, "sft": sft}


# ---------------------------------------------------------------------------------------------------------------------
# Truth
# ---------------------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    loss: Tensor
    logps: Tensor  # [S], of the loss
    hidden: Tensor  # [sampled rows, H]
    weight: Tensor  # [sampled vocab rows, H]


@dataclass(frozen=True, eq=False)
class Truth:
    """fp64 log-probs of every token; gradients of sampled rows of hidden and weight, the first and last among them."""

    batch: Batch
    sampled_rows: int = 64
    sampled_vocab: int = 256
    slice_cols: int = field(default=8192, repr=False)
    block_rows: int = field(default=16384, repr=False)

    @cached_property
    def _hidden(self) -> Tensor:
        return self.batch.hidden.detach().flatten(0, 1)[self.batch.index]

    @cached_property
    def rows(self) -> Tensor:
        """Sampled scored rows, [<= sampled_rows]."""
        count = self.batch.shape.rows
        return torch.linspace(0, count - 1, min(count, self.sampled_rows), device=self.batch.device).round().long()

    @cached_property
    def vocab(self) -> Tensor:
        """Sampled rows of weight: half of them targets, where dW is largest."""
        size, spread = self.batch.shape.vocab, self.sampled_vocab // 2
        if size <= self.sampled_vocab:
            return torch.arange(size, device=self.batch.device)
        evenly = torch.linspace(0, size - 1, spread, device=self.batch.device).round().long()
        return torch.cat((evenly, self.batch.scored_targets[:: max(1, self.batch.shape.rows // spread)])).unique()

    def _slices(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first column, W, z) of each slice of the vocabulary, fp64."""
        x = hidden.double()
        for start in range(0, self.batch.shape.vocab, self.slice_cols):
            weight = self.batch.weight.detach()[start : start + self.slice_cols].double()
            yield start, weight, self._cap(x @ weight.t())

    def _cap(self, u: Tensor) -> Tensor:
        cap = self.batch.shape.softcap
        return u if cap is None else cap * torch.tanh(u / cap)

    def _slope(self, z: Tensor) -> Tensor | float:
        cap = self.batch.shape.softcap
        return 1.0 if cap is None else 1 - (z / cap).square()

    @cached_property
    def _pass(self) -> tuple[Tensor, Tensor, float]:
        """(token log-probs, lse, mean standard deviation of a token's logits)."""
        targets = self.batch.scored_targets.split(self.block_rows)
        blocks = [self._block(hidden, some) for hidden, some in zip(self._hidden.split(self.block_rows), targets)]
        logps, lse, deviations = (torch.cat(each) for each in zip(*blocks))
        return logps, lse, float(deviations.mean())

    def _block(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(token log-probs, lse, standard deviation of the logits) of some rows."""
        lse = torch.full(targets.shape, -math.inf, dtype=torch.float64, device=self.batch.device)
        picked, total, squares = (torch.zeros_like(lse) for _ in range(3))
        for start, weight, z in self._slices(hidden):
            lse = torch.logaddexp(lse, z.logsumexp(1))
            total, squares = total + z.sum(1), squares + z.square().sum(1)
            local = targets - start
            inside = (local >= 0) & (local < weight.shape[0])
            found = z.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0]
            picked = torch.where(inside, found, picked)
        size = self.batch.shape.vocab
        deviations = (squares / size - (total / size).square()).clamp(min=0).sqrt()
        return picked - lse, lse, deviations

    @property
    def token_logps(self) -> Tensor:
        """[N]"""
        return self._pass[0]

    @property
    def logps(self) -> Tensor:
        """[S]"""
        return self.batch.sequence_logps(self.token_logps)

    @property
    def logits_std(self) -> float:
        return self._pass[2]

    @cached_property
    def _directions(self) -> tuple[Tensor, Tensor]:
        """dX of the sampled rows, and U of the sampled vocabulary, both without the loss scalar."""
        hidden, targets, lse = self._hidden[self.rows], self.batch.scored_targets[self.rows], self._pass[1]
        dx = torch.zeros(hidden.shape, dtype=torch.float64, device=self.batch.device)
        for start, weight, z in self._slices(hidden):
            columns = torch.arange(start, start + weight.shape[0], device=z.device)
            hit = (columns == targets[:, None]).double()
            dx += ((hit - (z - lse[self.rows, None]).exp()) * self._slope(z)) @ weight
        z = self._cap(self._hidden.double() @ self.batch.weight.detach()[self.vocab].double().t())
        hit = (self.batch.scored_targets[:, None] == self.vocab).double()
        return dx, (hit - (z - lse[:, None]).exp()) * self._slope(z)

    def gradients(self, loss: str, batch: Batch) -> Gradients:
        """batch: this truth's own, or the same without references."""
        logps = self.logps.requires_grad_()
        value = LOSSES[loss](logps, batch)
        (g,) = torch.autograd.grad(value, logps)
        g_N = g.repeat_interleave(self.batch.shape.scored_length)[:, None]
        dx, u = self._directions
        return Gradients(value.detach(), g, g_N[self.rows] * dx, u.t() @ (g_N * self._hidden.double()))


def relative(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinitely wrong."""
    error = float((got.double() - truth).norm() / truth.norm().clamp(min=1e-300))
    return error if error == error else math.inf
