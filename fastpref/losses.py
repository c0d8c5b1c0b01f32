"""Preference losses: a few lines of maths on sequence log-probs. Knows no kernel, no schedule and no model.

Notation, per sequence: logp = sum over the scored tokens of log pi(token), ref_logp the same under the reference,
r = logp - ref_logp; per pair: D = r_chosen - r_rejected. s is the logistic function.

A loss is any callable `SequenceLogps -> scalar`. Those here are frozen dataclasses that also state what the schedule
must know (`coupling`), what they need (`needs_reference`, `needs_kl`) and the scale of their implicit reward.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Number = int | float | Tensor


@dataclass(frozen=True)
class Totals:
    """What a loss divides by. Given explicitly: the counts of the GLOBAL batch, so that the losses and gradients of its
    parts (micro-batches, ranks) add up to those of the whole. Python numbers or 0-dim tensors.
    """

    sequences: Number  # pairs count two
    tokens: Number  # scored tokens of all sequences
    chosen_tokens: Number  # scored tokens of the first half

    @property
    def pairs(self) -> Number:
        return self.sequences / 2


@dataclass(frozen=True)
class SequenceLogps:
    """What a loss sees. Tensors are [S] (pairs: first half chosen, second half rejected) unless stated.

    Log-probs are in nats, summed over scored tokens (times their token weights); fp32, or fp64 for fp64 inputs.
    In a schedule that walks the batch group by group these are the sequences of one group, and `totals` still those of
    the batch: reduce with `pair_mean`, `sequence_mean` and `token_mean`, and the groups add up.
    """

    logps: Tensor  # differentiable
    lengths: Tensor  # scored tokens, same dtype as logps
    totals: Totals
    ref_logps: Tensor | None = None
    desirable: Tensor | None = None  # bool (KTO)
    kl: Tensor | None = None  # scalar: KTO's baseline, before it is clamped at 0

    @property
    def chosen(self) -> Tensor:
        return self.logps.chunk(2)[0]

    @property
    def rejected(self) -> Tensor:
        return self.logps.chunk(2)[1]

    @property
    def chosen_lengths(self) -> Tensor:
        return self.lengths.chunk(2)[0]

    @property
    def rejected_lengths(self) -> Tensor:
        return self.lengths.chunk(2)[1]

    @property
    def logratios(self) -> Tensor:
        """r = logp - ref_logp, [S]."""
        if self.ref_logps is None:
            raise ValueError("ref_logps is None; this loss takes ref_logps, or ref_hidden and ref_weight")
        return self.logps - self.ref_logps

    @property
    def margins(self) -> Tensor:
        """D = r_chosen - r_rejected, [S / 2]."""
        chosen, rejected = self.logratios.chunk(2)
        return chosen - rejected

    def pair_mean(self, per_pair: Tensor) -> Tensor:
        """Sum over these pairs, divided by the number of pairs of the batch."""
        return per_pair.sum() / self.totals.pairs

    def sequence_mean(self, per_sequence: Tensor) -> Tensor:
        """Sum over these sequences, divided by the number of sequences of the batch."""
        return per_sequence.sum() / self.totals.sequences

    def token_mean(self, per_sequence: Tensor) -> Tensor:
        """Sum over these sequences, divided by the number of scored tokens of the batch (at least one)."""
        return per_sequence.sum() / _at_least_one(self.totals.tokens)

    def chosen_token_mean(self, per_pair: Tensor) -> Tensor:
        """Sum over these pairs, divided by the number of scored chosen tokens of the batch (at least one)."""
        return per_pair.sum() / _at_least_one(self.totals.chosen_tokens)

    def select(self, start: int, end: int, *, pairs: bool) -> SequenceLogps:
        """The pairs (or sequences) [start, end) with the same totals."""

        half = self.logps.shape[0] // 2
        if (start, end) == (0, half if pairs else self.logps.shape[0]):
            return self

        def take(x: Tensor) -> Tensor:
            return torch.cat((x[start:end], x[half + start : half + end])) if pairs else x[start:end]

        return replace(
            self,
            logps=take(self.logps),
            lengths=take(self.lengths),
            ref_logps=None if self.ref_logps is None else take(self.ref_logps),
            desirable=None if self.desirable is None else take(self.desirable),
        )


def _at_least_one(count: Number) -> Number:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


Coupling = Literal["sequence", "pair", "batch"]
LossFunction = Callable[[SequenceLogps], Tensor]

_CLASSES: dict[str, type[Loss]] = {}


@dataclass(frozen=True)
class Loss:
    """Base of the losses here. A subclass states its traits, its options as dataclass fields, and `__call__`.

    coupling: which log-probs one gradient scalar depends on: its own "sequence", its "pair", or the whole "batch". Only
    a loss that adds up over its groups (see `SequenceLogps`) may state less than "batch".
    """

    name: ClassVar[str] = ""
    pairwise: ClassVar[bool] = True
    coupling: ClassVar[Coupling] = "pair"
    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = False  # needs `desirable` and the mismatched log-probs
    antisymmetric: ClassVar[bool] = False  # depends on a pair only through chosen - rejected (see `coefficients`)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__ and "antisymmetric" not in cls.__dict__:
            cls.antisymmetric = False  # another formula: what its parent says of its own no longer holds
        if cls.__module__ == __name__ and cls.name:
            _CLASSES[cls.name] = cls

    def __call__(self, seq: SequenceLogps) -> Tensor:
        raise NotImplementedError

    @property
    def scratches(self) -> int:
        """Scalars of one item that are unknown until its last token: what a pair longer than the budget accumulates."""
        return 2 if self.pairwise and not self.antisymmetric else 1

    def coefficients(self, seq: SequenceLogps) -> Tensor:
        """c, [S], known beforehand, with dL / dlogp_s = G c_s for one G per item (for two if it has two scratches)."""
        ones = torch.ones_like(seq.logps)
        return torch.cat((ones.chunk(2)[0], -ones.chunk(2)[1])) if self.antisymmetric else ones

    @property
    def reward_scale(self) -> float:
        """The implicit reward is reward_scale * (logp - ref_logp): beta, or 1 for a loss without one."""
        return getattr(self, "beta", 1.0)

    @property
    def spec(self) -> str | None:
        """Name and options as one string, what a custom op carries; None for classes defined elsewhere."""
        if _CLASSES.get(self.name) is not type(self):
            return None
        options = {name: getattr(self, name) for name in _OPTIONS[self.name]}
        plain = {name: value if isinstance(value, str) else float(value) for name, value in options.items()}
        return f"{self.name} {plain}"


@lru_cache(maxsize=256)
def from_spec(spec: str) -> Loss:
    name, _, options = spec.partition(" ")
    return _CLASSES[name](**ast.literal_eval(options))


def _logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x)."""
    loss = -F.logsigmoid(x)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-x)


