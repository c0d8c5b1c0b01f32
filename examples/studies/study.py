"""What studies share: arguments, seeds side by side, the JSON that stays, the look of figures, README's tables.

A study is a module with NAME, a docstring, `settings(quick)` (all that a result depends on), `one_seed(seed, settings,
folder, say)` (a result that JSON can hold), `summarize(results)`, `table(record)` (Markdown) and `draw(record)`
(figures by name); `run` does the rest. Every seed runs on one thread, so a result does not depend on how many run side
by side. A finished seed is kept in OUTPUT/NAME.part/ until all are there: the same command goes on from it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, README = HERE / "results", HERE / "README.md"
SMOKE = ROOT / "runs" / "studies"  # where --quick writes, unless told
sys.path += [str(ROOT)] if str(ROOT) not in sys.path else []  # for bench.plots

from fastpref.errors import UserError  # noqa: E402
from fastpref.train.display import duration, quiet_imports  # noqa: E402
from fastpref.train.machine import device_name, versions  # noqa: E402

Say = Callable[[str], None]
SCHEMA = 1
SEEDS = 5  # at least so many, or the study's own; a smoke run has 1


class Failed(Exception):
    """A seed did not come to its end; its text is the one line shown."""


def run(study: ModuleType, arguments: Sequence[str] | None = None) -> int:
    """The command line of a study; returns the exit code: 0, 1 (a seed failed), 2 (bad arguments), 130 (Ctrl-C)."""
    options = _parser(study).parse_args(arguments)
    output = options.output or (SMOKE if options.quick else RESULTS)
    part = output / f"{study.NAME}.part"
    try:
        seeds = _seeds(options.seeds, 1 if options.quick else getattr(study, "SEEDS", SEEDS))
        jobs = options.jobs or (1 if options.quick else min(2, os.cpu_count() or 1))
        if jobs < 0:
            raise UserError(f"--jobs is {jobs}; it takes at least 1")
        try:
            if not options.draw:
                output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output is {str(output)!r}; it takes a folder ({error.strerror})") from None
        path = output / f"{study.NAME}.json"
        if options.draw:
            record = _read(path)
        else:
            record = _measure(study, seeds, study.settings(options.quick), part, jobs)
            _write(path, as_json(record) + "\n")
            shutil.rmtree(part)
        written = [path, *_draw(study, record, output)]
        if output.resolve() == RESULTS:
            write_section(README, study.NAME, study.table(record))
            written.append(README)
    except UserError as error:
        print(f"{study.NAME}: {error}", file=sys.stderr)
        return 2
    except (Failed, OSError) as error:
        print(f"{study.NAME}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = len(list(part.glob("seed-*.json")))
        print(f"{study.NAME}: stopped; {kept} finished seeds are kept, the same command goes on", file=sys.stderr)
        return 130
    print(study.table(record))
    print("\n".join(f"wrote {_short(path)}" for path in written))
    return 0


def _parser(study: ModuleType) -> argparse.ArgumentParser:
    first = (study.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=study.NAME, description=first)
    default = getattr(study, "SEEDS", SEEDS)
    parser.add_argument("--seeds", default=None, help=f"how many (at least 1; default {default}), or which: 3,5,8")
    parser.add_argument("--output", type=Path, help=f"folder of the JSON and the figures (default {_short(RESULTS)})")
    parser.add_argument("--jobs", type=int, default=0, help="seeds side by side, a thread each (default 2)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds: it shows nothing")
    parser.add_argument("--draw", action="store_true", help="only draw again what the JSON in the folder holds")
    return parser


def _seeds(text: str | None, default: int) -> list[int]:
    takes = "a number of seeds, at least 1, or seeds apart by commas"
    try:
        found = [int(part) for part in (text or str(default)).split(",")]
    except ValueError:
        raise UserError(f"--seeds is {text!r}; it takes {takes}") from None
    if text is None or "," not in text:
        found = list(range(found[0]))
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise UserError(f"--seeds is {text!r}; it takes {takes}")
    return found


# ---- seeds -----------------------------------------------------------------------------------------------------------


def _measure(study: ModuleType, seeds: Sequence[int], settings: dict[str, Any], part: Path, jobs: int) -> dict:
    """Runs the seeds that are not there yet; the record."""
    begun = time.perf_counter()
    asked = json.loads(json.dumps(settings)) | {"versions": _versions()}
    part.mkdir(exist_ok=True)
    todo = []
    for seed in seeds:
        path = part / f"seed-{seed}.json"
        if not (path.is_file() and json.loads(path.read_text())["asked"] == asked):
            path.unlink(missing_ok=True)
            todo.append(seed)
    if len(todo) < len(seeds):
        print(f"{len(seeds) - len(todo)} of {len(seeds)} seeds were finished before: {_short(part)}")
    print(f"{study.NAME}: {len(todo)} seeds, {jobs} side by side", flush=True)
    if jobs == 1:
        threads = torch.get_num_threads()
        try:
            for done, seed in enumerate(todo):
                _one(study.__file__, seed, settings, asked, part)
                _tell(done + 1, len(todo), begun)
        finally:
            torch.set_num_threads(threads)
    else:
        _side_by_side(study, todo, settings, asked, part, jobs, begun)
    found = {seed: json.loads((part / f"seed-{seed}.json").read_text()) for seed in seeds}
    results = {str(seed): found[seed]["result"] for seed in seeds}
    return {
        "schema": SCHEMA,
        "study": study.NAME,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(torch.device("cpu")).rsplit(",", 1)[0] + f", {jobs} seeds side by side, a thread each",
        "versions": _versions(),
        "settings": settings,
        "seeds": list(seeds),
        "seconds": round(sum(one["seconds"] for one in found.values()), 1),
        "summary": study.summarize(results),
        "results": results,
    }


def _side_by_side(study: ModuleType, todo: Sequence[int], settings: dict[str, Any], asked: dict[str, Any], part: Path,
                  jobs: int, begun: float) -> None:
    waiting, running, done = list(todo), {}, 0
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed = waiting.pop(0)
                process = context.Process(target=_one, args=(study.__file__, seed, settings, asked, part))
                process.start()
                running[process.sentinel] = seed, process
            for sentinel in connection.wait(running):
                seed, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise Failed(f"seed {seed} ended with exit code {process.exitcode}; finished seeds are kept")
                done += 1
                _tell(done, len(todo), begun)
    finally:
        for _, process in running.values():
            process.terminate()


def _one(study: str, seed: int, settings: dict[str, Any], asked: dict[str, Any], part: Path) -> None:
    """One seed, in this process."""
    torch.set_num_threads(1)
    quiet_imports()
    module, begun = load(Path(study)), time.perf_counter()

    def say(text: str) -> None:
        print(f"  seed {seed} {duration(time.perf_counter() - begun)}  {text}", flush=True)

    result = module.one_seed(seed, settings, part / f"seed-{seed}", say)
    seconds = round(time.perf_counter() - begun, 1)
    _write(part / f"seed-{seed}.json", json.dumps({"asked": asked, "seconds": seconds, "result": result}))
    shutil.rmtree(part / f"seed-{seed}", ignore_errors=True)


def load(path: Path) -> ModuleType:
    """A study as a module of its own name, whether it is the program or not."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tell(done: int, of: int, begun: float) -> None:
    passed = time.perf_counter() - begun
    print(f"{done} of {of} seeds, {duration(passed)}, about {duration(passed / done * (of - done))} left", flush=True)


