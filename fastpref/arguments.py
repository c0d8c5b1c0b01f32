"""Checks of what the public functions take: one clear line naming the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import SLOW_DTYPES
from .engine import Inputs, Options, fp32_gemms, on_device
from .losses import Loss, LossFunction, Totals, get_loss
from .rows import EXTRAS
from .tail import EPS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def loss_of(loss: str | Loss | LossFunction) -> Loss | LossFunction:
    if isinstance(loss, str):
        return get_loss(loss)
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}; it takes an object of it: {loss.__name__}(...)")
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; it takes a name, an object of fastpref.losses or a callable")
    return loss


def loss_name(loss: object) -> str:
    return getattr(loss, "name", "") or getattr(loss, "__name__", type(loss).__name__)


def require(ok: bool, argument: str, got: object, takes: str, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"{argument} is {got}; it takes {takes}")


def check_vector(
    argument: str, x: Tensor | None, shape: Sequence[int], like: Tensor, *, floating: bool = False
) -> None:
    if x is None:
        return
    require(isinstance(x, Tensor), argument, f"a {type(x).__name__}", "a tensor", TypeError)
    require(tuple(x.shape) == tuple(shape), argument, f"of shape {tuple(x.shape)}", f"shape {tuple(shape)}")
    require(x.device == like.device, argument, f"on {x.device}", f"{like.device}, the device of hidden")
    require(x.dtype in _DTYPES or not floating, argument, x.dtype, "a floating dtype", TypeError)


def options_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, softcap: float | None,
    logit_scale: float, temperature: float, memory_budget: int | None, backend: str | None,
    logits_dtype: str | None,
    tail: str = "exact",
    tail_eps: float | None = None,
) -> Options:
    """Checks what both functions take, and settles the compute dtype."""
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        require(isinstance(x, Tensor), name, f"a {type(x).__name__}", "a tensor", TypeError)
    require(hidden.dim() >= 1, "hidden", f"of shape {tuple(hidden.shape)}", "[..., H]")
    require(weight.dim() == 2, "weight", f"of shape {tuple(weight.shape)}", "[V, H]")
    require(weight.shape[1] == hidden.shape[-1], "weight", f"of shape {tuple(weight.shape)}",
             f"[V, {hidden.shape[-1]}], the width of hidden")
    require(weight.shape[0] > 0, "weight", f"of shape {tuple(weight.shape)}", "at least one row (an empty shard?)")
    for name, x in (("hidden", hidden), ("weight", weight)):
        require(x.dtype in _DTYPES, name, x.dtype, "float32, bfloat16, float16 or float64", TypeError)
    require(targets.dtype == torch.int64, "targets", targets.dtype, "int64", TypeError)
    check_vector("targets", targets, hidden.shape[:-1], hidden)
    require(weight.device == hidden.device, "weight", f"on {weight.device}", f"{hidden.device}, the device of hidden")
    check_vector("bias", bias, weight.shape[:1], hidden, floating=True)
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    else:
        compute = hidden.dtype
        require(
            weight.dtype == compute, "weight", weight.dtype, f"{compute}, the dtype of hidden (or autocast)", TypeError
        )
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature), ("softcap", softcap)):
        if value is not None or name != "softcap":
            require(isinstance(value, int | float) and value > 0, name, repr(value), "a number above 0")
    require(isinstance(ignore_index, int), "ignore_index", repr(ignore_index), "an integer", TypeError)
    require(memory_budget is None or (isinstance(memory_budget, int) and memory_budget > 0), "memory_budget",
             repr(memory_budget), "a positive number of bytes, or None")
    compute, logits = _dtypes(logits_dtype, compute, hidden, weight)
    require(tail in ("exact", "rank1"), "tail", repr(tail), "'exact' or 'rank1'")
    fits = tail_eps is None or (tail == "rank1" and isinstance(tail_eps, int | float) and 0 < tail_eps < 1)
    require(fits, "tail_eps", f"{tail_eps!r} with tail={tail!r}", "a number between 0 and 1 beside 'rank1', or None")
    recording = torch.is_grad_enabled()
    needs = (
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        recording and bias is not None and bias.requires_grad,
    )
    return Options(
        ignore_index,
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(temperature),
        memory_budget,
        backend or "auto",
        compute,
        logits,
        needs,
        tail_eps=float(tail_eps or EPS) if tail == "rank1" else None,
    )


def extras_of(argument: str, names: Sequence[str]) -> str:
    """Names of row extras as ops carry them: each once, in the order of `rows.EXTRAS`, with spaces between."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} is {names!r}; it takes a sequence of names, of {', '.join(EXTRAS)}")
    unknown = [name for name in names if name not in EXTRAS]
    require(not unknown, argument, f"given with {', '.join(map(repr, unknown))}", f"names of {', '.join(EXTRAS)}")
    return " ".join(name for name in EXTRAS if name in names)


_LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _dtypes(
    name: str | None, compute: torch.dtype, hidden: Tensor, weight: Tensor
) -> tuple[torch.dtype, torch.dtype]:
    """The compute dtype, and that of the logits: fp32 wherever a GEMM writes it, for bf16 logits alone cost 1e-2 nat a
    token. A CPU's GEMMs write what they read: fp32 from operands that are widened, where those are the faster ones."""
    takes = [compute, torch.float32] if compute in (torch.bfloat16, torch.float16) else [compute]
    known = [key for key, dtype in _LOGITS.items() if dtype in takes]
    takes_names = " or ".join(["None", *known])
    require(name is None or name in known, "logits_dtype", repr(name), f"{takes_names} for {compute}")
    wide = fp32_gemms(hidden.device)
    slow = hidden.device.type == "cpu" and compute in SLOW_DTYPES
    kept = hidden.dtype == weight.dtype == compute  # else autocast rounds, as was asked for
    default = takes[-1] if wide or (slow and kept) else compute
    logits = default if name is None else _LOGITS[name]
    return compute if wide else logits, logits


def inputs_of(
    loss: object, hidden: Tensor, targets: Tensor, cu_seqlens: Sequence[int] | Tensor | None, ref_logps: Tensor | None,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, desirable: Tensor | None,
    kl_logps: Tensor | None, ref_kl_logps: Tensor | None, token_weights: Tensor | None, totals: Totals | None,
    stats: torch.dtype,
) -> Inputs:
    """Checks what a preference loss takes beside what `options_of` does; none of it has a gradient."""
    if isinstance(cu_seqlens, Tensor):
        require(cu_seqlens.device.type == "cpu", "cu_seqlens", f"on {cu_seqlens.device}", "a list or a CPU tensor")
        require(not cu_seqlens.is_floating_point(), "cu_seqlens", cu_seqlens.dtype, "integers", TypeError)
        cu_seqlens = cu_seqlens.tolist()
    sequences = _layout(hidden, targets, cu_seqlens)
    require(not getattr(loss, "pairwise", False) or sequences % 2 == 0, "targets", f"of {sequences} sequences",
             f"an even number: {loss_name(loss)} compares the first half (chosen) with the second")
    check_vector("token_weights", token_weights, targets.shape, hidden)
    _check_reference(loss, sequences, hidden, targets, ref_logps, ref_hidden, ref_weight, ref_bias)
    kl = _check_kto(loss, sequences, hidden, desirable, kl_logps, ref_kl_logps)
    _check_totals(totals)
    fixed = [None if x is None else x.detach() for x in (ref_logps, ref_hidden, ref_weight, ref_bias, token_weights)]
    ref_logps, ref_hidden, ref_weight, ref_bias, token_weights = fixed
    ref_logps = None if ref_logps is None else ref_logps.to(stats)
    return Inputs(targets, cu_seqlens, ref_logps, ref_hidden, ref_weight, ref_bias, desirable, kl, token_weights,
                  _totals_tensor(totals, hidden.device, stats))


def _layout(hidden: Tensor, targets: Tensor, cu_seqlens: Sequence[int] | None) -> int:
    """The number of sequences."""
    width = hidden.shape[-1]
    if cu_seqlens is None:
        require(hidden.dim() == 3, "hidden", f"of shape {tuple(hidden.shape)} without cu_seqlens",
                 f"[S, T, {width}] (padded), or [N, {width}] with cu_seqlens (packed)")
        require(targets.dim() == 2, "targets", f"of shape {tuple(targets.shape)} without cu_seqlens",
                 "[S, T] (padded), or [N] with cu_seqlens (packed)")
        return targets.shape[0]
    require(hidden.dim() == 2, "hidden", f"of shape {tuple(hidden.shape)} with cu_seqlens", f"[N, {width}] (packed)")
    require(targets.dim() == 1, "targets", f"of shape {tuple(targets.shape)} with cu_seqlens", "[N] (packed)")
    ends = list(cu_seqlens)
    ok = len(ends) >= 1 and ends[0] == 0 and ends[-1] == targets.shape[0] and ends == sorted(ends)
    require(ok, "cu_seqlens", ends if len(ends) < 20 else f"{ends[:20]}...",
             f"offsets from 0 to {targets.shape[0]} (rows of hidden), never falling")
    return len(ends) - 1


