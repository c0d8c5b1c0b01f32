"""Run by test_ranks.py under torchrun: trains with --resume, and SIGKILLs the second rank once, after its third step or
in its first checkpoint.

    torchrun --nproc-per-node=2 --max-restarts=1 kill_a_rank.py CONFIG.yaml MARKER step|checkpoint
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastpref.train import loop, sharding, stage
from fastpref.train.config import load_config
from fastpref.train.display import Display


def main(config_path: str, marker: Path, where: str) -> None:
    torch.set_num_threads(1)
    module, name, last = (stage, "train_step", 3) if where == "step" else (sharding, "crc32_of", 1)
    own, calls = getattr(module, name), iter(range(1, 99))

    def call(*args):
        values = own(*args)
        if next(calls) == last and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return values

    setattr(module, name, call)
    loop.train(load_config(config_path), resume=True, display=Display(Console(file=io.StringIO())))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
