"""Entropy, top-1, mean logit and log sum p^2 of the fused head: values, the gradient of the entropy, their sums beside
a preference loss; against fp64 full logits."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import fastpref as fp
from fastpref import rows
from fastpref.rows import EXTRAS
from tests import oracle
from tests.oracle import IGNORE, make_batch, relative

BACKENDS = ["reference"] + (["native"] if rows.availability("native").available else [])
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TRANSFORMS = [{}, dict(softcap=2.5, logit_scale=1.6, temperature=0.7)]
LONG = [170, 60, 150, 190, 40, 160]  # at a share of 0.4 the first and the last pair do not fit the stash


def leaves(batch, needs=(True, True, True)):
    parts = (batch.hidden, batch.weight, batch.bias)
    return [t.detach().clone().requires_grad_(need) for t, need in zip(parts, needs, strict=True)]


def budget_of(share, batch, call):
    """Bytes for `share` of what all residuals take; "least": the smallest that is accepted."""
    if share is None:
        return None
    with pytest.raises(ValueError, match="memory_budget") as refusal:
        call(1)
    least = int(re.search(r"(\d+)\D*$", str(refusal.value)).group(1))
    if share == "least":
        return least
    scored = int((batch.targets != IGNORE).sum())
    return max(least, int(share * scored * batch.weight.shape[0] * batch.weight.element_size()))


def upstreams(batch, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch.targets.shape, generator=generator) for _ in range(2)]


def exact(batch, gl, gh, **transform):
    """(values, gradients of hidden, weight and bias) by fp64 autograd."""
    x, w, b = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias))
    found = oracle.token_stats(x, w, batch.targets, b, **transform)
    value = (found["logps"] * gl).sum() + (found["entropy"] * gh).sum()
    return found, torch.autograd.grad(value, (x, w, b))


def backward(found, gl, gh, inputs, **options):
    value = (found.logps * gl).sum() + (found.entropy * gh).sum()
    return torch.autograd.grad(value, [t for t in inputs if t.requires_grad], **options)


# ------------------------------------------------------------------------- values and gradients


@every_backend
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("share", [None, 1.5, 0.5, "least"], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["policy", "frozen"])
def test_values_and_gradients(needs, share, transform, backend):
    batch = make_batch(LONG[:4], seed=4)
    inputs = leaves(batch, needs)
    gl, gh = upstreams(batch)

    def call(budget):
        hidden, weight, bias = inputs
        return fp.linear_token_stats(
            hidden, weight, batch.targets, bias=bias, memory_budget=budget, backend=backend, **transform
        )

    found = call(budget_of(share, batch, call))
    want, grads = exact(batch, gl, gh, **transform)
    for name, value in found._asdict().items():
        assert value.dtype == torch.float32 and value.shape == batch.targets.shape
        assert value.requires_grad == (name in ("logps", "entropy"))
        torch.testing.assert_close(value.double(), want[name], rtol=3e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not value[batch.targets == IGNORE].any()
    for got, e in zip(backward(found, gl, gh, inputs), grads, strict=False):
        assert relative(got, e) <= 3e-6


@every_backend
@pytest.mark.parametrize("kind", ["plain", "peaked", "near_uniform", "confidently_wrong"])
@pytest.mark.parametrize("share", [None, 0.5], ids=str)
def test_bf16_error_at_most_half_more_than_unfused(share, kind, backend):
    """As test_head.py measures it: the same GEMMs and fp32 softmax in plain torch, autograd over all logits."""
    ratios = []
    for seed in range(3):
        batch = make_batch([60, 40], kind=kind, dtype=torch.bfloat16, vocab=300, seed=seed)
        gl, gh = upstreams(batch)
        _, grads = exact(batch, gl, gh)
        inputs = leaves(batch)

        def call(budget, inputs=inputs, batch=batch):
            hidden, weight, bias = inputs
            return fp.linear_token_stats(
                hidden, weight, batch.targets, outputs=("entropy",), bias=bias, memory_budget=budget, backend=backend
            )

        got = backward(call(budget_of(share, batch, call)), gl, gh, inputs)
        hidden, weight, bias = plain = leaves(batch)
        scored = batch.targets != IGNORE
        log_p = torch.log_softmax((hidden[scored] @ weight.T).float() + bias.float(), -1)
        logps = log_p[torch.arange(len(log_p)), batch.targets[scored]]
        value = (logps * gl[scored]).sum() - ((log_p.exp() * log_p).sum(-1) * gh[scored]).sum()
        unfused = torch.autograd.grad(value, plain)
        ratios.append([relative(g, e) / relative(u, e) for g, u, e in zip(got, unfused, grads, strict=True)])
    dx, dw, db = torch.tensor(ratios).median(0).values.tolist()
    assert max(dx, dw) <= 1.5 and db <= 2.0, ratios  # unfused the bias gradient is a sum of unrounded fp32 numbers


def test_fp64_passes_gradcheck():
    batch = make_batch([3, 2], vocab=29, hidden_size=5, dtype=torch.float64)
    for budget in (None, 30_000):
        for needs in ((True, True, True), (True, False, False)):
            inputs = leaves(batch, needs)

            def call(x, w, b, budget=budget):
                found = fp.linear_token_stats(
                    x, w, batch.targets, outputs=("entropy",), bias=b, softcap=3.0, temperature=0.8,
                    memory_budget=budget,
                )
                return found.logps, found.entropy

            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("names", [(), ("entropy",), ("top1", "mean_logit"), EXTRAS], ids=str)
def test_only_what_is_asked_for(names):
    batch = make_batch()
    found = fp.linear_token_stats(*batch[:3], outputs=names)
    assert torch.equal(found.logps, fp.linear_logps(*batch[:3]))
    assert {name for name in EXTRAS if getattr(found, name) is not None} == set(names)
    everything = fp.linear_token_stats(*batch[:3])
    for name in names:
        assert torch.equal(getattr(found, name), getattr(everything, name))


def test_top1_of_bf16_logits_that_tie():
    """Rows with several largest logits, of which argmax takes the first."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (64, 8), generator=generator).bfloat16()
    weight = torch.randint(-1, 2, (400, 8), generator=generator).bfloat16()
    z = hidden @ weight.T
    first = z.argmax(-1)
    last = z.shape[1] - 1 - z.flip(1).argmax(-1)
    assert (first != last).sum() > 16
    for targets in (first, last):
        for backend in BACKENDS:
            found = fp.linear_token_stats(hidden, weight, targets, outputs=("top1",), backend=backend)
            assert torch.equal(found.top1, (first == targets).float())


