"""The row contract (fastpref/rows/contract.py) on every backend that runs on the CPU, against fp64 mathematics."""

from __future__ import annotations

import importlib
import math
from contextlib import nullcontext

import pytest
import torch
from row_checks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    IGNORE,
    KINDS,
    ROUNDING,
    TRANSFORMS,
    check_grad,
    check_stats,
    gradient_oracle,
    oracle,
    random_case,
    spikes,
)

from fastpref.rows import EXTRAS, FoldState, RowStats, Tile, Transform, fold_finish

BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def rows(request):
    # Torch's own small operations on several threads mostly wait for each other, above all on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module(f"fastpref.rows.{request.param}")
    torch.set_num_threads(before)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_transform_in_every_dtype(rows, dtype, out_dtype):
    for name, (transform, with_bias) in TRANSFORMS.items():
        for vocab in (37, 2500):
            logits, targets, bias = random_case(5, vocab, dtype)
            bias = bias if with_bias else None
            out = torch.full((5, vocab), 7.0, dtype=out_dtype)
            stats = rows.residual(Tile(logits, targets, transform, bias), out, extras=EXTRAS)
            want = oracle(logits, targets, transform, bias)
            check_stats(stats, want, ("logp", "lse", *EXTRAS))
            check_grad(stats.scale, out, want)
            bare = rows.residual(Tile(logits, targets, transform, bias), None)
            assert torch.equal(bare.logp, stats.logp), name
            assert all(value is None for value in bare[2:])


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 8, 15, 63, 64, 65, 127, 2047, 2048, 2049, 4103, 20001])
def test_every_width(rows, vocab):
    logits, targets, _ = random_case(3, vocab)
    out = torch.empty_like(logits)
    stats = rows.residual(Tile(logits, targets), out, extras=EXTRAS)
    want = oracle(logits, targets, Transform())
    check_stats(stats, want, ("logp", "lse", *EXTRAS))
    check_grad(stats.scale, out, want)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(rows, kind):
    vocab = 9001
    logits, targets, _ = random_case(4, vocab, std=1.0)
    targets[1] = vocab - 2  # the late maximum itself
    logits = KINDS[kind](logits, targets)
    want = oracle(logits, targets, Transform())
    for out_dtype in DTYPES:
        out = torch.empty(4, vocab, dtype=out_dtype)
        stats = rows.residual(Tile(logits, targets), out, extras=EXTRAS)
        check_stats(stats, want, ("logp", "lse", *EXTRAS))
        # A row whose maximum comes late is stored once more for each rise.
        check_grad(stats.scale, out, want, stores=3 if out_dtype == FP16 else 2)


@pytest.mark.parametrize("vocab", [200_000, 32_773])  # the latter passes 2^15 within its last vector
def test_a_vocabulary_whose_sum_of_exponentials_leaves_fp16(rows, vocab):
    logits = torch.zeros(1, vocab)
    out = torch.empty(1, vocab, dtype=FP16)
    stats = rows.residual(Tile(logits, torch.tensor([20_000])), out)
    grad = stats.scale.double() * out[0].double()
    assert float(stats.logp) == pytest.approx(-math.log(vocab), rel=1e-6)
    assert float(grad[20_000]) == pytest.approx(1.0, rel=2e-3)
    others = torch.cat([grad[:20_000], grad[20_001:]])
    assert bool(((others + 1 / vocab).abs() <= 2e-3 / vocab + 3e-8).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same(rows, dtype):
    logits, targets, _ = random_case(4, 6001, dtype)
    logits[2] = spikes(logits[2:3].clone(), 3000, 2048, 40.0)
    other = torch.empty_like(logits)
    apart = rows.residual(Tile(logits, targets, Transform(softcap=50.0)), other)
    here = rows.residual(Tile(logits, targets, Transform(softcap=50.0)), logits)
    assert torch.equal(logits, other)
    assert all(torch.equal(a, b) for a, b in zip(apart[:3], here[:3], strict=True))


def test_strides_and_offsets(rows):
    base, targets, bias = random_case(6, 3001)
    want = oracle(base, targets, Transform(softcap=9.0), bias)
    plain = torch.empty_like(base)
    stats = rows.residual(Tile(base, targets, Transform(softcap=9.0), bias), plain)
    for dtype in DTYPES:
        wide = torch.full((12, 3021), 5.0, dtype=dtype)
        wide_in = torch.full((18, 3011), float("nan"))
        wide_in[::3, 3:3004] = base
        out = wide[1::2, 7:3008]
        strided = rows.residual(Tile(wide_in[::3, 3:3004], targets, Transform(softcap=9.0), bias), out)
        assert torch.equal(strided.logp, stats.logp)
        check_grad(strided.scale, out, want)
        assert bool((wide[::2] == 5).all() and (wide[1::2, :7] == 5).all() and (wide[1::2, 3008:] == 5).all())


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(rows, count):
    logits, targets, _ = random_case(count, 50)
    out = torch.empty_like(logits)
    stats = rows.residual(Tile(logits, targets), out, extras=EXTRAS)
    assert all(value.shape == (count,) for value in stats)
    if count:
        check_grad(stats.scale, out, oracle(logits, targets, Transform()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 1000, 4999])
def test_nan_and_inf_stay_in_their_row(rows, poison, column):
    logits, targets, _ = random_case(5, 5000)
    targets[2] = 77
    clean = torch.empty_like(logits)
    before = rows.residual(Tile(logits, targets), clean, extras=EXTRAS)
    logits[2, column] = poison
    out = torch.empty_like(logits)
    after = rows.residual(Tile(logits, targets), out, extras=EXTRAS)
    assert not bool(torch.isfinite(after.logp[2])) and float(after.top1[2]) == 0
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(out[others], clean[others])
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[others], b[others])
    state = FoldState.new(5, dtype=FP32, device=logits.device)
    for begin, end in ((0, 900), (900, 5000)):
        rows.fold(Tile(logits[:, begin:end], targets, col_offset=begin), state)
    logp, _ = fold_finish(state, targets, IGNORE)
    assert not bool(torch.isfinite(logp[2])) and bool(torch.isfinite(logp[others]).all())


