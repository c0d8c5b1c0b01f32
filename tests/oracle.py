"""The truth the tests compare with: fp64, full logits, formulas from the papers, nothing from fastpref.

Two independent roads to every gradient: autograd over the naive full-logits computation, and closed-form dL/dlogp_s
worked out by hand (`LOSSES[name].derivative`).

Notation: logps, refs [S] sequence log-probs (first half chosen, second half rejected), lengths [S] scored tokens,
P = S / 2 pairs, D = (logp_c - ref_c) - (logp_r - ref_r), s = sigmoid.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


# ---------------------------------------------------------------------------------------------- head


def full_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE,
    **transform: float | None,
) -> Tensor:
    """fp64, shape of targets; 0 where ignored. Ignored rows are never read (they may hold NaN)."""
    scored = targets != ignore_index
    z = full_logits(hidden[scored], weight, bias, **transform)
    top = z.detach().amax(-1, keepdim=True) if z.numel() else z.detach()[:, :1]
    lse = (z - top).exp().sum(-1).log() + top[:, 0]
    picked = z[torch.arange(len(z)), targets[scored]]
    return torch.zeros(targets.shape, dtype=torch.float64).masked_scatter(scored, picked - lse)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE,
    **transform: float | None,
) -> dict[str, Tensor]:
    """fp64, shape of targets, 0 where ignored: log-prob and entropy with their autograd, and the others."""
    scored = targets != ignore_index
    z = full_logits(hidden[scored], weight, bias, **transform)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    found = {
        "logps": log_p[torch.arange(len(z)), targets[scored]],
        "entropy": -(p * log_p).sum(-1),
        "top1": (z.argmax(-1) == targets[scored]).double(),
        "mean_logit": z.mean(-1).detach(),
        "log_sum_p2": (p * p).sum(-1).log().detach(),
    }
    return {
        name: torch.zeros(targets.shape, dtype=torch.float64).masked_scatter(scored, values)
        for name, values in found.items()
    }


def sequence_sums(tokens: Tensor, cu_seqlens: list[int] | None) -> Tensor:
    """[S, T] or, with cu_seqlens, packed [N] -> [S]."""
    if cu_seqlens is None:
        return tokens.sum(-1)
    ends = zip(cu_seqlens, cu_seqlens[1:], strict=False)
    return torch.stack([tokens[first:last].sum() for first, last in ends])


class Result(NamedTuple):
    loss: Tensor
    logps: Tensor
    lengths: Tensor
    hidden: Tensor  # gradients
    weight: Tensor
    bias: Tensor | None


def head_and_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],  # (logps [S], lengths [S]) -> scalar
    *,
    cu_seqlens: list[int] | None = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE,
    **transform: float | None,
) -> Result:
    """Loss and gradients of the naive path: all logits, autograd, fp64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    b = None if bias is None else bias.detach().double().requires_grad_()
    tokens = token_logps(x, w, targets, b, ignore_index=ignore_index, **transform)
    if token_weights is not None:
        scored = targets != ignore_index
        tokens = tokens * torch.where(scored, token_weights.double(), 0.0)
    logps = sequence_sums(tokens, cu_seqlens)
    lengths = sequence_sums((targets != ignore_index).double(), cu_seqlens)
    value = loss(logps, lengths)
    leaves = [x, w] + ([] if b is None else [b])
    dx, dw, *db = torch.autograd.grad(value, leaves, allow_unused=True)
    zero = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, [dx, dw, *db], strict=True)]
    return Result(value.detach(), logps.detach(), lengths, zero[0], zero[1], zero[2] if b is not None else None)


