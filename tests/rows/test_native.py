"""The C++ rows on the CPU: every instruction set, their exp and tanh, their accuracy beyond the contract, threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from row_checks import DTYPES, FP16, FP32, KINDS, ROUNDING, TRANSFORMS, check_grad, check_stats, oracle, random_case

from fastpref import _native
from fastpref.rows import EXTRAS, FoldState, RowStats, Tile, Transform, fold_finish, native

ISAS = _native.isas()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTPREF_ISA", request.param)
    assert _native.isa() == request.param
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's small operations in the oracle wait for each other on a busy machine
    yield request.param
    torch.set_num_threads(before)


def ulps(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error in units of the last place of the fp32 number nearest to the truth."""
    unit = torch.from_numpy(np.spacing(np.abs(truth.float().numpy()))).double()
    return float(((got.double() - truth).abs() / unit).max())


def exp(x: torch.Tensor, isa: str) -> torch.Tensor:
    y = x.clone()
    _native.exp_inplace(y.data_ptr(), y.numel(), isa)
    return y


def tanh(x: torch.Tensor, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    y, slope = x.clone(), torch.empty_like(x)
    _native.tanh_inplace(y.data_ptr(), slope.data_ptr(), y.numel(), isa)
    return y, slope


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_within_an_ulp(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.linspace(-87.33, 88.37, 500_003),
            torch.randn(200_000, generator=generator),
            1e-3 * torch.randn(100_000, generator=generator),
            torch.tensor([-87.33, 88.37, 1e-40, -1e-40, 0.34657359, -0.34657359]),
        ]
    ).clamp(-87.33, 88.37)
    assert ulps(exp(x, isa), x.double().exp()) <= 1.0


@pytest.mark.parametrize("isa", ISAS)
def test_exp_at_its_ends(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -nan, -89.0, -1e30, 89.0, 1e30])
    got = exp(x, isa)
    assert got[[0, 1]].tolist() == [1, 1] and got[[2, 8, 9]].tolist() == [inf] * 3
    assert got[[3, 6, 7]].tolist() == [0] * 3 and bool(torch.isnan(got[4:6]).all())
    nearly_zero = exp(torch.linspace(-88.5, -87.33, 1001), isa)
    assert bool((nearly_zero >= 0).all() and (nearly_zero <= 1.2e-38).all())


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_and_its_slope(isa):
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-30, 1.9, 200_001)
    x = torch.where(torch.rand(size.shape, generator=generator) < 0.5, size, -size)
    value, slope = tanh(x, isa)
    assert ulps(value, x.double().tanh()) <= 3.5
    truth = torch.cosh(x.double()) ** -2
    shown = truth > 1e-36  # below, 4 exp(-2|x|) runs into exp's end
    assert float(((slope - truth).abs() / truth)[shown].max()) <= 7 * 2.0**-24
    edges = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])
    value, slope = tanh(edges, isa)
    assert value[:3].tolist() == [0, 1, -1] and slope[:3].tolist() == [1, 0, 0]
    assert bool(torch.isnan(value[3]) and torch.isnan(slope[3]))


def test_every_transform_and_dtype_on_every_instruction_set(isa):
    for transform, with_bias in TRANSFORMS.values():
        for dtype in DTYPES:
            for vocab in (19, 2077):
                logits, targets, bias = random_case(3, vocab, dtype)
                bias = bias if with_bias else None
                want = oracle(logits, targets, transform, bias)
                for out_dtype in DTYPES:
                    out = torch.empty(3, vocab, dtype=out_dtype)
                    stats = native.residual(Tile(logits, targets, transform, bias), out, extras=EXTRAS)
                    check_stats(stats, want, ("logp", "lse", *EXTRAS))
                    check_grad(stats.scale, out, want)
                    native.residual_given_lse(Tile(logits, targets, transform, bias), stats.lse, out)
                    check_grad(torch.full((3,), transform.row_factor), out, want | {"error": 2e-6 + want["error"]})
                # Without an entropy gradient the two sweeps of a slice are one.
                again, zeros = torch.empty_like(out), torch.zeros(3)
                known = stats.lse, stats.entropy, zeros + 1, zeros
                native.gradient_given_lse(Tile(logits, targets, transform, bias), *known, again)
                torch.testing.assert_close(again, out, rtol=1e-6 + 2 * ROUNDING[again.dtype], atol=1e-7)
                state = FoldState.new(3, dtype=FP32, device=logits.device)
                native.fold(Tile(logits, targets, transform, bias), state)
                check_stats(RowStats(*fold_finish(state, targets, -100), None), want)


