"""The planner's promises as properties, and its FLOP and byte counts against what the profiler sees a call do."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastpref as fp
from fastpref import rows
from fastpref.plan import MIB, Plan, Problem, _Planner, plan
from tests import oracle

# (operands and stash, logits, weight gradient) as they occur: fp32, fp64, bf16 on the CPU and on CUDA, and autocast.
SIZES = [(4, 4, 4), (8, 8, 8), (2, 2, 2), (2, 4, 2), (2, 2, 4), (2, 4, 4)]


quickly = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(0, 300), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0))
    itemsize, logits, grad = draw(st.sampled_from(SIZES))
    return Problem(
        tuple(lengths), draw(st.integers(1, 600)), draw(st.integers(2, 6000)), itemsize, logits, grad,
        needs_hidden_grad=draw(st.booleans()), needs_weight_grad=draw(st.booleans()),
        coupling=draw(st.sampled_from(["pair", "sequence", "batch"])),
        scratches=draw(st.integers(1, 2)), late=draw(st.booleans()),
        gathered=draw(st.booleans()), device=draw(st.sampled_from(["cpu", "cuda"])),
    )


budgets = st.integers(10, 26).flatmap(lambda log: st.integers(2 ** (log - 1), 2**log))


def attempt(problem: Problem, budget: int) -> Plan | int:
    """The plan, or the least budget that the refusal names."""
    try:
        return plan(problem, budget)
    except ValueError as refusal:
        assert "memory_budget" in str(refusal) and "\n" not in str(refusal)
        return int(re.search(r"(\d+)\D*$", str(refusal)).group(1))


@quickly
@given(problems(), budgets)
def test_budget_is_kept_and_every_row_walked_once(problem, budget):
    found = attempt(problem, budget)
    assume(isinstance(found, Plan))
    assert 0 <= found.tile_bytes and found.budget == budget
    if found.tile_bytes > budget and problem.rows:  # only where several groups would take more in all
        assert found.scheme == "groups" and len(found.groups) == 1
        half = len(problem.lengths) // 2
        pairs = [a + b for a, b in zip(problem.lengths, problem.lengths[half:], strict=False)]
        longest = max(pairs if problem.coupling == "pair" else problem.lengths)  # it would take fp32 scratches
        assert problem.grad_itemsize < 4 or longest > _Planner(problem, budget).stash_capacity()
        sums = (1 + problem.scratches) * problem.vocab * problem.hidden * 4
        buffers = problem.vocab * problem.hidden * (problem.itemsize + 4)
        assert found.bytes <= budget + sums + buffers + problem.cast_weight * buffers
    spans = sorted(span for group in found.groups for span in group.segments if span[0] != span[1])
    assert [a for a, _ in spans] == [0, *(b for _, b in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == problem.rows
    assert found.tile_rows >= 1 or problem.rows == 0
    if found.scheme in ("frozen", "groups"):
        assert found.stash_rows >= max((group.rows for group in found.groups if not group.long), default=0)


@quickly
@given(problems(), budgets)
def test_groups_hold_whole_items(problem, budget):
    found = attempt(problem, budget)
    assume(isinstance(found, Plan) and found.scheme in ("groups", "recompute"))
    starts = [0, *itertools.accumulate(problem.lengths)]
    half = len(problem.lengths) // 2
    items = half if problem.coupling == "pair" else len(problem.lengths)
    edges = [group.items for group in found.groups]
    assert [a for a, _ in edges] == [0, *(b for _, b in edges)][: len(edges)] and edges[-1][1] == items
    sequences = [s for a, b in found.order or ((0, len(problem.lengths)),) for s in range(a, b)]
    row_of = [row for s in sequences for row in range(starts[s], starts[s + 1])]  # as walked -> as in the batch
    for group in found.groups:
        first, last = group.items
        expected = range(first, last)
        if problem.coupling == "pair":
            expected = [*expected, *range(half + first, half + last)]
        held = [s for a, b in group.sequences for s in range(a, b)] if problem.coupling != "batch" else list(expected)
        assert held == list(expected)
        assert not group.long or last - first == 1
        walked = [row_of[row] for a, b in group.segments for row in range(a, b)]
        assert walked == [row for s in expected for row in range(starts[s], starts[s + 1])]
    if problem.coupling == "batch" or problem.late:
        assert len(found.groups) == 1


@quickly
@given(problems(), budgets)
def test_gemm_count_of_each_scheme(problem, budget):
    found = attempt(problem, budget)
    assume(isinstance(found, Plan) and problem.rows > 0)
    hidden, weight = problem.needs_hidden_grad, problem.needs_weight_grad
    assert found.flops == pytest.approx(found.gemms * 2 * problem.rows * problem.vocab * problem.hidden)
    if not (hidden or weight):
        assert found.scheme == "forward" and found.gemms == 1
    elif not weight:
        assert found.scheme == "frozen" and found.gemms == 2
    elif found.scheme == "groups":
        assert found.gemms == 2 + hidden
    else:
        assert found.scheme == "recompute"
        assert found.gemms == pytest.approx(3 + hidden - found.stash_rows / problem.rows)
        assert 0 <= found.stash_rows <= problem.rows and 1 <= found.slice_cols


@quickly
@given(problems(), budgets)
def test_refusal_names_the_least_budget_that_works(problem, budget):
    assume(problem.vocab >= problem.hidden)  # a narrower head may name a budget that works, but not the least
    least = attempt(problem, budget)
    assume(isinstance(least, int))
    assert least > budget
    assert isinstance(attempt(problem, least), Plan)
    assert attempt(problem, least - 1) == least


@quickly
@given(problems(), budgets, budgets)
def test_more_memory_never_costs_more_gemms(problem, one, other):
    small, large = attempt(problem, min(one, other)), attempt(problem, max(one, other))
    assume(isinstance(small, Plan))
    assert isinstance(large, Plan)
    order = ["forward", "frozen", "groups", "recompute"]
    assert order.index(large.scheme) <= order.index(small.scheme)
    if small.scheme == large.scheme == "groups":
        assert len(large.groups) <= len(small.groups)
    assert large.gemms <= small.gemms + 1e-9


@quickly
@given(problems(), budgets)
def test_groups_are_few_and_equal(problem, budget):
    """No other cut into as many groups has a smaller largest one, and no cut into fewer fits."""
    found = attempt(problem, budget)
    assume(isinstance(found, Plan) and found.scheme == "groups" and problem.coupling != "batch" and not problem.late)
    assume(not any(group.long for group in found.groups))
    lengths, half = problem.lengths, len(problem.lengths) // 2
    items = [a + b for a, b in zip(lengths, lengths[half:], strict=False)] if problem.coupling == "pair" else lengths

    def least_largest(count):
        cuts = itertools.combinations(range(1, len(items)), count - 1)
        return min(max(sum(items[a:b]) for a, b in itertools.pairwise((0, *c, len(items)))) for c in cuts)

    count = len(found.groups)
    assert found.stash_rows == least_largest(count)
    if count > 1:
        copied = found.problem.gathered * problem.hidden * problem.itemsize
        tile_row = problem.vocab * problem.logits_itemsize * (problem.logits_itemsize != problem.itemsize) + copied
        operands = problem.hidden * (1 + problem.needs_hidden_grad * found.problem.gathered)
        needed = least_largest(count - 1) * problem.itemsize * (problem.vocab + operands)
        assert needed + max(budget // 4, tile_row) > budget  # a quarter is for tiles of logits


def test_the_plan_of_a_training_step_on_a_hopper_gpu():
    """N 16384, H 4096, V 128256, bf16, fp32 logits: three GEMMs from a 2 GiB budget, a stash of at least 4096 rows."""
    problem = Problem((512,) * 32, 4096, 128256, 2, 4, 2, device="cuda")
    found = plan(problem)
    assert found.budget == 2048 * MIB and found.scheme == "groups" and found.gemms == 3
    assert 4096 <= found.stash_rows <= 16384 and found.tile_rows == 1024
    assert found.accumulator_bytes == 4096 * 128256 * 4
    assert found.flops == 3 * 2 * 16384 * 4096 * 128256
    assert "groups" in str(found) and "MiB" in str(found)
    assert plan(Problem((512,) * 32, 4096, 128256, 2, 4, 2, device="cpu", needs_weight_grad=False)).budget == 256 * MIB


def test_a_plan_says_what_a_larger_budget_would_buy():
    """N 16384 at 2 GiB: four groups. By hand: 6 bytes a logit, dX and x scaled, a fp32 dW written by four GEMMs."""
    n, h, v = 16384, 4096, 128256
    found = plan(Problem((512,) * 32, h, v, 2, 4, 2, device="cuda"))
    moved = 6 * n * v + 10 * n * h + v * h * (3 * 8 + 6)
    ratio = 1 + moved / 4.3e12 / (3 * 2 * n * h * v / 790e12)
    assert found.traffic == moved and found.over_gemms() == pytest.approx(ratio, rel=1e-9)
    assert [len(more.groups) for more in found.larger()] == [2, 1]
    assert found.over_gemms() > found.larger()[0].over_gemms() > found.larger()[1].over_gemms() > 1
    (line,) = [line for line in str(found).splitlines() if "GEMM times" in line]
    assert f"2 GiB: {ratio:.2f} x; " in line and "790 TFLOP/s and 4.3 TB/s" in line
    assert "GEMM times" not in str(plan(Problem((512,) * 32, h, v)))


@pytest.mark.parametrize("budget", [0, -1])
def test_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match=f"memory_budget is {budget}"):
        plan(Problem((4, 4), 8, 100), budget)


def test_plan_is_pure_python():
    tree = ast.parse(Path(plan.__code__.co_filename).read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert found <= {"__future__", "collections.abc", "dataclasses", "itertools", "math"}, found


# ------------------------------------------------------------------------------------ against reality

GEMMS = {"aten::mm", "aten::addmm", "aten::mm_", "aten::addmm_"}


def profiled(step):
    """(GEMM FLOPs, peak bytes above the start) of everything torch runs in `step`, custom ops included."""
    fp.release_workspaces()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ) as prof:
        kept = step()
    flops = 0
    for event in prof.events():
        if event.name in GEMMS:
            shapes = [s for s in event.input_shapes if len(s) == 2]
            a, b = shapes[-2:] if event.name.startswith("aten::addmm") else shapes[:2]
            if event.name.startswith("aten::addmm"):
                a, b = shapes[1:3]
            flops += 2 * a[0] * a[1] * b[1]
    moved = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(moved, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return flops, peak



def gemm_scratch(found, dtype):
    """Bytes that the library's own GEMMs of these shapes allocate while they run (oneDNN in bf16; none in fp32)."""
    p, rows, vocab = found.problem, max(found.stash_rows, found.tile_rows), found.problem.vocab
    if found.scheme == "recompute":
        rows, vocab = p.rows - found.stash_rows, found.slice_cols
    x, u, w = (torch.zeros(shape, dtype=dtype) for shape in ((rows, p.hidden), (rows, vocab), (vocab, p.hidden)))
    gemms = [lambda: torch.mm(x, w.t(), out=u), lambda: torch.mm(u, w, out=x), lambda: torch.mm(u.t(), x, out=w)]
    return max(profiled(gemm)[1] for gemm in gemms)


