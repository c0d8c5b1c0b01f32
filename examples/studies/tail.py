"""Training with the tail of the softmax as a rank-one matrix, or dropped: is it the same training?

    python examples/studies/tail.py             # three seeds, minutes
    python examples/studies/tail_smollm2.py     # after `make smollm2`, from its pairs: hours

Per seed the quickstart's small Llama is warm-started on its demonstrations; from that checkpoint its second stage (RPO)
trains 300 steps on the same pairs in the same order, with the exact gradient of the LM head, with `tail: rank1`
(docs/below-three-gemms.md) at its own threshold and at coarser ones, and at those with the rank-one part left out:
"dropped". With 512 tokens in the vocabulary a threshold is worth more than with 50,000, hence the coarser ones.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import yaml
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study  # noqa: E402

from fastpref import arguments, tail  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

NAME, SEEDS = "tail", 3
DRAWN = {"loss": "nats", "logps/chosen": "nats a response", "rewards/margins": "nats"}
SHOWN = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "exact_match")  # held-out, at the end
METHODS = {  # name: (tail, threshold, whether what is below it is dropped)
    "exact": ("exact", None, False),
    "rank1": ("rank1", tail.EPS, False),
    "rank1, 2^-9": ("rank1", 2.0**-9, False), "dropped, 2^-9": ("rank1", 2.0**-9, True),
    "rank1, 2^-6": ("rank1", 2.0**-6, False), "dropped, 2^-6": ("rank1", 2.0**-6, True),
}


def settings(quick: bool) -> dict[str, Any]:
    if quick:
        short = {"eval_max_new_tokens": 3}
        return {"example": "quickstart", "held_out": 8, "methods": list(METHODS)[:4:3],
                "warm_start": {"max_steps": 3} | short, "preferences": {"max_steps": 2, "eval_steps": 2} | short}
    methods = ["exact", "rank1", "rank1, 2^-6", "dropped, 2^-6"]
    return {"example": "quickstart", "held_out": 200, "methods": methods, "warm_start": {"max_steps": 500},
            "preferences": {"max_steps": 300, "eval_steps": 300}}


@contextmanager
def head(eps: float | None, dropped: bool) -> Iterator[None]:
    """The LM head's tail at another threshold, and without its rank-one part."""
    find = tail.find

    def without(*given: Any, **more: Any) -> tail.Tail:
        found = find(*given, **more)
        return replace(found, shares_BV=found.shares_BV.zero_()) if dropped else found

    # Where the tail is not small the gradient would be exact: here it is to be seen what that saves from.
    limit = tail.MOST_LEFT_OUT if eps in (None, tail.EPS) else 1.0
    with (mock.patch.object(tail, "find", without), mock.patch.object(tail, "MOST_LEFT_OUT", limit),
          mock.patch.object(arguments, "EPS", eps or tail.EPS)):
        yield


