"""What is read back from a run's folder is what was there, and nothing that a run needs is removed from it."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import make, read_metrics, settings
from transformers import LlamaForCausalLM

from fastpref.errors import UserError
from fastpref.files import CHECKSUMS
from fastpref.rounds.config import config_from
from fastpref.rounds.driver import rounds
from fastpref.train import checkpoint
from fastpref.train.dry_run import dry_run
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import train
from fastpref.train.scorer import load_scorer

STAGES = {"stages": [{"loss": "sft"}, {"loss": "dpo"}], "max_steps": 2}


def change_a_bit(path):
    found = load_file(path)
    found["model.norm.weight"][3] += 1e-6
    save_file(found, path, metadata={"format": "pt"})
    path.with_name(CHECKSUMS).unlink(missing_ok=True)  # on purpose


def agree(values, after):
    """A run knows more of its held-out pairs: how they stood at its start."""
    assert "loss" in values.keys() & after.keys()
    for key in values.keys() & after.keys():
        assert values[key] == pytest.approx(after[key], abs=1e-6)


def ways(run_dir, quiet):
    """Whoever loads a run's reference again."""
    yield lambda: evaluate_run(run_dir, display=quiet)
    yield lambda: load_scorer(f"implicit:{run_dir}")
    yield lambda: load_scorer(f"implicit:{run_dir / 'model'}")
    yield lambda: load_scorer(f"implicit:{checkpoint.checkpoints(run_dir)[-1]}")


@pytest.mark.parametrize("where", ["model", "ref_model", "first weights of a stage", "no reference"])
def test_a_reference_that_has_changed_since(where, world, tmp_path, quiet):
    """With its log-probs gone it is loaded again, and compared with what it was."""
    folder, run_dir = shutil.copytree(world / "pretrained", tmp_path / "there"), tmp_path / "run"
    changes = {
        "model": {"model_name_or_path": str(folder)},
        "ref_model": {"ref_model_name_or_path": str(folder)},
        "first weights of a stage": STAGES,
        "no reference": {"model_name_or_path": str(folder), "loss": "sft"},
    }[where]
    summary = train(make(world, run_dir, **{"save_steps": 1, "max_steps": 2} | changes), display=quiet)
    shutil.rmtree(run_dir / "reference", ignore_errors=True)
    before = [way() for way in ways(run_dir, quiet)][0]
    agree(before, summary["after"])
    if where == "first weights of a stage":
        folder = run_dir / "checkpoints" / checkpoint.folder_name(1, "dpo", 0)
    change_a_bit(folder / "model.safetensors")
    for way in list(ways(run_dir, quiet))[where == "no reference" :]:  # which no evaluation of sft has
        with pytest.raises(UserError, match=r"run: stage '\w+': the reference model .* has other weights"):
            way()


def test_cached_log_probs_of_another_reference(world, tmp_path, quiet):
    """A reference_dir that another run has written to since: the model's name and the records fit, its weights do
    not."""
    folder = shutil.copytree(world / "pretrained", tmp_path / "there")
    changes = {"model_name_or_path": str(folder), "reference_dir": str(tmp_path / "shared"), "max_steps": 1}
    summary = train(make(world, tmp_path / "run", **changes), display=quiet)
    change_a_bit(folder / "model.safetensors")
    train(make(world, tmp_path / "second", overwrite_output_dir=True, **changes), display=quiet)
    with pytest.raises(UserError, match="has other weights"):
        evaluate_run(tmp_path / "run", display=quiet)
    shutil.copy(world / "pretrained" / "model.safetensors", folder)
    agree(evaluate_run(tmp_path / "run", display=quiet), summary["after"])


def test_a_run_from_before_it_was_recorded(world, tmp_path, quiet, caplog):
    """The header of its cached log-probs tells; where they are gone too, a line says that nothing is known."""
    run_dir = tmp_path / "run"
    folder = shutil.copytree(world / "pretrained", tmp_path / "there")
    train(make(world, run_dir, model_name_or_path=str(folder), max_steps=1), display=quiet)
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["stages"]["dpo"]["reference"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "reference" / "00-dpo-eval.safetensors").unlink()
    evaluate_run(run_dir, display=quiet)
    change_a_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match="has other weights"):
        evaluate_run(run_dir, display=quiet)
    assert not caplog.records
    shutil.rmtree(run_dir / "reference")
    evaluate_run(run_dir, display=quiet)
    assert "no record of which weights the reference of stage 'dpo' had" in caplog.text


# ---- starting over ---------------------------------------------------------------------------------------------------


@pytest.fixture
def used(world, tmp_path, quiet):
    """A run that has ended, and paths that lead into it."""
    run_dir = tmp_path / "run"
    train(make(world, run_dir, max_steps=1), display=quiet)
    (tmp_path / "link").symlink_to(run_dir / "model")
    (tmp_path / "linked").symlink_to(run_dir)
    shutil.copy(world / "train.jsonl", run_dir / "model" / "pairs.jsonl")
    shutil.copy(world / "train.jsonl", run_dir / "pairs.jsonl")  # beside what a run writes: it stays
    return run_dir