def test_columns_of_minus_inf(rows):
    logits, targets, _ = random_case(3, 5000)
    targets[:] = torch.tensor([4000, 4500, 4999])
    logits[:, :3000] = -float("inf")  # the whole first block: there is no maximum to begin with
    out = torch.empty_like(logits)
    stats = rows.residual(Tile(logits, targets), out, extras=("entropy", "top1", "log_sum_p2"))
    want = oracle(logits[:, 3000:], targets - 3000, Transform())
    check_stats(stats, want, ("logp", "lse", "entropy", "top1", "log_sum_p2"))
    check_grad(stats.scale, out[:, 3000:], want)
    assert bool((out[:, :3000] == 0).all())


def test_ignored_rows_are_not_read(rows):
    logits, targets, bias = random_case(6, 3000)
    targets[1], targets[4] = IGNORE, IGNORE
    logits[1], logits[4] = float("nan"), float("inf")
    out = torch.full_like(logits, 3.0)
    stats = rows.residual(Tile(logits, targets, Transform(softcap=4.0), bias), out, extras=EXTRAS)
    assert all(bool((value[[1, 4]] == 0).all()) for value in stats)
    assert bool((out[[1, 4]] == 0).all())
    scored = torch.tensor([0, 2, 3, 5])
    want = oracle(logits[scored], targets[scored], Transform(softcap=4.0), bias)
    check_grad(stats.scale[scored], out[scored], want)
    state = FoldState.new(6, dtype=FP32, device=logits.device)
    rows.fold(Tile(logits, targets, Transform(softcap=4.0), bias), state)
    logp, lse = fold_finish(state, targets, IGNORE)
    assert bool((logp[[1, 4]] == 0).all() and (lse[[1, 4]] == 0).all())
    sliced = torch.full_like(logits, 3.0)
    rows.residual_given_lse(Tile(logits, targets, Transform(softcap=4.0), bias), lse, sliced)
    assert bool((sliced[[1, 4]] == 0).all())
    other = torch.where(targets == IGNORE, -7, targets)
    again = rows.residual(Tile(logits, other, Transform(softcap=4.0), bias, -7), None)
    assert torch.equal(again.logp, stats.logp)


