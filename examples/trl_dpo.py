"""DPO with TRL's trainer on the fused head: one import and one name are other than in TRL's own quickstart.

python examples/trl_dpo.py --steps 60                                    # a small Llama with random weights
python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --learning-rate 1e-6   # any causal LM, from a folder or the hub
torchrun --nproc-per-node 2 examples/trl_dpo.py --steps 60               # the same under DDP
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from fastpref.integrations.trl import FusedDPOTrainer  # was: from trl import DPOTrainer

HERE = Path(__file__).parent


def main(steps: int, batch_size: int, learning_rate: float, model: str = "") -> list[float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model or HERE / "model")
    if model:
        policy = AutoModelForCausalLM.from_pretrained(model)
    else:
        policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "model"))
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[: 20 * batch_size]
    pairs = [{key: json.loads(line)[key] for key in ("prompt", "chosen", "rejected")} for line in lines]
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = FusedDPOTrainer(  # was: DPOTrainer(
            policy,
            ref_model=copy.deepcopy(policy),
            args=DPOConfig(
                output_dir=folder,
                loss_type=["sigmoid", "sft"],  # sums of losses, WPO, f-divergences, ...: all that DPOConfig has
                loss_weights=[1.0, 0.1],
                beta=0.1,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                logging_steps=10,
                max_length=256,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                gradient_checkpointing=bool(model),
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        trainer.train()
        if trainer.is_world_process_zero():
            print(f"one training by {trainer.args.world_size} processes", flush=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a folder or a name on the hub; by default a tiny model is made")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    main(**vars(parser.parse_args()))
