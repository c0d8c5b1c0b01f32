"""The other benchmarks run end to end on shapes of seconds: rows, step, loss, sweep, and `fastpref bench` itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_data import CHATML, chars

from bench import __main__ as bench
from bench import data, head, loss, plots, presets, rows, step, sweep
from bench.harness import Cell
from bench.problem import LOGITS
from fastpref import cli
from fastpref import rows as row_kernels

QUICK = ["--quick", "--device", "cpu", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Plots have tests of their own; here only that those of a command's rows can be drawn, once each."""
    seen = []
    monkeypatch.setattr(plots, "save", lambda figure, path, *rest, **more: seen.append(path.name) or path)
    return seen


def results(folder) -> list[dict]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------- rows


def quick_rows(tmp_path, *arguments):
    words = [word for word in QUICK if word != "--rounds"]
    words.remove("1")
    code = rows.main([*words, "--rounds", "5", "--rows", "8", "--vocab", "700", "--output", str(tmp_path), *arguments])
    return code, results(tmp_path)


def test_rows(tmp_path, capsys, drawn):
    code, found = quick_rows(tmp_path)
    assert code == 0
    assert {(row["op"], row["dtype"]) for row in found} == {(op, t) for op in rows.OPS for t in ("fp32", "bf16")}
    assert {row["backend"] for row in found} >= {"reference"}
    for row in found:
        assert row["status"] == "ok" and len(row["ms_rounds"]) == 5
        size = {"fp32": 4, "bf16": 2}[row["dtype"]]
        moved = 8 * 700 * size * (1 if row["op"] in ("forward", "fold") else 2)
        assert row["gb_per_s"] == pytest.approx(moved / row["ms_median"] / 1e6, rel=1e-4)
        assert (row["u_rel_err"] is None) == (row["op"] in ("forward", "fold"))
        assert (row["logp_max_err"] is None) == (row["op"] == "residual_given_lse")
        assert (row["u_rel_err"] or 0) < (1e-5 if size == 4 else 5e-3) and (row["logp_max_err"] or 0) < 1e-5
    assert "share of copy" in capsys.readouterr().out and len(drawn) == 1


@pytest.mark.parametrize("op", rows.OPS)
def test_a_wrong_row_kernel_is_reported_and_not_timed(tmp_path, monkeypatch, op):
    """A softmax that hardly sees the last column."""
    kernels = row_kernels.choose("reference", torch.device("cpu"), torch.float32)
    for name in ("residual", "fold", "residual_given_lse"):
        right = getattr(kernels, name)

        def wrong(tile, *rest, right=right):
            logits = tile.logits.clone()
            logits[:, -1] -= 5.0
            return right(tile._replace(logits=logits), *rest)

        monkeypatch.setattr(kernels, name, wrong)
    monkeypatch.setattr(rows, "LOGITS_STD", 0.1)
    code, found = quick_rows(tmp_path, "--op", op, "--backend", "reference", "--dtype", "fp32", "--vocab", "64")
    assert code == 1
    assert [(row["status"], row["ms_median"]) for row in found] == [("wrong", None)] and "off by" in found[0]["note"]


def test_softcapped_rows(tmp_path, monkeypatch):
    """Against the derivative of the cap, at logits where it matters."""
    small = replace(presets.QUICK, shape=replace(presets.QUICK.shape, softcap=2.0))
    monkeypatch.setattr(rows, "QUICK", small)
    code, found = quick_rows(tmp_path, "--op", "residual", "--dtype", "fp32")
    assert code == 0 and all(row["softcap"] == 2.0 and row["u_rel_err"] < 1e-5 for row in found)


# ---------------------------------------------------------------------------------------------- step


