"""The softmax's tail as a rank-one matrix (tail="rank1") against fp64 mathematics written here."""

from __future__ import annotations

import math

import pytest
import torch

import fastpref as fp
from fastpref import tail
from fastpref.rows import native, reference

KERNELS = [reference, *([native] if native.available()[0] else [])]


def residuals(kind: str, rows: int = 700, vocab: int = 3001, seed: int = 0) -> torch.Tensor:
    """U = onehot(y) - softmax(z), fp64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    z = z * {"uniform": 1e-3, "real": 3.0, "peaked": 12.0}.get(kind, 3.0)
    y = torch.randint(vocab, (rows,), generator=generator)
    if kind == "real":  # a few likely tokens, the target often among them, over a tail
        z[:, :200] += 6 * torch.rand(200, generator=generator, dtype=torch.float64)
        y = torch.where(torch.rand(rows, generator=generator) < 0.8, y % 200, y)
    if kind == "another top token in every row":
        z[torch.arange(rows), torch.arange(rows) % vocab] += 25
    if kind == "confidently wrong":
        z[:, 7] += 40
    u = -torch.softmax(z, 1)
    u[torch.arange(rows), y] += 1
    return u


def rank_one(u: torch.Tensor, eps: float) -> torch.Tensor:
    """What the residuals become, block by block."""
    found = u.clone()
    for start in range(0, len(u), 512):
        block = found[start : start + 512]
        dropped = block.abs().amax(0) < eps
        m, shares = block[:, dropped].sum(1), block[:, dropped].sum(0)
        if dropped.any() and shares.sum() != 0:
            block[:, dropped] = torch.outer(m, shares / shares.sum())
    return found


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda module: module.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["real", "peaked", "uniform", "confidently wrong", "another top token in every row"]
)
def test_products_are_those_of_the_rank_one_matrix(kernels, dtype, kind):
    u64 = residuals(kind)
    scale = torch.linspace(-2.0, -0.5, len(u64))
    stash = (u64 / scale[:, None]).to(dtype)
    u64 = stash.double() * scale.double()[:, None]
    eps = 2.0**-9
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(u64.shape[1], 24, generator=generator).to(dtype)
    scaled = torch.randn(len(u64), 24, generator=generator).to(dtype)
    product, total = torch.full((len(u64), 24), torch.nan), torch.ones(u64.shape[1], 24)
    found = tail.find(kernels, stash, scale, eps)
    bound = tail.multiply(kernels, found, stash, weight, scale, product, scaled, total, columns_at_once=100)

    expected = rank_one(u64, eps)
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3  # gathered columns and c W are rounded like any other operand
    s64 = expected / scale.double()[:, None]
    for ours, truth in ((product, s64 @ weight.double()), (total - 1, s64.T @ scaled.double())):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()
    left_out = (u64 - expected).square().sum().item()
    assert left_out * (1 - 1e-4) <= bound.item() <= 4 * left_out + 1e-9 or kind in ("uniform", "confidently wrong")
    assert found.squares.item() == pytest.approx(u64.square().sum().item(), rel=1e-5)
    # Row and column sums stay: nothing is left without gradient.
    assert torch.allclose(expected.sum(1), u64.sum(1), atol=1e-6) and torch.allclose(expected.sum(0), u64.sum(0))


@pytest.mark.skipif(not native.available()[0], reason="the extension is not built")
@pytest.mark.parametrize("isa", native._native.isas() if native.available()[0] else [])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1000, 5001])
def test_every_instruction_set_and_odd_width(isa, vocab, monkeypatch):
    monkeypatch.setenv("FASTPREF_ISA", isa)
    generator = torch.Generator().manual_seed(vocab)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stash = torch.randn(9, vocab + 3, generator=generator).to(dtype)[:, 3:]  # rows that begin anywhere
        scale = torch.rand(9, generator=generator) + 0.1
        scale[2], scale[5] = 0.0, torch.nan  # ignored; of a row that held a NaN
        stash[5] = torch.nan
        ours, theirs = torch.full((2, 3, vocab), torch.nan).unbind()
        native.peaks(stash, scale, *ours)
        reference.peaks(stash, scale, *theirs)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and ours.isfinite().all()
        for columns in (torch.arange(0, vocab, 3), torch.arange(vocab), torch.arange(0)):
            columns = columns.int()
            found = []
            for kernels in (native, reference):
                active, rest = stash.new_empty(9, len(columns)), torch.ones(9)
                kernels.split(stash, columns, active, rest)
                found.append((active, rest))
            assert torch.equal(found[0][0].nan_to_num(7.0), found[1][0].nan_to_num(7.0))
            assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5, equal_nan=True)
            part = torch.randn(len(columns), 37, generator=generator).to(dtype)
            totals = torch.randn(vocab, 37, generator=generator)
            expected = totals.clone().index_add_(0, columns, part.float())
            native.add_rows(totals, part, columns)
            assert torch.equal(totals, expected)


def problem(kind: str, dtype=torch.float32, sequences: int = 6, rows: int = 60, vocab: int = 2000, width: int = 80):
    """hidden, weight and targets of near-real logits: some directions are a few tokens', the rest a tail."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(vocab, width, generator=generator) / math.sqrt(width)
    hidden = torch.randn(sequences * rows, width, generator=generator) * {"uniform": 1e-3}.get(kind, 0.3)
    targets = torch.randint(vocab, (sequences * rows,), generator=generator)
    if kind != "uniform":
        targets = targets % 40
        hidden = hidden + 15 * weight[torch.where(torch.rand(len(hidden), generator=generator) < 0.7, targets, 11)]
    return hidden.to(dtype), weight.to(dtype), targets, [rows * i for i in range(sequences + 1)]


