"""The softmax's tail as a rank-one matrix (tail="rank1") against fp64 mathematics written here."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import fastpref as fp
from bench.harness import watched
from fastpref import tail
from fastpref.engine import _add_product
from fastpref.rows import native, reference

plan_module = sys.modules["fastpref.plan"]  # `fp.plan` is the function
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
    found = tail.find(kernels, stash, scale, eps, 512)
    bound = tail.multiply(kernels, _add_product, found, stash, weight, product, scaled, total, columns_at_once=100)

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
    {}, {"head": False}, {"backend": "reference"}, {"loss": fp.ORPO(0.1)},
], ids=["one group", "frozen", "reference rows", "two scalars"])
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


def truth(hidden, weight, targets, loss, softcap=None, logit_scale=1.0, temperature=1.0, bias=None):
    """dX and dW in fp64 by autograd over whole logits; hidden is [S, T, H]."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    z = hidden @ weight.t()
    z = logit_scale * (z if bias is None else z + bias.double())
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logps = z.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    lengths = (targets != -100).sum(1).double()
    totals = fp.Totals(len(targets), lengths.sum(), lengths.chunk(2)[0].sum())
    loss(fp.SequenceLogps(logps.sum(1), lengths, totals, torch.linspace(-40, -30, len(targets)).double())).backward()
    return hidden.grad, weight.grad


class Coupled(fp.DPO):
    coupling = "batch"


@pytest.fixture
def plans(monkeypatch):
    made = []
    monkeypatch.setattr("fastpref.engine.plan_of", lambda *given: made.append(fp.plan(*given)) or made[-1])
    monkeypatch.setattr("fastpref.ops.plan_of", lambda *given: made.append(fp.plan(*given)) or made[-1])
    return made


TRANSFORM = {"softcap": 60.0, "logit_scale": 1.5, "temperature": 1.4}


DTYPES = pytest.mark.parametrize("dtype, products", [
    (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "fp32"),
], ids=["fp32", "bf16", "bf16 in fp32"])


@DTYPES
@pytest.mark.parametrize("scheme, options", [
    ("groups", {}), ("groups", {"loss": fp.ORPO(0.1)}), ("groups", {"loss": Coupled(0.1)}), ("several", {}),
    ("long", {}), ("recompute", {}), ("recompute, nothing stashed", {}), ("frozen", {}), ("late", {}),
    ("late recompute", {}), ("several", TRANSFORM), ("recompute", TRANSFORM), ("groups", {"bias": True}),
    ("recompute", {"bias": True}), ("padded", {}), ("padded recompute", {}), ("padded several", TRANSFORM),
], ids=str)
def test_every_scheme_against_fp64(plans, scheme, options, dtype, products):
    count = 2 if scheme == "long" else 6
    hidden, weight, targets, cu_seqlens = problem("real", dtype, sequences=count, rows=360 // count)
    options = {"loss": fp.DPO(0.1)} | options
    if options.pop("bias", False):
        options["bias"] = torch.linspace(-1, 1, len(weight)).to(dtype)
    if "recompute" in scheme:
        options["loss"] = Coupled(0.1)
    padded = hidden.view(count, 360 // count, -1), targets.view(count, -1)
    if "padded" in scheme:
        padded[1][:, 50:] = -100
    expected = truth(padded[0], weight, padded[1], **options)
    if scheme.split()[-1] in ("several", "long", "recompute"):
        options["memory_budget"] = 400_000 * (4 if products else dtype.itemsize)
    elif "nothing" in scheme:
        options["memory_budget"] = 640_000 if products else 600_000 if dtype == torch.float32 else 500_000
    x, w = padded[0].clone().requires_grad_(), weight.clone().requires_grad_("frozen" not in scheme)
    if "padded" not in scheme and "late" not in scheme:
        options["cu_seqlens"] = cu_seqlens
    given = (x, padded[1]) if "cu_seqlens" not in options else (x.view(360, -1), targets)
    tails = {"tail": "rank1", "tail_eps": 2.0**-10, "logits_dtype": products}
    if "late" in scheme:
        logps = fp.linear_logps(given[0], w, given[1], memory_budget=options.get("memory_budget"), **tails)
        lengths, ref = torch.full((6,), 60.0), torch.linspace(-40, -30, 6)
        seq = fp.SequenceLogps(logps.sum(1), lengths, fp.Totals(6, 360, 180), ref)
        options["loss"](seq).backward()
    else:
        options["ref_logps"] = None if isinstance(options["loss"], fp.ORPO) else torch.linspace(-40, -30, count)
        out = fp.linear_preference_loss(given[0], w, given[1], **options, **tails)
        out.loss.backward()
        assert 0 < out.metrics["tail/active"] < 0.6 and 0 < out.metrics["tail/error"] < tail.MOST_LEFT_OUT
    found = plans[-1]
    print(found)
    wanted = scheme.split()[-1] if "recompute" not in scheme else "recompute"
    assert found.scheme == {"frozen": "frozen", "recompute": "recompute"}.get(wanted, "groups")
    assert ("several" in scheme) == (len(found.groups) > 1 and "long" not in scheme)
    assert ("long" in scheme) == any(group.long for group in found.groups)
    if wanted == "recompute":
        assert (found.stash_rows == 0) == ("nothing" in scheme)
    for grad, exact in zip((x.grad, w.grad), expected):
        print(scheme, None if grad is None else far(grad, exact))
        most = 4e-3 if dtype == torch.float32 else 4.5e-3 if products else 8e-3
        assert grad is None or 1e-5 < far(grad, exact) < most
    assert w.grad is None or (w.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, None), (torch.bfloat16, "fp32")],
                         ids=["fp32", "widened"])
