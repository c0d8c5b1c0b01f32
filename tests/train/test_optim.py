"""Learning-rate schedules against their closed forms; who decays; bf16 weights against fp32 training."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import make, make_config, make_tokenizer, read_metrics
from transformers import LlamaForCausalLM

from fastpref.data import collate, load_records, tokenize_records
from fastpref.errors import UserError
from fastpref.train import optim, stage
from fastpref.train.loop import Stopped, train
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.optim import MasterAdamW, Updater, join, learning_rate, make_optimizer, split


def test_schedules(world, tmp_path):
    def rates(**changes):
        config = make(world, tmp_path, learning_rate=2.0, **changes)
        return [learning_rate(config, step, 10) for step in range(10)]

    assert rates(lr_scheduler_type="constant") == [2.0] * 10
    assert rates() == pytest.approx([2 * (1 - s / 10) for s in range(10)])
    warm = rates(warmup_steps=4)
    assert warm[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert warm[4:] == pytest.approx([2 * (1 - s / 6) for s in range(6)])
    assert rates(warmup_ratio=0.31, lr_scheduler_type="cosine")[4:] == pytest.approx(
        [1 + math.cos(math.pi * s / 6) for s in range(6)]
    )
    assert rates(warmup_steps=30)[-1] == pytest.approx(2 * 10 / 31)


def test_matrices_decay_and_vectors_do_not(world, tmp_path):
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3,)))
    optimizer = make_optimizer({"v": vector, "m": matrix}, make(world, tmp_path, learning_rate=0.1, weight_decay=0.5))
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(vector, torch.ones(3))
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))


# ---- bf16 weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eager():
    """torchao compiles its step, 15 s a shape on a CPU; the same Python does without."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def wide(world, tmp_path_factory):
    """A model with weights large enough to be quantised (4096 numbers), and rounded to bf16."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 264}
    LlamaForCausalLM(make_config(**sizes)).bfloat16().float().save_pretrained(folder)
    return str(folder)


def test_the_master_is_the_weight_and_16_bits_more():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-38, 38, (4096,), generator=generator)
    value[:4] = torch.tensor([0.0, -0.0, 3.4028235e38, 1e-45])
    high, low = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.int16)
    split(value.clone(), high, low)
    assert torch.equal(join(high, low).view(torch.int32), value.view(torch.int32))
    off = (value.bfloat16().view(torch.int16) - high.view(torch.int16))[4:]
    assert int((off != 0).sum()) <= 1 and int(off.abs().max()) <= 1  # a tie may go the other way


@pytest.mark.parametrize("size", [optim.SLICE, 500])
def test_a_master_is_bitwise_fp32_adamw(monkeypatch, size):
    monkeypatch.setattr(optim, "SLICE", size)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 30), (30,))]
    exact = [torch.nn.Parameter(p.float()) for p in start]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-9, "weight_decay": 0.1}
    reference, optimizer = torch.optim.AdamW(exact, fused=True, **options), MasterAdamW(ours, **options)
    for step in range(60):
        if step == 30:  # as in a resumed run
            saved, optimizer = optimizer.state_dict(), MasterAdamW(ours, **options)
            optimizer.load_state_dict(saved)
        for p, q in zip(exact, ours):
            q.grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = q.grad.float()
        reference.step()
        optimizer.step()
    for p, q, first in zip(exact, ours, start):
        assert torch.equal(join(q, optimizer.state[q]["low"]), p.detach())
        assert not torch.equal(q, first)


def test_small_tensors_keep_fp32_moments(wide, world, tmp_path, eager):
    """torchao's would be bf16: a second moment that cannot decay, because 0.999 of it rounds to it."""
    config = make(world, tmp_path, dtype="bfloat16", adam_beta1=0.0)
    p = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    optimizer = make_optimizer({"p": p}, config)
    for step in range(300):
        p.grad = torch.full_like(p, 1.0 if step < 50 else 0.0)
        optimizer.step()
    expected = (1 - 0.999**50) * 0.999**250
    assert optimizer.state[p]["exp_avg_sq"][0].item() == pytest.approx(expected, rel=1e-4)
    fresh = make_optimizer({"p": p}, config)
    fresh.load_state_dict(optimizer.state_dict())
    assert torch.equal(fresh.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_what_moves_at_a_preference_learning_rate(wide, world, tmp_path, eager):
    """48 DPO steps at 5e-7: the margin in fp32 arithmetic, of the weights that each way of training ends with."""
    config = make(world, tmp_path, model_name_or_path=wide, learning_rate=5e-7)
    tokenizer = load_tokenizer(config)
    judge = load_policy(config, tokenizer)
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    batch = collate(examples, 0)
    start = judge.sequence_logps(batch)
    batch = replace(batch, ref_logps=start)
    half = len(examples)

    def margin(policy, updater):
        weights = dict(policy.model.state_dict())
        for name, p in policy.trainable().items():
            low = updater.optimizer.state[p].get("low")
            if low is not None:
                weights[name] = join(p, low)
        judge.model.load_state_dict(weights)
        gain = judge.sequence_logps(batch) - start
        return float((gain[:half] - gain[half:]).mean())

    def trained(round_to_nearest=False, **changes):
        torch.manual_seed(0)
        own = make(world, tmp_path, model_name_or_path=wide, learning_rate=5e-7, **changes)
        policy = load_policy(own, tokenizer)
        updater = Updater(policy.trainable(), own)
        if round_to_nearest:
            updater.optimizer = torch.optim.AdamW(policy.trainable().values(), weight_decay=0.0, fused=True)
        for _ in range(48):
            stage.train_step(policy, updater, own, [batch], 5e-7, [])
        return margin(policy, updater)

    exact = trained()
    assert exact > 1e-3
    assert abs(trained(dtype="bfloat16", round_to_nearest=True)) < 0.05 * exact
    assert trained(dtype="bfloat16") == pytest.approx(exact, rel=0.1)  # the default: stochastic rounding, 8-bit states
    assert trained(dtype="bfloat16", optim="adamw_fp32_master") == pytest.approx(exact, rel=0.1)


CHOICES = {
    "8 bit": {"dtype": "bfloat16"},
    "8 bit in backward": {"dtype": "bfloat16", "optim_in_backward": True, "max_grad_norm": 0},
    "master": {"dtype": "bfloat16", "optim": "adamw_fp32_master", "gradient_accumulation_steps": 2},
    "master in backward": {"dtype": "bfloat16", "optim": "adamw_fp32_master", "optim_in_backward": True,
                           "max_grad_norm": 0},
    "fp32 in backward": {"optim_in_backward": True, "max_grad_norm": 0},
}


def goes_on_bitwise(world, tmp_path, quiet, monkeypatch, model, changes):
    def config(name):
        return make(world, tmp_path / name, model_name_or_path=model, max_steps=6, learning_rate=1e-4, **changes)

    train(config("whole"), display=quiet)
    own, done = stage.train_step, iter(range(1, 99))

    def train_step(*args):
        values = own(*args)
        if next(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_step", train_step)
        with pytest.raises(Stopped, match="stopped at dpo step 3/6, saved in"):
            train(config("parts"), display=quiet)
    torch.manual_seed(99)
    train(config("parts"), resume=True, display=quiet)
    whole, parts = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    first = load_file(f"{model}/model.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
        assert value.dtype == getattr(torch, changes.get("dtype", "float32"))
    assert any(not torch.equal(value.float(), first[name]) for name, value in whole.items())
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "parts")]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_stopped_run_goes_on_bitwise(wide, world, tmp_path, quiet, monkeypatch, eager, choice):
    goes_on_bitwise(world, tmp_path, quiet, monkeypatch, wide, CHOICES[choice])


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["8 bit", "8 bit in backward"])
def test_a_stopped_run_goes_on_bitwise_compiled(wide, world, tmp_path, quiet, monkeypatch, choice):
    goes_on_bitwise(world, tmp_path, quiet, monkeypatch, wide, CHOICES[choice])


