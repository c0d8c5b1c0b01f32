"""What the Triton rows must do, against fp64 mathematics. Run on the CPU by test_triton_interpreter.py and on a GPU by
test_triton_gpu.py, which define the fixture `platform`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastpref.rows import EXTRAS, FoldState, RowStats, Tile, Transform, fold_finish, triton_rows

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IGNORE = -100


@dataclass(frozen=True)
class Platform:
    device: str
    bf16_rounding: float  # largest relative error of one store: half an ulp, a whole one where stores truncate

    def rounding(self, dtype: torch.dtype) -> float:
        return {FP32: 2.0**-24, BF16: self.bf16_rounding, FP16: 2.0**-11}[dtype]


VARIANTS = {
    "plain": (Transform(), False),
    "scaled": (Transform(logit_scale=0.7, temperature=1.3), False),
    "bias": (Transform(), True),
    "softcap": (Transform(softcap=5.0), False),
    "all": (Transform(logit_scale=1.5, softcap=8.0, temperature=0.6), True),
}


def oracle(logits: Tensor, targets: Tensor, transform: Transform, bias: Tensor | None) -> dict[str, Tensor]:
    """fp64 statistics and d logp / d logits (by autograd) of rows that all have a valid target."""
    x = logits.detach().double().requires_grad_()
    z = x + (0.0 if bias is None else bias.double())
    z = z * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature
    top = z.max(1, keepdim=True).values
    lse = top[:, 0] + (z - top).exp().sum(1).log()
    z_y = z.gather(1, targets[:, None])[:, 0]
    # logp = -log(1 + sum of the others / E_y), so that its derivative keeps its relative precision where p_y is near 1.
    others = torch.ones_like(z).scatter(1, targets[:, None], 0.0).bool()
    relative = torch.where(others, z - z_y[:, None], -torch.inf)
    logp = -torch.nn.functional.softplus(torch.logsumexp(relative, 1), threshold=1e9) if z.shape[1] > 1 else z_y - z_y
    (grad,) = torch.autograd.grad(logp.sum(), x)
    log_p = (z - lse[:, None]).detach()
    p = log_p.exp()
    return {
        "logp": logp.detach(),
        "lse": lse.detach(),
        "grad": grad,
        "entropy": -(p * log_p.masked_fill(p == 0, 0.0)).sum(1),
        "top1": (z.argmax(1) == targets).double(),
        "mean_logit": z.detach().mean(1),
        "log_sum_p2": (p * p).sum(1).log(),
    }


def random_logits(platform: Platform, rows: int, vocab: int, dtype: torch.dtype = FP32, std: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocab)
    return (std * torch.randn(rows, vocab, generator=generator)).to(platform.device, dtype)


def random_targets(platform: Platform, rows: int, vocab: int) -> Tensor:
    """First and last column, then anything."""
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows + vocab))
    targets[0], targets[-1] = 0, vocab - 1
    return targets.to(platform.device)


def check_stats(stats: RowStats, want: dict[str, Tensor], names: tuple[str, ...] = ("logp", "lse")) -> None:
    for name in names:
        got = getattr(stats, name)
        assert got.dtype == FP32
        torch.testing.assert_close(got.double(), want[name], rtol=2e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


def check_gradient(platform: Platform, scale: Tensor, out: Tensor, grad: Tensor, roundings: int = 1) -> None:
    """Every element within the rounding of `out`, an fp32 z and exp, and what fp16 cannot hold beside the largest."""
    scale = scale.double()[:, None]
    distance = grad.abs().clamp_min(1e-37).log().abs()  # about |z - m|, whose ulps are the relative error of exp
    relative = 1.01 * roundings * platform.rounding(out.dtype) + 3e-6 + 4e-7 * distance
    allowed = relative * grad.abs() + 1e-37 + (2.0**-24 * scale.abs() if out.dtype == FP16 else 0.0)
    got = scale * out.double()
    worst = ((got - grad).abs() - allowed).max()
    assert worst <= 0, f"{worst} beyond what rounding explains"


# ---- residual


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4096, 4097, 10007])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_residual_of_every_width(platform, vocab, variant):
    transform, has_bias = VARIANTS[variant]
    rows = 3
    logits, targets = random_logits(platform, rows, vocab), random_targets(platform, rows, vocab)
    bias = random_logits(platform, 1, vocab, std=1.0)[0] if has_bias else None
    want = oracle(logits, targets, transform, bias)
    out = torch.full_like(logits, torch.nan, dtype=BF16)
    stats = triton_rows.residual(Tile(logits, targets, transform, bias), out, extras=EXTRAS)
    check_stats(stats, want, ("logp", "lse", *EXTRAS))
    check_gradient(platform, stats.scale, out, want["grad"])


@pytest.mark.parametrize(
    ("in_dtype", "out_dtype"),
    [(FP32, FP32), (FP32, FP16), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, None), (BF16, None)],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_of_every_dtype(platform, in_dtype, out_dtype, variant):
    transform, has_bias = VARIANTS[variant]
    rows, vocab = 2, 4999
    logits, targets = random_logits(platform, rows, vocab, in_dtype), random_targets(platform, rows, vocab)
    bias = random_logits(platform, 1, vocab, in_dtype, std=1.0)[0] if has_bias else None
    want = oracle(logits, targets, transform, bias)
    out = None if out_dtype is None else torch.full_like(logits, torch.nan, dtype=out_dtype)
    stats = triton_rows.residual(Tile(logits, targets, transform, bias), out)
    check_stats(stats, want)
    assert stats[3:] == (None,) * 4
    if out is None:
        assert stats.scale is None
    else:
        check_gradient(platform, stats.scale, out, want["grad"])


@pytest.mark.parametrize("extra", EXTRAS)
def test_one_extra_alone(platform, extra):
    logits, targets = random_logits(platform, 3, 5000), random_targets(platform, 3, 5000)
    logits[1, targets[1]] = logits[1].max() + 1
    logits[2, 4] = -torch.inf
    want = oracle(logits, targets, Transform(), None)
    stats = triton_rows.residual(Tile(logits, targets), None, extras=(extra,))
    check_stats(stats, want, ("logp", "lse", extra))
    assert [name for name in EXTRAS if getattr(stats, name) is not None] == [extra]
    if extra == "top1":
        assert stats.top1.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("vocab", [1, 5, 4099, 10007])
def test_top1_is_what_argmax_picks(platform, variant, vocab):
    """Whole numbers from -2 to 2: every row's maximum stands in many columns."""
    transform, has_bias = VARIANTS[variant]
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-2, 3, (6, vocab), generator=generator).to(platform.device, BF16)
    logits[5] = 1.5
    bias = (torch.arange(vocab, device=platform.device) % 3).float() if has_bias else None
    z = logits.float() + (0.0 if bias is None else bias)  # exact, and the rest of the transform rises with it
    first, last = z.argmax(1), vocab - 1 - z.flip(1).argmax(1)
    targets = torch.stack([first[0], last[1], (first[2] + 1) % vocab, first[3], last[4], first[5]])
    for extras in (("top1",), EXTRAS):
        stats = triton_rows.residual(Tile(logits, targets, transform, bias), None, extras=extras)
        assert torch.equal(stats.top1, (first == targets).float())
    assert stats.top1[[0, 3, 5]].tolist() == [1.0] * 3
    assert vocab == 1 or stats.top1.sum() < 6
    outside = torch.full_like(targets, vocab)
    stats = triton_rows.residual(Tile(logits, outside, transform, bias), None, extras=("top1",))
    assert not stats.top1.any()


