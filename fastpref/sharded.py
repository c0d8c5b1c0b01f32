"""The head with its vocabulary sharded over ranks: hidden rows travel (N * H numbers), W and dW (V * H) never do.

Rank r holds rows [start_r, end_r) of W, and the hidden rows of its own part of the batch. All rows are gathered; each
rank sweeps them over its own columns of the logits:

    (m_r, s_r) = max and sum of exp(z - m_r) over the columns of rank r          z_y on the one rank that has column y
    m = max m_r,  s = sum s_r exp(m_r - m),  lse = m + log s                     [N] numbers each are reduced
    U_r = onehot(y) - exp(z - lse)  on its own columns                           the gradient's scalar g is gathered
    dX  = sum over ranks of diag(g) U_r W_r                                      reduced to the rows' owners
    dW_r = U_r^T (diag(g) X)                                                     stays where it is

Shape suffixes: N scored rows of all ranks, n those of this one, H hidden size, V columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import rows
from .engine import HiddenGrad, Options, Pass, Projection, Scored, check_targets, problem_of
from .plan import Plan
from .plan import plan as plan_of


@dataclass(frozen=True)
class Shard:
    """Columns [start, end) of `vocab`, and the ranks that hold the others."""

    start: int
    end: int
    vocab: int
    group: dist.ProcessGroup
    replicas: tuple[dist.ProcessGroup, ...]  # over which the same columns are held again (HSDP)

    @property
    def ranks(self) -> int:
        return self.group.size()


def is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "placements")  # a DTensor, without importing it where there is none


def shard_of(weight: Any, bias: Any) -> Shard:
    """Where this rank's rows of a DTensor lie. Raises ValueError for one that is not sharded by rows over one group."""
    mesh, kinds = weight.device_mesh, [str(placement) for placement in weight.placements]
    dims = [dim for dim, placement in enumerate(weight.placements) if placement.is_shard(0)]
    others = [p for dim, p in enumerate(weight.placements) if dim not in dims]
    if len(dims) != 1 or not all(p.is_replicate() for p in others) or "_StridedShard" in kinds[dims[0]]:
        raise ValueError(f"weight is a DTensor of placements {', '.join(kinds)}; it takes one Shard(dim=0), over the "
                         "ranks that share a vocabulary, and else Replicate()")
    if bias is not None and (not is_sharded(bias) or tuple(bias.placements) != tuple(weight.placements)):
        raise ValueError("bias is not sharded like weight; a sharded head takes one that is")
    (dim,) = dims
    vocab = weight.shape[0]
    each = -(-vocab // mesh.size(dim))  # as torch.chunk and so DTensor do: the last ranks may have less, or nothing
    start = min(each * mesh.get_local_rank(dim), vocab)
    shard = Shard(start, min(start + each, vocab), vocab, mesh.get_group(dim),
                  tuple(mesh.get_group(other) for other in range(mesh.ndim) if other != dim))
    found = weight.to_local().shape[0]
    if found != shard.end - shard.start:
        raise ValueError(f"weight has {found} of {vocab} rows on this rank; it takes {shard.end - shard.start}, as "
                         "torch.chunk shards them")
    return shard


def token_logps(hidden_nH: Tensor, weight: Any, bias: Any, targets_n: Tensor, options: Options) -> Tensor:
    """[n]: log-probs of this rank's rows. Every rank of the group has to call it, and to call backward if one does."""
    check_targets(targets_n, weight.shape[0], options.ignore_index)
    shard = shard_of(weight, bias)
    local_bias = None if bias is None else bias.to_local()
    found: Tensor = _ShardedLogps.apply(hidden_nH, weight.to_local(), local_bias, targets_n, shard, options)
    return found


class _ShardedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, shard, options):
        gathering = _Gathering(targets.shape[0], shard.group, hidden.device)
        x_NH = gathering.all(hidden.to(options.compute_dtype).contiguous())
        run = _ShardPass.new(x_NH, weight, bias, gathering.all(targets), shard, options)
        logps_N = run.log_probs()
        if run.plan.scheme == "forward":
            run = None
        ctx.run, ctx.gathering, ctx.options, ctx.replicas = run, gathering, options, shard.replicas
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(weight, bias)
        return gathering.own(logps_N).clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.run is None:
            raise RuntimeError("second backward through a sharded head: give the first retain_graph=True")
        run, gathering = ctx.run, ctx.gathering
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.run = None
        g_N = gathering.all(grad.to(run.lse.dtype).contiguous())
        dx_NH, dw, db = run.backward_of(g_N, *ctx.saved_tensors, ctx.options.needs)
        for group in ctx.replicas:
            for part in (dw, db):
                if part is not None:
                    dist.all_reduce(part, group=group)
        dx = None if dx_NH is None else gathering.sum_to_owners(dx_NH).to(ctx.hidden_dtype)
        return dx, dw, db, None, None, None