def test_any_leading_shape_and_nothing_scored():
    batch = make_batch()
    flat = fp.linear_token_stats(batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten())
    for a, b in zip(flat, fp.linear_token_stats(*batch[:3]), strict=True):
        assert torch.equal(a.view(batch.targets.shape), b)
    inputs = leaves(batch)
    found = fp.linear_token_stats(*inputs[:2], torch.full_like(batch.targets, IGNORE), bias=inputs[2])
    assert not any(value.any() for value in found)
    assert not any(grad.any() for grad in backward(found, 1.0, 1.0, inputs))


# --------------------------------------------------------------------------------- what it costs


@pytest.fixture
def counted(monkeypatch):
    """Multiply-adds of the GEMMs since the last call of the function it gives."""
    done = [0]

    def counting(function, first):
        def run(*args, **kwargs):
            a, b = args[first : first + 2]
            done[0] += a.shape[0] * a.shape[1] * b.shape[1]
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "mm", counting(torch.mm, 0))
    monkeypatch.setattr(torch, "addmm", counting(torch.addmm, 1))

    def since() -> int:
        count, done[0] = done[0], 0
        return count

    return since


@pytest.mark.parametrize("needs, forward", [((True, True, False), 1), ((True, False, False), 2)])
def test_gemms(counted, needs, forward):
    """An entropy that is only logged costs nothing in backward, and the gradients are those of linear_logps to the last
    bit; one that is differentiated costs a second pass over every row."""
    batch = make_batch()
    gl, gh = upstreams(batch)
    gemm = int((batch.targets != IGNORE).sum()) * batch.weight.numel()

    def call(function):
        inputs = leaves(batch, needs)
        found = function(*inputs[:2], batch.targets)
        assert counted() == forward * gemm
        return found, [t for t in inputs if t.requires_grad]

    logps, inputs = call(fp.linear_logps)
    want = torch.autograd.grad((logps * gl).sum(), inputs)
    alone = counted()
    assert alone == (2 if forward == 1 else 0) * gemm
    found, inputs = call(fp.linear_token_stats)
    logged = torch.autograd.grad((found.logps * gl).sum(), inputs, retain_graph=True)
    assert counted() == alone
    assert all(torch.equal(a, b) for a, b in zip(logged, want, strict=True))
    torch.autograd.grad((found.entropy * gh).sum(), inputs)
    assert forward * gemm + counted() == 4 * gemm


