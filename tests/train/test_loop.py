"""The loop: micro-batches that add up to one batch, skipped steps, whole runs, resumed runs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import sys
import threading
import types

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from tiny import make, make_config, make_pairs, make_tokenizer, read_metrics, settings, write_rows

from fastpref.data import collate, load_records, tokenize_records
from fastpref.errors import SaveError, TrainingError, UserError
from fastpref.train import checkpoint, loop, reference, run, stage
from fastpref.train.batch_order import BatchOrder
from fastpref.train.config import config_from_dict
from fastpref.train.display import Display
from fastpref.train.dry_run import dry_run
from fastpref.train.loop import Stopped, train
from fastpref.train.micro_batches import baseline, loss_inputs, totals_of
from fastpref.train.model import load_policy, load_tokenizer

# ---- one step --------------------------------------------------------------------------------------------------------


def gradients(policy, config, examples, parts, kl_parts):
    """Loss and gradients of one global batch that comes in parts; KTO's baseline from the parts `kl_parts`."""

    def batches(parts):
        return [collate([examples[i] for i in part], 0, config.kind) for part in parts]

    loss, kl = config.loss_fn, (None, None)
    if loss.needs_kl:
        mismatched = batches(kl_parts)
        kl = baseline(policy, mismatched, [policy.sequence_logps(b.kl) - 0.4 for b in mismatched if b.kl is not None])
    policy.model.zero_grad()
    value = 0.0
    totals = totals_of(batches(parts))
    for batch in batches(parts):
        out = policy.compute_loss(batch, loss, totals, **loss_inputs(loss, batch, *kl))
        out.loss.backward()
        value += out.loss.item()
    return value, torch.cat([p.grad.reshape(-1) for p in policy.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sft"},
        {"loss": "dpo", "label_smoothing": 0.1},
        {"loss": "rpo", "eta": 0.5},
        {"loss": "rpo", "eta": 0.5, "sft": "tokens"},
        {"loss": "ipo"},
        {"loss": "hinge"},
        {"loss": "slic"},
        {"loss": "kto", "desirable_weight": 1.3},
        {"loss": "apo_zero_unpaired"},
        {"loss": "bco", "delta": 0.3},
        {"loss": "orpo"},
        {"loss": "dpo_norm", "f_divergence": "js_divergence"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_micro_batches_add_up_to_one_batch(world, tmp_path, options):
    config = make(world, tmp_path, **options)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, config.kind, max_length=64)
    # a reference that is not the policy, so that no gradient is a special case
    shift = torch.randn(len(examples), len(examples[0].responses), generator=torch.Generator().manual_seed(0))
    cached = reference.compute(policy, examples, config.kind, 8, 0, lambda done, of: None)
    examples = reference.ReferenceLogps(cached.logps - shift, cached.kl, cached.kl_offsets).attach(examples)
    whole, parts = [[*range(12)]], [[*range(5)], [*range(5, 9)], [*range(9, 12)]]
    one, one_gradient = gradients(policy, config, examples, whole, parts)
    value, gradient = gradients(policy, config, examples, parts, parts)
    assert value == pytest.approx(one, rel=2e-6)
    assert float((gradient - one_gradient).norm() / one_gradient.norm()) < 2e-6
    means = [gradients(policy, config, examples, [part], parts)[0] for part in parts]
    assert abs(sum(means) / 3 - one) > 1e-4  # a mean of means is another number


def test_schedule_covers_every_epoch_once(world, tmp_path):
    config = make(world, tmp_path, max_steps=-1, num_train_epochs=2.5, gradient_accumulation_steps=2)
    examples = [types.SimpleNamespace(length=3 + i % 5) for i in range(22)]  # 6 micro-batches, 3 steps an epoch
    schedule = BatchOrder(config, examples, seed=1)
    assert schedule.steps == 8 and [schedule.epoch(step) for step in (0, 3, 6)] == [0, 1, 2]
    steps = [schedule.of_step(step) for step in range(8)]
    assert [first for first, _ in steps] == [0, 2, 4, 6, 8, 10, 12, 14]
    for epoch in (0, 1):
        seen = [i for _, batches in steps[3 * epoch : 3 * epoch + 3] for batch in batches for i in batch]
        assert sorted(seen) == [*range(22)]
    assert steps[0] != steps[3]
    assert BatchOrder(config, examples, seed=1).of_step(4) == steps[4]  # without having walked there
    assert BatchOrder(config, examples, seed=2).of_step(0) != steps[0]
    assert schedule.all_steps() == [batches for _, batches in steps]


def break_gradients(monkeypatch, steps, value=math.nan):
    """Makes the gradients of these steps NaN."""
    own, calls = torch.nn.utils.clip_grad_norm_, iter(range(10**6))

    def clip(parameters, *args, **kwargs):
        if next(calls) in steps:
            parameters[0].grad[0, 0] = value
        return own(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def test_a_step_with_nan_gradients_is_skipped_and_counted(world, tmp_path, quiet, monkeypatch):
    changes = {"lr_scheduler_type": "constant", "eval_dataset": None, "max_length": 60}
    train(make(world, tmp_path / "a", max_steps=1, **changes), display=quiet)
    break_gradients(monkeypatch, {1}, math.inf)
    summary = train(make(world, tmp_path / "b", max_steps=2, **changes), display=quiet)
    assert summary["stages"]["dpo"]["skipped_steps"] == 1
    last = read_metrics(tmp_path / "b")[-1]
    assert last["skipped_steps"] == 1 and math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)  # the second step was not taken


def test_nan_in_a_row_ends_the_run_and_keeps_the_last_good_checkpoint(world, tmp_path, quiet, monkeypatch):
    break_gradients(monkeypatch, range(4, 99))
    config = make(world, tmp_path, max_steps=20, save_steps=2, max_skipped_steps=3, save_total_limit=1)
    with pytest.raises(TrainingError, match="dpo step 7: loss or gradients were NaN or inf 3 steps in a row; the last"):
        train(config, display=quiet)
    (saved,) = checkpoint.checkpoints(tmp_path)
    assert all(torch.isfinite(value).all() for value in load_file(saved / "model.safetensors").values())


# ---- whole runs ------------------------------------------------------------------------------------------------------


def two_stages(world, run_dir, **changes):
    stages = [
        {"loss": "sft", "learning_rate": 1e-2, "max_steps": 10},
        {"loss": "rpo", "eta": 0.1, "max_steps": 6, "eval_steps": 4, "gradient_accumulation_steps": 2},
    ]
    changes = {"model_name_or_path": str(world / "config"), "init_from_config": True, "save_steps": 3} | changes
    return make(world, run_dir, stages=stages, eval_generate=True, eval_max_new_tokens=4, **changes)


def test_a_run_from_nothing_to_a_report(world, tmp_path):
    shown = io.StringIO()
    summary = train(two_stages(world, tmp_path / "run"), display=Display(Console(file=shown, width=100)))
    run = tmp_path / "run"
    lines = read_metrics(run)
    assert [(row["stage"], row["step"]) for row in lines if row["split"] == "eval"] == [
        ("sft", 0), ("sft", 10), ("rpo", 0), ("rpo", 4), ("rpo", 6),
    ]
    rpo = [row for row in lines if row["stage"] == "rpo"]
    assert [row["step"] for row in rpo if row["split"] == "train"] == [2, 4, 6]
    named = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected"}
    for row in rpo:
        extra = {"grad_norm", "learning_rate", "num_tokens", "tokens_per_s", "peak_memory_mib"}
        assert named | (extra if row["split"] == "train" else {"watch/kl"}) <= row.keys()
    first = next(row for row in rpo if row["split"] == "eval")
    assert first["rewards/margins"] == 0 and first["watch/kl"] == 0  # the policy is its own reference
    sft = [row["loss"] for row in lines if row["stage"] == "sft" and row["split"] == "eval"]
    assert sft[1] < 0.8 * sft[0]
    assert rpo[-1]["rewards/margins"] > 0.01

    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["before"]["exact_match"] == summary["stages"]["sft"]["after"]["exact_match"]
    assert set(summary["samples"][0]) == {"prompt", "expected", "before", "after", "right"}
    assert summary["stages"]["rpo"]["num_tokens"] == rpo[-2]["num_tokens"]
    assert (run / "report.html").stat().st_size > 1000
    text = shown.getvalue()
    assert "sft 10/10 | loss" in text and "after rpo" in text and str(run / "report.html") in text
    assert [path.name for path in checkpoint.checkpoints(run)] == [
        "00-sft-00000009", "01-rpo-00000000", "01-rpo-00000003",
    ]

    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    rows = load_records(world / "heldout.jsonl")
    examples, _ = tokenize_records(rows, tokenizer, "pair", max_length=64)
    policy = load_policy(make(world, tmp_path, model_name_or_path=str(run / "model")), tokenizer)
    chosen = torch.stack([policy.sequence_logps(collate([e], 0))[0] for e in examples]).mean()
    assert float(chosen) == pytest.approx(summary["after"]["logps/chosen"], abs=1e-4)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_losses_without_pairs(world, tmp_path, quiet, loss):
    rows = [
        row
        for pair in make_pairs(8, seed=4)
        for row in (
            {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True},
            {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False},
        )
    ]
    data = str(write_rows(tmp_path / "labelled.jsonl", rows))
    run = tmp_path / "run"
    budget = {"kl_budget": 1e-4, "kl_budget_action": "continue"} if loss == "kto" else {}
    summary = train(make(world, run, loss=loss, train_dataset=data, eval_dataset=data, max_steps=6, logging_steps=1,
                         learning_rate=3e-3, per_device_train_batch_size=8, **budget), display=quiet)
    assert summary["after"]["loss"] < summary["before"]["loss"]
    if loss == "kto":
        assert {"rewards/chosen", "rewards/rejected", "kl"} <= summary["after"].keys()
        assert summary["before"]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert summary["after"]["rewards/chosen"] > summary["after"]["rewards/rejected"]
        reached = summary["stages"]["kto"]["kl_budget"]  # of the responses, not KTO's baseline
        (row,) = [r for r in read_metrics(run) if r["split"] == "train" and r["step"] == reached["step"]]
        assert reached["kl"] == row["watch/kl"] >= 1e-4 and reached["kl"] != row["kl"]


def test_ktos_reference_is_the_policy_in_every_step(world, tmp_path, quiet):
    """At a learning rate of 0 every reward and every baseline is 0, whichever micro-batch: each meets its own cache."""
    train(make(world, tmp_path, loss="kto", learning_rate=0.0, max_steps=9, logging_steps=1, num_train_epochs=3,
               gradient_accumulation_steps=3), display=quiet)
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert len(rows) == 9
    for row in rows:
        assert row["loss"] == pytest.approx(0.5, abs=1e-6)
        assert max(abs(row[name]) for name in ("kl", "rewards/chosen", "rewards/rejected")) < 1e-5


def labelled(pairs, label=lambda side: side == "chosen", prompt=None):
    return [
        {"prompt": prompt or pair["prompt"], "completion": pair[side], "label": label(side)}
        for pair in pairs for side in ("chosen", "rejected")
    ]


@torch.no_grad()
def test_ktos_baseline_is_over_the_global_batch_however_it_is_cut(world, tmp_path, quiet):
    rows = [row for row, _ in zip(labelled(make_pairs(4, seed=4))[::2], range(4))]
    rows[1]["label"] = rows[3]["label"] = False
    data = str(write_rows(tmp_path / "four.jsonl", rows))
    tokenizer = make_tokenizer()
    torch.manual_seed(9)
    models = {tmp_path / "ref": transformers.AutoModelForCausalLM.from_config(make_config(), dtype=torch.float32),
              world / "pretrained": transformers.AutoModelForCausalLM.from_pretrained(world / "pretrained")}
    models[tmp_path / "ref"].save_pretrained(tmp_path / "ref")
    kl = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):  # each prompt with the completion of the record behind it
        prompt = tokenizer(row["prompt"])["input_ids"]
        other = tokenizer(rows[(i + 1) % 4]["completion"], add_special_tokens=False)["input_ids"] + [2]
        ids = torch.tensor([prompt + other])
        longest = max(len(tokenizer(r["prompt"])["input_ids"]) + len(r["completion"]) + 1 for r in rows)
        ids = ids[:, :longest]
        for sign, model in zip((-1, 1), models.values()):
            logps = model.double()(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
            kl += sign * logps[len(prompt) - 1 :].sum() / 4
    ref, policy = (list(models) if kl > 0 else list(models)[::-1])
    seen = []
    with torch.enable_grad():
        for size, parts in ((4, 1), (2, 2), (1, 4)):
            run = tmp_path / f"{size}x{parts}"
            train(make(world, run, loss="kto", train_dataset=data, eval_dataset=data, model_name_or_path=str(policy),
                       tokenizer_name_or_path=str(world / "pretrained"), ref_model_name_or_path=str(ref), max_steps=3,
                       per_device_train_batch_size=size, gradient_accumulation_steps=parts, learning_rate=1e-2,
                       per_device_eval_batch_size=size, logging_steps=1), display=quiet)
            rows_of_run = read_metrics(run)
            seen.append([(row["split"], row["step"], row["kl"], row["loss"]) for row in rows_of_run])
    first = next(row for row in seen[0] if row[0] == "train")
    assert first[2] == pytest.approx(abs(float(kl)), abs=1e-4) and first[2] > 0.1
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert one[:2] == two[:2] and one[2:] == pytest.approx(two[2:], abs=1e-4)


def test_kto_says_or_refuses_what_has_no_baseline(world, tmp_path, capsys):
    with pytest.raises(UserError, match="per_device_train_batch_size is 1, of one micro-batch a step: loss 'kto'"):
        make(world, tmp_path / "a", loss="kto", per_device_train_batch_size=1)
    make(world, tmp_path / "a", loss="apo_zero_unpaired", per_device_train_batch_size=1)
    pairs = make_pairs(4, seed=4)
    same = str(write_rows(tmp_path / "same.jsonl", labelled(pairs, prompt="word:")))
    with pytest.raises(UserError, match="stage 'kto': no step has two different prompts, which KTO's baseline takes"):
        dry_run(make(world, tmp_path / "a", loss="kto", train_dataset=same, eval_dataset=None))
    five = str(write_rows(tmp_path / "five.jsonl", labelled(pairs, label=lambda _: True)[:5]))
    dry_run(make(world, tmp_path / "a", loss="kto", train_dataset=five, eval_dataset=None, max_steps=-1))
    said = capsys.readouterr().out
    assert "kto: 1 of 2 steps have one prompt only, and so a KL baseline of 0" in said
    assert "kto: all 5 labels are desirable: nothing keeps the policy from raising every response alike" in said


def test_lora_trains_the_adapter_alone(world, tmp_path, quiet):
    changes = {"lora_r": 4, "learning_rate": 5e-2, "gradient_checkpointing": True, "max_steps": 6}
    config = make(world, tmp_path, use_peft=True, **changes)
    summary = train(config, display=quiet)
    assert summary["before"]["rewards/margins"] == 0 and summary["after"]["rewards/margins"] > 0.01
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # peft's own way in
    assert any("lora" in name for name, _ in loaded.named_parameters())


def test_the_tail_of_the_head_says_how_near_it_is(world, tmp_path, quiet):
    """A model this small has flat logits: all of its columns end up active, and the run is the exact one."""
    metrics = []
    for tail in ("exact", "rank1"):
        config = config_from_dict(settings(world, tmp_path / tail, max_steps=3, tail=tail))
        train(config, display=quiet)
        metrics.append(lines_without_times(tmp_path / tail))
    assert all(line["tail/active"] == 1 and line["tail/error"] == 0 for line in metrics[1] if line["split"] == "train")
    told = [{key: value for key, value in line.items() if not key.startswith("tail/")} for line in metrics[1]]
    assert told == metrics[0]


def test_a_named_reference_model(world, tmp_path, quiet):
    tokenizer = load_tokenizer(make(world, tmp_path))
    torch.manual_seed(9)
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(world / "config"), dtype=torch.float32
    )
    other.save_pretrained(tmp_path / "ref")
    tokenizer.save_pretrained(tmp_path / "ref")
    config = make(world, tmp_path / "run", ref_model_name_or_path=str(tmp_path / "ref"), max_steps=1)
    summary = train(config, display=quiet)
    policy, ref = (
        load_policy(make(world, tmp_path, model_name_or_path=str(p)), tokenizer)
        for p in (world / "pretrained", tmp_path / "ref")
    )
    examples, _ = tokenize_records(load_records(config.eval_dataset), tokenizer, "pair", max_length=64)
    batch = collate(examples, 0)
    rewards = 0.1 * (policy.sequence_logps(batch) - ref.sequence_logps(batch))
    assert summary["before"]["rewards/chosen"] == pytest.approx(float(rewards[:9].mean()), abs=1e-5)


def test_tensorboard_and_wandb(world, tmp_path, quiet, monkeypatch):
    logged = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    fake.init = lambda **kwargs: types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(make(world, tmp_path, report_to=["tensorboard", "wandb"], max_steps=2), display=quiet)
    assert [entry[0] for entry in logged[:-1]] == [0, 2, 2] and logged[-1] == "finished"
    assert "train/rewards/margins" in logged[1][1] and "eval/logps/chosen" in logged[2][1]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 2]
    assert events.Scalars("train/loss")[0].value == pytest.approx(
        next(row["loss"] for row in read_metrics(tmp_path) if row["split"] == "train")
    )


