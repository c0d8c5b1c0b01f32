"""The CUDA rows on a GPU: the whole contract of test_rows.py, cuda_checks.py, and what only hardware shows.

compute-sanitizer --tool memcheck  python -m pytest -m gpu tests/rows/test_cuda_gpu.py -k "width or place or over"
compute-sanitizer --tool racecheck python -m pytest -m gpu tests/rows/test_cuda_gpu.py -k "place or over"
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import pytest
import test_rows
import torch
from cuda_checks import *  # noqa: F403
from row_checks import BF16, FP16, FP32, check_grad, check_stats, oracle, random_case

from fastpref.rows import EXTRAS, FoldState, RowStats, Tile, Transform, cuda, fold_finish

SLICES = ("fold", "residual_given_lse", "gradient_given_lse")
AVAILABLE, WHY = cuda.available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason=WHY)]


class OnGpu:
    """Copies of CPU tensors, storage by storage, so that strides, alignment and what overlaps what stay as they are."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value):
        if isinstance(value, FoldState | Tile):
            return type(value)(*map(self, value))
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = host, host.cuda()
        there = self.storages[storage.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=value.dtype, device="cuda").set_(
            there, value.storage_offset(), value.shape, value.stride()
        )

    def copy_back(self) -> None:
        for host, device in self.storages.values():
            host.copy_(device)


def on_gpu(function):
    @functools.wraps(function)
    def call(*args, **options):
        move = OnGpu()
        result = function(*map(move, args), **{name: move(value) for name, value in options.items()})
        move.copy_back()
        return RowStats(*(v if v is None else v.cpu() for v in result)) if isinstance(result, RowStats) else result

    return call


def residual(tile, out, extras=(), *, cluster=None):
    if cluster and cuda._cluster_size(tile.logits.dtype, tile.logits.shape[1], tile.logits.device.index) == 0:
        pytest.skip("this device has no thread block clusters")
    return cuda.residual(tile, out, extras, cluster=cluster)


@pytest.fixture
def kernels():
    slices = {name: getattr(cuda, name) for name in SLICES}
    return SimpleNamespace(**{name: on_gpu(function) for name, function in {"residual": residual, **slices}.items()})


@pytest.fixture(params=["chosen", "block", "cluster"])
def rows(request, kernels):
    cluster = {"chosen": None, "block": False, "cluster": True}[request.param]
    residual = functools.partial(kernels.residual, cluster=cluster)
    return SimpleNamespace(residual=residual, **{name: getattr(kernels, name) for name in SLICES})


# The whole contract.
globals().update({name: test for name, test in vars(test_rows).items() if name.startswith("test_")})


def big_case(rows: int, vocab: int, dtype: torch.dtype = FP32):
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = torch.empty(rows, vocab, dtype=dtype, device="cuda").normal_(0, 4, generator=generator)
    targets = torch.randint(vocab, (rows,), device="cuda", generator=generator)
    return logits, targets


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 152064, 256000, 400_000])
def test_vocabularies_of_models(vocab, cluster):
    for dtype, out_dtype in ((FP32, BF16), (BF16, BF16), (FP32, FP16)):
        logits, targets = big_case(32, vocab, dtype)
        out = torch.empty(32, vocab, dtype=out_dtype, device="cuda")
        stats = residual(Tile(logits, targets, Transform(softcap=30.0)), out, EXTRAS, cluster=cluster)
        want = oracle(logits, targets, Transform(softcap=30.0))
        check_stats(stats, want, ("logp", "lse", *EXTRAS))
        check_grad(stats.scale, out, want, stores=2)


def test_more_than_two_to_the_31_logits():
    rows, vocab = 17_000, 128_256
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    logits = torch.zeros(rows, vocab, dtype=BF16, device="cuda")
    targets = torch.full((rows,), 5, device="cuda")
    logits[-1], targets[-1] = big_case(1, vocab, BF16)[0][0], vocab - 1
    want = oracle(logits[-1:], targets[-1:], Transform())
    stats = cuda.residual(Tile(logits, targets), logits)
    last = RowStats(*(None if value is None else value[-1:] for value in stats))
    check_stats(last, want)
    check_grad(last.scale, logits[-1:], want)
    assert bool((stats.logp[:-1] == stats.logp[0]).all())


@pytest.mark.parametrize("cluster", [False, True])
def test_run_to_run_equality(cluster):
    logits, targets = big_case(600, 50257)
    first = None
    for _ in range(5):
        out = torch.empty(600, 50257, dtype=BF16, device="cuda")
        stats = residual(Tile(logits, targets), out, EXTRAS, cluster=cluster)
        first = first or (stats, out)
        assert all(torch.equal(a, b) for a, b in zip(stats, first[0], strict=True)) and torch.equal(out, first[1])


def test_log_probs_do_not_depend_on_the_tile():
    logits, targets = big_case(300, 50257)
    whole = cuda.residual(Tile(logits, targets), torch.empty_like(logits, dtype=BF16)).logp
    parts = zip(logits.split(7), targets.split(7), strict=True)
    parts = [cuda.residual(Tile(rows, of), None).logp for rows, of in parts]
    assert torch.equal(torch.cat(parts), whole)


def test_it_runs_on_the_current_stream_without_waiting():
    logits, targets = big_case(64, 128256)
    out = torch.empty_like(logits, dtype=FP16)
    want = cuda.residual(Tile(logits, targets), out).logp  # and the kernel is loaded
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # 0.1 s
            late.copy_(logits)  # on another stream the kernel would see zeros
            stats = cuda.residual(Tile(late, targets), out)
            assert not stream.query()  # the host did not wait
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(stats.logp, want)


@pytest.mark.parametrize("out_dtype", [BF16, FP16], ids=str)
def test_a_cuda_graph_replays_it(out_dtype):
    logits, targets = big_case(32, 32000)
    out = torch.empty_like(logits, dtype=out_dtype)
    state = FoldState.new(32, dtype=FP32, device=logits.device)
    fresh = [value.clone() for value in state]

    def step():
        stats = cuda.residual(Tile(logits, targets), out)
        for value, start in zip(state, fresh, strict=True):
            value.copy_(start)
        cuda.fold(Tile(logits, targets), state)
        return stats

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.copy_(big_case(32, 32000)[0].flip(0))
    graph.replay()
    want = oracle(logits, targets, Transform())
    check_stats(captured, want)
    check_grad(captured.scale, out, want, stores=2)
    logp, _ = fold_finish(state, targets, -100)
    check_stats(RowStats(logp, captured.lse, None), want)


def test_it_takes_no_memory_but_the_statistics():
    logits, targets = big_case(1024, 128256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cuda.residual(Tile(logits, targets), logits)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 1024


def test_targets_out_of_range_touch_nothing():
    logits, targets = big_case(4, 3000)
    targets[:] = torch.tensor([3000, -1, 2**40, -(2**40)], device="cuda")
    guarded = torch.full((6, 3000), 9.0, device="cuda")
    stats = cuda.residual(Tile(logits, targets), guarded[1:5])
    assert bool(stats.logp.isnan().all() and stats.lse.isfinite().all())
    assert bool((guarded[[0, 5]] == 9).all())


def test_unequal_devices_are_named():
    logits, targets, _ = random_case(2, 64)
    with pytest.raises(ValueError, match="logits is on cpu; it takes cuda"):
        cuda.residual(Tile(logits, targets), None)
    with pytest.raises(ValueError, match="targets is"):
        cuda.residual(Tile(logits.cuda(), targets), None)
    assert inspect.signature(cuda.residual).parameters["cluster"].default is None
