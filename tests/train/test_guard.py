"""Before the first step policy and reference are the same: what a training step scores has to agree."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make, make_pairs, read_metrics, write_rows
from transformers.models.llama.modeling_llama import LlamaMLP

from fastpref.errors import UserError
from fastpref.train import guard, stage
from fastpref.train.loop import train

STAGES = [{"loss": "sft", "max_steps": 2}, {"loss": "dpo", "max_steps": 2}, {"loss": "kto", "max_steps": 2}]


def labelled(path):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0}
            for i, p in enumerate(make_pairs(10, seed=3))]
    return str(write_rows(path, rows))


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"bf16": True, "packing": True}, {"use_peft": True}],
                         ids=["fp32", "packed", "bf16 packed", "lora"])
def test_a_sound_run_says_its_noise_floor_and_is_left_alone(options, world, tmp_path, capsys):
    train(make(world, tmp_path / "on", eval_dataset=None, **options))
    (found,) = re.findall(r"dpo: policy and reference, still the same, differ by up to (\S+) nats a sequence \(4 micro-"
                          r"batches scored as in training\): the noise floor", capsys.readouterr().out)
    assert float(found) < (0.2 if "bf16" in options else 5e-5)
    train(make(world, tmp_path / "off", eval_dataset=None, check_reference=False, **options))
    assert "the noise floor" not in capsys.readouterr().out
    name = "adapter_model.safetensors" if "use_peft" in options else "model.safetensors"
    on, off = (load_file(tmp_path / run / "model" / name) for run in ("on", "off"))
    assert all(torch.equal(on[key], off[key]) for key in on)


def test_every_stage_with_the_policy_for_a_reference_is_checked(world, tmp_path, capsys, monkeypatch):
    data = labelled(tmp_path / "kto.jsonl")
    stages = [*STAGES[:2], STAGES[2] | {"train_dataset": data}]
    config = make(world, tmp_path / "run", stages=stages, eval_dataset=None, max_steps=-1)
    train(config)
    assert re.findall(r"(\w+): policy and reference, still the same", capsys.readouterr().out) == ["dpo", "kto"]

    def never(*args):
        raise AssertionError("nothing to compare")

    monkeypatch.setattr(guard, "check", never)
    train(make(world, tmp_path / "named", ref_model_name_or_path=str(world / "pretrained"), eval_dataset=None))
    train(make(world, tmp_path / "free", loss="simpo", eval_dataset=None))


def run_is_stopped(config, because):
    with pytest.raises(UserError, match=because) as error:
        train(config)
    assert "check_reference=false trains all the same" in str(error.value) and "\n" not in str(error.value)
    assert not read_metrics(Path(config.output_dir))
    train(dataclasses.replace(config, check_reference=False, overwrite_output_dir=True))


@pytest.mark.parametrize(("change", "because"), [
    (lambda x: x * (1 + 0.01 * torch.rand_like(x)), "two passes over one batch differ too: its code draws random"),
    (lambda x: 1.01 * x, "without train mode they agree: its code does something else there"),
])
def test_what_a_models_own_code_does_in_train_mode_stops_the_run(change, because, world, tmp_path, monkeypatch):
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, change(x) if self.training else x))
    run_is_stopped(make(world, tmp_path / "run", eval_dataset=None), because)


def test_rows_that_depend_on_their_batch_and_stale_log_probs_stop_the_run(world, tmp_path, monkeypatch):
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x * (1 + 0.001 * x.shape[0])))
    because = "likely reference log-probs of other weights.*a model whose log-probs depend on the rest of the batch"
    run_is_stopped(make(world, tmp_path / "run", eval_dataset=None), because)
    monkeypatch.setattr(LlamaMLP, "forward", own)
    obtained = stage.cached_logps

    def stale(*args, **options):
        found = obtained(*args, **options)
        return dataclasses.replace(found, logps=found.logps - 0.01)

    monkeypatch.setattr(stage, "cached_logps", stale)
    because = r"differ by up to 1.0e-02 nats.*delete the cached file"
    run_is_stopped(make(world, tmp_path / "stale", eval_dataset=None), because)
