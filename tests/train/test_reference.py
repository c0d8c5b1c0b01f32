"""Reference log-probs: what is cached, when it is used again, and that LoRA's reference is the adapter switched off."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny import make, read_metrics

from fastpref.data import batch_order, collate, load_records, tokenize_records
from fastpref.errors import UserError
from fastpref.train import reference
from fastpref.train.cache import cache_reference
from fastpref.train.loop import train
from fastpref.train.model import Policy, load_policy, load_tokenizer


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
    found = reference.compute(policy, examples, "kto", 5, 0, tick, [[batch] for batch in batches])
    assert found.logps.shape == (len(examples), 1)
    for i, batch in enumerate(batches):
        kl = collate([examples[j] for j in sorted(batch)], 0, "kto").kl  # whatever the order of the batch
        if kl is None:
            assert len(found.of_batch(i)) == 0
        else:
            expected = dict(zip(sorted(batch), policy.sequence_logps(kl).tolist(), strict=True))
            assert found.of_batch(i).tolist() == pytest.approx([expected[j] for j in batch], abs=1e-5)
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
    reference.write(path, header(), found, [e.content_hash for e in examples])
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


# ---- fastpref cache-ref ----------------------------------------------------------------------------------------------


def test_cached_before_and_used_by_training(world, tmp_path, quiet, monkeypatch):
    shared = str(tmp_path / "cache")
    changes = {"loss": "kto", "learning_rate": 1e-2}
    train(make(world, tmp_path / "plain", **changes), display=quiet)
    files = cache_reference(make(world, tmp_path / "a", reference_dir=shared, **changes), quiet)
    assert [path.name for path in files] == ["00-kto-train.safetensors", "00-kto-eval.safetensors"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(path.name for path in files)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "compute", lambda *args: pytest.fail("computed again"))
        for run in "ab":  # another run may share the files
            train(make(world, tmp_path / run, reference_dir=shared, **changes), display=quiet)
    assert [row["loss"] for row in read_metrics(tmp_path / "a")] == [
        row["loss"] for row in read_metrics(tmp_path / "plain")
    ]
    assert not (tmp_path / "a" / "reference").exists()


def test_another_header_is_refused_by_name(world, tmp_path, quiet):
    cache_reference(make(world, tmp_path), quiet)
    config = make(world, tmp_path, max_length=60, model_name_or_path=str(world / "config"), init_from_config=True)
    for attempt in (cache_reference, train):
        with pytest.raises(UserError) as caught:
            attempt(config, display=quiet)
        message = str(caught.value)
        assert "00-dpo-train.safetensors: holds reference log-probs of something else: model (" in message
        assert 'truncation ([64, null, "keep_end", "error"] there, [60, null' in message and "weights (" in message
        assert "\n" not in message and "revision" not in message
    train(make(world, tmp_path, max_length=60, max_steps=1, overwrite_output_dir=True), display=quiet)


def test_nothing_to_cache(world, tmp_path, quiet):
    with pytest.raises(UserError, match="nothing to cache: no loss here has a reference"):
        cache_reference(make(world, tmp_path, loss="sft"), quiet)
    stages = [{"loss": "sft"}, {"loss": "dpo"}]
    with pytest.raises(UserError, match="nothing to cache: each reference is what the stage before ends with"):
        cache_reference(make(world, tmp_path, stages=stages), quiet)
    named = [{"loss": "sft"}, {"loss": "dpo", "ref_model_name_or_path": str(world / "pretrained")}]
    assert [path.name for path in cache_reference(make(world, tmp_path, stages=named), quiet)] == [
        "01-dpo-train.safetensors", "01-dpo-eval.safetensors",
    ]


@pytest.mark.parametrize("torn", [False, True])
def test_an_ended_pass_goes_on_where_it_was(parts, tmp_path, monkeypatch, torn):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    batches = batch_order([e.length for e in examples], 6, seed=1, epoch=0)
    whole = reference.compute(policy, examples, "kto", 6, 0, tick, [batches])
    calls = []
    own = Policy.sequence_logps
    monkeypatch.setattr(Policy, "sequence_logps", lambda self, batch: calls.append(0) or own(self, batch))
    monkeypatch.setattr(reference.Progress, "EVERY", 2)

    def stop_at(step):
        def stop(done, of):
            if done == step:
                raise KeyboardInterrupt

        return stop

    path, passes = tmp_path / "r.safetensors", 2 * len(batches)
    for stops_at in (3, len(batches) + 1):  # in the log-probs, then in the mismatched ones
        with pytest.raises(KeyboardInterrupt):
            progress = reference.Progress(path, {"weights": "w"}, 6, "padded")
            reference.compute(policy, examples, "kto", 6, 0, stop_at(stops_at), [batches], progress)
    lost = 0
    if torn:  # the machine went down in the middle of a number: the batch it belongs to is computed again
        content = progress.path.read_bytes()
        progress.path.write_bytes(content[:-2])
        lost = 1
    assert len(calls) == len(batches) + 1
    progress = reference.Progress(path, {"weights": "w"}, 6, "padded")
    again = reference.compute(policy, examples, "kto", 6, 0, tick, [batches], progress)
    assert len(calls) == passes + lost and progress.restored > 0
    assert torch.equal(again.logps, whole.logps) and torch.equal(again.kl, whole.kl)
    progress.discard()
    assert not progress.path.exists()
    other = reference.Progress(path, {"weights": "x"}, 6, "padded")
    assert other.take(1) is None
