"""A call walking its plan: GEMMs, rows and the loss meet here. Knows nothing of autograd, ops or arguments.

    z_t = W x_t            l_t = z_t[y_t] - lse(z_t)            logp_s = sum of a_t l_t over the tokens of sequence s
    L   = f(logp_1 .. logp_S),  g_s = dL / dlogp_s              a few floats
    U_t = onehot(y_t) - softmax(z_t)                            knows nothing of the loss
    dX  = diag(g a) (U W)          dW = U^T (diag(g a) X)       the late scalar is a row scale on an [N, H] matrix

Shape suffixes: N scored rows, H hidden size, V vocabulary, S sequences, C rows of a stash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import losses, rows
from .losses import Loss, SequenceLogps, Totals
from .plan import MIB, Group, Plan, Problem, add_rows, plan
from .rows import native

# ---------------------------------------------------------------------------------------------------------------------
# One call, laid out: which rows are scored, and the head they are multiplied with
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """The rows of `hidden` that predict a scored token, in the order of the batch."""

    hidden: Tensor  # [*, H] as given
    index: Tensor | None  # [N] rows of hidden; None: all of them, in order
    targets: Tensor  # [N]
    counts: tuple[int, ...]  # rows of each sequence, on the host
    lengths: Tensor  # [S] int64: scored tokens of each sequence
    weights: Tensor | None  # [N] token weights

    def rows(self, start: int, end: int, buffer: Tensor | None) -> Tensor:
        """hidden rows [start, end) in the buffer's dtype: a view where nothing has to be gathered or cast."""
        if buffer is None:
            return self.hidden[start:end]
        out = buffer[: end - start]
        if self.index is None:
            return out.copy_(self.hidden[start:end])
        if self.hidden.dtype == out.dtype:
            return torch.index_select(self.hidden, 0, self.index[start:end], out=out)
        return out.copy_(self.hidden[self.index[start:end]])


class Options(NamedTuple):
    """What every op takes at its end, in this order."""

    ignore_index: int
    softcap: float | None
    logit_scale: float
    temperature: float
    memory_budget: int | None
    backend: str
    compute_dtype: torch.dtype  # of the GEMMs' operands and the stash
    logits_dtype: torch.dtype  # what the first GEMM writes
    needs: tuple[bool, bool, bool]  # gradients wanted: hidden, weight, bias


class Head(NamedTuple):
    """What turns hidden rows into logits, and logits into rows of U."""

    weight: Tensor  # [V, H] in the compute dtype
    bias: Tensor | None  # [V]
    transform: rows.Transform
    kernels: ModuleType
    ignore_index: int
    logits_dtype: torch.dtype

    def residual(self, logits: Tensor, targets: Tensor, out: Tensor | None) -> rows.RowStats:
        return self.kernels.residual(
            logits, targets, out, transform=self.transform, bias=self.bias, ignore_index=self.ignore_index
        )


