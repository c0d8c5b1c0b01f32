"""liger-kernel's kernels in the model: refused where they cannot work, and on a GPU the same numbers."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from tiny import make, make_config, make_tokenizer

from fastpref.errors import UserError
from fastpref.train import liger_kernels
from fastpref.train.model import load_policy

liger_kernel = pytest.importorskip("liger_kernel")
pytest.importorskip("liger_kernel.transformers")


class OnCuda:
    """A model's answers to what is asked before any kernel runs."""

    device = torch.device("cuda")

    def __init__(self, config):
        self.config = config


def test_what_is_refused(world, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="use_liger_kernel: liger-kernel's Triton kernels take a CUDA device"):
            load_policy(make(world, tmp_path, use_liger_kernel=True), make_tokenizer())
    with pytest.raises(UserError, match="use_liger_kernel: liger-kernel has none for bloom models"):
        liger_kernels.use_liger_kernels(OnCuda(transformers.BloomConfig()))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(UserError, match="use_liger_kernel needs liger-kernel: pip install liger-kernel"):
        liger_kernels.use_liger_kernels(OnCuda(make_config()))


def test_kernels_that_change_the_logits_are_refused(monkeypatch):
    asked = {}

    def wrong(model, **options):
        asked.update(options)
        model.model.norm.weight.data *= 1.01

    monkeypatch.setattr(liger_kernel.transformers, "_apply_liger_kernel_to_instance", wrong)
    model = transformers.LlamaForCausalLM(make_config()).train()
    with pytest.raises(UserError, match=r"change this model's logits \(relative difference 0.01\)"):
        liger_kernels.apply_kernels(model)
    assert asked == {"cross_entropy": False, "fused_linear_cross_entropy": False} and model.training


@pytest.mark.gpu
def test_the_same_losses_on_a_gpu(world, tmp_path):
    from fastpref.data import Example, collate
    from fastpref.losses import SFT

    found = []
    for use in (False, True):  # in this order: Liger patches the class as well
        policy = load_policy(make(world, tmp_path, use_liger_kernel=use, bf16=False), make_tokenizer())
        batch = collate([Example(0, [1, 20, 21], ([30, 31, 2], [40, 2]))], 0).to(policy.device)
        out = policy.compute_loss(batch, SFT())
        out.loss.backward()
        found.append((out.logps, {name: p.grad for name, p in policy.trainable().items()}))
        assert ("Liger" in policy.trunk.norm._get_name()) == use
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