def _check_reference(
    loss: object, sequences: int, hidden: Tensor, targets: Tensor, ref_logps: Tensor | None, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None,
) -> None:
    check_vector("ref_logps", ref_logps, (sequences,), hidden, floating=True)
    if getattr(loss, "needs_reference", False) and ref_logps is None and ref_hidden is None:
        raise ValueError(f"ref_logps is None; {loss_name(loss)} takes ref_logps [S], or ref_hidden and ref_weight")
    require(ref_logps is None or ref_hidden is None, "ref_logps", "given beside ref_hidden", "one of the two")
    require(
        (ref_hidden is None) == (ref_weight is None),
        "ref_weight",
        "missing" if ref_weight is None else "given without ref_hidden",
        "ref_hidden and ref_weight together",
    )
    require(ref_bias is None or ref_weight is not None, "ref_bias", "given without ref_weight", "ref_weight beside it")
    if ref_hidden is None or ref_weight is None:
        return
    for name, x in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        require(x.dtype in _DTYPES, name, x.dtype, "float32, bfloat16, float16 or float64", TypeError)
    check_vector("ref_hidden", ref_hidden, (*targets.shape, ref_hidden.shape[-1]), hidden)
    require(
        ref_weight.dim() == 2 and ref_weight.shape[1] == ref_hidden.shape[-1],
        "ref_weight",
        f"of shape {tuple(ref_weight.shape)}",
        f"[V, {ref_hidden.shape[-1]}], the width of ref_hidden",
    )
    check_vector("ref_bias", ref_bias, ref_weight.shape[:1], hidden, floating=True)


def _check_kto(
    loss: object, sequences: int, hidden: Tensor, desirable: Tensor | None, kl_logps: Tensor | None,
    ref_kl_logps: Tensor | None,
) -> Tensor | None:
    """KTO's baseline before its clamp: mean of kl_logps - ref_kl_logps."""
    given = {"desirable": desirable, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps}
    for name, x in given.items():
        if getattr(loss, "needs_desirable" if name == "desirable" else "needs_kl", False):
            takes = "bool [S]" if name == "desirable" else "[K] sequence log-probs of the mismatched pairs"
            require(x is not None, name, "None", f"{takes}: {loss_name(loss)} needs it")
        elif isinstance(loss, Loss):
            require(x is None, name, f"given to {loss_name(loss)}", "None: only losses such as kto use it")
    if desirable is not None:
        check_vector("desirable", desirable, (sequences,), hidden)
        require(desirable.dtype == torch.bool, "desirable", desirable.dtype, "bool", TypeError)
    if kl_logps is None and ref_kl_logps is None:
        return None
    require(kl_logps is not None and ref_kl_logps is not None, "kl_logps", "given without the other",
             "kl_logps and ref_kl_logps together")
    assert kl_logps is not None and ref_kl_logps is not None
    require(
        kl_logps.dim() == 1 and kl_logps.shape[0] > 0, "kl_logps", f"of shape {tuple(kl_logps.shape)}", "[K] with K > 0"
    )
    check_vector("kl_logps", kl_logps, kl_logps.shape, hidden, floating=True)
    check_vector("ref_kl_logps", ref_kl_logps, kl_logps.shape, hidden, floating=True)
    return (kl_logps.detach().float() - ref_kl_logps.detach().float()).mean()


def check_accumulate_into(buffer: Tensor | None, weight: Tensor, possible: bool) -> None:
    if buffer is None:
        return
    require(possible, "accumulate_into", "given for a free callable or under torch.compile",
            "None there, or a loss object of fastpref.losses in eager mode")
    check_vector("accumulate_into", buffer, weight.shape, weight)
    require(buffer.dtype == torch.float32, "accumulate_into", buffer.dtype, "float32", TypeError)
    require(buffer.is_contiguous(), "accumulate_into", "not contiguous", "a contiguous buffer")
    require(not buffer.requires_grad, "accumulate_into", "a tensor that requires grad", "a plain buffer")


def _check_totals(totals: Totals | None) -> None:
    if totals is None:
        return
    require(isinstance(totals, Totals), "totals", f"a {type(totals).__name__}", "a fastpref.Totals", TypeError)
    for name in ("sequences", "tokens", "chosen_tokens"):
        value = getattr(totals, name)
        if not isinstance(value, Tensor):
            least = 1 if name == "sequences" else 0
            ok = isinstance(value, int | float) and value >= least
            require(ok, f"totals.{name}", repr(value), f"a number of at least {least}")


def _totals_tensor(totals: Totals | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if totals is None:
        return None
    counts = (totals.sequences, totals.tokens, totals.chosen_tokens)
    if any(isinstance(count, Tensor) for count in counts):
        return torch.stack([
            count.to(device, dtype) if isinstance(count, Tensor) else torch.full((), count, dtype=dtype, device=device)
            for count in counts
        ])
    return on_device(tuple(int(count) for count in counts), device).to(dtype)