def gradients(hidden, weight, targets, cu_seqlens, loss=None, **options):
    options = {"loss": loss or fp.DPO(0.1)} | options
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(options.pop("head", True))
    if options["loss"].needs_reference:
        options["ref_logps"] = torch.linspace(-40, -30, len(cu_seqlens) - 1)
    out = fp.linear_preference_loss(hidden, weight, targets, cu_seqlens=cu_seqlens, **options)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("options", [
    {}, {"memory_budget": 1_500_000}, {"head": False}, {"softcap": 60.0, "logit_scale": 1.5, "temperature": 1.4},
    {"bias": torch.linspace(-1, 1, 2000)}, {"backend": "reference"}, {"loss": fp.ORPO(0.1)},
], ids=["one group", "small budget", "frozen", "transforms", "bias", "reference rows", "two scalars"])
def test_near_the_exact_gradients_and_told_how_near(options):
    inputs = problem("real")
    exact, dx, dw = gradients(*inputs, **options)
    ours, dx1, dw1 = gradients(*inputs, tail="rank1", tail_eps=2.0**-10, **options)
    assert torch.equal(exact.loss, ours.loss) and torch.equal(exact.logps, ours.logps)
    assert 0 < ours.metrics["tail/active"] < 0.5 and 0 < ours.metrics["tail/error"] < tail.MOST_LEFT_OUT
    assert 0 < far(dx1, dx) < 6e-3
    if dw is not None:
        assert 0 < far(dw1, dw) < 6e-3 and (dw1.abs().amax(1) > 0).all()
    again = gradients(*inputs, tail="rank1", tail_eps=2.0**-10, **options)
    assert torch.equal(again[1], dx1) and (dw is None or torch.equal(again[2], dw1))


def test_uniform_logits_end_up_exact():
    inputs = problem("uniform")
    exact, dx, dw = gradients(*inputs)
    ours, dx1, dw1 = gradients(*inputs, tail="rank1")
    assert ours.metrics["tail/active"] == 1 and ours.metrics["tail/error"] == 0
    assert torch.equal(dx1, dx) and torch.equal(dw1, dw)


def test_late_scalars():
    hidden, weight, targets, _ = problem("real")
    g = torch.linspace(-1, 1, len(targets))
    found = []
    for options in ({}, {"tail": "rank1", "tail_eps": 2.0**-10}):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = fp.linear_logps(h, w, targets, **options)
        (logps * g).sum().backward()
        found.append((logps.detach(), h.grad, w.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert all(0 < far(b, a) < 6e-3 for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_what_is_not_finite_stays_in_its_row():
    hidden, weight, targets, cu_seqlens = problem("real")
    hidden[70] = torch.nan  # of the second sequence
    targets[:5] = -100
    exact, dx, _ = gradients(hidden, weight, targets, cu_seqlens, head=False, loss=fp.SFT())
    ours, dx1, _ = gradients(hidden, weight, targets, cu_seqlens, head=False, loss=fp.SFT(), tail="rank1")
    rows = torch.ones(len(hidden), dtype=torch.bool)
    rows[70] = False
    assert torch.equal(ours.logps.isnan(), exact.logps.isnan())
    assert torch.equal(dx1[rows].isfinite(), dx[rows].isfinite())


def test_all_ignored_and_one_row():
    hidden, weight, targets, cu_seqlens = problem("real")
    _, dx, dw = gradients(hidden, weight, torch.full_like(targets, -100), cu_seqlens, loss=fp.SFT(), tail="rank1")
    assert (dx == 0).all() and (dw == 0).all()
    one = gradients(hidden[:1], weight, targets[:1], [0, 1], loss=fp.SFT(), tail="rank1")
    exact = gradients(hidden[:1], weight, targets[:1], [0, 1], loss=fp.SFT())
    assert far(one[1], exact[1]) < 6e-3 and far(one[2], exact[2]) < 6e-3


@pytest.mark.parametrize("options, says", [
    ({"tail": "rank2"}, "tail is 'rank2'; it takes 'exact' or 'rank1'"),
    ({"tail_eps": 1e-3}, "tail_eps is 0.001 with tail='exact'; it takes a number between 0 and 1 beside"),
    ({"tail": "rank1", "tail_eps": 2}, "tail_eps is 2 with tail='rank1'; it takes a number between 0 and 1 beside"),
])
def test_refusals(options, says):
    hidden, weight, targets, cu_seqlens = problem("real")
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        gradients(hidden, weight, targets, cu_seqlens, **options)
