"""Atomic saves: what a failure in the middle leaves, and what comes back bitwise."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from dataclasses import asdict

import numpy
import pytest
import torch

from fastpref.errors import SaveError, UserError
from fastpref.files import CHECKSUMS
from fastpref.train import checkpoint
from fastpref.train.checkpoint import State


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != CHECKSUMS}


def test_a_failing_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "checkpoints" / "00-dpo-00000004"
    checkpoint.save(path, lambda folder: (folder / "a").write_text("old"))

    def disk_full(folder):
        (folder / "a").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SaveError, match=r"could not save .*00-dpo-00000004: No space left on device \([\d,]+ MiB free"):
        checkpoint.save(path, disk_full)
    assert content(path) == {"a": "old"}
    with pytest.raises(SaveError, match="No space left"):
        checkpoint.save(path.with_name("00-dpo-00000008"), disk_full)

    def killed(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, killed)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and content(path) == {"a": "old"}
    checkpoint.save(path, lambda folder: (folder / "b").write_text("new"))
    assert content(path) == {"b": "new"}


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from fastpref.errors import SaveError
from fastpref.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for i, write in enumerate((
    lambda folder: save_file({"w": torch.zeros(9_000)}, folder / "model.safetensors"),
    lambda folder: torch.save({"w": torch.zeros(9_000)}, folder / "optimizer.pt"),
    lambda folder: (folder / "state.json").write_text("x" * 30_000),
)):
    try:
        checkpoint.save(Path(sys.argv[1], str(i)), write)
    except SaveError as error:
        print(error)
"""


def test_writers_that_the_system_stops(tmp_path):
    """A real limit on file sizes, met by each of the writers a checkpoint uses."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("could not save" in line for line in lines), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_order_limit_and_leftovers(tmp_path):
    folder = tmp_path / "checkpoints"
    for stage, name, step in ((0, "sft", 5), (0, "sft", 10), (1, "rpo", 0), (1, "rpo", 9), (1, "rpo", 10)):
        checkpoint.save(folder / checkpoint.folder_name(stage, name, step), lambda f: None)
    (folder / ".partial-01-rpo-00000011").mkdir()
    (folder / "notes").mkdir()
    (tmp_path / ".partial-summary.json").write_text("{")
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["00-sft-00000005", "00-sft-00000010", "01-rpo-00000000", "01-rpo-00000009", "01-rpo-00000010"]
    checkpoint.clean_up(tmp_path)
    assert not list(tmp_path.rglob(".partial*"))
    checkpoint.remove_old(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 5
    checkpoint.remove_old(tmp_path, 1)  # a stage's first weights are its reference: they stay
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["01-rpo-00000000", "01-rpo-00000010"]
    assert (folder / "notes").is_dir()


def test_state_and_generators_come_back(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn(3)
    optimizer.step()
    state = State(stage=1, step=7, window={"loss": [0.1 + 0.2, 3]}, history={"sft": {"after": {"loss": 1 / 3}}})
    checkpoint.write_state(tmp_path, asdict(state), {"seed": 1}, checkpoint.snapshot(checkpoint.tensors_of(optimizer)))

    def draw():
        return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    expected = draw()
    assert checkpoint.read_state(tmp_path) == (state, {"seed": 1})
    tensors = checkpoint.read_tensors(tmp_path)
    checkpoint.restore_random_state(tensors["random"])
    assert draw() == expected
    fresh = torch.optim.AdamW([weight], fused=True)
    fresh.load_state_dict(tensors["optimizer"])
    for name, value in optimizer.state[weight].items():
        assert torch.equal(fresh.state[weight][name], value)


def test_damaged_checkpoints_are_refused(tmp_path):
    checkpoint.write_state(tmp_path, asdict(State()), {}, checkpoint.tensors_of(None))
    (tmp_path / "optimizer.pt").write_bytes((tmp_path / "optimizer.pt").read_bytes()[:900])
    with pytest.raises(UserError, match="optimizer.pt: cannot be read"):
        checkpoint.read_tensors(tmp_path)
    for text in ("", "[]", '{"format": 2, "config": {}}', '{"format": 1, "config": {}, "colour": 1}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(UserError, match="not a checkpoint that can be read"):
            checkpoint.read_state(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"random": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_tensors(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_one_process_a_folder(tmp_path):
    with checkpoint.lock(tmp_path), pytest.raises(UserError, match=r"process \d+ on \S+ is training there"):
        with checkpoint.lock(tmp_path):
            pass
    with checkpoint.lock(tmp_path):
        pass


def test_a_snapshot_is_a_copy_that_shares_what_was_shared():
    tied = torch.arange(6.0).view(2, 3)
    own = {"head": tied, "embedding": tied, "states": [tied[:1], {"step": torch.tensor(2.0)}], "rate": 0.1}
    copy = checkpoint.snapshot(own)
    tied.zero_()
    assert copy["head"].tolist() == [[0, 1, 2], [3, 4, 5]] and copy["head"] is copy["embedding"]
    assert copy["states"][0].tolist() == [[0, 1, 2]] and copy["states"][1]["step"] == 2 and copy["rate"] == 0.1


def test_what_fails_in_the_saving_thread_is_raised_where_the_run_is():
    saver, order = checkpoint.Saver(), []

    def fail():
        raise SaveError("could not save")

    saver.start(lambda: order.append(1))
    saver.start(fail)  # after the first
    with pytest.raises(SaveError):
        saver.wait()
    saver.check()
    saver.start(fail)
    saver.join()
    with pytest.raises(SaveError):
        saver.start(lambda: order.append(2))
    saver.start(lambda: order.append(3))
    saver.wait()
    assert order == [1, 3]
