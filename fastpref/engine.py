"""The engine: a pass over the rows of a plan, where GEMMs, rows and the loss meet. Knows nothing of autograd, ops or
arguments. `step`, at the end, is the whole of it in one loop.

    z_t = W x_t            l_t = z_t[y_t] - lse(z_t)            logp_s = sum of a_t l_t over the tokens of sequence s
    L   = f(logp_1 .. logp_S),  g_s = dL / dlogp_s              a few floats
    U_t = onehot(y_t) - softmax(z_t)                            knows nothing of the loss
    dX  = diag(g a) (U W)          dW = U^T (diag(g a) X)       the late scalar is a row scale on an [N, H] matrix

Shape suffixes: N scored rows, H hidden size, V vocabulary, S sequences, C rows of a stash.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import losses, rows, tail, workspace
from .losses import Loss, SequenceLogps, Totals
from .plan import LOGITS_COLS, MIB, Group, Plan, Problem, add_rows
from .plan import plan as plan_of

# ---------------------------------------------------------------------------------------------------------------------
# One call, laid out: which rows are scored, and the head they are multiplied with
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """The rows of `hidden` that predict a scored token, in the order of the pass: the batch's, or a plan's."""

    hidden: Tensor  # [*, H] as given
    index: Tensor | None  # [N] rows of hidden; None: all of them, in order
    targets: Tensor  # [N]
    counts: tuple[int, ...]  # rows of each sequence, in the order of the batch, on the host
    lengths: Tensor  # [S] int64: scored tokens of each sequence
    weights: Tensor | None  # [N] token weights
    spans: tuple[tuple[int, int], ...] | None = None  # without an index: the rows, range by range; None: in order

    def reordered(self, order: Sequence[tuple[int, int]]) -> Scored:
        """Rows by ranges of sequences, one range after another."""
        starts = [0, *accumulate(self.counts)]
        spans = tuple((starts[a], starts[b]) for a, b in order)

        def taken(x: Tensor) -> Tensor:
            return torch.cat([x[a:b] for a, b in spans])

        weights = None if self.weights is None else taken(self.weights)
        if self.index is None:
            return replace(self, targets=taken(self.targets), weights=weights, spans=spans)
        return replace(self, index=taken(self.index), targets=taken(self.targets), weights=weights)

    def runs(self, start: int, end: int) -> list[tuple[slice, slice]]:
        """Without an index: the pieces of rows [start, end), counted from start, and where they lie in hidden."""
        if self.spans is None:
            return [(slice(0, end - start), slice(start, end))]
        found, at = [], -start
        for a, b in self.spans:
            first, last = max(at, 0), min(at + b - a, end - start)
            if first < last:
                found.append((slice(first, last), slice(a + first - at, a + last - at)))
            at += b - a
        return found

    def rows(self, start: int, end: int, buffer: Tensor | None) -> Tensor:
        """hidden rows [start, end) in the buffer's dtype: a view where nothing has to be gathered or cast."""
        if self.index is None:
            runs = self.runs(start, end)
            if buffer is None or (len(runs) == 1 and buffer.dtype == self.hidden.dtype):
                return self.hidden[runs[0][1]]
            for mine, there in runs:
                buffer[mine].copy_(self.hidden[there])
            return buffer[: end - start]
        assert buffer is not None
        out = buffer[: end - start]
        if self.hidden.dtype == out.dtype:
            return torch.index_select(self.hidden, 0, self.index[start:end], out=out)
        return out.copy_(self.hidden[self.index[start:end]])


class Options(NamedTuple):
    """What a call asks for."""

    ignore_index: int
    softcap: float | None
    logit_scale: float
    temperature: float
    memory_budget: int | None
    backend: str
    compute_dtype: torch.dtype  # of the GEMMs' operands and the stash
    logits_dtype: torch.dtype  # what the first GEMM writes
    needs: tuple[bool, bool, bool]  # gradients wanted: hidden, weight, bias
    extras: str = ""  # names of `rows.EXTRAS`, with spaces between: no op takes a list of strings
    tail_eps: float | None = None  # of tail.py; None: exact

    @property
    def spec(self) -> str:
        """In one string, which a custom op carries."""
        dtypes = tuple([str(dtype).removeprefix("torch.") for dtype in self[6:8]])
        return repr((*self[:6], *dtypes, *self[8:]))

    @classmethod
    def of(cls, spec: str) -> Options:
        return _options_of(spec)


@lru_cache(maxsize=256)
def _options_of(spec: str) -> Options:
    values = ast.literal_eval(spec)
    return Options(*values[:6], *(getattr(torch, name) for name in values[6:8]), *values[8:])


class Projection(NamedTuple):
    """What turns hidden rows into logits, and logits into rows of U."""

    weight: Tensor  # [V, H] in the compute dtype; or in fewer bits, widened a slice at a time as it is multiplied
    bias: Tensor | None  # [V]
    transform: rows.Transform
    kernels: ModuleType
    dtype: torch.dtype  # the compute dtype

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, options: Options) -> Projection:
        compute = options.compute_dtype
        kernels = rows.choose(options.backend, weight.device, compute)
        transform = rows.Transform(options.logit_scale, options.softcap, options.temperature)
        if weight.device.type != "cpu" or weight.dtype.itemsize >= compute.itemsize:
            weight = weight.to(compute)
        return cls(weight.contiguous(), bias, transform, kernels, compute)


class Inputs(NamedTuple):
    """What a preference step takes beside hidden rows and head, in the order of the custom op's arguments."""

    targets: Tensor
    cu_seqlens: Sequence[int] | None
    ref_logps: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    desirable: Tensor | None
    kl: Tensor | None
    token_weights: Tensor | None
    totals: Tensor | None  # [3], the fields of `Totals`


