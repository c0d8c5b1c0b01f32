"""What torch sees of the head: custom ops, their shapes for torch.compile, and autograd over them.

No op carries a Python object: a loss travels as its name and options in one string (`Loss.spec`), and what the call
asks for in another (`Options.spec`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from . import losses, rows
from .engine import (
    Inputs,
    Options,
    Pass,
    Projection,
    Scored,
    check_targets,
    debugging,
    fp32_gemms,
    problem_of,
    step,
)
from .losses import Loss
from .plan import Plan
from .plan import plan as plan_of


def _present(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _preference_step(
    loss: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Sequence[int] | None,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    desirable: Tensor | None,
    kl: Tensor | None,
    token_weights: Tensor | None,
    totals: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Result`; what there is none of is empty."""
    reference = ref_logps, ref_hidden, ref_weight, ref_bias
    inputs = Inputs(targets, cu_seqlens, *reference, desirable, kl, token_weights, totals)
    return _step(losses.from_spec(loss), hidden, weight, bias, inputs, Options.of(spec))


def _step(
    loss: Loss, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, options: Options,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = step(loss, hidden, weight, bias, inputs, options, accumulate_into)
    if found.ref_logps is inputs.ref_logps:  # an op may not return its input
        found = found._replace(ref_logps=None)
    value, logps, ref, lengths, sums, tail, *grads = found
    ref, dx, dw, db = (_present(x, logps) for x in (ref, *grads))
    return value, logps, ref, lengths, sums, tail, dx, dw, db


def _preference_step_fake(
    loss, hidden, weight, bias, targets, cu_seqlens, ref_logps, ref_hidden, ref_weight, ref_bias, desirable, kl,
    token_weights, totals, spec,
):
    options = Options.of(spec)
    needs, stats = options.needs, rows.stats_dtype(options.compute_dtype)
    sequences = targets.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    logps = hidden.new_empty(sequences, dtype=stats)
    return (
        logps.new_empty(()),
        logps,
        logps.new_empty(sequences if ref_hidden is not None else 0),
        logps.new_empty(sequences, dtype=torch.int64),
        logps.new_empty(len(options.extras.split()), sequences),
        logps.new_empty(3),
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else logps.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else logps.new_empty(0),
        torch.empty_like(bias) if needs[2] else logps.new_empty(0),
    )


# Padded, the counts are read on the host: a CUDA graph cannot hold that, and torch.compile has to know.
for _name, _tags in (("preference_step", ()), ("padded_preference_step", (torch.Tag.cudagraph_unsafe,))):
    library.custom_op(f"fastpref::{_name}", _preference_step, mutates_args=(), tags=_tags).register_fake(
        _preference_step_fake
    )


def _late_plan(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, options: Options) -> Plan:
    """Of a call whose scalars arrive in backward: one sequence of compact rows."""
    problem = problem_of((targets.shape[0],), hidden, weight, index, "batch", options, late=True)
    return plan_of(problem, options.memory_budget)


def _late_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, index: Tensor | None, options: Options,
    plan: Plan, stash: Tensor | None = None,
) -> Pass:
    scored = Scored(hidden, index, targets, (targets.shape[0],), targets, None)
    return Pass(scored, Projection.of(weight, bias, options), options, plan, stash)


@library.custom_op("fastpref::token_stats", mutates_args=())
def _token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropy, top1, mean_logit, log_sum_p2, lse, scale, kept), [N] each; an extra not asked for is empty.

    kept: the stash, or with a frozen head dX before its row scale.
    """
    options = Options.of(spec)
    check_targets(targets, weight.shape[0], options.ignore_index)
    plan = _late_plan(hidden, weight, targets, index, options)
    run = _late_pass(hidden, weight, bias, targets, index, options, plan)
    kept = run.stash
    if plan.scheme == "frozen":
        dx, _, _ = run.gradients(weight, bias, options.needs, late=True)
        assert dx is not None
        run.frozen(dx)
        kept = dx.grad
    elif plan.scheme == "forward":
        run.forward_only()
    else:
        run.forward(plan.problem.whole, run.stash)
    entropy, top1, mean_logit, log_sum_p2 = (_present(run.extras.get(name), run.logps) for name in rows.EXTRAS)
    return run.logps, entropy, top1, mean_logit, log_sum_p2, run.lse, run.scale, kept


@_token_stats_op.register_fake
def _(hidden, weight, bias, targets, index, spec):
    options = Options.of(spec)
    plan = _late_plan(hidden, weight, targets, index, options)
    stats = hidden.new_empty(targets.shape, dtype=rows.stats_dtype(options.compute_dtype))
    if plan.scheme == "frozen":
        wide = fp32_gemms(hidden.device) and options.compute_dtype.itemsize < 4
        kept = torch.empty_like(hidden, memory_format=torch.contiguous_format, dtype=torch.float32 if wide else None)
    else:
        kept = hidden.new_empty(plan.stash_rows, weight.shape[0], dtype=options.compute_dtype)
    asked = (torch.empty_like(stats) if name in options.extras.split() else stats.new_empty(0) for name in rows.EXTRAS)
    return stats, *asked, torch.empty_like(stats), torch.empty_like(stats), kept


@library.custom_op("fastpref::token_stats_backward", mutates_args=())
def _token_stats_backward(
    grad: Tensor,
    grad_entropy: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    lse: Tensor,
    scale: Tensor,
    kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    index: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) for dL/dlogps = grad, [N], and dL/dentropy; what is not needed is empty."""
    options = Options.of(spec)
    plan = _late_plan(hidden, weight, targets, index, options)
    ga = grad.to(lse.dtype)
    gh = None if grad_entropy is None else grad_entropy.to(lse.dtype)
    frozen = plan.scheme == "frozen"
    if frozen and gh is None:
        w = ga * scale
        if index is not None:
            w = w.new_zeros(hidden.shape[0]).index_copy_(0, index, w)
        return torch.mul(kept, w[:, None], out=torch.empty_like(hidden)), grad.new_empty(0), grad.new_empty(0)
    run = _late_pass(hidden, weight, bias, targets, index, options, plan, None if frozen else kept)
    run.logps, run.lse, run.scale, run.extras = logps, lse, scale, {"entropy": entropy}
    grads = run.gradients(weight, bias, options.needs)
    if frozen:
        assert gh is not None and grads.hidden is not None
        run.frozen_again(ga, gh, grads.hidden)
    elif plan.scheme == "groups" and gh is None:
        run.backward(plan.problem.whole, ga, grads)
    else:
        run.recompute(ga, grads, gh)
    dx, dw, db = (_present(x, grad) for x in grads.finish(bias))
    return dx, dw, db


