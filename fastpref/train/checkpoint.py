"""Checkpoints that a kill, a full disk or a power cut cannot spoil.

    run/checkpoints/01-rpo-00000500/     stage 1 "rpo" after 500 steps
        config.json, model.safetensors, tokenizer files     what from_pretrained loads (the adapter's with LoRA)
        optimizer.pt                     optimiser state and random number generators; torch.load(weights_only=True)
        state.json                       where the run stands
        checksums.txt                    crc32 of every file, compared before one is read
        sharded/                         of a run on several GPUs: weights and optimiser state, in place of theirs above

A folder with such a name is complete: it was written beside, forced to the disk, and only then renamed. The one with
step 0 holds the weights a stage starts from, which are its reference: it stays while the run lasts.

A step waits for a copy in host memory, not for the disk: a thread writes the copy while training goes on.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpref.errors import SaveError, UserError, first_line
from fastpref.files import (
    CHECKSUMS,
    PARTIAL,
    FileLock,
    crc32_of,
    read_checksums,
    reason,
    to_disk,
    write_checksums,
)

from . import ranks

NAME = re.compile(r"(\d+)-([\w.-]+)-(\d{8})")
SHARDED = "sharded"  # in a checkpoint: what several ranks wrote, see sharding.py


@dataclass
class State:
    """Where a run stands between two steps; all of it plain JSON."""

    stage: int = 0
    step: int = 0  # optimiser steps done in this stage, skipped ones included
    global_step: int = 0  # of all stages
    evaluated: int = -1  # the last step that was evaluated
    num_tokens: int = 0  # tokens the trunk has read in this stage
    seconds: float = 0.0  # spent in this stage's steps
    skipped: int = 0  # steps with NaN or inf gradients
    skipped_in_a_row: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)  # since the last logged line: name -> [sum, count]
    history: dict[str, Any] = field(default_factory=dict)  # stage name -> what the summary says of it
    generated: list[str] = field(default_factory=list)  # texts of the latest greedy generation, the first few
    # Of fresh samples: step of the last ones, seconds spent on all, seconds that the next are expected to take
    sampling: dict[str, float] = field(default_factory=dict)
    metrics_bytes: int = 0  # length of metrics.jsonl
    data: str = ""  # identity of this stage's training examples
    reference: str | None = None  # identity of this stage's reference weights


def folder_name(stage: int, name: str, step: int) -> str:
    return f"{stage:02d}-{name}-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_place)


def _place(path: Path) -> tuple[int, int]:
    stage, _, step = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
    return int(stage), int(step)


def save(path: Path, write: Callable[[Path], None], known: Mapping[str, str] | None = None) -> None:
    """Makes the folder `path` with what `write(folder)` puts there, and checksums of it: at every instant it is absent
    or complete. known: checksums that other ranks have computed.

    Raises SaveError if writing fails; nothing of the attempt stays. An existing folder is replaced.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        write_checksums(partial, known or {})
        for folder, _, files in os.walk(partial):
            for name in files:
                to_disk(Path(folder, name))
            to_disk(Path(folder))
        if os.path.lexists(path):
            remove(path)
        os.rename(partial, path)
        to_disk(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # the latter two: how their writers report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"could not save {path}: {reason(error, path)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


_sound: dict[Path, list[tuple[str, int, int]]] = {}  # folders that were found as they were saved: names, sizes, times


def verify(folder: Path, say: Callable[[str], None] | None = None, *, together: bool = False) -> None:
    """Compares the files of a folder that `save` made with their checksums; any other folder is as good as it is.

    say: is told of a checkpoint that has none. together: the ranks share the files, and all of them have to ask.
    Raises UserError naming the file that is not what was saved.
    """
    wanted = read_checksums(folder)
    if not wanted and say and (folder / "state.json").is_file():
        say(f"{folder}: has no checksums (an older version wrote it), so it is taken as it is")
    there = [(name, *_size_and_time(folder / name)) for name in wanted]
    sound = not wanted or _sound.get(folder.absolute()) == there
    if all(ranks.told(sound)) if together else sound:
        return
    mine = list(wanted)[ranks.rank() :: ranks.size()] if together else list(wanted)
    bad = [name for name in mine if not _has(folder / name, wanted[name])]
    bad = [name for part in ranks.told(bad) for name in part] if together else bad
    if bad:
        raise UserError(f"{folder / bad[0]}: is not what was saved (its checksum differs); put it back, or delete "
                        f"{folder} to go on without it; if the change is yours, delete its {CHECKSUMS}")
    _sound[folder.absolute()] = there


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat() if path.is_file() else None
    return (found.st_size, found.st_mtime_ns) if found else (-1, -1)


def _has(path: Path, crc: str) -> bool:
    try:
        return crc32_of(path) == crc
    except OSError:  # it is gone, or its disk does not give it back
        return False


class Saver:
    """Writes in a thread, one save at a time. What fails there is raised by the next call of `check` or `wait`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Runs `work` beside the caller, after the save before it."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
                self.error = error

        # daemon: a run that is aborted does not wait for a save that nobody may want; no half of it has a name
        self.thread = threading.Thread(target=run, name="fastpref-save", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises what the last save failed with, if it has."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def join(self) -> None:
        """Until no save is under way, whatever came of the last one."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Until the last save is on the disk; raises what it failed with."""
        self.join()
        self.check()


def snapshot(value: Any) -> Any:
    """A copy in host memory of tensors in dicts, lists, tuples. Those that share memory (tied weights) still do."""
    return _copied(value, {})


def _copied(value: Any, done: dict[Any, Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part, done) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part, done) for part in value)
    if not isinstance(value, Tensor):
        return value
    if is_traceable_wrapper_subclass(value):  # torchao's quantised states: their parts are ordinary tensors
        names, context = value.__tensor_flatten__()
        parts = {name: _copied(getattr(value, name), done) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    value = value.detach()
    key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
    if value.numel() == 0 or key not in done:
        done[key] = value.to("cpu", copy=True)
    return done[key]


def remove(path: Path) -> None:
    """Removes a folder, or a link to one; a kill in the middle leaves no half of it under its name."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(PARTIAL + "old-" + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def clean_up(run_dir: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for folder in (run_dir, run_dir / "checkpoints"):  # not in reference/, which other runs may share
        for path in folder.glob(PARTIAL + "*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_old(run_dir: Path, limit: int | None, keep: Collection[str] = ()) -> None:
    """Leaves the newest `limit` checkpoints, those that hold a stage's starting weights, and the names in `keep`."""
    removable = [path for path in checkpoints(run_dir) if _place(path)[1] > 0 and path.name not in keep]
    for path in removable[: -limit if limit else None] if limit else []:
        remove(path)


def tensors_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What a run goes on from, beside weights and `State`. optimizer: None at a stage's start, where it is new."""
    return {"random": random_state(), "optimizer": None if optimizer is None else optimizer.state_dict()}


def write_state(folder: Path, state: dict[str, Any], config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """The part of a checkpoint that is not the model: a State as a dict, and its `tensors_of`."""
    content = {"format": 1, "config": config, **state}
    (folder / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    torch.save(tensors, folder / "optimizer.pt")


def read_state(folder: Path) -> tuple[State, dict[str, Any]]:
    """State and the configuration it was written under. Raises UserError for a checkpoint that is not one of ours, or
    is damaged."""
    verify(folder)
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        config = content.pop("config")
        if content.pop("format") != 1:
            raise ValueError("written by another version of fastpref")
        return State(**content), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a checkpoint that can be read ({error})") from None


def read_tensors(folder: Path) -> dict[str, Any]:
    """What `write_state` got as `tensors`, in host memory."""
    try:
        found: dict[str, Any] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return found
    except Exception as error:  # a damaged zip, pickle, or file
        raise UserError(f"{folder}/optimizer.pt: cannot be read ({first_line(error)})") from error


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Of every generator a step may draw from, in types that torch.load(weights_only=True) takes."""
    of_numpy = dict(numpy.random.get_state(legacy=False))
    of_numpy["state"] = {"key": of_numpy["state"]["key"].tolist(), "pos": of_numpy["state"]["pos"]}
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": of_numpy,
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
    of_numpy = state["numpy"]
    key = numpy.array(of_numpy["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state({**of_numpy, "state": {"key": key, "pos": of_numpy["state"]["pos"]}})
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Holds the run's folder: two processes that write one run would spoil it. Given up by the system on any death."""
    its = FileLock(run_dir / ".lock")
    if holder := its.take():
        raise UserError(f"output_dir {run_dir}: {holder} is training there")
    if its.impossible:
        warnings.warn(f"{run_dir}: no lock to be had there ({its.impossible}): nothing keeps a second process from "
                      "training in it", stacklevel=2)
    try:
        yield
    finally:
        its.release()
