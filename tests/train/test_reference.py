"""Reference log-probs: what is cached, when it is used again, and that LoRA's reference is the adapter switched off."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny import make

from fastpref.data import batch_order, collate, load_records, tokenize_records
from fastpref.train import reference
from fastpref.train.model import load_policy, load_tokenizer


def tick(done, of):
    pass


@pytest.fixture
def parts(world, tmp_path):
    config = make(world, tmp_path)
    tokenizer = load_tokenizer(config)
    return config, tokenizer, load_policy(config, tokenizer), load_records(config.train_dataset)


def test_each_examples_log_probs_in_its_place(parts):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "pair", max_length=64)
    found = reference.compute(policy, examples, "pair", 5, 0, tick)
    alone = [policy.sequence_logps(collate([e], 0)).tolist() for e in examples]
    assert torch.allclose(found.logps, torch.tensor(alone), atol=1e-5)
    attached = found.attach(examples)
    assert attached[3].ref_logps == tuple(found.logps[3].tolist()) and attached[3].prompt_ids == examples[3].prompt_ids


def test_mismatched_sequences_of_every_micro_batch(parts):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    batches = batch_order([e.length for e in examples], 3, seed=1, epoch=0)
    batches.append([0, 1])  # the two sides of one pair: one prompt, so nothing to mismatch
    found = reference.compute(policy, examples, "kto", 5, 0, tick, batches)
    assert found.logps.shape == (len(examples), 1)
    for i, batch in enumerate(batches):
        kl = collate([examples[j] for j in batch], 0, "kto").kl
        if kl is None:
            assert len(found.of_batch(i)) == 0
        else:
            assert torch.allclose(found.of_batch(i), policy.sequence_logps(kl), atol=1e-5)
    assert len(found.of_batch(len(batches) - 1)) == 0


def test_the_file_is_used_only_under_the_same_header(parts, tmp_path):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "pair", max_length=64)
    found = reference.compute(policy, examples, "pair", 5, 0, tick)

    def header(weights="w", dtype=torch.float32, examples=examples, **changes):
        values = make(config_world(config), tmp_path, **changes)
        return reference.header_of(values, tokenizer, dtype, weights, examples, None)

    path = tmp_path / "reference" / "r.safetensors"
    assert reference.read(path, header()) is None
    reference.write(path, header(), found, examples)
    again = reference.read(path, header())
    assert again is not None and torch.equal(again.logps, found.logps)
    for other in (
        header(weights="x"),
        header(dtype=torch.bfloat16),
        header(examples=examples[::-1]),
        header(max_length=63),
        header(ref_model_name_or_path="other"),
    ):
        assert reference.read(path, other) is None
    assert reference.read(path, header(weights=""), any_weights=True) is not None
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["header"])["weights"] == "w"
        assert bytes(file.get_tensor("hashes")[2].tolist()).hex() == examples[2].content_hash
    path.write_bytes(path.read_bytes()[:100])
    assert reference.read(path, header()) is None


def config_world(config):
    from pathlib import Path

    return Path(config.model_name_or_path).parent


def test_loras_reference_is_the_adapter_switched_off(world, tmp_path):
    config = make(world, tmp_path, use_peft=True, lora_dropout=0.5)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    assert all("lora" in name for name in policy.trainable())
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    policy.model.train()
    found = reference.compute(policy, examples, "pair", 4, 0, tick)  # dropout is off in it
    assert policy.model.training
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    moved = reference.compute(policy, examples, "pair", 4, 0, tick)
    with policy.model.disable_adapter():
        off = reference.compute(policy, examples, "pair", 4, 0, tick)
    assert torch.equal(off.logps, found.logps)
    assert not torch.allclose(moved.logps, found.logps, atol=1e-2)
