"""Run by test_rounds_resume.py in a process of its own: kills rounds again and again, and lets them end at last.

    python kill_rounds.py CONFIG.yaml KILLS SEED
    torchrun --nproc-per-node=2 --max-restarts=KILLS kill_rounds.py CONFIG.yaml KILLS SEED

Forks a child that runs the rounds with resume and SIGKILLs itself at a random one of the calls that write something, in
the middle of sampling, pairing and training; the first one the parent SIGKILLs at a random moment. After KILLS kills a
child may finish. Prints how many children died by their own hand. Under torchrun one rank of each attempt but the last
SIGKILLs itself.
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
from transformers import LlamaForCausalLM  # noqa: F401 - here once, instead of in every child

from fastpref.rounds import collect, driver
from fastpref.rounds.config import load_config
from fastpref.train import loop, run, stage
from fastpref.train.display import Display

EVENTS = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"),
          (torch, "save"), (loop, "save_model"), (run, "save_model"), (driver, "save_model"), (collect, "_line"),
          (driver, "make_pairs"), (stage, "train_step"))


def die_at(event: int) -> None:
    """SIGKILL before or after the `event`-th of these calls."""
    count = iter(range(1, 10**9))

    def step():
        if next(count) == event:
            print("SIGKILL, by its own hand", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(own):
        def call(*args, **kwargs):
            step()
            value = own(*args, **kwargs)
            step()
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
        driver.rounds(load_config(config_path), resume=True, display=Display(Console(file=io.StringIO())))
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the parent must hear of anything
        print("child:", type(error).__name__, error, file=sys.stderr)
        os._exit(1)


def rank(config_path: str, kills: int, seed: int) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rng = random.Random(f"{seed} {attempt}")
    victim = rng.randrange(int(os.environ["WORLD_SIZE"]))
    if attempt < kills and victim == int(os.environ["RANK"]):
        die_at(rng.randint(20, 110) if victim == 0 else rng.randint(2, 40))  # the first does most of the writing
    driver.rounds(load_config(config_path), resume=True, display=Display(Console(file=io.StringIO())))


def main(config_path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        return rank(config_path, kills, seed)
    rng = random.Random(seed)
    inside = 0
    for kill in range(kills):
        event = rng.randint(20, 110) if kill else None
        pid = child(config_path, event)
        if event is None:
            time.sleep(rng.uniform(0.05, 0.3))
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