def score(
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


def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Host counts as an int64 tensor, without a synchronisation."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int64, device=device)
    return _on_device(values, device)


@lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """From pinned memory, and kept: a CUDA graph that copied it will copy it again."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def segment_sum(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive segments, in fp64 (a sum of 10^4 fp32 log-probs would lose 1e-4 nats), no atomics."""
    return torch.segment_reduce(values.double(), "sum", lengths=counts, unsafe=True)


def sequence_logps_of(logps: Tensor, weights: Tensor | None, counts: Tensor) -> Tensor:
    return segment_sum(logps if weights is None else logps * weights, counts).to(logps.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# GEMMs: cuBLAS / oneDNN through torch, into buffers that exist
# ---------------------------------------------------------------------------------------------------------------------


def fp32_gemms(device: torch.device) -> bool:
    """Whether GEMMs on this device write, and add to, fp32 from low-precision operands ("meta": a dry run of CUDA)."""
    return device.type in ("cuda", "meta")


def _fresh(tensor: Tensor) -> Tensor:
    """A buffer just allocated. On the CPU its pages, 4 KiB each, cost more than writing them: asks for huge ones."""
    if tensor.device.type == "cpu" and tensor.nbytes >= 4 * MIB:
        native.advise_huge(tensor)
    return tensor


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)  # CUDA: fp32 from bf16 / fp16 operands


def _add_mm(total: Tensor, a: Tensor, b: Tensor, begun: bool, product: Tensor | None) -> None:
    """total (+)= a b in the precision of total; by way of `product` where no GEMM does that."""
    if product is not None:
        torch.mm(a, b, out=product)
        # By rows: torch would make a fp32 copy of the whole product first.
        step = add_rows(*product.shape)
        for start in range(0, total.shape[0], step):
            part, more = total[start : start + step], product[start : start + step]
            part.add_(more) if begun else part.copy_(more)
    elif not begun:
        _mm(a, b, total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _Sum:
    """A sum of A^T B over GEMMs in a [V, H] buffer, always in the same order."""

    def __init__(self, total: Tensor, compute_dtype: torch.dtype, slice_rows: int, *, begun: bool = False) -> None:
        self.total, self.compute_dtype, self.slice_rows, self.begun = total, compute_dtype, slice_rows, begun

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


class _WeightGrad(_Sum):
    """dW: added up in fp32 and rounded once; or added to a buffer of the caller's."""

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, schedule: Plan, into: Tensor | None) -> None:
        self.into = into is not None
        self.grad = (
            into if into is not None else _fresh(torch.empty_like(weight, memory_format=torch.contiguous_format))
        )
        self.wide = torch.promote_types(self.grad.dtype, torch.float32)
        several = len(schedule.groups) > 1 or any(group.long for group in schedule.groups)
        apart = several and self.wide != self.grad.dtype
        total = _fresh(torch.empty_like(self.grad, dtype=self.wide)) if apart else self.grad
        super().__init__(total, compute_dtype, schedule.weight_slice, begun=self.into)

    def set_slice(self, start: int, end: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        """dW[start:end] = sum of A^T B over `parts`, the whole of it."""
        target = self.grad[start:end]
        total = target
        if len(parts) > 1 and target.dtype != self.wide:
            total = torch.empty_like(target, dtype=self.wide)
        product = None
        if not fp32_gemms(total.device) and total.dtype != self.compute_dtype:
            product = torch.empty_like(target, dtype=self.compute_dtype)
        for i, (residuals_CV, scaled_CH) in enumerate(parts):
            _add_mm(total, residuals_CV.t(), scaled_CH, i > 0 or self.into, product)
        if total is not target:
            target.copy_(total)
        self.begun = True

    def finish(self) -> Tensor:
        if not self.begun:
            return self.grad.zero_()
        return self.grad if self.total is self.grad else self.grad.copy_(self.total)


class _HiddenGrad:
    """dX, [*, H] in the dtype of hidden: rows written where they belong, zero where nothing is scored."""

    def __init__(self, scored: Scored, buffer: Tensor | None) -> None:
        empty = torch.empty_like if scored.index is None else torch.zeros_like
        self.grad = empty(scored.hidden, memory_format=torch.contiguous_format)
        self.index, self.buffer = scored.index, buffer

    def put(self, start: int, residuals_CV: Tensor, weight: Tensor, scale: Tensor | None) -> None:
        """Rows [start, start + C) = scale * (U W)."""
        end = start + residuals_CV.shape[0]
        if self.buffer is None:
            target = _mm(residuals_CV, weight, self.grad[start:end])
            if scale is not None:
                rows.scale_rows(target, scale, target)
            return
        product = _mm(residuals_CV, weight, self.buffer[: end - start])
        self.put_rows(start, product if scale is None else rows.scale_rows(product, scale, product))

    def scale_rows(self, scale: Tensor) -> None:
        """Every scored row times its late scalar, [N]."""
        if self.index is not None:
            scale = scale.new_zeros(self.grad.shape[0]).index_copy_(0, self.index, scale)
        rows.scale_rows(self.grad, scale, self.grad)

    def scale_range(self, start: int, end: int, scale: Tensor) -> None:
        """Scored rows [start, end) times one late scalar."""
        if self.index is None:
            self.grad[start:end].mul_(scale)
        else:
            rows_CH = self.grad.index_select(0, self.index[start:end]).mul_(scale)
            self.grad.index_copy_(0, self.index[start:end], rows_CH)

    def put_rows(self, start: int, rows_CH: Tensor) -> None:
        if self.index is None:
            self.grad[start : start + rows_CH.shape[0]].copy_(rows_CH)
            return
        step = max(1, min(rows_CH.shape[0] // 16, 128))
        for first, part in enumerate(rows_CH.split(step)):
            place = start + step * first
            self.grad.index_copy_(0, self.index[place : place + part.shape[0]], part.to(self.grad.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------------------


def _tiles(group: Group, tile_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, place in the stash) of every tile of a group."""
    place = 0
    for start, stop in group.segments:
        for first in range(start, stop, tile_rows):
            end = min(first + tile_rows, stop)
            yield first, end, place
            place += end - first


class Walk:
    """One call walking its plan. Token vectors, [N], are in the order of the batch."""

    def __init__(self, scored: Scored, head: Head, schedule: Plan, stash: Tensor | None = None) -> None:
        self.scored, self.head, self.plan = scored, head, schedule
        p = schedule.problem
        stats = rows.stats_dtype(head.weight.dtype)
        self.logps, self.lse, self.scale = (head.weight.new_zeros(p.rows, dtype=stats) for _ in range(3))
        self.stash = self.tile(schedule.stash_rows) if stash is None else stash
        self.x_buffer = self.empty(schedule.tile_rows, p.hidden) if p.gathered else None
        self.scratch: Tensor | None = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return _fresh(self.head.weight.new_empty(shape, dtype=dtype))

    def tile(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """[count, V] for logits or residuals; on a GPU every row begins at 16 bytes, for loads of that width."""
        vocab = self.plan.problem.vocab
        pitch = vocab if self.head.weight.device.type == "cpu" else -(-vocab // 8) * 8
        return self.empty(count, pitch, dtype=dtype)[:, :vocab]

    @property
    def swept_in_place(self) -> bool:
        return self.head.logits_dtype == self.head.weight.dtype

    def forward(self, group: Group, stash: Tensor | None) -> None:
        """Log-probs of a group's rows, and their residuals as far as the stash reaches (whole tiles)."""
        kept = 0 if stash is None else stash.shape[0]
        for first, end, place in _tiles(group, self.plan.tile_rows):
            count = end - first
            out = stash[place : place + count] if stash is not None and place + count <= kept else None
            if out is not None and self.swept_in_place:
                logits = out
            else:
                if self.scratch is None:
                    self.scratch = self.tile(self.plan.tile_rows, self.head.logits_dtype)
                logits = self.scratch[:count]
            _mm(self.scored.rows(first, end, self.x_buffer), self.head.weight.t(), logits)
            found = self.head.residual(logits, self.scored.targets[first:end], out)
            self.logps[first:end] = found.logp
            self.lse[first:end] = found.lse
            if found.scale is not None:
                self.scale[first:end] = found.scale

    def forward_only(self) -> Tensor:
        for group in self.plan.groups:
            self.forward(group, None)
        return self.logps

    def frozen(self, dx: _HiddenGrad) -> None:
        """No weight gradient wanted: U W at once; the rows of dX are scaled when the scalars are known."""
        for block in self.plan.groups:
            self.forward(block, self.stash)
            dx.put(block.segments[0][0], self.stash[: block.rows], self.head.weight, None)

    def backward(
        self, group: Group, w: Tensor, dx: _HiddenGrad | None, dw: _WeightGrad | None, db: Tensor | None
    ) -> None:
        """Gradients of a group whose residuals are all in the stash. w = g a scale, [N]."""
        if group.rows == 0:
            return
        scaled = self.empty(group.rows, self.plan.problem.hidden) if dw is not None else None
        place = 0
        for start, end in group.segments:
            stash = self.stash[place : place + end - start]
            if dx is not None:
                dx.put(start, stash, self.head.weight, w[start:end])
            if scaled is not None:
                self.scaled_rows(start, end, w[start:end], scaled[place : place + end - start])
            if db is not None:
                db += torch.mv(stash.t(), w[start:end].to(stash.dtype))
            place += end - start
        if dw is not None and scaled is not None:
            dw.add(self.stash[: group.rows], scaled)

    def backward_long(
        self,
        group: Group,
        coefficients: Tensor,
        weights: Tensor | None,
        dx: _HiddenGrad | None,
        scratches: list[_Sum],
        db: list[Tensor],
    ) -> None:
        """Gradients of a group longer than the stash, up to its unknown scalars: dX in place, dW and db in scratches.

        coefficients: [2] or [1], what each sequence of the group multiplies its scalar with; weights: a, [N].
        """
        for i, (start, stop) in enumerate(group.segments):
            for first in range(start, stop, self.plan.stash_rows):
                end = min(first + self.plan.stash_rows, stop)
                self.forward(Group((0, 0), (), ((first, end),)), self.stash)
                stash = self.stash[: end - first]
                w = self.scale[first:end] * coefficients[i]
                w = w if weights is None else w * weights[first:end]
                if dx is not None:
                    dx.put(first, stash, self.head.weight, w)
                if scratches:
                    scaled = self.empty(end - first, self.plan.problem.hidden)
                    scratches[min(i, len(scratches) - 1)].add(stash, self.scaled_rows(first, end, w, scaled))
                if db:
                    db[min(i, len(db) - 1)] += torch.mv(stash.t(), w.to(stash.dtype))

    def recompute(
        self, w: Tensor, ga: Tensor, dx: _HiddenGrad | None, dw: _WeightGrad | None, db: Tensor | None
    ) -> None:
        """The first rows' residuals are in the stash (w = g a scale); the others' (ga = g a) are made again, slice by
        slice of the vocabulary, so that each slice of dW is complete at once: no [V, H] sum in fp32.
        """
        p, kept, cols, head = self.plan.problem, self.plan.stash_rows, self.plan.slice_cols, self.head
        self.scratch = None
        stash, again = self.stash[:kept], p.rows - kept
        factor = torch.cat((w[:kept], ga[kept:] * head.transform.row_factor))
        if dx is not None:
            for first in range(0, kept, self.plan.tile_rows):
                end = min(first + self.plan.tile_rows, kept)
                dx.put(first, stash[first:end], head.weight, factor[first:end])
        scaled = self.scaled_rows(0, p.rows, factor, self.empty(p.rows, p.hidden)) if dw is not None else None
        x = self.scored.rows(kept, p.rows, self.empty(again, p.hidden) if p.gathered else None)
        dx_sum = x.new_empty(x.shape, dtype=rows.stats_dtype(x.dtype)) if dx is not None else None
        buffered = not fp32_gemms(x.device) and dx_sum is not None and dx_sum.dtype != x.dtype
        product = torch.empty_like(x) if buffered else None
        tile = self.empty(again * cols)
        scratch = tile if self.swept_in_place else self.empty(again * cols, dtype=head.logits_dtype)
        for start in range(0, p.vocab, cols):
            end = min(start + cols, p.vocab)
            weight, size = head.weight[start:end], again * (end - start)
            logits = _mm(x, weight.t(), scratch[:size].view(again, -1))
            u = tile[:size].view(again, -1)
            bias = None if head.bias is None else head.bias[start:end]
            head.kernels.residual_given_lse(
                logits, self.scored.targets[kept:], self.lse[kept:], u,
                col_offset=start, transform=head.transform, bias=bias, ignore_index=head.ignore_index,
            )  # fmt: skip
            if dx_sum is not None:
                _add_mm(dx_sum, u, weight, start > 0, product)
            if dw is not None and scaled is not None:
                parts = [(stash[:, start:end], scaled[:kept])] if kept else []
                dw.set_slice(start, end, [*parts, (u, scaled[kept:])])
            if db is not None:
                db[start:end] += torch.mv(u.t(), factor[kept:].to(u.dtype))
        if db is not None and kept:
            db += torch.mv(stash.t(), factor[:kept].to(stash.dtype))
        if dx is not None and dx_sum is not None:
            dx.put_rows(kept, dx_sum.mul_(factor[kept:, None]))

    def scaled_rows(self, start: int, end: int, w: Tensor, out: Tensor) -> Tensor:
        """w * x in the compute dtype, rounded once; zero for an ignored row, whatever its hidden state holds."""
        x = self.scored.hidden[start:end] if self.scored.index is None else self.scored.rows(start, end, out)
        return rows.scale_rows(x, w, out)


# ---------------------------------------------------------------------------------------------------------------------
# One step: log-probs, loss and gradients in one pass
# ---------------------------------------------------------------------------------------------------------------------


def head_of(weight: Tensor, bias: Tensor | None, options: Options) -> Head:
    kernels = rows.choose(options.backend, weight.device, options.compute_dtype)
    transform = rows.Transform(options.logit_scale, options.softcap, options.temperature)
    compute = weight.to(options.compute_dtype).contiguous()
    return Head(compute, bias, transform, kernels, options.ignore_index, options.logits_dtype)


def problem_of(
    counts: tuple[int, ...], hidden: Tensor, weight: Tensor, index: Tensor | None, coupling: str, options: Options,
    *, late: bool = False, scratches: int = 2, accumulate_into: Tensor | None = None,
) -> Problem:  # fmt: skip
    compute, needs = options.compute_dtype, options.needs
    grad = weight.dtype if accumulate_into is None else accumulate_into.dtype
    return Problem(
        counts, weight.shape[1], weight.shape[0], compute.itemsize, options.logits_dtype.itemsize,
        grad.itemsize, needs_hidden_grad=needs[0], needs_weight_grad=needs[1] or needs[2], coupling=coupling,
        scratches=scratches, late=late, cast_weight=weight.dtype != compute,
        gathered=index is not None or hidden.dtype != compute,
        device="cuda" if fp32_gemms(weight.device) else "cpu",
    )  # fmt: skip


def gradients(
    scored: Scored,
    head: Head,
    schedule: Plan,
    weight: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
    accumulate_into: Tensor | None = None,
) -> tuple[_HiddenGrad | None, _WeightGrad | None, Tensor | None]:
    p = schedule.problem
    buffer = None
    if p.gathered:
        buffer = head.weight.new_empty(max(schedule.stash_rows, schedule.tile_rows), p.hidden)
    dx = _HiddenGrad(scored, buffer) if needs[0] else None
    dw = _WeightGrad(weight, head.weight.dtype, schedule, accumulate_into) if needs[1] else None
    db = torch.zeros_like(bias, dtype=rows.stats_dtype(head.weight.dtype)) if needs[2] and bias is not None else None
    return dx, dw, db


def _scratches(count: int, head: Head, schedule: Plan) -> list[_Sum]:
    """fp32 [V, H] sums for groups longer than the stash."""
    if not any(group.long for group in schedule.groups):
        return []
    wide, dtype = rows.stats_dtype(head.weight.dtype), head.weight.dtype
    totals = (_fresh(torch.empty_like(head.weight, dtype=wide)) for _ in range(count))
    return [_Sum(total, dtype, schedule.weight_slice) for total in totals]


def step(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Sequence[int] | None,
    reference: tuple[Tensor, Tensor, Tensor | None] | Tensor | None,
    desirable: Tensor | None,
    kl: Tensor | None,
    token_weights: Tensor | None,
    totals: Totals | None,
    options: Options,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, logps, ref_logps, lengths, dX, dW, db)."""
    check_targets(targets, weight.shape[0], options.ignore_index)
    scored = score(hidden, targets, cu_seqlens, options.ignore_index, token_weights)
    head = head_of(weight, bias, options)
    problem = problem_of(scored.counts, hidden, weight, scored.index, loss.coupling, options, scratches=loss.scratches,
                         accumulate_into=accumulate_into)  # fmt: skip
    schedule = plan(problem, options.memory_budget)
    counts = on_device(scored.counts, hidden.device)

    ref_logps = reference if isinstance(reference, Tensor) else None
    if isinstance(reference, tuple):
        # The same tiles as the policy's: a policy that equals its reference has rewards of exactly 0.
        ref_hidden, ref_weight, ref_bias = reference
        check_targets(targets, ref_weight.shape[0], options.ignore_index, "ref_weight")
        ref_options = options._replace(needs=(False, False, False))
        ref_rows = replace(scored, hidden=ref_hidden.reshape(-1, ref_hidden.shape[-1]))
        ref_problem = problem_of(scored.counts, ref_hidden, ref_weight, scored.index, loss.coupling, ref_options)
        ref_plan = replace(schedule, problem=ref_problem, stash_rows=0)
        ref_walk = Walk(ref_rows, head_of(ref_weight, ref_bias, ref_options), ref_plan)
        ref_logps = sequence_logps_of(ref_walk.forward_only(), scored.weights, counts)
        del ref_walk

    walk = Walk(scored, head, schedule)
    dx, dw, db = gradients(scored, head, schedule, weight, bias, options.needs, accumulate_into)
    lengths = scored.lengths.to(walk.logps.dtype)
    if totals is None:
        totals = Totals(max(len(scored.counts), 1), lengths.sum(), lengths.chunk(2)[0].sum())
    logps = torch.zeros_like(lengths)
    batch = SequenceLogps(logps, lengths, totals, ref_logps, desirable, kl)

    def loss_of(group: Group) -> tuple[Tensor, Tensor]:
        """L of a group whose rows have been swept, and g of its sequences."""
        for (s0, s1), (r0, r1) in zip(group.sequences, group.segments):
            weights = None if scored.weights is None else scored.weights[r0:r1]
            logps[s0:s1] = sequence_logps_of(walk.logps[r0:r1], weights, counts[s0:s1])
        return losses.loss_and_gradient(loss, batch.select(*group.items, pairs=loss.coupling == "pair"))

    def rows_of(group: Group, g: Tensor) -> Tensor:
        """g a of every row, [N]; 0 in other groups."""
        ga, place = torch.zeros_like(walk.logps), 0
        for (s0, s1), (r0, r1) in zip(group.sequences, group.segments):
            of_rows = torch.repeat_interleave(g[place : place + s1 - s0], counts[s0:s1], output_size=r1 - r0)
            ga[r0:r1] = of_rows if scored.weights is None else of_rows * scored.weights[r0:r1]
            place += s1 - s0
        return ga

    if schedule.scheme == "groups":
        total = logps.new_zeros(())
        scratches = _scratches(loss.scratches, head, schedule) if dw is not None else []
        bias_scratches = [] if db is None else [torch.zeros_like(db) for _ in range(loss.scratches)]
        for group in schedule.groups:
            if group.long:
                known = loss.coefficients(batch.select(*group.items, pairs=loss.coupling == "pair"))
                walk.backward_long(group, known, scored.weights, dx, scratches, bias_scratches)
                value, g = loss_of(group)
                late = g / known
                for i, (start, end) in enumerate(group.segments):
                    if dx is not None:
                        dx.scale_range(start, end, late[i])
                for scalar, scratch in zip(late, scratches):
                    if dw is not None:
                        dw.add_scaled(scratch, scalar)
                for scalar, bias_scratch in zip(late, bias_scratches):
                    if db is not None:
                        db.addcmul_(bias_scratch, scalar)
                        bias_scratch.zero_()
            else:
                walk.forward(group, walk.stash)
                value, g = loss_of(group)
                walk.backward(group, rows_of(group, g) * walk.scale, dx, dw, db)
            total = total + value
    else:
        if schedule.scheme == "frozen" and dx is not None:
            walk.frozen(dx)
        elif schedule.scheme == "forward":
            walk.forward_only()
        else:
            walk.forward(schedule.problem.whole, walk.stash)
        total, g = loss_of(schedule.problem.whole)
        ga = rows_of(schedule.problem.whole, g)
        if schedule.scheme == "frozen" and dx is not None:
            dx.scale_rows(ga * walk.scale)
        elif schedule.scheme == "recompute":
            walk.recompute(ga * walk.scale, ga, dx, dw, db)
    return (
        total, logps, ref_logps, scored.lengths,
        None if dx is None else dx.grad.view(hidden.shape),
        None if dw is None else dw.finish(),
        None if db is None or bias is None else db.to(bias.dtype),
    )  # fmt: skip
