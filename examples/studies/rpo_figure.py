"""RPO's first figure (arXiv 2405.16436): chosen log-probs while DPO and RPO train, and what that does to answers.

    python examples/studies/rpo_figure.py

Per seed: the quickstart's small Llama (random weights) is warm-started on its demonstrations, of which a third are
wrong; from that checkpoint DPO, and RPO at several eta, train on the same pairs in the same order. Of the quickstart's
seven tasks only the three that are learnt soonest are used (TASKS): a warm start is then a matter of seconds.

RPO's loss is DPO's plus eta * beta * (-logp_chosen); eta = 0 is DPO. A control takes as many steps of supervised
training on the chosen responses alone. Everything runs through `fastpref.train`; what is drawn is in its metrics.jsonl:
log-probs of held-out chosen and rejected responses relative to the warm start (nats a response), and exact match of
greedy held-out answers at the start and at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME, SFT = "rpo_figure", "sft"
DATA, MODEL = study.ROOT / "examples" / "data", study.ROOT / "examples" / "model"
# task: words that stand in its prompts and in no other task's
TASKS = {
    "largest": ("largest", "smallest"),
    "sorting": ("upwards", "downwards"),
    "date": ("year-month-day", "ISO date"),
}


def settings(quick: bool) -> dict[str, Any]:
    if quick:
        return {
            "beta": 0.1, "etas": [0.5], "tasks": ["largest"], "held_out": 8,
            "warm_start": {"learning_rate": 2e-3, "max_steps": 3, "eval_max_new_tokens": 3},
            "preferences": {"learning_rate": 2e-4, "max_steps": 2, "eval_steps": 1, "eval_max_new_tokens": 3},
        }
    return {
        "beta": 0.1, "etas": [0, 0.005, 0.05, 0.5, 5], "tasks": list(TASKS), "held_out": 150,
        "warm_start": {"learning_rate": 2e-3, "max_steps": 500},
        "preferences": {"learning_rate": 2e-4, "max_steps": 120, "eval_steps": 12},
    }


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """Curves over the recorded steps and exact match, by eta; goes on from what an interrupted run left in `folder`."""
    folder.mkdir(exist_ok=True)
    words = tuple(word for task in settings["tasks"] for word in TASKS[task])
    for name, most in (("sft", None), ("train", None), ("heldout", settings["held_out"])):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if any(word in json.loads(line)["prompt"] for word in words)]
        (folder / f"{name}.jsonl").write_text("".join(kept[:most]), encoding="utf-8")

    logging.disable_progress_bar()  # a bar for every save and load

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        say(name)
        quickstart = yaml.safe_load((DATA.parent / "quickstart.yaml").read_text(encoding="utf-8"))
        values = {key: value for key, value in quickstart.items() if key not in ("stages", "overwrite_output_dir")}
        values |= {"output_dir": str(folder / name), "seed": seed, "eval_dataset": str(folder / "heldout.jsonl")}
        lines = study.trained(values | {"per_device_eval_batch_size": 128} | changes, NAME)
        return [line for line in lines if line["split"] == "eval"]

    warm = run("warm start", loss="sft", model_name_or_path=str(MODEL), train_dataset=str(folder / "sft.jsonl"),
               **settings["warm_start"])
    found: dict[str, Any] = {"warm_start": _exact_match(warm[-1]), "methods": {}}
    for method in [*settings["etas"], SFT]:
        if method == SFT:
            loss = {"loss": "chosen_sft"}
        else:
            loss = {"beta": settings["beta"]} | ({"loss": "rpo", "eta": method} if method else {"loss": "dpo"})
        lines = run(
            method_name(method), model_name_or_path=str(folder / "warm start" / "model"), init_from_config=False,
            train_dataset=str(folder / "train.jsonl"), reference_dir=str(folder / "reference"), **loss,
            **settings["preferences"],
        )
        found["methods"][str(method)] = {
            "step": [line["step"] for line in lines],
            "chosen": _change(lines, "logps/chosen"),
            "rejected": _change(lines, "logps/rejected"),
        } | _exact_match(lines[-1])
    return found


def method_name(method: float | str) -> str:
    if method == SFT:
        return "SFT on chosen"
    return f"RPO η {float(method):g}" if float(method) else "DPO"


def _change(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [study.significant(line[name] - lines[0][name]) for line in lines]


def _exact_match(line: dict[str, Any]) -> dict[str, Any]:
    return {name: study.significant(value) for name, value in line.items() if name.startswith("exact_match")}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, by method: the change of both log-probs to the last step, exact match, its gain on the warm start."""
    seeds, found = list(results.values()), {}
    for method in seeds[0]["methods"]:
        runs = [seed["methods"][method] for seed in seeds]
        gains = [run["exact_match"] - seed["warm_start"]["exact_match"] for run, seed in zip(runs, seeds)]
        found[method] = {
            "chosen": study.spread([run["chosen"][-1] for run in runs]),
            "rejected": study.spread([run["rejected"][-1] for run in runs]),
            "exact_match": study.spread([run["exact_match"] for run in runs]),
            "gain": study.spread(gains),
        }
    return {"warm_start": study.spread([seed["warm_start"]["exact_match"] for seed in seeds]), "methods": found}