@pytest.mark.parametrize("vocab", [131, 20_000])
def test_half_of_the_budget_is_for_the_slices(vocab):
    for budget in (2**20, 2**22, 2**24, 2**26, 2**28):
        sizes = dict(hidden=64, vocab=vocab, coupling="batch", late=True)
        logged, alone = (fp.plan(fp.Problem((1000,), entropy_grad=e, **sizes), budget) for e in (True, False))
        assert alone.stash_rows >= logged.stash_rows
        assert logged.stash_rows * vocab * 2 <= budget / 2
        assert logged.slice_cols >= 64 and logged.tile_bytes <= budget
        slices = 1000 * logged.slice_cols * (2 + 4)  # residuals and fp32 logits
        assert logged.slice_cols >= vocab or logged.stash_rows * vocab * 2 + slices <= budget


# ----------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("share", [None, 0.5], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["policy", "frozen"])
def test_two_backwards_are_equal(needs, share):
    batch = make_batch(LONG[:4])
    inputs = leaves(batch, needs)
    gl, gh = upstreams(batch)

    def call(budget):
        return fp.linear_token_stats(*inputs[:2], batch.targets, bias=inputs[2], memory_budget=budget)

    found = call(budget_of(share, batch, call))
    first = backward(found, gl, gh, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    only = torch.autograd.grad(found.logps.sum(), [t for t in inputs if t.requires_grad], retain_graph=True)
    again = backward(found, gl, gh, inputs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, kept, again, strict=True))
    assert relative(only[0], first[0]) > 0.1


@every_backend
@pytest.mark.parametrize("share", [None, 0.5], ids=str)
def test_nan_stays_in_its_row_and_ignored_rows_may_hold_anything(share, backend):
    batch = make_batch(LONG[:4])
    gl, gh = upstreams(batch)
    row = tuple((batch.targets != IGNORE).nonzero()[70].tolist())

    def run(batch):
        inputs = leaves(batch)

        def call(budget):
            return fp.linear_token_stats(
                *inputs[:2], batch.targets, bias=inputs[2], memory_budget=budget, backend=backend
            )

        found = call(budget_of(share, batch, call))
        return found, backward(found, gl, gh, inputs)

    clean, clean_grads = run(batch)
    batch.hidden[batch.targets == IGNORE] = float("nan")
    ignored, grads = run(batch)
    assert all(torch.equal(a, b) for a, b in zip((*ignored, *grads), (*clean, *clean_grads), strict=True))
    batch.hidden[row] = float("nan")
    found, grads = run(batch)
    others = torch.ones_like(batch.targets, dtype=torch.bool)
    others[row] = False
    assert found.logps[row].isnan() and found.entropy[row].isnan() and found.top1[row] == 0
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])
    assert torch.equal(grads[0][others], clean_grads[0][others]) and grads[0][row].isnan().any()


