"""The losses as `torch.nn.Module`s, for training loops that are built of modules: `fp.DPOLoss(beta=0.1)`."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from . import losses
from .head import PreferenceOutput, linear_preference_loss
from .losses import Loss, LossFunction


class PreferenceLoss(nn.Module):
    """`linear_preference_loss` with what stays the same from step to step: the loss, and what a model does with its
    logits. Without parameters; the head's weight is an argument of the call.

    `DPOLoss(beta=0.1, softcap=30.0)` is `PreferenceLoss(DPO(beta=0.1), softcap=30.0)`, and so for every loss.

        criterion = fp.DPOLoss(beta=0.1)
        out = criterion(hidden, lm_head.weight, targets, ref_logps=ref_logps)
        out.loss.backward()

    Args:
        loss: a name, an object of `fastpref.losses`, or a callable.
        others: as in `linear_preference_loss`.
    """

    def __init__(
        self,
        loss: str | LossFunction,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        memory_budget: int | None = None,
        backend: str | None = None,
        logits_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.loss = losses.get_loss(loss) if isinstance(loss, str) else loss
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.temperature = temperature
        self.memory_budget = memory_budget
        self.backend = backend
        self.logits_dtype = logits_dtype

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **inputs: Any) -> PreferenceOutput:
        """hidden [S, T, H], weight [V, H], targets [S, T], or packed; inputs: the other arguments of
        `linear_preference_loss` that change from step to step (bias, cu_seqlens, ref_logps, totals, ...)."""
        fixed = {name: getattr(self, name) for name in _FIXED}
        return linear_preference_loss(hidden, weight, targets, loss=self.loss, **fixed, **inputs)

    def extra_repr(self) -> str:
        changed = {n: getattr(self, n) for n, p in _FIXED.items() if getattr(self, n) != p.default}
        return ", ".join([repr(self.loss), *(f"{name}={value!r}" for name, value in changed.items())])


_FIXED = {
    name: parameter
    for name, parameter in inspect.signature(PreferenceLoss.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def _module(cls: type[Loss]) -> Any:
    """`PreferenceLoss` for one loss, whose options are arguments of its constructor."""
    name = f"{cls.__name__}Loss"
    assert not _FIXED.keys() & {field.name for field in fields(cls)}

    def __init__(self: PreferenceLoss, *args: Any, **options: Any) -> None:
        fixed = {option: options.pop(option) for option in _FIXED if option in options}
        PreferenceLoss.__init__(self, cls(*args, **options), **fixed)

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = inspect.signature(cls).parameters.values()
    __init__.__signature__ = inspect.Signature([this, *own, *_FIXED.values()])  # type: ignore[attr-defined]
    about = (
        f"`PreferenceLoss` of `fastpref.{cls.__name__}`, whose options it takes beside its own.\n\n    {cls.__doc__}"
    )
    return type(name, (PreferenceLoss,), {"__init__": __init__, "__doc__": about, "__module__": __name__})


AOTLoss = _module(losses.AOT)
AOTUnpairedLoss = _module(losses.AOTUnpaired)
APODownLoss = _module(losses.APODown)
APOZeroLoss = _module(losses.APOZero)
APOZeroUnpairedLoss = _module(losses.APOZeroUnpaired)
BCOLoss = _module(losses.BCO)
BCOPairLoss = _module(losses.BCOPair)
CPOLoss = _module(losses.CPO)
ChosenSFTLoss = _module(losses.ChosenSFT)
DPOLoss = _module(losses.DPO)
DPONormLoss = _module(losses.DPONorm)
DiscoPOPLoss = _module(losses.DiscoPOP)
EXOLoss = _module(losses.EXO)
HingeLoss = _module(losses.Hinge)
IPOLoss = _module(losses.IPO)
IterativeRPOLoss = _module(losses.IterativeRPO)
KTOLoss = _module(losses.KTO)
NCALoss = _module(losses.NCA)
ORPOLoss = _module(losses.ORPO)
RDPOLoss = _module(losses.RDPO)
RPOLoss = _module(losses.RPO)
RobustDPOLoss = _module(losses.RobustDPO)
SFTLoss = _module(losses.SFT)
SLiCLoss = _module(losses.SLiC)
SPPOLoss = _module(losses.SPPO)
SimPOLoss = _module(losses.SimPO)
WPOLoss = _module(losses.WPO)
WeightedSumLoss = _module(losses.WeightedSum)

__all__ = ["PreferenceLoss", *(f"{cls.__name__}Loss" for cls in losses.CLASSES.values())]