def _all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    # the newer name came with torch 2.13, the older one warns since
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(out, x, group=group)


class _Gathering:
    """Rows of all ranks, one rank after another."""

    def __init__(self, count: int, group: dist.ProcessGroup, device: torch.device) -> None:
        counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
        _all_gather(counts, torch.tensor([count], device=device), group=group)
        self.counts: list[int] = counts.tolist()
        self.group, self.rank, self.most = group, group.rank(), max(self.counts)

    def all(self, x: Tensor) -> Tensor:
        """[N, ...] of the [n, ...] of each rank."""
        x = self._filled_up(x)
        out = x.new_empty(self.group.size() * self.most, *x.shape[1:])
        _all_gather(out, x, group=self.group)
        if min(self.counts) == self.most:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(self.most), self.counts)])

    def own(self, x_N: Tensor) -> Tensor:
        start = sum(self.counts[: self.rank])
        return x_N[start : start + self.counts[self.rank]]

    def sum_to_owners(self, x_N: Tensor) -> Tensor:
        """[n, ...]: the sum over ranks of this rank's rows of their [N, ...]."""
        if min(self.counts) != self.most:
            x_N = torch.cat([self._filled_up(part) for part in x_N.split(self.counts)])
        out = x_N.new_empty(self.most, *x_N.shape[1:])
        _reduce_scatter(out, x_N, group=self.group)
        return out[: self.counts[self.rank]]

    def _filled_up(self, x: Tensor) -> Tensor:
        """Collectives move the same number of rows from each rank."""
        missing = self.most - x.shape[0]
        return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


IGNORED = -1  # of targets counted from a shard's first column: those before it are negative too