@pytest.mark.parametrize("target", [3000, 3001, -1, -101, 2**40, -(2**40)])
def test_targets_out_of_range(rows, target):
    logits, targets, _ = random_case(4, 3000)
    clean = rows.residual(Tile(logits, targets), torch.empty_like(logits))
    targets[0] = targets[3] = target  # beside the guards
    guarded = torch.full((6, 3000), 9.0)
    stats = rows.residual(Tile(logits, targets), guarded[1:5])
    assert bool(torch.isnan(stats.logp[[0, 3]]).all())
    assert bool((guarded[0] == 9).all() and (guarded[5] == 9).all())
    others = torch.tensor([1, 2])
    assert torch.equal(stats.logp[others], clean.logp[others])
    state = FoldState.new(4, dtype=FP32, device=logits.device)
    rows.fold(Tile(logits, targets), state)
    logp, lse = fold_finish(state, targets, IGNORE)
    assert bool(torch.isnan(logp[[0, 3]]).all()) and bool(torch.isfinite(logp[others]).all())
    rows.residual_given_lse(Tile(logits, targets), lse, guarded[1:5])
    assert bool((guarded[0] == 9).all() and (guarded[5] == 9).all())


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_the_vocabulary(rows, name, dtype):
    transform, with_bias = TRANSFORMS[name]
    vocab = 7003
    logits, targets, bias = random_case(5, vocab, dtype)
    logits[3, 5000] = 60.0  # a late maximum
    bias = bias if with_bias else None
    want = oracle(logits, targets, transform, bias)
    cuts = [0, 1, 1300, 1307, 4096, vocab]
    state = FoldState.new(5, dtype=FP32, device=logits.device)
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        part = None if bias is None else bias[begin:end]
        rows.fold(Tile(logits[:, begin:end], targets, transform, part, col_offset=begin), state)
    logp, lse = fold_finish(state, targets, IGNORE)
    check_stats(RowStats(logp, lse, None), want, atol=8e-6)
    for out_dtype in DTYPES:
        out = torch.full((5, vocab), 9.0, dtype=out_dtype)
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            part = None if bias is None else bias[begin:end]
            tile = Tile(logits[:, begin:end], targets, transform, part, col_offset=begin)
            rows.residual_given_lse(tile, lse, out[:, begin:end])
        # lse itself is rounded to fp32 here, which changes every probability by that much.
        rounded = want | {"error": want["error"] + 2.0**-23 * float(lse.abs().max())}
        check_grad(torch.full((5,), transform.row_factor), out, rounded)


def test_fold_over_slices_without_any_mass(rows):
    logits, targets, _ = random_case(2, 300)
    logits[:, :100] = -float("inf")
    targets[:] = torch.tensor([150, 299])
    state = FoldState.new(2, dtype=FP32, device=logits.device)
    for begin in range(0, 300, 50):
        rows.fold(Tile(logits[:, begin : begin + 50], targets, col_offset=begin), state)
    logp, lse = fold_finish(state, targets, IGNORE)
    check_stats(RowStats(logp, lse, None), oracle(logits[:, 100:], targets - 100, Transform()))


def test_extras_come_only_when_asked_for(rows):
    logits, targets, _ = random_case(3, 100)
    want = oracle(logits, targets, Transform())
    for name in EXTRAS:
        stats = rows.residual(Tile(logits, targets), None, extras=(name,))
        check_stats(stats, want, (name,))
        assert all(getattr(stats, other) is None for other in EXTRAS if other != name)


@pytest.mark.parametrize("vocab", [1, 5, 300, 4099])
def test_top1_is_what_argmax_picks(rows, vocab):
    """Whole numbers from -2 to 2: every row's maximum stands in many columns."""
    generator = torch.Generator().manual_seed(vocab)
    for dtype in (FP32, BF16):
        logits = torch.randint(-2, 3, (8, vocab), generator=generator).to(dtype)
        logits[6:] = 1.5
        for transform in (Transform(), Transform(softcap=3.0, temperature=0.8)):
            bias = (torch.arange(vocab) % 3).float() if transform.softcap else None
            z = logits.float() + (0.0 if bias is None else bias)  # exact, and the rest of the transform rises with it
            first, last = z.argmax(1), vocab - 1 - z.flip(1).argmax(1)
            targets = torch.where(torch.arange(8) % 3 == 0, first, torch.where(torch.arange(8) % 3 == 1, last, 2))
            targets %= vocab
            want = (first == targets).float()
            assert want.sum() >= 3 and (vocab < 10 or want.sum() < 6)
            stats = rows.residual(Tile(logits, targets, transform, bias), None, extras=("top1",))
            assert torch.equal(stats.top1, want)
            out = torch.empty(8, vocab, dtype=BF16)
            beside = rows.residual(Tile(logits, targets, transform, bias), out, extras=EXTRAS)
            assert torch.equal(beside.top1, want)


