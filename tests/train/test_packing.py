"""Packed batches in the trainer: the padded run step by step, resumed runs, budgets, and what is refused."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from test_loop import lines_without_times, stop_after, two_stages
from tiny import make, make_pairs, make_tokenizer, read_metrics, write_rows

from fastpref.data import collate, load_records, tokenize_records
from fastpref.errors import UserError
from fastpref.train.batch_order import BatchOrder
from fastpref.train.display import Display
from fastpref.train.loop import Stopped, train
from fastpref.train.model import load_policy, load_tokenizer


def long_prompts(path, count=22):
    """Prompts longer than their responses, a few of them twice."""
    rng = random.Random(3)
    rows = make_pairs(count, seed=1)
    for row in rows:
        row["prompt"] = "".join(rng.choice("ghijk ") for _ in range(rng.randint(5, 30))) + row["prompt"]
    rows[7]["prompt"] = rows[3]["prompt"] = rows[0]["prompt"]
    return str(write_rows(path, rows))


def labelled(path):
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in make_pairs(10, seed=4)
        for side in ("chosen", "rejected")
    ]
    return str(write_rows(path, rows))


@pytest.mark.parametrize("loss", ["rpo", "kto", "sft"])
def test_a_packed_run_is_the_padded_run_step_by_step(world, tmp_path, quiet, loss):
    data = labelled(tmp_path / "l.jsonl") if loss != "rpo" else long_prompts(tmp_path / "t.jsonl")
    changes = {"loss": loss, "train_dataset": data, "eval_dataset": data, "logging_steps": 1, "max_steps": 6,
               "gradient_accumulation_steps": 2, "eval_steps": 3}
    # Adam's own epsilon makes a step's length of what may be rounding alone
    changes |= {"adam_epsilon": 1e-3, "learning_rate": 1e-2, "bf16": False}
    changes |= {"eta": 0.1} if loss == "rpo" else {}
    runs = {
        "padded": {"packing": False},
        "packed": {"packing": True, "prefix_sharing": False, "gradient_checkpointing": "full"},
        "shared": {"packing": True},
    }
    lines, weights = {}, {}
    for name, options in runs.items():
        train(make(world, tmp_path / name, **changes | options), display=quiet)
        lines[name] = read_metrics(tmp_path / name)
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    for name in ("packed", "shared"):
        assert len(lines[name]) == len(lines["padded"]) == 9
        for row, expected in zip(lines[name], lines["padded"], strict=True):
            for key, value in expected.items():
                if isinstance(value, float) and not key.endswith("_per_s") and key != "peak_memory_mib":
                    assert row[key] == pytest.approx(value, rel=3e-6, abs=1e-6), (name, row["step"], key)
        for key, weight in weights["padded"].items():
            assert float((weights[name][key] - weight).abs().max()) < 2e-6, (name, key)
    last = {name: next(row for row in reversed(found) if row["split"] == "train") for name, found in lines.items()}
    assert last["packed"]["num_tokens"] == last["padded"]["num_tokens"]
    # sft keeps the good completions alone: no prompt comes twice
    assert (last["shared"]["num_tokens"] < last["padded"]["num_tokens"]) == (loss != "sft")
    assert "saved_tokens_per_s" in last["shared"] and "saved_tokens_per_s" not in last["padded"]


def test_tokens_are_told_as_read_scored_and_saved(world, tmp_path):
    shown = io.StringIO()
    data = long_prompts(tmp_path / "t.jsonl")
    config = make(world, tmp_path / "run", train_dataset=data, packing=True, max_tokens_per_batch=200, max_steps=2)
    train(config, display=Display(Console(file=shown, width=200)))
    text = shown.getvalue()
    assert "packed batches with shared prompts" in text
    assert "| tok/s " in text and "| scored " in text and "| shared " in text
    row = next(row for row in read_metrics(tmp_path / "run") if row["split"] == "train")
    examples, _ = tokenize_records(load_records(data), make_tokenizer(), "pair", max_length=64)
    schedule = BatchOrder(config.stage_configs()[0], examples, config.seed)
    batches = [[examples[i] for i in schedule.of_step(step)[1][0]] for step in range(2)]
    seen = [collate(batch, 0, layout="shared") for batch in batches]
    assert row["num_tokens"] == sum(batch.processed_tokens for batch in seen)
    share = row["tokens_per_s"] / row["num_tokens"]
    assert row["scored_tokens_per_s"] / share == pytest.approx(sum(batch.num_tokens for batch in seen))
    assert row["saved_tokens_per_s"] / share == pytest.approx(sum(batch.saved_tokens for batch in seen))


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_packed_run_goes_on_bitwise(world, tmp_path, quiet, monkeypatch, use_peft):
    changes = {"packing": True, "max_tokens_per_batch": 100, "per_device_train_batch_size": None}
    if use_peft:  # its dropout draws from the random generators
        changes |= {"use_peft": True, "model_name_or_path": str(world / "pretrained"), "init_from_config": False}
    train(two_stages(world, tmp_path / "whole", **changes), display=quiet)
    config = two_stages(world, tmp_path / "parts", **changes)
    for step in (7, 6):  # after sft step 7, then after rpo step 3
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped):
                train(config, resume=True, display=quiet)
    train(config, resume=True, display=quiet)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    whole, parts = ((tmp_path / run / "model" / name).read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "parts")
    assert b"fastpref" not in (tmp_path / "whole" / "model" / ("adapter_" * use_peft + "config.json")).read_bytes()


def test_generation_has_the_models_own_attention(world, tmp_path, quiet):
    answers = [
        train(two_stages(world, tmp_path / name, packing=packing), display=quiet)["samples"]
        for name, packing in (("a", False), ("b", True))
    ]
    assert [sample["after"] for sample in answers[0]] == [sample["after"] for sample in answers[1]]


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_schedule_of_token_budgets(world, tmp_path):
    data = long_prompts(tmp_path / "t.jsonl", 60)
    examples, _ = tokenize_records(load_records(data), make_tokenizer(), "pair", max_length=64)
    options = {"packing": None, "max_tokens_per_batch": 120, "per_device_train_batch_size": None, "max_steps": -1,
               "gradient_accumulation_steps": 2, "num_train_epochs": 2.5}
    (stage,) = make(world, tmp_path, **options).stage_configs()
    schedule = BatchOrder(stage, examples, seed=1)
    steps = [schedule.of_step(step) for step in range(schedule.steps)]
    assert [first for first, _ in steps] == [sum(len(batches) for _, batches in steps[:i]) for i in range(len(steps))]
    epochs = [int(schedule.epoch(step)) for step in range(schedule.steps)]
    assert epochs == sorted(epochs) and set(epochs) == {0, 1, 2} and epochs[0] == 0
    for epoch in (0, 1):
        batches = [batch for (_, batches), e in zip(steps, epochs, strict=True) if e == epoch for batch in batches]
        assert sorted(i for batch in batches for i in batch) == list(range(60))
        assert max(sum(examples[i].tokens(True) for i in batch) for batch in batches) <= 120
    (longer,) = make(world, tmp_path, **options | {"num_train_epochs": 3}).stage_configs()
    third = BatchOrder(longer, examples, seed=1).steps - epochs.count(0) - epochs.count(1)
    assert epochs.count(2) == math.ceil(third / 2)
    for step in (schedule.steps - 1, 3, 0):  # without having walked there, and back again
        assert BatchOrder(stage, examples, seed=1).of_step(step) == schedule.of_step(step) == steps[step]
    both = make(world, tmp_path, **options | {"per_device_train_batch_size": 2}).stage_configs()[0]
    assert max(len(batch) for step in BatchOrder(both, examples, seed=1).all_steps() for batch in step) == 2


def test_an_example_beyond_the_budget(world, tmp_path):
    rows = make_pairs(12, seed=1)
    rows[4]["prompt"] = "x" * 40 + rows[4]["prompt"]
    data = str(write_rows(tmp_path / "t.jsonl", rows))
    changes = {"train_dataset": data, "packing": True, "max_tokens_per_batch": 48, "max_steps": 1}
    message = r"t.jsonl:5: prompt and responses are \d+ tokens, more than max_tokens_per_batch=48 holds"
    with pytest.raises(UserError, match=message) as e:
        train(make(world, tmp_path / "run", **changes))
    assert "(1 of 12 examples are like that): raise max_tokens_per_batch" in str(e.value) and "\n" not in str(e.value)
    shown = io.StringIO()
    config = make(world, tmp_path / "run", overlong_response="drop", **changes)
    train(config, display=Display(Console(file=shown, width=300)))
    assert "dpo train: 1 of 12 examples dropped (first: " in shown.getvalue()


# ---- which batches a model gets --------------------------------------------------------------------------------------


def test_packing_is_left_to_the_program_or_asked_for(world, tmp_path):
    tokenizer = load_tokenizer(make(world, tmp_path))
    for packing, layout in ((False, "padded"), (True, "shared"), (None, "shared")):
        assert load_policy(make(world, tmp_path, packing=packing), tokenizer).layout == layout
    packed = load_policy(make(world, tmp_path, packing=True, prefix_sharing=False), tokenizer)
    assert (packed.layout, packed.own_attention) == ("packed", "sdpa")
    budget = make(world, tmp_path, packing=None, max_tokens_per_batch=500)
    assert load_policy(budget, tokenizer).layout == "shared" and budget.batch_size == 4
    with pytest.raises(UserError, match="max_tokens_per_batch fills packed batches, and packing is False"):
        make(world, tmp_path, max_tokens_per_batch=500, packing=False)


def test_a_model_that_cannot_be_packed_is_refused_before_training(world, tmp_path):
    tokenizer = make_tokenizer()
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2))
    bloom.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    changes = {"model_name_or_path": str(tmp_path / "bloom"), "max_steps": 1}
    run = tmp_path / "run"
    with pytest.raises(UserError, match="BloomForCausalLM: its attention cannot be replaced, .*; packing=false") as e:
        train(make(world, run, packing=True, **changes))
    assert "\n" not in str(e.value) and not (run / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="BloomForCausalLM: its attention cannot be replaced"):
        train(make(world, run, packing=None, max_tokens_per_batch=100, **changes))
    shown = io.StringIO()
    train(make(world, run, packing=None, **changes), display=Display(Console(file=shown)))
    assert "padded batches (BloomForCausalLM: its attention cannot be replaced, it does not" in shown.getvalue()


def test_bf16_autocast_packs_too(world, tmp_path):
    tokenizer = make_tokenizer()
    examples, _ = tokenize_records(load_records(long_prompts(tmp_path / "t.jsonl")), tokenizer, "pair", max_length=64)
    padded, shared = (load_policy(make(world, tmp_path, bf16=True, packing=p), tokenizer) for p in (False, True))
    exact = load_policy(make(world, tmp_path), tokenizer).sequence_logps(collate(examples, 0))
    off = [
        float((policy.sequence_logps(collate(examples, 0, layout=policy.layout)) - exact).abs().max())
        for policy in (padded, shared)
    ]
    assert 0 < off[1] < 2 * off[0]


def test_a_head_over_a_packed_trunk_sees_the_last_prompt_row_twice(world, tmp_path):
    """Its gradient is the sum of what both first tokens give it."""
    policy = load_policy(make(world, tmp_path, packing=True), make_tokenizer())
    (example,), _ = tokenize_records(load_records(world / "train.jsonl")[:1], make_tokenizer(), "pair", max_length=64)
    batch = collate([example], 0, layout="shared")
    kept = []
    hook = policy.trunk.norm.register_forward_hook(lambda module, args, out: (out.retain_grad(), kept.append(out))[1])
    hidden = policy.hidden_rows(batch)
    hook.remove()
    weights = torch.arange(1.0, len(hidden) + 1)
    (hidden * weights[:, None]).sum().backward()
    last, second = len(example.prompt_ids) - 1, len(example.responses[0])
    gradient = kept[0].grad[0, :, 0]
    assert gradient[last] == weights[0] + weights[second]
    assert batch.score_rows[0] == batch.score_rows[second] == last
