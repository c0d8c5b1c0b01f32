"""The row contract in Triton: CUDA (sm_80 and newer), ROCm, and CPU tensors under TRITON_INTERPRET=1 in tests.

One program sweeps one row, once: E = exp(z - m) goes to `out` unnormalised, with m near the row's maximum, while the
sums run in fp32. The target's own column is left out of both: the sweep stores 0 there, s_other is the sum of E over
the other columns, and last of all -s_other is stored at the target. That is E[y] - s without its cancellation, so a
row whose target has probability 1 - 1e-9 still gets the right residual.

m starts at the first block's maximum. A block whose maximum lies more than `limit` above m moves m: what the row
already wrote is multiplied by exp(m_old - m_new), and so are the sums. The logits are not read again, which is why
`out` may be `logits` itself, and why a narrower `out` may also lie over its own fp32 rows (see `_sweep`).

How wide a block is (ARITHMETIC for an H200 with 132 SMs of 65536 registers and 4.3 TB/s, not a measurement):
- fp32 logits to a bf16 stash are 6 bytes a logit: [1024, 128256] takes 183 us at full bandwidth (fp32 in place 245,
  bf16 in place 122).
- An SM owes 4.3e12 / 132 = 33 GB/s, 22 of them reads; at 0.8 us of loaded latency that is 17 KiB of reads in flight.
  128 threads x 16 fp32 logits = 8 KiB a program, and 64 registers a thread let 8 programs share an SM: 64 KiB. If
  reduction, exp and stores are half of an iteration, twice what is needed stays in flight without prefetching.
- 8 x 132 = 1056 programs run at once: 1024 rows are one wave. With 80 registers (softcap) it is 792 rows, and the rows
  left over take 63 blocks x 1.1 us = 70 us more.
- 12.3 instructions a logit (counted in the machine code for sm_90; 27.4 with a softcap) use 30 % of the issue slots,
  softcap's 3 exp and rcp a logit 60 % of the special function units.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .checks import DTYPES
from .contract import FoldState, RowStats, Tile, Transform

try:
    import triton
    import triton.language as tl
except ImportError as error:  # the module still imports: available() says why it does not work
    triton, _import_error, _INTERPRETED = None, str(error), False


def available(device: torch.device | None = None) -> tuple[bool, str]:
    if triton is None:
        return False, f"triton does not import: {_import_error}"
    if _INTERPRETED:
        return True, f"triton {triton.__version__}, interpreted on the CPU"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    if torch.version.hip is None:
        devices = range(torch.cuda.device_count()) if device is None or device.type != "cuda" else [device]
        capability = max(torch.cuda.get_device_capability(each) for each in devices)
        if capability < (8, 0):
            return False, "it needs compute capability 8.0, and the device has {}.{}".format(*capability)
    return True, f"triton {triton.__version__}"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in DTYPES and (device.type == "cuda" or (_INTERPRETED and device.type == "cpu"))


class Config(NamedTuple):
    """Columns a program takes at a time, and its warps (see the arithmetic above).

    At least 8 columns (16 bytes of bf16) for each lane of a warp (64 lanes on AMD) keep every column in exactly one
    thread, which working in place needs.
    """

    block: int
    num_warps: int


ALIGNED = Config(2048, 4)
UNALIGNED = Config(1024, 4)  # rows that start anywhere: a load an element, each with its own address and predicate


def configs() -> dict[str, tuple[Config, ...]]:
    """Every configuration in which each kernel can be launched."""
    both = ("_residual_kernel", "_fold_kernel", "_given_lse_kernel", "_scale_rows_kernel", "_peaks_kernel",
            "_split_kernel")
    one = ("_scale_unless_one_kernel", "_add_rows_kernel")
    return dict.fromkeys(both, (ALIGNED, UNALIGNED)) | dict.fromkeys(one, (ALIGNED,))


if triton is not None:
    _LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
    _SOFTCAP = tl.constexpr(2)
    _LOG2_E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _exp2(x):
        return tl.exp2(x)

    @triton.jit
    def _quotient(a, b):
        return a / b

    # TRITON_INTERPRET is read when a kernel is decorated, so the kernels know best. Compiled, these are one instruction
    # each, ex2.approx.ftz and rcp.approx.ftz (relative error 2^-22 and 2^-23); tl.exp2 and / also spare subnormals.
    _INTERPRETED = not isinstance(_exp2, triton.JITFunction)
    if not _INTERPRETED:
        from triton.language.extra import libdevice

        _exp2, _quotient = libdevice.exp2, libdevice.fast_dividef

    @triton.jit
    def _exp(x):
        return _exp2(x * _LOG2_E)

    @triton.jit
    def _transform(x, pre, post, TRANSFORM: tl.constexpr):
        """z of x = logits + bias, and the part of dz/dlogits that differs between columns (1.0 without a softcap)."""
        slope = 1.0
        if TRANSFORM != 0:
            x = x * pre
        if TRANSFORM == _SOFTCAP:
            # tanh u = (1 - e) / (1 + e) and 1 - tanh^2 u = 4 e / (1 + e)^2, e = exp(-2 |u|): nothing overflows, and the
            # derivative keeps its relative precision where the cap saturates.
            e = _exp2(tl.abs(x) * (-2.0 * _LOG2_E))
            r = _quotient(1.0, 1.0 + e)
            tanh = (1.0 - e) * r
            x = tl.where(x < 0, -tanh, tanh) * post
            slope = 4.0 * e * r * r
        return x, slope

    @triton.jit
    def _load_z(row_ptr, bias_ptr, c, width, pre, post, TRANSFORM: tl.constexpr, MASKED: tl.constexpr):
        if MASKED:
            x = tl.load(row_ptr + c, mask=c < width, other=0.0).to(tl.float32)
        else:
            x = tl.load(row_ptr + c).to(tl.float32)
        if bias_ptr is not None:
            if MASKED:
                x += tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)
            else:
                x += tl.load(bias_ptr + c).to(tl.float32)
        z, slope = _transform(x, pre, post, TRANSFORM)
        if MASKED:
            z = tl.where(c < width, z, -float("inf"))
        return z, slope

    @triton.jit
    def _store(ptr, c, width, value, MASKED: tl.constexpr):
        if MASKED:
            tl.store(ptr + c, value.to(ptr.dtype.element_ty), mask=c < width)
        else:
            tl.store(ptr + c, value.to(ptr.dtype.element_ty))

    @triton.jit
    def _store_zeros(ptr, width, BLOCK: tl.constexpr):
        zeros = tl.zeros([BLOCK], tl.float32)
        whole = width // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            _store(ptr, start + tl.arange(0, BLOCK), width, zeros, False)
        if whole < width:
            _store(ptr, whole + tl.arange(0, BLOCK), width, zeros, True)

    @triton.jit
    def _sum4(x, BLOCK: tl.constexpr):
        """Four neighbours, which one thread holds, into one: a quarter of the registers for every running sum."""
        return tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)

    @triton.jit
    def _preferred(z, c, z_y, y):
        """1.0 where argmax prefers column c to y: a larger z, or the same before it. Not y's own column, whose z may
        have been rounded otherwise than z_y."""
        return tl.where((c != y) & ((z > z_y) | ((z == z_y) & (c < y))), 1.0, 0.0)

    @triton.jit
    def _sweep(
        row_ptr, bias_ptr, out_ptr, start, width, y, z_y, pre, post, limit, lift, m, s, ez, sz, p2, beaten,
        TRANSFORM: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, MEAN: tl.constexpr, P2: tl.constexpr,
        MASKED: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """One block of a row. s, ez, p2: sums of E, E (z - m), E^2 without the target; sz: sum of z; beaten: 1.0 once
        there was a column that argmax prefers to y.

        All threads' loads of a block come before any thread's stores of it: the stores wait for m, which waits for the
        block's maximum, a reduction across the program. So a store may hit the bytes of any logit in this block or an
        earlier one. That covers a row over itself, and a narrower row over the same memory: column c of half the size
        starts at byte 2c, at or before its own logit at byte 4c.
        """
        c = start + tl.arange(0, BLOCK)
        z, slope = _load_z(row_ptr, bias_ptr, c, width, pre, post, TRANSFORM, MASKED)
        highest = tl.max(z, 0)
        if highest > m + limit:
            m_new = highest + lift
            factor = _exp(m - m_new)
            if ENTROPY:
                # The bound only matters for the first block, where s is 0 and must not meet an infinite distance.
                ez = factor * (ez + tl.maximum(m - m_new, _LOWEST) * s)
            if P2:
                p2 *= factor * factor
            s *= factor
            if out_ptr is not None:
                for before in range(0, start, BLOCK):
                    # Other threads may have stored what this one now rescales. Inside the loop it also keeps ptxas from
                    # unrolling it, which takes 12 more registers from the whole kernel.
                    tl.debug_barrier()
                    b = before + tl.arange(0, BLOCK)
                    _store(out_ptr, b, width, tl.load(out_ptr + b).to(tl.float32) * factor, False)
            m = m_new
        # Inside the block, and so in 32 bits: of c == y the compiler makes comparisons of 64, three instructions.
        e = tl.where(tl.arange(0, BLOCK) == y - start, 0.0, _exp(z - m))
        if out_ptr is not None:
            if TRANSFORM == _SOFTCAP:
                _store(out_ptr, c, width, e * slope, MASKED)
            else:
                _store(out_ptr, c, width, e, MASKED)
        s += _sum4(e, BLOCK)
        if ENTROPY:
            # Where e is 0, z may be -inf; where e is NaN, s shows it.
            ez += _sum4(tl.where(e > 0, e * (z - m), 0.0), BLOCK)
        if P2:
            p2 += _sum4(e * e, BLOCK)
        if MEAN:
            if MASKED:
                z = tl.where(c < width, z, 0.0)
            sz += _sum4(z, BLOCK)
        if TOP1:
            # One number a row: a vector of them takes the registers that all extras together do not have.
            if (y >= start) & (y < start + BLOCK):
                beaten = tl.maximum(beaten, tl.max(_preferred(z, c, z_y, y), 0))
            else:
                beaten = tl.maximum(beaten, _preferred(highest, start, z_y, y))
        return m, s, ez, sz, p2, beaten

    @triton.jit(do_not_specialize=["logits_stride", "out_stride", "ignore_index"])
    def _residual_kernel(
        logits_ptr,  # [rows, width], fp32 / bf16 / fp16
        logits_stride,  # in units of LOGITS_UNIT elements
        targets_ptr,  # [rows] int64
        bias_ptr,  # [width] or None
        out_ptr,  # [rows, width] or None
        out_stride,  # in units of OUT_UNIT elements
        logp_ptr,  # [rows] fp32, as all that follow; None where not asked for
        lse_ptr,
        scale_ptr,
        entropy_ptr,
        top1_ptr,
        mean_logit_ptr,
        log_sum_p2_ptr,
        width,
        ignore_index,
        pre,
        post,
        row_factor,
        limit,
        lift,
        TRANSFORM: tl.constexpr,
        LOGITS_UNIT: tl.constexpr,
        OUT_UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        ENTROPY: tl.constexpr = entropy_ptr is not None
        TOP1: tl.constexpr = top1_ptr is not None
        MEAN: tl.constexpr = mean_logit_ptr is not None
        P2: tl.constexpr = log_sum_p2_ptr is not None
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        if out_ptr is not None:
            # The constant factor tells the compiler that rows are 16-byte aligned, also where the stride is no
            # multiple of 16 elements.
            out_ptr += row * out_stride * OUT_UNIT
        if target == ignore_index:
            if out_ptr is not None:
                _store_zeros(out_ptr, width, BLOCK)
                tl.store(scale_ptr + row, 0.0)
            tl.store(logp_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if TOP1:
                tl.store(top1_ptr + row, 0.0)
            if MEAN:
                tl.store(mean_logit_ptr + row, 0.0)
            if P2:
                tl.store(log_sum_p2_ptr + row, 0.0)
        else:
            row_ptr = logits_ptr + row * logits_stride * LOGITS_UNIT
            valid = (target >= 0) & (target < width)
            y = tl.where(valid, target, -1).to(tl.int32)
            x_y = tl.load(row_ptr + y, mask=valid, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                x_y += tl.load(bias_ptr + y, mask=valid, other=0.0).to(tl.float32)
            z_y, slope_y = _transform(x_y, pre, post, TRANSFORM)
            z_y = tl.where(valid, z_y, float("nan"))
            # The columns past the last multiple of 16 are stored last, as the target is: no mask then cuts through 16
            # bytes, whatever the width, and the tail takes 20 registers less. Here they only have a say in m.
            even = width // 16 * 16
            rest = even + tl.arange(0, 16)
            z_r, _ = _load_z(row_ptr, bias_ptr, rest, width, pre, post, TRANSFORM, True)
            if out_ptr is not None:
                tl.debug_barrier()  # in place, no thread may store over these logits before all have read them

            m = tl.maximum(tl.max(z_r, 0) + lift, _LOWEST)
            s = tl.zeros([BLOCK // 4], tl.float32)
            ez, sz, p2, beaten = 0.0, 0.0, 0.0, 0.0
            if ENTROPY:
                ez = tl.zeros([BLOCK // 4], tl.float32)
            if MEAN:
                sz = tl.zeros([BLOCK // 4], tl.float32)
            if P2:
                p2 = tl.zeros([BLOCK // 4], tl.float32)
            # No mask on whole blocks: accesses stay 16 bytes wide for every width, not only for multiples of 16.
            whole = width // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                m, s, ez, sz, p2, beaten = _sweep(
                    row_ptr, bias_ptr, out_ptr, start, even, y, z_y, pre, post, limit, lift, m, s, ez, sz, p2, beaten,
                    TRANSFORM, ENTROPY, TOP1, MEAN, P2, False, BLOCK,
                )
            if whole < even:
                m, s, ez, sz, p2, beaten = _sweep(
                    row_ptr, bias_ptr, out_ptr, whole, even, y, z_y, pre, post, limit, lift, m, s, ez, sz, p2, beaten,
                    TRANSFORM, ENTROPY, TOP1, MEAN, P2, True, BLOCK,
                )

            # As a scheduling fence: without it ptxas moves these loads up, and then spills.
            tl.debug_barrier()
            z_r, slope_r = _load_z(row_ptr, bias_ptr, rest, width, pre, post, TRANSFORM, True)
            e_r = tl.where(rest == y, 0.0, _exp(z_r - m))
            s_other = tl.sum(s, 0) + tl.sum(e_r, 0)
            e_y = tl.where(valid, _exp(z_y - m), 0.0)
            total = s_other + e_y
            log_total = tl.log(total)
            tl.store(lse_ptr + row, m + log_total)
            tl.store(logp_ptr + row, (z_y - m) - log_total)  # not z_y - lse: at logits of 1e4 an ulp of lse is 1e-3 nat
            if out_ptr is not None:
                tl.store(scale_ptr + row, -row_factor / total)
                # Another thread may have stored the 0 that the target's value replaces, or not have read z_r yet.
                tl.debug_barrier()
                at_target = -s_other
                if TRANSFORM == _SOFTCAP:
                    at_target *= slope_y
                tl.store(out_ptr + y, at_target.to(out_ptr.dtype.element_ty), mask=valid)
                u_r = e_r * slope_r
                tl.store(out_ptr + rest, u_r.to(out_ptr.dtype.element_ty), mask=(rest < width) & (rest != y))
            if ENTROPY:
                ez_y = tl.where(e_y > 0, e_y * (z_y - m), 0.0)
                ez_r = tl.sum(tl.where(e_r > 0, e_r * (z_r - m), 0.0), 0)
                tl.store(entropy_ptr + row, log_total - (tl.sum(ez, 0) + ez_r + ez_y) / total)
            if TOP1:
                # Comparisons skip NaN; a sum does not.
                beaten = tl.maximum(beaten, tl.max(_preferred(z_r, rest, z_y, y), 0))
                tl.store(top1_ptr + row, tl.where(valid & (beaten == 0) & (total == total), 1.0, 0.0))
            if MEAN:
                tl.store(mean_logit_ptr + row, (tl.sum(sz, 0) + tl.sum(tl.where(rest < width, z_r, 0.0), 0)) / width)
            if P2:
                p2_sum = tl.sum(p2, 0) + tl.sum(e_r * e_r, 0) + e_y * e_y
                tl.store(log_sum_p2_ptr + row, tl.log(p2_sum) - 2.0 * log_total)

    @triton.jit(do_not_specialize=["logits_stride", "col_offset", "ignore_index"])
    def _fold_kernel(
        logits_ptr,  # [rows, width]
        logits_stride,  # in units of LOGITS_UNIT elements
        targets_ptr,  # [rows] int64
        bias_ptr,  # [width] or None
        maximum_ptr,  # [rows] fp32: the three parts of FoldState
        sum_exp_ptr,
        target_ptr,
        width,
        col_offset,
        ignore_index,
        pre,
        post,
        limit,
        TRANSFORM: tl.constexpr,
        LOGITS_UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        if target != ignore_index:
            row_ptr = logits_ptr + row * logits_stride * LOGITS_UNIT
            column = target - col_offset
            inside = (column >= 0) & (column < width)
            y = tl.where(inside, column, -1).to(tl.int32)
            x_y = tl.load(row_ptr + y, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                x_y += tl.load(bias_ptr + y, mask=inside, other=0.0).to(tl.float32)
            z_y, _ = _transform(x_y, pre, post, TRANSFORM)
            tl.store(target_ptr + row, z_y, mask=inside)

            m = tl.maximum(tl.load(maximum_ptr + row), _LOWEST)
            s_before = tl.load(sum_exp_ptr + row)
            m_before = m
            s = tl.zeros([BLOCK // 4], tl.float32)
            whole = width // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                m, s, _, _, _, _ = _sweep(
                    row_ptr, bias_ptr, None, start, width, -1, 0.0, pre, post, limit, 0.0, m, s, 0.0, 0.0, 0.0, 0.0,
                    TRANSFORM, False, False, False, False, False, BLOCK,
                )
            if whole < width:
                m, s, _, _, _, _ = _sweep(
                    row_ptr, bias_ptr, None, whole, width, -1, 0.0, pre, post, limit, 0.0, m, s, 0.0, 0.0, 0.0, 0.0,
                    TRANSFORM, False, False, False, False, True, BLOCK,
                )
            tl.store(maximum_ptr + row, m)
            tl.store(sum_exp_ptr + row, s_before * _exp(m_before - m) + tl.sum(s, 0))

    @triton.jit
    def _given_lse(
        row_ptr, bias_ptr, out_ptr, start, width, y, lse, gl, gh, constant, pre, post,
        ENTROPY: tl.constexpr, TRANSFORM: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    ):
        c = start + tl.arange(0, BLOCK)
        z, slope = _load_z(row_ptr, bias_ptr, c, width, pre, post, TRANSFORM, MASKED)
        log_p = z - lse
        p = _exp(log_p)
        if ENTROPY:
            u = tl.where(p != 0, -p * (gh * log_p + constant), 0.0)  # log p may be -inf
            u = tl.where(c == y, gl + u, u)  # fewer registers than y - start, for want of which sm_80 spills
        else:
            u = tl.where(tl.arange(0, BLOCK) == y - start, 1.0 - p, -p)
        if TRANSFORM == _SOFTCAP:
            u *= slope
        _store(out_ptr, c, width, u, MASKED)

    @triton.jit(do_not_specialize=["logits_stride", "out_stride", "col_offset", "ignore_index"])
    def _given_lse_kernel(
        logits_ptr,  # [rows, width]
        logits_stride,  # in units of LOGITS_UNIT elements
        targets_ptr,  # [rows] int64
        bias_ptr,  # [width] or None
        lse_ptr,  # [rows] fp32, as the three that follow
        entropy_ptr,  # None, as the two that follow: of the log-prob alone
        grad_logps_ptr,
        grad_entropy_ptr,
        out_ptr,  # [rows, width]
        out_stride,  # in units of OUT_UNIT elements
        width,
        col_offset,
        ignore_index,
        pre,
        post,
        TRANSFORM: tl.constexpr,
        LOGITS_UNIT: tl.constexpr,
        OUT_UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        ENTROPY: tl.constexpr = entropy_ptr is not None
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        out_ptr += row * out_stride * OUT_UNIT
        if target == ignore_index:
            _store_zeros(out_ptr, width, BLOCK)
        else:
            row_ptr = logits_ptr + row * logits_stride * LOGITS_UNIT
            column = target - col_offset
            y = tl.where((column >= 0) & (column < width), column, -1).to(tl.int32)
            lse = tl.load(lse_ptr + row)
            gl, gh, constant = 1.0, 0.0, 1.0
            if ENTROPY:
                gl, gh = tl.load(grad_logps_ptr + row), tl.load(grad_entropy_ptr + row)
                constant = gl + gh * tl.load(entropy_ptr + row)
            whole = width // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                _given_lse(
                    row_ptr, bias_ptr, out_ptr, start, width, y, lse, gl, gh, constant, pre, post,
                    ENTROPY, TRANSFORM, False, BLOCK,
                )
            if whole < width:
                _given_lse(
                    row_ptr, bias_ptr, out_ptr, whole, width, y, lse, gl, gh, constant, pre, post,
                    ENTROPY, TRANSFORM, True, BLOCK,
                )

    @triton.jit
    def _scale_row_block(x_ptr, out_ptr, w, start, width, MASKED: tl.constexpr, BLOCK: tl.constexpr):
        c = start + tl.arange(0, BLOCK)
        if MASKED:
            x = tl.load(x_ptr + c, mask=c < width, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + c).to(tl.float32)
        _store(out_ptr, c, width, x * w, MASKED)

    @triton.jit(do_not_specialize=["x_stride", "out_stride"])
    def _scale_rows_kernel(
        x_ptr,  # [rows, width]
        x_stride,  # in units of X_UNIT elements
        w_ptr,  # [rows] fp32
        out_ptr,  # [rows, width]
        out_stride,  # in units of OUT_UNIT elements
        width,
        X_UNIT: tl.constexpr,
        OUT_UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        w = tl.load(w_ptr + row)
        x_ptr += row * x_stride * X_UNIT
        out_ptr += row * out_stride * OUT_UNIT
        if w == 0:
            _store_zeros(out_ptr, width, BLOCK)
        else:
            whole = width // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                _scale_row_block(x_ptr, out_ptr, w, start, width, False, BLOCK)
            if whole < width:
                _scale_row_block(x_ptr, out_ptr, w, whole, width, True, BLOCK)

    @triton.jit(do_not_specialize=["size"])
    def _scale_unless_one_kernel(
        x_ptr,  # [size]
        factor_ptr,  # one float
        size,
        BLOCK: tl.constexpr,
    ):
        factor = tl.load(factor_ptr).to(tl.float32)
        if factor != 1:
            programs = tl.num_programs(0)
            whole = size // BLOCK
            c = tl.arange(0, BLOCK)
            for block in range(tl.program_id(0), whole, programs):
                ptr = x_ptr + tl.cast(block, tl.int64) * BLOCK
                _store(ptr, c, BLOCK, tl.load(ptr + c).to(tl.float32) * factor, False)
            if tl.program_id(0) == programs - 1:
                ptr = x_ptr + tl.cast(whole, tl.int64) * BLOCK
                rest = tl.cast(size - whole * BLOCK, tl.int32)
                x = tl.load(ptr + c, mask=c < rest, other=0.0).to(tl.float32)
                _store(ptr, c, rest, x * factor, True)

    # ---- what tail.py asks of residuals

    @triton.jit(do_not_specialize=["stash_stride", "rows"])
    def _peaks_kernel(
        stash_ptr,  # [rows, width]
        stash_stride,  # in units of STASH_UNIT elements
        scale_ptr,  # [rows] fp32
        peak_ptr,  # [width] fp32, as the two that follow
        total_ptr,
        squares_ptr,
        rows,
        width,
        STASH_UNIT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,  # of a tile of ROWS rows
    ):
        COLS: tl.constexpr = BLOCK // ROWS
        c = tl.program_id(0) * COLS + tl.arange(0, COLS)
        peak, total, squares = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
        for first in range(0, rows, ROWS):
            r = first + tl.arange(0, ROWS)
            scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0)
            counts = (scale != 0) & (tl.abs(scale) < float("inf"))  # not NaN either
            at = (r.to(tl.int64) * stash_stride * STASH_UNIT)[:, None] + c[None, :]
            s = tl.load(stash_ptr + at, mask=counts[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
            u = tl.where(counts[:, None], s * scale[:, None], 0.0)
            peak = tl.maximum(peak, tl.max(tl.abs(u), 0))
            total += tl.sum(u, 0)
            squares += tl.sum(u * u, 0)
        tl.store(peak_ptr + c, peak, mask=c < width)
        tl.store(total_ptr + c, total, mask=c < width)
        tl.store(squares_ptr + c, squares, mask=c < width)

    @triton.jit
    def _rest_block(row_ptr, others_ptr, start, width, MASKED: tl.constexpr, BLOCK: tl.constexpr):
        c = start + tl.arange(0, BLOCK)
        inside = c < width
        others = tl.load(others_ptr + c, mask=inside, other=0)
        s = tl.load(row_ptr + c, mask=inside, other=0.0) if MASKED else tl.load(row_ptr + c)
        return tl.sum(tl.where(others != 0, s.to(tl.float32), 0.0), 0)

    @triton.jit(do_not_specialize=["stash_stride", "active_stride", "count"])
    def _split_kernel(
        stash_ptr,  # [rows, width]
        stash_stride,  # in units of STASH_UNIT elements
        others_ptr,  # [width] int8: 1 where the column is not active
        columns_ptr,  # [count] int32, the active ones
        active_ptr,  # [rows, count]
        active_stride,
        rest_ptr,  # [rows] fp32, added to
        width,
        count,
        STASH_UNIT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        row_ptr = stash_ptr + row * stash_stride * STASH_UNIT
        active_ptr += row * active_stride
        rest = tl.load(rest_ptr + row)
        whole = width // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            rest += _rest_block(row_ptr, others_ptr, start, width, False, BLOCK)
        if whole < width:
            rest += _rest_block(row_ptr, others_ptr, whole, width, True, BLOCK)
        tl.store(rest_ptr + row, rest)
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            columns = tl.load(columns_ptr + k, mask=k < count, other=0)
            tl.store(active_ptr + k, tl.load(row_ptr + columns, mask=k < count, other=0.0), mask=k < count)

    @triton.jit  # strides too: multiples of 16 are known, and so 16 bytes move at a time
    def _add_rows_kernel(
        total_ptr,  # [rows, width] fp32
        total_stride,
        part_ptr,  # [count, width]
        part_stride,
        columns_ptr,  # [count] int32, each once
        width,
        BLOCK: tl.constexpr,
    ):
        k = tl.program_id(0).to(tl.int64)
        total_ptr += tl.load(columns_ptr + k).to(tl.int64) * total_stride
        part_ptr += k * part_stride
        for start in range(0, width, BLOCK):
            c = start + tl.arange(0, BLOCK)
            sum = tl.load(total_ptr + c, mask=c < width, other=0.0)
            part = tl.load(part_ptr + c, mask=c < width, other=0.0).to(tl.float32)
            tl.store(total_ptr + c, sum + part, mask=c < width)


def _launch(kernel: Any, programs: int, device: torch.device, args: tuple, config: Config, **constants: int) -> None:
    # Triton launches on the current device's current stream, which is the caller's only if the device is.
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](*args, **constants, BLOCK=config.block, num_warps=config.num_warps)


def _transform_args(transform: Transform) -> tuple[int, float, float]:
    """(TRANSFORM, pre, post) of `_transform`."""
    if transform.softcap is not None:
        return _SOFTCAP.value, transform.logit_scale / transform.softcap, transform.softcap / transform.temperature
    return int(transform.row_factor != 1.0), transform.row_factor, 1.0


def _alignment(*tiles: Tensor | None) -> tuple[Config, list[int]]:
    """The configuration, and what each tile's row stride is sure to be a multiple of: the elements in 16 bytes if every
    row of every tile starts on a 16-byte boundary, else 1."""
    units = [1 if tile is None else 16 // tile.element_size() for tile in tiles]
    for tile, unit in zip(tiles, units, strict=True):
        if tile is not None and (tile.stride(0) % unit or tile.data_ptr() % 16):
            return UNALIGNED, [1] * len(tiles)
    return ALIGNED, units


# 30 nats above m is far from what fp32 sums and bf16 or fp32 stores hold (512k e^30 = 6e18), and rare enough to make
# rescaling free: 25 nats were seen between a first block and its row on logits of standard deviation 12.
_LIMIT = 30.0


def _limit_and_lift(out: Tensor | None, width: int) -> tuple[float, float]:
    """How far a block's maximum may lie above m, and how far above it m is put when it does.

    fp16 holds nothing above 65504, and s_other <= width * exp(maximum - m) is the largest thing stored: in wide rows m
    is lifted above the maximum, which leaves it 3 nats to grow before the next rescaling.
    """
    if out is None or out.dtype != torch.float16:
        return _LIMIT, 0.0
    limit = math.log(60000.0 / max(width, 1))
    return min(limit, 3.0), max(3.0 - limit, 0.0)


def _operands(tile: Tile, out: Tensor | None) -> tuple[Config, tuple, tuple, tuple[float, float], dict[str, int], int]:
    """What every sweep is launched with: (configuration, (logits, stride, targets, bias), (out, stride), (pre, post),
    TRANSFORM and LOGITS_UNIT, OUT_UNIT)."""
    kind, pre, post = _transform_args(tile.transform)
    config, (unit, out_unit) = _alignment(tile.logits, out)
    of_logits = (tile.logits, tile.logits.stride(0) // unit, tile.targets, tile.bias)
    of_out = (out, 0 if out is None else out.stride(0) // out_unit)
    return config, of_logits, of_out, (pre, post), {"TRANSFORM": kind, "LOGITS_UNIT": unit}, out_unit


def residual(tile: Tile, out: Tensor | None, extras: tuple[str, ...] = ()) -> RowStats:
    """The contract (contract.py). A narrower `out` may also lie over its own rows: logits.view(bf16)[:, :cols]."""
    tile = checks.tile(tile, out)
    (rows, width), device = tile.logits.shape, tile.logits.device
    stats = checks.stats(tile.logits, out is not None, extras)
    if rows:
        config, of_logits, of_out, maths, constants, out_unit = _operands(tile, out)
        bounds = (tile.transform.row_factor, *_limit_and_lift(out, width))
        args = (*of_logits, *of_out, *stats, width, tile.ignore_index, *maths, *bounds)
        _launch(_residual_kernel, rows, device, args, config, **constants, OUT_UNIT=out_unit)
    return stats


def fold(tile: Tile, state: FoldState) -> None:
    tile = checks.tile(tile)
    (rows, width), device = tile.logits.shape, tile.logits.device
    vectors = checks.state(state, tile.logits)
    if rows:
        config, of_logits, _, maths, constants, _ = _operands(tile, None)
        args = (*of_logits, *vectors, width, tile.col_offset, tile.ignore_index, *maths, _LIMIT)
        _launch(_fold_kernel, rows, device, args, config, **constants)


def residual_given_lse(tile: Tile, lse: Tensor, out: Tensor) -> None:
    _given_lse_sweep(tile, out, lse=lse)


def gradient_given_lse(
    tile: Tile, lse: Tensor, entropy: Tensor, grad_logps: Tensor, grad_entropy: Tensor, out: Tensor
) -> None:
    _given_lse_sweep(tile, out, lse=lse, entropy=entropy, grad_logps=grad_logps, grad_entropy=grad_entropy)


def _given_lse_sweep(tile: Tile, out: Tensor, **given: Tensor) -> None:
    tile = checks.tile(tile, out, narrower_in_place=False)
    (rows, width), device = tile.logits.shape, tile.logits.device
    vectors = [checks.vector(name, x, rows, tile.logits) for name, x in given.items()]
    if rows:
        config, of_logits, of_out, maths, constants, out_unit = _operands(tile, out)
        of_given = (*vectors, *(None,) * (4 - len(vectors)))
        args = (*of_logits, *of_given, *of_out, width, tile.col_offset, tile.ignore_index, *maths)
        _launch(_given_lse_kernel, rows, device, args, config, **constants, OUT_UNIT=out_unit)


def scale_rows_(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """out = x * w[:, None], computed in fp32 and rounded once; in place where `out` is None.

    x: [rows, width], w: [rows] fp32. Where w is 0 the row becomes exactly 0 and x is not read: a row that does not
    count brings in no NaN or inf.
    """
    out = x if out is None else out
    checks.matrix("x", x, x)
    checks.matrix("out", out, x)
    rows, width = x.shape
    w = checks.vector("w", w, rows, x)
    if rows:
        config, (x_unit, out_unit) = _alignment(x, out)
        _launch(
            _scale_rows_kernel, rows, x.device,
            (x, x.stride(0) // x_unit, w, out, out.stride(0) // out_unit, width),
            config, X_UNIT=x_unit, OUT_UNIT=out_unit,
        )
    return out


def scale_unless_one_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor *= factor, one float on the same device. If it is 1 nothing else is read or written, and the host does not
    wait to know."""
    if factor.numel() != 1 or factor.device != tensor.device:
        raise ValueError(f"factor is {tuple(factor.shape)} on {factor.device}; it takes one float on {tensor.device}")
    if not tensor.is_contiguous() or tensor.dtype not in DTYPES:
        return tensor.mul_(factor.reshape(()))
    if tensor.numel():
        # As many programs as fit at once (16 of 128 threads an SM): if the factor is 1 they are gone in microseconds.
        programs = min(triton.cdiv(tensor.numel(), ALIGNED.block), 16 * _multiprocessors(tensor.device))
        _launch(_scale_unless_one_kernel, programs, tensor.device, (tensor, factor, tensor.numel()), ALIGNED)
    return tensor


