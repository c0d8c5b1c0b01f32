"""`fastpref bench train`: its steps are the trainer's, its peers compute the same gradients, and a card is a limit."""

from __future__ import annotations

import json
import statistics
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import gates, readme, step, train, train_cell
from bench.train_cell import Spec, make_pairs, preset_of, split_up, steps_of
from fastpref.train.memory_estimate import CONTEXT, GIB

QUICK = ["--quick", "--device", "cpu", "--threads", "1"]
SPEC = Spec("fastpref", "quick", "cpu", {"dtype": "float32"}, 256, 2, 2, shorter=20)


def results(folder) -> list[dict]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_lengths_are_ultrafeedbacks():
    pairs = make_pairs(2000, 128256)
    responses = [len(ids) for e in pairs for ids in e.responses]
    ratios = [len(e.prompt_ids) / (sum(map(len, e.responses)) / 2) for e in pairs]
    assert min(responses) >= 50 and max(responses) <= 1000
    assert statistics.median(responses) == pytest.approx(300, rel=0.05)
    assert statistics.median(ratios) == pytest.approx(0.42, rel=0.1)
    assert max(e.tokens(True) for e in pairs) <= 16384


def test_steps_fill_their_budget():
    spec = replace(SPEC, max_tokens=512, steps=3)
    steps = steps_of(spec)
    assert [len(step) for step in steps] == [2, 2, 2] and steps == steps_of(spec)
    fill = [sum(e.tokens(True) for e in batch) for step in steps for batch in step]
    assert max(fill) <= 512 and sum(fill) > 0.85 * 6 * 512
    used = [e.record_id for step in steps for batch in step for e in batch]
    assert len(set(used)) == len(used)
    parts = split_up(steps[0], 2)
    assert len(parts) == 4 and [e for part in parts for e in part] == [e for batch in steps[0] for e in batch]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def first_gradient_norm(spec) -> float:
    """Of -log sigmoid(beta (margin - reference margin)), averaged over the step's pairs: one pair at a time, fp64."""
    model = step.make_model(preset_of(spec.preset), None, torch.float32, torch.device("cpu")).double()
    pairs = [e for batch in steps_of(spec)[0] for e in batch]

    def logp(prompt, response):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()

    for e in pairs:
        chosen, rejected = (logp(e.prompt_ids, ids) for ids in e.responses)
        margin = chosen - rejected
        (-F.logsigmoid(0.1 * (margin - margin.detach())) / len(pairs)).backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


def here(spec, seconds):
    """A cell's process, without one."""
    return done(json.dumps(train_cell.main(json.dumps(vars(spec)))))


@pytest.fixture
def limits():
    """A cell sets up its process: what it leaves is put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quick(tmp_path, capsys, monkeypatch, limits, apart):
    """Against a gradient made pair by pair in fp64; then nothing is left to do. apart: as processes of their own."""
    if not apart:
        monkeypatch.setattr(train, "process", here)
        monkeypatch.setattr(train_cell, "keep_freed_memory", lambda: True)
    impls = ["fastpref", "naive", *(["trl"] if not train.missing(train.QUICK_CELL, "trl") else [])]
    arguments = [*QUICK, "--rounds", "1", "--impl", *impls, "--output", str(tmp_path)]
    assert train.main(arguments) == 0
    found = {(row["impl"], row["checkpointing"]): row for row in results(tmp_path)}
    assert list(found) == [(impl, kind) for kind in ("full", "none") for impl in impls]  # everybody with both
    truth = first_gradient_norm(SPEC)
    for (impl, _), row in found.items():
        assert (row["status"], row["cell"], row["rounds"], row["split"]) == ("ok", "quick", 1, 1)
        assert row["pairs_per_s"] == pytest.approx(1e3 * row["pairs"] / row["ms_median"], rel=1e-4)
        assert row["tokens_per_s"] > row["pairs_per_s"] and row["peak_mib"] > 50
        assert row["grad_norm"] == pytest.approx(truth, rel=0.1 if impl == "trl" else 1e-4)
    assert found["naive", "full"]["grad_norm_rel_err"] < 1e-4
    shown = capsys.readouterr().out
    assert "pairs/s / naive's" not in shown and "--quick is a smoke test" in shown  # no gates there
    monkeypatch.setattr(train, "process", lambda *_: pytest.fail("measured twice"))
    assert train.main(arguments) == 0
    if apart:
        return
    monkeypatch.setattr(train, "settings", lambda cell: ())  # without --quick the gates are judged, of what is there
    capsys.readouterr()
    assert train.main([word for word in arguments if word != "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "pairs/s / naive's" in shown and "gates pass" in shown and "smoke test" not in shown


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": "none"}, {"gradient_checkpointing": "full"}])
def test_trls_checkpointing_is_the_cells(monkeypatch, keys):
    """As its own model sees it while it trains: TRL's default would be on."""
    if train.missing(train.QUICK_CELL, "trl"):
        pytest.skip("needs trl and datasets")
    seen = []
    make_model = train_cell.make_model

    def made(*given):
        model = make_model(*given)
        model.model.layers[0].register_forward_hook(
            lambda layer, *_: seen.append(bool(layer.gradient_checkpointing and layer.training))
        )
        return model

    monkeypatch.setattr(train_cell, "make_model", made)
    train_cell.measure(replace(SPEC, impl="trl", keys={"dtype": "float32", **keys}, steps=2, accumulation=1))
    assert any(seen) == (keys.get("gradient_checkpointing") == "full")


