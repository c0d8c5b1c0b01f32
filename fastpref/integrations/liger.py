"""Liger's chunked losses under their own names: constructor arguments, call signatures and return tuples of
liger-kernel 0.8, so that changing the import is enough.

    from fastpref.integrations.liger import LigerFusedLinearDPOLoss

What differs: prompts and padding cost nothing in the head; sums are fp32 whatever the weight's dtype; sequences without
scored tokens give 0, not NaN; an odd batch, and an option that Liger would ignore, are refused. liger-kernel itself is
not needed. The functions (`liger_fused_linear_dpo`, ...) take their arguments by place, as Liger's do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpref import losses
from fastpref.head import PreferenceOutput, linear_logps, linear_preference_loss
from fastpref.losses import Coupling, Loss, SequenceLogps, Totals

from .liger_grpo import LigerFusedLinearGRPOLoss

__all__ = [
    "CrossEntropyOutput",  # noqa: F822
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cpo",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]

_DISTILLATION = (
    "LigerFusedLinearCosineSimilarityLoss", "LigerFusedLinearJSDLoss", "liger_fused_linear_cosine",
    "liger_fused_linear_jsd",
)


def __getattr__(name: str) -> Any:
    if name == "CrossEntropyOutput":
        return _cross_entropy_output()
    if name in _DISTILLATION:  # an AttributeError would lose its words on the way out of an import
        raise ImportError(f"{name} is distillation, which fastpref has not: from liger_kernel.chunked_loss")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class _Averaged(Loss):
    """A loss of log-probs averaged over the scored tokens of each sequence (`average_log_prob`)."""

    loss: Loss
    length_averaged = True

    @property
    def pairwise(self) -> bool:
        return self.loss.pairwise

    @property
    def coupling(self) -> Coupling:
        return self.loss.coupling

    @property
    def needs_reference(self) -> bool:
        return self.loss.needs_reference

    @property
    def needs_desirable(self) -> bool:
        return self.loss.needs_desirable

    @property
    def needs_kl(self) -> bool:
        return self.loss.needs_kl

    @property
    def antisymmetric(self) -> bool:
        return self.loss.antisymmetric

    def __call__(self, seq: SequenceLogps) -> Tensor:
        ref_logps = None if seq.ref_logps is None else seq.ref_logps * seq.per_length
        return self.loss(replace(seq, logps=seq.logps * seq.per_length, ref_logps=ref_logps))


@dataclass(frozen=True)
class _UnclampedKTO(losses.KTO):
    """KTO with the baseline as it is given: who calls Liger's has clamped it."""

    def terms(self, seq: SequenceLogps, desirable: Tensor) -> tuple[Tensor, Tensor]:
        assert seq.kl is not None
        distance = self.beta * (seq.logratios - seq.kl.detach())
        return torch.sigmoid(-distance), torch.sigmoid(distance)


class _Chunked(nn.Module):
    """What Liger's preference losses share."""

    def __init__(self, ignore_index: int, compiled: bool, chunk_size: int) -> None:
        super().__init__()
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size!r}; it takes a whole number of at least 1")
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")

    def _lengths(self, target: Tensor) -> Tensor:
        return (target != self.ignore_index).sum(1).clamp(min=1)


def _reference(use_ref_model: bool, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None,
               target: Tensor, like: Tensor) -> dict[str, Any]:
    """Without a reference model Liger takes its log-probs to be 0, and does not look at the other arguments."""
    if not use_ref_model:
        return {"ref_logps": torch.zeros(target.shape[0], dtype=torch.float32, device=like.device)}
    for name, value in (("ref_input", ref_input), ("ref_weight", ref_weight)):
        if value is None:
            raise ValueError(f"{name} is None; it takes the reference's, or construct with use_ref_model=False")
    return {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}


@torch.no_grad()
def _logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[S] sums of all logits of a sequence, ignored positions and all: (sum of x_t) . (sum of W_v) needs no logits."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = (hidden.sum(1, dtype=dtype) * weight.sum(0, dtype=dtype)).sum(1)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