def test_rows_that_do_not_count(platform):
    vocab = 5000
    logits = random_logits(platform, 7, vocab)
    targets = torch.tensor([3, IGNORE, vocab, -1, 2**40, IGNORE, 4999], device=platform.device)
    logits[1], logits[5] = torch.nan, torch.inf
    for out_dtype in (FP32, BF16, None):
        out = None if out_dtype is None else torch.full_like(logits, torch.nan, dtype=out_dtype)
        stats = triton_rows.residual(Tile(logits, targets, Transform(softcap=9.0)), out, extras=EXTRAS)
        for name in ("logp", "lse", *EXTRAS):
            assert getattr(stats, name)[[1, 5]].tolist() == [0.0, 0.0], name
        assert stats.logp.isnan().tolist() == [False, False, True, True, True, False, False]
        assert stats.lse.isfinite().all()
        if out is None:
            continue
        assert stats.scale[[1, 5]].tolist() == [0.0, 0.0]
        assert (out[[1, 5]] == 0).all()
        z = 9.0 * torch.tanh(logits[2:5].double() / 9.0)
        minus_softmax = -torch.softmax(z, 1) * (1 - torch.tanh(logits[2:5].double() / 9.0) ** 2)
        check_gradient(platform, stats.scale[2:5], out[2:5], minus_softmax)