def test_a_setting_that_does_not_fit_takes_smaller_micro_batches(monkeypatch):
    """Off keeps more: half the tokens, twice as many micro-batches, until its plan fits; on fits as it is."""
    def plan_of(cell):
        if cell.checkpointing == "none" and cell.max_tokens > 4096:
            raise ValueError("too large")
        return "plan"

    monkeypatch.setattr(train, "plan_of", plan_of)
    on, off = (train.fitted(cell)[0] for cell in train.settings(train.CELLS["80gb"]))
    assert (on.checkpointing, on.max_tokens, on.accumulation) == ("full", 16384, 2)
    assert (off.checkpointing, off.max_tokens, off.accumulation) == ("none", 4096, 8)
    monkeypatch.setattr(train, "plan_of", lambda cell: (_ for _ in ()).throw(ValueError("never")))
    with pytest.raises(ValueError, match="never"):
        train.fitted(off)
    assert train.settings(train.CELLS["48gb"]) == [train.CELLS["48gb"]]


SLEEPER = """
import time
def deep():
    print("begun", flush=True); time.sleep(60)
deep()
"""


def test_a_process_out_of_time_says_where_it_was(monkeypatch, tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "train_cell.py").write_text(SLEEPER)
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(subprocess.TimeoutExpired):
        train.process(SPEC, 2)
    said = capsys.readouterr().err
    assert "in deep" in said and "KeyboardInterrupt" in said


@pytest.mark.slow
def test_a_cell_is_a_process():
    """What a child says last is its answer."""
    found = train.process(replace(SPEC, max_tokens=1), 100)
    assert found.returncode == 0, found.stderr[-2000:]
    answer = json.loads(found.stdout.splitlines()[-1])
    assert answer["status"] == "skipped" and "expected at most max_tokens = 1" in answer["note"]