class Result(NamedTuple):
    """What a preference step gives, in the order of the custom op's results."""

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor
    extras: Tensor  # [K, S] in the order of options.extras
    tail: Tensor  # `Pass.tail`
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None


def scored_rows(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Sequence[int] | None,
    ignore_index: int,
    token_weights: Tensor | None,
) -> Scored:
    """Only scored rows go on. Packed on CUDA: every row does, for nothing may synchronise."""
    width = hidden.shape[-1]
    flat, hidden = targets.reshape(-1), hidden.reshape(-1, width)
    weights = None if token_weights is None else token_weights.reshape(-1)
    scored = flat != ignore_index
    if cu_seqlens is None:
        lengths = scored.view(targets.shape).sum(1)
    else:
        sizes = tuple(b - a for a, b in zip(cu_seqlens, cu_seqlens[1:]))
        lengths = segment_sum(scored, on_device(sizes, hidden.device)).long()
        if hidden.device.type != "cpu":
            return Scored(hidden, None, flat, sizes, lengths, weights)
    counts = tuple(lengths.tolist())  # the one synchronisation of the padded interface
    if sum(counts) == flat.shape[0]:
        return Scored(hidden, None, flat, counts, lengths, weights)
    index = torch.nonzero_static(scored, size=sum(counts))[:, 0]
    weights = None if weights is None else weights[index]
    return Scored(hidden, index, flat[index], counts, lengths, weights)


def debugging() -> bool:
    return os.environ.get("FASTPREF_DEBUG", "0") not in ("", "0")


def check_targets(targets: Tensor, vocab: int, ignore_index: int, name: str = "weight") -> None:
    """On the CPU always; on a device only under FASTPREF_DEBUG=1, for it synchronises."""
    if targets.device.type == "meta" or (targets.device.type != "cpu" and not debugging()):
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        value = targets[wrong][0].item()
        takes = f"0 <= target < {vocab} (rows of {name}) or ignore_index {ignore_index}"
        raise ValueError(f"targets holds {value}; it takes {takes}")


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host counts as an int64 tensor, without a synchronisation and without a copy: they travel as arguments of a
    launch (one for about a hundred), so that a CUDA graph holds the counts themselves and no address of ours."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    out = torch.zeros(len(values), dtype=torch.int64, device=device)
    if values:
        torch._foreach_add_(out.unbind(), list(values))
    return out


def segment_sum(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive segments, in fp64 where there is one (a sum of 10^4
    fp32 log-probs would lose 1e-4 nats), no atomics."""
    values = values.to(rows.exact_dtype(values.device))
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)


def problem_of(
    counts: tuple[int, ...], hidden: Tensor, weight: Tensor, index: Tensor | None, coupling: str, options: Options,
    *, late: bool = False, scratches: int = 2, accumulate_into: Tensor | None = None,
) -> Problem:
    compute, needs = options.compute_dtype, options.needs
    grad = weight.dtype if accumulate_into is None else accumulate_into.dtype
    return Problem(
        counts, weight.shape[1], weight.shape[0], compute.itemsize, options.logits_dtype.itemsize,
        grad.itemsize, needs_hidden_grad=needs[0], needs_weight_grad=needs[1] or needs[2], coupling=coupling,
        scratches=scratches, late=late, entropy_grad=late and "entropy" in options.extras,
        cast_weight=weight.dtype != compute,
        gathered=index is not None or hidden.dtype != compute,
        tail=options.tail_eps is not None,
        device="cuda" if fp32_gemms(weight.device) else "cpu",
    )


# ---------------------------------------------------------------------------------------------------------------------
# GEMMs: cuBLAS / oneDNN through torch, into buffers that exist
# ---------------------------------------------------------------------------------------------------------------------


def fp32_gemms(device: torch.device) -> bool:
    """Whether GEMMs on this device write, and add to, fp32 from low-precision operands ("meta": a dry run of CUDA)."""
    return device.type in ("cuda", "meta")


class _FullSums:
    """In it cuBLAS adds up the parts of a split K in fp32, as it does not by default. The setting is the process's: the
    first thread in changes it, the last one out puts back what it was."""

    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    lock, inside = Lock(), 0
    before: tuple[bool, ...] = ()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = tuple(getattr(torch.backends.cuda.matmul, name) for name in self.names)
                self.set((False, False))
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.set(self.before)

    def set(self, values: tuple[bool, ...]) -> None:
        for name, value in zip(self.names, values):
            split = getattr(torch.backends.cuda.matmul, f"{name}_split_k", True)  # a part of the setting, newer
            setattr(torch.backends.cuda.matmul, name, value if split else (value, split))


full_sums = _FullSums()


def _sums_on(device: torch.device) -> AbstractContextManager[object]:
    """`full_sums` where there is cuBLAS: on the CPU its setting would cost every product 25 us."""
    return nullcontext() if device.type == "cpu" else full_sums


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    with _sums_on(a.device):
        if a.dtype == out.dtype:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # CUDA: fp32 from bf16 / fp16 operands


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x W^T, [rows, cols]."""
    if out.device.type != "cpu" or x.dtype != torch.float32:
        return _mm(x, weight.t(), out)
    for start in range(0, weight.shape[0], LOGITS_COLS):
        part = slice(start, start + LOGITS_COLS)
        torch.mm(x, weight[part].to(x.dtype).t(), out=out[:, part])
    return out


def _add_mm(total: Tensor, a: Tensor, b: Tensor, begun: bool, product: Tensor | None) -> None:
    """total (+)= a b in the precision of total; by way of `product` where no GEMM does that. b in fewer bits than a is
    widened, some rows at a time."""
    if b.dtype != a.dtype:
        for start in range(0, max(1, b.shape[0]), LOGITS_COLS):  # a product of no rows writes zeros
            cols = slice(start, start + LOGITS_COLS)
            _add_mm(total, a[:, cols], b[cols].to(a.dtype), begun or start > 0, product)
    elif product is not None:
        torch.mm(a, b, out=product)
        # By rows: torch would make a fp32 copy of the whole product first.
        step = add_rows(*product.shape)
        for start in range(0, total.shape[0], step):
            part, more = total[start : start + step], product[start : start + step]
            part.add_(more) if begun else part.copy_(more)
    elif not begun:
        _mm(a, b, total)
    else:
        with _sums_on(total.device):
            if total.dtype == a.dtype:
                torch.addmm(total, a, b, out=total)
            else:
                torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # CUDA, torch 2.10


def _add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool) -> None:
    low = total.dtype != a.dtype and not fp32_gemms(total.device)
    _add_mm(total, a, b, begun, torch.empty_like(total, dtype=a.dtype) if low else None)


