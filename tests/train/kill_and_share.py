"""Run by test_reference.py in a process of its own: two runs that share a reference_dir, killed again and again.

    python kill_and_share.py CONFIG.yaml KILLS SEED

Forks two children at a time that cache the same reference log-probs, and SIGKILLs each at a random moment; after KILLS
of them both may come to their end. Prints how many were killed, and exits with 1 where one failed of itself.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fastpref.train import reference, reference_cache
from fastpref.train.config import load_config
from fastpref.train.display import Display


def child(config) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        reference_cache.cache_reference(config, Display(Console(file=io.StringIO())))
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the parent must hear of anything
        print("child:", type(error).__name__, error, file=sys.stderr)
        os._exit(1)


def main(path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    reference.Progress.EVERY, reference_cache.WAIT = 1, 0.01
    rng, config, killed = random.Random(seed), load_config(path), 0
    while True:
        runs = [child(replace(config, output_dir=str(Path(config.output_dir, name)), learning_rate=rate))
                for name, rate in (("a", 1e-3), ("b", 1e-4))]
        for pid in runs if killed < kills else ():
            time.sleep(rng.uniform(0.1, 0.5))
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in runs]
        if any(os.WIFEXITED(status) and os.WEXITSTATUS(status) for status in statuses):
            raise SystemExit(1)
        killed += sum(map(os.WIFSIGNALED, statuses))
        if not any(map(os.WIFSIGNALED, statuses)):
            break
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