def test_nan_and_inf_stay_in_their_row(platform):
    logits, targets = random_logits(platform, 5, 5000), random_targets(platform, 5, 5000)
    clean_out, out = torch.empty_like(logits), torch.empty_like(logits)
    clean = triton_rows.residual(Tile(logits, targets), clean_out, extras=EXTRAS)
    logits[1, 4444] = torch.nan
    logits[2, 17] = torch.inf
    logits[3] = -torch.inf
    stats = triton_rows.residual(Tile(logits, targets), out, extras=EXTRAS)
    assert not stats.logp[1:4].isfinite().any()
    assert stats.top1[1] == 0
    for name, value in stats._asdict().items():
        assert torch.equal(value[[0, 4]], getattr(clean, name)[[0, 4]]), name
    assert torch.equal(out[[0, 4]], clean_out[[0, 4]])


def test_columns_of_probability_zero(platform):
    logits, targets = random_logits(platform, 2, 10007), random_targets(platform, 2, 10007)
    logits[:, 1:4096] = -torch.inf
    logits[0, 0] = -torch.inf  # the whole first block of row 0, its target included
    logits[1, 9000:9005] = -torch.inf
    out = torch.empty_like(logits)
    stats = triton_rows.residual(Tile(logits, targets), out, extras=("entropy", "log_sum_p2"))
    assert stats.logp[0] == -torch.inf
    assert (out[logits == -torch.inf][1:] == 0).all()
    want = oracle(logits[1:], targets[1:], Transform(), None)
    second = RowStats(*(None if value is None else value[1:] for value in stats))
    check_stats(second, want, ("logp", "lse", "entropy", "log_sum_p2"))
    check_gradient(platform, second.scale, out[1:], want["grad"])