def test_trls_gradient_is_ours_where_micro_batches_are_alike():
    """One micro-batch a step: nothing is weighted otherwise."""
    if train.missing(train.QUICK_CELL, "trl"):
        pytest.skip("needs trl and datasets")
    spec = replace(SPEC, accumulation=1)
    changes: tuple[dict, ...] = ({}, {"impl": "trl"}, {"impl": "naive", "split": 2})
    ours, theirs, split = (train_cell.measure(replace(spec, **change)) for change in changes)
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
    assert split["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


# ---------------------------------------------------------------------------------------------- what ends badly


class Processes:
    """As `train.process`, with one outcome after another."""

    def __init__(self, *outcomes):
        self.outcomes, self.specs = list(outcomes), []

    def __call__(self, spec, seconds):
        self.specs.append(spec)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome if isinstance(outcome, subprocess.CompletedProcess) else done(json.dumps(outcome))


def done(stdout="", code=0, stderr=""):
    return subprocess.CompletedProcess([], code, stdout, stderr)


FINE = {"rounds": 1, "ms_rounds": [10.0], "ms_median": 10.0, "pairs_per_s": 5.0, "tokens_per_s": 50.0, "grad_norm": 2.0,
        "peak_mib": 100.0}
OOM = {"status": "oom", "note": "out of memory", "peak_mib": 90.0}


@pytest.mark.parametrize(
    ("ours", "status", "note", "code"),
    [
        (OOM, "oom", "out of memory", 1),
        (done(code=-9), "error", "ended by signal 9", 1),
        (done(code=1, stderr="Traceback\nKeyError: 'x'\n"), "error", "KeyError: 'x'", 1),
        (subprocess.TimeoutExpired([], 1), "skipped", "time budget", 0),
    ],
)
def test_the_rest_goes_on(tmp_path, monkeypatch, ours, status, note, code):
    processes = Processes(ours, OOM, FINE | {"grad_norm": 2.0002})
    monkeypatch.setattr(train, "process", processes)
    monkeypatch.setattr(train, "settings", lambda cell: [cell])
    assert train.main([*QUICK, "--impl", "fastpref", "naive", "--output", str(tmp_path)]) == code
    first, second = results(tmp_path)
    assert (first["status"], first["note"], first["pairs_per_s"]) == (status, note, None)
    assert (second["status"], second["split"], second["pairs_per_s"]) == ("ok", 2, 5.0)
    assert [(spec.impl, spec.split) for spec in processes.specs] == [("fastpref", 1), ("naive", 1), ("naive", 2)]


def test_another_gradient_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "process", Processes(FINE, FINE | {"grad_norm": 2.01}))
    monkeypatch.setattr(train, "settings", lambda cell: [cell])
    assert train.main([*QUICK, "--impl", "fastpref", "naive", "--output", str(tmp_path)]) == 1
    row = results(tmp_path)[1]
    assert row["status"] == "wrong" and row["note"] == "first gradient norm 2.01, fastpref's 2"


def test_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "process", Processes())
    with pytest.raises(ValueError, match="--seconds 5 were over before anything was measured: allow more"):
        train.main([*QUICK, "--impl", "fastpref", "--seconds", "5", "--output", str(tmp_path)])
    assert [(row["status"], row["note"]) for row in results(tmp_path)] == [("skipped", "time budget")] * 2


# ---------------------------------------------------------------------------------------------- cards


SMALL = train.Cell("48gb", "quick", "bf16, 8-bit AdamW", 256, 1, 0.9, peers=True, shorter=20)


@pytest.fixture(scope="module")
def plan():
    return train.plan_of(SMALL)


def test_checkpointing_is_what_fits(plan):
    """CUDA's context alone is 0.75 GiB."""
    assert plan.kind == "none" and CONTEXT < plan.total < 0.9e9 / 1.05
    kinds = [train.plan_of(SMALL._replace(max_tokens=16384, card_gb=gb)).kind for gb in (1.2, 1.065, 1.04)]
    assert kinds == ["none", "selective", "full"]
    with pytest.raises(ValueError, match="48gb: by its plan bf16, 8-bit AdamW does not fit 0.8 GB"):
        train.plan_of(SMALL._replace(card_gb=0.8))
    assert train.plan_of(SMALL._replace(card_gb=None)) is None


def specs_of(cell, plan, impl="fastpref"):
    """Spec and row, as on a GPU."""
    spec = train.spec_of(cell, impl, plan, type("Run", (), {"device": torch.device("cuda", 0), "rounds": 1}))
    return spec, train.row_of(cell, spec, plan)


def test_what_fits_is_what_runs(plan):
    spec, row = specs_of(SMALL, plan)
    config = train_cell.config_of(spec)
    assert (config.dtype, config.optimizer, config.max_tokens_per_batch) == ("bfloat16", "adamw_torch_8bit", 256)
    assert spec.card_gb == 0.9 and row.plan_mib == pytest.approx((plan.total - CONTEXT) / 2**20)
    peer, row = specs_of(SMALL, plan, "trl")
    assert (peer.card_gb, row.plan_mib, row.checkpointing) == (None, None, "none") and steps_of(peer) == steps_of(spec)
    kept, row = specs_of(SMALL._replace(checkpointing="full"), plan)
    assert train_cell.config_of(kept).gradient_checkpointing == row.checkpointing == "full"


