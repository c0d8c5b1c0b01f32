"""Cards without bf16 (fp16 and a loss scaler) and devices without float64, as far as a CPU can tell."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import make, make_tokenizer, read_metrics, stopped_after
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import cli, rows
from fastpref.data import collate
from fastpref.errors import UserError
from fastpref.losses import DPO
from fastpref.train import loop, optim, stage
from fastpref.train.model import compute_dtype_of, load_policy, pick_device
from fastpref.train.optim import Updater
from fastpref.train.stage_data import load_data

CUDA = torch.device("cuda", 0)
LORA = {"use_peft": True, "lora_r": 4}


def batch_of(config, policy, quiet):
    examples = load_data(config.stage_configs(), make_tokenizer(), quiet)[0].train
    batch = collate([examples[i] for i in range(4)], 0, "pair", layout=policy.layout)
    return batch, torch.linspace(-20, -25, 8)


# ---- fp16 ------------------------------------------------------------------------------------------------------------


def test_the_scaled_gradient_is_that_of_fp32(world, tmp_path, quiet):
    """A small beta takes the gradients of hidden rows below float16's normal numbers (6e-5): scaled before they are
    rounded they keep its three digits, and scaled afterwards they would not."""

    def gradient(scale, **changes):
        torch.manual_seed(0)
        config = make(world, tmp_path, packing=True, **LORA, **changes)
        policy = load_policy(config, make_tokenizer())
        batch, ref = batch_of(config, policy, quiet)
        updater = Updater(policy.trainable(), config, scaled=scale > 1)
        with torch.no_grad():
            for i, p in enumerate(policy.trainable().values()):
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        out = policy.compute_loss(batch, DPO(beta=1e-4), scale=updater.scale, ref_logps=ref)
        out.loss.backward()
        norm = float(updater.gradient_norm())
        return float(out.loss.detach()) / updater.scale, norm, torch.cat([p.grad.flatten() for p in updater.parameters])

    loss, norm, exact = gradient(1)
    assert loss == pytest.approx(0.693, abs=2e-3)
    for scale, low, high in ((optim.FIRST_SCALE, 0, 1e-2), (1, 3e-2, 2)):
        found, its_norm, grad = gradient(scale, fp16=True)
        off = float((grad - exact).norm() / exact.norm())
        assert low <= off < high and found == pytest.approx(loss, rel=1e-3)
        assert its_norm == pytest.approx(norm, rel=high)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls(world, tmp_path, quiet, monkeypatch):
    changes = LORA | {"fp16": True, "logging_steps": 1, "max_steps": 12, "packing": True, "save_steps": 2}
    changes |= {"max_skipped_steps": 9}
    monkeypatch.setattr(optim, "FIRST_SCALE", 2.0**36)
    monkeypatch.setattr(optim, "RAISED_EVERY", 2)
    scales, norm = [], Updater.gradient_norm
    monkeypatch.setattr(Updater, "gradient_norm", lambda self: scales.append(self.scale) or norm(self))
    loop.train(make(world, tmp_path / "whole", **changes), display=quiet)
    assert len(scales) == 12
    falls = [b == a / 8 for a, b in zip(scales, scales[1:])]
    first = falls.index(False)
    assert scales[:first + 1] == [2.0**36 / 8**i for i in range(first + 1)] and 1 <= first <= 8
    assert scales[first + 2] == 2 * scales[first]  # raised again after two steps
    lines = [row for row in read_metrics(tmp_path / "whole") if row["split"] == "train"]
    assert lines[-1]["skipped_steps"] - sum(falls) in (0, 1)  # of the last step no scale follows
    # it is saved with the states: a run that goes on does bitwise what one that was not stopped does
    config = make(world, tmp_path / "parts", **changes)
    with stopped_after(5, monkeypatch):
        loop.train(config, display=quiet)
    loop.train(config, resume=True, display=quiet)
    name = "model/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("changes", "native", "dtype"), [
    ({}, True, torch.bfloat16), ({}, False, torch.float16), ({"bf16": False}, False, torch.float32),
    ({"fp16": False}, False, torch.float32), ({"fp16": True}, True, torch.float16),
    ({"dtype": "bfloat16"}, False, torch.bfloat16), ({"bf16": True}, False, torch.bfloat16),
])
def test_the_dtype_follows_what_the_card_has_itself(changes, native, dtype, world, tmp_path, monkeypatch):
    """A T4 emulates bf16, and says that it is supported."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert compute_dtype_of(make(world, tmp_path, **changes), CUDA) == dtype
    assert compute_dtype_of(make(world, tmp_path), torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("changes", "told"), [
    ({"fp16": True, "bf16": True}, "fp16 is True, but dtype or bf16 asks to compute in bf16"),
    ({"fp16": True, "optim_in_backward": True, "max_grad_norm": 0}, "fp16: optim_in_backward updates a weight before"),
])
def test_what_does_not_go_with_fp16(changes, told, world, tmp_path):
    with pytest.raises(UserError, match=told):
        make(world, tmp_path, **changes)


# ---- devices by name -------------------------------------------------------------------------------------------------


def test_a_device_by_name(monkeypatch):
    for name, found in (("cpu", "cpu"), ("mps", "mps"), ("", "cpu")):
        monkeypatch.setenv("FASTPREF_DEVICE", name)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert pick_device().type == found
    for name in ("cuda:1", "tpu"):
        monkeypatch.setenv("FASTPREF_DEVICE", name)
        with pytest.raises(UserError, match=f"FASTPREF_DEVICE is '{name}'; of cpu, cuda and mps this"):
            pick_device()


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("loss", ["dpo", "kto", "bradley_terry"])
def test_a_step_makes_no_float64_where_there_is_none(loss, world, tmp_path, quiet, monkeypatch):
    """With the rows in plain torch, and float32 in place of float64, as for mps; on a CPU that is played by it."""
    monkeypatch.setenv("FASTPREF_BACKEND", "reference")
    ours = [m for name, m in list(sys.modules.items()) if name.startswith("fastpref")]
    modules = [m for m in ours if hasattr(m, "exact_dtype")]
    own, exact = stage.train_step, rows.exact_dtype

    def step(*args):
        with NoFloat64():
            return own(*args)

    for module in modules:
        monkeypatch.setattr(module, "exact_dtype", lambda device: torch.float32)
    monkeypatch.setattr(stage, "train_step", step)
    loop.train(make(world, tmp_path / "a", loss=loss, logging_steps=1), display=quiet)
    monkeypatch.setattr(stage, "train_step", own)
    for module in modules:
        monkeypatch.setattr(module, "exact_dtype", exact)
    loop.train(make(world, tmp_path / "b", loss=loss, logging_steps=1), display=quiet)
    ours, theirs = ([row["loss"] for row in read_metrics(tmp_path / run) if row["split"] == "train"] for run in "ab")
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_info_names_them(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cli.main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Apple MPS yes FASTPREF_DEVICE=mps trains on it: torch rows, untested on hardware" in said
