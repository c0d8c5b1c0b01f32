"""What the tests of the TRL integration are made of: tiny models, pairs, and trainers that run on the CPU."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("CI", "1")  # no telemetry from test runs

import torch
import trl
from datasets import Dataset
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.train.tiny import make_config, make_pairs, make_tokenizer

TIMES = ("runtime", "per_second", "total_flos", "step_time")


def make_model(kind: str = "llama", seed: int = 3) -> PreTrainedModel:
    """llama: a head of its own; gemma2: softcap 5 on its logits, tied; tied: Qwen 2 with tied embeddings."""
    torch.manual_seed(seed)
    sizes = make_config(initializer_range=0.2).to_dict()
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings bos_token_id eos_token_id pad_token_id initializer_range"
    )
    common = {name: sizes[name] for name in names.split()}
    if kind == "llama":
        return LlamaForCausalLM(make_config(initializer_range=0.2))
    if kind == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(**common, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=5.0)
        )
    assert kind == "tied"
    return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """A reference that is not the policy, so that no log-ratio is zero."""
    other = copy.deepcopy(model)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return other


def pairs(count: int = 12, seed: int = 1) -> Dataset:
    """Of each three the chosen response is longer, the rejected one, neither."""
    rows = []
    for i, row in enumerate(make_pairs(count, seed)):
        chosen, rejected = row["chosen"] + (i % 3 == 0) * " yes", row["rejected"] + (i % 3 == 1) * " no no"
        rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def unpaired(count: int = 8, seed: int = 1) -> Dataset:
    """Two desirable, one undesirable, ...: uneven batches."""
    rows = make_pairs(count, seed)
    made = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 != 0}
        for i, row in enumerate(rows)
    ]
    return Dataset.from_list(made)


def completions(count: int = 12, seed: int = 1) -> Dataset:
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in make_pairs(count, seed)]
    )


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    """A config of TRL's that runs on the CPU, logs every step and writes nothing."""
    values: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", per_device_train_batch_size=4, per_device_eval_batch_size=3, max_steps=3,
        learning_rate=1e-3, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )
    return kind(**(values | changes))


def make_dpo(cls: type, folder: Path, model: PreTrainedModel | None = None, **given: Any) -> Any:
    """Arguments of the trainer by their names; all others are options of DPOConfig."""
    model = make_model() if model is None else model
    names = ("train_dataset", "eval_dataset", "peft_config", "data_collator", "ref_model", "compute_metrics")
    passed = {name: given.pop(name) for name in names if name in given}
    if "ref_model" not in passed and not passed.get("peft_config") and not hasattr(model, "peft_config"):
        passed["ref_model"] = perturbed(model)
    passed = {"train_dataset": pairs()} | passed
    return cls(model, args=arguments(trl.DPOConfig, folder, **given), processing_class=make_tokenizer(), **passed)


def make_kto(cls: type, folder: Path, model: PreTrainedModel | None = None, **given: Any) -> Any:
    model = make_model() if model is None else model
    names = ("train_dataset", "eval_dataset", "peft_config", "ref_model")
    passed = {name: given.pop(name) for name in names if name in given}
    if "ref_model" not in passed and not passed.get("peft_config"):
        passed["ref_model"] = perturbed(model)
    passed = {"train_dataset": unpaired()} | passed
    return cls(model, args=arguments(trl.KTOConfig, folder, **given), processing_class=make_tokenizer(), **passed)


def history(trainer: Any) -> list[dict[str, float]]:
    """What the trainer logged, without the clock."""
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_history(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert_same_entries(history(ours), history(theirs), tolerance)


def assert_same_entries(a: list[dict[str, float]], b: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    """The same entries, names and numbers: absolutely where they are small, relatively where they are large."""
    assert len(a) == len(b)
    for mine, its in zip(a, b):
        assert mine.keys() == its.keys()
        for key, value in its.items():
            scale = max(1.0, abs(value))
            assert abs(mine[key] - value) <= tolerance * scale, (its.get("step"), key, mine[key], value)