@pytest.mark.slow
def test_what_the_cells_of_a_gpu_run():
    """The recipes of DESIGN section 8, as the plan says they fit; each is a configuration that the trainer takes."""
    plans = {cell.name: train.plan_of(cell) for cell in train.GPU_CELLS}
    assert all(1.05 * plan.total < 1e9 * int(name[:2]) for name, plan in plans.items())
    assert 54 < plans["80gb"].total / GIB < 55 and 40 < plans["48gb"].total / GIB < 41
    for cell in train.GPU_CELLS:
        config = train_cell.config_of(specs_of(cell, plans[cell.name])[0])
        assert (config.dtype, config.max_tokens_per_batch) == ("bfloat16", cell.max_tokens)
        assert config.optim_in_backward == (cell.name == "48gb") and config.use_peft == (cell.name == "24gb")
        assert config.gradient_accumulation_steps == cell.accumulation


def test_a_card_is_a_cap(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    there = type("Properties", (), {"total_memory": 150e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    cuda = torch.device("cuda", 0)
    train_cell.cap(replace(SPEC, card_gb=48), cuda)
    assert asked == [(pytest.approx((48e9 - CONTEXT) / 150e9), cuda)]
    train_cell.cap(SPEC, cuda)
    train_cell.cap(replace(SPEC, card_gb=48), torch.device("cpu"))
    assert len(asked) == 1
    with pytest.raises(ValueError, match="a card of 160 GB does not go into this one of 150 GB"):
        train_cell.cap(replace(SPEC, card_gb=160), cuda)


def test_cells_of_a_gpu_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="--cell 80gb: takes a GPU; on a CPU there is cpu"):
        train.main(["--device", "cpu", "--cell", "80gb", "cpu"])


# ---------------------------------------------------------------------------------------------- gates, README.md


def rows_of(plan, **changes):
    ours, peer = (specs_of(SMALL, plan, impl)[1] for impl in ("fastpref", "trl"))
    for row, speed in ((ours, 3.0), (peer, 1.9)):
        row.ms_median, row.pairs_per_s, row.grad_norm, row.tokens_per_s = 100.0, speed, 1.0, 900.0
        row.peak_mib = row.reserved_mib = 1.04 * ours.plan_mib
    for name, value in changes.items():
        setattr(ours, name, value)
    return [ours, peer]


def test_gates(plan):
    def passed(**changes):
        return [gate.passed for gate in gates.of_training(rows_of(plan, **changes))]

    assert passed() == [True, True, True]
    assert passed(pairs_per_s=2.8) == [True, True, False]
    assert passed(reserved_mib=(0.91e9 - CONTEXT) / 2**20) == [False, True, True]
    assert passed(peak_mib=(plan.total - CONTEXT) / 2**20 * 0.94) == [True, False, True]
    assert passed(status="oom", ms_median=None, pairs_per_s=None) == [False, False, False]
    assert passed(status="skipped", ms_median=None, pairs_per_s=None) == []


def test_readme(tmp_path, plan):
    from bench import records

    place = dict(schema=2, date="2026-01-01T00:00:00", device="NVIDIA H200", cpu="Some CPU", threads=2, torch="2.13.0",
                 revision="abc")
    rows = rows_of(plan, mfu=0.47)
    lines = [place | vars(row) for row in rows]
    lines.append({**lines[1], "checkpointing": "full", "pairs_per_s": 1.2})  # which ours was not measured with
    (tmp_path / "a.json").write_text(records.as_json(lines))
    (tmp_path / "b.json").write_text(records.as_json([{**lines[0], "date": "2025", "pairs_per_s": 1.0}]))
    found = readme.trained(tmp_path)
    assert [(row["impl"], row["pairs_per_s"]) for row in found] == [("trl", 1.2), ("fastpref", 3.0), ("trl", 1.9)]
    text = readme.block([], found)
    what = "quick, bf16, 8-bit AdamW, checkpointing none"
    assert f"| GPU: NVIDIA H200 | {what} | 0.9 GB | **3** | 1.9 | - | 47 % |" in text
    assert "| quick, bf16, torch's AdamW, checkpointing full | 0.9 GB | - | 1.2 | - | - | - |" in text
    assert "Training steps" not in text and "fastpref bench train): not measured yet" not in text
    assert "not measured yet." in readme.block([], [])