def table(record: dict[str, Any]) -> str:
    summary = record["summary"]
    lines = [
        "| method | chosen log-prob, change, nats | rejected log-prob, change, nats | exact match, % "
        "| its change, points |",
        "|---|---|---|---|---|",
        f"| warm start | | | {study.plus_minus(summary['warm_start'], 1, 100)} | |",
    ]
    for method, of in summary["methods"].items():
        lines.append(
            f"| {method_name(method)} | {study.plus_minus(of['chosen'])} | {study.plus_minus(of['rejected'])} "
            f"| {study.plus_minus(of['exact_match'], 1, 100)} | {study.plus_minus(of['gain'], 1, 100)} |"
        )
    return "\n".join([*lines, "", study.origin(record)])


COLOURS = ["#d55e00", "#74b3dc", "#3f93cf", "#00629b", "#08306b", "#009e73"]  # DPO; RPO, darker for more eta; SFT


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    from matplotlib.figure import Figure

    from bench.plots import FAINT, GRID, INK

    seeds = list(record["results"].values())
    methods = list(seeds[0]["methods"])
    steps = seeds[0]["methods"][methods[0]]["step"]
    figure = Figure(figsize=(10.2, 3.8), layout="constrained")
    chosen, rejected, answers = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for ax, name, title in ((chosen, "chosen", "Held-out chosen"), (rejected, "rejected", "Held-out rejected")):
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.grid(axis="y", color=GRID)
        ax.set_title(title)
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("change of log-prob, nats a response")
        ax.set_xlim(0, steps[-1])
        curves = {
            method_name(method).removeprefix("RPO "): ([s["methods"][method][name] for s in seeds], colour)
            for method, colour in zip(methods, COLOURS)
        }
        study.lines(ax, steps, curves)
    _answers(answers, record, ["warm_start", *methods], [INK, *COLOURS[: len(methods)]])
    return {NAME: figure}


def _answers(ax: Axes, record: dict[str, Any], columns: list[str], colours: list[str]) -> None:
    """A dot a seed, a line through those of one seed, a bar at their mean."""
    from bench.plots import GRID

    rows = []
    for seed in record["results"].values():
        rows.append([100 * (seed["methods"].get(name) or seed["warm_start"])["exact_match"] for name in columns])
    for row in rows:
        ax.plot(range(len(columns)), row, color=GRID, linewidth=1, zorder=1)
    for i, colour in enumerate(colours):
        values = [row[i] for row in rows]
        ax.scatter([i] * len(values), values, s=22, color=colour, linewidth=0, alpha=0.85, zorder=3)
        ax.plot([i - 0.28, i + 0.28], [sum(values) / len(values)] * 2, color=colour, linewidth=2, zorder=2)
    names = ["warm start", *(method_name(method).removeprefix("RPO ") for method in columns[1:])]
    ax.set_xticks(range(len(columns)), [name.replace(" on ", " ").replace(" ", "\n") for name in names], fontsize=9)
    ax.set_ylabel("held-out exact match, %")
    ax.set_title("Right answers at the end")
    ax.grid(axis="y", color=GRID)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
