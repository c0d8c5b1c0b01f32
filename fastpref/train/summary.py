"""What a run came to: summary.json with its verdict, and the table printed at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastpref.files import write_text
from fastpref.report.reading import read_run
from fastpref.report.verdict import verdict_of

from .checkpoint import State
from .config import TrainConfig
from .display import Display, duration, evaluation_table
from .evaluate import is_right
from .machine import device_name, peak_memory_mib, versions
from .scorer import Scorer
from .stage_data import StageData


def summarize(stages: Sequence[TrainConfig], data: StageData, state: State, device: torch.device,
              scorer: Scorer | None = None) -> dict[str, Any]:
    """What summary.json holds. data: of the last stage, whose held-out metrics at its start and end are `before` and
    `after`; state: at the run's end; scorer: gives what was generated its `rewards`, before and after.
    """
    history = {stage.name or "": state.history[stage.name or ""] for stage in stages}
    last = history[stages[-1].name or ""]
    seconds = sum(stage["seconds"] for stage in history.values())
    samples = [
        {
            "prompt": question.prompt,
            "expected": question.answer,
            "before": before,
            "after": after,
        }
        | ({} if question.answer is None else {"right": [is_right(text, question.answer) for text in (before, after)]})
        for question, before, after in zip(data.questions, last.get("generated", []), state.generated, strict=False)
    ]
    if scorer and samples:
        asked = [question.asked for question, _ in zip(data.questions, samples)]
        of_each = (scorer.score(asked, [sample[when] for sample in samples]) for when in ("before", "after"))
        samples = [sample | {"rewards": rewards} for sample, *rewards in zip(samples, *of_each)]
    return {
        "before": last.get("before", {}),
        "after": last.get("after", {}),
        "stages": {name: {k: v for k, v in stage.items() if k != "generated"} for name, stage in history.items()},
        "tokens_per_s": sum(stage["num_tokens"] for stage in history.values()) / seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "seconds": seconds,
        "device": device_name(device),
        "versions": versions(),
        "samples": samples,
    }


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json, with the verdict on metrics.jsonl as it is now."""
    summary["verdict"] = verdict_of(read_run(run_dir, summary)).content()
    write_text(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")


def show_summary(display: Display, run_dir: Path, summary: dict[str, Any]) -> None:
    """The table at the end of a run: what the held-out set says before and after, and what it cost."""
    columns: dict[str, dict[str, float]] = {}
    *earlier, last = summary["stages"]
    for name in earlier:
        found = {k: v for k, v in summary["stages"][name].get("before", {}).items() if k == "exact_match"}
        if found and not columns:
            columns["at the start"] = found
    nothing = ("watch/chosen_change", "watch/chosen_fell")  # since the start
    columns[f"before {last}"] = {k: v for k, v in summary["before"].items() if k not in nothing}
    columns[f"after {last}"] = summary["after"]
    if summary["after"]:
        display.console.print(evaluation_table(run_dir.name, columns))
    cost = [f"{summary['tokens_per_s']:,.0f} tokens/s", f"peak memory {summary['peak_memory_mib']:,.0f} MiB"]
    for name, stage in summary["stages"].items():
        skipped = f", {stage['skipped_steps']} skipped" if stage["skipped_steps"] else ""
        cost.append(f"{name} {stage['steps']} steps in {duration(stage['seconds'])}{skipped}")
    display.say(" | ".join(cost))
    for name, stage in summary["stages"].items():
        for line in watch_lines(run_dir, stage):
            display.say(f"{name}: {line}")
    if "verdict" in summary:
        display.verdict(summary["verdict"])


def watch_lines(run_dir: Path, stage: dict[str, Any]) -> list[str]:
    """What the watch has to say of a stage, of its `summary["stages"]`."""
    said = []
    budget, best, sampling = (stage.get(key) for key in ("kl_budget", "best", "sampling"))
    if budget:
        then = "the stage ended there" if budget["action"] == "stop" else "the stage went on"
        said.append(f"KL budget of {budget['budget']:g} nats reached at step {budget['step']} ({budget['kl']:.3g}, "
                    f"{budget['of']}); {then}; checkpoints/{budget['checkpoint']}")
    if best:
        saved = (run_dir / "checkpoints" / best["checkpoint"]).is_dir()
        where = f"checkpoints/{best['checkpoint']}" if saved else "no checkpoint was saved there"
        if best["step"] == stage["steps"] and not saved:
            where = "where the stage ended"
        said.append(f"best held-out reward {best['reward']:.3g} at step {best['step']}, {where}")
    if sampling and not sampling["taken"]:
        said.append("no fresh samples: there was no time for them within sample_time_share")
    return said
