"""What a loss states of itself, which the schedule relies on: proven for every loss, in every setting that matters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fastpref import losses
from tests.losses.zoo import FORWARD, LOSSES, example, loss_id

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=loss_id)


def gradient(loss, seq):
    return losses.loss_and_gradient(loss, seq)[1]


def test_every_loss_is_here():
    assert {loss.name for loss in LOSSES} == set(losses.CLASSES)


@every_loss
def test_gradient_is_the_derivative(loss):
    """fp64, finite differences; WPO's weights have no gradient, so they are held."""
    seq = example(loss)
    step = 1e-5
    for s in range(len(seq.logps)):
        moved = []
        for sign in (1, -1):
            logps = seq.logps.detach().clone()
            logps[s] += sign * step
            held = {"unweighted": seq.logps.detach()} if loss.needs_extras else {}
            moved.append(frozen_shift(loss, seq)(replace(seq, logps=logps, **held)))
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert gradient(loss, seq)[s].item() == pytest.approx(numeric.item(), rel=1e-5, abs=1e-8)


def frozen_shift(loss, seq):
    """BCO's shift, which has no gradient, at its value in `seq`."""
    if isinstance(loss, losses.BCO) and loss.delta is None:
        rewards = loss.beta * seq.logratios.detach()
        shift = (rewards[seq.desirable].mean() + rewards[~seq.desirable].mean()) / 2
        return replace(loss, delta=shift.item())
    return loss