# ---- stopping and going on -------------------------------------------------------------------------------------------


def lines_without_times(run_dir):
    return [
        {key: value for key, value in row.items() if not key.endswith("tokens_per_s") and key != "peak_memory_mib"}
        for row in read_metrics(run_dir)
    ]


def stop_after(monkeypatch, step, signum=signal.SIGTERM):
    """Sends this process a signal when that many steps of the run have been done."""
    own, done = stage.train_step, iter(range(1, 10**6))

    def train_step(*args, **kwargs):
        values = own(*args, **kwargs)
        if next(done) == step:
            os.kill(os.getpid(), signum)
        return values

    monkeypatch.setattr(stage, "train_step", train_step)


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_stopped_run_goes_on_bitwise(world, tmp_path, quiet, monkeypatch, use_peft):
    changes = {}
    if use_peft:  # its dropout draws from the random generators
        changes = {"use_peft": True, "model_name_or_path": str(world / "pretrained"), "init_from_config": False}
    train(two_stages(world, tmp_path / "whole", **changes), display=quiet)
    config = two_stages(world, tmp_path / "parts", **changes)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]  # of a background job: not the defaults
    for step, signum in ((7, signal.SIGINT), (6, signal.SIGTERM)):  # after sft step 7, then after rpo step 3
        with monkeypatch.context() as patch:
            stop_after(patch, step, signum)
            with pytest.raises(Stopped) as stopped:
                train(config, resume=True, display=quiet)
            assert stopped.value.signum == signum
    assert "stopped at rpo step 3/6, saved in" in str(stopped.value)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rpo", "split": "train", "step": 99}\n{"half a li')  # what a kill may leave
    train(config, resume=True, display=quiet)
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"
    whole, parts = ((tmp_path / run / "model" / name).read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "parts")
    assert train(config, resume=True, display=quiet)["stages"]["rpo"]["steps"] == 6  # complete: nothing to do
    with pytest.raises(UserError, match="holds a complete run of another configuration: seed .42 there, 7 now."):
        train(two_stages(world, tmp_path / "parts", seed=7, **changes), resume=True, display=quiet)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_around_an_evaluation_neither_loses_nor_repeats_it(world, tmp_path, quiet, monkeypatch, when):
    config = make(world, tmp_path / "parts", max_steps=4, eval_steps=2, logging_steps=1)
    train(make(world, tmp_path / "whole", max_steps=4, eval_steps=2, logging_steps=1), display=quiet)
    own = stage.evaluate
    with monkeypatch.context() as patch:
        calls = iter(range(9))

        def evaluate(*args):
            now = next(calls) == 1
            if now and when == "before":
                os.kill(os.getpid(), signal.SIGINT)
            values = own(*args)
            if now and when == "after":
                os.kill(os.getpid(), signal.SIGINT)
            return values

        patch.setattr(stage, "evaluate", evaluate)
        with pytest.raises(Stopped, match="stopped at dpo step 2/4, saved"):
            train(config, display=quiet)
    train(config, resume=True, display=quiet)
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "parts")