@pytest.mark.parametrize(
    "key, path",
    [
        ("model_name_or_path", "run/model"),
        ("model_name_or_path", "link"),
        ("model_name_or_path", "linked/model"),
        ("tokenizer_name_or_path", "run/model"),
        ("ref_model_name_or_path", "run/../run/model/"),
        ("train_dataset", "run/model/pairs.jsonl"),
        ("train_dataset", "run/model/*.jsonl"),
        ("eval_dataset", ["run/pairs.jsonl", {"path": "json", "data_files": ["linked/model/pairs.jsonl"]}]),
        ("reference_dir", "run/model"),
        ("scorer", "implicit:run/model"),
    ],
)
def test_what_a_run_reads_is_not_removed(key, path, world, tmp_path, quiet, used, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in used.rglob("*") if p.is_file()}
    more = {"sample_steps": 1} if key == "scorer" else {}
    config = make(world, used, overwrite_output_dir=True, **more | {key: path})
    for run in (dry_run, train):
        with pytest.raises(UserError, match=rf"^{key} is .*starting over in output_dir .*run would remove it"):
            run(config, display=quiet)
    assert {p: p.read_bytes() for p in used.rglob("*") if p.is_file()} == before


def test_also_a_later_stages_and_what_is_beside_stays(world, tmp_path, quiet, used):
    stages = [{"loss": "sft"}, {"loss": "dpo", "ref_model_name_or_path": str(used / "model")}]
    with pytest.raises(UserError, match="stages.dpo.ref_model_name_or_path is"):
        train(make(world, used, overwrite_output_dir=True, stages=stages), display=quiet)
    config = make(world, used, overwrite_output_dir=True, train_dataset=str(used / "pairs.jsonl"), max_steps=1,
                  reference_dir=str(used / "reference"))
    train(config, display=quiet)
    assert (used / "pairs.jsonl").is_file()


def test_the_model_of_an_adapter(world, tmp_path, quiet, used):
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(used / "model")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    config = make(world, used, overwrite_output_dir=True, model_name_or_path=str(tmp_path / "adapter"), use_peft=True)
    with pytest.raises(UserError, match="the model of the adapter .*adapter is .*run/model: starting over"):
        train(config, display=quiet)


def test_a_model_that_is_a_link(world, tmp_path, quiet, used):
    """Starting over removes the link, and what it leads to stays; unless the run needs the link itself."""
    (used / "model").rename(tmp_path / "moved")
    (used / "model").symlink_to(tmp_path / "moved")
    for path in (used / "model", tmp_path / "moved"):
        config = make(world, used, overwrite_output_dir=True, model_name_or_path=str(path))
        with pytest.raises(UserError, match="model_name_or_path is .*: starting over"):
            train(config, display=quiet)
    before = (tmp_path / "moved" / "model.safetensors").read_bytes()
    train(make(world, used, overwrite_output_dir=True, max_steps=2), display=quiet)
    assert not (used / "model").is_symlink() and read_metrics(used)[-1]["step"] == 2
    assert (tmp_path / "moved" / "model.safetensors").read_bytes() == before


def test_a_resume_that_finds_no_checkpoint_removes_nothing_it_needs(world, tmp_path, quiet):
    run_dir = tmp_path / "run"
    shutil.copytree(world / "pretrained", run_dir / "model")
    with pytest.raises(UserError, match="model_name_or_path is .*: starting over"):
        train(make(world, run_dir, model_name_or_path=str(run_dir / "model")), resume=True, display=quiet)
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_rounds_do_not_remove_what_they_read(world, tmp_path, quiet):
    run_dir = tmp_path / "run"
    values = settings(world, run_dir, overwrite_output_dir=True, max_steps=-1)
    (run_dir / "start").mkdir(parents=True)
    (run_dir / "round-001").mkdir()
    (run_dir / "config.yaml").write_text("rounds: {}\n")
    shutil.copytree(world / "pretrained", run_dir / "start" / "model")
    shutil.copy(world / "train.jsonl", run_dir / "round-001" / "pairs.jsonl")
    section = {"scorer": "json:dumps", "max_new_tokens": 4}
    for top, more, key in (
        ({"model_name_or_path": str(run_dir / "start" / "model")}, {}, "model_name_or_path"),
        ({}, {"prompts": str(run_dir / "round-001" / "pairs.jsonl")}, "rounds.prompts"),
        ({}, {"scorer": str(run_dir / "start" / "model")}, "rounds.scorer"),
    ):
        config = config_from(values | top | {"rounds": section | more})
        with pytest.raises(UserError, match=f"{key} is .*: starting over in output_dir .*run would remove it"):
            rounds(config, display=quiet)
    assert (run_dir / "start" / "model" / "model.safetensors").is_file()
