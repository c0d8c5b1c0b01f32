"""The examples run and learn."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_pytorch", "transformers_trainer"])
def test_it_learns(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example finds its model and data wherever it is called from
    found = load(name).main(steps=60, batch_size=4, learning_rate=1e-3)
    assert sum(found[-len(found) // 3 :]) / len(found[-len(found) // 3 :]) < 0.9 * found[0]
    assert not list(tmp_path.iterdir())


def under_torchrun(*words):
    """By two processes on this machine's processor."""
    return subprocess.run(
        ["timeout", "280", sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *map(str, words)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "CI": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers_trainer", "trl_dpo"])
def test_two_processes_are_one_training(name):
    done = under_torchrun(EXAMPLES / f"{name}.py", "--steps", 4, "--batch-size", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("one training by 2 processes") == done.stdout.count("one training by") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "reward"])
def test_configurations_under_two_processes(name, tmp_path):
    small = ["max_steps=2", "per_device_train_batch_size=2", "gradient_accumulation_steps=2",
             "eval_generate=false"]
    given = ["train", EXAMPLES / f"{name}.yaml", f"output_dir={tmp_path / 'run'}", *small]
    done = under_torchrun("-m", "fastpref", *given)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "2 ranks, each on" in done.stdout


@pytest.mark.slow
def test_what_runs_in_one_process_says_so():
    done = under_torchrun(EXAMPLES / "plain_pytorch.py", "--steps", 1)
    assert done.returncode != 0 and "plain_pytorch.py trains in one process; " in done.stderr
