"""DPO and RPO on a real model, from the same pairs: chosen log-probs, constraints kept, KL.

    make smollm2                             # its first round makes the pairs
    python examples/studies/smollm2.py       # three seeds; a method of a seed that is done is not run again

Does what RPO's paper (arXiv 2405.16436) says of DPO, that it drives the log-probs of chosen responses down, hold for
SmolLM2-135M-Instruct, and what does it cost? Per seed both train on the pairs that the first round of `make smollm2`
sampled, with the settings of examples/smollm2/rounds.yaml and in the same order; a fifth of the pairs is held out.
RPO's loss is DPO's plus eta * beta * (-logp_chosen); eta = 0 is DPO. Before and after, the model answers held-out
prompts (of kinds and topics that were trained, and of others); KL is that of its answers against the first model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study  # noqa: E402

from examples.smollm2 import report  # noqa: E402
from fastpref.errors import UserError  # noqa: E402
from fastpref.rounds.config import Config, config_from  # noqa: E402
from fastpref.train.config import config_from_dict  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME, SEEDS = "smollm2", 3
SETTINGS = study.ROOT / "examples" / "smollm2" / "rounds.yaml"
PAIRS = study.ROOT / "runs" / "smollm2" / "rounds" / "round-001" / "pairs.jsonl"
HELD_OUT_PAIRS = 5  # every fifth pair
GROUPS = ("trained kinds", "held-out kinds")


def settings(quick: bool) -> dict[str, Any]:
    if not PAIRS.is_file():
        raise UserError(f"{PAIRS}: no such file; `make smollm2` makes it")
    values = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    found = {"pairs_sha256": hashlib.sha256(PAIRS.read_bytes()).hexdigest(), "etas": [0, values["eta"]],
             "eval_steps": 5, "prompts_a_kind": 8, "num_train_epochs": values["num_train_epochs"], "of": values}
    return found | ({"num_train_epochs": 0.2, "prompts_a_kind": 1, "eval_steps": 1} if quick else {})


def rounds_config() -> Config:
    values = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    path = study.ROOT / values["model_name_or_path"]  # wherever the study is called from
    return config_from(values | {"model_name_or_path": str(path)})


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """Of each method its curves of held-out pairs and its report; goes on from what an interrupted run left."""
    folder.mkdir(exist_ok=True)
    lines = PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, held_out in (("train", False), ("heldout", True)):
        kept = [line for i, line in enumerate(lines) if (i % HELD_OUT_PAIRS == 0) == held_out]
        (folder / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
    logging.disable_progress_bar()
    found = {}
    for eta in settings["etas"]:
        done = folder / f"{method_name(eta)}.json"
        record = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
        if record.get("settings") != settings:
            record = {"settings": settings, "result": one_method(eta, seed, settings, folder, say)}
            done.write_text(json.dumps(record), encoding="utf-8")
        found[str(eta)] = record["result"]
    return {"methods": found}


def one_method(eta: float, seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    say(method_name(eta))
    base = rounds_config()
    values = {key: value for key, value in settings["of"].items() if key not in ("rounds", "eta")}
    values |= {
        "model_name_or_path": base.train.model_name_or_path, "output_dir": str(folder / method_name(eta)),
        "seed": seed, "train_dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "heldout.jsonl"),
        "eval_steps": settings["eval_steps"], "num_train_epochs": settings["num_train_epochs"],
        "reference_dir": str(folder / "reference"), "save_steps": 0, "loss": "rpo" if eta else "dpo",
    } | ({"eta": eta} if eta else {})
    curve = [line for line in study.trained(values, NAME) if line["split"] == "eval"]
    say(f"{method_name(eta)}: answers")
    most, model = settings["prompts_a_kind"], Path(values["output_dir"]) / "model"
    config = replace(base, train=config_from_dict(values, NAME))
    made = report.measure(config, model, most, 2 * most, seed=report.SEED + seed)
    return {
        "step": [line["step"] for line in curve],
        "chosen": [study.significant(line["logps/chosen"] - curve[0]["logps/chosen"]) for line in curve],
        "rejected": [study.significant(line["logps/rejected"] - curve[0]["logps/rejected"]) for line in curve],
        "kl": study.significant(made["kl"]["nats_per_response"]),
        "perplexity": {when: study.significant(ppl) for when, ppl in made["perplexity_under_start"].items()},
        "kept": {group: {when: made["satisfaction"][group][when]["share"] for when in ("before", "after")}
                 for group in GROUPS},
    }


def method_name(eta: float | str) -> str:
    return f"RPO η {float(eta):g}" if float(eta) else "DPO"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, by method."""
    seeds, found = list(results.values()), {}
    for method in seeds[0]["methods"]:
        runs = [seed["methods"][method] for seed in seeds]
        found[method] = {name: study.spread([run[name][-1] for run in runs]) for name in ("chosen", "rejected")} | {
            "kl": study.spread([run["kl"] for run in runs]),
            "perplexity": study.spread([run["perplexity"]["after"] / run["perplexity"]["before"] for run in runs]),
            **{group: study.spread([run["kept"][group]["after"] - run["kept"][group]["before"] for run in runs])
               for group in GROUPS},
        }
    return {"methods": found}


def table(record: dict[str, Any]) -> str:
    lines = [
        "| method | chosen log-prob, change, nats | rejected, change | trained kinds kept, change, points "
        "| held-out kinds | KL, nats a response | perplexity of greedy answers, times |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, of in record["summary"]["methods"].items():
        kept = " | ".join(study.plus_minus(of[group], 1, 100) for group in GROUPS)
        lines.append(
            f"| {method_name(method)} | {study.plus_minus(of['chosen'])} | {study.plus_minus(of['rejected'])} | {kept} "
            f"| {study.plus_minus(of['kl'])} | {study.plus_minus(of['perplexity'])} |"
        )
    return "\n".join([*lines, "", study.origin(record)])


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    from matplotlib.figure import Figure

    from bench.plots import FAINT, GRID

    seeds = list(record["results"].values())
    methods = list(seeds[0]["methods"])
    steps = seeds[0]["methods"][methods[0]]["step"]
    figure = Figure(figsize=(10.2, 3.8), layout="constrained")
    chosen, rejected, kept = figure.subplots(1, 3)
    for ax, name in ((chosen, "chosen"), (rejected, "rejected")):
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.grid(axis="y", color=GRID)
        ax.set_title(f"Held-out {name}")
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("change of log-prob, nats a response")
        study.lines(ax, steps, {
            method_name(method): ([seed["methods"][method][name] for seed in seeds], colour)
            for method, colour in zip(methods, COLOURS)
        })
    for method, colour in zip(methods, COLOURS):
        runs = [seed["methods"][method] for seed in seeds]
        for group, marker in zip(GROUPS, "o^"):
            gains = [100 * (run["kept"][group]["after"] - run["kept"][group]["before"]) for run in runs]
            kept.scatter([run["kl"] for run in runs], gains, color=colour, marker=marker,
                         label=f"{method_name(method)}, {group}")
    kept.axhline(0, color=FAINT, linewidth=0.8)
    kept.grid(axis="y", color=GRID)
    kept.set_title("Constraints kept")
    kept.set_xlabel("KL, nats a response")
    kept.set_ylabel("change, points")
    kept.legend(fontsize=7)
    return {NAME: figure}


COLOURS = ["#d55e00", "#00629b"]

if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
