"""Rounds that were ended, by a signal or `kill -9`, go on and end bitwise where the whole ones end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import lines, make, settings, timeless

from fastpref.errors import UserError
from fastpref.files import PARTIAL
from fastpref.rounds import collect, driver
from fastpref.rounds.config import config_from
from fastpref.rounds.driver import rounds
from fastpref.train.loop import Stopped

SETTINGS = dict(number=3, prompts_per_round=4, save_steps=2, per_device_train_batch_size=1, eval_num_generations=2,
                eval_prompts=3, eval_generate=True, eval_generate_samples=2, eval_max_new_tokens=2)


def same(whole: Path, parts: Path) -> None:
    number = len(json.loads((whole / "summary.json").read_text())["rounds"])
    names = ["start/evaluation.jsonl"]
    of_round = ("responses", "pairs", "evaluation")
    names += [f"round-{i:03d}/{name}.jsonl" for i in range(1, number + 1) for name in of_round]
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    model = json.loads((whole / "summary.json").read_text())["model"]
    a, b = (next((run / model).glob("*.safetensors")) for run in (whole, parts))
    assert a.read_bytes() == b.read_bytes()
    a, b = (timeless(json.loads((run / "summary.json").read_text())) for run in (whole, parts))
    assert a == b
    for i in range(1, number + 1):
        a, b = (timeless(lines(run / f"round-{i:03d}/train/metrics.jsonl")) for run in (whole, parts))
        assert a == b
    assert not [path for path in parts.rglob(PARTIAL + "*")]


def kill_and_compare(world, tmp_path, quiet, kills, seed, **changes):
    changes = SETTINGS | {"eval_dataset": str(world / "heldout.jsonl")} | changes
    rounds(make(world, tmp_path / "whole", **changes), display=quiet)
    path = tmp_path / "parts.yaml"
    path.write_text(yaml.safe_dump(settings(world, tmp_path / "parts", **changes)))
    script = Path(__file__).with_name("kill_rounds.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(path), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=world)
    assert done.returncode == 0, done.stderr[-2000:]
    same(tmp_path / "whole", tmp_path / "parts")
    return int(done.stdout)


def test_killed_and_resumed(world, tmp_path, quiet):
    assert kill_and_compare(world, tmp_path, quiet, kills=5, seed=0, save_rounds=2) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"save_rounds": 2},
        {"start_from": "initial", "reference": "previous"},
        {"pairing": "policy_reference", "schedule": "round"},
        {"use_peft": True, "save_rounds": 3},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_killed_often(world, tmp_path, quiet, seed, changes):
    assert kill_and_compare(world, tmp_path, quiet, kills=30, seed=seed, **changes) >= 4


def test_a_signal_while_sampling(world, tmp_path, quiet, monkeypatch):
    rounds(make(world, tmp_path / "whole", prompts_per_round=None), display=quiet)
    own, calls = collect._responses, []

    def responses(*values):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*values)

    with monkeypatch.context() as patch:
        patch.setattr(collect, "_responses", responses)
        with pytest.raises(Stopped, match="stopped in round 1 of 2; --resume goes on from there") as stopped:
            rounds(make(world, tmp_path / "parts", prompts_per_round=None), display=quiet)
    assert stopped.value.signum == signal.SIGTERM
    before = lines(tmp_path / "parts/round-001/responses.jsonl")
    assert len(before) <= 8
    rounds(make(world, tmp_path / "parts", prompts_per_round=None), resume=True, display=quiet)
    assert lines(tmp_path / "parts/round-001/responses.jsonl")[: len(before)] == before
    for i in (1, 2):
        a, b = (tmp_path / run / f"round-00{i}/pairs.jsonl" for run in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()
    assert json.loads((tmp_path / "parts/round-001/round.json").read_text())["resumed"]


def test_a_signal_as_training_begins(world, tmp_path, quiet, monkeypatch):
    own = driver._examples
    monkeypatch.setattr(driver, "_examples", lambda *a: os.kill(os.getpid(), signal.SIGINT) or own(*a))
    with pytest.raises(Stopped, match="stopped in round 1 of 2"):
        rounds(make(world, tmp_path / "run"), display=quiet)
    assert not (tmp_path / "run/round-001/train").exists()


@pytest.mark.parametrize("name", ["_train", "_save_optimizer", "_evaluate"])
def test_the_second_round_goes_on_from_the_first_ones_weights_and_moments(world, tmp_path, quiet, monkeypatch, name):
    config = {"eval_dataset": str(world / "heldout.jsonl"), "eval_prompts": 3, "per_device_train_batch_size": 2}
    rounds(make(world, tmp_path / "whole", **config), display=quiet)
    own = getattr(driver, name)

    def ended(first, second, *more):  # (session, number), or (path, states)
        if "round-002" in str(first) if isinstance(first, Path) else second == 2:
            raise KeyboardInterrupt
        return own(first, second, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver, name, ended)
        rounds(make(world, tmp_path / "parts", **config), display=quiet)
    rounds(make(world, tmp_path / "parts", **config), resume=True, display=quiet)
    same(tmp_path / "whole", tmp_path / "parts")


def test_what_is_complete_is_not_done_again(world, tmp_path, quiet, monkeypatch):
    first = rounds(make(world, tmp_path / "run", number=1, schedule="round"), display=quiet)
    for module, name in ((driver, "_train"), (driver, "_collect"), (driver.sharding, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("again"))
    assert rounds(make(world, tmp_path / "run", number=1, schedule="round"), resume=True, display=quiet) == first
    assert "these rounds are complete" in quiet.console.file.getvalue()
    monkeypatch.undo()
    monkeypatch.chdir(world)
    own, sampled = driver._collect, []
    monkeypatch.setattr(driver, "_collect", lambda *a, **k: sampled.append(str(a[1])) or own(*a, **k))
    more = rounds(make(world, tmp_path / "run", number=2, schedule="round"), resume=True, display=quiet)
    assert more["rounds"][0] == first["rounds"][0] and len(more["rounds"]) == 2  # one more of them
    assert len(sampled) == 1 and "round-002" in sampled[0]


def test_a_folder_of_another_configuration_is_refused(world, tmp_path, quiet):
    rounds(make(world, tmp_path / "run", number=1), display=quiet)
    with pytest.raises(UserError, match="holds a run already: --resume goes on with it, overwrite_output_dir=true"):
        rounds(make(world, tmp_path / "run", number=1), display=quiet)
    for changes, message in (
        ({"beta": 0.1}, r"beta \(0.5 there, 0.1 now\)"),
        ({"temperature": 0.5}, r"rounds.temperature \(1.0 there, 0.5 now\)"),
        ({"number": 2}, r"rounds.number \(1 there, 2 now\)"),  # the learning rate depends on it
        ({"scorer": "checks:equal"}, r"rounds.scorer \(checks:smooth there, checks:equal now\)"),
    ):
        with pytest.raises(UserError, match=f"holds rounds of another configuration: .*{message}"):
            rounds(make(world, tmp_path / "run", **{"number": 1} | changes), resume=True, display=quiet)
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/round-001/round.json").unlink()
    path = tmp_path / "run/round-001/responses.jsonl"
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "x'))
    with pytest.raises(UserError, match="sampled from other prompts"):
        rounds(make(world, tmp_path / "run", number=1), resume=True, display=quiet)
    again = rounds(make(world, tmp_path / "run", number=1, overwrite_output_dir=True), display=quiet)
    assert len(again["rounds"]) == 1


def test_a_folder_of_train_is_refused(world, tmp_path, quiet):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("loss: dpo\n")
    with pytest.raises(UserError, match="holds a run of `fastpref train`, no rounds"):
        rounds(config_from(settings(world, tmp_path / "run")), resume=True, display=quiet)
