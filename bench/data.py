"""Reading and tokenising a data set: time, memory, bytes a token; a second start; an epoch's first batches from disk.

    fastpref bench data [--records 100000] [--drawn 1000000] [--tokenizer FOLDER]

Pairs of messages of 490 tokens or so, of the words of this repository's documentation as often as they come there, are
written as JSON lines. Each start is a process of its own that does what `fastpref train` does before it loads a model:
`first` reads, tokenises and keeps, `again` finds the file of the first, `stream` then collates the first batches of an
epoch, wherever in the file they are. Memory is the process's high-water mark, its libraries (torch, transformers)
included; what is not pages of a file stands beside it. CPU seconds are those of all processes of a start: on a machine
that others use too they say more than the clock. `drawn`: so many examples of random tokens are written as a first
start would, and planned and streamed: what a million take once they are tokenised.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.table import Table

from fastpref.data import TokenizeReport, collate, stored

from . import command
from .harness import console, status_bytes
from .peers import MIB
from .records import Results, Row

ROOT = Path(__file__).parent.parent
STEPS = 2000  # batches of 8 that `stream` makes
PHASES = ("first", "again", "stream")
DRAWN = ("draw", "drawn")


@dataclass
class DataRow(Row):
    phase: str = ""
    records: int = 0
    tokenizer: str = ""
    tokens: int = 0  # of all records, each prompt once
    start_s: float | None = None  # Python, torch, transformers, tokenizer
    load_s: float | None = None  # until the examples are there
    plan_s: float | None = None  # the order of an epoch, and the content hash of all
    cpu_s: float | None = None  # of the whole process and its workers
    worker_mib: float | None = None  # resident in the largest process that tokenises, pages shared with its parent too
    batches_s: float | None = None
    data_mib: float | None = None  # the JSON lines
    bytes_a_token: float | None = None  # in the cache
    start_mib: float | None = None  # resident before load
    peak_mib: float | None = None  # resident at most
    anon_mib: float | None = None  # resident at the end and no page of a file


def write_data(path: Path, records: int) -> None:
    words = " ".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))).split()
    rng = random.Random(0)

    def text(role: str, few: int, many: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choices(words, k=rng.randint(few, many)))}]

    with path.open("w") as file:
        for _ in range(records):
            row = {"prompt": text("user", 40, 90), "chosen": text("assistant", 50, 120),
                   "rejected": text("assistant", 50, 120)}
            file.write(json.dumps(row) + "\n")


def draw(path: str, records: int) -> None:
    """A file of examples as a start leaves it, of random tokens."""
    rng = numpy.random.default_rng(0)

    def ragged(lengths: Any, dtype: str, values: int = 49152) -> stored.Ragged:
        offsets = numpy.cumsum([0, *lengths], dtype=numpy.int32)
        return rng.integers(0, values, offsets[-1], dtype), offsets

    def parts() -> Iterator[stored.Part]:
        for first in range(0, records, stored.PART):
            n = min(stored.PART, records - first)
            part: stored.Part = {
                "record_id": numpy.arange(first, first + n, dtype=numpy.int32),
                "desirable": numpy.full(n, -1, numpy.int8), "margin": numpy.full(n, numpy.nan),
                "partly": numpy.zeros(n, numpy.uint8), "hash": ragged([16] * n, "uint8", 256),
                "source": ragged([24] * n, "uint8", 128), "prompt": ragged(rng.integers(90, 220, n), "int32"),
            }
            for side in range(2):
                part[f"response_{side}"] = ragged(rng.integers(80, 255, n), "int32")
                part[f"scored_{side}"] = ragged([0] * n, "int32")
            yield part

    stored._write(Path(path), parts(), TokenizeReport("pair"))


def measure(phase: str, data: str, tokenizer: str, records: str) -> dict[str, float]:
    """What a start takes; in a process of its own."""
    begun = time.perf_counter()
    from fastpref.data import identity_of
    from fastpref.train.batch_order import BatchOrder
    from fastpref.train.config import TrainConfig
    from fastpref.train.display import Display
    from fastpref.train.model import load_tokenizer
    from fastpref.train.stage_data import load_data

    config = TrainConfig(model_name_or_path=tokenizer, train_dataset=data, output_dir="unused")
    tokens = load_tokenizer(config)
    found = {"start_s": time.perf_counter() - begun, "start_mib": status_bytes("VmRSS") / MIB}
    begun = time.perf_counter()
    if phase == "draw":
        draw(data, int(records))
    display = Display()
    display.console.file = sys.stderr
    if phase in DRAWN:
        examples = stored._read(Path(data))[0]
    else:
        examples = load_data(config.stage_configs(), tokens, display)[0].train
    found["load_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    schedule = BatchOrder(config, examples, 0)
    schedule.of_step(0)
    identity_of(examples)
    found["plan_s"] = time.perf_counter() - begun
    found["tokens"] = int(examples.tokens(share_prompts=True).sum())
    if phase in ("stream", "drawn"):
        begun = time.perf_counter()
        for step in range(min(STEPS, schedule.steps)):
            for batch in schedule.of_step(step)[1]:
                collate([examples[i] for i in batch], 0, layout="shared")
        found["batches_s"] = time.perf_counter() - begun
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["cpu_s"] = sum(t.ru_utime + t.ru_stime for t in times)
    found["worker_mib"] = times[1].ru_maxrss * 1024 / MIB
    return found | {"peak_mib": status_bytes("VmHWM") / MIB, "anon_mib": status_bytes("RssAnon") / MIB}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastpref bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", type=command.positive, default=[100_000])
    parser.add_argument("--drawn", nargs="*", type=command.positive, default=[1_000_000])
    parser.add_argument("--tokenizer", default=str(ROOT / "examples" / "model"), metavar="FOLDER",
                        help="default: examples/model, whose vocabulary of 512 makes three tokens of one")
    parser.add_argument("--output", type=Path, metavar="DIR", help="JSON goes there")
    parser.add_argument("--quick", action="store_true", help="4,000 records: does it run, not how fast is it")
    options = parser.parse_args(arguments)
    results = Results.open(options.output, "data", torch.device("cpu"), DataRow)
    table = Table(*("records", "start", "tokens", "import s", "load s", "plan s", "CPU s", "records/s", "bytes/token",
                    "peak MiB", "not files' MiB", "batches/s"), box=None)
    wanted = [(records, PHASES) for records in options.records] + [(records, DRAWN) for records in options.drawn]
    for records, phases in [(4000, PHASES), (4000, DRAWN)] if options.quick else wanted:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "cache", "drawn.arrow") if phases is DRAWN else Path(folder, "pairs.jsonl")
            data.parent.mkdir(exist_ok=True)
            if phases is PHASES:
                write_data(data, records)
            for phase in phases:
                home = os.environ | {"HF_DATASETS_CACHE": str(Path(folder, "cache"))}
                child = subprocess.run(
                    [sys.executable, "-m", "bench.data", phase, str(data), options.tokenizer, str(records)], cwd=ROOT,
                    text=True, stdout=subprocess.PIPE, env=home,
                )
                if child.returncode:
                    raise ValueError(f"{phase}: the process ended with code {child.returncode}")
                found = json.loads(child.stdout.splitlines()[-1])
                kept = sum(path.stat().st_size for path in Path(folder, "cache").rglob("*.arrow"))
                row = DataRow(
                    "fastpref", "", "", 0, 0, 0, "", benchmark="data", phase=phase, records=records,
                    tokenizer=Path(options.tokenizer).name, data_mib=data.stat().st_size / MIB,
                    bytes_a_token=kept / found["tokens"], note=f"load average {os.getloadavg()[0]:.1f}", **found)
                results.add([row])
                rate = min(STEPS, records // 8) / row.batches_s if row.batches_s else 0
                table.add_row(f"{records:,}", phase, f"{row.tokens:,}", f"{row.start_s:.1f}", f"{row.load_s:.1f}",
                              f"{row.plan_s:.1f}", f"{row.cpu_s:.1f}", f"{records / (row.load_s or 1):,.0f}",
                              f"{row.bytes_a_token:.2f}", f"{row.peak_mib:,.0f}", f"{row.anon_mib:,.0f}",
                              f"{rate:,.0f}" if rate else "")
    console().print(table)
    return 0


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
