"""Preference training in plain PyTorch: the trunk, one fused call for head and loss, an optimiser. No trainer.

python examples/plain_pytorch.py --steps 60
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastpref as fp

HERE = Path(__file__).parent


def make_batch(tokenizer, records: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """([S, T] input ids, [S, T] targets), first half chosen; targets are shifted, -100 where nothing is scored."""
    rows, labels = [], []
    for side in ("chosen", "rejected"):
        for record in records:
            prompt = tokenizer(record["prompt"]).input_ids
            response = tokenizer(record[side], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + response))
            labels.append(torch.tensor([-100] * len(prompt) + response))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    targets = torch.cat((padded[:, 1:], torch.full_like(padded[:, :1], -100)), dim=1)
    return input_ids, targets


def main(steps: int, batch_size: int, learning_rate: float) -> list[float]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("plain_pytorch.py trains in one process; examples/transformers_trainer.py in several")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "model"))
    trunk, head = model.model, model.lm_head
    lines = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[: 20 * batch_size]
    records = [json.loads(line) for line in lines]
    batches = [make_batch(tokenizer, records[i : i + batch_size]) for i in range(0, len(records), batch_size)]

    # The reference is the model before training: one number a sequence, computed once. Padding is on the right, where
    # causal attention never sees it.
    with torch.no_grad():
        references = [
            fp.linear_preference_loss(trunk(ids).last_hidden_state, head.weight, targets, loss="sft").logps
            for ids, targets in batches
        ]

    criterion = fp.RPOLoss(beta=0.1, eta=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    found = []
    for step in range(1, steps + 1):
        (input_ids, targets), ref_logps = batches[step % len(batches)], references[step % len(batches)]
        hidden = trunk(input_ids).last_hidden_state  # [S, T, H]
        out = criterion(hidden, head.weight, targets, ref_logps=ref_logps)  # no [S, T, V] logits
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.item())
        if step % 10 == 0 or step == 1:
            margin, accuracy = (out.metrics[f"rewards/{name}"].mean() for name in ("margins", "accuracies"))
            print(f"step {step:4d} | loss {found[-1]:.4f} | margin {margin:.4f} | accuracy {accuracy:.2f}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    main(**vars(parser.parse_args()))
