"""Run by test_kill.py in a process of its own: kills a training run again and again, and lets it end at last.

    python kill_and_resume.py CONFIG.yaml KILLS SEED

Forks a child that trains with --resume and SIGKILLs itself at a random system call of a save (an fsync, a rename, a
removal, the writing of a file), or that the parent SIGKILLs at a random moment. After KILLS kills a child may finish.
Prints how many children died inside a save.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import time

import torch
from rich.console import Console

from fastpref.train import loop, run
from fastpref.train.config import load_config
from fastpref.train.display import Display

EVENTS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"),
          (torch, "save"), (loop, "save_model"), (run, "save_model"))


def die_at(event: int) -> None:
    """SIGKILL before or after the `event`-th of the calls that make up a save."""
    count = iter(range(1, 10**9))

    def wrap(own):
        def call(*args, **kwargs):
            if next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            value = own(*args, **kwargs)
            if next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return call

    for module, name in EVENTS:
        setattr(module, name, wrap(getattr(module, name)))


def child(config_path: str, event: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        if event is not None:
            die_at(event)
        loop.train(load_config(config_path), resume=True, display=Display(Console(file=io.StringIO())))
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the parent must hear of anything
        print("child:", type(error).__name__, error, file=sys.stderr)
        os._exit(1)


def main(config_path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    inside = 0
    for kill in range(kills):
        event = rng.randint(1, 60) if kill % 3 < 2 else None  # not the first: it could come to its end before
        pid = child(config_path, event)
        if event is None:
            time.sleep(rng.uniform(0.2, 1.5))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit("a child failed to go on")
            break
        inside += event is not None
    else:
        _, status = os.waitpid(child(config_path, None), 0)
        if status:
            raise SystemExit("the last child failed to go on")
    print(inside)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
