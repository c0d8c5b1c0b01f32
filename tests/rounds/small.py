"""Rounds of seconds: a configuration over the tiny model, and readers of what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref.rounds.config import Config, config_from

TIMES = ("seconds", "tokens_per_s", "scored_tokens_per_s", "saved_tokens_per_s", "peak_memory_mib", "mfu", "resumed")


def settings(world: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """As a YAML file would give it. Keys of the section `rounds` go there, the others to the top."""
    top = {
        "model_name_or_path": str(world / "pretrained"), "train_dataset": str(world / "train.jsonl"),
        "output_dir": str(run_dir), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 48,
        "logging_steps": 1, "beta": 0.5,
    }
    section = {
        "number": 2, "scorer": "checks:smooth", "prompts_per_round": 6, "num_generations": 3, "max_new_tokens": 6,
        "generation_batch_size": 6,
    }
    for key, value in changes.items():
        (section if key in _ROUNDS else top)[key] = value
    if top.get("loss") == "sft":
        top.pop("beta")
    return top | {"rounds": section}


_ROUNDS = {
    "number", "start_from", "reference", "schedule", "save_rounds", "prompts", "prompts_per_round", "num_generations",
    "temperature", "top_p", "max_new_tokens", "generation_batch_size", "engine", "sampler", "sampler_reload",
    "sampler_timeout", "scorer", "scorer_timeout", "judge_prompt", "judge_comparisons", "pairing",
    "min_gap", "min_score", "offline_ratio", "eval_prompts", "eval_num_generations",
}


def make(world: Path, run_dir: Path, **changes: Any) -> Config:
    return config_from(settings(world, run_dir, **changes))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(value: Any) -> Any:
    """Without what differs from one run to the next: times, memory, paths."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value