def rising_logits(platform: Platform, vocab: int) -> Tensor:
    """Maxima that rise by 40, by 100 once the sweep is half done, in the last column, everywhere, and not at all."""
    logits = random_logits(platform, 5, vocab, std=1.0)
    logits[0, vocab // 2 :] += 40
    logits[1, vocab // 3 :] += 100
    logits[1, vocab // 2 :] += 100
    logits[2, -1] += 200
    logits[3] += torch.linspace(0, 300, vocab, device=platform.device)
    return logits


@pytest.mark.parametrize("out_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["", "extras"])
@pytest.mark.parametrize("vocab", [13008, 13001])  # the last 9 columns of 13001 have a say in the first m already
def test_a_maximum_that_rises_late(platform, out_dtype, extras, vocab):
    logits = rising_logits(platform, vocab)
    targets = torch.tensor([5, vocab - 7, vocab - 1, 6000, 8192], device=platform.device)
    want = oracle(logits, targets, Transform(), None)
    out = torch.full_like(logits, torch.nan, dtype=out_dtype)
    stats = triton_rows.residual(Tile(logits, targets), out, extras=extras)
    check_stats(stats, want, ("logp", "lse", *extras))
    check_gradient(platform, stats.scale, out, want["grad"], roundings=1 if out_dtype == FP32 else 4)


def test_fp16_holds_rows_of_equal_logits(platform):
    # E[y] - s = -(vocab - 1) times the largest E: beyond 65504 unless E is kept small.
    vocab = 70000
    logits = torch.full((1, vocab), 2.5, device=platform.device)
    targets = torch.tensor([1234], device=platform.device)
    out = torch.empty(1, vocab, dtype=FP16, device=platform.device)
    stats = triton_rows.residual(Tile(logits, targets), out)
    assert out.isfinite().all()
    check_gradient(platform, stats.scale, out, oracle(logits, targets, Transform(), None)["grad"])


def test_large_and_confident_logits(platform):
    vocab = 4097
    logits, targets = random_logits(platform, 4, vocab), random_targets(platform, 4, vocab)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, targets[2]] = logits[2].max() + 40  # p = 1 - 1e-14
    logits[3, 17] = logits[3].max() + 60  # confidently wrong
    want = oracle(logits, targets, Transform(), None)
    out = torch.empty_like(logits)
    stats = triton_rows.residual(Tile(logits, targets), out)
    torch.testing.assert_close(stats.logp.double(), want["logp"], rtol=1e-6, atol=2e-6)
    check_gradient(platform, stats.scale, out, want["grad"])
    # The log-prob of row 2 is too near 0 for fp32; its residual at the target is not.
    assert 0 < -stats.scale[2] * -out[2, targets[2]] < 1e-12


def test_logits_at_the_end_of_the_range(platform):
    logits = torch.full((2, 4096), 3e38, device=platform.device)
    logits[1] = -3e38
    targets = torch.tensor([5, 4000], device=platform.device)
    stats = triton_rows.residual(Tile(logits, targets), None, extras=("entropy",))
    torch.testing.assert_close(stats.logp, torch.full_like(stats.logp, -math.log(4096)))
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.logp, math.log(4096)))


@pytest.mark.parametrize(
    ("vocab", "stride", "offset"), [(5000, 5008, 0), (5003, 5008, 0), (5003, 5003, 0), (5003, 5010, 0), (5000, 5008, 1)]
)
def test_rows_of_any_stride_and_alignment(platform, vocab, stride, offset):
    rows = 3
    targets = random_targets(platform, rows, vocab)

    def strided(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        memory = torch.full((offset + (rows + 1) * stride,), 77.0, dtype=dtype, device=platform.device)
        return memory, memory[offset : offset + rows * stride].view(rows, stride)[:, :vocab]

    _, logits = strided(FP32)
    logits.copy_(random_logits(platform, rows, vocab))
    want = oracle(logits, targets, Transform(), None)
    for dtype in (FP32, BF16):
        memory, out = strided(dtype)
        stats = triton_rows.residual(Tile(logits, targets), out)
        check_stats(stats, want)
        check_gradient(platform, stats.scale, out, want["grad"])
        out.fill_(77.0)
        assert (memory == 77.0).all()  # nothing outside the rows was written


@pytest.mark.parametrize("variant", ["plain", "softcap"])
@pytest.mark.parametrize("vocab", [13008, 13001])
def test_in_place_equals_out_of_place(platform, variant, vocab):
    transform, _ = VARIANTS[variant]
    targets = torch.tensor([5, IGNORE, vocab - 1, vocab, 8192], device=platform.device)
    for dtype, out_dtype in ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)):
        logits = torch.zeros(5, 13008, dtype=dtype, device=platform.device)[:, :vocab]
        logits.copy_(rising_logits(platform, vocab))
        out = torch.empty(5, 13008, dtype=out_dtype, device=platform.device)[:, :vocab]
        apart = triton_rows.residual(Tile(logits, targets, transform), out)
        # Columns of the narrower dtype over the first half of each row's own memory.
        over = logits if dtype == out_dtype else logits.as_strided((5, 13008), (13008, 1)).view(out_dtype)[:, :vocab]
        within = triton_rows.residual(Tile(logits, targets, transform), over)
        assert torch.equal(over, out), (dtype, out_dtype)
        for got, want in zip(within[:3], apart[:3], strict=True):
            assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0))