# ---------------------------------------------------------------------------------------------- losses


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    return t[: len(t) // 2], t[len(t) // 2 :]


def delta(logps: Tensor, refs: Tensor) -> Tensor:
    (logp_c, logp_r), (ref_c, ref_r) = halves(logps), halves(refs)
    return (logp_c - ref_c) - (logp_r - ref_r)


def sft(logps, lengths):
    return -logps.sum() / lengths.sum().clamp(min=1)


def sft_derivative(logps, lengths):
    return torch.full_like(logps, -1 / max(float(lengths.sum()), 1.0))


def dpo(logps, lengths, *, refs, beta=0.1, label_smoothing=0.0):
    h = beta * delta(logps, refs)
    return (-(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)).mean()


def dpo_derivative(logps, lengths, *, refs, beta=0.1, label_smoothing=0.0):
    d = delta(logps, refs)
    s = 1 / (1 + torch.exp(-beta * d))
    dd = beta * (s - (1 - label_smoothing)) / len(d)  # -(1-e)(1-s) + e s = s - (1-e)
    return torch.cat([dd, -dd])


def rpo(logps, lengths, *, refs, beta, eta, sft):
    nll, n = -halves(logps)[0], halves(lengths)[0]
    if sft == "sum":
        term = nll.mean()
    else:
        term = nll.sum() / n.sum().clamp(min=1)
    return dpo(logps, lengths, refs=refs, beta=beta) + eta * beta * term


def rpo_derivative(logps, lengths, *, refs, beta, eta, sft):
    g = dpo_derivative(logps, lengths, refs=refs, beta=beta)
    pairs = len(logps) // 2
    divisor = pairs if sft == "sum" else max(float(halves(lengths)[0].sum()), 1.0)
    g[:pairs] -= eta * beta / divisor
    return g


def ipo(logps, lengths, *, refs, beta, length_norm):
    ratio = logps - refs
    if length_norm == "mean":
        ratio = ratio / lengths.clamp(min=1)
    chosen, rejected = halves(ratio)
    return ((chosen - rejected - 1 / (2 * beta)) ** 2).mean()


def ipo_derivative(logps, lengths, *, refs, beta, length_norm):
    per = 1 / lengths.clamp(min=1) if length_norm == "mean" else torch.ones_like(logps)
    chosen, rejected = halves((logps - refs) * per)
    g = 2 * (chosen - rejected - 1 / (2 * beta)) / len(chosen)
    return torch.cat([g, -g]) * per


def kto(logps, lengths, *, refs, beta, desirable, kl_logps, ref_kl_logps, desirable_weight=1.0, undesirable_weight=1.0):
    z = max(0.0, float((kl_logps - ref_kl_logps).mean()))
    total = 0.0
    for logp, ref, good in zip(logps, refs, desirable.tolist(), strict=True):
        if good:
            total = total + desirable_weight * (1 - torch.sigmoid(beta * (logp - ref - z)))
        else:
            total = total + undesirable_weight * (1 - torch.sigmoid(beta * (z - logp + ref)))
    return total / len(logps)


def kto_derivative(
    logps, lengths, *, refs, beta, desirable, kl_logps, ref_kl_logps, desirable_weight=1.0, undesirable_weight=1.0
):
    z = max(0.0, float((kl_logps - ref_kl_logps).mean()))
    s = 1 / (1 + torch.exp(-beta * (logps - refs - z)))
    slope = beta * s * (1 - s) / len(logps)
    return torch.where(desirable, -desirable_weight * slope, undesirable_weight * slope)


def slic(logps, lengths, *, delta, eta):
    logp_c, logp_r = halves(logps)
    return ((delta - logp_c + logp_r).clamp(min=0) - eta * logp_c).mean()


def slic_derivative(logps, lengths, *, delta, eta):
    logp_c, logp_r = halves(logps)
    active = (delta - logp_c + logp_r > 0).double() / len(logp_c)
    return torch.cat([-active - eta / len(logp_c), active])


def hinge(logps, lengths, *, refs, beta):
    return (1 - beta * delta(logps, refs)).clamp(min=0).mean()


def hinge_derivative(logps, lengths, *, refs, beta):
    d = delta(logps, refs)
    active = beta * (1 - beta * d > 0).double() / len(d)
    return torch.cat([-active, active])


class Truth(NamedTuple):
    loss: Callable[..., Tensor]
    derivative: Callable[..., Tensor]


LOSSES = {
    "sft": Truth(sft, sft_derivative),
    "dpo": Truth(dpo, dpo_derivative),
    "rpo": Truth(rpo, rpo_derivative),
    "ipo": Truth(ipo, ipo_derivative),
    "kto": Truth(kto, kto_derivative),
    "slic": Truth(slic, slic_derivative),
    "hinge": Truth(hinge, hinge_derivative),
}
NEEDS_REFERENCE = {"dpo", "rpo", "ipo", "kto", "hinge"}

# One entry per documented behaviour: (name, options).
VARIANTS = [
    ("sft", {}),
    ("dpo", dict(beta=0.1)),
    ("dpo", dict(beta=0.7, label_smoothing=0.2)),
    ("rpo", dict(beta=0.3, eta=0.4, sft="sum")),
    ("rpo", dict(beta=0.5, eta=0.2, sft="tokens")),
    ("ipo", dict(beta=0.3, length_norm="mean")),
    ("ipo", dict(beta=0.3, length_norm="sum")),
    ("kto", dict(beta=0.3)),
    ("kto", dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)),
    ("slic", dict(delta=14.0, eta=0.05)),
    ("hinge", dict(beta=0.2)),
]


def variant_id(variant: tuple[str, dict]) -> str:
    name, options = variant
    return "-".join([name] + [f"{v}" for v in options.values()])


# ---------------------------------------------------------------------------------------------- inputs


