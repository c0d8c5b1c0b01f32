"""Liger's names: values and gradients against liger-kernel's own classes, over their options, in fp32 on the CPU.

Where liger-kernel is silent or cannot run on a CPU (its cross-entropy is a Triton kernel), the other side is autograd
over the full logits.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastpref.integrations.liger as ours

peer = pytest.importorskip("liger_kernel.chunked_loss")
peer_cross_entropy = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")

B, T, H, V = 3, 6, 16, 67  # pairs, tokens, hidden, vocab
NAMES = ("DPO", "KTO", "ORPO", "CPO", "SimPO")


def make(bias=True, seed=0):
    """(weight, input, target, bias, reference's input, weight, bias): chosen halves first, prompts not scored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, V, (2 * B, T), generator=g)
    for s in range(2 * B):
        target[s, : 1 + s % 2] = -100
        target[s, T - s % 3 :] = -100
    return (
        (0.5 * torch.randn(V, H, generator=g)).requires_grad_(),
        torch.randn(2 * B, T, H, generator=g).requires_grad_(),
        target,
        torch.randn(V, generator=g).requires_grad_() if bias else None,
        torch.randn(2 * B, T, H, generator=g),
        0.5 * torch.randn(V, H, generator=g),
        torch.randn(V, generator=g) if bias else None,
    )


def run(module, call, leaves):
    for leaf in leaves:
        leaf.grad = None
    loss, beside = call(module)
    (3 * loss).backward()
    return loss.detach(), beside, [leaf.grad.clone() for leaf in leaves]


def compare(own, theirs, call, leaves):
    got, want = run(own, call, leaves), run(theirs, call, leaves)
    torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=2e-6)
    assert len(got[1]) == len(want[1])
    for i, (a, b) in enumerate(zip(got[1], want[1])):
        assert a.shape == b.shape and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=f"returned value {i}: {a} {b}")
    for a, b in zip(got[2], want[2]):  # sums of a few dozen terms, which fp32 rounds relative to the largest
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * max(1.0, float(b.abs().max())))


def both(name, **options):
    own, theirs = (getattr(module, f"LigerFusedLinear{name}Loss") for module in (ours, peer))
    return own(**options), theirs(**options, compiled=False)


def test_signatures_are_ligers():
    pairs = [(f"LigerFusedLinear{name}Loss", peer) for name in NAMES]
    for name, module in [*pairs, ("LigerFusedLinearCrossEntropyLoss", peer_cross_entropy)]:
        own, theirs = getattr(ours, name), getattr(module, name)
        for method in ("__init__", "forward"):
            a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (own, theirs))
            assert [(p.name, p.default) for p in a.values()] == [(p.name, p.default) for p in b.values()]


DPO_TYPES = {
    "sigmoid": {}, "hinge": {}, "exo_pair": {"label_smoothing": 0.1}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {},
    "robust": {"label_smoothing": 0.2}, "apo_zero": {}, "apo_down": {}, "discopop": {"discopop_tau": 0.3},
}


@pytest.mark.parametrize("loss_type", DPO_TYPES)
@pytest.mark.parametrize("average, nll, reference", list(itertools.product((False, True), repeat=3)))
def test_dpo(loss_type, average, nll, reference):
    weight, hidden, target, bias, *ref = make(bias=nll)
    # discopop has exp(-beta D), which grows past fp32's digits on random log-probs
    beta = 0.01 if loss_type == "discopop" and not average else 0.3
    own, theirs = both(
        "DPO", beta=beta, loss_type=loss_type, average_log_prob=average, compute_nll_loss=nll, alpha=0.7,
        use_ref_model=reference, chunk_size=2, **DPO_TYPES[loss_type],
    )
    leaves = [weight, hidden] + ([bias] if nll else [])
    compare(own, theirs, lambda m: m(weight, hidden, target, bias, *(ref if reference else ())), leaves)


