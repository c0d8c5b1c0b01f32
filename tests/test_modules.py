"""Losses as modules: the same numbers as the function, pickled, printed, one for every registered loss."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields

import pytest
import torch

import fastpref as fp
from fastpref import losses, modules


def batch():
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 8, requires_grad=True)
    targets = torch.randint(0, 31, (4, 6))
    targets[:, :2] = -100
    return hidden, torch.randn(31, 8, requires_grad=True), targets


@pytest.mark.parametrize("name", sorted(losses.CLASSES))
def test_every_loss_has_its_module(name):
    cls = losses.CLASSES[name]
    module = getattr(fp, f"{cls.__name__}Loss")
    assert module is getattr(modules, f"{cls.__name__}Loss") and module.__name__ in modules.__all__
    made = module()
    assert made.loss == cls() and repr(cls()) in repr(made) and module.__name__ in repr(made)
    assert {f.name for f in fields(cls)} < set(inspect.signature(module).parameters)
    assert pickle.loads(pickle.dumps(made)).loss == made.loss
    assert not list(made.parameters()) and not made.state_dict()


def test_a_module_is_the_function_with_its_options():
    hidden, weight, targets = batch()
    inputs = dict(ref_logps=torch.randn(4), bias=torch.randn(31))
    module = fp.RPOLoss(beta=0.3, eta=0.2, sft="tokens", softcap=4.0, logit_scale=0.5, temperature=0.8, ignore_index=-7)
    targets[targets == -100] = -7
    module = pickle.loads(pickle.dumps(module))
    out = module(hidden, weight, targets, **inputs)
    expected = fp.linear_preference_loss(
        hidden, weight, targets, loss=fp.RPO(0.3, 0.2, "tokens"), softcap=4.0, logit_scale=0.5, temperature=0.8,
        ignore_index=-7, **inputs,
    )
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logps, expected.logps)
    for a, b in zip(*(torch.autograd.grad(x.loss, (hidden, weight)) for x in (out, expected))):
        assert torch.equal(a, b)
    assert fp.DPOLoss(0.3).loss == fp.DPO(beta=0.3)


def test_what_it_says_of_itself():
    assert repr(fp.DPOLoss(beta=0.2)) == f"DPOLoss({fp.DPO(beta=0.2)!r})"
    assert repr(fp.PreferenceLoss("sft", softcap=30.0)) == "PreferenceLoss(SFT(), softcap=30.0)"
    assert "arXiv 2305.18290" in fp.DPOLoss.__doc__


def test_bad_options():
    with pytest.raises(TypeError, match="betta"):
        fp.DPOLoss(betta=0.1)
    with pytest.raises(ValueError, match="beta is -1"):
        fp.DPOLoss(beta=-1)
    with pytest.raises(ValueError, match="loss is 'dppo'"):
        fp.PreferenceLoss("dppo")
    with pytest.raises(TypeError):
        fp.DPOLoss()(*batch(), temprature=2.0)
