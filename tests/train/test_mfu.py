"""FLOPs of a step against torch's own count of one, and the table of peaks."""

from __future__ import annotations

import pytest
import torch
from tiny import make, read_metrics
from torch.utils.flop_counter import FlopCounterMode

from fastpref.data import collate, load_records, tokenize_records
from fastpref.train import loop, stage
from fastpref.train.mfu import causal_pairs, model_flops, peak_flops
from fastpref.train.model import load_policy, load_tokenizer


@pytest.mark.parametrize("use_peft", [False, True])
def test_against_torchs_counter(world, tmp_path, use_peft):
    """One sequence, nothing padded. torch counts neither the LM head's ops nor its CPU kernel of attention."""
    config = make(world, tmp_path, use_peft=use_peft)
    policy = load_policy(config, load_tokenizer(config))
    flops = model_flops(policy)
    records = load_records(config.train_dataset)
    examples, _ = tokenize_records(records, load_tokenizer(config), "sft", max_length=64)
    batch = collate(examples[:1], 0, "sft")
    counter = FlopCounterMode(display=False)
    with counter:
        policy.trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state.sum().backward()
    tokens = batch.processed_tokens
    ours = flops.of([batch]) - batch.num_tokens * 2 * policy.head.weight.numel() * (2 if use_peft else 3)
    ours -= 3 * flops.pair * causal_pairs(batch)
    # LoRA: nobody asks for the gradient of the lowest layer's input, which q, k and v and their A (rank 16) would give
    lowest = 2 * tokens * 32 * (32 + 2 * 16 + 3 * 16) if use_peft else 0
    assert counter.get_total_flops() == ours - lowest
    assert flops.pair == 4 * 32 * 2 and causal_pairs(batch) == tokens * (tokens + 1) // 2


def test_a_shared_prompt_counts_once(world, tmp_path):
    config = make(world, tmp_path)
    records = load_records(config.train_dataset)
    examples, _ = tokenize_records(records, load_tokenizer(config), "pair", max_length=64)
    pair = examples[0]
    prompt, (chosen, rejected) = len(pair.prompt_ids), map(len, pair.responses)
    expected = sum(i + 1 for i in range(prompt + chosen)) + sum(prompt + i + 1 for i in range(rejected))
    assert causal_pairs(collate([pair], 0, "pair", layout="shared")) == expected
    assert causal_pairs(collate([pair], 0, "pair")) == expected + prompt * (prompt + 1) // 2


def test_peaks():
    def peak(name):
        found = peak_flops(name, torch.bfloat16)
        return found and found / 1e12

    assert peak("NVIDIA H100 80GB HBM3") == 989 and peak("NVIDIA H100 PCIe") == 756 and peak("NVIDIA H200") == 989
    assert peak("NVIDIA A100-SXM4-80GB") == 312 and peak("NVIDIA H20") == 148 and peak("NVIDIA L4") == 121
    assert peak("NVIDIA RTX 6000 Ada Generation") == 364 and peak("NVIDIA A10G") is None
    assert peak("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None and peak("Intel(R) Xeon(R), 2 threads") is None
    assert peak_flops("NVIDIA H200", torch.float32) is None


def test_the_line_has_it_where_the_peak_is_known(world, tmp_path, quiet, monkeypatch):
    loop.train(make(world, tmp_path / "a", eval_dataset=None), display=quiet)
    assert all("mfu" not in row for row in read_metrics(tmp_path / "a"))
    monkeypatch.setattr(stage, "peak_flops", lambda name, dtype: 1e12)
    loop.train(make(world, tmp_path / "b", eval_dataset=None), display=quiet)
    assert all(0 < row["mfu"] < 1 and "flops" not in row for row in read_metrics(tmp_path / "b"))