def test_smoothed_dpo_is_cdpo_where_liger_ignores_the_argument():
    weight, hidden, target, bias, *ref = make()
    own, theirs = both("DPO", label_smoothing=0.2)
    _, (chosen, rejected, _, _, _, chosen_rewards, rejected_rewards) = own(weight, hidden, target, bias, *ref)
    margins = chosen_rewards - rejected_rewards
    expected = (-0.8 * F.logsigmoid(margins) - 0.2 * F.logsigmoid(-margins)).mean()
    torch.testing.assert_close(own(weight, hidden, target, bias, *ref)[0], expected)
    assert torch.equal(
        theirs(weight, hidden, target, bias, *ref)[0], both("DPO")[1](weight, hidden, target, bias, *ref)[0]
    )


@pytest.mark.parametrize("smoothing, average, nll", list(itertools.product((0.0, 0.2), (False, True), (False, True))))
def test_cpo(smoothing, average, nll):
    weight, hidden, target, bias, *_ = make()
    own, theirs = both(
        "CPO", beta=0.3, alpha=0.6, label_smoothing=smoothing, average_log_prob=average, compute_nll_loss=nll
    )
    compare(own, theirs, lambda m: m(weight, hidden, target, bias), [weight, hidden, bias])


@pytest.mark.parametrize("smoothing, gamma, nll", list(itertools.product((0.0, 0.2), (0.5, 1.3), (False, True))))
def test_simpo(smoothing, gamma, nll):
    weight, hidden, target, *_ = make(bias=False)
    own, theirs = both("SimPO", beta=1.5, alpha=0.6, label_smoothing=smoothing, gamma=gamma, compute_nll_loss=nll)
    compare(own, theirs, lambda m: m(weight, hidden, target), [weight, hidden])


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_orpo(nll, other):
    weight, hidden, target, bias, *_ = make()
    nll_target = make(seed=5)[2] if other else None  # the prompt is scored too, as TRL does
    own, theirs = both("ORPO", beta=0.3, compute_nll_loss=nll)
    compare(own, theirs, lambda m: m(weight, hidden, target, bias, nll_target), [weight, hidden, bias])


@pytest.mark.parametrize(
    "kl, average, reference", list(itertools.product((None, 0.7, -0.4), (False, True), (False, True)))
)
def test_kto(kl, average, reference):
    weight, hidden, target, bias, *ref = make()
    labels = torch.tensor([True, False, True, True, False, True])
    given = dict(zip(("ref_input", "ref_weight", "ref_bias"), ref)) if reference else {}
    given |= {} if kl is None else {"kl": torch.tensor(kl)}
    own, theirs = both("KTO", beta=0.3, average_log_prob=average, use_ref_model=reference)
    compare(own, theirs, lambda m: m(hidden, weight, target, bias, labels, **given), [weight, hidden, bias])


def test_nothing_scored_is_no_nan():
    weight, hidden, target, bias, *ref = make()
    target[0] = -100
    own, theirs = both("DPO", average_log_prob=True)
    assert own(weight, hidden, target, bias, *ref)[0].isfinite()
    assert theirs(weight, hidden, target, bias, *ref)[0].isnan()


def test_options_that_are_refused():
    with pytest.raises(ValueError, match="loss_type is 'ipo'; it takes sigmoid, hinge"):
        ours.LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match="label_smoothing is 0.1 with loss_type 'hinge', which has none"):
        ours.LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="discopop_tau is 0.1 with loss_type 'sigmoid'"):
        ours.LigerFusedLinearDPOLoss(discopop_tau=0.1)
    with pytest.raises(ValueError, match="label_smoothing is 0.0; it takes a number in"):
        ours.LigerFusedLinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ours.LigerFusedLinearORPOLoss(chunk_size=0)
    with pytest.raises(ValueError, match="accum_dtype is torch.bfloat16; it takes None or torch.float32"):
        ours.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="label_smoothing is 0.1 with a softcap"):
        ours.LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1, softcap=30.0)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        ours.LigerFusedLinearCrossEntropyLoss(reduction="avg")
    weight, hidden, target, bias, *_ = make()
    with pytest.raises(ValueError, match="ref_input is None; .*use_ref_model=False"):
        ours.LigerFusedLinearDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match="even number"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden[:5], target[:5])
    with pytest.raises(ValueError, match="preference_labels is None"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target)
    with pytest.raises(ValueError, match=r"kl is of shape \(6,\); it takes one value"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target, None, torch.ones(6, dtype=torch.bool), kl=torch.zeros(6))
    with pytest.raises(ValueError, match=r"nll_target is of shape \(3, 6\)"):
        ours.LigerFusedLinearORPOLoss()(weight, hidden, target, bias, target[:3])
    with pytest.raises(ValueError, match=r"ce_weight is of shape \(5,\); it takes \(67,\)"):
        ours.LigerFusedLinearCrossEntropyLoss(torch.ones(5))(weight, hidden[0], torch.tensor([0, 1, 2, 3, 4, -100]))


