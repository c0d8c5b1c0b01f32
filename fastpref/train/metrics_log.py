"""Where the numbers go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

One JSON object a line: {"stage", "split": "train" | "eval", "step", "epoch", ...}, values under TRL's names. A value
that is not finite is written as null, so that every line is JSON for every reader.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from fastpref.errors import SaveError, UserError

from .config import TrainConfig


def check_report_to(config: TrainConfig) -> None:
    """Raises UserError for a target whose package is not installed: before the run, not at its first line."""
    for target in config.report_to:
        if importlib.util.find_spec(target) is None:
            raise UserError(f"report_to has {target}, which is not installed: pip install {target}")


class MetricsLog:
    """Writes lines of metrics. Opened at `size` bytes: what a killed run wrote after its checkpoint is cut off."""

    def __init__(self, run_dir: Path, config: TrainConfig, size: int, global_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.file = self.path.open("ab")
        self.file.truncate(size)
        self.file.seek(size)
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            purge = global_step + 1 if size else None
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if "wandb" in config.report_to:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "fastpref")
            self.wandb = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=config.to_dict())

    def write(
        self, stage: str, split: str, step: int, epoch: float, values: dict[str, float], global_step: int
    ) -> None:
        line: dict[str, Any] = {"stage": stage, "split": split, "step": step, "epoch": round(epoch, 4)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self.file.write((json.dumps(line) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise SaveError(f"could not write {self.path}: {error.strerror}") from error
        named = {f"{split}/{name}": value for name, value in values.items()}
        if self.tensorboard is not None:
            for name, value in named.items():
                self.tensorboard.add_scalar(name, value, global_step)
        if self.wandb is not None:
            self.wandb.log(named | {"epoch": epoch}, step=global_step)

    def samples(self, stage: str, step: int, samples: list[dict[str, Any]]) -> None:
        """Into samples.jsonl: responses of fresh samples. Of a step that is done again the later line counts."""
        with self.path.with_name("samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, "samples": samples}, ensure_ascii=False) + "\n")

    def size(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class NoLog:
    """What ranks other than the first have for a log."""

    def write(self, *line: Any) -> None: ...

    def samples(self, *line: Any) -> None: ...

    def size(self) -> int:
        return 0

    def close(self) -> None: ...
