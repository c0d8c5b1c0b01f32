"""How far a stage may go from its reference: `kl_budget`, and the KL that it is compared with."""

from __future__ import annotations

from typing import Any

from .checkpoint import State
from .config import TrainConfig

SOURCES = {"sample": "fresh samples", "eval": "held-out responses", "train": "training responses"}


def budget_source(stage: TrainConfig, held_out: bool) -> str:
    """Which KL `kl_budget` is compared with, as a split of metrics.jsonl: the best there is."""
    if stage.sample_steps:
        return "sample"
    return "eval" if held_out and stage.eval_steps else "train"


def over_budget(stage: TrainConfig, state: State, split: str, kl: float | None, held_out: bool,
                checkpoint: str) -> dict[str, Any] | None:
    """The record of a budget that this measurement reaches, the first to do so; else None."""
    wanted = stage.kl_budget is not None and stage.loss_fn.needs_reference and state.step > 0
    if not wanted or split != budget_source(stage, held_out) or kl is None or not kl >= (stage.kl_budget or 0):
        return None
    return {"budget": stage.kl_budget, "kl": kl, "of": SOURCES[split], "step": state.step,
            "action": stage.kl_budget_action, "checkpoint": checkpoint}