def test_lora_on_bf16_weights(wide, world, tmp_path, quiet):
    changes = {"use_peft": True, "dtype": "bfloat16", "lora_r": 4, "learning_rate": 5e-2, "max_steps": 6}
    config = make(world, tmp_path, model_name_or_path=wide, **changes)
    summary = train(config, display=quiet)
    assert summary["before"]["rewards/margins"] == 0 and summary["after"]["rewards/margins"] > 0.01
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert load_policy(config, load_tokenizer(config)).head.weight.dtype == torch.bfloat16


# ---- in backward -----------------------------------------------------------------------------------------------------


def one_step(world, tmp_path, poison=None, **changes):
    """The policy's weights after one step, and the values it reports. poison: a weight whose gradient becomes NaN."""
    config = make(world, tmp_path, max_grad_norm=0, **changes)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    batch = collate(examples, 0)
    batch = replace(batch, ref_logps=policy.sequence_logps(batch))
    weights = policy.trainable()
    if poison:
        weights[poison].register_hook(lambda gradient: gradient * math.nan)
    held = []
    for p in weights.values():
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in weights.values())))
    updater = Updater(weights, config)
    values = stage.train_step(policy, updater, config, [batch], 1e-3, [])
    updater.close()
    assert all(p.grad is None for p in weights.values())
    return {name: p.detach().clone() for name, p in weights.items()}, values, max(held)