class Batch(NamedTuple):
    """Padded; `packed()` gives the same batch without the padding."""

    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [S, T]
    bias: Tensor  # [V]

    def packed(self, order: list[int] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """(hidden [N, H], targets [N], cu_seqlens): trailing padding cut off, ignored prompt tokens kept."""
        rows, labels, cu = [], [], [0]
        for s in order if order is not None else range(len(self.targets)):
            scored = (self.targets[s] != IGNORE).nonzero()
            n = int(scored[-1]) + 1 if len(scored) else 0
            rows.append(self.hidden[s, :n])
            labels.append(self.targets[s, :n])
            cu.append(cu[-1] + n)
        return torch.cat(rows), torch.cat(labels), cu


KINDS = ("plain", "near_uniform", "peaked", "confidently_wrong", "all_negative", "huge", "all_near_-1e4")


def make_batch(
    lengths: list[int] = (9, 4, 11, 6),  # scored tokens of each sequence; 0 allowed
    *,
    prompt: list[int] | int = 3,  # ignored tokens in front of them
    hidden_size: int = 24,
    vocab: int = 523,
    kind: str = "plain",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    gen = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    sequences = len(lengths)
    prompts = [prompt] * sequences if isinstance(prompt, int) else prompt
    t = max(max(p + n for p, n in zip(prompts, lengths, strict=True)), 1) + 2
    x = torch.randn(sequences, t, hidden_size, generator=gen, dtype=torch.float64)
    w = torch.randn(vocab, hidden_size, generator=gen, dtype=torch.float64)
    deviation = {"near_uniform": 0.01, "plain": 2.0, "peaked": 12.0, "confidently_wrong": 12.0}.get(kind, 2.0)
    x = x * deviation / math.sqrt(hidden_size)
    if kind == "all_negative":
        x, w = x.abs() * 4, -w.abs()
    if kind == "all_near_-1e4":  # one hidden feature lowers every logit alike
        x[..., 0], w[:, 0] = 100.0, -100.0
    if kind == "huge":
        x = x / (x @ w.T).abs().amax(-1, keepdim=True) * 1e4
    x, w = x.to(dtype), w.to(dtype)
    z = x.double() @ w.double().T
    targets = torch.randint(0, vocab, (sequences, t), generator=gen)
    if kind == "peaked":
        targets = z.argmax(-1)
    if kind in ("confidently_wrong", "huge"):  # huge: half of them wrong, by 1e4 nats
        wrong = torch.rand(sequences, t, generator=gen) < (1.0 if kind == "confidently_wrong" else 0.5)
        targets = torch.where(wrong, z.argmin(-1), z.argmax(-1))
    position = torch.arange(t)
    for s in range(sequences):
        scored = (position >= prompts[s]) & (position < prompts[s] + lengths[s])
        targets[s] = targets[s].masked_fill(~scored, IGNORE)
    bias = 0.3 * torch.randn(vocab, generator=gen, dtype=torch.float64)
    return Batch(x, w, targets, bias.to(dtype))


def reference_logps(batch: Batch, seed: int = 7, spread: float = 3.0) -> Tensor:
    """[S] fp32: the policy's own log-probs plus a few nats of noise, so that no margin is degenerate."""
    logps = sequence_sums(token_logps(batch.hidden, batch.weight, batch.targets), None)
    gen = torch.Generator().manual_seed(seed)
    return (logps + spread * torch.randn(len(logps), generator=gen, dtype=torch.float64)).float()


def loss_inputs(name: str, batch: Batch) -> tuple[dict, dict]:
    """(what the package is given, what the oracle is given) besides hidden, weight, targets and options."""
    if name not in NEEDS_REFERENCE:
        return {}, {}
    refs = reference_logps(batch)
    given, truth = {"ref_logps": refs}, {"refs": refs.double()}
    if name == "kto":
        desirable = torch.arange(len(refs)) % 3 != 1
        kl = torch.linspace(-30, -12, len(refs))
        ref_kl = kl - 1.7 + 6 * torch.linspace(-1, 1, len(refs))  # of both signs: the clamp follows the mean
        extra = {"desirable": desirable, "kl_logps": kl, "ref_kl_logps": ref_kl}
        given |= extra
        truth |= {key: value.double() if value.is_floating_point() else value for key, value in extra.items()}
    return given, truth


def record(monkeypatch, planner: Callable) -> list:
    """The plans that calls make from now on, wherever and as what the package imported `planner`."""
    importlib.import_module("fastpref.head")  # the package imports it when it is asked for
    made: list = []

    def recording(*args, **kwargs):
        made.append(planner(*args, **kwargs))
        return made[-1]

    for module in [m for name, m in sys.modules.items() if name.startswith("fastpref.")]:
        for name in [name for name, value in vars(module).items() if value is planner]:
            if module.__name__ != planner.__module__:
                monkeypatch.setattr(module, name, recording)
    return made


def relative(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; 0 / 0 = 0."""
    difference = float((got.double() - truth.double()).norm())
    return difference / float(truth.double().norm()) if difference else 0.0
