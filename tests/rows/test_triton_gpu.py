"""The Triton rows on real hardware: the checks of the interpreter, and what only hardware can get wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_checks import *  # noqa: E402, F403
from triton_checks import BF16, FP32, Platform, check_gradient, check_stats, oracle, random_logits  # noqa: E402

from fastpref.rows import EXTRAS, RowStats, Tile, Transform, triton_rows  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
VOCAB = 128256


@pytest.fixture
def platform() -> Platform:
    return Platform("cuda", bf16_rounding=2.0**-8)


def normal_logits(rows: int, vocab: int, dtype: torch.dtype, std: float = 3.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(rows, vocab, dtype=dtype, device="cuda", generator=generator).mul_(std)


def test_row_offsets_past_2_31_elements(platform):
    rows = 2**31 // VOCAB + 40
    logits = normal_logits(rows, VOCAB, BF16)
    targets = torch.arange(rows, device="cuda") * 7 % VOCAB
    last = slice(rows - 3, rows)
    want = oracle(logits[last], targets[last], Transform(), None)
    stats = triton_rows.residual(Tile(logits, targets), logits)
    check_stats(RowStats(stats.logp[last], stats.lse[last], None), want)
    check_gradient(platform, stats.scale[last], logits[last], want["grad"])
    big = logits.view(-1)
    tail, head = big[-5:].clone(), big[:5].clone()
    triton_rows.scale_unless_one_(big, torch.full((), 0.5, device="cuda"))
    assert torch.equal(big[-5:], tail / 2) and torch.equal(big[:5], head / 2)


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rising", [False, True])
def test_thousands_of_rows_agree_with_torch_and_with_themselves(out_dtype, in_place, rising):
    """Threads of one program store to the same addresses: at the target, in rescaling, in place. A race shows here as a
    difference between runs or from torch, with targets in every position of a thread's 16 bytes."""
    rows = 1500
    source = normal_logits(rows, VOCAB, FP32)
    if rising:  # each row leaps by 40 nats at two places of its own
        columns = torch.arange(VOCAB, device="cuda")
        for step in (31, 57):
            leap = (torch.arange(rows, device="cuda") * step % 97 * VOCAB // 97)[:, None]
            source.add_((columns >= leap).float(), alpha=40.0)
    targets = torch.arange(rows, device="cuda") * 641 % VOCAB
    want_logp = torch.log_softmax(source, 1).gather(1, targets[:, None])[:, 0]

    def run():
        logits = source.clone()
        if in_place:
            out = logits if out_dtype == FP32 else logits.view(BF16)[:, :VOCAB]
        else:
            out = torch.full_like(logits, torch.nan, dtype=out_dtype)
        stats = triton_rows.residual(Tile(logits, targets), out)
        return stats, out

    (first, first_out), (second, second_out) = run(), run()
    assert torch.equal(first.logp, second.logp) and torch.equal(first.scale, second.scale)
    assert torch.equal(first_out, second_out)
    torch.testing.assert_close(first.logp, want_logp, rtol=2e-6, atol=2e-5)
    for part in range(0, rows, 250):
        chosen = slice(part, part + 250)
        grad = -torch.softmax(source[chosen], 1)
        grad.scatter_add_(1, targets[chosen, None], torch.ones(250, 1, device="cuda"))
        got = first.scale[chosen, None] * first_out[chosen].float()
        relative = 1e-4 if out_dtype == FP32 else (2.0**-8 if not rising else 2.0**-7) + 1e-4
        assert ((got - grad).abs() <= relative * grad.abs() + 3e-7).all()


def test_neither_synchronises_nor_leaves_the_current_stream(platform):
    """Captured in a CUDA graph, where a synchronisation or a launch on another stream is an error, and replayed on new
    data."""
    logits, targets = random_logits(platform, 6, 5000), torch.arange(6, device="cuda")
    out, factor = torch.empty_like(logits), torch.ones((), device="cuda")

    def step():
        stats = triton_rows.residual(Tile(logits, targets), out, extras=EXTRAS)
        triton_rows.scale_rows_(out, stats.scale)
        triton_rows.scale_unless_one_(out, factor)
        return stats

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.copy_(random_logits(platform, 6, 5000, std=2.0))
    factor.fill_(3.0)
    graph.replay()
    captured_out, captured_logp = out.clone(), captured.logp.clone()
    assert torch.equal(step().logp, captured_logp)
    assert torch.equal(out, captured_out)
    want = oracle(logits, targets, Transform(), None)
    torch.testing.assert_close(out.double(), 3 * want["grad"], rtol=1e-4, atol=1e-7)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    other = Platform("cuda:1", bf16_rounding=2.0**-8)
    logits, targets = random_logits(other, 3, 5000), torch.arange(3, device="cuda:1")
    check_stats(
        triton_rows.residual(Tile(logits, targets), None), oracle(logits, targets, Transform(), None)
    )