def test_in_backward_is_the_same_step_with_one_gradient_at_a_time(world, tmp_path):
    after, values, held = one_step(world, tmp_path)
    inside, same, most = one_step(world, tmp_path, optim_in_backward=True)
    assert held == len(after) and most == 1
    assert all(torch.equal(after[name], inside[name]) for name in after)
    assert same["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-6) and same["loss"] == values["loss"]


def test_in_backward_stops_at_the_first_gradient_that_is_not_finite(world, tmp_path):
    first = load_file(world / "pretrained" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    after, values, _ = one_step(world, tmp_path, poison=name, optim_in_backward=True)
    assert math.isnan(values["grad_norm"])
    assert not torch.equal(after["lm_head.weight"], first["lm_head.weight"])  # came before
    for key in (name, "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[key], first[key])
    after, values, _ = one_step(world, tmp_path, poison=name)
    assert all(torch.equal(after[key], first[key]) for key in after)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch_fused", "dtype": "bfloat16"}, "rounds bfloat16 weights to nearest"),
        ({"optim": "adamw_fp32_master"}, "the weights that are trained are fp32: set dtype=bfloat16"),
        ({"optim": "adamw_fp32_master", "dtype": "bfloat16", "use_peft": True}, "that are trained are fp32"),
        ({"bf16": False, "dtype": "bfloat16"}, "bf16 is False, but dtype=bfloat16 computes in bf16"),
        ({"optim_in_backward": True}, "before the norm of all of them is known: set max_grad_norm=0 (it is 1)"),
        ({"optim_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 4},
         "set gradient_accumulation_steps=1 (it is 4) and a larger batch"),
        ({"optim": "adamw_offload", "optim_in_backward": True}, "adamw_offload frees each gradient already"),
        ({"optim": "adamw_offload", "gradient_accumulation_steps": 2}, "optim adamw_offload frees each gradient"),
        ({"optim": "adamw_bnb_8bit"}, "optim is 'adamw_bnb_8bit'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"gradient_checkpointing": "some"}, "it takes none, selective, full, offload"),
    ],
)
def test_one_line_for_what_cannot_work(world, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        make(world, tmp_path, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_stages_are_checked_each_for_itself(world, tmp_path):
    stages = [{"loss": "sft", "max_grad_norm": 0, "optim_in_backward": True}, {"loss": "dpo"}]
    assert [s.optim_in_backward for s in make(world, tmp_path, stages=stages).stage_configs()] == [True, False]
    with pytest.raises(UserError, match="set max_grad_norm=0"):
        make(world, tmp_path, stages=[{"loss": "sft", "optim_in_backward": True}, {"loss": "dpo"}])


def test_missing_parts_are_named_before_the_run(world, tmp_path, quiet, monkeypatch):
    config = make(world, tmp_path, optim="adamw_offload", max_grad_norm=0)
    with pytest.raises(UserError, match="optim adamw_offload keeps states of a GPU's weights in host memory; .* cpu"):
        optim.check_optimizer(config, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    message = "optim adamw_torch_8bit .the default for dtype=bfloat16. needs torchao, which is not installed: pip"
    with pytest.raises(UserError, match=message):
        train(make(world, tmp_path / "run", dtype="bfloat16"), display=quiet)
    assert not (tmp_path / "run").exists()