def test_empty_tiles(platform):
    empty = torch.empty(0, 50, device=platform.device)
    targets = torch.empty(0, dtype=torch.int64, device=platform.device)
    stats = triton_rows.residual(Tile(empty, targets), empty)
    assert stats.logp.shape == stats.lse.shape == stats.scale.shape == (0,)
    narrow = torch.empty(2, 0, device=platform.device)
    targets = torch.tensor([0, IGNORE], device=platform.device)
    stats = triton_rows.residual(Tile(narrow, targets), narrow)
    assert stats.logp.isnan().tolist() == [True, False]
    assert stats.lse.tolist() == [-torch.inf, 0.0]


# ---- fold and residual_given_lse


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_slices_of_the_vocabulary(platform, dtype, variant):
    transform, has_bias = VARIANTS[variant]
    vocab, edges = 10007, (0, 3000, 7097, 10007)
    logits = rising_logits(platform, vocab).to(dtype)
    bias = random_logits(platform, 1, vocab, std=1.0)[0] if has_bias else None
    targets = torch.tensor([5, 3000, 7096, IGNORE, vocab], device=platform.device)
    logits[3] = torch.nan
    counted = slice(0, 3)
    want = oracle(logits[counted], targets[counted], transform, bias)
    slices = [
        Tile(logits[:, a:b], targets, transform, None if bias is None else bias[a:b], col_offset=a)
        for a, b in zip(edges, edges[1:], strict=False)
    ]

    state = FoldState.new(5, dtype=FP32, device=logits.device)
    for part in slices:
        triton_rows.fold(part, state)
    logp, lse = fold_finish(state, targets, IGNORE)
    check_stats(RowStats(logp[counted], lse[counted], None), want)
    assert logp[3] == lse[3] == 0 and logp[4].isnan() and lse[4].isfinite()

    exact_lse = torch.cat([want["lse"], lse[3:].double()]).float()
    for out_dtype in (dtype, BF16):
        out = torch.full((5, 10016), torch.nan, dtype=out_dtype, device=platform.device)
        for part, a, b in zip(slices, edges, edges[1:], strict=False):
            triton_rows.residual_given_lse(part, exact_lse, out[:, a:b])
        assert (out[3, :vocab] == 0).all() and out[:, vocab:].isnan().all()
        grad = transform.row_factor * out[counted, :vocab].double()
        # lse is rounded to fp32: half an ulp of 300 is 1.5e-5 nat; and 1 - p cancels at the target.
        allowed = (1.01 * platform.rounding(out_dtype) + 4e-5) * want["grad"].abs() + 2e-7
        assert ((grad - want["grad"]).abs() <= allowed).all()
    if dtype == FP32:
        inplace = logits.clone()
        out = torch.empty_like(logits)
        triton_rows.residual_given_lse(Tile(logits, targets, transform, bias), exact_lse, out)
        triton_rows.residual_given_lse(Tile(inplace, targets, transform, bias), exact_lse, inplace)
        assert torch.equal(inplace, out)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_slices_with_the_entropy_gradient(platform, dtype, variant):
    transform, has_bias = VARIANTS[variant]
    vocab, edges = 10007, (0, 3000, 7097, 10007)
    logits = random_logits(platform, 5, vocab, dtype)
    logits[1, 8000] = 14.0  # a probability near 1
    bias = random_logits(platform, 1, vocab, std=1.0)[0] if has_bias else None
    targets = torch.tensor([5, 8000, 7096, 9000, IGNORE], device=platform.device)
    gl, gh = (torch.tensor(g, device=platform.device) for g in ([1.0, -0.6, 0.0, 0.8, 1.0], [0.5, 1.0, -1.0, 0.0, 1.0]))
    counted = slice(0, 4)

    x = logits[counted].double().requires_grad_()
    z = (x + (0.0 if bias is None else bias.double())) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_p = torch.log_softmax(z / transform.temperature, 1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    value = gl[counted] * log_p.gather(1, targets[counted, None])[:, 0] + gh[counted] * entropy
    (want,) = torch.autograd.grad(value.sum(), x)
    size = p * (gl[counted, None].abs() + gh[counted, None].abs() * (log_p.abs() + entropy[:, None]))
    size.scatter_add_(1, targets[counted, None], gl[counted, None].double().abs())

    lse = oracle(logits[counted], targets[counted], transform, bias)["lse"]
    vectors = dict(lse=lse, entropy=entropy.detach())
    vectors = {name: torch.cat([vector.float(), gl[4:]]) for name, vector in vectors.items()}
    logits[4] = torch.nan
    for out_dtype in (dtype, BF16, FP16):
        out = torch.full((5, 10016), torch.nan, dtype=out_dtype, device=platform.device)
        for a, b in zip(edges, edges[1:], strict=False):
            part = Tile(logits[:, a:b], targets, transform, None if bias is None else bias[a:b], col_offset=a)
            triton_rows.gradient_given_lse(part, grad_logps=gl, grad_entropy=gh, out=out[:, a:b], **vectors)
        assert (out[4, :vocab] == 0).all() and out[:, vocab:].isnan().all()
        error = (transform.row_factor * out[counted, :vocab].double() - want).abs()
        smallest = 2.0**-24 * transform.row_factor if out_dtype == FP16 else 0.0
        allowed = 1.01 * platform.rounding(out_dtype) * want.abs() + 1.2e-5 * size.detach() + smallest + 1e-12
        assert (error <= allowed).all()


def test_columns_without_probability_have_no_entropy_gradient(platform):
    logits, targets = random_logits(platform, 2, 5000), random_targets(platform, 2, 5000)
    logits[:, 100:4200] = -torch.inf
    stats = triton_rows.residual(Tile(logits, targets), None, extras=("entropy",))
    ones, out = torch.ones_like(stats.lse), torch.empty_like(logits)
    triton_rows.gradient_given_lse(Tile(logits, targets), stats.lse, stats.entropy, ones, ones, out)
    assert out.isfinite().all() and (out[:, 100:4200] == 0).all()
    torch.testing.assert_close(out.sum(1), torch.zeros_like(ones), rtol=0, atol=2e-5)


def test_a_nan_survives_later_slices(platform):
    logits = random_logits(platform, 3, 3000)
    targets = torch.tensor([2999, 0, 7], device=platform.device)
    logits[0, 5], logits[1, 2500] = torch.nan, torch.inf
    state = FoldState.new(3, dtype=FP32, device=logits.device)
    for a in (0, 1000, 2000):
        triton_rows.fold(Tile(logits[:, a : a + 1000], targets, col_offset=a), state)
    logp, _ = fold_finish(state, targets, IGNORE)
    assert logp.isfinite().tolist() == [False, False, True]


# ---- helpers of the head


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("width", [1, 3584, 4096, 4099])
def test_scale_rows(platform, dtype, width):
    x = random_logits(platform, 4, width, dtype)
    w = torch.tensor([0.0, -1.5, 1e-3, -0.0], device=platform.device)
    want = x.double() * w.double()[:, None]
    x[0], x[3, 0] = torch.nan, torch.inf
    want[0], want[3] = 0.0, 0.0
    for out_dtype in (dtype, BF16):
        out = torch.full_like(x, torch.nan, dtype=out_dtype)
        assert triton_rows.scale_rows_(x, w, out) is out
        assert (out[[0, 3]] == 0).all()
        error = (out.double() - want).abs()
        assert (error <= 1.01 * platform.rounding(out_dtype) * want.abs() + 6e-8).all()
    expected = torch.full_like(x, torch.nan)
    triton_rows.scale_rows_(x, w, expected)
    assert triton_rows.scale_rows_(x, w) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_scale_unless_one(platform, dtype):
    for size in (1, 4096, 10007):
        x = random_logits(platform, 1, size, dtype)[0]
        before = x.clone()
        x[0] = torch.nan
        triton_rows.scale_unless_one_(x, torch.ones((), device=platform.device))
        assert torch.equal(x[1:], before[1:]) and x[0].isnan()
        x.copy_(before)
        triton_rows.scale_unless_one_(x, torch.tensor(-0.3, device=platform.device))
        want = before.double() * torch.tensor(-0.3).double().item()
        assert ((x.double() - want).abs() <= 1.01 * platform.rounding(dtype) * want.abs() + 6e-8).all()
    transposed = random_logits(platform, 6, 7, dtype).t()
    want = transposed * torch.tensor(2.0, device=platform.device)
    assert torch.equal(triton_rows.scale_unless_one_(transposed, torch.full((1,), 2.0, device=platform.device)), want)


# ---- what tail.py asks of residuals


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("width, stride", [(1, 1), (130, 136), (1000, 1001), (4099, 4104)])
def test_columns_taken_apart(platform, dtype, width, stride):
    stash = random_logits(platform, 37, stride, dtype)[:, :width]
    scale = torch.linspace(-1.5, 1.5, 37, device=platform.device)
    scale[3], scale[9], scale[18] = torch.nan, torch.inf, 0.0
    stash[9] = torch.nan
    peak, total, squares = torch.full((3, width), torch.nan, device=platform.device)
    triton_rows.peaks(stash, scale, peak, total, squares)
    u = (stash.double() * scale.double()[:, None])[[r for r in range(37) if r not in (3, 9, 18)]]
    torch.testing.assert_close(peak.double(), u.abs().amax(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), u.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), u.square().sum(0), rtol=1e-5, atol=0)
    for columns in (torch.arange(0, width, 3), torch.arange(width)):
        columns = columns.int().to(platform.device)
        active, rest = stash.new_full((37, len(columns)), torch.nan), torch.ones(37, device=platform.device)
        triton_rows.split(stash, columns, active, rest)
        assert torch.equal(active.nan_to_num(7.0), stash[:, columns.long()].nan_to_num(7.0))
        others = sorted(set(range(width)) - set(columns.tolist()))
        torch.testing.assert_close(
            rest.double(), 1 + stash[:, others].double().sum(1), rtol=1e-5, atol=1e-4, equal_nan=True
        )
        columns = columns[:: max(1, len(columns) // 100)].contiguous()  # a program each
        totals, part = torch.rand(width, 33, device=platform.device), random_logits(platform, len(columns), 33, dtype)
        want = totals.clone()
        want[columns.long()] += part.float()
        triton_rows.add_rows(totals, part, columns)
        assert torch.equal(totals, want)


# ---- bad input


def test_bad_input_is_named(platform):
    logits, targets = random_logits(platform, 4, 64), random_targets(platform, 4, 64)

    def residual(logits=logits, targets=targets, out=None, bias=None, extras=()):
        triton_rows.residual(Tile(logits, targets, bias=bias), out, extras)

    for error, match, call in (
        (ValueError, r"logits is \[64\]", lambda: residual(logits[0])),
        (TypeError, "logits is torch.float64", lambda: residual(logits.double())),
        (ValueError, "contiguous columns", lambda: residual(logits[:, ::2])),
        (ValueError, r"targets is \[3\]", lambda: residual(targets=targets[:3])),
        (TypeError, "targets is torch.int32", lambda: residual(targets=targets.int())),
        (ValueError, r"bias is \[63\]", lambda: residual(bias=logits[0, 1:])),
        (ValueError, r"out is \[4, 32\]", lambda: residual(out=logits[:, :32])),
        (ValueError, "out is on meta", lambda: residual(out=torch.empty(4, 64, device="meta"))),
        (ValueError, "out overlaps logits", lambda: residual(logits[:3], targets[:3], logits[1:])),
        (ValueError, "out overlaps logits", lambda: residual(out=logits.view(BF16)[:, 64:])),
        (ValueError, "extras has", lambda: residual(extras=("entropy", "perplexity"))),
        (
            ValueError,
            "out overlaps logits",
            lambda: triton_rows.residual_given_lse(
                Tile(logits, targets), logits[:, 0].clone(), logits.view(BF16)[:, :64]
            ),
        ),
        (TypeError, "w is torch.int64", lambda: triton_rows.scale_rows_(logits, targets)),
        (ValueError, "factor is", lambda: triton_rows.scale_unless_one_(logits, logits[0])),
    ):
        with pytest.raises(error, match=match):
            call()