def _check(ok: bool, name: str, value: object, takes: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it takes {takes}")


def _check_number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    takes = f"a number above {above:g}" if above is not None else f"a number of at least {least:g}"
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it takes {takes}")
    _check((above is None or value > above) and (least is None or value >= least), name, value, takes)


@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning: L = - sum over all scored tokens of log pi(token) / (number of scored tokens).

    One mean over the tokens of the batch (not a mean of sequence means). Uses every sequence; reference-free.
    """

    name = "sft"
    pairwise = False
    coupling = "sequence"
    needs_reference = False

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.token_mean(-seq.logps)


@dataclass(frozen=True)
class DPO(Loss):
    """Direct preference optimisation, arXiv 2305.18290 eq. 7: L = mean over pairs of -log s(beta D).

    label_smoothing e (conservative DPO, arXiv 2305.18290 section 3 of E. Mitchell's note "A note on DPO with noisy
    preferences"): -(1 - e) log s(beta D) - e log s(-beta D). Log-probs are summed over tokens.
    """

    name = "dpo"
    antisymmetric = True
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)
        _check_number("label_smoothing", self.label_smoothing, least=0)
        _check(self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "a number in [0, 0.5)")

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.pair_mean(_logistic(self.beta * seq.margins, self.label_smoothing))


@dataclass(frozen=True)
class RPO(Loss):
    """Regularised preference optimisation, arXiv 2405.16436 eq. 4.8: DPO plus an SFT term on the chosen responses,

        L = mean over pairs of -log s(beta D)  +  eta * beta * SFT.

    sft="sum": SFT = mean over pairs of -logp_chosen, log-probs summed over tokens (the paper's equation).
    sft="tokens": SFT = -(sum of logp_chosen over pairs) / (number of scored chosen tokens of the batch), the
    token-averaged variant of the paper's appendix F (there with eta 0.2, beta 0.5).
    The SFT term keeps the chosen log-probs from falling; the paper's main setting is beta 0.01, eta 0.005.
    """

    name = "rpo"
    beta: float = 0.1
    eta: float = 0.005
    sft: Literal["sum", "tokens"] = "sum"

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)
        _check_number("eta", self.eta, least=0)
        _check(self.sft in ("sum", "tokens"), "sft", self.sft, "'sum' or 'tokens'")

    def __call__(self, seq: SequenceLogps) -> Tensor:
        mean = seq.pair_mean if self.sft == "sum" else seq.chosen_token_mean
        dpo = seq.pair_mean(_logistic(self.beta * seq.margins, 0.0))
        return dpo + self.eta * self.beta * mean(-seq.chosen)


@dataclass(frozen=True)
class IPO(Loss):
    """Identity preference optimisation, arXiv 2310.12036 eq. 17: L = mean over pairs of (h - 1 / (2 beta))^2.

    length_norm="mean": h = r_chosen / |y_chosen| - r_rejected / |y_rejected| (its authors' correction, used by TRL).
    length_norm="sum": h = D, the paper's equation with log-probs summed over tokens. |y|: scored tokens, at least 1.
    """

    name = "ipo"
    antisymmetric = True
    beta: float = 0.1
    length_norm: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)
        _check(self.length_norm in ("mean", "sum"), "length_norm", self.length_norm, "'mean' or 'sum'")

    def __call__(self, seq: SequenceLogps) -> Tensor:
        ratios = seq.logratios * self._per_length(seq)
        chosen, rejected = ratios.chunk(2)
        return seq.pair_mean((chosen - rejected - 1 / (2 * self.beta)) ** 2)

    def _per_length(self, seq: SequenceLogps) -> Tensor:
        return 1 / seq.lengths.clamp(min=1) if self.length_norm == "mean" else torch.ones_like(seq.lengths)

    def coefficients(self, seq: SequenceLogps) -> Tensor:
        return super().coefficients(seq) * self._per_length(seq)


@dataclass(frozen=True)
class KTO(Loss):
    """Kahneman-Tversky optimisation, arXiv 2402.01306 eq. 8, without its constant: mean over sequences of

        desirable_weight   * (1 - s(beta (r - z)))   where desirable,
        undesirable_weight * (1 - s(beta (z - r)))   otherwise,

    z = max(0, mean over the mismatched pairs of logp - ref_logp), without gradient. The mismatched pairs (a response of
    another prompt) come as `kl_logps` and `ref_kl_logps`; for a global batch pass the global ones: the clamp follows
    the mean. No pairs: sequences in any order, each with its `desirable` flag.
    """

    name = "kto"
    pairwise = False
    coupling = "sequence"
    needs_kl = True
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)
        for name in ("desirable_weight", "undesirable_weight"):
            _check_number(name, getattr(self, name), least=0)

    def __call__(self, seq: SequenceLogps) -> Tensor:
        if seq.desirable is None or seq.kl is None:
            raise ValueError("desirable or kl is None: KTO needs the flags and the log-probs of mismatched pairs")
        distance = self.beta * (seq.logratios - seq.kl.detach().clamp(min=0))
        # s(-x) is 1 - s(x) without its cancellation
        desirable = self.desirable_weight * torch.sigmoid(-distance)
        undesirable = self.undesirable_weight * torch.sigmoid(distance)
        return seq.sequence_mean(torch.where(seq.desirable, desirable, undesirable))


@dataclass(frozen=True)
class SLiC(Loss):
    """Sequence likelihood calibration, arXiv 2305.10425 eq. 1-2, with the chosen response as the SFT target:

        L = mean over pairs of max(0, delta - logp_chosen + logp_rejected) - eta * logp_chosen.

    Reference-free; log-probs summed over tokens. Its gradient at the hinge's corner is 0.
    """

    name = "slic"
    needs_reference = False
    delta: float = 1.0
    eta: float = 0.1

    def __post_init__(self) -> None:
        _check_number("delta", self.delta, least=0)
        _check_number("eta", self.eta, least=0)

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.pair_mean(F.relu(self.delta - seq.chosen + seq.rejected) - self.eta * seq.chosen)


@dataclass(frozen=True)
class Hinge(Loss):
    """Hinge on implicit rewards (RSO, arXiv 2309.06657 eq. 9; TRL's "hinge"): mean over pairs of max(0, 1 - beta D)."""

    name = "hinge"
    antisymmetric = True
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_number("beta", self.beta, above=0)

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.pair_mean(F.relu(1 - self.beta * seq.margins))


_OPTIONS = {name: tuple(f.name for f in fields(cls)) for name, cls in _CLASSES.items()}


def get_loss(name: str, **options: object) -> Loss:
    """The loss called `name` with these options: `get_loss("rpo", beta=0.05, eta=0.01)`.

    Raises:
        ValueError: unknown name or option; the message lists those there are.
    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(str(name), _CLASSES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known_names = ", ".join(sorted(_CLASSES))
        raise ValueError(f"loss is {name!r}{hint}; it takes {known_names}, a fastpref.losses object or a callable")
    cls, known = _CLASSES[name], _OPTIONS[name]
    for option in options:
        if option not in known:
            raise ValueError(f"loss {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}")
    return cls(**options)


def evaluate(loss: LossFunction, seq: SequenceLogps) -> Tensor:
    """The scalar a loss returns; anything else is a ValueError."""
    value = loss(seq)
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {got}; it must return a scalar tensor")
    return value


def loss_and_gradient(loss: LossFunction, seq: SequenceLogps) -> tuple[Tensor, Tensor]:
    """(L, dL / d logps), both detached."""
    # Inside a custom op the autograd keys are switched off for the whole thread: on again for these few floats.
    autograd_on = torch._C._SetExcludeDispatchKeyGuard(torch.DispatchKey.AutogradFunctionality, False)
    with autograd_on, torch.enable_grad():
        logps = seq.logps.detach().clone().requires_grad_()
        value = evaluate(loss, replace(seq, logps=logps))
        if not value.requires_grad:  # a constant
            return value.detach(), torch.zeros_like(logps)
        (gradient,) = torch.autograd.grad(value, logps)
    return value.detach(), gradient


def metrics(loss: LossFunction, seq: SequenceLogps) -> dict[str, Tensor]:
    """What TRL users chart, detached, fp32, not reduced.

    Pairs, one value a pair: logps/chosen, logps/rejected and, with a reference, rewards/chosen, rewards/rejected,
    rewards/margins, rewards/accuracies (1 if the chosen reward is larger); reward = reward_scale * (logp - ref_logp).
    With `desirable` flags, one value a sequence: the same names (no margins, no accuracies), NaN where a sequence is of
    the other kind (reduce with nanmean), and kl, KTO's baseline z >= 0 (a scalar). Otherwise logps and rewards, [S].
    """
    logps = seq.logps.detach().float()
    rewards = None
    if seq.ref_logps is not None:
        rewards = getattr(loss, "reward_scale", 1.0) * (seq.logps - seq.ref_logps).detach().float()
    found: dict[str, Tensor] = {}
    if seq.desirable is not None:
        nan = torch.full_like(logps, float("nan"))
        for name, values in (("logps", logps), ("rewards", rewards)):
            if values is not None:
                found[f"{name}/chosen"] = torch.where(seq.desirable, values, nan)
                found[f"{name}/rejected"] = torch.where(seq.desirable, nan, values)
        if seq.kl is not None:
            found["kl"] = seq.kl.detach().float().clamp(min=0)
    elif getattr(loss, "pairwise", logps.shape[0] % 2 == 0):
        found["logps/chosen"], found["logps/rejected"] = logps.chunk(2)
        if rewards is not None:
            chosen, rejected = rewards.chunk(2)
            found["rewards/chosen"], found["rewards/rejected"] = chosen, rejected
            found["rewards/margins"] = chosen - rejected
            found["rewards/accuracies"] = (chosen > rejected).float()
    else:
        found["logps"] = logps
        if rewards is not None:
            found["rewards"] = rewards
    return found