def full_cross_entropy(weight, hidden, target, bias, *, ce_weight=None, lse_square_scale=0.0, label_smoothing=0.0,
                       reduction="mean", softcap=None, use_token_scaling=False):
    """(loss, z loss, accuracy, predicted): Liger's definitions over the full logits, in fp64."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    scored = target != -100
    w = torch.ones(V, dtype=z.dtype) if ce_weight is None else ce_weight.double()
    lse, safe = z.logsumexp(-1), torch.where(scored, target, 0)
    z_y = z.gather(-1, safe[:, None])[:, 0]
    smooth = (w * (lse[:, None] - z)).sum(-1) / V
    loss = (1 - label_smoothing) * w[safe] * (lse - z_y) + label_smoothing * smooth
    z_loss = lse_square_scale * lse**2
    if use_token_scaling:
        p = (z_y - lse).exp().detach()
        loss, z_loss = loss * p, z_loss * p
    loss, z_loss = loss * scored, z_loss * scored
    hits = ((z.argmax(-1) == target) & scored).double()
    if reduction == "mean":
        loss, z_loss = loss / (w[safe] * scored).sum(), z_loss / scored.sum()
    total = loss + z_loss
    predicted = z.argmax(-1).masked_fill(~scored, -1)
    if reduction == "none":
        return total, z_loss, hits, predicted
    return total.sum(), z_loss.sum(), hits.sum() / scored.sum(), predicted


CE = [
    {},
    {"softcap": 2.0},
    {"ce_weight": True},
    {"lse_square_scale": 0.1},
    {"lse_square_scale": 0.1, "softcap": 2.0},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "lse_square_scale": 0.1, "ce_weight": True},
    {"use_token_scaling": True, "softcap": 2.0},
    {"use_token_scaling": True, "lse_square_scale": 0.1, "ce_weight": True},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", CE, ids=lambda options: " ".join(options) or "plain")
def test_cross_entropy(options, reduction):
    """Also reduction="none", where Liger before 0.8 summed dW before the upstream gradient (Liger-Kernel#968)."""
    weight, hidden, target, bias, *_ = make()
    hidden, target = hidden.detach().flatten(0, 1).requires_grad_(), target.flatten()
    options = dict(options, reduction=reduction)
    if "ce_weight" in options:
        options["ce_weight"] = 0.5 + torch.rand(V, generator=torch.Generator().manual_seed(2))
    module = ours.LigerFusedLinearCrossEntropyLoss(
        **options, return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True
    )
    out = module(weight, hidden, target, bias)
    exact = [x.detach().double().requires_grad_() for x in (weight, hidden, bias)]
    expected = full_cross_entropy(exact[0], exact[1], target, exact[2], **options)
    upstream = torch.rand(expected[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = torch.autograd.grad(expected[0], exact, upstream)
    found = torch.autograd.grad(out.loss, (weight, hidden, bias), upstream.float())
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-5, atol=2e-6)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-6)
    alone = ours.LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, target, bias)
    torch.testing.assert_close(alone, out.loss)


def test_cross_entropy_without_extras_is_torchs():
    weight, hidden, target, bias, *_ = make()
    hidden, target = hidden.detach().flatten(0, 1), target.flatten()
    loss = ours.LigerFusedLinearCrossEntropyLoss()(weight, hidden, target, bias)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T + bias, target))
    nothing = ours.LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True)
    assert nothing(weight, hidden, torch.full_like(target, -100), bias).loss == 0


def test_repr_and_pickle():
    import pickle

    module = ours.LigerFusedLinearDPOLoss(beta=0.3, loss_type="hinge")
    assert "beta=0.3" in repr(module) and "loss_type='hinge'" in repr(module)
    weight, hidden, target, bias, *ref = make()
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(weight, hidden, target, bias, *ref)[0], module(weight, hidden, target, bias, *ref)[0])
