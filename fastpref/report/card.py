"""The model card of a run, README.md of what `fastpref export` writes: from the files of the run, nothing made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .metrics import METRICS, metric, number, percent
from .reading import Run, as_row, is_number
from .verdict import verdict_of

SHOWN = ("exact_match", "reward", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "logps/chosen",
         "logps/rejected", "watch/kl", "loss")  # of the evaluations before and after


def card_of(run: Run, base: str, *, adapter: bool, dtype: str | None) -> str:
    """Markdown. base: what the run started from; adapter: whether the folder holds an adapter to it."""
    stages = run.config.get("stages") or [{}]
    every = [{**run.config, **stage} for stage in stages]
    head = {"base_model": base, "library_name": "peft" if adapter else "transformers",
            "tags": ["fastpref", *dict.fromkeys(str(stage.get("loss", "dpo")) for stage in every)]}
    what = f"A LoRA adapter for {base}" if adapter else f"{base}, trained further" + f" ({dtype})" * bool(dtype)
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {run.name}", f"{what}. Made by fastpref "
             f"{as_row(run.summary.get('versions')).get('fastpref', '')} on {run.summary.get('device', 'a machine')}."]
    parts += ["## Training", "\n".join(_stage(stage) for stage in every)]
    if table := _numbers(run.summary):
        parts += ["## Held-out numbers", table]
    verdict = as_row(run.summary.get("verdict")) or verdict_of(run).content()
    because = "".join(f"\n- {text}" for text in verdict["because"])
    parts += ["## Verdict", f"{verdict['kind']}:\n{because}"]
    parts += ["## Use", _use(base, adapter)]
    if versions := as_row(run.summary.get("versions")):
        parts += ["## Versions", ", ".join(f"{name} {found}" for name, found in versions.items())]
    parts += ["## Configuration", f"```yaml\n{run.config_text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _stage(stage: Mapping[str, Any]) -> str:
    """A line of Markdown."""
    keys = ("beta", "eta", "alpha", "gamma", "label_smoothing", "learning_rate", "num_train_epochs", "max_steps",
            "max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    said = ", ".join(f"{key} {stage[key]}" for key in keys if stage.get(key) not in (None, -1))
    held_out = f", held out {stage['eval_dataset']}" if stage.get("eval_dataset") else ""
    data = f"{stage.get('train_dataset')}{held_out}"
    return f"- {stage.get('name') or stage.get('loss', 'dpo')}: loss `{stage.get('loss', 'dpo')}`, {said}; data: {data}"


def _numbers(summary: Mapping[str, Any]) -> str:
    before, after = as_row(summary.get("before")), as_row(summary.get("after"))

    def cell(key: str, values: Mapping[str, Any]) -> str:
        if not is_number(value := values.get(key)):
            return ""
        return percent(value) if metric(key).unit == "share" else number(value)

    rows = [f"| {metric(key).name} | {cell(key, before)} | {cell(key, after)} |"
            for key in SHOWN if key in METRICS and is_number(after.get(key))]
    return "\n".join(["| | before | after |", "|---|---|---|", *rows]) if rows else ""


def _use(base: str, adapter: bool) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             'folder = "..."  # this one, or its name on the hub']
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), folder)')
    else:
        lines.append("model = AutoModelForCausalLM.from_pretrained(folder)")
    return "```python\n" + "\n".join([*lines, "tokenizer = AutoTokenizer.from_pretrained(folder)"]) + "\n```"