class _Pairs(_Chunked):
    beta: float
    compute_nll_loss: bool

    def _run(
        self, loss: Loss, average: bool, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None,
        **reference: Any,
    ) -> tuple[Tensor, list[Tensor], PreferenceOutput]:
        """(loss, what Liger returns beside it, the same unreduced)."""
        out = linear_preference_loss(
            hidden, weight, target, loss=loss, bias=bias, ignore_index=self.ignore_index, **reference
        )
        lengths = self._lengths(target)
        nll = torch.zeros((), dtype=out.logps.dtype, device=out.logps.device)
        if self.compute_nll_loss:
            nll = -out.logps.chunk(2)[0].sum() / (target.chunk(2)[0] != self.ignore_index).sum().clamp(min=1)
        if average:
            ref_logps = None if out.ref_logps is None else out.ref_logps / lengths
            out = out._replace(logps=out.logps / lengths, ref_logps=ref_logps)
        ratios = out.logps if out.ref_logps is None else out.logps - out.ref_logps
        means = _logit_sums(hidden, weight, bias).view(2, -1).mean(1) / (target.shape[1] * weight.shape[0])
        return out.loss, [*out.logps.chunk(2), *means, nll, *(self.beta * ratios).chunk(2)], out


_DPO: dict[str, Callable[[float, float, float], Loss]] = {
    "sigmoid": lambda beta, smoothing, _: losses.DPO(beta, label_smoothing=smoothing),
    "hinge": lambda beta, *_: losses.Hinge(beta),
    "exo_pair": lambda beta, smoothing, _: losses.EXO(beta, label_smoothing=smoothing),
    "nca_pair": lambda beta, *_: losses.NCA(beta),
    "robust": lambda beta, smoothing, _: losses.RobustDPO(beta, label_smoothing=smoothing),
    "bco_pair": lambda beta, *_: losses.BCOPair(beta),
    "sppo_hard": lambda beta, *_: losses.SPPO(beta),
    "apo_zero": lambda beta, *_: losses.APOZero(beta),
    "apo_down": lambda beta, *_: losses.APODown(beta),
    "discopop": lambda beta, _, tau: losses.DiscoPOP(beta, tau=tau),
}
_SMOOTHED = ("sigmoid", "robust", "exo_pair")