def _add_mv(total: Tensor, residuals_CV: Tensor, w: Tensor) -> None:
    """db += U^T w in fp32, some rows of U at a time."""
    step = (32 if total.device.type == "cuda" else 4) * MIB // (4 * total.shape[0])
    step = residuals_CV.shape[0] if residuals_CV.dtype == total.dtype else max(1, step)
    for start in range(0, residuals_CV.shape[0], max(1, step)):
        total.addmv_(residuals_CV[start : start + step].to(total.dtype).t(), w[start : start + step])


class _Sum:
    """A sum of A^T B over GEMMs in a [V, H] buffer, always in the same order."""

    def __init__(self, total: Tensor, compute_dtype: torch.dtype, slice_rows: int, *, begun: bool = False) -> None:
        self.total, self.compute_dtype, self.slice_rows, self.begun = total, compute_dtype, slice_rows, begun

    def begin(self) -> None:
        """Zeros, for what is added to some of its rows only."""
        if not self.begun:
            self.total.zero_()
        self.begun = True

    def add(self, residuals_CV: Tensor, scaled_CH: Tensor) -> None:
        if fp32_gemms(self.total.device) or self.compute_dtype == self.total.dtype:
            _add_mm(self.total, residuals_CV.t(), scaled_CH, self.begun, None)
        else:
            vocab, width = self.total.shape
            buffer = self.total.new_empty(self.slice_rows, width, dtype=self.compute_dtype)
            for start in range(0, vocab, self.slice_rows):
                end = min(start + self.slice_rows, vocab)
                residuals = residuals_CV[:, start:end].t()
                _add_mm(self.total[start:end], residuals, scaled_CH, self.begun, buffer[: end - start])
        self.begun = True

    def add_scaled(self, other: _Sum, scale: Tensor) -> None:
        """total += scale * other, and other begins anew."""
        if not other.begun:
            return
        if self.begun:
            self.total.addcmul_(other.total, scale)
        else:
            torch.mul(other.total, scale, out=self.total)
        self.begun, other.begun = True, False


class WeightGrad(_Sum):
    """dW: added up in fp32 and rounded once; or added to a buffer of the caller's."""

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, plan: Plan, into: Tensor | None) -> None:
        self.into = into is not None
        self.grad = workspace.empty_like(weight) if into is None else into
        self.wide = torch.promote_types(self.grad.dtype, torch.float32)
        several = len(plan.groups) > 1 or any(group.long for group in plan.groups)
        several = several or (plan.problem.tail and plan.scheme == "groups")
        apart = several and self.wide != self.grad.dtype
        total = workspace.empty_like(self.grad, self.wide) if apart else self.grad
        super().__init__(total, compute_dtype, plan.weight_slice, begun=self.into)

    def begin_slice(self, start: int, end: int, *, several: bool, zeros: bool) -> Tensor:
        """The sum that becomes dW[start:end]: wide where several products are added up."""
        target = self.grad[start:end]
        total = torch.empty_like(target, dtype=self.wide) if several and target.dtype != self.wide else target
        return total.zero_() if zeros and not self.into else total

    def add_to_slice(self, total: Tensor, residuals_CV: Tensor, scaled_CH: Tensor, begun: bool) -> None:
        _add_product(total, residuals_CV.t(), scaled_CH, begun or self.into)

    def end_slice(self, start: int, end: int, total: Tensor) -> None:
        """The whole of dW[start:end] is there: no sum beside it."""
        if total.dtype != self.grad.dtype:
            self.grad[start:end].copy_(total)
        self.total, self.begun = self.grad, True

    def finish(self) -> Tensor:
        if not self.begun:
            return self.grad.zero_()
        return self.grad if self.total is self.grad else self.grad.copy_(self.total)