def test_gemms_by_the_share_of_active_columns():
    def made(budget=None, **changes):
        return plan(Problem((512,) * 16, 1024, 128256, **({"tail": True, "device": "cuda"} | changes)), budget)

    assert made().gemms_at(0.18) == pytest.approx(1 + 2 * 0.18) and made().gemms == made().gemms_at(1) == 3
    assert made(needs_weight_grad=False).gemms_at(0.18) == pytest.approx(1.18)
    assert "tail         GEMMs by active columns: 1.20 at 10%, 1.40 at 20%, 2.00 at 50%, 3.00 beyond" in str(made())
    again = made(256 * 2**20, coupling="batch")  # rows made again: rank-one on the CPU, exact on a GPU
    assert again.scheme == "recompute" and again.gemms_at(0.18) == again.gemms > 3
    on_cpu = made(256 * 2**20, coupling="batch", device="cpu")
    assert on_cpu.gemms_at(0.18) == pytest.approx(on_cpu.gemms - 2 * 0.82)
    assert made().tail_columns % 64 == 0 and made().tail_capacity == 64128
    assert made(device="cpu").tail_capacity == made(tail=False).tail_capacity == 0


LONG = [170, 60, 150, 190, 40, 160]
CASES = [  # budget as a share of what the whole batch would take; scheme expected
    ("groups", dict(), 1.3),
    ("groups", dict(), 0.6),
    ("groups", dict(lengths=LONG), 0.4),
    ("groups", dict(lengths=LONG, loss="rpo"), 0.4),
    ("groups", dict(lengths=LONG, dtype=torch.bfloat16), 0.22),
    ("recompute", dict(loss="all pairs at once"), 0.5),
    ("recompute", dict(loss="all pairs at once"), 0.2),
    ("frozen", dict(weight_grad=False), 0.3),
    ("forward", dict(weight_grad=False, hidden_grad=False), 0.2),
    ("groups", dict(dtype=torch.bfloat16), 1.3),
    ("groups", dict(dtype=torch.bfloat16), 0.3),
    ("groups", dict(dtype=torch.bfloat16), 0.6),  # passed over: one group of all rows takes less in all
    ("recompute", dict(dtype=torch.bfloat16, loss="all pairs at once"), 0.4),
    ("frozen", dict(dtype=torch.bfloat16, weight_grad=False), 0.3),
    *[(scheme, options | dict(dtype=torch.bfloat16, logits_dtype="fp32"), share) for scheme, options, share in (
        ("groups", dict(), 1.3), ("groups", dict(), 0.6), ("groups", dict(lengths=LONG), 0.4),
        ("groups", dict(padded=True), 0.6), ("recompute", dict(loss="all pairs at once"), 0.5),
        ("recompute", dict(loss="all pairs at once"), 0.2), ("frozen", dict(weight_grad=False), 0.3),
        ("forward", dict(weight_grad=False, hidden_grad=False), 0.2),
    )],
    ("groups", dict(autocast=True), 0.6),
    ("groups", dict(padded=True), 0.6),
    ("recompute", dict(padded=True, loss="all pairs at once"), 0.4),
]