def test_top1_of_a_maximum_anywhere(rows):
    """The target before, at and behind the one column that is as large, in every place of a vector, block or unit."""
    places = [0, 1, 3, 4, 7, 8, 15, 16, 127, 128, 255, 256, 511, 2047, 2048, 2049, 4095, 4096, 4300, 4306, 4307]
    logits, targets, want = torch.zeros(3 * len(places) - 2, 4308), [], []
    for one, other in [(a, b) for i, a in enumerate(places) for b in places[max(i - 1, 0) : i + 2]]:
        logits[len(targets), [one, other]] = 2.0
        targets.append(one)
        want.append(float(one <= other))
    stats = rows.residual(Tile(logits, torch.tensor(targets)), None, extras=("top1",))
    assert stats.top1.tolist() == want


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_with_the_entropy_gradient(rows, name, dtype):
    transform, with_bias = TRANSFORMS[name]
    vocab = 4500
    logits, targets, bias = random_case(6, vocab, dtype)
    logits[4, 3000] = 15.0  # a probability near 1
    bias = bias if with_bias else None
    gl = torch.tensor([1.0, -0.7, 0.0, 0.4, -1.0, 0.9])
    gh = torch.tensor([0.5, 1.0, -1.0, 0.0, 1.0, -0.3])
    want, size = gradient_oracle(logits, targets, transform, bias, gl, gh)
    known = oracle(logits, targets, transform, bias)
    vectors = [known["lse"].float(), known["entropy"].float(), gl, gh]
    cuts = [0, 1, 1300, 1307, 4096, vocab]
    for out_dtype in DTYPES:
        out = torch.full((6, vocab), 9.0, dtype=out_dtype)
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            part = None if bias is None else bias[begin:end]
            tile = Tile(logits[:, begin:end], targets, transform, part, col_offset=begin)
            rows.gradient_given_lse(tile, *vectors, out[:, begin:end])
        error = (transform.row_factor * out.double() - want).abs()
        # As check_grad; lse and entropy are rounded to fp32 here, and the slope of the softcap is below 1.
        exact = 4e-6 + 3 * float(known["error"]) + 2.0**-22 * float(known["lse"].abs().max())
        smallest = 2.0**-25 * known["factor"] if out_dtype == FP16 else 0.0
        limit = 1.01 * ROUNDING[out_dtype] * want.abs() + exact * size + smallest + 1e-12
        assert bool((error <= limit).all()), f"{float((error / limit).max()):.3g} times the limit"


def test_slices_with_the_entropy_gradient_keep_rows_apart(rows):
    logits, targets, _ = random_case(6, 3000)
    logits[:, 1000:1100] = -torch.inf
    targets[1], targets[2] = IGNORE, 3000
    stats = rows.residual(Tile(logits, targets), None, extras=("entropy",))
    vectors = (stats.lse, stats.entropy, torch.ones(6), torch.full((6,), 0.5))

    def swept(logits, out):
        rows.gradient_given_lse(Tile(logits, targets), *vectors, out)
        return out

    clean = swept(logits, torch.full((6, 3000), 7.0))
    assert bool(torch.isfinite(clean).all()) and bool((clean[:, 1000:1100] == 0).all())
    assert bool((clean[1] == 0).all())
    logits[1], logits[4, 20] = torch.nan, torch.nan
    poisoned = swept(logits, torch.full((6, 3000), 7.0))
    others = [0, 1, 2, 3, 5]
    assert torch.equal(poisoned[others], clean[others]) and bool(poisoned[4, 20].isnan())
    same = logits.clone()
    assert torch.equal(swept(same, same).nan_to_num(5.0), poisoned.nan_to_num(5.0))  # in place


@pytest.mark.parametrize(
    "works, capability, dtype, chosen",
    [
        ({"triton", "cuda"}, (9, 0), BF16, "triton_rows"),
        ({"triton", "cuda"}, (9, 0), FP32, "triton_rows"),
        ({"triton", "cuda"}, (9, 0), FP16, "cuda"),  # clusters write it normalised
        ({"triton", "cuda"}, (8, 0), FP16, "triton_rows"),  # no clusters
        ({"triton"}, (9, 0), FP16, "triton_rows"),
        ({"cuda"}, (9, 0), BF16, "cuda"),  # no triton: not the slow reference
        (set(), (9, 0), BF16, "reference"),
        ({"triton", "cuda"}, (9, 0), torch.float64, "reference"),
    ],
)
def test_the_backend_is_that_of_the_calls_device(monkeypatch, works, capability, dtype, chosen):
    from fastpref import rows

    asked = []

    def availability(backend, device=None):
        asked.append(device)
        return rows.Availability(backend, backend in works and str(device) == "cuda:1", "a reason")

    monkeypatch.setattr(rows, "availability", availability)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows._usable.cache_clear()
    device = torch.device("cuda:1")
    try:
        with pytest.warns(UserWarning, match="triton: a reason; cuda: a reason") if not works else nullcontext():
            assert rows.choose(None, device, dtype).__name__ == f"fastpref.rows.{chosen}"
        assert set(asked) <= {device}
        if works and dtype != torch.float64:
            with pytest.warns(UserWarning, match="no fast row kernels on cuda:0"):
                assert rows.choose(None, torch.device("cuda:0"), dtype).__name__ == "fastpref.rows.reference"
    finally:
        rows._usable.cache_clear()