PEAKS_ROWS = 16  # of a tile: 128 columns of 16 rows are 256 bytes of bf16 a row, and 16 numbers a thread


def peaks(stash: Tensor, scale: Tensor, peak: Tensor, total: Tensor, squares: Tensor) -> None:
    """Largest |U|, sum of U and sum of U^2 in each column of U = scale * stash; see tail.find."""
    checks.matrix("stash", stash, stash)
    rows, width = stash.shape
    scale = checks.vector("scale", scale, rows, stash)
    config, (unit,) = _alignment(stash)
    args = (stash, stash.stride(0) // unit, scale, peak, total, squares, rows, width)
    programs = triton.cdiv(width, config.block // PEAKS_ROWS)
    _launch(_peaks_kernel, programs, stash.device, args, config, STASH_UNIT=unit, ROWS=PEAKS_ROWS)


def split(stash: Tensor, columns: Tensor, active: Tensor, rest: Tensor) -> None:
    """active = stash[:, columns], and to rest is added what the other columns of each row sum up to."""
    checks.matrix("stash", stash, stash)
    (rows, width), count = stash.shape, columns.shape[0]
    others = torch.ones(width, dtype=torch.int8, device=stash.device).index_fill_(0, columns.long(), 0)
    config, (unit,) = _alignment(stash)
    args = (stash, stash.stride(0) // unit, others, columns, active, active.stride(0), rest, width, count)
    _launch(_split_kernel, rows, stash.device, args, config, STASH_UNIT=unit)


def add_rows(total: Tensor, part: Tensor, columns: Tensor) -> None:
    """total[columns] += part, in fp32; each row of total at most once, so that no atomics are needed."""
    checks.matrix("part", part, part)
    args = (total, total.stride(0), part, part.stride(0), columns, part.shape[1])
    if len(columns):
        _launch(_add_rows_kernel, len(columns), part.device, args, ALIGNED)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