class HiddenGrad:
    """dX, [*, H] in the dtype of hidden or another: rows written where they belong, zero where nothing is scored.

    U W is made in fp32 where GEMMs do that, so that the row scale is the only rounding.
    """

    def __init__(
        self, scored: Scored, compute: torch.dtype, buffer: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        covered = scored.index is None or scored.index.shape[0] == scored.hidden.shape[0]
        self.grad = workspace.empty_like(scored.hidden, dtype)
        if not covered:
            self.grad.zero_()
        self.scored, self.index, self.buffer = scored, scored.index, buffer
        self.wide = fp32_gemms(self.grad.device) and compute.itemsize < 4
        self.product = torch.float32 if self.wide else compute

    def put(self, start: int, residuals_CV: Tensor, weight: Tensor, scale: Tensor | None) -> None:
        """Rows [start, start + C) = scale * (U W)."""
        count = residuals_CV.shape[0]
        if self.index is None and self.scored.spans is None and self.product == self.grad.dtype:
            target = self.grad[start : start + count]
            _add_mm(target, residuals_CV, weight, False, None)
            if scale is not None:
                rows.scale_rows(target, scale, target)
            return
        # In fp32 one half after the other: together no more bytes than the operand of the next GEMM.
        step = -(-count // 2) if self.wide else count
        product = self.buffer
        if product is None or product.dtype != self.product:
            product = workspace.empty((step, weight.shape[1]), self.product, weight.device)
        for first in range(0, count, max(step, 1)):
            last = min(first + step, count)
            part = product[: last - first]
            _add_mm(part, residuals_CV[first:last], weight, False, None)
            self.put_rows(start + first, part, None if scale is None else scale[first:last], self.buffer)

    def put_rows(self, start: int, rows_CH: Tensor, scale: Tensor | None, buffer: Tensor | None) -> None:
        """Rows from `start` on, scaled. They are overwritten, and so is `buffer`, where a device rounds what it
        scatters."""
        count = rows_CH.shape[0]
        if self.index is None:
            for mine, there in self.scored.runs(start, start + count):
                if scale is None:
                    self.grad[there].copy_(rows_CH[mine])
                else:
                    rows.scale_rows(rows_CH[mine], scale[mine], self.grad[there])
            return
        device = self.grad.device.type != "cpu"
        out = rows_CH
        if device and buffer is not None and rows_CH.dtype != self.grad.dtype:
            out = buffer[:count].view(self.grad.dtype)
        if scale is not None:
            rows.scale_rows(rows_CH, scale, out)
        step = count if device else max(1, min(count // 16, 128))
        for first, part in enumerate(out.split(max(step, 1))):
            place = start + step * first
            self.grad.index_copy_(0, self.index[place : place + part.shape[0]], part.to(self.grad.dtype))

    def scale_rows(self, scale: Tensor, dtype: torch.dtype) -> None:
        """Every scored row times its late scalar, [N]."""
        if self.index is not None:
            scale = scale.new_zeros(self.grad.shape[0]).index_copy_(0, self.index, scale)
        self.grad = rows.scale_rows(self.grad, scale, self.grad if self.grad.dtype == dtype else
                                    torch.empty_like(self.grad, dtype=dtype))

    def scale_range(self, start: int, end: int, scale: Tensor) -> None:
        """Scored rows [start, end) times one late scalar."""
        if self.index is None:
            for _, there in self.scored.runs(start, end):
                self.grad[there].mul_(scale)
            return
        for index in self.index[start:end].split(1024):
            self.grad.index_copy_(0, index, self.grad.index_select(0, index).mul_(scale))


class Gradients(NamedTuple):
    """Those that are wanted."""

    hidden: HiddenGrad | None
    weight: WeightGrad | None
    bias: Tensor | None  # fp32 (fp64)

    def finish(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX, dW, db), each in its own dtype."""
        return (
            None if self.hidden is None else self.hidden.grad,
            None if self.weight is None else self.weight.finish(),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The pass
# ---------------------------------------------------------------------------------------------------------------------


def _tiles(group: Group, tile_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, place in the stash) of every tile of a group."""
    start, stop = group.span
    for first in range(start, stop, tile_rows):
        yield first, min(first + tile_rows, stop), first - start


class Pass:
    """A pass over the rows of a plan. Token vectors, [N], are in the order of the batch."""

    def __init__(
        self, scored: Scored, projection: Projection, options: Options, plan: Plan, stash: Tensor | None = None
    ) -> None:
        self.scored, self.projection, self.options, self.plan = scored, projection, options, plan
        p, weight = plan.problem, projection.weight
        stats = rows.stats_dtype(projection.dtype)
        self.logps, self.lse, self.scale = (weight.new_zeros(p.rows, dtype=stats) for _ in range(3))
        self.extras = {name: weight.new_zeros(p.rows, dtype=stats) for name in options.extras.split()}
        self.stash = self.tile(plan.stash_rows) if stash is None else stash
        # Operands of one GEMM after another. "groups": gathered x, then dX before it is scattered, then scaled x.
        most = max(plan.tile_rows, plan.stash_rows) if plan.scheme == "groups" else plan.tile_rows
        self.x_buffer = self.empty(most, p.hidden) if p.gathered else None
        self.scratch: Tensor | None = None
        self.tail = self.logps.new_zeros(3)  # squares left out of U and all of U's; active columns of all rows, as rows
        # On a GPU: active columns of a block, what that was settled by, and what this call needs.
        self.tail_needed = tail.Needed.by(weight) if plan.tail_capacity else None
        self.tail_columns = None if self.tail_needed is None else self.tail_needed.columns(plan.tail_capacity)
        self.needed = None if self.tail_needed is None else self.logps.new_zeros((), dtype=torch.int64)

    def gradients(
        self, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], accumulate_into: Tensor | None = None,
        *, late: bool = False,
    ) -> Gradients:
        """late: the rows of dX are scaled at the end, and not rounded before where GEMMs write fp32."""
        p, compute = self.plan.problem, self.projection.dtype
        late = late and fp32_gemms(weight.device) and compute.itemsize < 4
        buffer = self.x_buffer
        if p.gathered and self.plan.scheme != "groups":
            buffer = None if late else self.projection.weight.new_empty(
                max(self.plan.stash_rows, self.plan.tile_rows), p.hidden, dtype=compute
            )
        dx = HiddenGrad(self.scored, compute, buffer, torch.float32 if late else None) if needs[0] else None
        dw = WeightGrad(weight, compute, self.plan, accumulate_into) if needs[1] else None
        db = torch.zeros_like(bias, dtype=self.logps.dtype) if needs[2] and bias is not None else None
        return Gradients(dx, dw, db)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return workspace.empty(shape, dtype or self.projection.dtype, self.projection.weight.device)

    def tile(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """[count, V] for logits or residuals; on a GPU every row begins at 16 bytes, for loads of that width."""
        vocab = self.plan.problem.vocab
        pitch = vocab if self.projection.weight.device.type == "cpu" else -(-vocab // 8) * 8
        return self.empty(count, pitch, dtype=dtype)[:, :vocab]

    def operand(self, count: int) -> Tensor:
        """[count, H] in the compute dtype, what it held gone."""
        return self.empty(count, self.plan.problem.hidden) if self.x_buffer is None else self.x_buffer[:count]

    @property
    def swept_in_place(self) -> bool:
        return self.options.logits_dtype == self.projection.dtype

    def forward(self, group: Group, stash: Tensor | None) -> None:
        """Log-probs of a group's rows, and their residuals as far as the stash reaches (whole tiles)."""
        kept = 0 if stash is None else stash.shape[0]
        for first, end, place in _tiles(group, self.plan.tile_rows):
            count = end - first
            out = stash[place : place + count] if stash is not None and place + count <= kept else None
            self.sweep(self.logits(first, end, out), slice(first, end), out)

    def sweep(self, logits: Tensor, mine: slice, out: Tensor | None) -> None:
        """What of a tile is kept for each of its rows, and their residuals in `out`."""
        found = self.projection.kernels.residual(self.row_tile(logits, mine, 0), out, tuple(self.extras))
        self.logps[mine] = found.logp
        self.lse[mine] = found.lse
        if found.scale is not None:
            self.scale[mine] = found.scale
        for name, values in self.extras.items():
            values[mine] = getattr(found, name)

    def logits(self, first: int, end: int, out: Tensor | None) -> Tensor:
        """Those of a tile, in `out` where they can be swept in place."""
        if out is not None and self.swept_in_place:
            logits = out
        else:
            if self.scratch is None:
                self.scratch = self.tile(self.plan.tile_rows, self.options.logits_dtype)
            logits = self.scratch[: end - first]
        return _logits(self.scored.rows(first, end, self.x_buffer), self.projection.weight, logits)

    def row_tile(self, logits: Tensor, mine: slice, start: int) -> rows.Tile:
        """Logits of some rows, and columns from `start` on, as the row kernels take them."""
        bias, transform = self.projection.bias, self.projection.transform
        bias = None if bias is None else bias[start : start + logits.shape[1]]
        return rows.Tile(logits, self.scored.targets[mine], transform, bias, self.options.ignore_index, start)

    def sweep_again(
        self, logits: Tensor, mine: slice, start: int, out: Tensor, grads: tuple[Tensor, Tensor] | None
    ) -> None:
        """Some rows, columns from `start` on, made again: their residuals, or with grads = (g_l, g_H) of the
        log-probs and entropies, [N], the gradient of the logits."""
        kernels, known = self.projection.kernels, [self.lse[mine]]
        sweep = kernels.residual_given_lse
        if grads is not None:
            known += [self.extras["entropy"][mine], grads[0][mine], grads[1][mine]]
            sweep = kernels.gradient_given_lse
        sweep(self.row_tile(logits, mine, start), *known, out)

    def late_scale(self, ga: Tensor, gh: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What rows made again are multiplied with at the end, [N], and what is swept into them."""
        # A device keeps ignored rows: whatever they get from above, they count for nothing.
        ignored = self.scored.targets == self.options.ignore_index
        ga, factor = ga.masked_fill(ignored, 0.0), self.projection.transform.row_factor
        if gh is None:
            return ga * factor, None
        gh = gh.masked_fill(ignored, 0.0)
        # The larger of the two stays outside: a mean over 10^5 tokens would leave fp16's range.
        norm = torch.maximum(ga.abs(), gh.abs())
        divisor = norm.masked_fill(norm == 0, 1.0)
        return norm * factor, (ga / divisor, gh / divisor)

    def forward_only(self) -> Tensor:
        for group in self.plan.groups:
            self.forward(group, None)
        return self.logps

    def frozen(self, dx: HiddenGrad) -> None:
        """No weight gradient wanted: U W at once; the rows of dX are scaled when the scalars are known."""
        for block in self.plan.groups:
            self.forward(block, self.stash)
            self.multiply(block.segments[0][0], self.stash[: block.rows], None, dx, None)

    def frozen_again(self, ga: Tensor, gh: Tensor, dx: HiddenGrad) -> None:
        """dX for gradients of log-probs and entropies, which `frozen` did not know."""
        scale, grads = self.late_scale(ga, gh)
        for block in self.plan.groups:
            for first, end, place in _tiles(block, self.plan.tile_rows):
                out = self.stash[place : place + end - first]
                self.sweep_again(self.logits(first, end, out), slice(first, end), 0, out, grads)
            start, end = block.segments[0]
            dx.put(start, self.stash[: block.rows], self.projection.weight, scale[start:end])

    def backward(self, group: Group, ga: Tensor, grads: Gradients) -> None:
        """Gradients of a group whose residuals are all in the stash. ga = g a, [N]."""
        if group.rows == 0:
            return
        start, end = group.span
        stash, w = self.stash[: group.rows], (ga * self.scale)[start:end]
        self.multiply(start, stash, w, grads.hidden, grads.weight)
        if grads.bias is not None:
            _add_mv(grads.bias, stash, w)

    def multiply(
        self, start: int, stash: Tensor, w: Tensor | None, dx: HiddenGrad | None, dw: _Sum | None
    ) -> None:
        """dX = diag(w) (U W) and dW += U^T (diag(w) X) of rows in the stash; without w, dX waits for its row scale."""
        weight, count = self.projection.weight, stash.shape[0]
        found = self.find_tail(stash, self.scale[start : start + count])
        product = scaled = None
        if dx is not None:
            if found is None:
                dx.put(start, stash, weight, w)
            else:
                product = self.empty(count, self.plan.problem.hidden, dtype=self.logps.dtype)
        if dw is not None and w is not None:
            scaled = self.scaled_rows(start, start + count, w, self.operand(count))
            if found is None:
                dw.add(stash, scaled)
            else:
                dw.begin()
        if found is None:
            return
        self.multiply_tail(found, stash, weight, product, scaled, None if dw is None else dw.total)
        if dx is not None and product is not None:
            dx.put_rows(start, product, w, self.x_buffer)

    def find_tail(self, residuals: Tensor, scale: Tensor, squares: Tensor | None = None) -> tail.Tail | None:
        """The tail of U = diag(scale) residuals; None where the products are to be exact. squares: see tail.find."""
        if self.options.tail_eps is None:
            return None
        block_rows, eps = self.plan.tail_block_rows, self.options.tail_eps
        found = tail.find(self.projection.kernels, residuals, scale, eps, block_rows, self.tail_columns, squares)
        if self.tail_needed is not None and self.needed is not None:
            self.needed = torch.maximum(self.needed, found.needed)
            self.tail_needed.tell(self.needed)
        self.tail[1] += found.squares
        if found.is_worth_it:
            return found
        self.tail[2] += residuals.numel() / self.plan.problem.vocab
        return None

    def multiply_tail(
        self, found: tail.Tail, residuals: Tensor, weight: Tensor, product: Tensor | None, scaled: Tensor | None,
        total: Tensor | None, begun: bool = False,
    ) -> None:
        """product (+)= U W without its row scale, total += U^T scaled."""
        columns = self.plan.tail_columns
        left_out = tail.multiply(
            self.projection.kernels, _add_product, found, residuals, weight, product, scaled, total, columns,
            begun=begun,
        )
        self.tail[0] += left_out
        self.tail[2] += found.active_BV.float().mean() * (residuals.numel() / self.plan.problem.vocab)

    def backward_long(
        self, group: Group, known: Tensor, dx: HiddenGrad | None, scratches: list[_Sum], db: list[Tensor]
    ) -> None:
        """Gradients of a group longer than the stash, up to its unknown scalars: dX in place, dW and db in scratches.

        known: [2] or [1], what each sequence of the group multiplies its scalar with.
        """
        for i, (start, stop) in enumerate(group.segments):
            for first in range(start, stop, self.plan.stash_rows):
                end = min(first + self.plan.stash_rows, stop)
                self.forward(Group((0, 0), (), ((first, end),)), self.stash)
                stash = self.stash[: end - first]
                w = self.scale[first:end] * known[i]
                w = w if self.scored.weights is None else w * self.scored.weights[first:end]
                self.multiply(first, stash, w, dx, scratches[min(i, len(scratches) - 1)] if scratches else None)
                if db:
                    _add_mv(db[min(i, len(db) - 1)], stash, w)

    def recompute(self, ga: Tensor, grads: Gradients, gh: Tensor | None = None) -> None:
        """The first rows' residuals are in the stash; the others' are made again, slice by slice of the vocabulary, so
        that each slice of dW is complete at once: no [V, H] sum in fp32. With gradients of the entropies, gh, all rows
        are. Each slice has a tail of its own. ga = g a, [N].
        """
        (dx, dw, db), p, cols = grads, self.plan.problem, self.plan.slice_cols
        kept, rank1 = self.plan.stash_rows if gh is None else 0, p.tail and gh is None and p.device == "cpu"
        if p.tail and not rank1:  # and so it says
            self.tail[2] += p.rows
        self.scratch = None
        stash, again = self.stash[:kept], p.rows - kept
        late, late_grads = self.late_scale(ga, gh)
        factor = torch.cat(((ga * self.scale)[:kept], late[kept:]))
        scale = squares = self.scale
        if rank1:
            counted = (self.scored.targets != self.options.ignore_index) * self.projection.transform.row_factor
            scale = torch.cat((self.scale[:kept], counted[kept:].to(self.scale.dtype)))
            # At a target U is 1 - p: of its squares that much is known before a slice is seen.
            squares = ((1 - self.logps.exp()) * counted).nan_to_num(0.0, 0.0, 0.0).square()
        first_sum = 0 if rank1 else kept  # of the rows whose dX is added up slice by slice
        if dx is not None:
            for first in range(0, first_sum, self.plan.tile_rows):
                end = min(first + self.plan.tile_rows, kept)
                dx.put(first, stash[first:end], self.projection.weight, factor[first:end])
        scaled = self.scaled_rows(0, p.rows, factor, self.empty(p.rows, p.hidden)) if dw is not None else None
        x = self.scored.rows(kept, p.rows, self.empty(again, p.hidden) if p.gathered else None)
        dx_sum = x.new_empty(p.rows - first_sum, p.hidden, dtype=self.logps.dtype) if dx is not None else None
        buffered = not fp32_gemms(x.device) and dx_sum is not None and dx_sum.dtype != x.dtype
        product = self.empty(max(again, kept * rank1), p.hidden) if buffered else None
        tile = self.empty(again * cols)
        scratch = tile if self.swept_in_place else self.empty(again * cols, dtype=self.options.logits_dtype)
        for start in range(0, p.vocab, cols):
            end = min(start + cols, p.vocab)
            weight, size = self.projection.weight[start:end], again * (end - start)
            logits = _logits(x, weight, scratch[:size].view(again, end - start))
            u = tile[:size].view(again, end - start)
            self.sweep_again(logits, slice(kept, p.rows), start, u, late_grads)
            parts = [(stash[:, start:end], slice(0, kept))] if kept else []
            total = None if dw is None else dw.begin_slice(start, end, several=kept > 0 or rank1, zeros=rank1)
            for i, (residuals, of) in enumerate([*parts, (u, slice(kept, p.rows))]):
                x_scaled = None if scaled is None else scaled[of]
                mine = slice(of.start - first_sum, of.stop - first_sum)
                dx_part = None if dx_sum is None or of.start < first_sum else dx_sum[mine]
                found = None
                if rank1:
                    found = self.find_tail(residuals, scale[of], squares[of].sum() * (end - start) / p.vocab)
                if found is not None:
                    self.multiply_tail(found, residuals, weight, dx_part, x_scaled, total, start > 0)
                    continue
                if dx_part is not None:
                    buffer = None if product is None else product[: len(residuals)]
                    _add_mm(dx_part, residuals, weight, start > 0, buffer)
                if dw is not None and total is not None and x_scaled is not None:
                    dw.add_to_slice(total, residuals, x_scaled, i > 0 or rank1)
            if dw is not None and total is not None:
                dw.end_slice(start, end, total)
                total = None
            if db is not None:
                _add_mv(db[start:end], u, factor[kept:])
        if db is not None and kept:
            _add_mv(db, stash, factor[:kept])
        if dx is not None and dx_sum is not None:
            dx.put_rows(first_sum, dx_sum, factor[first_sum:], x if first_sum == kept else None)

    def scaled_rows(self, start: int, end: int, w: Tensor, out: Tensor) -> Tensor:
        """w * x in the compute dtype, of x as the logits were made of it (under autocast, rounded); zero for an ignored
        row, whatever its hidden state holds."""
        if self.scored.index is not None or self.scored.hidden.dtype != out.dtype:
            return rows.scale_rows(self.scored.rows(start, end, out), w, out)
        for mine, there in self.scored.runs(start, end):
            rows.scale_rows(self.scored.hidden[there], w[mine], out[mine])
        return out


# ---------------------------------------------------------------------------------------------------------------------
# One step: log-probs, loss and gradients in one pass
# ---------------------------------------------------------------------------------------------------------------------


class Sequences:
    """Token log-probs added up to sequences for the loss, and its scalars g brought back to rows."""

    def __init__(self, loss: Loss, run: Pass, counts: Tensor, inputs: Inputs, ref_logps: Tensor | None) -> None:
        self.loss, self.run, self.counts = loss, run, counts
        lengths = run.scored.lengths.to(run.logps.dtype)
        totals = totals_of(lengths) if inputs.totals is None else Totals(*inputs.totals.unbind())
        self.logps = torch.zeros_like(lengths)
        self.extras = lengths.new_zeros(len(run.extras), lengths.shape[0])
        named = dict(zip(run.extras, self.extras))
        self.unweighted = torch.zeros_like(lengths) if named and run.scored.weights is not None else None
        self.batch = SequenceLogps(
            self.logps, lengths, totals, ref_logps, inputs.desirable, inputs.kl, named, self.unweighted
        )

    def of(self, group: Group) -> SequenceLogps:
        return self.batch.select(*group.items, pairs=self.loss.coupling == "pair")

    def loss_and_gradient(self, group: Group) -> tuple[Tensor, Tensor]:
        """L of a group whose rows have been swept, and g of its sequences."""
        run, counts = self.run, self.counts
        _add_up(group, run.logps, run.scored.weights, counts, self.logps)
        for sums, values in zip(self.extras, run.extras.values()):
            _add_up(group, values, None, counts, sums)
        if self.unweighted is not None:
            _add_up(group, run.logps, None, counts, self.unweighted)
        return losses.loss_and_gradient(self.loss, self.of(group))

    def to_rows(self, group: Group, g: Tensor) -> Tensor:
        """g a of every row, [N]; 0 in other groups."""
        weights, ga, place = self.run.scored.weights, torch.zeros_like(self.run.logps), 0
        for (s0, s1), (r0, r1) in zip(group.sequences, group.segments):
            of_rows = torch.repeat_interleave(g[place : place + s1 - s0], self.counts[s0:s1], output_size=r1 - r0)
            ga[r0:r1] = of_rows if weights is None else of_rows * weights[r0:r1]
            place += s1 - s0
        return ga


def totals_of(lengths: Tensor) -> Totals:
    """Of a batch that is no part of a larger one."""
    return Totals(max(lengths.shape[0], 1), lengths.sum(), lengths.chunk(2)[0].sum())


def _add_up(group: Group, values: Tensor, weights: Tensor | None, counts: Tensor, into: Tensor) -> None:
    """Sums over the tokens of every sequence of a group."""
    for (s0, s1), (r0, r1) in zip(group.sequences, group.segments):
        of_rows = values[r0:r1] if weights is None else values[r0:r1] * weights[r0:r1]
        into[s0:s1] = segment_sum(of_rows, counts[s0:s1]).to(values.dtype)


def _reference_logps(
    scored: Scored, plan: Plan, counts: Tensor, coupling: str, inputs: Inputs, options: Options
) -> Tensor | None:
    """[S], from the same tiles as the policy's: a policy that equals its reference has rewards of exactly 0."""
    hidden, weight = inputs.ref_hidden, inputs.ref_weight
    if hidden is None or weight is None:
        return inputs.ref_logps
    check_targets(inputs.targets, weight.shape[0], options.ignore_index, "ref_weight")
    options = options._replace(needs=(False, False, False), extras="")
    problem = problem_of(scored.counts, hidden, weight, scored.index, coupling, options)
    problem = replace(problem, gathered=problem.gathered or plan.order is not None)
    its_rows = replace(scored, hidden=hidden.reshape(-1, hidden.shape[-1]))
    projection = Projection.of(weight, inputs.ref_bias, options)
    token_logps = Pass(its_rows, projection, options, replace(plan, problem=problem, stash_rows=0)).forward_only()
    logps = token_logps.new_zeros(len(scored.counts))
    for group in plan.groups if plan.scheme == "groups" else (plan.problem.whole,):
        _add_up(group, token_logps, scored.weights, counts, logps)
    return logps


def step(
    loss: Loss, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, options: Options,
    accumulate_into: Tensor | None = None,
) -> Result:
    check_targets(inputs.targets, weight.shape[0], options.ignore_index)
    scored = scored_rows(hidden, inputs.targets, inputs.cu_seqlens, options.ignore_index, inputs.token_weights)
    projection = Projection.of(weight, bias, options)
    problem = problem_of(scored.counts, hidden, weight, scored.index, loss.coupling, options, scratches=loss.scratches,
                         accumulate_into=accumulate_into)
    plan = plan_of(problem, options.memory_budget)
    counts = on_device(scored.counts, hidden.device)
    if plan.order is not None:
        scored = scored.reordered(plan.order)
    ref_logps = _reference_logps(scored, plan, counts, loss.coupling, inputs, options)

    run = Pass(scored, projection, options, plan)
    grads = run.gradients(weight, bias, options.needs, accumulate_into, late=plan.scheme == "frozen")
    sequences = Sequences(loss, run, counts, inputs, ref_logps)
    if plan.scheme == "groups":
        value, scratches = sequences.logps.new_zeros(()), _Scratches(loss.scratches, run, grads)
        for group in plan.groups:  # whole pairs, whole sequences, or the batch
            if group.long:
                value = value + _long_group(group, run, sequences, grads, scratches)
            else:
                run.forward(group, run.stash)  # tile by tile: z = x W^T, log-probs, and U = scale * stash
                of_group, g = sequences.loss_and_gradient(group)  # a few floats, ordinary autograd
                run.backward(group, sequences.to_rows(group, g), grads)  # w = g a scale: dX = w (U W), dW += U^T (w x)
                value = value + of_group
    else:
        value = _one_group(run, sequences, grads, hidden.dtype)
    dx, dw, db = grads.finish(bias)
    dx = None if dx is None else dx.view(hidden.shape)
    return Result(value, sequences.logps, ref_logps, scored.lengths, sequences.extras, run.tail, dx, dw, db)


def _one_group(run: Pass, sequences: Sequences, grads: Gradients, dtype: torch.dtype) -> Tensor:
    """The loss scalars of all rows at once: without a weight gradient, or with rows that are made again."""
    whole, scheme = run.plan.problem.whole, run.plan.scheme
    if scheme == "frozen" and grads.hidden is not None:
        run.frozen(grads.hidden)
    elif scheme == "forward":
        run.forward_only()
    else:
        run.forward(whole, run.stash)
    value, g = sequences.loss_and_gradient(whole)
    ga = sequences.to_rows(whole, g)
    if scheme == "frozen" and grads.hidden is not None:
        grads.hidden.scale_rows(ga * run.scale, dtype)
    elif scheme == "recompute":
        run.recompute(ga, grads)
    return value


class _Scratches:
    """fp32 sums of dW and db for groups longer than the stash, one for each unknown scalar."""

    def __init__(self, count: int, run: Pass, grads: Gradients) -> None:
        weight = run.projection.weight
        long = any(group.long for group in run.plan.groups)
        wanted = count if long and grads.weight is not None else 0
        totals = (workspace.empty_like(weight, run.logps.dtype) for _ in range(wanted))
        self.weight = [_Sum(total, run.projection.dtype, run.plan.weight_slice) for total in totals]
        self.bias = [torch.zeros_like(grads.bias) for _ in range(count)] if long and grads.bias is not None else []


def _long_group(group: Group, run: Pass, sequences: Sequences, grads: Gradients, scratches: _Scratches) -> Tensor:
    """The gradients first, as far as they are known, and then times the scalars of the loss."""
    known = sequences.loss.coefficients(sequences.of(group))
    run.backward_long(group, known, grads.hidden, scratches.weight, scratches.bias)
    value, g = sequences.loss_and_gradient(group)
    late = g / known
    for i, (start, end) in enumerate(group.segments):
        if grads.hidden is not None:
            grads.hidden.scale_range(start, end, late[i])
    for scalar, scratch in zip(late, scratches.weight):
        if grads.weight is not None:
            grads.weight.add_scaled(scratch, scalar)
    for scalar, bias_scratch in zip(late, scratches.bias):
        if grads.bias is not None:
            grads.bias.addcmul_(bias_scratch, scalar)
            bias_scratch.zero_()
    return value
