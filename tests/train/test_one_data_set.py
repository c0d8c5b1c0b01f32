"""Ranks of a host share one copy of the tokens: starting two on 100,000 records costs the memory of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import settings, write_rows

RANK = """
import ctypes, gc, json, sys
from rich.console import Console
from fastpref.train.batch_order import BatchOrder
from fastpref.train.config import config_from_dict
from fastpref.train.display import Display
from fastpref.train.model import load_tokenizer
from fastpref.train.stage_data import load_data

rank, ranks, values = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def own():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return {name: int(lines[name].split()[0]) / 1024 for name in ("Pss", "Anonymous")}

stage = config_from_dict(values).stage_configs()[0]
tokenizer = load_tokenizer(stage)
say = Display(Console(file=open("/dev/null", "w")))
def everything(stage):
    (data,) = load_data([stage], tokenizer, say)
    order, tokens = BatchOrder(stage, data.train, 1), 0
    for step in range(order.steps):
        for batch in order.of_step(step)[1][rank::ranks]:
            tokens += sum(data.train[i].length for i in batch)
    return data, order, tokens
everything(config_from_dict(values | {"train_dataset": values["eval_dataset"]}).stage_configs()[0])  # what it imports
before = own()
kept = everything(stage)
print("ready", flush=True)
sys.stdin.readline()  # all ranks are there
after = own()
print(json.dumps({name: after[name] - before[name] for name in after} | {"examples": len(kept[0].train),
                 "tokens": kept[2]}), flush=True)
sys.stdin.readline()
"""


def measured(folder, values, ranks):
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(ranks), json.dumps(values)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
               for rank in range(ranks)]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in started)
        found = []
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
            found.append(json.loads(process.stdout.readline()))
        return found
    finally:
        for process in started:
            process.communicate("\n", timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
def test_two_ranks_cost_the_memory_of_one(world, tmp_path):
    pytest.importorskip("datasets")
    count, words = 100_000, "abcdef " * 40
    rows = [{"prompt": f"{i} {words[: i % 97]}:", "chosen": f" {i} {words[i % 7 : 120]}", "rejected": f" {words[:150]}"}
            for i in range(count)]
    values = settings(world, tmp_path / "run", train_dataset=str(write_rows(tmp_path / "many.jsonl", rows)),
                      max_length=512, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8,
                      gradient_accumulation_steps=4)
    (made,) = measured(tmp_path, values, 1)  # tokenises
    (alone,), two = measured(tmp_path, values, 1), measured(tmp_path, values, 2)
    assert [found["examples"] for found in (made, alone, *two)] == [count] * 4
    assert sum(found["tokens"] for found in two) == alone["tokens"]  # each reads its own batches
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow")) / 2**20
    print({"file": kept, "made": made, "alone": alone, "two": two})
    assert kept > 100 and alone["Pss"] > 0.8 * kept  # MiB: the file is what there is to share
    assert sum(found["Pss"] for found in two) < 1.15 * alone["Pss"]
    assert max(found["Anonymous"] for found in (alone, *two)) < 0.15 * kept