# ---- what is left behind ---------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    import matplotlib

    wanted = ("python", "fastpref", "torch", "transformers", "numpy")
    return {name: v for name, v in versions().items() if name in wanted} | {"matplotlib": matplotlib.__version__}


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be drawn ({getattr(error, 'strerror', None) or error})") from None
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {record.get('schema')!r}; this program reads {SCHEMA}")
    return record


def as_json(value: Any, indent: str = "") -> str:
    """Readable in a diff: what fits on a line, and a list of numbers, is on one."""
    line = json.dumps(value)
    if not isinstance(value, dict) or len(line) + len(indent) <= 120:
        return line
    parts = (f"{indent} {json.dumps(key)}: {as_json(one, indent + ' ')}" for key, one in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _draw(study: ModuleType, record: dict[str, Any], output: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from bench import plots

    with matplotlib.rc_context(plots.STYLE | {"font.size": 10, "axes.titlesize": 10.5}):
        return [plots.save(figure, output / name) for name, figure in study.draw(record).items()]


def write_section(readme: Path, name: str, text: str) -> None:
    """Puts `text` between README's lines `<!-- name -->` and `<!-- /name -->`; makes them at the end if need be."""
    whole = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    block = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
    if f"<!-- {name} -->" in whole:
        before, rest = whole.split(f"<!-- {name} -->", 1)
        whole = before + block + rest.split(f"<!-- /{name} -->", 1)[1]
    else:
        whole += f"\n{block}\n"
    _write(readme, whole)


def _short(path: Path) -> str:
    return os.path.relpath(path)


def trained(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run of `fastpref train` with this configuration; one that is there goes on, or is
    complete. name: whose configuration it is, in messages."""
    from rich.console import Console

    from fastpref.train.config import config_from_dict
    from fastpref.train.display import Display
    from fastpref.train.loop import train

    train(config_from_dict(values, name), resume=True, display=Display(Console(file=io.StringIO())))
    lines = (Path(values["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation over seeds (n - 1; 0 of one seed), lowest and highest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    found = {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values)}
    return {name: significant(value) for name, value in found.items()}


def plus_minus(of: dict[str, float], digits: int = 2, scale: float = 1.0) -> str:
    """mean ± standard deviation, with a real minus sign."""
    mean = f"{scale * of['mean']:.{digits}f}"
    mean = mean.removeprefix("-") if not float(mean) else mean.replace("-", "−")
    return f"{mean} ± {scale * of['sd']:.{digits}f}"


def origin(record: dict[str, Any]) -> str:
    """Where a record comes from, in a line."""
    versions = record["versions"]
    return (
        f"Mean ± standard deviation over {len(record['seeds'])} seeds; {record['date'][:10]}, {record['device']}, "
        f"{duration(record['seconds'])} of computing, torch {versions['torch']}, fastpref {versions['fastpref']}."
    )


def band(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean over seeds at each place, and one standard deviation below and above."""
    mean = [statistics.fmean(column) for column in zip(*curves, strict=True)]
    sd = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*curves, strict=True)]
    return mean, [m - s for m, s in zip(mean, sd)], [m + s for m, s in zip(mean, sd)]


def lines(ax: Axes, xs: Sequence[float], curves: dict[str, tuple[Sequence[Sequence[float]], str]],
          gap: float = 0.075) -> None:
    """Mean and band of one standard deviation over seeds, by label: (a curve a seed, colour); each with its name right
    of its end, names at least `gap` of the height apart. The axis limits must be set."""
    ends = []
    for label, (of_seeds, colour) in curves.items():
        mean, low, high = band(of_seeds)
        ax.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        ax.plot(xs, mean, color=colour, linewidth=1.8)
        ends.append((mean[-1], label, colour))
    to_axes = ax.transData + ax.transAxes.inverted()
    ends.sort()
    places = [float(to_axes.transform((xs[-1], y))[1]) for y, *_ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - 0.97)
    for i in reversed(range(len(places))):  # from the top, down again
        places[i] = min(places[i], 0.97 - gap * (len(places) - 1 - i)) if over else places[i]
    for place, (y, label, colour) in zip(places, ends):
        ax.annotate(
            label, (xs[-1], y), (1.05, place), textcoords="axes fraction", color=colour, va="center", fontsize=9,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.7, relpos=(0, 0.5), shrinkA=0, shrinkB=1),
        )


def is_finite(result: Any) -> bool:
    """Whether all numbers in a result are."""
    if isinstance(result, dict):
        return all(map(is_finite, result.values()))
    if isinstance(result, (list, tuple)):
        return all(map(is_finite, result))
    return not isinstance(result, float) or math.isfinite(result)
