"""What the stages of a run share (its folder, policy, log, signals), and the checkpoints that they leave there."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastpref.files import PARTIAL

from . import checkpoint, ranks, sharding
from .checkpoint import Saver, State
from .config import TrainConfig
from .display import Display
from .metrics_log import MetricsLog, NoLog
from .model import Policy, save_model, weights_of
from .scorer import Scorer
from .traits import save_config


class Interrupted(Exception):
    """Raised by StopFlag.check where a signal has been received; its text, once there is one, says where."""


class StopFlag:
    """Set by the first SIGINT or SIGTERM; a second one aborts at once."""

    def __init__(self) -> None:
        self.signum = 0

    @contextmanager
    def listening(self, display: Display) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(signum: int, frame: Any) -> None:
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum
            display.say("finishing this step, then saving a checkpoint; once more to abort at once", "yellow")

        before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """All ranks stop where one was asked to."""
        self.signum = ranks.largest(self.signum)
        if self.signum:
            raise Interrupted

    def tick(self, show: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Between two forward passes: shows progress, and stops if asked to."""

        def call(done: int, of: int) -> None:
            self.check()
            show(done, of)

        return call


@dataclass(frozen=True)
class Run:
    """What stages share. They change the policy's weights, and add to log, `seconds` and the folder; nothing else."""

    dir: Path
    config: TrainConfig  # of all stages
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    display: Display
    log: MetricsLog | NoLog
    stop: StopFlag
    scorers: Mapping[str, Scorer]  # of fresh samples, by their names in the configuration
    goes_on: bool  # from a checkpoint: what lies in the folder is its own
    alone: bool  # not one of several (fastpref/rounds), which say less
    saver: Saver = field(default_factory=Saver)
    seconds: dict[str, float] = field(default_factory=dict)  # wall time: reference, training, evaluation, saving


@contextmanager
def spent(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the time within to `seconds[what]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, stage: TrainConfig, state: State, optimizer: torch.optim.Optimizer | None,
                    start: dict[str, Any]) -> Path:
    """Saves where the run stands, then removes checkpoints beyond the limit; goes on while a thread writes a copy.

    state: of `stage`, which is under way; optimizer: None where it has not begun; start: its `StartLogps.tensors`.
    """
    run.saver.wait()
    path = run.dir / "checkpoints" / checkpoint.folder_name(state.stage, stage.name or "", state.step)
    if ranks.on_first(path.is_dir):  # just resumed from it, or saved at this step already
        return path
    state.metrics_bytes = run.log.size()
    content = asdict(state)
    if ranks.size() > 1 and not run.config.use_peft:  # an adapter is whole on every rank
        _save_sharded(run, path, optimizer, content, start)
        return path
    tensors, weights = checkpoint.tensors_of(optimizer) | start, weights_of(run.policy)
    beside = stage.optimizer != "adamw_offload"  # its states fill the host's memory: no room for a copy
    if beside:
        tensors, weights = checkpoint.snapshot(tensors), checkpoint.snapshot(weights)

    def write(folder: Path) -> None:
        save_model(run.policy, run.tokenizer, folder, weights)
        checkpoint.write_state(folder, content, run.config.to_dict(), tensors)

    def save() -> None:
        checkpoint.save(path, write)
        _remove_old(run, content)

    if beside and ranks.size() == 1:
        run.saver.start(save)
    else:
        ranks.on_first(save)
    return path


def _save_sharded(run: Run, path: Path, optimizer: torch.optim.Optimizer | None, content: dict[str, Any],
                  start: dict[str, Any]) -> None:
    """All ranks write their parts beside; then the first one makes the checkpoint of them."""
    parts = path.with_name(f"{PARTIAL}{checkpoint.SHARDED}-{path.name}")
    ranks.on_first(lambda: parts.mkdir(parents=True, exist_ok=True))
    known = sharding.save(run.policy, optimizer, parts)

    def write(folder: Path) -> None:
        os.rename(parts, folder / checkpoint.SHARDED)
        run.policy.model.config.save_pretrained(folder)
        save_config(run.policy.model, folder)
        run.tokenizer.save_pretrained(folder)
        checkpoint.write_state(folder, content, run.config.to_dict(), checkpoint.tensors_of(None) | start)

    def save() -> None:
        checkpoint.save(path, write, known)
        _remove_old(run, content)

    ranks.on_first(save)


def _remove_old(run: Run, content: dict[str, Any]) -> None:
    """Of those beyond save_total_limit all but two of a stage: of its KL budget, and of its best reward so far."""
    found = (history.get(what, {}).get("checkpoint") for history in content["history"].values()
             for what in ("kl_budget", "best"))
    checkpoint.remove_old(run.dir, run.config.save_total_limit, {name for name in found if name})