@every_loss
def test_coupling(loss):
    """A gradient scalar stays as it is, bit by bit, when what it is said not to depend on changes. AOT's does not."""
    pairs = loss.coupling == "pair" or (loss.coupling == "batch" and loss.pairwise)
    group = [0, 3] if pairs else [0]
    same = []
    for seed in range(6):
        seq = example(loss, seed=seed)
        change = 20 * torch.randn(6, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        change[group] = 0
        other = replace(seq, logps=(seq.logps + change).detach())
        same.append(torch.equal(gradient(loss, seq)[group], gradient(loss, other)[group]))
    assert not all(same) if loss.coupling == "batch" else all(same)


@every_loss
def test_groups_add_up_to_the_batch(loss):
    pairs = loss.coupling == "pair" or (loss.coupling == "batch" and loss.pairwise)
    apart = []
    for seed in range(6):
        seq = example(loss, seed=seed)
        parts = [seq.select(i, i + 1, pairs=pairs) for i in range(3 if pairs else 6)]
        values, gradients = zip(*(losses.loss_and_gradient(loss, part) for part in parts))
        value, whole = losses.loss_and_gradient(loss, seq)
        if loss.coupling == "batch":
            apart.append(abs(sum(values) - value).item())
            continue
        torch.testing.assert_close(sum(values), value, rtol=1e-12, atol=1e-13)
        if pairs:
            gradients = [g[:1] for g in gradients] + [g[1:] for g in gradients]
        torch.testing.assert_close(torch.cat(gradients), whole, rtol=1e-12, atol=1e-14)
    assert loss.coupling != "batch" or max(apart) > 1e-3  # as its docstring says


@every_loss
def test_coefficients_of_a_pair_longer_than_the_budget(loss):
    """With one scratch, g / c is one scalar for both responses; a loss said to need two does need them."""
    equal = []
    for seed in range(3):
        seq = example(loss, seed=seed)
        known = loss.coefficients(seq)
        assert known.shape == seq.logps.shape and (known != 0).all()
        chosen, rejected = (gradient(loss, seq) / known).chunk(2)
        equal.append(torch.allclose(chosen, rejected, rtol=1e-10, atol=1e-14))
    if not loss.pairwise:
        assert loss.scratches == 1
    elif loss.antisymmetric:
        assert loss.scratches == 1 and all(equal)
    else:
        # AOT's would do, but is never asked
        assert loss.scratches == 2 and (not all(equal) or loss.coupling == "batch")


@every_loss
def test_spec_carries_a_loss(loss):
    assert losses.from_spec(loss.spec) == loss
    assert hash(loss) == hash(losses.from_spec(loss.spec))


def test_parts_with_coefficients_of_their_own_are_not_taken_for_equal():
    @dataclass(frozen=True)
    class Tilted(losses.DPO):
        def coefficients(self, seq):
            return torch.cat((torch.ones(3), -2 * torch.ones(3)))

    assert losses.DPO().antisymmetric and losses.WPO(losses.DPO()).antisymmetric
    assert not losses.WPO(Tilted()).antisymmetric
    assert not losses.WeightedSum((losses.DPO(), Tilted()), (1.0, 1.0)).antisymmetric


def test_another_formula_drops_what_its_parent_states():
    class Mine(losses.DPO):
        def per_pair(self, seq):
            return super().per_pair(seq) - 0.1 * seq.chosen

    assert not Mine().antisymmetric and Mine().scratches == 2 and Mine().coupling == "pair"


def test_spec_is_for_losses_of_this_package():
    @dataclass(frozen=True)
    class Mine(losses.DPO):
        pass

    assert Mine().spec is None and losses.WPO(Mine()).spec is None
    assert losses.WeightedSum((Mine(), losses.DPO()), (1.0, 1.0)).spec is None
    with pytest.raises((ValueError, SyntaxError)):
        losses.from_spec("dpo {'beta': __import__('os').getpid()}")


@every_loss
def test_zero_lengths_and_margins_of_thousands_of_nats_are_finite_in_fp32(loss):
    empty = example(loss, (0, 0, 0, 0, 0, 0), torch.float32)
    zero = torch.zeros(6)
    seqs = [replace(empty, logps=zero, ref_logps=None if empty.ref_logps is None else zero)]
    seqs[0] = replace(seqs[0], totals=losses.Totals(6, 0, 0))
    seq = example(loss, dtype=torch.float32)
    for far in (3000.0, -3000.0):
        logps = seq.logps.detach() - torch.tensor([max(far, 0)] * 3 + [max(-far, 0)] * 3)
        # a forward KL score ends at e^80, whose square is more than fp32 holds
        if loss != losses.IPO(0.2, **FORWARD):
            seqs.append(replace(seq, logps=logps))
    for case in seqs:
        value, grad = losses.loss_and_gradient(loss, case)
        assert value.isfinite() and grad.isfinite().all()


@every_loss
def test_missing_input_is_named(loss):
    seq = example(loss)
    for trait, field in (
        ("needs_reference", "ref_logps"), ("needs_desirable", "desirable"), ("needs_kl", "kl"),
        ("needs_extras", "extras"),
    ):
        if getattr(loss, trait):
            with pytest.raises(ValueError, match=f"^{field}"):
                loss(replace(seq, **{field: None}))


@every_loss
def test_the_docstring_says_what_is_summed_and_what_adds_up(loss):
    text = " ".join(type(loss).__doc__.split())
    assert any(word in text.lower() for word in ("mean over", "averag", "divided", "one mean", "sum over"))
    assert loss.formula and (loss.paper in text)
    if loss.name != "sft":
        assert "dds up over" in text or "NOT add up over" in text
        assert ("NOT add up" in text) == (type(loss)().coupling == "batch")


@every_loss
def test_metrics(loss):
    seq = example(loss)
    found = losses.metrics(loss, seq)
    if loss.pairwise and not loss.needs_desirable:
        rewarding = loss.needs_reference or hasattr(loss, "beta")
        assert ("rewards/margins" in found) == rewarding and "logps/chosen" in found
    for value in found.values():
        assert value.dtype == torch.float32 and not value.requires_grad


def test_the_reward_of_a_sum_is_that_of_its_first_loss_with_a_beta():
    loss = losses.WeightedSum((losses.ChosenSFT(), losses.DPO(0.37), losses.IPO(0.1)), (1.0, 1.0, 1.0))
    seq = example(loss)
    assert loss.reward_scale == 0.37
    torch.testing.assert_close(loss.rewards(seq), 0.37 * seq.logratios)
    wpo = losses.WPO(losses.SimPO(beta=2.0))
    torch.testing.assert_close(wpo.rewards(seq), 2 * seq.logps / seq.lengths)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: losses.WPO(losses.AOT()), "loss is AOT.*mean over pairs"),
        (lambda: losses.WPO(losses.KTO()), "loss is KTO"),
        (lambda: losses.WPO(losses.WeightedSum((losses.DPO(), losses.SFT()), (1.0, 1.0))), "loss is WeightedSum"),
        (lambda: losses.WPO("dpo"), "loss is 'dpo'; it takes an object"),
        (lambda: losses.WPO(losses.DPO), "loss is <class"),
        (lambda: losses.WeightedSum((), ()), r"losses is \(\)"),
        (lambda: losses.WeightedSum("dpo", (1.0,)), "losses is 'dpo'"),
        (lambda: losses.WeightedSum((losses.DPO(), "ipo"), (1.0, 1.0)), r"losses\[1\] is 'ipo'"),
        (lambda: losses.WeightedSum((losses.DPO(),), (1.0, 2.0)), "weights is .*each of the 1 losses"),
        (lambda: losses.WeightedSum((losses.DPO(),), ("1",)), r"weights\[0\] is '1'"),
        (lambda: losses.WeightedSum((losses.DPO(),), (float("nan"),)), r"weights\[0\] is nan"),
        (lambda: losses.DPO(f_divergence="kl"), "f_divergence is 'kl'; it takes 'reverse_kl'"),
        (lambda: losses.DPO(f_alpha_divergence_coef="1"), "f_alpha_divergence_coef is '1'"),
        (lambda: losses.EXO(label_smoothing=0.0), "label_smoothing is 0.0"),
        (lambda: losses.DiscoPOP(tau=0.0), "tau is 0.0"),
        (lambda: losses.BCO(delta=float("inf")), "delta is inf"),
        (lambda: losses.CPO(length_norm="tokens"), "length_norm is 'tokens'"),
        (lambda: losses.SimPO(gamma=-1.0), "gamma is -1.0"),
        (lambda: losses.ORPO(alpha=-1.0), "alpha is -1.0"),
        (lambda: losses.RDPO(alpha=-1.0), "alpha is -1.0"),
        (lambda: losses.BradleyTerry(-1.0), "center_coefficient is -1.0"),
        (lambda: losses.PolicyGradient("ppo"), "loss_type is 'ppo'"),
        (lambda: losses.PolicyGradient("dr_grpo"), "max_completion_length is None"),
        (lambda: losses.PolicyGradient("grpo", max_completion_length=3), "max_completion_length is 3"),
        (lambda: losses.PolicyGradient(delta=1.1), "delta is 1.1"),
        (lambda: losses.PolicyGradient(importance_sampling_level="word"), "importance_sampling_level is 'word'"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_token_and_reward_losses():
    logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    loss = losses.PolicyGradient()
    advantages = torch.ones(2)
    for given, options, says in (
        ((logps, mask.long(), advantages), {}, "mask is torch.int64"),
        ((logps, mask[:1], advantages), {}, "mask is"),
        ((logps, mask, torch.ones(3)), {}, "advantages is"),
        ((logps, mask, advantages), dict(ref_logps=logps), "ref_logps is 'given'; it takes None"),
        ((logps, mask, advantages), dict(sequences=2), "sequences is 2; it takes None"),
    ):
        with pytest.raises(ValueError, match=says):
            loss(*given, **options)
    with pytest.raises(ValueError, match="ref_logps is None; it takes"):
        losses.PolicyGradient(beta=0.1)(logps, mask, advantages)
    with pytest.raises(ValueError, match="rewards is"):
        losses.BradleyTerry()(torch.zeros(3))
    with pytest.raises(ValueError, match="margin is"):
        losses.BradleyTerry()(torch.zeros(4), margin=torch.zeros(4))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_parts_of_a_policy_gradient_add_up(loss_type):
    gen = torch.Generator().manual_seed(1)
    logps, old = -2 + torch.randn(2, 4, 6, generator=gen, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 0, 4])[:, None]
    advantages = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    loss = losses.PolicyGradient(loss_type, max_completion_length=9 if loss_type == "dr_grpo" else None)
    totals = {"tokens": 11} if loss_type == "dapo" else {"sequences": 4}
    whole = loss(logps, mask, advantages, old_logps=old)
    parts = [loss(logps[i], mask[i], advantages[i], old_logps=old[i], **totals) for i in ([0, 1], [2], [3])]
    torch.testing.assert_close(sum(parts), whole)
    by_token = loss(logps, mask, advantages[:, None].expand(4, 6).contiguous(), old_logps=old)
    torch.testing.assert_close(by_token, whole)


def test_trl_names_are_aliases():
    assert losses.get_loss("sigmoid", beta=0.3) == losses.DPO(0.3)
    assert losses.get_loss("sigmoid_norm") == losses.DPONorm()
    with pytest.raises(ValueError, match="apo_zeros.*did you mean 'apo_zero'"):
        losses.get_loss("apo_zeros")