class LigerFusedLinearDPOLoss(_Pairs):
    """Liger's DPO and its relatives: preference loss + alpha * (token mean of the chosen NLL, if compute_nll_loss).

    Args:
        compiled, chunk_size: taken, and without a meaning here (one pass over tiles of tokens, whatever the pairs).
        label_smoothing: of "robust", "exo_pair" and, unlike Liger, which ignores it there, of "sigmoid" (cDPO).
        use_ref_model: False takes the reference's log-probs to be 0.
        others: as in liger_kernel.chunked_loss.

    Raises:
        ValueError: an unknown loss_type; label_smoothing or discopop_tau for a loss_type that has none.

    Call: `(lin_weight [V, H], _input [2 B, T, H], target [2 B, T], bias=None, ref_input=None, ref_weight=None,
    ref_bias=None)`; first half chosen. Returns `(loss, (chosen_logps, rejected_logps, chosen_logits_mean,
    rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards))`, all but loss detached.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(ignore_index, compiled, chunk_size)
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        if loss_type not in _DPO:
            raise ValueError(f"loss_type is {loss_type!r}; it takes {', '.join(_DPO)}")
        if label_smoothing and loss_type not in _SMOOTHED:
            raise ValueError(f"label_smoothing is {label_smoothing!r} with loss_type {loss_type!r}, which has none; it "
                             f"takes 0 there, or one of {', '.join(_SMOOTHED)}")
        if discopop_tau != 0.05 and loss_type != "discopop":
            raise ValueError(f"discopop_tau is {discopop_tau!r} with loss_type {loss_type!r}; it takes 'discopop'")
        loss = _DPO[loss_type](beta, label_smoothing, discopop_tau)
        loss = _Averaged(loss) if average_log_prob else loss
        if compute_nll_loss and alpha:
            loss = losses.WeightedSum((loss, losses.ChosenSFT()), (1.0, alpha))
        self._loss = loss

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        reference = _reference(self.use_ref_model, ref_input, ref_weight, ref_bias, target, _input)
        loss, beside, _ = self._run(self._loss, self.average_log_prob, lin_weight, _input, target, bias, **reference)
        return loss, tuple(beside)


class LigerFusedLinearCPOLoss(_Pairs):
    """Liger's CPO: -log s(beta (chosen - rejected)) + alpha * (token mean of the chosen NLL, if compute_nll_loss).

    Arguments, call and return tuple as Liger's; see `LigerFusedLinearDPOLoss`, without a reference.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, compiled, chunk_size)
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.average_log_prob = average_log_prob
        self._loss = losses.CPO(
            beta,
            alpha=alpha if compute_nll_loss else 0.0,
            label_smoothing=label_smoothing,
            length_norm="mean" if average_log_prob else "sum",
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, beside, _ = self._run(self._loss, self.average_log_prob, lin_weight, _input, target, bias)
        return loss, tuple(beside)


class LigerFusedLinearSimPOLoss(_Pairs):
    """Liger's SimPO: -log s(beta (mean chosen - mean rejected) - gamma) + alpha * (chosen NLL, if compute_nll_loss).

    gamma is the margin itself, as in the paper's equation 6. Arguments, call and return tuple as Liger's; log-probs are
    averaged over tokens.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, compiled, chunk_size)
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.gamma = gamma
        self._loss = losses.SimPO(
            beta, gamma=gamma, label_smoothing=label_smoothing, alpha=alpha if compute_nll_loss else 0.0
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, beside, _ = self._run(self._loss, True, lin_weight, _input, target, bias)
        return loss, tuple(beside)


class LigerFusedLinearORPOLoss(_Pairs):
    """Liger's ORPO: (token mean of the chosen NLL, if compute_nll_loss) - beta log s(log odds ratio).

    Arguments and call as Liger's. nll_target [2 B, T]: other targets for the NLL term (its chosen half is used), at the
    price of a second pass over the rows that they score. Returns the tuple of `LigerFusedLinearDPOLoss` with two more:
    log_odds_ratio (mean of log s) and log_odds_chosen (mean log odds ratio). Log-probs are averaged over tokens.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, compiled, chunk_size)
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self._loss = losses.ORPO(beta, alpha=1.0 if compute_nll_loss else 0.0)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.compute_nll_loss:
            nll_target = None
        loss = self._loss if nll_target is None else losses.ORPO(self.beta, alpha=0.0)
        value, beside, out = self._run(loss, True, lin_weight, _input, target, bias)
        if nll_target is not None:
            if nll_target.shape != target.shape:
                got = tuple(nll_target.shape)
                raise ValueError(f"nll_target is of shape {got}; it takes {tuple(target.shape)}, as target")
            half = target.shape[0] // 2
            nll = linear_preference_loss(_input[:half], lin_weight, nll_target[:half], loss=losses.SFT(), bias=bias,
                                         ignore_index=self.ignore_index).loss
            value, beside[4] = value + nll, nll.detach()
        below_0 = out.logps.clamp(max=-torch.finfo(out.logps.dtype).eps)
        chosen, rejected = (below_0 - torch.log(-torch.expm1(below_0))).chunk(2)
        return value, (*beside, F.logsigmoid(chosen - rejected).mean(), (chosen - rejected).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Single sequences
# ---------------------------------------------------------------------------------------------------------------------


class LigerFusedLinearKTOLoss(_Chunked):
    """Liger's KTO: mean over sequences of 1 - s(+-beta (logp - ref_logp - kl)), + where preference_labels.

    Arguments as Liger's (compiled, chunk_size: see `LigerFusedLinearDPOLoss`). Call: `(_input [S, T, H], lin_weight,
    target [S, T], bias=None, preference_labels=bool [S], ref_input=None, ref_weight=None, ref_bias=None, kl=None)`; kl
    is one value for all, used as it is (TRL clamps it first), without gradient. Returns `(loss, (chosen_logps_sum,
    rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum))`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, compiled, chunk_size)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self._with_kl: Loss = _UnclampedKTO(beta)
        self._without: Loss = losses.APOZeroUnpaired(beta)
        if average_log_prob:
            self._with_kl, self._without = _Averaged(self._with_kl), _Averaged(self._without)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if preference_labels is None:
            raise ValueError("preference_labels is None; it takes bool [S], True where the sequence is desirable")
        baseline: dict[str, Any] = {}
        if kl is not None:
            if kl.numel() != 1:
                raise ValueError(f"kl is of shape {tuple(kl.shape)}; it takes one value for the batch, kl.mean(): "
                                 "of [S] Liger adds up the losses against every one of them, S times too much")
            kl = kl.detach().float().reshape(1).to(_input.device)
            baseline = {"kl_logps": kl, "ref_kl_logps": torch.zeros_like(kl)}
        reference = _reference(self.use_ref_model, ref_input, ref_weight, ref_bias, target, _input)
        out = linear_preference_loss(
            _input,
            lin_weight,
            target,
            loss=self._without if kl is None else self._with_kl,
            bias=bias,
            ignore_index=self.ignore_index,
            desirable=preference_labels,
            **reference,
            **baseline,
        )
        lengths = self._lengths(target) if self.average_log_prob else 1
        assert out.ref_logps is not None
        rewards = self.beta * (out.logps - out.ref_logps) / lengths
        beside = (out.logps / lengths, _logit_sums(_input, lin_weight, bias), rewards)
        kinds = (preference_labels, ~preference_labels)
        return out.loss, tuple(torch.where(kind, x, 0).sum() for x in beside for kind in kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _CrossEntropyOutput:
    """Liger's, by the names of its fields."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@functools.cache
def _cross_entropy_output() -> type:
    """Liger's class where it is installed; asked for late, for its import takes seconds."""
    try:
        from liger_kernel.transformers.functional import CrossEntropyOutput
    except ImportError:
        return _CrossEntropyOutput
    return CrossEntropyOutput


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Liger's fused linear cross-entropy. With z = softcap(x W^T + b), per scored token of target y

        l = w_y (1 - e) (lse - z_y) + (e / V) sum over v of w_v (lse - z_v) + lse_square_scale lse^2,

    e = label_smoothing, w = ce_weight (1 without); times pi(y), without gradient, if use_token_scaling. "mean": the
    first two terms over the sum of w_y, the third over the number of scored tokens. "none": [N], with the gradient of
    each token's own upstream gradient.

    Plain means and sums take the one-pass path of three GEMMs; lse_square_scale, label_smoothing, use_token_scaling and
    "none" one more for what does not fit the memory budget. lse_square_scale and label_smoothing need the target's
    logit by itself: rows of W are gathered, [N, H]; label_smoothing with a softcap also the mean of the capped logits,
    for four more GEMMs in fp32. Accuracy and predicted tokens cost a GEMM.

    Args:
        accum_dtype: None or float32; sums are fp32 in any case.
        others: as in liger_kernel.transformers.

    Raises:
        ValueError: another accum_dtype; label_smoothing, reduction or softcap outside their range.

    Call: `(lin_weight [V, H], _input [N, H], target [N], bias=None)`. Returns the loss, or a `CrossEntropyOutput` if
    any of the three was asked for.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        for name, value, ok, takes in (
            ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "a number from 0 to 1"),
            ("reduction", reduction, reduction in ("mean", "sum", "none"), "'mean', 'sum' or 'none'"),
            ("softcap", softcap, softcap is None or softcap > 0, "None or a number above 0"),
            ("accum_dtype", accum_dtype, accum_dtype in (None, torch.float32), "None or torch.float32: sums are fp32"),
        ):
            if not ok:
                raise ValueError(f"{name} is {value!r}; it takes {takes}")
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Any:
        scored = target != self.ignore_index
        safe = torch.where(scored, target, 0)
        weights: Tensor | None = None
        if self.ce_weight is not None:
            if self.ce_weight.shape != lin_weight.shape[:1]:
                got, takes = tuple(self.ce_weight.shape), tuple(lin_weight.shape[:1])
                raise ValueError(f"ce_weight is of shape {got}; it takes {takes}")
            weights = torch.where(scored, self.ce_weight.to(target.device)[safe], 0)
        late = self.lse_square_scale or self.label_smoothing or self.use_token_scaling or self.reduction == "none"
        z_loss: Tensor | None = None
        if late or self.return_z_loss:
            loss, z_loss = self._per_token(lin_weight, _input, target, bias, scored, safe, weights)
        else:
            loss = self._at_once(lin_weight, _input, target, bias, weights)
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        accuracy: Tensor | None = None
        predicted: Tensor | None = None
        if self.return_token_accuracy or self.return_predicted_tokens:
            predicted = _argmax(_input, lin_weight, bias).masked_fill(~scored, -1)
        if self.return_token_accuracy:
            hits = ((predicted == target) & scored).float()
            accuracy = hits if self.reduction == "none" else hits.sum() / scored.sum()
        return _cross_entropy_output()(
            loss,
            z_loss.detach() if self.return_z_loss and z_loss is not None else None,
            accuracy,
            predicted if self.return_predicted_tokens else None,
        )

    def _at_once(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        plain_mean = self.reduction == "mean" and weights is None
        total = linear_preference_loss(
            hidden,
            weight,
            target,
            loss=losses.SFT(),
            cu_seqlens=[0, target.shape[0]],
            bias=bias,
            token_weights=weights,
            totals=None if plain_mean else Totals(1, 1, 1),
            ignore_index=self.ignore_index,
            softcap=self.softcap,
        ).loss
        return total if weights is None or self.reduction == "sum" else total / weights.sum()

    def _per_token(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, scored: Tensor, safe: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, z_loss), reduced."""
        logps = linear_logps(hidden, weight, target, bias=bias, ignore_index=self.ignore_index, softcap=self.softcap)
        loss = -logps if weights is None else -weights * logps
        z_loss = torch.zeros_like(logps)
        if self.lse_square_scale or self.label_smoothing:
            # In fp32, of operands as the logits were made of them.
            device = hidden.device.type
            compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            x, wide = hidden.to(compute).to(logps.dtype), weight.to(compute)
            # As a dot product of one row with one row of W, z_y is no more than a gather of W.
            z_y = (x * F.embedding(safe, wide).to(logps.dtype)).sum(-1)
            z_y = z_y if bias is None else z_y + bias[safe]
            if self.softcap is not None:
                z_y = self.softcap * torch.tanh(z_y / self.softcap)
            lse = z_y - logps
            z_loss = self.lse_square_scale * torch.where(scored, lse, 0) ** 2
            if self.label_smoothing:
                w = self.ce_weight if self.ce_weight is not None else weight.new_ones(weight.shape[0])
                w = w.to(weight.device, logps.dtype)
                with torch.autocast(device, enabled=False):
                    weighted = _weighted_logits(x, wide.to(logps.dtype), bias, w, self.softcap)
                smooth = torch.where(scored, w.sum() * lse - weighted, 0) / weight.shape[0]
                loss = (1 - self.label_smoothing) * loss + self.label_smoothing * smooth
        if self.use_token_scaling:
            share = logps.detach().exp()
            loss, z_loss = loss * share, z_loss * share
        if self.reduction == "none":
            return loss + z_loss, z_loss
        loss, z_loss = loss.sum(), z_loss.sum()
        if self.reduction == "mean":
            count = scored.sum().clamp(min=1)
            loss, z_loss = loss / (count if weights is None else weights.sum()), z_loss / count
        return loss + z_loss, z_loss


_CAPPED_LOGITS = 1 << 24  # of a piece of rows: 64 MiB in fp32, a few times


def _weighted_logits(x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, softcap: float | None) -> Tensor:
    """[N]: sum over v of w_v z_v. Without a softcap x . (W^T w) + w . b, no logits; with one some rows at a time, and
    again in backward."""
    if softcap is None:
        weighted = (x * torch.mv(weight.t(), w)).sum(-1)
        return weighted if bias is None else weighted + (w * bias).sum()

    def capped(rows: Tensor) -> Tensor:
        return (softcap * torch.tanh(F.linear(rows, weight, None if bias is None else bias.to(x.dtype)) / softcap)) @ w

    parts = x.split(max(_CAPPED_LOGITS // weight.shape[0], 1))
    return torch.cat([checkpoint(capped, rows, use_reentrant=False) for rows in parts]) if parts else x.sum(-1)


@torch.no_grad()
def _argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N] the likeliest tokens (a softcap does not change which), from 1024 rows of logits at a time."""
    parts = [F.linear(rows, weight, bias).argmax(-1) for rows in hidden.split(1024)]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def _function(cls: type[nn.Module], order: str, **defaults: Any) -> Callable[..., Any]:
    """Liger's function of a class: arguments of its call and of its constructor in one row, by place.

    order: their names in Liger's order; defaults: those that are not the constructor's.
    """
    call = inspect.signature(cls.forward).parameters
    made = inspect.signature(cls.__init__).parameters
    names = [{"weight": "lin_weight"}.get(name, name) for name in order.split()]
    known = {name: defaults.get(name, (call.get(name) or made[name]).default) for name in names}
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY, default=known[name]) for name in names]
    )

    def function(*given: Any) -> Any:
        bound = signature.bind(*given)
        bound.apply_defaults()
        options = {name: value for name, value in bound.arguments.items() if name not in call}
        return cls(**options)(**{name: value for name, value in bound.arguments.items() if name in call})

    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__doc__ = f"`{cls.__name__}` as a function: its constructor's arguments after those of its call."
    return function


