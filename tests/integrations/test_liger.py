"""Liger's names: values and gradients against liger-kernel's own classes, over their options, in fp32 on the CPU.

Where liger-kernel is silent or cannot run on a CPU (its cross-entropy is a Triton kernel), the other side is autograd
over the full logits.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys

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
    pairs = [(f"LigerFusedLinear{name}Loss", peer) for name in (*NAMES, "GRPO")]
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
    with pytest.raises(ValueError, match="importance_sampling_level is 'sequence'; it takes 'token' with"):
        ours.LigerFusedLinearGRPOLoss(loss_type="sapo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="max_completion_length is None; it takes a number of tokens"):
        ours.LigerFusedLinearGRPOLoss(loss_type="dr_grpo")
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        ours.LigerFusedLinearCrossEntropyLoss(reduction="avg")
    weight, hidden, target, bias, *_ = make()
    with pytest.raises(ValueError, match="ref_input is None; .*use_ref_model=False"):
        ours.LigerFusedLinearDPOLoss()(weight, hidden, target, bias)
    with pytest.raises(ValueError, match="even number"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden[:5], target[:5])
    with pytest.raises(ValueError, match="preference_labels is None"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, target)
    with pytest.raises(ValueError, match=r"kl is of shape \(6,\); .*kl.mean\(\): of \[S\] .*S times"):
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
    {"label_smoothing": 0.2, "softcap": 2.0},
    {"label_smoothing": 0.2, "softcap": 2.0, "ce_weight": True, "lse_square_scale": 0.1},
    {"use_token_scaling": True, "softcap": 2.0},
    {"use_token_scaling": True, "lse_square_scale": 0.1, "ce_weight": True},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", CE, ids=lambda options: " ".join(options) or "plain")
def test_cross_entropy(options, reduction, monkeypatch):
    """Also reduction="none", where Liger before 0.8 summed dW before the upstream gradient (Liger-Kernel#968)."""
    monkeypatch.setattr(ours, "_CAPPED_LOGITS", 7 * V)  # by 7 rows
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
    fields = out.loss, out.z_loss, out.token_accuracy, out.predicted_tokens
    for a, b in zip(fields, expected):
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


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_smoothing_under_autocast_takes_operands_as_the_logits_do(softcap):
    """Hidden states that bf16 rounds give what they give rounded beforehand."""
    weight, hidden, target, *_ = make(bias=False)
    hidden, target = hidden.detach().flatten(0, 1), target.flatten()
    module = ours.LigerFusedLinearCrossEntropyLoss(label_smoothing=0.3, lse_square_scale=0.1, softcap=softcap)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(weight, hidden, target), module(weight.bfloat16().float(), hidden.bfloat16().float(), target)
    assert torch.equal(*found)


def test_cross_entropys_output_is_ligers_where_it_imports(monkeypatch):
    from liger_kernel.transformers.functional import CrossEntropyOutput

    weight, hidden, target, *_ = make(bias=False)
    module = ours.LigerFusedLinearCrossEntropyLoss(return_z_loss=True)
    out = module(weight, hidden.flatten(0, 1), target.flatten())
    assert type(out) is CrossEntropyOutput is ours.CrossEntropyOutput
    ours._cross_entropy_output.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "liger_kernel.transformers.functional", None)
        alone = module(weight, hidden.flatten(0, 1), target.flatten())
    ours._cross_entropy_output.cache_clear()
    assert not isinstance(alone, CrossEntropyOutput) and torch.equal(alone.loss, out.loss) and alone.z_loss == 0


# ---------------------------------------------------------------------------------------------------------------------
# GRPO
# ---------------------------------------------------------------------------------------------------------------------


def make_grpo(seed=0):
    """Arguments of the call by their names: ratios of every size, advantages of both signs, completions that end."""
    weight, hidden, target, bias, ref_input, ref_weight, ref_bias = make(seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    target = torch.randint(0, V, target.shape, generator=g)
    with torch.no_grad():
        logps, ref = (
            (x @ w.T + b).log_softmax(-1).gather(-1, target[..., None])[..., 0]
            for x, w, b in ((hidden, weight, bias), (ref_input, ref_weight, ref_bias))
        )
    return dict(
        _input=hidden, lin_weight=weight, selected_token_ids=target, bias=bias,
        attention_mask=(torch.arange(T) < torch.tensor([T, T - 2, 1, T, 3, 2])[:, None]).long(),
        advantages=torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0, 0.7]),
        old_per_token_logps=logps + 0.4 * torch.randn(2 * B, T, generator=g),
        ref_per_token_logps=ref, vllm_is_ratio=0.5 + torch.rand(2 * B, 1, generator=g),
    ), dict(ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias)


