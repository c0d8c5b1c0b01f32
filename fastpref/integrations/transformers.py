"""A preference loss inside the forward of any transformers causal LM: hidden states meet the LM head in the fused call
and no logits are made.

    add_preference_head(model)                                  # once; generate(), saving and training go on as before
    out = preference_step(model, batch, fp.DPO(beta=0.1), ref=reference)
    out.loss.backward()

The loss is computed where the model calls its LM head, in the forward of whatever wraps the model. So DDP all-reduces
its gradients, FSDP2 gathers and reduces the head like any layer, and what a family does on either side of its head
(scaling, router losses, images) stays its own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastpref import losses
from fastpref.head import PreferenceOutput, linear_preference_loss
from fastpref.losses import LossFunction, Totals
from fastpref.trunk import (
    LMHead,
    check_vocabulary,
    evaluating,
    in_place_of,
    lm_head_of,
    logit_maths,
    router_coefficient,
    unwrap,
)


@dataclass(frozen=True)
class PreferenceRequest:
    """What a model is asked for: `model(input_ids=..., attention_mask=..., preference=PreferenceRequest(...))`.

    The fields are the arguments of `fastpref.linear_preference_loss`, except that loss=None asks for log-probs alone,
    without gradient.
    """

    targets: Tensor  # [S, T], already shifted; see `targets_of`
    loss: str | LossFunction | None = None
    ref_logps: Tensor | None = None  # [S]
    desirable: Tensor | None = None  # bool [S]
    kl_logps: Tensor | None = None  # [K]
    ref_kl_logps: Tensor | None = None  # [K]
    token_weights: Tensor | None = None  # [S, T]
    totals: Totals | None = None
    extras: tuple[str, ...] = ()
    ignore_index: int = -100
    temperature: float = 1.0
    memory_budget: int | None = None
    backend: str | None = None
    logits_dtype: str | None = None

    def apply(self, head: LMHead, hidden: Tensor) -> PreferenceOutput:
        """hidden: [S, T, H], what the model gives its LM head."""
        # Fields at their defaults are left out: a loss refuses what it does not use.
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not f.default}
        targets, loss = given.pop("targets"), given.pop("loss", None)
        with torch.no_grad() if loss is None else nullcontext():
            hidden, weight, bias = head.operands(hidden)
            return linear_preference_loss(
                hidden,
                weight,
                targets,
                loss=losses.SFT() if loss is None else loss,
                bias=bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                **given,
            )


@dataclass
class PreferenceModelOutput(ModelOutput):
    """What the forward returns for a `PreferenceRequest`. Fields as in `fastpref.PreferenceOutput`."""

    loss: Tensor | None = None  # scalar, the router's loss included; None if none was asked for
    logps: Tensor = None  # type: ignore[assignment]  # [S] fp32, detached
    ref_logps: Tensor | None = None
    lengths: Tensor = None  # type: ignore[assignment]  # [S]
    extras: dict[str, Tensor] | None = None
    metrics: dict[str, Tensor] = None  # type: ignore[assignment]
    aux_loss: Tensor | None = None  # scalar: the router's loss before its coefficient


def add_preference_head(model: Any, tokenizer: Any = None) -> None:
    """Gives a transformers causal LM (bare, or in PEFT, DDP, torch.compile) a forward that takes `preference=`.

    Without that argument the forward is the model's own. Call it before or after PEFT, DDP, `fully_shard`; a model
    whose configuration leaves open what happens to its logits, before sharding. A second call changes nothing.

    Args:
        tokenizer: if given, checked to have no ids beyond the model's vocabulary.

    Raises:
        ValueError: a model whose LM head the fused call does not compute, with what was looked for (`fastpref.trunk`).
    """
    inner = unwrap(model)
    if tokenizer is not None:
        check_vocabulary(inner, tokenizer)
    if hasattr(inner, "fastpref_logit_maths"):
        return
    inner.fastpref_logit_maths = logit_maths(inner)
    inner.forward = MethodType(_with_preference(inner.forward), inner)


def _with_preference(bound: Callable[..., Any]) -> Callable[..., Any]:
    """The method that takes `preference` in place of `bound`, a model's forward."""
    # As a function of self, a copy.deepcopy of the model gets a forward over its own weights.
    original = getattr(bound, "__func__", None) or (lambda self, *args, **kwargs: bound(*args, **kwargs))

    def forward(self: Any, *args: Any, preference: PreferenceRequest | None = None, **kwargs: Any) -> Any:
        if preference is None:
            return original(self, *args, **kwargs)
        return _preference_forward(self, original, preference, args, kwargs)

    # generate() and Trainer read the signature. Not functools.wraps: accelerate's unwrap_model follows __wrapped__ to
    # the end and would take this forward off again.
    own = inspect.signature(bound)
    self_first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = own.replace(parameters=[self_first, *own.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = bound.__doc__
    return forward


def _preference_forward(
    model: Any, original: Callable[..., Any], request: PreferenceRequest, args: tuple, kwargs: dict[str, Any]
) -> PreferenceModelOutput:
    if kwargs.get("labels") is not None:
        raise ValueError("labels is given beside preference; the targets of a PreferenceRequest take its place")
    # Found anew in every call: PEFT may have wrapped it meanwhile.
    head = LMHead(lm_head_of(model), *model.fastpref_logit_maths)
    results: list[PreferenceOutput] = []

    def fused(hidden: Tensor) -> Tensor:
        results.append(request.apply(head, hidden))
        return hidden.new_zeros((*hidden.shape[:-1], 0))  # what is done to logits costs nothing on a vocabulary of none

    with in_place_of(head.module, fused):
        outputs = original(model, *args, **{"use_cache": False, "return_dict": True} | kwargs)
    if len(results) != 1:
        raise ValueError(f"{type(model).__name__}: called its LM head {len(results)} times in one forward pass")
    result = results[0]
    loss, aux_loss = (None if request.loss is None else result.loss), getattr(outputs, "aux_loss", None)
    if aux_loss is not None and loss is not None:
        # `totals` says that losses of the batch's parts add up; so must the router's.
        share = 1 if request.totals is None else result.logps.shape[0] / request.totals.sequences
        loss = loss + share * router_coefficient(model) * aux_loss.to(loss.device)
    return PreferenceModelOutput(
        loss=loss,
        logps=result.logps,
        ref_logps=result.ref_logps,
        lengths=result.lengths,
        extras=result.extras or None,
        metrics=result.metrics,
        aux_loss=aux_loss,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches in TRL's layout
# ---------------------------------------------------------------------------------------------------------------------

Batch = Mapping[str, Any]
_REF = ("ref_chosen_logps", "ref_rejected_logps")
_OURS = ("labels", "completion_mask", "desirable", "kl_logps", "ref_kl_logps", "token_weights", *_REF)


def preference_step(
    model: Any,
    batch: Batch,
    loss: str | LossFunction = "dpo",
    *,
    ref: nn.Module | Tensor | Literal["adapter_off"] | None = None,
    **request: Any,
) -> PreferenceModelOutput:
    """A preference loss of `model` on a batch, ready for `.loss.backward()`.

    Args:
        model: a transformers causal LM as it is trained: bare, or in PEFT, DDP, FSDP2, torch.compile. It gets
            `add_preference_head`.
        batch: `input_ids` [S, T], first half chosen and second half rejected, pair by pair (as from TRL's collator),
            `attention_mask`, and either `completion_mask` [S, T] or `labels` [S, T] (-100: not scored; not shifted).
            KTO: `desirable`, `kl_logps`, `ref_kl_logps`. `token_weights` [S, T], aligned with `input_ids`.
            `ref_chosen_logps`, `ref_rejected_logps` [S / 2]: TRL's columns of a reference computed before, instead of
            `ref`. All other entries go to the model as they are.
        loss: a name, an object of `fastpref.losses`, or a callable.
        ref: what the loss compares with: another model; its log-probs [S], computed before; "adapter_off": `model`, a
            PeftModel, without its adapter; None for a reference-free loss. The reference runs without dropout.
        request: further fields of `PreferenceRequest` (totals, extras, temperature, memory_budget, ...).

    A mixture-of-experts model's router loss is added as in its own training, where its config asks for it
    (`output_router_logits`).
    """
    taken = {name: batch[name] for name in ("desirable", "kl_logps", "ref_kl_logps") if batch.get(name) is not None}
    ref_logps = _reference(model, batch, ref, request)
    return _call(model, batch, PreferenceRequest(loss=loss, ref_logps=ref_logps, **_targets(batch), **taken, **request))


def sequence_logps(model: Any, batch: Batch, **request: Any) -> Tensor:
    """[S] fp32: the sequence log-probs of a batch (see `preference_step`), without gradient and without dropout: what a
    reference gives, or an evaluation needs. One GEMM of the head."""
    with torch.no_grad(), evaluating(unwrap(model)):
        return _call(model, batch, PreferenceRequest(**_targets(batch), **request)).logps


def targets_of(batch: Batch) -> Tensor:
    """[S, T] what each position predicts: the next token where it is scored, -100 elsewhere."""
    input_ids = batch["input_ids"]
    labels: Any = batch.get("labels")
    mask: Any = batch.get("completion_mask")
    if (labels is None) == (mask is None):
        got = "both of them" if labels is not None else "neither"
        raise ValueError(f"batch has {got}; it takes labels or completion_mask to tell which tokens are scored")
    if labels is None:
        attended = batch.get("attention_mask")
        scored = mask.bool() if attended is None else mask.bool() & attended.bool()
        labels = input_ids.masked_fill(~scored, -100)
    if labels.shape != input_ids.shape:
        name = "labels" if mask is None else "completion_mask"
        raise ValueError(f"{name} is of shape {tuple(labels.shape)}; it takes {tuple(input_ids.shape)}, as input_ids")
    return _next(labels, -100)


def _next(x: Tensor, last: float) -> Tensor:
    x = x.roll(-1, dims=1)
    x[:, -1] = last
    return x


def _targets(batch: Batch) -> dict[str, Any]:
    weights = batch.get("token_weights")
    return {"targets": targets_of(batch)} | ({} if weights is None else {"token_weights": _next(weights, 0)})


def _reference(model: Any, batch: Batch, ref: Any, request: Mapping[str, Any]) -> Tensor | None:
    columns = [batch[name] for name in _REF if batch.get(name) is not None]
    if columns:
        if ref is not None or len(columns) != 2:
            raise ValueError(f"batch has {' or '.join(_REF)}; it takes both of them, and then ref=None")
        return torch.cat(columns)
    if ref is None or isinstance(ref, Tensor):
        return ref
    # What changes a log-prob must change the reference's too.
    shared = ("token_weights", "ignore_index", "temperature", "memory_budget", "backend", "logits_dtype")
    alike = {name: value for name, value in request.items() if name in shared}
    if isinstance(ref, nn.Module):
        return sequence_logps(ref, batch, **alike)
    if ref == "adapter_off":
        with _adapter_off(model):
            return sequence_logps(model, batch, **alike)
    got = repr(ref) if isinstance(ref, str) else f"a {type(ref).__name__}"
    raise TypeError(f"ref is {got}; it takes a model, a tensor of log-probs [S], 'adapter_off' or None")


def _adapter_off(model: Any) -> AbstractContextManager[Any]:
    for part in model.modules():
        if hasattr(type(part), "disable_adapter"):
            return part.disable_adapter()
    raise ValueError(f"ref is 'adapter_off', but {type(unwrap(model)).__name__} has no adapter; it takes a model to "
                     "compare with, or log-probs [S]")


def _call(model: Any, batch: Batch, request: PreferenceRequest) -> PreferenceModelOutput:
    if isinstance(model, nn.DataParallel):
        raise TypeError("model is a torch.nn.DataParallel; it takes DistributedDataParallel or FSDP2 around the model")
    add_preference_head(model)
    return model(**{name: value for name, value in batch.items() if name not in _OURS}, preference=request)
