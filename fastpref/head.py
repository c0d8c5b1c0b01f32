"""The LM head fused with log-softmax and a preference loss: the `[N, V]` logits never exist.

The public functions. Their autograd and the custom ops that torch.compile sees are in ops.py; the work is done in
engine.py, by a `Plan` (plan.py): tiles are multiplied with the head, the rows (rows/) turn logits into log-probs and
residuals, the loss (losses/) turns sequence log-probs into one scalar a sequence, and two more GEMMs make the
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import losses, rows, sharded
from .arguments import check_accumulate_into, extras_of, inputs_of, loss_of, options_of, require
from .engine import Inputs, Options, on_device, segment_sum, totals_of
from .losses import Loss, LossFunction, SequenceLogps, Totals
from .ops import PreferenceLossFunction, TokenStatsFunction

# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


class PreferenceOutput(NamedTuple):
    """What `linear_preference_loss` returns."""

    loss: Tensor  # scalar, differentiable with respect to hidden, weight and bias
    logps: Tensor  # [S] sequence log-probs, nats, fp32, detached
    ref_logps: Tensor | None  # [S] the same under the reference
    lengths: Tensor  # [S] int64, scored tokens
    metrics: dict[str, Tensor]  # see `fastpref.losses.metrics`
    extras: dict[str, Tensor]  # [S] sums over scored tokens, by name; detached


class TokenStats(NamedTuple):
    """What `linear_token_stats` returns: the shape of targets, fp32 (fp64 for fp64 inputs), 0 where ignored; None for
    what was not asked for."""

    logps: Tensor  # log pi(target), nats; differentiable
    entropy: Tensor | None = None  # H = -sum of p log p over the vocabulary, nats; differentiable
    top1: Tensor | None = None  # 1.0 where the target is the first of the largest logits (what argmax picks), else 0.0
    mean_logit: Tensor | None = None  # mean of z over the vocabulary
    log_sum_p2: Tensor | None = None  # log of the sum of p^2


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    backend: str | None = None,
    logits_dtype: str | None = None,
    tail: str = "exact",
    tail_eps: float | None = None,
) -> Tensor:
    """Token log-probs of a language-model head without its logits, differentiable:

        z = softcap(logit_scale * (hidden weight^T + bias)) / temperature,    logp_i = z_i[targets_i] - logsumexp(z_i)

    with softcap(u) = softcap * tanh(u / softcap). One GEMM forward; backward two, plus one more for the share of rows
    whose residuals did not fit the budget. With a frozen `weight` two in all.

    Args:
        hidden: [..., H] hidden states; fp32, bf16, fp16 or fp64.
        weight: [V, H] the head; the dtype of `hidden` (under autocast any: both are then used in the autocast dtype).
            Or a DTensor of it (and of `bias`), Shard(0) over ranks of which each calls this with rows of its own:
            hidden rows travel, the shards and their gradients do not. The gradient is that of the sum of the ranks'
            losses.
            Three GEMMs if the residuals of all ranks' rows fit the budget (in all, 1 / ranks of a row each), else four.
            Over further mesh dimensions Replicate(). Each rank also holds all ranks' rows, N * H, and the gradient of
            them in fp32.
        targets: [...] int64, already shifted: targets[i] is the token that hidden[i] predicts.
        bias: [V].
        ignore_index: targets of this value are not scored: they cost nothing and get 0.
        softcap, logit_scale, temperature: as in the formula (Gemma 2: softcap 30).
        memory_budget: bytes for tiles of logits and residuals (None: 2 GiB on CUDA, 256 MiB elsewhere); the residuals
            kept for backward are part of it. Sums of gradients come on top, and it is passed over where one stash takes
            fewer bytes in all than several and their sum: print `fastpref.plan(...)`.
        backend: row kernels: "reference", "native", "triton", "cuda"; None chooses.
        logits_dtype: "fp32" or the compute dtype ("bf16", "fp16"), what the first GEMM writes. None: fp32 on CUDA. On
            a CPU, which writes what it multiplies, "fp32" widens the operands, and None does so where that is faster
            (docs/precision.md). bf16 logits save about 1.5 % of a step on an H200 and cost 1e-2 nat a token (0.26 nat
            over 512 tokens) in the log-probs.
        tail: "exact", or "rank1": the gradients of vocabulary columns whose residuals |U| are below `tail_eps` in all
            rows of a block are made from a rank-one matrix that keeps their row and column sums (docs/
            below-three-gemms.md). Log-probs and loss stay exact. Where the columns' residuals are not small after all
            (near-uniform logits), or too few columns would be spared, the product is the exact one. On CUDA it follows
            the calls before with a head of this size, the first of which is exact.
        tail_eps: None: 2^-13, which on real logits costs less than rounding the gradient to bf16.

    Returns:
        The shape of `targets`, nats; fp32 (fp64 for fp64 inputs); 0 where ignored.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it takes. On CUDA a target outside [0, V) gives
            NaN in its row instead (FASTPREF_DEBUG=1 checks, and synchronises).

    The padded form synchronises once on CUDA (to pick the scored rows), unless nothing is scored selectively under
    torch.compile, where ignored rows cost as much as scored ones.
    """
    options = options_of(
        hidden, weight, targets, bias, ignore_index, softcap, logit_scale, temperature, memory_budget, backend,
        logits_dtype, tail, tail_eps,
    )
    return _token_stats(hidden, weight, bias, targets, options, pick=True).logps


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    outputs: Sequence[str] = rows.EXTRAS,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    backend: str | None = None,
    logits_dtype: str | None = None,
    tail: str = "exact",
    tail_eps: float | None = None,
) -> TokenStats:
    """Token log-probs and what else one sweep over the logits can tell, without building them. With z as in
    `linear_logps` and p = softmax(z), for each token:

        logps = z[target] - logsumexp(z)          entropy = logsumexp(z) - sum p z
        mean_logit = mean z                       log_sum_p2 = log sum p^2
        top1 = 1.0 if argmax z is the target (of equal maxima the first counts), else 0.0

    log_sum_p2 is what WPO weights pairs with (arXiv 2406.11827).

    Differentiable in logps and in entropy (dH/dz_j = -p_j (log p_j + H)). Unless an entropy gradient arrives in
    backward the GEMMs are those of `linear_logps`; if one does, four in all: every row is multiplied again. (Under
    torch.compile one always arrives where entropy is asked for, be it zeros.)

    Args:
        outputs: which of "entropy", "top1", "mean_logit" and "log_sum_p2"; the others are None and cost nothing. With
            "entropy" and autograd recording, half of the budget is left for the gradient it may get, so that fewer
            residuals are kept than by `linear_logps`: leave it out, or call under `torch.no_grad`, if it is not needed.
        The others are those of `linear_logps`.

    Returns:
        TokenStats(logps, entropy, top1, mean_logit, log_sum_p2): the shape of `targets`, 0 where ignored.

    Raises:
        As `linear_logps`. On CUDA a target outside [0, V) gives NaN in logps and 0 in top1.
    """
    options = options_of(
        hidden, weight, targets, bias, ignore_index, softcap, logit_scale, temperature, memory_budget, backend,
        logits_dtype, tail, tail_eps,
    )
    options = options._replace(extras=extras_of("outputs", outputs))
    return _token_stats(hidden, weight, bias, targets, options, pick=True)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss: str | Loss | LossFunction = "dpo",
    cu_seqlens: Sequence[int] | Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    desirable: Tensor | None = None,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    totals: Totals | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    backend: str | None = None,
    logits_dtype: str | None = None,
    accumulate_into: Tensor | None = None,
    extras: Sequence[str] = (),
    tail: str = "exact",
    tail_eps: float | None = None,
) -> PreferenceOutput:
    """A preference loss of a language-model head and its gradients, in one pass of three GEMMs (two if `weight` is
    frozen, one without gradients) and without the logits:

        logp_s = sum over the scored tokens of s of token_weight * log pi(token),    loss = f(logp_1 ... logp_S)

    Args:
        hidden: padded [S, T, H], or packed [N, H] with `cu_seqlens`. For pairwise losses the first half of the
            sequences is chosen, the second rejected, pair by pair. Rows that predict nothing may be left out.
        weight: [V, H]; bias: [V]. Or DTensors of them, as in `linear_logps`, over ranks of which each has sequences of
            its own: `totals` are of all of them; no extras, no accumulate_into.
        targets: [S, T] or [N] int64, already shifted; `ignore_index` where nothing is scored.
        loss: a name ("dpo", "rpo", ...), an object of `fastpref.losses`, or any callable `SequenceLogps -> scalar`.
        cu_seqlens: [S + 1] row offsets of the sequences of a packed input, on the host (list or CPU tensor): nothing
            synchronises. On CUDA the ignored rows of a packed input cost as much as scored ones: leave them out.
        ref_logps: [S] sequence log-probs of the reference; or ref_hidden (rows as hidden), ref_weight and ref_bias,
            from which they are computed here, without gradient.
        desirable: bool [S]; kl_logps, ref_kl_logps: [K] sequence log-probs of the mismatched pairs (KTO).
        token_weights: the shape of targets; multiplies token log-probs (1 by default).
        totals: what the means divide by, where this call is a part of a larger batch (see `Totals`).
        ignore_index, softcap, logit_scale, temperature, memory_budget, backend, logits_dtype, tail, tail_eps: as in
            `linear_logps`.
        accumulate_into: fp32 [V, H], to which the weight's gradient is added in forward (a "main grad"); autograd then
            brings none for `weight`. For an upstream gradient of 1: normalise with `totals`, not by scaling the loss.
        extras: names of `linear_token_stats` outputs to add up over the scored tokens of each sequence, each counting
            once: `token_weights` do not apply. Those that the loss needs are computed anyhow; nothing else is.

    Returns:
        PreferenceOutput: loss (scalar fp32, differentiable w.r.t. hidden, weight and bias), logps [S], ref_logps [S] or
        None, lengths [S], metrics (TRL's names, one value a pair or sequence), extras (name -> [S], detached).

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it takes. On CUDA a target outside [0, V) gives
            NaN in its sequence instead (FASTPREF_DEBUG=1 checks, and synchronises).

    Gradients are computed in forward if autograd is recording. Not differentiable twice.
    """
    loss = loss_of(loss)
    options = options_of(
        hidden, weight, targets, bias, ignore_index, softcap, logit_scale, temperature, memory_budget, backend,
        logits_dtype, tail, tail_eps,
    )
    needed = tuple(getattr(loss, "needs_extras", ()))
    options = options._replace(extras=extras_of("extras", (*extras_of("extras", extras).split(), *needed)))
    inputs = inputs_of(
        loss, hidden, targets, cu_seqlens, ref_logps, ref_hidden, ref_weight, ref_bias, desirable, kl_logps,
        ref_kl_logps, token_weights, totals, rows.stats_dtype(options.compute_dtype),
    )
    return _preference_loss(loss, hidden, weight, bias, inputs, totals, options, accumulate_into)


def _preference_loss(
    loss: Loss | LossFunction, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs,
    totals: Totals | None, options: Options, accumulate_into: Tensor | None,
) -> PreferenceOutput:
    """Of arguments that have been checked."""
    declared = isinstance(loss, Loss) and (loss.spec is not None or not torch.compiler.is_compiling())
    if sharded.is_sharded(weight):
        require(accumulate_into is None, "accumulate_into", "given", "None where weight is sharded over ranks")
        declared = False  # a rank's scalars belong to its own rows alone: autograd brings them to the others'
    check_accumulate_into(accumulate_into, weight, declared and not torch.compiler.is_compiling())
    if declared:
        if accumulate_into is not None:
            options = options._replace(needs=(options.needs[0], torch.is_grad_enabled(), options.needs[2]))
        value, logps, computed_ref, lengths, sums, tail_sums = PreferenceLossFunction.apply(
            hidden, weight, bias, loss, options, accumulate_into, *inputs
        )
        ref_logps = computed_ref if inputs.ref_hidden is not None else inputs.ref_logps
        seq = SequenceLogps(logps, lengths, Totals(1, 1, 1), ref_logps, inputs.desirable, inputs.kl)
        found = dict(zip(options.extras.split(), sums))
    else:
        seq, value, found = _free_loss(loss, hidden, weight, bias, inputs, totals, options)
    metrics = losses.metrics(loss, seq)
    if declared and options.tail_eps is not None:
        left_out, squares, active = tail_sums.unbind()
        metrics["tail/error"] = (left_out / squares.clamp(min=1e-30)).sqrt()
        metrics["tail/active"] = active / seq.lengths.sum().clamp(min=1)
    return PreferenceOutput(value, seq.logps, seq.ref_logps, seq.lengths.long(), metrics, found)


def _free_loss(
    loss: LossFunction, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, totals: Totals | None,
    options: Options,
) -> tuple[SequenceLogps, Tensor, dict[str, Tensor]]:
    """A callable that says nothing of itself: ordinary autograd over the whole batch, between the log-prob ops."""
    stats, targets, token_weights = rows.stats_dtype(options.compute_dtype), inputs.targets, inputs.token_weights
    offsets, ref_logps = inputs.cu_seqlens, inputs.ref_logps
    sizes = None if offsets is None else tuple(b - a for a, b in zip(offsets, offsets[1:]))

    def per_sequence(values: Tensor) -> Tensor:
        if sizes is None:
            return values.sum(1, dtype=rows.exact_dtype(values.device))
        return segment_sum(values, on_device(sizes, values.device))

    def sequence_logps(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        found = _token_stats(hidden, weight, bias, targets, options, pick=sizes is None)
        logps = found.logps if token_weights is None else found.logps * token_weights
        extras = {name: getattr(found, name).detach() for name in options.extras.split()}
        unweighted = per_sequence(found.logps.detach()).to(stats) if extras and token_weights is not None else None
        return per_sequence(logps).to(stats), {k: per_sequence(x).to(stats) for k, x in extras.items()}, unweighted

    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        ref_options = options._replace(needs=(False, False, False), extras="")
        ref_logps, *_ = sequence_logps(inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, ref_options)
    lengths = per_sequence(targets != options.ignore_index).to(stats)
    logps, extras, unweighted = sequence_logps(hidden, weight, bias, options)
    totals = totals_of(lengths) if totals is None else totals
    seq = SequenceLogps(logps, lengths, totals, ref_logps, inputs.desirable, inputs.kl, extras, unweighted)
    value = losses.evaluate(loss, seq)
    return replace(seq, logps=logps.detach()), value, extras


def _token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, *, pick: bool
) -> TokenStats:
    """In the shape of targets. pick: only scored rows enter the GEMM, at a synchronisation on CUDA."""
    flat_hidden, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    index = None
    if (pick or flat.device.type == "cpu") and not torch.compiler.is_compiling():
        scored = flat != options.ignore_index
        count = int(scored.sum())
        if count < flat.shape[0]:
            index = torch.nonzero_static(scored, size=count)[:, 0]
            flat = flat[index]

    def placed(values: Tensor) -> Tensor:
        if index is not None:
            values = values.new_zeros(targets.numel()).index_copy(0, index, values)
        return values.view(targets.shape)

    if sharded.is_sharded(weight):
        require(not options.extras, "extras", repr(options.extras), "nothing where weight is sharded over ranks")
        picked = flat_hidden if index is None else flat_hidden.index_select(0, index)
        return TokenStats(placed(sharded.token_logps(picked, weight, bias, flat, options)))
    logps, *others = TokenStatsFunction.apply(flat_hidden, weight, bias, flat, index, options)
    asked = options.extras.split()
    return TokenStats(placed(logps), **{name: placed(x) for name, x in zip(rows.EXTRAS, others) if name in asked})
