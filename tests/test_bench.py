"""The benchmark of the head: it does not time a wrong implementation, goes on after a failure, and resumes."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import fastpref as fp
from bench import command, gates, harness, head, memory, peers, problem, smollm2
from bench.harness import Cell
from bench.peers import Implementation, Missing, Result
from bench.problem import LOGITS, LOSSES, Shape, Truth, make_batch
from bench.records import Row
from tests import oracle

CPU = torch.device("cpu")
SHAPE = Shape(32, 24, 331, pairs=4)
PADDED = replace(SHAPE, prompt_share=0.5)
KEYS = {
    "schema", "device", "driver", "torch", "triton", "cpu", "threads", "impl", "op", "loss", "N", "H", "V", "dtype",
    "logits_dtype", "budget_mib", "prompt_share", "ms_median", "ms_limit", "ratio", "ms_rounds",
    "limit_ms_rounds", "revision", "clocks", "peak_extra_mib", "plan_mib",
    "logp_max_err", "dx_rel_err", "dw_rel_err", "status", "note",
}
ORACLE = {
    "dpo": (oracle.dpo, {"beta": problem.BETA}),
    "rpo": (oracle.rpo, {"beta": problem.BETA, "eta": problem.ETA, "sft": "sum"}),
    "ipo": (oracle.ipo, {"beta": problem.BETA, "length_norm": "mean"}),
    "kto": (oracle.kto, {"beta": problem.BETA}),
    "sft": (lambda logps, lengths, refs: oracle.sft(logps, lengths), {}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """These shapes are far too small for two, and a busy machine makes two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(cell, *implementations, rounds=2):
    return harness.measure(cell, implementations, CPU, rounds=rounds)


# ---------------------------------------------------------------------------------------------- inputs and truth


def test_logits_look_like_a_trained_models():
    for shape in (Shape(512, 64, 8192), Shape(512, 64, 8192, softcap=30.0)):
        truth = Truth(make_batch(shape, torch.float32))
        assert 2 < truth.logits_std < 4
        assert -2.4 < truth.token_logps.mean() < -1.6
        assert truth.token_logps.max() > -0.1 and truth.token_logps.min() < -6  # sure of some, surprised by others


def test_other_logits_are_what_their_names_say():
    found = {kind: Truth(make_batch(Shape(128, 64, 8192, logits=kind), torch.float32)) for kind in LOGITS}
    assert float((found["uniform"].token_logps + math.log(8192)).abs().max()) < 0.1
    assert -0.03 < float(found["peaked"].token_logps.mean()) < -0.003 and found["peaked"].token_logps.min() > -0.5
    assert float(found["wrong"].token_logps.mean()) < -15
    assert 2000 < found["huge"].logits_std < 3000
    batch = found["negative"].batch
    logits = batch.rows().double() @ batch.weight.double().t()
    assert -10100 < logits.min() and logits.max() < -9900 and 2 < found["negative"].logits_std < 4
    assert -2.4 < found["negative"].token_logps.mean() < -1.6
    # References near the policy, so that no pair is decided by rounding.
    for kind in ("uniform", "peaked", "wrong", "negative"):
        truth = found[kind]
        assert float((truth.batch.ref_logps - truth.logps).abs().max()) < 5 * problem.REFERENCE_STD
    assert -3 < float(found["chat"].token_logps.mean()) < -0.7  # smollm2: -1.14
    with pytest.raises(ValueError, match="logits is 'odd'; it takes trained, uniform"):
        Shape(32, 8, 64, pairs=4, logits="odd")


def test_chat_logits_are_like_those_of_a_model():
    """Within a factor of two of what SmolLM2 has on its own answers at temperature 0.7 (`python -m bench.smollm2`)."""
    drawn = make_batch(Shape(256, *problem.REAL_SIZES, logits="chat"), torch.float32)
    found = smollm2.profile(drawn.rows(), drawn.weight, drawn.scored_targets)
    median = {name: values[2] for name, values in found.items()}
    for name, real in {"top": 0.516, "entropy": 1.79, "nll": 0.777, "4": 2, "8": 12, "12": 54, "16": 236}.items():
        assert real / 2 < median[name] < real * 2, (name, median[name])
    with pytest.raises(ValueError, match="logits is 'smollm2', whose H and V are 576 and 49152, not 512 and 49152"):
        Shape(256, 512, 49152, logits="smollm2")


