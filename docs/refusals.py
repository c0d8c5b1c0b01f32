"""Writes the tables of docs/migrating.md with all that the drop-ins refuse, by making them refuse it.

    python docs/refusals.py            rewrites what stands between the markers of the page
    python docs/refusals.py --check    exits with 1 where that would change it

Left what is written, right what the code answers. tests/integrations/test_refusals.py holds that no refusal in the code
is without a line here. Needs TRL and peft.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CI", "1")  # no telemetry

import torch
import trl
from datasets import Dataset
from peft import PromptTuningConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))

import page_tables  # noqa: E402

from fastpref.integrations import liger
from fastpref.integrations.trl import options

PAGE = Path(__file__).with_name("migrating.md")

TRL = [
    "DPOConfig(loss_type='simpo')", "DPOConfig(padding_free=True)", "DPOConfig(beta=0)", "DPOConfig(beta=-0.1)",
    "DPOConfig(label_smoothing=0.1)", "DPOConfig(loss_type='robust', label_smoothing=0.5)",
    "DPOConfig(loss_type='exo_pair', label_smoothing=0)", "DPOConfig(loss_type='aot', label_smoothing=0.5)",
    "DPOConfig(label_smoothing_factor=0.1)", "DPOConfig(discopop_tau=0.1)",
    "DPOConfig(loss_type='discopop', discopop_tau=0)", "DPOConfig(f_divergence_type='renyi')",
    "DPOConfig(f_alpha_divergence_coef=0.3)", "DPOConfig(ld_alpha=1.5)",
    "DPOConfig(ld_alpha=0.5, loss_type=['sigmoid', 'sft'])", "DPOConfig(ld_alpha=0.5, use_weighting=True)",
    "DPOConfig(use_weighting=True, loss_type='aot')",
    "DPOConfig(deepspeed={'zero_optimization': {'stage': 3}})", "DPOConfig(of_a_newer_trl=1)",
    "KTOConfig(loss_type='bco')", "KTOConfig(beta=0)", "KTOConfig(desirable_weight=-1)",
    "KTOConfig(undesirable_weight=-1)",
    "FusedDPOTrainer(train_dataset=with_images)", "FusedDPOTrainer(peft_config=PromptTuningConfig(...))",
]
LIGER = [
    "LigerFusedLinearDPOLoss(loss_type='ipo')", "LigerFusedLinearDPOLoss(beta=0)",
    "LigerFusedLinearDPOLoss(loss_type='hinge', label_smoothing=0.1)", "LigerFusedLinearDPOLoss(label_smoothing=0.5)",
    "LigerFusedLinearDPOLoss(loss_type='exo_pair')", "LigerFusedLinearDPOLoss(discopop_tau=0.1)",
    "LigerFusedLinearDPOLoss(chunk_size=0)", "LigerFusedLinearCPOLoss(label_smoothing=0.5)",
    "LigerFusedLinearCrossEntropyLoss(label_smoothing=1.5)", "LigerFusedLinearCrossEntropyLoss(reduction='avg')",
    "LigerFusedLinearCrossEntropyLoss(softcap=0)", "LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16)",
    "LigerFusedLinearGRPOLoss(loss_type='ppo')", "LigerFusedLinearGRPOLoss(loss_type='dr_grpo')",
    "LigerFusedLinearGRPOLoss(loss_type='sapo', importance_sampling_level='sequence')",
    "LigerFusedLinearGRPOLoss(sapo_temperature_pos=0)", "LigerFusedLinearGRPOLoss(delta=0)",
    "LigerFusedLinearJSDLoss", "liger_fused_linear_cosine",
]
# Calls: W [V, H], x [4, T, H], y [4, T], in Liger's order.
CALLS = [
    "LigerFusedLinearDPOLoss()(W, x, y)", "LigerFusedLinearDPOLoss()(W, x, y, None, x)",
    "LigerFusedLinearCPOLoss()(W, x[:3], y[:3])", "LigerFusedLinearORPOLoss()(W, x, y, None, y[:2])",
    "LigerFusedLinearKTOLoss()(x, W, y)", "LigerFusedLinearKTOLoss()(x, W, y, None, labels, kl=torch.zeros(4))",
    "LigerFusedLinearCrossEntropyLoss(ce_weight=torch.ones(2))(W, x[0], y[0])",
    "LigerFusedLinearGRPOLoss()(x, W, y, mask, advantages)",
    "LigerFusedLinearGRPOLoss(use_ref_model=False)(x, W, y, mask, advantages, vllm_is_ratio=torch.ones(4, 2))",
]


def config(cls: type, **given: Any) -> None:
    """Reads a config as the trainers do, of a TRL with an option more, and of a DeepSpeed that need not be there."""
    newer = dataclasses.make_dataclass(cls.__name__, [("of_a_newer_trl", int, 0)], bases=(cls,))
    deepspeed = given.pop("deepspeed", None)
    made = newer(output_dir=os.devnull, use_cpu=True, bf16=False, report_to="none", **given)
    if deepspeed is not None:
        made.deepspeed_plugin = SimpleNamespace(zero_stage=deepspeed["zero_optimization"]["stage"])
    options.refuse_config(made)


def names() -> dict[str, Any]:
    """What the lines mean."""
    x, y = torch.zeros(4, 3, 8), torch.zeros(4, 3, dtype=torch.int64)

    def trainer(train_dataset: Any = None, peft_config: Any = None) -> None:
        options.refuse_data(train_dataset)
        options.refuse_prompt_learning({"peft_config": peft_config})

    return {name: getattr(liger, name) for name in liger.__all__ if name != "CrossEntropyOutput"} | {
        "DPOConfig": functools.partial(config, trl.DPOConfig),
        "KTOConfig": functools.partial(config, trl.KTOConfig),
        "FusedDPOTrainer": trainer,
        "with_images": Dataset.from_dict({"images": []}),
        "PromptTuningConfig": lambda *_: PromptTuningConfig(num_virtual_tokens=1),
        "torch": torch, "W": torch.zeros(9, 8), "x": x, "y": y, "mask": y + 1, "advantages": torch.ones(4),
        "labels": torch.ones(4, dtype=torch.bool),
    }


def answer(line: str, known: dict[str, Any], seen: Callable[[BaseException], None] = lambda error: None) -> str:
    """What is said to a line of the tables."""
    try:
        if line in liger._DISTILLATION:
            getattr(liger, line)
        else:
            eval(line, dict(known))
    except (ValueError, TypeError, ImportError) as error:
        seen(error)
        return str(error)
    raise SystemExit(f"{line} is not refused any more: take it out of docs/refusals.py")


def table(lines: list[str], seen: Callable[[BaseException], None] = lambda error: None) -> str:
    logging.disable(logging.WARNING)
    known, escaped = names(), lambda text: text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    rows = [f"| `{line}` | {escaped(answer(line, known, seen))} |" for line in lines]
    logging.disable(logging.NOTSET)
    return "\n".join(["| given | answer |", "|---|---|", *rows, ""])


def written(page: str) -> str:
    """The page with the tables as the code answers now."""
    return page_tables.with_tables("refusals.py", page, {"trl": table(TRL), "liger": table(LIGER + CALLS)})


if __name__ == "__main__":
    page_tables.rewrite("refusals.py", {PAGE: written})
