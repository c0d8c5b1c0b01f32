"""Preference training with transformers' Trainer: a subclass whose loss is computed inside the model's forward.

python examples/transformers_trainer.py --steps 60
torchrun --nproc-per-node 2 examples/transformers_trainer.py --steps 60      # the same under DDP
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fastpref as fp
from fastpref.integrations.transformers import add_preference_head, preference_step

HERE = Path(__file__).parent


class PreferenceTrainer(Trainer):
    """Any preference loss of fastpref's, for any causal LM. Everything else is Trainer's: DDP, FSDP, PEFT, saving."""

    def __init__(self, *args: Any, loss: fp.losses.Loss, ref_model: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_preference_head(self.model, self.processing_class)
        self.loss, self.ref_model = loss, ref_model.to(self.args.device).requires_grad_(False)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = preference_step(model, inputs, self.loss, ref=self.ref_model)
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({name: values.mean().item() for name, values in out.metrics.items()})
        return (out.loss, out) if return_outputs else out.loss


def make_collator(tokenizer):
    def collate(records: list[dict[str, str]]) -> dict[str, Tensor]:
        """Chosen, then rejected, padded on the right: TRL's layout and names."""
        rows, masks = [], []
        for side in ("chosen", "rejected"):
            for record in records:
                prompt = tokenizer(record["prompt"]).input_ids
                response = tokenizer(record[side], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
                rows.append(torch.tensor(prompt + response))
                masks.append(torch.tensor([0] * len(prompt) + [1] * len(response)))
        attention = [torch.ones_like(row) for row in rows]
        names = {"input_ids": rows, "attention_mask": attention, "completion_mask": masks}
        return {name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in names.items()}

    return collate


def main(steps: int, batch_size: int, learning_rate: float) -> list[float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "model"))
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[: 20 * batch_size]
    records = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                logging_steps=10,
                remove_unused_columns=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),  # said, for torchrun: processes without a GPU meet over gloo
            ),
            loss=fp.RPO(beta=0.1, eta=0.05),
            ref_model=copy.deepcopy(model),
            train_dataset=records,
            data_collator=make_collator(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
        if trainer.is_world_process_zero():
            print(f"one training by {trainer.args.world_size} processes", flush=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    main(**vars(parser.parse_args()))