def test_real_rows_are_given_as_they_are(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 576, generator=gen), torch.randn(49152, 576, generator=gen).mul_(0.02)
    targets = torch.randint(0, 49152, (40,), generator=gen)
    real = {"hidden": hidden, "weight": weight, "targets": targets, "cu_seqlens": [0, 10, 25, 40]}
    monkeypatch.setattr(smollm2, "real_logits", lambda: real)
    batch = make_batch(Shape(32, 8, 64, pairs=2, prompt_share=0.5).with_logits("smollm2"), torch.float32)
    assert batch.hidden.shape == (4, 16, 576) and torch.equal(batch.weight, weight)
    assert torch.equal(batch.rows(), hidden[:32]) and torch.equal(batch.scored_targets, targets[:32])
    assert torch.equal(batch.targets[1], torch.cat((torch.full((8,), problem.IGNORE), targets[8:16])))
    expected = (hidden[:32].double() @ weight.double().t()).log_softmax(1).gather(1, targets[:32, None])[:, 0]
    torch.testing.assert_close(Truth(batch).token_logps, expected)
    with pytest.raises(ValueError, match="rows is 48; logits 'smollm2' has 40"):
        make_batch(Shape(48, 8, 64, pairs=2).with_logits("smollm2"), torch.float32)

    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [[1, 2, 3]] * len(texts)}

    monkeypatch.setattr(smollm2, "_questions", lambda: (tokenizer, ["a question", "another"]))
    windows = smollm2.windows(2, 8, 12 - 4)  # the answers of 15 tokens have so many, that of 10 too
    assert windows.tolist() == [targets[:8].tolist(), targets[10:18].tolist()]
    assert smollm2.windows(1, 14, 12).tolist() == [[2, 3, *targets[10:22].tolist()]]
    with pytest.raises(ValueError, match="has 2 answers of 12 tokens, fewer than the 4 sequences"):
        smollm2.windows(4, 14, 12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [SHAPE, PADDED, replace(SHAPE, softcap=5.0)], ids=str)
def test_truth_is_the_naive_computation(shape, loss):
    """Slices of the vocabulary and all: against full logits in the tests' own oracle."""
    batch = make_batch(shape, torch.bfloat16)
    truth = Truth(batch, slice_cols=100, block_rows=10)
    formula, options = ORACLE[loss]
    given = {"refs": batch.ref_logps.double()}
    if loss == "kto":
        given |= {"desirable": batch.desirable, "kl_logps": batch.kl_logps, "ref_kl_logps": batch.ref_kl_logps}
    expected = oracle.head_and_loss(
        batch.hidden, batch.weight, batch.targets, lambda a, b: formula(a, b, **given, **options), softcap=shape.softcap
    )
    got = truth.gradients(loss, batch)
    assert torch.allclose(truth.logps, expected.logps, rtol=1e-12)
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-6)  # the references are fp32
    assert oracle.relative(got.hidden, expected.hidden.flatten(0, 1)[batch.index][truth.rows]) < 1e-6
    assert oracle.relative(got.weight, expected.weight[truth.vocab]) < 1e-6
    assert truth.vocab[0] == 0 and truth.vocab[-1] == shape.vocab - 1


def test_a_shape_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="rows is 30"):
        Shape(30, 8, 64, pairs=4)
    with pytest.raises(ValueError, match="prompt_share is 1.0"):
        Shape(32, 8, 64, pairs=4, prompt_share=1.0)
    with pytest.raises(ValueError, match="naive, naive_all"):
        peers.peer("nave", "cpu")