def test_a_block_without_an_active_column(dtype, products):
    """Rows so sure that nothing of them reaches eps, beside a block of others. What is not written is NaN."""
    sure, (hidden, weight, targets, _) = 1024, problem("real", dtype, sequences=4, rows=256)
    weight[0] = 1.0
    # a logit of 80, where the others are near 0
    hidden = torch.cat((torch.ones(sure, hidden.shape[1], dtype=dtype), hidden))
    targets = torch.cat((torch.zeros(sure, dtype=torch.int64), targets))
    inputs = hidden, weight, targets, [0, 512, 1024, 1536, 2048]
    torch.use_deterministic_algorithms(True)
    try:
        _, dx, dw = gradients(*inputs, loss=fp.DPO(1e-4), logits_dtype=products)
        ours, dx1, dw1 = gradients(*inputs, loss=fp.DPO(1e-4), tail="rank1", tail_eps=2.0**-10,
                                    logits_dtype=products)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < ours.metrics["tail/active"] < 0.5
    assert far(dx1, dx) < 6e-3 and far(dw1, dw) < 6e-3


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What a GPU does, on the CPU: the number of active columns is settled before the call."""
    monkeypatch.setattr(plan_module._Planner, "tail_capacity", lambda self: self.p.tail * self.p.vocab // 2)
    monkeypatch.setattr(plan_module._Planner, "tail_capacity_bytes", lambda self, columns: 0)
    monkeypatch.setattr(tail.Needed, "of", {})


@pytest.mark.parametrize("options", [
    {}, {"head": False}, {"memory_budget": 1_700_000}, {"dtype": torch.bfloat16}, {"backend": "reference"},
], ids=["step", "frozen", "several groups", "bf16", "reference rows"])
def test_a_number_of_columns_that_the_calls_before_settle(on_a_gpu, plans, options):
    inputs, flat = (problem(kind, options.pop("dtype", torch.float32)) for kind in ("real", "uniform"))
    exact, exact_flat = gradients(*inputs, **options), gradients(*flat, **options)
    ours = {"tail": "rank1", "tail_eps": 2.0**-10} | options

    def same(a, b):  # other groups of the exact call have other sums
        most = 1e-6 if "memory_budget" in options else 0
        return all(x is y is None or far(x, y) <= most for x, y in zip(a[1:], b[1:]))

    first, second, third = (gradients(*inputs, **ours) for _ in range(3))
    assert same(first, exact) and first[0].metrics["tail/active"] == 1 and first[0].metrics["tail/error"] == 0
    assert ("memory_budget" in options) == (len(plans[-1].groups) > 1 and plans[-1].scheme == "groups")
    for grad, whole in zip(second[1:], exact[1:]):
        assert grad is None or 0 < far(grad, whole) < 6e-3
    active = second[0].metrics["tail/active"].item() * 2000
    needed = (residuals_of(*inputs).abs().view(-1, 360, 2000).amax(1) >= 2.0**-10).sum().item()
    assert active == pytest.approx(next(int(2000 * s) // 8 * 8 for s in tail.SHARES if 2000 * s >= needed), rel=1e-4)
    assert 0 < second[0].metrics["tail/error"] < tail.MOST_LEFT_OUT and same(second, third)
    # Near-uniform logits: the first call says how wrong it is, the next one is exact; and back again.
    wrong, right, back, ready = (gradients(*x, **ours) for x in (flat, flat, inputs, inputs))
    assert wrong[0].metrics["tail/error"] > tail.MOST_LEFT_OUT and right[0].metrics["tail/error"] == 0
    assert same(right, exact_flat) and same(back, exact) and same(ready, second)


@pytest.mark.skipif(not native.available()[0], reason="the reference rows keep fp32 copies of the tile")
@DTYPES
@pytest.mark.parametrize("scheme, share", [("groups", 2.0), ("groups", 0.7), ("frozen", 0.7), ("recompute", 0.6)])
def test_memory_is_within_the_plan(plans, scheme, share, dtype, products):
    inputs = problem("real", dtype, sequences=12, rows=100, vocab=6000, width=128)
    options = {"loss": Coupled(0.1) if scheme == "recompute" else fp.DPO(0.1), "head": scheme != "frozen",
               "memory_budget": int(share * 1200 * 6000 * (4 if products else dtype.itemsize)),
               "logits_dtype": products}
    seen = watched(lambda: gradients(*inputs, tail="rank1", tail_eps=2.0**-10, **options), torch.device("cpu"))
    found = plans[-1]
    print(found, seen.extra_bytes / found.bytes)
    assert found.scheme == scheme and 0 < seen.result[0].metrics["tail/active"] < 0.6
    assert found.tile_bytes <= found.budget
    clones = inputs[0].nbytes + inputs[1].nbytes
    assert seen.extra_bytes - clones <= 1.03 * found.bytes


def residuals_of(hidden, weight, targets, _):
    u = -(hidden.double() @ weight.double().t()).softmax(1)
    u[torch.arange(len(u)), targets] += 1
    return u


def test_columns_with_the_largest_peaks_and_of_equal_ones_the_first():
    stash = torch.zeros(3, 50)
    stash[0, [40, 3, 7]], stash[1, [10, 20, 30, 44]], stash[2, 9] = -0.5, 0.25, 0.125
    found = tail.find(reference, stash, torch.ones(3), 0.3, 512, columns=5)
    assert found.columns_BK.tolist() == [[3, 7, 10, 20, 40]] and found.columns_BK.dtype == torch.int32
    assert found.active_BV.nonzero()[:, 1].tolist() == [3, 7, 10, 20, 40]
    assert found.left_out_B.item() == 2 * 0.25**2 + 0.125**2 and found.needed == 50  # of ||U||: not small
    assert tail.find(reference, stash, torch.ones(3), 1e-3, 512, columns=5).needed == 8


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