def test_budgets_and_backends_agree():
    batch = make_batch(LONG[:4])
    gl, gh = upstreams(batch)
    results = []
    for backend in BACKENDS:
        for budget in (None, 600_000, 320_000):
            inputs = leaves(batch)
            found = fp.linear_token_stats(
                *inputs[:2], batch.targets, bias=inputs[2], memory_budget=budget, backend=backend
            )
            results.append([*(x.detach() for x in found), *backward(found, gl, gh, inputs)])
    for other in results[1:]:
        assert all(relative(a, b) <= 1e-6 for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(
    "error, match, outputs",
    [
        (ValueError, "outputs is given with 'perplexity'; it takes names of entropy, top1", ("perplexity",)),
        (TypeError, "outputs is 'entropy'; it takes a sequence of names", "entropy"),
        (TypeError, r"outputs is \(1,\); it takes a sequence of names", (1,)),
    ],
)
def test_errors_name_the_argument(error, match, outputs):
    batch = make_batch()
    with pytest.raises(error, match=match):
        fp.linear_token_stats(*batch[:3], outputs=outputs)
    with pytest.raises(error, match=match.replace("outputs", "extras")):
        fp.linear_preference_loss(*batch[:3], loss="sft", extras=outputs)


# ------------------------------------------------------------------- sums beside a preference loss


def sums(batch):
    found = oracle.token_stats(batch.hidden, batch.weight, batch.targets, batch.bias)
    return {name: oracle.sequence_sums(values, None) for name, values in found.items()}


class Coupled(fp.DPO):
    """One group for the batch, which under a small budget is recomputed."""

    coupling = "batch"


def free(seq):
    return (0.1 * seq.margins - 1).square().mean()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("share", [None, 0.4, "least"], ids=str)
@pytest.mark.parametrize("needs", [True, False, None], ids=["policy", "frozen", "no grad"])
@pytest.mark.parametrize("loss", ["dpo", "rpo", Coupled(), free], ids=["dpo", "rpo", "batch", "callable"])
def test_extras_of_every_schedule(loss, needs, share, layout, monkeypatch):
    """Also with token weights, which do not apply to them; and without them nothing else changes."""
    made = oracle.record(monkeypatch, fp.plan)
    batch = make_batch(LONG)
    hidden, weight, bias = leaves(batch, (needs is not None, bool(needs), bool(needs)))
    x, targets, cu = hidden, batch.targets, None
    if layout == "packed":
        x, targets, cu = batch._replace(hidden=hidden).packed()
    weights = torch.linspace(0.5, 1.5, targets.numel()).view(targets.shape)
    given = dict(
        loss=loss, cu_seqlens=cu, bias=bias, ref_logps=oracle.reference_logps(batch), token_weights=weights,
    )

    def call(budget, **more):
        return fp.linear_preference_loss(x, weight, targets, memory_budget=budget, **given, **more)

    budget = budget_of(share, batch, call)
    without, out = call(budget), call(budget, extras=("top1", "entropy", "log_sum_p2", "mean_logit"))
    assert without.extras == {} and list(out.extras) == list(EXTRAS)
    want = sums(batch)
    for name, values in out.extras.items():
        assert values.dtype == torch.float32 and not values.requires_grad
        torch.testing.assert_close(values.double(), want[name], rtol=3e-6, atol=1e-5)
    assert torch.equal(out.logps, without.logps) or relative(out.logps, without.logps) <= 1e-6
    assert list(out.metrics) == list(without.metrics)
    if share == 0.4 and needs and loss in ("dpo", "rpo"):
        assert any(group.long for group in made[-1].groups)


def test_extras_are_fp64_for_fp64_inputs():
    batch = make_batch(dtype=torch.float64)
    out = fp.linear_preference_loss(*batch[:3], loss="sft", bias=batch.bias, extras=EXTRAS)
    for name, values in out.extras.items():
        torch.testing.assert_close(values, sums(batch)[name], rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Weighted(fp.DPO):
    """A DPO of one's own, whose pairs count as much as the policy is sure of them."""

    needs_extras = ("entropy", "log_sum_p2")

    def __call__(self, seq):
        sure = torch.exp((seq.extras["log_sum_p2"] - 0.1 * seq.extras["entropy"]) / seq.lengths)
        chosen, rejected = sure.chunk(2)
        return seq.pair_mean(chosen * rejected * -torch.nn.functional.logsigmoid(self.beta * seq.margins))


def weighted(seq):
    return Weighted(beta=0.1)(seq)


weighted.needs_extras = ("log_sum_p2", "entropy")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("share", [None, 0.8, 0.4, "least"], ids=str)
@pytest.mark.parametrize("loss", [Weighted(beta=0.1), weighted], ids=["object", "callable"])
def test_a_loss_that_needs_extras(loss, share, layout):
    batch = make_batch(LONG)
    refs = oracle.reference_logps(batch)
    known = sums(batch)

    def value(logps, lengths):
        sure = torch.exp((known["log_sum_p2"] - 0.1 * known["entropy"]) / lengths)
        chosen, rejected = oracle.halves(sure)
        return -(chosen * rejected * oracle.log_sigmoid(0.1 * oracle.delta(logps, refs.double()))).mean()

    want = oracle.head_and_loss(*batch[:3], value, bias=batch.bias)
    hidden, weight, bias = inputs = leaves(batch)
    x, targets, cu = hidden, batch.targets, None
    if layout == "packed":
        x, targets, cu = batch._replace(hidden=hidden).packed()

    def call(budget):
        return fp.linear_preference_loss(
            x, weight, targets, loss=loss, cu_seqlens=cu, bias=bias, ref_logps=refs, extras=("top1",),
            memory_budget=budget,
        )

    out = call(budget_of(share, batch, call))
    assert list(out.extras) == ["entropy", "top1", "log_sum_p2"]
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=3e-5)
    for got, e in zip(torch.autograd.grad(out.loss, inputs), want[3:], strict=True):
        assert relative(got, e) <= 3e-5


def test_the_reference_needs_none(monkeypatch):
    """One sweep of the policy's rows asks for extras, that of the reference does not."""
    asked = []
    native = rows.choose(None, torch.device("cpu"), torch.float32)
    residual = native.residual

    def spy(tile, out, extras=()):
        asked.append(extras)
        return residual(tile, out, extras)

    monkeypatch.setattr(native, "residual", spy)
    batch = make_batch()
    for loss in ("dpo", free):
        asked.clear()
        fp.linear_preference_loss(
            *batch[:3], loss=loss, extras=("top1",), ref_hidden=batch.hidden, ref_weight=batch.weight
        )
        assert asked == [(), ("top1",)]
        asked.clear()
        fp.linear_preference_loss(*batch[:3], loss=loss, ref_logps=torch.zeros(4))
        assert asked == [()]