# ---------------------------------------------------------------------------------------------- implementations


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name not in ("cce", "quack", "naive_compiled")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peers_are_right(name, dtype):
    implementation = peers.peer(name, "cpu")
    if isinstance(implementation, Missing):
        pytest.skip(implementation.why)
    for op in peers.OPS:
        (row,) = measured(Cell(PADDED, dtype, op, "dpo"), implementation, rounds=1)
        assert (row.status, row.note) == ("ok", "")
        assert row.ms_median > 0 and row.peak_extra_mib >= 0
        assert (row.dx_rel_err is None, row.dw_rel_err is None) == (op == "forward", op != "step")
        # 1.5 x what bf16 logits of this size are rounded by
        assert row.logp_max_err < (1e-5 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_fastpref_is_right(loss):
    cells = [Cell(shape, "fp32", op, loss) for shape in (SHAPE, PADDED) for op in peers.OPS]
    for cell in cells:
        (row,) = measured(cell, peers.fastpref(), rounds=1)
        assert (row.status, row.note) == ("ok", "")
        assert row.logp_err_of == "token" and row.logp_max_err < 1e-5


def broken(change) -> Implementation:
    """The naive implementation with `change` of (batch, result)."""
    right = peers.naive()
    return replace(right, name="broken", run=lambda batch, loss: change(batch, right.run(batch, loss)))


class Doubled(torch.autograd.Function):
    """Identity whose gradient is 2 % off in one column."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] *= 1.02
        return grad


WRONG = {
    "log-probs": lambda batch, r: r._replace(logps=r.logps + 0.1, token_logps=None),
    "a token's log-prob": lambda batch, r: r._replace(token_logps=r.token_logps.index_fill(0, torch.tensor(3), -1.0)),
    "loss": lambda batch, r: r._replace(loss=r.loss + 0.01),
    "NaN": lambda batch, r: r._replace(loss=r.loss * math.nan),
    "scaled gradients": lambda batch, r: r._replace(loss=r.loss.detach() + 1.002 * (r.loss - r.loss.detach())),
    "another loss's gradient": lambda batch, r: r._replace(
        loss=r.loss.detach() + LOSSES["ipo"](r.logps, batch) - LOSSES["ipo"](r.logps, batch).detach()
    ),
    "no gradient of hidden": lambda batch, r: naive_of(batch, batch.hidden.detach(), batch.weight),
    "no gradient of weight": lambda batch, r: naive_of(batch, batch.hidden, batch.weight.detach()),
    "last row of dW": lambda batch, r: naive_of(batch, batch.hidden, Doubled.apply(batch.weight)),
    "gradient of prompts": lambda batch, r: r._replace(loss=r.loss + 0 * r.loss.detach() + 1e-9 * batch.hidden.sum()),
}


def naive_of(batch, hidden, weight) -> Result:
    return peers.naive().run(replace(batch, hidden=hidden, weight=weight), "dpo")


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_implementation_is_reported_and_not_timed(change):
    row, right = measured(Cell(PADDED, "fp32", "step", "dpo"), broken(change), peers.naive(), rounds=1)
    assert row.status == "wrong" and row.note
    assert row.ms_median is None and row.ratio is None and row.rounds == 0
    assert right.status == "ok" and right.ms_median > 0


def test_what_fails_becomes_a_row_and_the_run_goes_on():
    def out_of_memory(batch, loss):
        return torch.empty(1 << 55)

    def crash(batch, loss):
        raise RuntimeError("no kernel image\nlong story")

    cell = Cell(SHAPE, "fp32", "step", "kto")
    rows = measured(
        cell, replace(peers.naive(), run=out_of_memory), replace(peers.naive(), run=crash),
        replace(peers.naive(), losses=("dpo",)), peers.naive(), rounds=1,
    )
    assert [(row.status, row.note) for row in rows] == [
        ("oom", "out of memory"), ("error", "RuntimeError: no kernel image"), ("missing", "has no kto"), ("ok", ""),
    ]


# ---------------------------------------------------------------------------------------------- harness


def test_orders_are_balanced():
    for count in (1, 2, 5, 8):
        orders = harness.balanced_orders(count)
        assert all(sorted(order) == list(range(count)) for order in orders)
        for place in range(count):
            seen = [order[place] for order in orders]
            assert {seen.count(one) for one in range(count)} == {len(orders) // count}
        followed = Counter(pair for order in orders for pair in zip(order, order[1:]))
        assert len(followed) == count * (count - 1) and len(set(followed.values())) <= 1


def test_rounds_interleave_and_slow_ones_take_part_less():
    calls = []
    contestants = [harness.Contestant(lambda: None, lambda i=i: calls.append(i)) for i in range(3)]
    times = harness.time_interleaved(contestants, 6, CPU, slow=[False, False, True], least=3)
    assert [len(each) for each in times] == [6, 6, 3]
    assert set(times[2]) == {0, 2, 5}
    assert sorted(calls[:3]) == [0, 1, 2]
    times = harness.time_interleaved(contestants, 6, CPU, deadline=-1.0, least=2)
    assert [len(each) for each in times] == [2, 2, 2]

    row = Cell(SHAPE, "fp32", "step", "dpo").gap("x", "ok", "")
    harness.fill_times(row, {0: 3.0, 2: 30.0, 4: 5.0}, {0: 1.0, 1: 9.0, 2: 10.0, 4: 5.0})
    assert (row.ms_median, row.ms_limit, row.ratio, row.rounds) == (5.0, 5.0, 3.0, 3)
    assert (row.ms_rounds, row.limit_ms_rounds) == ([3.0, 30.0, 5.0], [1.0, 10.0, 5.0])


def test_out_of_memory_while_timed(monkeypatch):
    """Once is the fault of gaps in the heap; twice is a row of its own, and the others go on."""
    monkeypatch.setattr(harness, "SLOW", math.inf)
    calls = []

    def run(batch, loss, *, fails):
        calls.append(fails)
        if calls.count(fails) in fails:
            return torch.empty(1 << 55)
        return peers.naive().run(batch, loss)

    once, twice = (replace(peers.naive(), run=lambda b, l, f=f: run(b, l, fails=f)) for f in ((3,), (3, 4)))
    rows = measured(Cell(SHAPE, "fp32", "step", "dpo"), once, twice, peers.naive(), rounds=4)
    assert [(row.status, row.rounds) for row in rows] == [("ok", 4), ("oom", 0), ("ok", 4)]
    assert rows[1].ms_median is None and rows[1].ms_rounds == []
    assert len(calls) == 6 + 4  # a check, four rounds and one again; a check, one round, two failures


def test_gemms_in_blocks_are_the_same_gemms():
    """Their residuals are those of the first block, so only z and the sums over equal blocks can be compared."""
    batch = make_batch(replace(SHAPE, rows=40), torch.float32)
    gemms = harness.Gemms(batch, "step", most_bytes=4 * 331 * 16)  # 16 rows: blocks of 14, 14, 12
    assert [len(block) for block in gemms.blocks] == [14, 14, 12]
    gemms()
    residuals = torch.cat((gemms.residuals, gemms.residuals, gemms.residuals[:12]))
    assert torch.allclose(gemms.dx, residuals @ batch.weight, atol=1e-6)
    assert torch.allclose(gemms.dw, residuals.t() @ batch.rows(), atol=1e-4)
    assert len(harness.Gemms(batch, "step").blocks) == 1


def test_fastpref_takes_part_in_every_round_however_slow(monkeypatch):
    seen = []
    monkeypatch.setattr(harness, "SLOW", 0.0)
    monkeypatch.setattr(harness, "time_interleaved", lambda c, *a, slow, **k: seen.append(slow) or [{0: 1.0}] * len(c))
    measured(Cell(SHAPE, "fp32", "forward", "dpo"), peers.fastpref(), peers.naive())
    assert seen == [[False, False, True]]


def test_out_of_memory_on_a_cpu_is_an_error_not_a_kill():
    free = harness.free_bytes(CPU)
    if free is None:
        pytest.skip("/proc/meminfo cannot be read here")
    with harness.memory_limit(CPU):
        with pytest.raises(RuntimeError) as raised:
            torch.empty(free + (1 << 30), dtype=torch.uint8)
    assert harness.told(raised.value) == ("oom", "out of memory")


def test_peak_memory_counts_what_came_and_went():
    def call():
        big = torch.empty(1 << 20)
        kept = torch.empty(1 << 18)
        del big
        return kept

    found = harness.watched(call, CPU)
    assert found.extra_bytes == 4 << 20
    assert len(found.result) == 1 << 18


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_what_the_plan_says(share, dtype):
    """1 MiB: what oneDNN's bf16 GEMMs take for themselves, whatever their size."""
    cell = Cell(Shape(512, 64, 16384, pairs=4, prompt_share=share), dtype, "step", "dpo")
    (row,) = measured(cell, peers.fastpref(), rounds=1)
    assert row.gemms == 3 and row.plan_mib > 16
    assert row.peak_extra_mib == pytest.approx(row.plan_mib, rel=0.01, abs=1.0 if dtype == "bf16" else None)


def test_resident_memory_in_a_process_of_its_own():
    """Naive at this size holds several [N, V] fp32 at a time, 16 MiB each."""
    cell = Cell(Shape(1024, 32, 4096, pairs=4), "fp32", "step", "dpo")
    found = memory.peak_rss_mib(cell, peers.naive())
    if found is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 32 < found < 100


# ---------------------------------------------------------------------------------------------- the command


def checked(path) -> list[dict]:
    rows = json.loads(path.read_text())
    for row in rows:
        assert row.keys() >= KEYS
        assert row["status"] in ("ok", "missing", "skipped"), row["note"]
        if row["status"] == "ok":
            assert row["ms_median"] > 0 and row["ratio"] > 0
            assert len(row["ms_rounds"]) == len(row["limit_ms_rounds"]) == row["rounds"] > 0
            assert row["logp_max_err"] < 0.1
        else:
            assert row["note"] and row["ms_median"] is None
    return rows


def only_json(folder):
    (path,) = folder.glob("*.json")
    return path


QUICK = ["--quick", "--device", "cpu", "--rounds", "1", "--threads", "1"]


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take a second each and have tests of their own."""
    monkeypatch.setattr(command.plots, "of_results", lambda results: [])


def test_head(tmp_path, capsys):
    folder = tmp_path / "deep" / "er"
    arguments = [*QUICK, "--prompt-share", "0.5", "--dtype", "bf16", "--output", str(folder)]
    assert head.main([*arguments, "--impl", "fastpref", "naive", "cce"]) == 0
    path = only_json(folder)
    rows = checked(path)
    assert [row["impl"] for row in rows] == ["fastpref", "naive", "cce"]
    assert rows[0]["plan_mib"] > 0 and rows[0]["budget_mib"] == 256 and rows[0]["prompt_share"] == 0.5
    assert rows[0]["threads"] == 1 and rows[0]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "bare GEMMs" in shown and "cce: missing" in shown and str(path) in shown
    drawn = {each.name: each.read_bytes() for each in (folder / "plots").iterdir()}
    assert {Path(name).suffix for name in drawn} == {".svg", ".png"}
    shutil.rmtree(folder / "plots")
    assert bench.main(["plots", str(path)]) == 0  # from the file alone, the same bytes
    assert [name for name, image in drawn.items() if (folder / "plots" / name).read_bytes() != image] == []
    assert bench.main(["plots", str(folder / "none.json")]) == 2
    assert capsys.readouterr().err.endswith("none.json: cannot be read (No such file or directory)\n")

    # The same again has nothing to do; another implementation joins in the same file.
    before = path.read_text()
    assert head.main([*arguments, "--impl", "fastpref", "naive", "cce"]) == 0
    assert "nothing left to do" in capsys.readouterr().out and path.read_text() == before
    assert head.main([*arguments, "--impl", "naive", "naive_all"]) == 0
    assert [row["impl"] for row in checked(only_json(folder))] == ["fastpref", "naive", "cce", "naive_all"]


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, capsys, monkeypatch, undrawn):
    arguments = [*QUICK, "--dtype", "fp32", "--impl", "fastpref", "--rows", "64", "128", "--output", str(tmp_path)]
    measure = head.measure

    def interrupted(cell, *rest, **options):
        if cell.shape.rows == 128 and not cell.shape.prompt_share:
            raise KeyboardInterrupt
        return measure(cell, *rest, **options)

    monkeypatch.setattr(head, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        head.main(arguments)
    first = checked(only_json(tmp_path))
    assert [row["N"] for row in first] == [64, 64]
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.setattr(head, "measure", measure)
    assert head.main(arguments) == 0
    rows = checked(only_json(tmp_path))
    assert [row["N"] for row in rows] == [64, 64, 128, 128] and rows[:2] == first


def test_what_was_skipped_for_time_is_made_up_for(tmp_path, capsys, undrawn):
    arguments = [*QUICK, "--dtype", "fp32", "--impl", "fastpref", "--prompt-share", "0", "--output", str(tmp_path)]
    with pytest.raises(ValueError, match="--seconds 0 were over before anything was measured: allow more"):
        head.main([*arguments, "--seconds", "0"])
    assert [row["status"] for row in checked(only_json(tmp_path))] == ["skipped"]
    assert "skipped: time budget" in capsys.readouterr().out
    assert head.main(arguments) == 0
    assert [row["status"] for row in checked(only_json(tmp_path))] == ["ok"]


def test_a_budget_that_does_not_suffice_is_a_row(tmp_path, undrawn):
    arguments = [*QUICK, "--dtype", "fp32", "--impl", "fastpref", "--prompt-share", "0", "--output", str(tmp_path)]
    assert head.main([*arguments, "--budget-mib", "0.001", "1"]) == 0
    rows = checked(only_json(tmp_path))
    assert [row["status"] for row in rows] == ["skipped", "ok"] and "need at least" in rows[0]["note"]


def test_a_wrong_fastpref_is_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setitem(harness.LOGP_TOLERANCE, torch.float32, 0.0)
    assert head.main([*QUICK, "--dtype", "fp32", "--impl", "fastpref", "--prompt-share", "0"]) == 1


def tiny(group: head.Group) -> head.Group:
    """A cell of the GPU's on shapes that a test affords."""
    shape = group.cell.shape
    small = replace(shape, rows=shape.rows // 256, hidden=32, vocab=shape.vocab // 512, pairs=shape.pairs // 4)
    return group._replace(
        cell=group.cell._replace(shape=small), budgets=tuple(budget // 2**15 for budget in group.budgets)
    )


def test_every_cell_of_a_gpu_runs_on_a_cpu(tmp_path, capsys, monkeypatch):
    """End to end, without what takes long to import or to compile."""
    monkeypatch.setitem(peers.PEERS, "naive_compiled", lambda device: Missing("naive_compiled", "not in this test"))
    options = command.parser("head", "").parse_args([*QUICK, "--output", str(tmp_path)])
    with command.session(options, "head") as run:
        groups = [tiny(group) for group in head.gpu_groups(CPU)]
        head.run_groups(groups, run)
    rows = run.results.rows
    assert len(rows) == len(checked(only_json(tmp_path)))
    assert {row.op for row in rows} == set(peers.OPS) and {row.loss for row in rows} == set(LOSSES)
    assert {row.impl for row in rows if row.status == "missing"} >= {"cce", "quack", "naive_compiled"}
    assert harness.all_right(rows)
    cells = [(group.cell.op, group.cell.shape, group.peers) for group in head.gpu_groups(CPU)]
    assert [(op, shape) for op, shape, _ in cells[:6]] == [(op, s) for s in (head.MAIN, head.LARGE) for op in peers.OPS]
    assert cells[0][2] == ("naive", "trl")  # nobody compiles before what is claimed is measured
    found = gates.on_gpu(rows)
    assert {gate.what.split(": ")[1] for gate in found} == {"memory off its plan"}  # the others are for fp32 logits
    gates.show_gates(found, run.screen)
    assert "gates pass" in capsys.readouterr().out


def test_only_distinct_plans_are_run():
    """On a GPU at N 8192 one tile is all rows with 1, 2 or 4 GiB; at 16384 it is not."""
    cuda = torch.device("cuda")

    def budgets(shape, *mib):
        group = head.Group(Cell(shape, "bf16", "step", "dpo"), (), tuple(round(each * peers.MIB) for each in mib),
                           ("triton", "cuda"))
        return [(each.backend, each.logits_dtype(torch.bfloat16, "cuda"), each.budget // peers.MIB)
                for each in group.contestants(cuda)]

    every = [(backend, logits) for backend in ("triton", "cuda") for logits in ("fp32", "bf16")]
    assert budgets(head.MAIN, 2048, 4096, 1024) == [(*each, 2048) for each in every]
    large = budgets(head.LARGE, 1024, 4096)
    assert len(large) == 8 and len(set(large)) == 8
    for group in head.gpu_groups(cuda, ("triton",)):
        cell = group.cell
        ours = [each for each in group._replace(peers=()).contestants(cuda) if each.plan]
        plans = [each.plan(cell.shape, cell.op, cell.loss, torch.bfloat16, "cuda") for each in ours]
        logits = [each.logits_dtype(torch.bfloat16, "cuda") for each in ours]
        plans = [(dtype, replace(plan, budget=0)) for dtype, plan in zip(logits, plans)]
        assert len(set(plans)) == len(plans) >= 2, cell


def test_dry_run_of_a_gpus_cells(capsys):
    assert head.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(head.gpu_groups(torch.device("cuda"), ("triton",))))
    where = "dpo step, bf16, N 8192, H 4096, V 128256"
    assert lines[0].startswith(f"1. {where}: fastpref triton 2048 MiB, fp32 logits (plan ")
    assert "; missing: " in lines[-2] and "cce" in lines[-2]


def test_quack_is_its_fused_loss(monkeypatch):
    """With a stand-in of its signature: a mean over tokens, checked by loss and gradients, without log-probs."""
    asked = []

    def fused(x, weight, target, chunk_size, ignore_index=-100, reduction="mean"):
        asked.append((chunk_size, reduction))
        return torch.nn.functional.cross_entropy(x @ weight.t(), target, reduction=reduction)

    module = types.ModuleType("quack.linear_cross_entropy")
    module.scaled_exp_linear_cross_entropy = fused
    module.scaled_exp_lce_supported = lambda x, weight, chunk, reduction: weight.shape[0] == 331
    package = types.ModuleType("quack")
    package.linear_cross_entropy = module
    monkeypatch.setitem(sys.modules, "quack", package)
    version = peers.importlib.metadata.version
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "9" if "quack" in name else version(name))
    quack = peers.peer("quack", "cuda")
    (row,) = measured(Cell(PADDED, "fp32", "step", "sft"), quack, rounds=1)
    assert (row.status, row.version, row.gemms, row.logp_max_err) == ("ok", "9", 3, None)
    assert max(row.loss_err, row.dx_rel_err, row.dw_rel_err) < 1e-5 and set(asked) == {(4096, "mean")}
    (dpo,) = measured(Cell(PADDED, "fp32", "step", "dpo"), quack, rounds=1)
    assert (dpo.status, dpo.note) == ("missing", "has no dpo")
    (other,) = measured(Cell(replace(PADDED, vocab=100), "fp32", "step", "sft"), quack, rounds=1)
    assert other.status == "missing" and "V a multiple of 128" in other.note
    halved = replace(quack, run=lambda batch, loss: Result(quack.run(batch, loss).loss * 1.01))
    assert measured(Cell(PADDED, "fp32", "step", "sft"), halved, rounds=1)[0].status == "wrong"


UNSLOTH = """
import torch
def fused_linear_logprobs(hidden, weight, targets, *, logit_softcapping=0.0):
    z = hidden @ weight.t()
    z = logit_softcapping * torch.tanh(z / logit_softcapping) if logit_softcapping else z
    return torch.log_softmax(z.float(), -1).gather(1, targets[:, None])[:, 0]
"""


def test_unsloth_runs_from_where_it_is_installed(monkeypatch, tmp_path):
    """With a stand-in of its signature whose package cannot be imported: only the one file is loaded."""
    folder = tmp_path / "unsloth_zoo" / "fused_losses"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('Please install Unsloth')")
    (folder / "fused_linear.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsloth_zoo_fused_linear", raising=False)
    version = peers.importlib.metadata.version
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "7" if "unsloth" in name else version(name))
    theirs = peers.peer("unsloth-zoo", "cpu")
    assert (theirs.version, [theirs.gemms(SHAPE, op) for op in peers.OPS]) == ("7", [4, 2, 1])
    (row,) = measured(Cell(replace(PADDED, softcap=5.0), "fp32", "step", "dpo"), theirs, rounds=1)
    assert (row.status, row.note, row.logp_err_of) == ("ok", "", "token")
    monkeypatch.delitem(sys.modules, "unsloth_zoo_fused_linear")
    (folder / "fused_linear.py").write_text("")
    assert "has no attribute" in peers.peer("unsloth-zoo", "cpu").why


def test_bad_options(capsys):
    for arguments, line in (
        (["--preset", "llama9"], "llama3-8b"),
        (["--impl", "nave"], "torch_lce"),
        (["--dtype", "int8"], "bf16"),
        (["--rows", "0"], "not at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            head.main(arguments)
        assert stopped.value.code == 2 and line in capsys.readouterr().err
    with pytest.raises(ValueError, match="--budget-mib is"):
        head.main([*QUICK, "--budget-mib", "-1"])
    with pytest.raises(ValueError, match="rows is 65; it takes a multiple of the 8 sequences"):
        head.main([*QUICK, "--rows", "65"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no CUDA device"):
            head.main(["--device", "cuda"])


def test_shapes_asked_for():
    parser = command.parser("head", "")
    command.add_shapes(parser)

    def shapes(*arguments):
        return command.shapes(parser.parse_args(arguments), [head.MAIN, head.LARGE])

    assert shapes() == [head.MAIN, head.LARGE]
    assert shapes("--preset", "gemma2-9b", "mistral-7b") == [head.OTHERS[1], head.OTHERS[2]]
    assert shapes("--preset", "gemma2-9b", "--vocab", "1000")[0].softcap == 30.0
    (one,) = shapes("--hidden", "64", "--pairs", "3", "--rows", "600")
    assert (one.rows, one.hidden, one.vocab, one.pairs) == (600, 64, 128256, 3)
    (one,) = shapes("--pairs", "3")  # as many whole sequences as fit
    assert (one.rows, one.pairs) == (8190, 3)
    assert [shape.rows for shape in shapes("--rows", "16", "32", "16")] == [16, 32]


def filled(impl, ratio, *, logits="fp32", budget=2048.0, extra=100.0, op="step", error=1e-5, dtype="bf16") -> Row:
    row = Cell(head.MAIN, dtype, op, "dpo").gap(impl, "ok", "")
    limit = {"step": 3, "frozen": 2, "forward": 1}[op] * 10.9  # 790 TFLOP/s
    row.ratio, row.ms_median, row.ms_limit, row.peak_extra_mib, row.plan_mib = ratio, ratio * limit, limit, extra, 100.0
    row.logits_dtype, row.budget_mib, row.logp_max_err = logits, budget, error
    return row


@pytest.mark.parametrize(
    "op, logits, bytes_a_logit, rows_bytes",
    [("forward", "fp32", 4, 0), ("forward", "bf16", 2, 0), ("frozen", "fp32", 6, 6), ("frozen", "bf16", 4, 6),
     ("step", "fp32", 6, 10), ("step", "bf16", 4, 10)],
)
def test_a_gate_is_what_bytes_and_flops_allow(op, logits, bytes_a_logit, rows_bytes):
    """By hand: N 8192, H 4096, V 128256; logits are read, residuals written; dX (fp32 to bf16) and x are scaled."""
    n, h, v = 8192, 4096, 128256
    gemms = {"forward": 1, "frozen": 2, "step": 3}[op] * 2 * n * h * v / 700e12
    extra = n * (v * bytes_a_logit + h * rows_bytes) / 3e12
    limit = gates.gpu_limit(op, logits, n, h, v, 2048.0, gemms * 1e3, 3e12)
    assert limit == pytest.approx(1 + extra / gemms, rel=1e-9)


def test_gates_on_a_gpu():
    rows = [
        filled("fastpref", 1.12), filled("fastpref", 1.06, budget=4096.0), filled("fastpref", 1.07, logits="bf16"),
        filled("fastpref", 1.11, op="frozen", error=2e-4), filled("fastpref", 1.10, op="forward", extra=103.0),
        filled("trl", 2.5), filled("liger", 1.4, extra=350.0), replace(filled("naive", 1.5), ratio=None),
    ]
    shape = "N 8192, H 4096, V 128256"
    assert {gate.what.replace(f", {shape}", ""): gate.passed for gate in gates.on_gpu(rows)} == {
        "dpo step, fp32 logits: time / three GEMMs": True,  # with the better budget
        "dpo step, fp32 logits: memory off its plan": True,
        "dpo step, fp32 logits: log-prob error, nats a token": True,
        "dpo step, fp32 logits: trl / fastpref, time": True,
        "dpo step, fp32 logits: liger / fastpref, time": False,
        "dpo step, fp32 logits: memory / Liger's": False,
        "dpo step, bf16 logits: time / three GEMMs": False,
        "dpo step, bf16 logits: memory off its plan": True,
        "dpo frozen, fp32 logits: time / two GEMMs": False,
        "dpo frozen, fp32 logits: memory off its plan": True,
        "dpo frozen, fp32 logits: log-prob error, nats a token": False,
        "dpo forward, fp32 logits: time / its GEMM": True,
        "dpo forward, fp32 logits: memory off its plan": False,
        "dpo forward, fp32 logits: log-prob error, nats a token": True,
    }


def test_gates_on_a_cpu():
    rows = [filled("fastpref", 1.15, dtype="fp32"), filled("naive", 1.3, extra=480.0, dtype="fp32")]
    rows += [filled("fastpref", 1.15), filled("naive", 1.1, extra=510.0), replace(filled("trl", 9.0), V=1)]
    where = "V 128256, 0% prompt"
    assert {gate.what.replace(f", {where}", ""): gate.passed for gate in gates.on_cpu(rows)} == {
        "step / its three GEMMs, fp32": False,
        "naive / fastpref, time, fp32": True,
        "memory off its plan, fp32": True,
        "memory / naive's, fp32": False,
        "step / its three GEMMs, bf16": True,
        "naive / fastpref, time, bf16": False,
        "memory off its plan, bf16": True,
        "memory / naive's, bf16": True,
    }


def test_the_plan_shown_is_the_plan_followed(monkeypatch):
    """Peers of `fp.plan`: the benchmark builds its own Problem; here it meets the one that the call builds."""
    from fastpref import engine

    seen = []
    monkeypatch.setattr(engine, "plan_of", lambda *a: seen.append(fp.plan(*a)) or seen[-1])
    for shape in (SHAPE, PADDED):
        for loss in LOSSES:
            for op in peers.OPS:
                ours = peers.fastpref()
                batch = make_batch(shape, torch.bfloat16)
                harness.prepare(batch, op)
                harness.run(ours, batch, op, loss)
                assert ours.plan(shape, op, loss, torch.bfloat16, "cpu") == seen.pop()


def test_rank1_is_measured_with_a_tolerance_and_a_number_of_gemms_of_its_own():
    cell = Cell(Shape(64, 64, 16384, pairs=4, logits="chat"), "fp32", "step", "dpo")
    exact, rank1 = harness.measure(cell, [peers.fastpref(), peers.peer("fastpref-rank1", "cpu")], CPU, rounds=1)
    assert rank1.status == "ok" and rank1.impl == "fastpref-rank1" and exact.gemms == 3 and 1 < rank1.gemms < 2.2
    assert exact.dx_rel_err < 1e-5 < rank1.dx_rel_err < 2**-8 and exact.dw_rel_err < 1e-5 < rank1.dw_rel_err < 2**-8
    assert "fastpref-rank1" not in peers.BY_DEFAULT


def test_labels_of_a_swept_axis_do_not_run_together():
    plots = pytest.importorskip("bench.plots")
    found = plots._tick_labels([32768, 65536, 131072, 151936, 262144, 524288])
    assert found == ["32k", "64k", "128k", "", "256k", "512k"]
    assert plots._tick_labels([5]) == ["5"]
