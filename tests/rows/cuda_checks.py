"""What the CUDA rows must do beyond the contract of test_rows.py. Run on a CPU under emulated thread blocks by
test_cuda_build.py and on a GPU by test_cuda_gpu.py, which define `kernels`: fastpref.rows.cuda for CPU tensors."""

from __future__ import annotations

import pytest
import torch
from row_checks import BF16, DTYPES, FP16, FP32, TRANSFORMS, check_grad, check_stats, oracle, random_case, spikes

from fastpref.rows import EXTRAS, Tile, Transform


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same rows, `by` elements off a 16-byte boundary."""
    rows, cols = tensor.shape
    wide = torch.full((rows, cols + by + 7 - (cols + by + 6) % 8), torch.nan, dtype=tensor.dtype)
    return wide[:, by : by + cols].copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_log_probs_do_not_depend_on_what_is_written_or_where(kernels, dtype, softcap):
    logits, targets, bias = random_case(3, 9217, dtype, std=6.0)
    logits[1, 8000] = 45.0 if softcap is None else logits[1, 8000]  # m moves
    maths = Transform(softcap=softcap), bias
    tile = Tile(logits, targets, *maths)
    want = kernels.residual(tile, None, cluster=False)
    for out_dtype in DTYPES:
        for shift in (0, 1, 2):
            moved = shifted(logits, shift)
            out = shifted(torch.empty(3, 9217, dtype=out_dtype), 1 - shift % 2)
            got = kernels.residual(Tile(moved, targets, *maths), out, cluster=False)
            assert torch.equal(got.logp, want.logp) and torch.equal(got.lse, want.lse), (out_dtype, shift)
    extras = kernels.residual(tile, None, extras=EXTRAS, cluster=False)
    assert torch.equal(extras.logp, want.logp)
    rest = [0, 2]  # where m does not move the cluster adds up the same numbers, in fp64 in another order
    clustered = kernels.residual(tile, None, cluster=True)
    torch.testing.assert_close(clustered.logp[rest], want.logp[rest], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("cluster", [False, True])
def test_a_narrower_row_over_its_own_logits(kernels, cluster):
    for vocab in (200, 700, 9003):
        base, targets, _ = random_case(3, vocab)
        base[2] = spikes(base[2:].clone(), vocab // 2, vocab // 5, 40.0)
        for out_dtype in (BF16, FP16):
            logits = torch.zeros(3, vocab + 13)[:, :vocab].copy_(base)
            apart = torch.empty(3, vocab, dtype=out_dtype)
            stats = kernels.residual(Tile(logits, targets), apart, cluster=cluster)
            over = logits.as_strided((3, vocab + 13), (vocab + 13, 1)).view(out_dtype)[:, :vocab]
            within = kernels.residual(Tile(logits, targets), over, cluster=cluster)
            assert torch.equal(over, apart)
            assert all(torch.equal(a, b) for a, b in zip(within[:3], stats[:3], strict=True))
        logits = torch.zeros(3, vocab + 13)[:, :vocab].copy_(base)
        lse, apart = stats.lse.contiguous(), torch.empty(3, vocab, dtype=BF16)
        kernels.residual_given_lse(Tile(logits, targets), lse, apart)
        over = logits.as_strided((3, vocab + 13), (vocab + 13, 1)).view(BF16)[:, :vocab]
        kernels.residual_given_lse(Tile(logits, targets), lse, over)
        assert torch.equal(over, apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cluster", [False, True])
def test_the_target_in_every_place_of_a_unit(kernels, dtype, cluster):
    vocab = 600
    places = [0, 1, 3, 4, 7, 8, 9, 63, 64, 126, 127, 128, 129, 131, 132, 252, 255, 256, 383, 384, 511, 512, 513, 599]
    logits, _, _ = random_case(len(places), vocab, dtype)
    targets = torch.tensor(places)
    want = oracle(logits, targets, Transform(softcap=7.0))
    for out_dtype in (dtype, BF16):
        out = torch.empty(len(places), vocab, dtype=out_dtype)
        stats = kernels.residual(Tile(logits, targets, Transform(softcap=7.0)), out, cluster=cluster)
        check_stats(stats, want)
        check_grad(stats.scale, out, want, stores=2 if out_dtype == FP16 else 1)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_cluster_writes_normalised_rows(kernels, name):
    transform, with_bias = TRANSFORMS[name]
    logits, targets, bias = random_case(3, 9001)
    bias = bias if with_bias else None
    want = oracle(logits, targets, transform, bias)
    for out_dtype, gain in ((FP32, 1.0), (BF16, 1.0), (FP16, 2.0**15)):
        out = torch.empty(3, 9001, dtype=out_dtype)
        stats = kernels.residual(Tile(logits, targets, transform, bias), out, cluster=True)
        torch.testing.assert_close(stats.scale, torch.full((3,), -transform.row_factor / gain))
        check_grad(stats.scale, out, want)


@pytest.mark.parametrize("cluster", [False, True])
def test_fp16_holds_small_probabilities_beside_large_ones(kernels, cluster):
    vocab = 9001
    for spread in (0.0, 6.0, 12.0):  # from uniform to p = 1 beside p = e^-12
        logits = torch.linspace(-spread, 0.0, vocab).repeat(2, 1)
        targets = torch.tensor([17, vocab - 1])
        want = oracle(logits, targets, Transform())
        out = torch.empty(2, vocab, dtype=FP16)
        stats = kernels.residual(Tile(logits, targets), out, cluster=cluster)
        grad = stats.scale.double()[:, None] * out.double()
        relative = ((grad - want["grad"]) / want["grad"]).abs()
        assert float(relative[want["grad"].abs() > 2e-7].max()) < 2.0**-10


def test_cluster_and_block_agree(kernels):
    logits, targets, bias = random_case(4, 13001, std=5.0)
    logits[3] = spikes(logits[3:].clone(), 6000, 2500, 40.0)
    one, other = (torch.empty(4, 13001) for _ in range(2))
    tile = Tile(logits, targets, Transform(temperature=0.7), bias)
    block = kernels.residual(tile, one, extras=EXTRAS, cluster=False)
    cluster = kernels.residual(tile, other, extras=EXTRAS, cluster=True)
    for name in ("logp", "lse", *EXTRAS):
        torch.testing.assert_close(getattr(block, name), getattr(cluster, name), rtol=1e-5, atol=4e-6)
    torch.testing.assert_close(block.scale[:, None] * one, cluster.scale[:, None] * other, rtol=2e-5, atol=1e-9)