def stages(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """The quickstart's keys, and those of its two stages; or those of `make smollm2`, which needs no first."""
    name = settings["example"]
    base = yaml.safe_load((study.ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    base = {key: value for key, value in base.items() if key not in ("overwrite_output_dir", "rounds")}
    if "stages" not in base:
        return base, None, settings["preferences"]
    warm, preferences = ({key: value for key, value in stage.items() if key not in ("name", "num_train_epochs")}
                         for stage in base.pop("stages"))
    return base, warm | settings["warm_start"], preferences | settings["preferences"]


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """By method: what the held-out pairs show at the end; share of active columns and error, means over the steps."""
    folder.mkdir(exist_ok=True)
    logging.disable_progress_bar()
    base, warm, preferences = stages(settings)
    whole = study.ROOT / (preferences.get("eval_dataset") or base["eval_dataset"])
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = folder / "heldout.jsonl"
    held_out.write_text("".join(lines[: settings["held_out"]]), encoding="utf-8")

    def run(name: str, stage: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
        say(name)
        values = base | stage | {"output_dir": str(folder / name), "seed": seed, "logging_steps": 10} | changes
        for key in ("train_dataset", "model_name_or_path"):
            values[key] = str(study.ROOT / values[key])
        values["eval_dataset"] = str(held_out)
        return study.trained(values, NAME)

    if warm is not None:
        run("warm start", warm)
        preferences |= {"model_name_or_path": str(folder / "warm start" / "model"), "init_from_config": False}
    found = {}
    for method in settings["methods"]:
        kind, eps, dropped = METHODS[method]
        with head(eps, dropped):
            lines = run(method, preferences, tail=kind, reference_dir=str(folder / "reference"))
        last = [line for line in lines if line["split"] == "eval"][-1]
        found[method] = {name: study.significant(last[name], 6) for name in SHOWN if name in last}
        steps = [line for line in lines if line["split"] == "train" and "tail/active" in line]
        for name, exact in (("tail/active", 1.0), ("tail/error", 0.0)):
            mean = statistics.fmean(line[name] for line in steps) if steps else exact
            found[method][name] = study.significant(mean)
    return {"methods": found}


# ---- what is shown ---------------------------------------------------------------------------------------------------


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By method, over seeds: each number, and its distance from that of "exact" of the same seed."""
    seeds, found = list(results.values()), {}
    for method in seeds[0]["methods"]:
        runs = [seed["methods"][method] for seed in seeds]
        shown = [name for name in SHOWN if name in runs[0]]
        found[method] = {name: study.spread([run[name] for run in runs]) for name in shown}
        for name in shown:
            away = [abs(run[name] - seed["methods"]["exact"][name]) for run, seed in zip(runs, seeds)]
            found[method][f"{name}, from exact"] = study.spread(away)
        for name in ("tail/active", "tail/error"):
            found[method][name] = study.spread([run[name] for run in runs])
    return {"methods": found}


def table(record: dict[str, Any]) -> str:
    lines = [
        "| gradient of the head | columns active, % | left out of U (bound) | loss | its distance from exact | margin "
        "| chosen log-prob, nats | exact match, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, of in record["summary"]["methods"].items():
        active = f"{study.plus_minus(of['tail/active'], 1, 100)} | {of['tail/error']['mean']:.1e}"
        right = study.plus_minus(of["exact_match"], 1, 100) if "exact_match" in of else ""
        loss, away = (study.plus_minus(of[name], 3) for name in ("loss", "loss, from exact"))
        lines.append(
            f"| {method} | {active} | {loss} | {away} "
            f"| {study.plus_minus(of['rewards/margins'])} | {study.plus_minus(of['logps/chosen'])} | {right} |"
        )
    return "\n".join([*lines, "", study.origin(record)])


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    """How far each method ends from the exact gradient's run of the same seed, and how far those of seeds lie apart."""
    from matplotlib.figure import Figure

    from bench.plots import FAINT, GRID

    seeds, of = list(record["results"].values()), record["summary"]["methods"]
    methods = [method for method in of if method != "exact"]
    figure = Figure(figsize=(10.2, 3.0), layout="constrained")
    for ax, (name, unit) in zip(figure.subplots(1, len(DRAWN)), DRAWN.items()):
        apart = of["exact"][name]["sd"]
        if apart > 0:
            ax.axvline(apart, color=FAINT, linewidth=1.2)
            ax.text(apart, 0.97, " seeds, sd", transform=ax.get_xaxis_transform(), color=FAINT, fontsize=8, va="top")
        for y, method in enumerate(methods):
            away = [abs(seed["methods"][method][name] - seed["methods"]["exact"][name]) for seed in seeds]
            colour = "#d55e00" if method.startswith("dropped") else "#00629b"
            ax.scatter([max(x, 1e-6) for x in away], [y] * len(away), color=colour)
        ax.set_xscale("log")
        ax.set_yticks(range(len(methods)), methods)
        ax.set_ylim(len(methods) - 0.4, -0.8)
        ax.grid(axis="x", color=GRID)
        ax.set_title(name)
        ax.set_xlabel(f"distance from exact, {unit}")
    return {record["study"]: figure}


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