@_token_stats_backward.register_fake
def _(grad, grad_entropy, logps, entropy, lse, scale, kept, hidden, weight, bias, targets, index, spec):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else grad.new_empty(0)
        for x, need in zip((hidden, weight, bias), Options.of(spec).needs)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


class TokenStatsFunction(torch.autograd.Function):
    """Log-probs and `rows.EXTRAS`; log-probs and entropy have gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, index, options):
        *stats, lse, scale, kept = torch.ops.fastpref.token_stats(hidden, weight, bias, targets, index, options.spec)
        logps, entropy, *others = stats
        ctx.save_for_backward(logps, entropy, lse, scale, kept, hidden, weight, bias, targets, index)
        ctx.options, ctx.entropy = options, "entropy" in options.extras
        ctx.mark_non_differentiable(*(others if ctx.entropy else (entropy, *others)))
        if not torch.compiler.is_compiling():  # which knows no such method
            ctx.set_materialize_grads(False)  # None, not zeros, for an entropy that is only logged
        return tuple(stats)

    @staticmethod
    def backward(ctx, grad, grad_entropy, *_):
        logps, entropy, lse, *others = ctx.saved_tensors
        grad = torch.zeros_like(lse) if grad is None else grad
        grads = torch.ops.fastpref.token_stats_backward(
            grad, grad_entropy if ctx.entropy else None, logps, entropy, lse, *others, ctx.options.spec
        )
        dx, dw, db = (x if need else None for x, need in zip(grads, ctx.options.needs))
        return dx, dw, db, None, None, None


class PreferenceLossFunction(torch.autograd.Function):
    """The gradients are made in forward; backward multiplies them with the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, options, accumulate_into, *inputs):
        value, logps, ref_logps, lengths, sums, tail, *grads = _preference_step_of(
            loss, hidden, weight, bias, inputs, options, accumulate_into
        )
        ctx.mark_non_differentiable(logps, ref_logps, lengths, sums, tail)
        ctx.needs, ctx.others, ctx.accumulates = options.needs, len(inputs) + 3, accumulate_into is not None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        else:
            # Not as saved tensors: those stay alive while autograd takes a gradient over, and it would copy them.
            ctx.grads = [grad if need else None for grad, need in zip(grads, options.needs)]
        return value, logps, ref_logps, lengths, sums, tail

    @staticmethod
    def backward(ctx, upstream, *_):
        nothing = (None,) * ctx.others
        if torch.compiler.is_compiling():
            scaled = ((g.to(upstream.dtype) * upstream).to(g.dtype) for g in ctx.saved_tensors)
            return *(g if need else None for g, need in zip(scaled, ctx.needs)), *nothing
        if ctx.grads is None:
            raise RuntimeError("second backward through linear_preference_loss: give the first retain_graph=True")
        grads = ctx.grads
        if ctx.accumulates:
            _check_upstream(upstream)
            grads[1] = None
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grads = [None if g is None else g.clone() for g in grads]
        else:
            ctx.grads = None
        for grad in grads:
            if grad is not None:
                rows.scale_unless_one_(grad, upstream)
        return *grads, *nothing


def _preference_step_of(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: tuple,
    options: Options,
    accumulate_into: Tensor | None,
) -> tuple[Tensor, ...]:
    """Losses of ours through the custom op; directly what no op carries: a class or a buffer of the user's."""
    if loss.spec is not None and accumulate_into is None:
        ops = torch.ops.fastpref
        op = ops.padded_preference_step if inputs[1] is None else ops.preference_step
        return op(loss.spec, hidden, weight, bias, *inputs, options.spec)
    return _step(loss, hidden, weight, bias, Inputs(*inputs), options, accumulate_into)


def _check_upstream(upstream: Tensor) -> None:
    """What was added to `accumulate_into` in forward cannot be scaled any more."""
    if (upstream.device.type == "cpu" or debugging()) and upstream.item() != 1.0:
        raise RuntimeError(
            f"the gradient of the loss is {upstream.item()}; accumulate_into takes only 1: give `totals` instead of "
            "scaling the loss"
        )