GRPO = [
    {}, {"loss_type": "grpo", "delta": 1.4}, {"loss_type": "bnpo", "use_bias_correction_kl": True},
    {"loss_type": "dr_grpo", "max_completion_length": 9, "beta": 0.0}, {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7}, {"loss_type": "luspo"}, {"loss_type": "vespo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 0.5, "beta": 0.0},
    {"importance_sampling_level": "sequence", "use_bias_correction_kl": True}, {"use_ref_model": False},
    {"temperature": 0.7, "epsilon_low": 0.05, "epsilon_high": 0.3},
]


@pytest.mark.parametrize("options", GRPO, ids=lambda options: " ".join(map(str, options.values())) or "dapo")
def test_grpo(options):
    own, theirs = both("GRPO", **options, chunk_size=2)
    given, reference = make_grpo()
    leaves = [given["lin_weight"], given["_input"], given["bias"]]
    compare(own, theirs, lambda m: m(**given), leaves)
    others = {"old_per_token_logps": None, "vllm_is_ratio": None, "num_items_in_batch": 40}
    compare(own, theirs, lambda m: m(**given | others), leaves)
    by_hidden = reference | {"ref_per_token_logps": None, "vllm_is_ratio": given["vllm_is_ratio"][:, 0]}
    compare(own, theirs, lambda m: m(**given | by_hidden), leaves)


def test_grpos_padding_has_no_part_in_it():
    given, _ = make_grpo()
    out = given["attention_mask"] == 0
    spoilt = given | {name: given[name].masked_fill(out, float("nan")) for name in
                      ("old_per_token_logps", "ref_per_token_logps")}
    module = ours.LigerFusedLinearGRPOLoss()
    assert torch.equal(module(**spoilt)[0], module(**given)[0])
    with pytest.raises(ValueError, match="ref_per_token_logps is None; it takes .*use_ref_model=False"):
        module(**given | {"ref_per_token_logps": None})
    with pytest.raises(ValueError, match=r"vllm_is_ratio is of shape \(6, 2\); it takes \[B\]"):
        module(**given | {"vllm_is_ratio": torch.ones(2 * B, 2)})


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


GRPO_TENSORS = (
    "_input lin_weight selected_token_ids attention_mask advantages bias ref_per_token_logps old_per_token_logps"
).split()


@pytest.mark.parametrize("name", (*NAMES, "GRPO"))
def test_functions_take_what_ligers_take(name):
    function = getattr(ours, f"liger_fused_linear_{name.lower()}")
    module = importlib.import_module(f"liger_kernel.chunked_loss.{name.lower()}_loss")
    theirs = inspect.signature(getattr(module, f"LigerFusedLinear{name}Function").forward).parameters
    wanted = [(p.name.replace("lin_weight", "weight"), p.default) for p in list(theirs.values())[1:]]  # without ctx
    found = inspect.signature(function).parameters.values()
    assert [(p.name.replace("lin_weight", "weight"), p.default) for p in found] == wanted


def test_functions_are_ligers():
    weight, hidden, target, bias, *ref = make()
    labels = torch.tensor([True, False, True, True, False, True])
    given, _ = make_grpo()
    calls = {
        "dpo": (hidden, weight, target, bias, *ref, -100, 0.3, True, False, True, False, 2, "sigmoid", 0.0, 0.05, 0.6),
        "cpo": (hidden, weight, target, bias, -100, 0.3, 0.6, 0.1, True, False),
        "simpo": (hidden, weight, target, bias, -100, 0.3, 0.6, 0.1, False, False, 0.7),
        "orpo": (hidden, weight, target, bias, -100, 0.3, True, None, False),
        "kto": (hidden, weight, target, labels, bias, *ref, torch.tensor(0.2), -100, 0.3, False),
        "grpo": (*(given[name] for name in GRPO_TENSORS), None, None, None, 0.1, 0.1, 0.3, "grpo", None, "token", 1.0,
                 1.05, 0.9, False),
    }
    functional = importlib.import_module("liger_kernel.chunked_loss.functional")
    for name, arguments in calls.items():
        function = f"liger_fused_linear_{name}"
        own, theirs = getattr(ours, function), getattr(functional, function)
        leaves = list(arguments[:2])
        compare(own, theirs, lambda f: f(*arguments), leaves)  # noqa: B023
    rows, flat = hidden.flatten(0, 1), target.flatten()
    loss = ours.liger_fused_linear_cross_entropy(rows, weight, flat, bias, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(
        loss, F.cross_entropy(rows @ weight.T + bias, flat, label_smoothing=0.1, reduction="sum")
    )


def test_distillation_is_refused_by_name():
    for name in ("LigerFusedLinearJSDLoss", "LigerFusedLinearCosineSimilarityLoss", "liger_fused_linear_jsd"):
        with pytest.raises(ImportError, match=f"^{name} is distillation, which fastpref has not: .*chunked_loss$"):
            exec(f"from fastpref.integrations.liger import {name}")
    with pytest.raises(ImportError, match="cannot import name 'LigerNothing'"):
        from fastpref.integrations.liger import LigerNothing  # noqa: F401


def test_repr_and_pickle():
    import pickle

    module = ours.LigerFusedLinearDPOLoss(beta=0.3, loss_type="hinge")
    assert "beta=0.3" in repr(module) and "loss_type='hinge'" in repr(module)
    weight, hidden, target, bias, *ref = make()
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(weight, hidden, target, bias, *ref)[0], module(weight, hidden, target, bias, *ref)[0])
