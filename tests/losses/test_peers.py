"""Values and gradients against TRL's and Liger's own code; where they are wrong or silent, the paper is followed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastpref import losses
from fastpref.losses import SequenceLogps, Totals
from tests.losses import trl_peer

LENGTHS = torch.tensor([9.0, 4, 11, 6, 3, 7], dtype=torch.float64)


def batch(dtype=torch.float64, spread=6.0, seed=0):
    """(logps, seq): pairs whose log-ratios differ by some nats."""
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 6, generator=gen, dtype=torch.float64)
    logps = (-25 + 6 * noise[0]).to(dtype).requires_grad_()
    refs = logps.detach() + (spread * noise[1]).to(dtype)
    lengths = LENGTHS.to(dtype)
    return logps, SequenceLogps(logps, lengths, Totals(6, 40, 24), refs)


def assert_same(ours, theirs, leaf, *, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------- TRL: pairs

# (ours, TRL's loss types, TRL's options)
PAIRS = [
    (losses.DPO(0.2), ["sigmoid"], {}),
    (losses.RobustDPO(0.2, label_smoothing=0.3), ["robust"], dict(label_smoothing=0.3)),
    (losses.Hinge(0.2), ["hinge"], {}),
    (losses.IPO(0.2), ["ipo"], {}),
    (losses.DPONorm(0.2), ["sigmoid_norm"], {}),
    (losses.EXO(0.2), ["exo_pair"], dict(label_smoothing=1e-3)),
    (losses.EXO(0.2, label_smoothing=0.3), ["exo_pair"], dict(label_smoothing=0.3)),
    (losses.NCA(0.2), ["nca_pair"], {}),
    (losses.BCOPair(0.2), ["bco_pair"], {}),
    (losses.SPPO(0.2), ["sppo_hard"], {}),
    (losses.AOT(0.2), ["aot"], {}),
    (losses.AOT(0.2, label_smoothing=0.3), ["aot"], dict(label_smoothing=0.3)),
    (losses.AOTUnpaired(0.2), ["aot_unpaired"], {}),
    (losses.AOTUnpaired(0.2, label_smoothing=0.3), ["aot_unpaired"], dict(label_smoothing=0.3)),
    (losses.APOZero(0.2), ["apo_zero"], {}),
    (losses.APODown(0.2), ["apo_down"], {}),
    (losses.DiscoPOP(0.2), ["discopop"], {}),
    (losses.DiscoPOP(0.2, tau=1.5), ["discopop"], dict(tau=1.5)),
    (losses.ChosenSFT(), ["sft"], {}),
    (losses.RPO(beta=0.2, eta=0.6, sft="tokens"), ["sigmoid", "sft"], dict(weights=[1.0, 0.6 * 0.2])),
    (
        losses.WeightedSum((losses.IPO(0.2), losses.NCA(0.2), losses.ChosenSFT()), (0.5, -0.25, 3.0)),
        ["ipo", "nca_pair", "sft"],
        dict(weights=[0.5, -0.25, 3.0]),
    ),
    (
        losses.WeightedSum((losses.DPO(0.2), losses.BCOPair(0.2), losses.ChosenSFT())),
        ["sigmoid", "bco_pair", "sft"],
        dict(weights=[0.8, 0.2, 1.0]),
    ),
]


def pair_id(value):
    return "+".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize("loss, types, options", PAIRS, ids=pair_id)
def test_pairs_agree_with_trl(loss, types, options):
    logps, seq = batch()
    theirs, charted = trl_peer.dpo(types, *trl_peer.spread(logps, LENGTHS), seq.ref_logps, beta=0.2, **options)
    # TRL takes the logarithms of label_smoothing in fp32
    tolerance = dict(rtol=1e-6, atol=1e-8) if types == ["exo_pair"] else {}
    assert_same(loss(seq), theirs, logps, **tolerance)
    if types != ["sft"]:
        found = losses.metrics(loss, seq)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert found[key].mean().item() == pytest.approx(charted[key], rel=1e-5), key


DIVERGENCES = [("forward_kl", 0.5), ("js_divergence", 0.5)]
DIVERGENCES += [("alpha_divergence", a) for a in (0.5, 0.0, 1.0, 1.7)]
SCORED = {
    "sigmoid": losses.DPO, "hinge": losses.Hinge, "ipo": losses.IPO, "sigmoid_norm": losses.DPONorm,
    "exo_pair": losses.EXO, "robust": losses.RobustDPO, "discopop": losses.DiscoPOP,
}


@pytest.mark.parametrize("divergence, alpha", DIVERGENCES)
@pytest.mark.parametrize("kind", SCORED)
def test_f_divergences_agree_with_trl(kind, divergence, alpha):
    # fp64 is not in TRL's table of where to cut exponents off; a narrow spread keeps 1 / t within fp32
    dtype = torch.float32 if divergence == "alpha_divergence" and alpha != 1 else torch.float64
    logps, seq = batch(dtype, spread=0.7)
    smoothing = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    options = dict(f_divergence=divergence, f_alpha_divergence_coef=alpha)
    loss = SCORED[kind](0.6, **options, **smoothing)
    tokens, mask = trl_peer.spread(logps, LENGTHS)
    theirs, _ = trl_peer.dpo(
        [kind], tokens, mask, seq.ref_logps, beta=0.6, f_divergence=divergence, f_alpha=alpha, **smoothing
    )
    wide = dtype == torch.float64 and kind != "exo_pair"
    assert_same(loss(seq), theirs, logps, **({} if wide else dict(rtol=2e-5, atol=2e-5)))
    assert loss.antisymmetric == (divergence == "alpha_divergence" and alpha == 1)


def test_label_smoothing_of_dpo_which_trl_ignores():
    """TRL's sigmoid has no smoothing (conservative DPO); its robust has both terms: with A = -log s(h) and
    B = -log s(-h) it is ((1-e) A - e B) / (1-2e), and ours, (1-e) A + e B, follows from the two."""
    logps, seq = batch()
    given = (*trl_peer.spread(logps, LENGTHS), seq.ref_logps)
    plain, _ = trl_peer.dpo(["sigmoid"], *given, beta=0.2, label_smoothing=0.2)
    assert torch.equal(plain, trl_peer.dpo(["sigmoid"], *given, beta=0.2)[0])
    robust, _ = trl_peer.dpo(["robust"], *given, beta=0.2, label_smoothing=0.2)
    assert_same(losses.DPO(0.2, label_smoothing=0.2)(seq), 2 * 0.8 * plain - 0.6 * robust, logps)


def test_discopop_far_from_the_reference_where_trl_is_nan():
    logps = torch.tensor([-2500.0, -10.0], requires_grad=True)
    seq = SequenceLogps(logps, torch.tensor([9.0, 4.0]), Totals(2, 13, 9), torch.tensor([-20.0, -20.0]))
    theirs, _ = trl_peer.dpo(["discopop"], *trl_peer.spread(logps, [9, 4]), seq.ref_logps, beta=0.2)
    assert theirs.isnan()
    ours = losses.DiscoPOP(0.2)(seq)
    (gradient,) = torch.autograd.grad(ours, logps)
    assert ours.item() == pytest.approx(0.2 * 2490, rel=1e-6)  # -log s(h), h far below 0
    torch.testing.assert_close(gradient, torch.tensor([-0.2, 0.2]))


def test_rdpo_is_trls_sigmoid_for_a_reference_that_frowns_on_length():
    """beta D + alpha (|y_c| - |y_r|): DPO with ref_logp - (alpha / beta) |y|. A longer response is pushed less."""
    logps, seq = batch()
    refs = seq.ref_logps - 0.3 / 0.2 * LENGTHS
    theirs, _ = trl_peer.dpo(["sigmoid"], *trl_peer.spread(logps, LENGTHS), refs, beta=0.2)
    assert_same(losses.RDPO(0.2, alpha=0.3)(seq), theirs, logps)
    pulls = [losses.loss_and_gradient(losses.RDPO(0.2, alpha=alpha), seq)[1][0].abs() for alpha in (0.0, 0.3)]
    assert LENGTHS[0] > LENGTHS[3] and pulls[1] < pulls[0]


def test_iterative_rpo_is_trls_sum_of_sigmoid_and_sft_pair_by_pair():
    """In a batch of one pair TRL's token mean is a mean over that response's tokens, as the paper has it for each."""
    logps, seq = batch()
    options = dict(beta=0.2, weights=[1.0, 0.7])
    pairs = [seq.select(i, i + 1, pairs=True) for i in range(3)]
    theirs = [
        trl_peer.dpo(["sigmoid", "sft"], *trl_peer.spread(pair.logps, pair.lengths), pair.ref_logps, **options)[0]
        for pair in pairs
    ]
    assert_same(losses.IterativeRPO(0.2, alpha=0.7)(seq), sum(theirs) / 3, logps)
    whole, _ = trl_peer.dpo(["sigmoid", "sft"], *trl_peer.spread(logps, LENGTHS), seq.ref_logps, **options)
    assert abs(whole - sum(theirs) / 3) > 1e-3


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_is_the_mean_over_flipped_pairs(smoothing):
    """(1 - e) l(chosen, rejected) + e l(rejected, chosen), of the comparing term."""
    logps, seq = batch()
    swap = torch.tensor([3, 4, 5, 0, 1, 2])
    flipped = replace(seq, logps=logps[swap], lengths=LENGTHS[swap], ref_logps=seq.ref_logps[swap])
    for cls, options in (
        (losses.DPO, {}), (losses.DPONorm, {}), (losses.RDPO, {}), (losses.RPO, dict(eta=0.0)),
        (losses.IterativeRPO, dict(alpha=0.0)), (losses.CPO, dict(alpha=0.0)), (losses.SimPO, dict(gamma=0.0)),
    ):
        plain = cls(0.2, **options)
        expected = (1 - smoothing) * plain(seq) + smoothing * plain(flipped)
        assert_same(cls(0.2, label_smoothing=smoothing, **options)(seq), expected, logps)


@pytest.mark.parametrize(
    "types, inner",
    [
        (["sigmoid"], losses.DPO(0.2)),
        (["ipo"], losses.IPO(0.2)),
        (["apo_zero"], losses.APOZero(0.2)),
        # not hinge: TRL multiplies in place what relu's backward reads, and fails there
        (["sigmoid", "apo_zero"], losses.WeightedSum((losses.DPO(0.2), losses.APOZero(0.2)), (1.0, 1.0))),
    ],
    ids=pair_id,
)
def test_wpo_agrees_with_trl(types, inner):
    logps, seq = batch()
    tokens, mask = trl_peer.spread(logps, LENGTHS)
    gen = torch.Generator().manual_seed(4)
    log_sum_p2 = -3 * torch.rand(tokens.shape, generator=gen, dtype=torch.float64)
    theirs, _ = trl_peer.dpo(types, tokens, mask, seq.ref_logps, beta=0.2, log_sum_p2=log_sum_p2)
    seq = replace(seq, extras={"log_sum_p2": (log_sum_p2 * mask[:, 1:]).sum(1)})
    assert_same(losses.WPO(inner)(seq), theirs, logps)


def test_wpo_on_sft_follows_the_paper():
    """Pair by pair, where TRL weighs the batch's SFT loss with the mean weight."""
    logps, seq = batch()
    seq = replace(seq, extras={"log_sum_p2": -0.3 * LENGTHS})
    weights = torch.exp(((logps.detach() + 0.3 * LENGTHS) / LENGTHS).view(2, 3).sum(0))
    torch.testing.assert_close(losses.WPO(losses.ChosenSFT())(seq), -(weights * logps[:3]).sum() / 24)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_agrees_with_trl(alpha, packed):
    logps, seq = batch()
    tokens, mask = trl_peer.spread(logps, LENGTHS)
    theirs, _ = trl_peer.dpo(["sigmoid"], tokens, mask, seq.ref_logps, beta=0.2, ld_alpha=alpha)
    scored = mask[:, 1:].bool()
    if packed:  # every other sequence without its padding
        kept = torch.arange(scored.shape[1]) < scored.shape[1] - torch.tensor([0, 7, 0, 5, 8, 0])[:, None]
        cu_seqlens = [0, *kept.sum(1).cumsum(0).tolist()]
        weights = torch.zeros(scored.shape).masked_scatter(
            kept, losses.tail_weights(scored[kept], alpha, cu_seqlens=cu_seqlens)
        )
    else:
        weights = losses.tail_weights(scored, alpha)
    assert weights.dtype == torch.float32
    seq = replace(seq, logps=(tokens * weights).sum(1))
    assert_same(losses.DPO(0.2)(seq), theirs, logps, rtol=1e-6, atol=1e-8)  # alpha in fp32