@pytest.mark.parametrize("scheme, options, share", CASES, ids=lambda x: str(x).replace(" ", "") if x else "plain")
def test_flops_and_peak_bytes_are_what_the_plan_says(scheme, options, share, monkeypatch):
    measure(scheme, share, monkeypatch, **options)


def measure(
    scheme, share, monkeypatch, *, dtype=torch.float32, loss="dpo", weight_grad=True, hidden_grad=True, autocast=False,
    padded=False, lengths=(60, 50, 55, 45, 52, 58, 40, 40), logits_dtype=None,
):
    if not rows.availability("native").available:
        pytest.skip("the reference rows keep fp32 copies of the tile; the plan counts the kernels that do not")
    prompt = 60 if padded else 0
    batch = oracle.make_batch(lengths, prompt=prompt, hidden_size=128, vocab=6000, dtype=dtype)
    x, w = batch.hidden.requires_grad_(hidden_grad), batch.weight.requires_grad_(weight_grad)
    given = {"ref_logps": torch.zeros(len(lengths)), "logits_dtype": logits_dtype}
    if not padded:
        hidden, targets, cu = batch.packed()
        given["cu_seqlens"] = cu
        x = hidden.detach().requires_grad_(hidden_grad)
    else:
        targets = batch.targets
    if loss == "all pairs at once":  # a free callable couples the whole batch
        loss = lambda seq: (seq.logps - seq.ref_logps).softmax(0).square().sum()  # noqa: E731
    size = 4 if logits_dtype else 2 if autocast else dtype.itemsize
    budget = int(share * sum(lengths) * 6000 * size)
    made = oracle.record(monkeypatch, plan)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fp.linear_preference_loss(x, w, targets, loss=loss, memory_budget=budget, **given)
        wanted = [t for t in (x, w) if t.requires_grad]
        return torch.autograd.grad(out.loss, wanted) if wanted else ()

    step()
    made.clear()
    flops, peak = profiled(step)
    found = made[0]
    assert found.scheme == scheme and any(group.long for group in found.groups) == (lengths is LONG)
    gradients = sum(t.numel() * t.element_size() for t in (x, w) if t.requires_grad)
    assert flops == pytest.approx(found.flops, rel=1e-9 if scheme != "recompute" else 0.01)
    assert found.tile_bytes <= budget or len(found.groups) == 1
    extra = peak - gradients
    library = gemm_scratch(found, torch.bfloat16) if size == 2 else 0
    assert 0.95 * found.bytes <= extra <= 1.05 * found.bytes + library