def test_step(tmp_path, capsys, drawn):
    arguments = [*QUICK, "--prompt-share", "0.5", "--impl", "fastpref", "naive_all", "liger", "cce", "--layers", "1"]
    assert step.main([*arguments, "--gradient-checkpointing", "--output", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert [row["impl"] for row in found if row["status"] == "ok"][:2] == ["fastpref", "naive_all"]
    for row in found:
        assert (row["model"], row["layers"], row["gradient_checkpointing"]) == ("quick", 1, True)
        if row["status"] == "ok":
            assert row["tokens_per_s"] == pytest.approx(8 * 16 / row["ms_median"] * 1e3, rel=1e-4)
            assert row["logp_max_err"] < 1e-5 and row["dw_rel_err"] < 1e-5
    assert "trunk, bare GEMMs, optimiser" in capsys.readouterr().out and len(drawn) == 2
    assert step.main([*arguments, "--gradient-checkpointing", "--output", str(tmp_path)]) == 0
    assert results(tmp_path) == found
    with pytest.raises(ValueError, match="--hidden and --vocab are the preset's here"):
        step.main([*QUICK, "--vocab", "100"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_the_models_own(tied):
    """Loss and gradients of a timed step against transformers' logits; the limit leaves the same weights a gradient."""
    preset = replace(presets.QUICK, shape=replace(presets.QUICK.shape, hidden=16, vocab=97, rows=16, pairs=2),
                     config=presets.QUICK.config | {"tie_word_embeddings": tied, "intermediate_size": 32})
    shape = replace(preset.shape, prompt_share=0.5)
    model = step.make_model(preset, None, torch.float32, torch.device("cpu"))
    one = step.Step(model, shape, "dpo")
    before = [p.detach().clone() for p in model.parameters()]
    one.call(head.fastpref())
    found = [p.grad.clone() for p in model.parameters()]
    one.zero_grad()
    logits = model(input_ids=one.ids).logits
    targets = one.batch.targets
    tokens = torch.log_softmax(logits, -1).gather(-1, targets.clamp(0)[..., None])[..., 0]
    chosen, rejected = ((tokens * (targets >= 0)).sum(1) - one.batch.ref_logps).chunk(2)
    torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean().backward()
    for p, got, was in zip(model.parameters(), found, before):
        assert torch.allclose(got, p.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(p, was)  # the learning rate is 0
    one.zero_grad()
    one.limit()
    assert all(p.grad is not None for p in model.parameters())


def test_presets_are_the_models():
    """Parameters of the whole model, from its configuration alone: the figures its makers publish."""
    published = {"llama3-8b": 8.03e9, "qwen2.5-7b": 7.62e9, "gemma2-9b": 9.24e9, "mistral-7b": 7.24e9}
    for name, count in published.items():
        model = step.make_model(presets.PRESETS[name], None, torch.bfloat16, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=2e-3), name
        cap = getattr(model.config, "final_logit_softcapping", None)
        assert cap == presets.PRESETS[name].shape.softcap


# ---------------------------------------------------------------------------------------------- loss


def test_loss(tmp_path, drawn):
    """Everybody is timed, however inaccurate; fp32 is near fp64 on all logits, of any size."""
    arguments = ["--impl", "fastpref", "naive", "--dtype", "fp32", "bf16", "--output", str(tmp_path)]
    assert loss.main([*QUICK, *arguments]) == 0
    found = results(tmp_path)
    assert {(row["logits"], row["dtype"]) for row in found} == {(kind, t) for kind in LOGITS for t in ("fp32", "bf16")}
    assert {row["backend"] for row in found if row["impl"] == "fastpref"} >= {"reference"}
    for row in found:
        assert row["status"] == "ok" and row["ms_median"] > 0 and row["benchmark"] == "loss"
        if row["dtype"] == "fp32" and row["logits"] == "negative":  # an ulp of a logit is 1e-3
            naive = next(r for r in found if (r["impl"], r["dtype"], r["logits"]) == ("naive", "fp32", "negative"))
            assert all(row[error] < 1.5 * naive[error] for error in ("logp_max_err", "dx_rel_err", "dw_rel_err"))
        elif row["dtype"] == "fp32":
            # Where a model is sure, 1 - p is the difference of two rounded numbers.
            assert max(row["dx_rel_err"], row["dw_rel_err"]) < (2e-4 if row["logits"] == "peaked" else 1e-5)
            assert row["logp_max_err"] < (0.01 if row["logits"] == "huge" else 1e-4)
    assert sorted(name.split("-loss-")[1] for name in drawn) == ["error-time", "errors-bf16", "errors-fp32"]


def test_what_is_not_finite_is_wrong_even_there(tmp_path, monkeypatch):
    right = head.peer("naive", "cpu")
    run = right.run
    broken = replace(right, run=lambda batch, name: run(batch, name)._replace(loss=batch.hidden.sum() * torch.nan))
    monkeypatch.setattr(head, "peer", lambda name, device: broken)
    arguments = ["--impl", "naive", "--dtype", "fp32", "--logits", "trained", "--output", str(tmp_path)]
    assert loss.main([*QUICK, *arguments]) == 0  # a peer's, not ours
    assert [row["status"] for row in results(tmp_path)] == ["wrong"]


# ---------------------------------------------------------------------------------------------- sweep


def test_memory_stays_flat_as_a_pair_grows(tmp_path, capsys, monkeypatch, drawn):
    arguments = ["--dtype", "fp32", "--impl", "fastpref", "naive", "--budget-mib", "1", "--output", str(tmp_path)]
    assert sweep.main(["length", *QUICK, *arguments]) == 0
    found = results(tmp_path)
    assert {row["pairs"] for row in found} == {1} and {row["benchmark"] for row in found} == {"sweep-length"}
    memory = {name: [row["peak_extra_mib"] for row in found if row["impl"] == name] for name in ("fastpref", "naive")}
    assert len(memory["fastpref"]) == 3
    assert max(memory["fastpref"]) < 1.05 * memory["fastpref"][0] and memory["naive"][-1] > 4 * memory["naive"][0]
    shown = capsys.readouterr().out
    assert "memory at" not in shown and "--quick is a smoke test" in shown  # no gates there
    assert sorted(name.split("-length-")[1] for name in drawn) == ["memory", "share", "time"]
    monkeypatch.setattr(sweep, "split_by_memory", lambda *_: ([], []))  # nothing more is measured
    assert sweep.main(["length", *(word for word in QUICK if word != "--quick"), *arguments]) == 0
    assert "memory at" in (shown := capsys.readouterr().out) and "1 of 1 gates pass" in shown


def test_one_pair_grows(tmp_path):
    arguments = ["--dtype", "fp32", "--impl", "fastpref", "--rows", "32", "--output", str(tmp_path)]
    assert sweep.main(["length", *QUICK, *arguments]) == 0
    assert [(row["N"], row["pairs"]) for row in results(tmp_path)] == [(32, 1)]
    with pytest.raises(ValueError, match="--pairs: one pair grows"):
        sweep.main(["length", *QUICK, *arguments, "--pairs", "2"])


def test_ranks_share_the_vocabulary(tmp_path, capsys, drawn):
    arguments = ["--ranks", "2", "--dtype", "fp32", "--vocab", "4095", "--output", str(tmp_path)]
    assert sweep.main(["ranks", *QUICK, *arguments]) == 0
    found = {(row["impl"], row["ranks"]): row for row in results(tmp_path)}
    assert list(found) == [("fastpref", 2), ("gathered", 2)]
    for row in found.values():
        assert (row["status"], row["rounds"]) == ("ok", 1) and max(row["dx_rel_err"], row["dw_rel_err"]) < 1e-5
    w_bytes = 4 * 4095 * 64
    assert found["gathered", 2]["sent_mib"] == pytest.approx(w_bytes / 2**20, rel=1e-5)  # half of W there, of dW back
    assert found["fastpref", 2]["sent_mib"] < 0.1 * found["gathered", 2]["sent_mib"]
    assert found["fastpref", 2]["peak_extra_mib"] < found["gathered", 2]["peak_extra_mib"]
    assert sorted(name.split("-ranks-")[1] for name in drawn) == ["memory", "share", "time"]
    with pytest.raises(ValueError, match="--pairs is 4; it takes at least one a rank"):
        sweep.main(["ranks", *QUICK, "--ranks", "5"])


@pytest.mark.parametrize("place", range(4), ids=["loss", "log-probs", "dX", "dW"])
def test_a_wrong_rank_is_told(tmp_path, monkeypatch, place):
    """Gathered over one rank, so that nothing has to be sent: one of its results is made wrong."""
    from bench import ranks

    whole = ranks.Part.gathered

    def wrong(self):
        return [x * 1.1 if i == place else x for i, x in enumerate(whole(self))]

    monkeypatch.setattr(ranks.Part, "gathered", wrong)
    monkeypatch.setattr(ranks.processes, "spawn", lambda call, args, nprocs: call(0, *args))
    arguments = ["--ranks", "1", "--dtype", "fp32", "--output", str(tmp_path)]
    assert sweep.main(["ranks", *QUICK, *arguments]) == 1
    assert {row["impl"]: row["status"] for row in results(tmp_path)} == {"fastpref": "ok", "gathered": "wrong"}


def test_beyond_the_memory_it_is_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "free_bytes", lambda device: 90 << 20)
    arguments = ["--dtype", "fp32", "--impl", "fastpref", "--rows", "64", str(1 << 20), "--output", str(tmp_path)]
    assert sweep.main(["rows", *QUICK, *arguments]) == 0
    ran, planned = sorted(results(tmp_path), key=lambda row: row["N"])
    assert (ran["N"], ran["status"]) == (64, "ok")
    assert (planned["N"], planned["status"], planned["gemms"], planned["ms_median"]) == (1 << 20, "planned", 3, None)
    assert 0 < planned["plan_mib"] <= 257 + 1  # of four pairs each too long for the budget: tiles and one sum
    assert "planned only: N 1048576" in capsys.readouterr().out


def test_gates_of_a_sweep():
    def at(n, mib):
        shape = replace(presets.QUICK.shape, rows=n, pairs=1)
        found = Cell(shape, "fp32", "step", "dpo", "sweep-length").gap("fastpref", "ok", "")
        found.peak_extra_mib, found.budget_mib = mib, 1.0
        return found

    assert [gate.passed for gate in sweep.gates("length", [at(64, 1.0), at(256, 4.0), at(128, 3.9)])] == [True]
    assert [gate.passed for gate in sweep.gates("length", [at(64, 1.0), at(128, 1.9)])] == [False]
    assert sweep.gates("rows", [at(64, 1.0), at(128, 1.9)]) == []


def test_sizes_swept():
    base = head.MAIN
    assert [shape.rows for shape in sweep.swept("rows", base, False)] == [1024 << i for i in range(11)]
    assert [shape.vocab for shape in sweep.swept("vocab", base, False)] == [32768, 65536, 131072, 262144, 524288]
    lengths = sweep.swept("length", replace(base, pairs=1), False)
    assert {shape.pairs for shape in lengths} == {1} and lengths[-1].scored_length == 32768
    pairs = sweep.swept("pairs", base, False)
    assert {shape.scored_length for shape in pairs} == {128} and pairs[-1].pairs == 256


# ---------------------------------------------------------------------------------------------- fastpref bench


def test_commands(capsys):
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in bench.COMMANDS)
    assert bench.main(["hed"]) == 2
    assert "no command 'hed'; there are head, rows" in capsys.readouterr().err
    assert bench.main(["compare", "nothing.json", "nothing.json"]) == 2
    assert "fastpref bench compare: nothing.json: cannot be read" in capsys.readouterr().err


def test_fastpref_bench(capsys, monkeypatch, tmp_path):
    assert cli.main(["bench", "compare", "nothing.json", "nothing.json"]) == 2
    assert "nothing.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "head", "--help"])
    assert stopped.value.code == 0 and "fastpref bench head" in capsys.readouterr().out
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastpref" / "cli.py"))
    assert cli.main(["bench", "head"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the benchmarks come with the source" in line


def test_drawn_examples_are_such_as_a_start_leaves(tmp_path):
    """4.2 bytes a token, planned without a token, read where they are asked for."""
    path = tmp_path / "drawn.arrow"
    data.draw(str(path), 3000)
    examples, report = data.stored._read(path)
    assert len(examples) == report.examples == 3000 and examples[2999].record_id == 2999
    tokens = int(examples.tokens(share_prompts=True).sum())
    assert tokens == sum(e.tokens(True) for e in examples) and 470 < tokens / 3000 < 500
    assert 4 < path.stat().st_size / tokens < 4.3
    data.write_data(tmp_path / "a.jsonl", 3)
    assert len(data.stored.load_examples(str(tmp_path / "a.jsonl"), chars(chat_template=CHATML), "pair",
                                         max_length=4096)[0]) == 3
