"""Losses on a handful of log-probs: values and dL/dlogp_s against fp64 formulas and closed forms; names and options.

Against TRL and Liger: test_peers.py. What the schedule relies on: test_traits.py.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from fastpref import losses
from tests import oracle
from tests.oracle import LOSSES, VARIANTS, variant_id

LENGTHS = torch.tensor([9.0, 4, 11, 6, 3, 7], dtype=torch.float64)
KL = torch.tensor(1.7, dtype=torch.float64)


def sequence_logps(name, logps, **changes):
    """The package's view of a batch and the oracle's, made from the same numbers."""
    gen = torch.Generator().manual_seed(3)
    refs = logps.detach() + 4 * torch.randn(len(logps), generator=gen, dtype=torch.float64)
    lengths = LENGTHS[: len(logps)]
    seq = losses.SequenceLogps(
        logps=logps,
        lengths=lengths,
        totals=losses.Totals(len(logps), float(lengths.sum()), float(lengths[: len(logps) // 2].sum())),
    )
    truth = {}
    if name in oracle.NEEDS_REFERENCE:
        seq, truth = replace(seq, ref_logps=refs), {"refs": refs}
    if name == "kto":
        desirable = torch.tensor([True, False, True, True, False, False])[: len(logps)]
        seq = replace(seq, desirable=desirable, kl=KL)
        truth |= {"desirable": desirable, "kl_logps": KL[None] - 20, "ref_kl_logps": torch.full((1,), -20.0).double()}
    return replace(seq, **changes), truth


def some_logps(sequences=6, seed=0, spread=6.0):
    gen = torch.Generator().manual_seed(seed)
    return (-25 + spread * torch.randn(sequences, generator=gen, dtype=torch.float64)).requires_grad_()


def gradient(loss, logps):
    (grad,) = torch.autograd.grad(loss, logps)
    return grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_value_and_gradient(variant, seed):
    name, options = variant
    logps = some_logps(seed=seed)
    seq, truth = sequence_logps(name, logps)
    value = losses.get_loss(name, **options)(seq)
    expected = LOSSES[name].loss(logps, LENGTHS, **truth, **options)
    closed = LOSSES[name].derivative(logps.detach(), LENGTHS, **truth, **options)
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(value, logps), closed, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient(expected, logps), closed, rtol=1e-10, atol=1e-13)  # the oracle with itself


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_loss_and_gradient_agrees_with_autograd_and_works_without_it(variant):
    name, options = variant
    logps = some_logps()
    seq, truth = sequence_logps(name, logps)
    loss = losses.get_loss(name, **options)
    with torch.no_grad():
        value, grad = losses.loss_and_gradient(loss, replace(seq, logps=logps.detach()))
    torch.testing.assert_close(value, LOSSES[name].loss(logps, LENGTHS, **truth, **options).detach())
    torch.testing.assert_close(grad, LOSSES[name].derivative(logps.detach(), LENGTHS, **truth, **options))
    assert not value.requires_grad and not grad.requires_grad


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_groups_add_up_to_the_batch(variant):
    name, options = variant
    loss = losses.get_loss(name, **options)
    seq, _ = sequence_logps(name, some_logps())
    items = 3 if loss.pairwise else 6
    parts = [seq.select(start, start + 1, pairs=loss.pairwise) for start in range(items)]
    torch.testing.assert_close(sum(loss(part) for part in parts), loss(seq), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("far", [-3000.0, 3000.0])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_margins_of_thousands_of_nats_in_fp32(variant, far):
    """Sequence log-probs of long responses differ by thousands: no overflow, no NaN, and the limiting gradient."""
    name, options = variant
    logps = torch.tensor([-20.0 + min(far, 0), -20.0 - max(far, 0)], requires_grad=True)
    seq, truth = sequence_logps(name, logps, lengths=torch.tensor([9.0, 4.0]))
    if name in oracle.NEEDS_REFERENCE:
        refs = torch.tensor([-21.0, -19.0])
        seq, truth["refs"] = replace(seq, ref_logps=refs), refs.double()
    if name == "kto":
        seq = replace(seq, kl=KL.float())
    value = losses.get_loss(name, **options)(seq)
    exact = logps.detach().double()
    expected = LOSSES[name].loss(exact, LENGTHS[:2], **truth, **options)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    closed = LOSSES[name].derivative(exact, LENGTHS[:2], **truth, **options)
    torch.testing.assert_close(gradient(value, logps).double(), closed, rtol=1e-5, atol=1e-7)


def test_policy_equal_to_reference():
    logps = some_logps()
    seq, _ = sequence_logps("dpo", logps, ref_logps=logps.detach().clone())
    assert losses.DPO(beta=0.3)(seq).item() == pytest.approx(math.log(2), rel=1e-15)
    found = losses.metrics(losses.DPO(beta=0.3), seq)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert torch.equal(found[key], torch.zeros(3)), key


def test_rpo_is_equation_4_8():
    """L_DPO + eta beta E[-log pi(y_chosen | x)], the log-prob summed over tokens ("sum") or averaged (appendix F)."""
    logps = some_logps()
    seq, _ = sequence_logps("rpo", logps)
    dpo = losses.DPO(beta=0.5)(seq)
    added = losses.RPO(beta=0.5, eta=0.2, sft="sum")(seq) - dpo
    assert added.item() == pytest.approx(0.5 * 0.2 * -logps[:3].mean().item(), rel=1e-10)
    added = losses.RPO(beta=0.5, eta=0.2, sft="tokens")(seq) - dpo
    assert added.item() == pytest.approx(0.5 * 0.2 * -logps[:3].sum().item() / 24, rel=1e-10)
    torch.testing.assert_close(losses.RPO(beta=0.5, eta=0.0)(seq), dpo)


@pytest.mark.parametrize("kl, baseline", [(2.5, 2.5), (0.0, 0.0), (-4.0, 0.0)])
def test_kto_baseline_is_clamped_and_has_no_gradient(kl, baseline):
    logps = some_logps()
    kl = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    seq, truth = sequence_logps("kto", logps, kl=kl)
    value = losses.KTO(beta=0.3)(seq)
    r = logps - truth["refs"]
    good = 1 - torch.sigmoid(0.3 * (r - baseline))
    bad = 1 - torch.sigmoid(0.3 * (baseline - r))
    torch.testing.assert_close(value, torch.where(truth["desirable"], good, bad).mean())
    assert torch.autograd.grad(value, kl, allow_unused=True)[0] in (None, 0)


def test_zero_length_sequences_are_finite():
    for name, options in VARIANTS:
        logps = torch.zeros(4, requires_grad=True)
        seq, _ = sequence_logps(name, logps, lengths=torch.zeros(4), totals=losses.Totals(4, 0, 0))
        if seq.ref_logps is not None:
            seq = replace(seq, ref_logps=torch.zeros(4))
        value = losses.get_loss(name, **options)(seq)
        assert torch.isfinite(value) and torch.isfinite(gradient(value, logps)).all(), name


def test_metrics_of_pairs():
    logps = some_logps()
    seq, truth = sequence_logps("dpo", logps)
    found = losses.metrics(losses.DPO(beta=0.3), seq)
    logps, rewards = logps.detach(), 0.3 * (logps.detach() - truth["refs"])
    expected = {
        "logps/chosen": logps[:3],
        "logps/rejected": logps[3:],
        "rewards/chosen": rewards[:3],
        "rewards/rejected": rewards[3:],
        "rewards/margins": rewards[:3] - rewards[3:],
        "rewards/accuracies": (rewards[:3] > rewards[3:]).double(),
    }
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32 and not found[key].requires_grad
        torch.testing.assert_close(found[key].double(), value, rtol=1e-6, atol=1e-5, msg=key)


def test_metrics_of_kto_reduce_with_nanmean():
    logps = some_logps()
    seq, truth = sequence_logps("kto", logps)
    found = losses.metrics(losses.KTO(beta=0.3), seq)
    rewards = 0.3 * (logps.detach() - truth["refs"])
    good = truth["desirable"]
    assert found["rewards/chosen"].nanmean().item() == pytest.approx(rewards[good].mean().item(), rel=1e-5)
    assert found["rewards/rejected"].nanmean().item() == pytest.approx(rewards[~good].mean().item(), rel=1e-5)
    assert found["logps/chosen"].nanmean().item() == pytest.approx(logps[good].mean().item(), rel=1e-5)


# name: pairwise, coupling, needs_reference, needs_kl, has a reward
TRAITS = {
    "sft": (False, "sequence", False, False),
    "dpo": (True, "pair", True, False),
    "rpo": (True, "pair", True, False),
    "ipo": (True, "pair", True, False),
    "kto": (False, "sequence", True, True),
    "slic": (True, "pair", False, False),
    "hinge": (True, "pair", True, False),
}


@pytest.mark.parametrize("name", TRAITS)
def test_traits(name):
    loss = losses.get_loss(name)
    pairwise, coupling, needs_reference, needs_kl = TRAITS[name]
    assert loss.name == name
    assert (loss.pairwise, loss.coupling) == (pairwise, coupling)
    assert (loss.needs_reference, loss.needs_kl) == (needs_reference, needs_kl)
    assert type(loss) is getattr(losses, {"slic": "SLiC", "hinge": "Hinge"}.get(name, name.upper()))
    with pytest.raises(FrozenInstanceError):
        loss.anything = 1
    assert loss == losses.get_loss(name) and hash(loss) == hash(losses.get_loss(name))


@pytest.mark.parametrize("name", ["dpo", "rpo", "ipo", "kto", "hinge"])
def test_reward_scale_is_beta(name):
    assert losses.get_loss(name, beta=0.37).reward_scale == 0.37


@pytest.mark.parametrize("name", ["sft", "slic"])
def test_without_beta_the_reward_is_the_log_ratio(name):
    assert losses.get_loss(name).reward_scale == 1.0


@pytest.mark.parametrize("name", TRAITS)
def test_docstring_states_formula_and_paper(name):
    text = type(losses.get_loss(name)).__doc__
    assert "(" in text and any(word in text.lower() for word in ("mean over", "average", "divided"))
    assert name == "sft" or "arXiv" in text


BAD = [
    ("dpoo", {}, "dpoo.*dpo"),
    ("dpo", dict(betta=0.1), "betta.*beta"),
    ("dpo", dict(beta=0), "beta.*0"),
    ("dpo", dict(beta=-1.0), "beta.*-1"),
    ("dpo", dict(beta=float("nan")), "beta.*nan"),
    ("dpo", dict(label_smoothing=-0.1), "label_smoothing.*-0.1"),
    ("dpo", dict(label_smoothing=1.5), "label_smoothing.*1.5"),
    ("rpo", dict(sft="mean"), "sft.*mean.*sum.*tokens"),
    ("rpo", dict(eta=-1.0), "eta.*-1"),
    ("rpo", dict(beta=0.0), "beta.*0"),
    ("ipo", dict(length_norm="tokens"), "length_norm.*tokens.*mean.*sum"),
    ("ipo", dict(beta=0.0), "beta.*0"),
    ("kto", dict(beta=0.0), "beta.*0"),
    ("kto", dict(desirable_weight=-1.0), "desirable_weight.*-1"),
    ("kto", dict(undesirable_weight=-1.0), "undesirable_weight.*-1"),
    ("slic", dict(eta=-0.1), "eta.*-0.1"),
    ("hinge", dict(beta=-2.0), "beta.*-2"),
    ("sft", dict(beta=0.1), "beta"),
]


@pytest.mark.parametrize("name, options, says", BAD)
def test_bad_options_name_argument_and_value(name, options, says):
    with pytest.raises((ValueError, TypeError), match=f"(?s){says}") as caught:
        losses.get_loss(name, **options)
    assert "\n" not in str(caught.value)


def test_wrong_type_of_option_is_named():
    with pytest.raises((ValueError, TypeError), match="beta"):
        losses.DPO(beta="0.1")


def test_missing_reference_is_named():
    seq, _ = sequence_logps("dpo", some_logps(), ref_logps=None)
    with pytest.raises(ValueError, match="ref_logps"):
        losses.DPO()(seq)