def test_lost_reference_log_probs_are_made_again(world, tmp_path, quiet, monkeypatch):
    # LoRA: making the model again draws from the random generators, and dropout must not notice
    changes = {"use_peft": True, "model_name_or_path": str(world / "pretrained"), "init_from_config": False}
    train(two_stages(world, tmp_path / "whole", **changes), display=quiet)
    config = two_stages(world, tmp_path / "parts", **changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(Stopped):
            train(config, display=quiet)
    for path in (tmp_path / "parts" / "reference").iterdir():
        path.unlink()
    train(config, resume=True, display=quiet)
    whole, parts = ((tmp_path / run / "model" / "adapter_model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_what_is_refused_before_anything_is_written(world, tmp_path, quiet, monkeypatch):
    run = tmp_path / "run"
    config = make(world, run, max_steps=6, save_steps=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train(config, display=quiet)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(message, resume=False, **changes):
        values = settings(world, run, max_steps=6, save_steps=2) | changes
        with pytest.raises(ValueError, match=message) as caught:
            train(config_from_dict(values), resume=resume, display=quiet)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    refused("holds a run already .checkpoints, metrics.jsonl.: --resume goes on with it")
    refused("is of another configuration: learning_rate .0.001 there, 0.01 now.", resume=True, learning_rate=0.01)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    again = {"overwrite_output_dir": True}
    refused("empty.jsonl: no records, the data is empty", train_dataset=str(empty), **again)
    refused("nope.jsonl: no such file", eval_dataset=str(tmp_path / "nope.jsonl"), **again)
    same = write_rows(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    refused("none of the 1 records is usable", train_dataset=str(same), **again)
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a", "chosen": "b" * 80, "rejected": "c"}])
    refused("long.jsonl:1: field 'chosen' has 81 tokens with EOS, which leaves", train_dataset=str(long), **again)
    refused("nothing: no such folder", model_name_or_path=str(tmp_path / "nothing"), **again)
    refused("eval_generate needs an eval_dataset with answers", eval_generate=True, eval_dataset=None, **again)
    refused("report_to has wandb, which is not installed", report_to=["wandb"], **again)
    other = write_rows(tmp_path / "other.jsonl", make_pairs(22, seed=8))
    saved = dict(config.to_dict())
    (world / "train.jsonl").rename(tmp_path / "kept.jsonl")
    try:
        other.rename(world / "train.jsonl")
        refused("train_dataset has other examples now than when it was saved", resume=True)
    finally:
        (tmp_path / "kept.jsonl").replace(world / "train.jsonl")
    assert config.to_dict() == saved
    train(make(world, run, max_steps=2, overwrite_output_dir=True), display=quiet)
    assert [row["step"] for row in read_metrics(run)] == [0, 2, 2] and checkpoint.checkpoints(run) == []


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(world, tmp_path, quiet, monkeypatch):
    config = make(world, tmp_path, max_steps=6, save_steps=2, save_total_limit=1)
    own = checkpoint.write_state

    def write_state(folder, state, *args):
        if state["step"] == 4:
            raise OSError(28, "No space left on device")
        own(folder, state, *args)

    monkeypatch.setattr(checkpoint, "write_state", write_state)
    with pytest.raises(SaveError, match="could not save .*00-dpo-00000004: No space left on device"):
        train(config, display=quiet)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00-dpo-00000002"]
    monkeypatch.undo()
    train(config, resume=True, display=quiet)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 2, 4, 6, 6]


def test_training_goes_on_while_a_copy_is_saved(world, tmp_path, quiet, monkeypatch):
    """The save of step 2 cannot end before step 4 is done; what it holds are the weights of step 2."""
    changes = {"lr_scheduler_type": "constant", "eval_dataset": None, "max_length": 60}
    train(make(world, tmp_path / "two", max_steps=2, **changes), display=quiet)
    own, save, done, threads = stage.train_step, run.save_model, threading.Event(), []

    def save_model(*args):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            assert done.wait(60)
        save(*args)

    steps = iter(range(1, 99))

    def train_step(*args):
        values = own(*args)
        if next(steps) == 4:
            done.set()
        return values

    monkeypatch.setattr(run, "save_model", save_model)
    monkeypatch.setattr(loop, "save_model", save_model)
    monkeypatch.setattr(stage, "train_step", train_step)
    train(make(world, tmp_path / "run", max_steps=5, save_steps=2, **changes), display=quiet)
    assert threads[0] is not threading.main_thread() and len(threads) == 3
    saved = load_file(tmp_path / "run" / "checkpoints" / "00-dpo-00000002" / "model.safetensors")
    expected = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointed_layers_give_the_same_gradients(world, tmp_path, kind):
    config = make(world, tmp_path)
    examples, _ = tokenize_records(load_records(config.train_dataset), load_tokenizer(config), "pair", max_length=64)
    shifted = [dataclasses.replace(e, ref_logps=(-1.0, -2.0)) for e in examples]

    def found(kind):
        policy = load_policy(make(world, tmp_path, gradient_checkpointing=kind), load_tokenizer(config))
        policy.model.train()
        return gradients(policy, config, shifted, [[0, 1, 2]], [])[1]

    assert torch.equal(found(kind), found("none"))
    assert make(world, tmp_path, gradient_checkpointing=True).gradient_checkpointing == "full"
    with pytest.raises(UserError, match="gradient_checkpointing is 'offload', from a GPU to host memory; .* cpu"):
        found("offload")


def test_no_checkpoint_to_go_on_from(world, tmp_path):
    shown = io.StringIO()
    train(make(world, tmp_path, max_steps=1), resume=True, display=Display(Console(file=shown, width=200)))
    assert "no checkpoint there yet, starting from the beginning" in shown.getvalue()


def test_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