def test_wpo_with_ld_alpha_agrees_with_trl():
    """The weights of WPO count every token once, whatever the token weights."""
    logps, seq = batch()
    tokens, mask = trl_peer.spread(logps, LENGTHS)
    log_sum_p2 = -torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    options = dict(beta=0.2, log_sum_p2=log_sum_p2, ld_alpha=0.25)
    theirs, _ = trl_peer.dpo(["sigmoid"], tokens, mask, seq.ref_logps, **options)
    weights = losses.tail_weights(mask[:, 1:].bool(), 0.25)
    seq = replace(
        seq, logps=(tokens * weights).sum(1), unweighted=logps.detach(),
        extras={"log_sum_p2": (log_sum_p2 * mask[:, 1:]).sum(1)},
    )
    assert_same(losses.WPO(losses.DPO(0.2))(seq), theirs, logps)


def test_bad_tail_weights():
    mask = torch.ones(4, 3, dtype=torch.bool)
    for given, says in (
        ((mask, 1.5), "alpha is 1.5"), ((mask, -1.0), "alpha is -1.0"), ((mask.long(), 0.5), "mask is torch.int64"),
        ((mask[:3], 0.5), "mask is 'of 3 sequences'"), ((mask[0], 0.5), r"mask is \(3,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            losses.tail_weights(*given)


# ------------------------------------------------------------------------------------------- TRL: flags

FLAGS = torch.tensor([True, False, True, True, False, False])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("kl", [1.7, -3.0])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_flagged_agree_with_trl(kind, kl, weights):
    logps, seq = batch()
    kl_logps = torch.linspace(-30, -12, 6, dtype=torch.float64)
    given = (*trl_peer.spread(logps, LENGTHS), seq.ref_logps, FLAGS, kl_logps, kl_logps - kl)
    theirs = trl_peer.kto(kind, *given, beta=0.3, weights=weights)
    loss = losses.get_loss(kind, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    kl_of = {"kl": torch.tensor(kl, dtype=torch.float64)} if kind == "kto" else {}
    assert_same(loss(replace(seq, desirable=FLAGS, **kl_of)), theirs, logps)


def test_bco_on_pairs_is_half_of_bco_pair():
    """The same terms, over 2 P sequences instead of P pairs; delta moves them as the paper's equation says."""
    logps, seq = batch()
    flags = torch.arange(6) < 3
    theirs, _ = trl_peer.dpo(["bco_pair"], *trl_peer.spread(logps, LENGTHS), seq.ref_logps, beta=0.2)
    flagged = replace(seq, desirable=flags)
    assert_same(losses.BCO(0.2, delta=0.0)(flagged), theirs / 2, logps)
    reward = 0.2 * seq.logratios
    for delta in (0.7, None):
        shift = 0.7 if delta else (reward[:3].mean() + reward[3:].mean()).detach() / 2
        shifted = torch.where(flags, reward - shift, shift - reward)
        assert_same(losses.BCO(0.2, delta=delta)(flagged), -shifted.sigmoid().log().mean(), logps)


def test_the_reward_shift_weighs_both_kinds_alike():
    logps, seq = batch()
    reward = 0.2 * seq.logratios.detach()
    for flags in (torch.arange(6) < 1, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        means = [reward[kind].mean() for kind in (flags, ~flags) if kind.any()]
        shifted = 0.2 * seq.logratios - sum(means) / len(means)
        expected = -F.logsigmoid(torch.where(flags, shifted, -shifted)).mean()
        assert_same(losses.BCO(0.2)(replace(seq, desirable=flags)), expected, logps)


# ------------------------------------------------------------------------------------------- TRL: no reference


@pytest.fixture(scope="module")
def full():
    """Logits [S, T, V] and labels, after a prompt of one token: none of the prompt's tokens is predicted."""
    gen = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 13, 11, generator=gen, dtype=torch.float64).requires_grad_()
    ids = torch.randint(1, 11, (6, 13), generator=gen)
    ids = ids.masked_fill(torch.arange(13) > LENGTHS[:, None], 0)
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, 0] = -100
    return logits, ids, labels


def of_logits(logits, labels):
    targets = labels[:, 1:]
    tokens = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return SequenceLogps((tokens * (targets != -100)).sum(1), LENGTHS, Totals(6, 40, 24))


@pytest.mark.parametrize(
    "loss, options",
    [
        (losses.CPO(0.3, alpha=0.7), dict(loss_type="sigmoid", cpo_alpha=0.7, label_smoothing=0.0)),
        (losses.CPO(0.3, alpha=0.0), dict(loss_type="sigmoid", cpo_alpha=0.0, label_smoothing=0.0)),
        (losses.CPO(0.3, label_smoothing=0.2), dict(loss_type="sigmoid", cpo_alpha=1.0, label_smoothing=0.2)),
        (losses.SimPO(0.3, gamma=0.4), dict(loss_type="simpo", cpo_alpha=0.0, label_smoothing=0.0, simpo_gamma=0.4)),
        (
            losses.SimPO(0.3, gamma=0.4, alpha=0.7, label_smoothing=0.2),
            dict(loss_type="simpo", cpo_alpha=0.7, label_smoothing=0.2, simpo_gamma=0.4),
        ),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_cpo_and_simpo_agree_with_trl(full, loss, options):
    logits, ids, labels = full
    theirs, charted = trl_peer.reference_free("cpo", logits, ids, labels, beta=0.3, **options)
    seq = of_logits(logits, labels)
    assert_same(loss(seq), theirs, logits)
    found = losses.metrics(loss, seq)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found[key].mean().item() == pytest.approx(charted[key], rel=1e-5), key


def test_orpo_agrees_with_trl(full):
    logits, ids, labels = full
    theirs, charted = trl_peer.reference_free("orpo", logits, ids, labels, beta=0.3)
    seq = of_logits(logits, labels)
    assert_same(losses.ORPO(0.3)(seq), theirs, logits, rtol=1e-5, atol=1e-6)  # TRL: odds in fp32
    found = losses.metrics(losses.ORPO(0.3), seq)
    assert found["rewards/margins"].mean().item() == pytest.approx(charted["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize("mean", [-1e-6, -1e-3, -0.5, -40.0])
def test_orpo_odds_in_fp32(mean):
    """log odds = h - log(1 - e^h): near probability 1 (cancellation) and near 0."""
    logps = torch.tensor([9 * mean, 4 * -0.7], requires_grad=True)
    seq = SequenceLogps(logps, torch.tensor([9.0, 4.0]), Totals(2, 13, 9))
    value = losses.ORPO(0.3, alpha=0.0)(seq)
    h, other = mean, -0.7
    exact = (h - math.log(-math.expm1(h))) - (other - math.log(-math.expm1(other)))
    assert value.item() == pytest.approx(0.3 * math.log1p(math.exp(-exact)), rel=1e-4)
    assert torch.autograd.grad(value, logps)[0].isfinite().all()


# ------------------------------------------------------------------------------------------- TRL: tokens, rewards


@pytest.mark.parametrize("old_policy", ["same", "older"])
@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo"),
        dict(loss_type="bnpo", epsilon_low=0.1, epsilon_high=0.3),
        dict(loss_type="dr_grpo", max_completion_length=20),
        dict(loss_type="dapo", epsilon_high=0.28),
        dict(loss_type="dapo", beta=0.3),
        dict(loss_type="grpo", delta=1.5, beta=0.1),
        dict(loss_type="grpo", importance_sampling_level="sequence"),
        dict(loss_type="dapo", importance_sampling_level="sequence", beta=0.2),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_policy_gradient_agrees_with_trl(options, old_policy):
    gen = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 5, 8, generator=gen, dtype=torch.float64)
    logps = (-2 + noise[0]).requires_grad_()
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 1, 6])[:, None]
    old = logps.detach() + 0.4 * noise[1] if old_policy == "older" else None
    ref = logps.detach() + 0.6 * noise[2]
    advantages = torch.tensor([1.3, -0.7, 0.2, -1.1, 0.6], dtype=torch.float64)
    theirs = trl_peer.grpo(logps, mask, advantages, old, ref, tokens=57, **options)
    counts = {"tokens": 57} if options["loss_type"] == "dapo" else {}
    loss = losses.PolicyGradient(**options)
    old_logps = None if old is None else old.masked_fill(~mask, float("nan"))  # what is masked out does not matter
    given = dict(old_logps=old_logps, ref_logps=ref if loss.beta else None)
    assert_same(loss(logps, mask, advantages, **given, **counts), theirs, logps)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_bradley_terry_agrees_with_trl(margin, center):
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    margins = torch.tensor([0.0, 1.0, 0.3, 2.0], dtype=torch.float64) if margin else None
    theirs = trl_peer.reward(rewards, margins, center)
    loss = losses.BradleyTerry(center_coefficient=center or 0.0)
    assert_same(loss(rewards, margin=margins), theirs, rewards)
    cut = [None] * 4 if margins is None else margins.split(1)
    parts = [loss(rewards[[i, 4 + i]], margin=cut[i], pairs=4) for i in range(4)]
    torch.testing.assert_close(sum(parts), theirs)


# ------------------------------------------------------------------------------------------- Liger


NOT_IN_LIGER = ("ipo", "sigmoid_norm", "aot", "aot_unpaired", "sft")
LIGERS = [pair for pair in PAIRS if len(pair[1]) == 1 and pair[1][0] not in NOT_IN_LIGER]


@pytest.mark.parametrize("loss, types, options", LIGERS, ids=pair_id)
def test_pairs_agree_with_liger(loss, types, options):
    dpo_loss = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    logps, seq = batch()
    options = {"discopop_tau" if key == "tau" else key: value for key, value in options.items()}
    theirs, *_ = dpo_loss.LigerFusedLinearDPOFunction.preference_loss_fn(
        *logps.chunk(2), torch.zeros(6, 1), *seq.ref_logps.chunk(2), beta=0.2, loss_type=types[0], **options
    )
    tolerance = dict(rtol=1e-6, atol=1e-8) if types == ["exo_pair"] else {}
    assert_same(loss(seq), theirs, logps, **tolerance)


@pytest.mark.parametrize("kl", [1.7, 0.0])
def test_kto_agrees_with_liger(kl):
    kto_loss = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    logps, seq = batch()
    seq = replace(seq, desirable=FLAGS, kl=torch.tensor(kl, dtype=torch.float64))
    theirs, chosen, rejected = kto_loss.LigerFusedLinearKTOFunction.preference_loss_fn(
        logps, FLAGS, torch.zeros(6, 1), seq.ref_logps, beta=0.3, kl=seq.kl
    )
    assert_same(losses.KTO(beta=0.3)(seq), theirs, logps)
    found = losses.metrics(losses.KTO(beta=0.3), seq)
    assert found["rewards/chosen"].nansum().item() == pytest.approx(chosen.item(), rel=1e-5)
    assert found["rewards/rejected"].nansum().item() == pytest.approx(rejected.item(), rel=1e-5)


KINDS = [(name, smoothing) for name in ("cpo", "cpo_mean", "simpo") for smoothing in (0.0, 0.2)] + [("orpo", 0.0)]


@pytest.mark.parametrize("name, smoothing", KINDS)
def test_reference_free_agree_with_liger(name, smoothing):
    """Liger's function sees log-probs as its caller made them: averages but for CPO. Its NLL is added outside."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    logps, seq = batch()
    means = logps / LENGTHS
    if name == "orpo":
        cls, ours, h, options = "ORPO", losses.ORPO(0.3, alpha=0.0), means, {}
    elif name == "simpo":
        ours = losses.SimPO(0.3, gamma=0.4, label_smoothing=smoothing)
        cls, h, options = "SimPO", means, dict(gamma=0.4, label_smoothing=smoothing)
    else:
        norm = "mean" if name == "cpo_mean" else "sum"
        ours = losses.CPO(0.3, alpha=0.0, label_smoothing=smoothing, length_norm=norm)
        cls, h, options = "CPO", means if name == "cpo_mean" else logps, dict(label_smoothing=smoothing)
    module = __import__(f"{chunked.__name__}.{cls.lower()}_loss", fromlist=["_"])
    function = getattr(module, f"LigerFusedLinear{cls}Function")
    theirs, chosen, _, *_ = function.preference_loss_fn(*h.chunk(2), torch.zeros(6, 1), beta=0.3, **options)
    assert_same(ours(seq), theirs, logps)
    torch.testing.assert_close(losses.metrics(ours, seq)["rewards/chosen"], chosen.detach().float())