class _ShardPass(Pass):
    """All rows over the columns of one rank. Until lse is known over all columns, the stash holds

        onehot(y) - exp(z - lse_r)        lse_r over the columns of this rank

    (with the softcap's derivative, as rows have it). Then a row's scale turns -exp(z - lse_r) into -exp(z - lse), and
    the one number that is of another form, at y on the rank that has it, is written again.
    """

    @classmethod
    def new(
        cls, x_NH: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, shard: Shard, options: Options
    ) -> _ShardPass:
        inside = (targets_N >= shard.start) & (targets_N < shard.end)
        columns = torch.where(inside, targets_N - shard.start, shard.vocab)  # vocab: a column that is not here
        ignored = targets_N == options.ignore_index
        columns = columns.masked_fill_(ignored, IGNORED)
        count = (targets_N.shape[0],)
        problem = problem_of(count, x_NH, weight, None, "batch", options, late=True)
        scored = Scored(x_NH, None, columns, count, columns, None)
        plan = plan_of(problem, options.memory_budget)
        found = cls(scored, Projection.of(weight, bias, options), options._replace(ignore_index=IGNORED), plan)
        found.shard, found.inside, found.ignored = shard, inside & ~ignored, ignored
        return found

    shard: Shard
    inside: Tensor  # [N] bool: the target's column is here
    ignored: Tensor  # [N] bool

    def __init__(self, scored: Scored, projection: Projection, options: Options, plan: Plan) -> None:
        super().__init__(scored, projection, options, plan)
        self.state = rows.FoldState.new(plan.problem.rows, dtype=self.lse.dtype, device=self.lse.device)
        self.product: HiddenGrad | None = None  # frozen head: U W before its row scale

    def sweep(self, logits: Tensor, mine: slice, out: Tensor | None) -> None:
        state = rows.FoldState(*(values[mine] for values in self.state))
        self.projection.kernels.fold(self.row_tile(logits, mine, 0), state)
        if out is not None:
            # 0 where all columns are -inf: exp(z - lse) then is 0
            self.lse[mine] = torch.where(state.sum_exp == 0, 0.0, _lse(state))
            self.sweep_again(logits, mine, 0, out, None)

    def log_probs(self) -> Tensor:
        """[N], and what `backward_of` needs, kept. Ranks without columns take part with nothing."""
        scheme, here = self.plan.scheme, self.shard.end > self.shard.start
        if here and scheme == "frozen":
            self.product = HiddenGrad(self.scored, self.projection.dtype, dtype=self.lse.dtype)
            for block in self.plan.groups:
                self.forward(block, self.stash)
                start, end = block.span
                self._set_targets(self.stash[: block.rows], slice(start, end), torch.zeros_like(self.lse[start:end]))
                # What is small over the columns of this rank alone is smaller still over those of all.
                self.scale[start:end] = self.projection.transform.row_factor * ~self.ignored[start:end]
                self.multiply(start, self.stash[: block.rows], None, self.product, None)
        elif here and scheme == "forward":
            self.forward_only()
        elif here:
            self.forward(self.plan.problem.whole, self.stash)
        own_lse = _lse(self.state)
        whole = self._reduced()
        logps, self.lse = rows.fold_finish(whole, self.scored.targets, IGNORED)
        self.logps = logps
        if scheme == "forward":
            return logps
        # Of the probability, on this rank: from own_lse as it was rounded for the stash, and nothing else that is.
        mass = torch.exp(own_lse - whole.maximum) / whole.sum_exp
        # What is written at y is divided by the row's scale, which therefore must not vanish. Where it is held up, the
        # row's other numbers are below the rounding of that one.
        eps = torch.finfo(self.projection.dtype).eps
        self.mass = torch.where(self.inside, mass.clamp(min=max(eps**2, 2.0**-15)), mass).masked_fill_(self.ignored, 0)
        self.at_target = -torch.expm1(logps) * self._slope(whole.target)
        if here and scheme in ("groups", "recompute"):
            kept = slice(0, min(self.plan.stash_rows, self.plan.problem.rows))
            self._set_targets(self.stash[kept], kept, (self.at_target / self.mass)[kept])
        return logps

    def _reduced(self) -> rows.FoldState:
        """The state over all ranks' columns."""
        maximum = self.state.maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.shard.group)
        sums = self.state.sum_exp * torch.exp(self.state.maximum - maximum)
        sums = torch.where(self.state.sum_exp == 0, 0.0, sums)  # of no columns, or all of them -inf
        parts = torch.stack((sums, torch.where(self.inside, self.state.target, 0.0), self.inside.to(sums.dtype)))
        dist.all_reduce(parts, group=self.shard.group)
        sums, target, seen = parts
        return rows.FoldState(maximum, sums, torch.where(seen > 0, target, torch.nan))

    def _set_targets(self, stash: Tensor, of: slice, values: Tensor) -> None:
        """stash[row, target] = value in the rows whose target's column is here."""
        column = self.scored.targets[of].clamp(0, stash.shape[1] - 1)[:, None]
        before = stash.gather(1, column)
        stash.scatter_(1, column, torch.where(self.inside[of, None], values[:, None].to(stash.dtype), before))

    def _slope(self, z: Tensor) -> Tensor | float:
        """The softcap's derivative where it gave z."""
        transform = self.projection.transform
        return 1.0 if transform.softcap is None else 1 - (z * (transform.temperature / transform.softcap)) ** 2

    def backward_of(
        self, g_N: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dX of all rows by this rank's columns, dW, db) for dL/dlogps = g."""
        if self.shard.end == self.shard.start:
            nothing = torch.zeros_like(self.scored.hidden, dtype=self.lse.dtype) if needs[0] else None
            db = None if bias is None else torch.zeros_like(bias)
            return nothing, torch.zeros_like(weight) if needs[1] else None, db
        g = g_N.masked_fill(self.ignored, 0.0)
        factor = self.projection.transform.row_factor
        if self.product is not None:  # a frozen head: rows of W beside what the stash gave
            grad = self.product.grad * (g * factor * self.mass)[:, None]
            at_target = torch.where(self.inside, g * factor * self.at_target, 0.0)
            column = self.scored.targets.clamp(0, weight.shape[0] - 1)
            for part in torch.arange(len(column), device=column.device).split(max(1, self.plan.tile_rows)):
                grad[part] += at_target[part, None] * self.projection.weight[column[part]]
            return grad, None, None
        grads = self.gradients(weight, bias, (False, *needs[1:]))
        # in fp32, for it is added up over ranks before it is rounded
        if needs[0]:
            dx = HiddenGrad(self.scored, self.projection.dtype, dtype=self.lse.dtype)
            grads = grads._replace(hidden=dx)
        self.scale = self.mass * factor
        if self.plan.scheme == "groups":
            self.backward(self.plan.problem.whole, g, grads)
        else:
            self.recompute(g, grads)
        return grads.finish(bias)


def _lse(state: rows.FoldState) -> Tensor:
    """Of the columns folded so far."""
    return state.maximum + state.sum_exp.log()
