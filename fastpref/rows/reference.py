"""The row contract in plain torch: any device, any floating dtype, fp64 included. To be read and compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import FoldState, RowStats, Tile, stats_dtype


def available(device: torch.device | None = None) -> tuple[bool, str]:
    return True, "torch, any device"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _transformed(tile: Tile) -> tuple[Tensor, Tensor | None]:
    """z, and the part of dz/dlogits that differs between columns (None where it is 1)."""
    logits, transform, bias = tile.logits, tile.transform, tile.bias
    z = logits.to(stats_dtype(logits.dtype), copy=True)
    if bias is not None:
        z += bias.to(z.dtype)
    if transform.logit_scale != 1.0:
        z *= transform.logit_scale
    slope = None
    if transform.softcap is not None:
        z = torch.tanh_(z / transform.softcap)
        slope = 1 - z * z
        z *= transform.softcap
    if transform.temperature != 1.0:
        z /= transform.temperature
    return z, slope


def _target_columns(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its target's column in the tile, [rows, 1], whether it is there, and whether the row is ignored."""
    column, cols = tile.targets - tile.col_offset, tile.logits.shape[1]
    return column.clamp(0, cols - 1)[:, None], (column >= 0) & (column < cols), tile.targets == tile.ignore_index


def residual(tile: Tile, out: Tensor | None, extras: tuple[str, ...] = ()) -> RowStats:
    column, valid, ignored = _target_columns(tile)
    z, slope = _transformed(tile)
    found = {"mean_logit": z.mean(1)} if "mean_logit" in extras else {}
    # From here on relative to the row's maximum: at logits of 1e4 an ulp of lse is 1e-3, in every probability alike.
    highest = z.amax(1)
    highest = torch.where(highest.isfinite(), highest, 0.0)
    z -= highest[:, None]
    lse = torch.logsumexp(z, dim=1)
    z_target = z.gather(1, column)[:, 0]
    logp = torch.where(valid, z_target - lse, torch.nan)
    probs = torch.exp(z - lse[:, None])
    if "entropy" in extras:
        found["entropy"] = -torch.where(probs > 0, probs * (z - lse[:, None]), 0.0 * probs).sum(1)
    if "top1" in extras:
        found["top1"] = ((z.argmax(1) == tile.targets) & (lse < torch.inf)).to(lse.dtype)
    if "log_sum_p2" in extras:
        found["log_sum_p2"] = torch.logsumexp(2 * (z - lse[:, None]), dim=1)
    scale = None
    if out is not None:
        u = probs.neg_().scatter_add_(1, column, valid[:, None].to(probs.dtype))
        if slope is not None:
            u *= slope
        out.copy_(u.masked_fill_(ignored[:, None], 0.0))
        scale = torch.full_like(lse, tile.transform.row_factor).masked_fill_(ignored, 0.0)
    zeroed = {name: value.masked_fill_(ignored, 0.0) for name, value in found.items()}
    return RowStats(logp.masked_fill_(ignored, 0.0), (lse + highest).masked_fill_(ignored, 0.0), scale, **zeroed)


def fold(tile: Tile, state: FoldState) -> None:
    column, inside, ignored = _target_columns(tile)
    z, _ = _transformed(tile)
    z.masked_fill_(ignored[:, None], 0.0)
    state.target.copy_(torch.where(inside, z.gather(1, column)[:, 0], state.target))
    lse = torch.logsumexp(z, dim=1)
    before = state.maximum + state.sum_exp.log()
    # With sum_exp = 1 the pair (maximum, sum_exp) is just the running lse.
    state.maximum.copy_(torch.logaddexp(before, lse))
    state.sum_exp.fill_(1.0)


def residual_given_lse(tile: Tile, lse: Tensor, out: Tensor) -> None:
    column, inside, ignored = _target_columns(tile)
    z, slope = _transformed(tile)
    u = torch.exp(z - lse[:, None]).neg_()
    u.scatter_add_(1, column, inside[:, None].to(u.dtype))
    if slope is not None:
        u *= slope
    out.copy_(u.masked_fill_(ignored[:, None], 0.0))


def gradient_given_lse(
    tile: Tile, lse: Tensor, entropy: Tensor, grad_logps: Tensor, grad_entropy: Tensor, out: Tensor
) -> None:
    column, inside, ignored = _target_columns(tile)
    z, slope = _transformed(tile)
    log_p = z - lse[:, None]
    probs = torch.exp(log_p)
    grad = probs * (grad_logps[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None]))
    grad = torch.where(probs == 0, 0.0, grad).neg_()  # log p is -inf there
    grad.scatter_add_(1, column, torch.where(inside, grad_logps, 0.0)[:, None])
    if slope is not None:
        grad *= slope
    out.copy_(grad.masked_fill_(ignored[:, None], 0.0))


def peaks(stash: Tensor, scale: Tensor, peak: Tensor, total: Tensor, squares: Tensor) -> None:
    counted = (scale.isfinite() & (scale != 0))[:, None]
    for start in range(0, stash.shape[1], 4096):
        cols = slice(start, start + 4096)
        u = torch.where(counted, stash[:, cols].to(scale.dtype) * scale[:, None], 0.0)
        peak[cols], total[cols], squares[cols] = u.abs().amax(0), u.sum(0), u.square().sum(0)


def split(stash: Tensor, columns: Tensor, active: Tensor, rest: Tensor) -> None:
    torch.index_select(stash, 1, columns, out=active)
    others = torch.ones(stash.shape[1], dtype=rest.dtype, device=stash.device).index_fill_(0, columns.long(), 0.0)
    for some, sums in zip(stash.split(64), rest.split(64)):
        sums += torch.where(others > 0, some.to(rest.dtype), 0.0).sum(1)


def add_rows(total: Tensor, part: Tensor, columns: Tensor) -> None:
    total.index_add_(0, columns, part.to(total.dtype))