_REFERENCE = "ref_input ref_weight ref_bias"
liger_fused_linear_dpo = _function(
    LigerFusedLinearDPOLoss,
    f"_input weight target bias {_REFERENCE} ignore_index beta compute_nll_loss compiled use_ref_model "
    "average_log_prob chunk_size loss_type label_smoothing discopop_tau alpha",
)
liger_fused_linear_cpo = _function(
    LigerFusedLinearCPOLoss,
    "_input weight target bias ignore_index beta alpha label_smoothing compute_nll_loss compiled average_log_prob "
    "chunk_size",
)
liger_fused_linear_simpo = _function(
    LigerFusedLinearSimPOLoss,
    "_input weight target bias ignore_index beta alpha label_smoothing compute_nll_loss compiled gamma chunk_size",
    compute_nll_loss=False,
)
liger_fused_linear_orpo = _function(
    LigerFusedLinearORPOLoss,
    "_input weight target bias ignore_index beta compute_nll_loss nll_target compiled chunk_size",
)
liger_fused_linear_kto = _function(
    LigerFusedLinearKTOLoss,
    f"_input weight target preference_labels bias {_REFERENCE} kl ignore_index beta compiled use_ref_model "
    "average_log_prob chunk_size",
    preference_labels=inspect.Parameter.empty, use_ref_model=True,
)
liger_fused_linear_grpo = _function(
    LigerFusedLinearGRPOLoss,
    "_input weight selected_token_ids attention_mask advantages bias ref_per_token_logps old_per_token_logps "
    f"{_REFERENCE} beta epsilon_low epsilon_high loss_type max_completion_length importance_sampling_level "
    "sapo_temperature_pos sapo_temperature_neg temperature compiled use_ref_model chunk_size vllm_is_ratio delta "
    "use_bias_correction_kl vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg num_items_in_batch",
)


def liger_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
    ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    softcap: float | None = None, return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Any:
    """`LigerFusedLinearCrossEntropyLoss` as a function; chunk_mem_const is taken, and without a meaning here."""
    criterion = LigerFusedLinearCrossEntropyLoss(
        ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype,
        use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )
    return criterion(weight, input, target, bias)