def test_every_kind_of_row_on_every_instruction_set(isa):
    for kind in KINDS:
        logits, targets, _ = random_case(3, 9001, std=1.0)
        logits = KINDS[kind](logits, targets)
        want = oracle(logits, targets, Transform())
        for out_dtype in DTYPES:
            out = torch.empty(3, 9001, dtype=out_dtype)
            stats = native.residual(Tile(logits, targets), out, extras=EXTRAS)
            check_stats(stats, want, ("logp", "lse", *EXTRAS))
            check_grad(stats.scale, out, want, stores=3 if out_dtype == FP16 else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_logps_are_exact_to_fp32(isa, kind):
    """logp is formed in double from the logits themselves: no loss where they are large, and 1e-7 a sum of 200k."""
    logits, targets, _ = random_case(4, 200_003, std=1.0)
    logits = KINDS[kind](logits, targets)
    want = oracle(logits, targets, Transform())
    stats = native.residual(Tile(logits, targets), None)
    torch.testing.assert_close(stats.logp.double(), want["logp"], rtol=1.2e-7, atol=1.5e-7)
    torch.testing.assert_close(stats.lse.double(), want["lse"], rtol=1.2e-7, atol=1.5e-7)


def test_fp16_and_bf16_rounding(isa):
    """Every finite number of the narrow dtypes comes in exactly, and fp32 goes out rounded to nearest, ties to even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = patterns.view(dtype)
        numbers = numbers[numbers.abs() < 1e37]  # so that their sum is finite
        wide = numbers[:, None].repeat(1, 17)  # 17 columns: whole vectors and a rest
        zeros = torch.zeros(len(numbers), dtype=torch.int64)
        stats = native.residual(Tile(wide, zeros), None, extras=("mean_logit",))
        assert torch.equal(stats.mean_logit, numbers.float())

        def minus_exp(x, out_dtype):
            out = torch.empty_like(x, dtype=out_dtype)
            nobody = torch.full((len(x),), -1)
            native.residual_given_lse(Tile(x, nobody), torch.zeros(len(x)), out)
            return out

        x = torch.linspace(-20, 5, 30_011)[None]
        assert torch.equal(minus_exp(x, dtype), minus_exp(x, FP32).to(dtype))
        payload = torch.full((1, 40), 0x7FFFFFFF, dtype=torch.int32).view(FP32)  # a NaN that rounding up would make -0
        assert bool(torch.isnan(minus_exp(payload, dtype)).all())
        specials = minus_exp(torch.tensor([[float("nan"), -200.0, 0.0] * 17]), dtype)[0]
        assert bool(torch.isnan(specials[::3]).all())
        assert specials[1::3].tolist() == [0] * 17 and specials[2::3].tolist() == [-1] * 17


def test_threads_do_not_change_a_bit():
    logits, targets, _ = random_case(97, 3001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty_like(logits)
            stats = native.residual(Tile(logits, targets), out, extras=EXTRAS)
            results.append([out, *stats])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_without_torch():
    """Where torch is not loaded there is no OpenMP to borrow: the module's own threads do the same."""
    program = f"""
        import importlib.util, sys
        import numpy as np
        spec = importlib.util.spec_from_file_location("_native", {_native.__file__!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        z = np.random.default_rng(0).normal(size=(64, 5000)).astype(np.float32)
        y, found = np.arange(64) % 5, np.zeros((2, 64), np.float32)
        tile = native.Tile(z.ctypes.data, "float32", 5000, 64, 5000, y.ctypes.data, -100, 0, 0, 1.0, 0.0, 1.0)
        stats = native.Stats(found[0].ctypes.data, found[1].ctypes.data, 0, 0, 0, 0, 0)
        native.residual(tile, native.Out(0, "float32", 0), stats, 3)
        lse = np.log(np.exp(z.astype(np.float64)).sum(1))
        assert abs(found[1] - lse).max() < 1e-6
        assert abs(found[0] - (z[np.arange(64), y] - lse)).max() < 1e-6
        assert "torch" not in sys.modules
        assert "libcuda" not in open("/proc/self/maps").read() and "libgomp" not in open("/proc/self/maps").read()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_late_rise_is_multiplied_in(isa):
    """The rise lies in the first column of the third block; what was written before is exp(-40) of what it was."""
    logits = torch.zeros(1, 5000)
    logits[0, 4096] = 40.0
    out = torch.empty_like(logits)
    stats = native.residual(Tile(logits, torch.tensor([3])), out)
    s = 1 + 4999 * np.exp(-40.0)
    grad = stats.scale * out[0]
    assert float(grad[4096]) == pytest.approx(-1 / s, rel=2e-7)
    assert float(grad[0]) == pytest.approx(-np.exp(-40.0) / s, rel=1e-6)
    assert float(grad[4999]) == pytest.approx(-np.exp(-40.0) / s, rel=1e-6)
    assert float(grad[3]) == pytest.approx(1.0, rel=2e-7)


def test_fold_leaves_the_state_of_ignored_rows_alone(isa):
    state = FoldState.new(2, dtype=FP32, device=torch.device("cpu"))
    native.fold(Tile(torch.ones(2, 9), torch.tensor([-100, 4])), state)
    assert state.maximum.tolist() == [-float("inf"), 1.0]
    assert state.sum_exp.tolist() == [0.0, 9.0]


def test_forced_instruction_set_must_be_here(monkeypatch):
    monkeypatch.setenv("FASTPREF_ISA", "avx1024")
    with pytest.raises(ValueError, match="FASTPREF_ISA is 'avx1024'; this machine runs .*portable"):
        native.residual(Tile(torch.zeros(1, 3), torch.tensor([0])), None)


def test_advise_huge():
    buffer = torch.empty(1 << 22)
    assert native.advise_huge(buffer[100:]) in (True, False)  # what the kernel makes of it is its own affair
    buffer.fill_(1.0)
    assert float(buffer.sum()) == 1 << 22
    assert native.advise_huge(torch.empty(3)) is False  # no whole page inside


def test_what_it_refuses():
    x, y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)

    def refused(error, pattern, logits=x, targets=y, out=None, bias=None, extras=()):
        with pytest.raises(error, match=pattern):
            native.residual(Tile(logits, targets, bias=bias), out, extras)

    refused(TypeError, "logits is torch.float64", logits=x.double())
    refused(ValueError, "logits is .*contiguous columns", logits=torch.zeros(6, 4).T)
    refused(ValueError, r"logits is \[4\]", logits=x[:, 0])
    refused(ValueError, r"targets is \[3\]", targets=y[:3])
    refused(TypeError, "targets is .*int32", targets=y.int())
    refused(ValueError, r"out is \[4, 5\]", out=x[:, :5])
    refused(TypeError, "out is torch.int64", out=x.long())
    refused(ValueError, r"bias is \[5\]", bias=torch.zeros(5))
    with pytest.raises(ValueError, match="state.maximum has stride"):
        state = FoldState(*(torch.zeros(8)[::2] for _ in range(3)))
        native.fold(Tile(x, y), state)
    with pytest.raises(ValueError, match=r"lse is \[3\]"):
        native.residual_given_lse(Tile(x, y), torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"grad_entropy is \[5\]"):
        vectors = (torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(5))
        native.gradient_given_lse(Tile(x, y), *vectors, x)
    refused(ValueError, "extras has", extras=("perplexity",))
    refused(ValueError, "out overlaps logits", logits=x[:3], targets=y[:3], out=x[1:])


def test_supports():
    cpu = torch.device("cpu")
    assert all(native.supports(cpu, dtype) for dtype in DTYPES)
    assert not native.supports(cpu, torch.float64) and not native.supports(torch.device("cuda"), FP32)
    found, what = native.available()
    assert found and _native.isa() in what
