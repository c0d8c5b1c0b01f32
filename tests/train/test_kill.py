"""`kill -9` at random moments, many inside a save: the run that goes on ends bitwise where the whole one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import read_metrics, settings

from fastpref.files import PARTIAL
from fastpref.train import checkpoint
from fastpref.train.config import config_from_dict
from fastpref.train.loop import train

TIMES = ("tokens_per_s", "scored_tokens_per_s", "saved_tokens_per_s", "peak_memory_mib")


def kill_and_compare(world, tmp_path, quiet, kills, seed, steps=(5, 4)):
    def config(name):
        values = settings(
            world, tmp_path / name, model_name_or_path=str(world / "config"), init_from_config=True, save_steps=2,
            save_total_limit=1, logging_steps=3,
        )
        stages = [{"loss": "sft", "max_steps": steps[0]}, {"loss": "kto", "max_steps": steps[1], "eval_steps": 2}]
        return values | {"stages": stages}

    train(config_from_dict(config("whole")), display=quiet)
    path = tmp_path / "parts.yaml"
    path.write_text(yaml.safe_dump(config("parts")))
    script = Path(__file__).with_name("kill_and_resume.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(path), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    a, b = ((run / "model" / "model.safetensors").read_bytes() for run in (whole, parts))
    assert a == b
    lines = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)] for run in (whole, parts)]
    assert lines[0] == lines[1]
    assert [p.name for p in checkpoint.checkpoints(whole)] == [p.name for p in checkpoint.checkpoints(parts)]
    assert not list(parts.rglob(PARTIAL + "*"))
    return int(done.stdout)


def test_killed_and_resumed(world, tmp_path, quiet):
    assert kill_and_compare(world, tmp_path, quiet, kills=4, seed=0) >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_often(world, tmp_path, quiet, seed):
    assert kill_and_compare(world, tmp_path, quiet, kills=40, seed=seed, steps=(31, 30)) >= 10
