"""What torch sees: custom ops under opcheck, torch.compile(fullgraph=True) with gradients, autocast, accumulation."""

from __future__ import annotations

import pytest
import torch
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref as fp
from fastpref.rows import EXTRAS
from tests import oracle
from tests.oracle import make_batch, relative


class Calls(TorchDispatchMode):
    """Every call of one of our ops, with its arguments: opcheck then needs to know no signature.

    Detached: autograd is above the ops (they run inside autograd.Function), not registered with them.
    """

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpref":
            key = (func, repr([(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in args]))
            detached = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.seen[key] = (func, detached, kwargs or {})
        return func(*args, **(kwargs or {}))


TT, TF, FT, FF = ((a, b) for a in (True, False) for b in (True, False))


def every_call():
    """Calls of the public functions that reach every op and every kind of output an op can have."""
    with Calls() as calls:
        for budget, combinations in ((None, (TT, TF, FT, FF)), (25_000, (TT,))):
            for needs in combinations:
                batch = make_batch()
                hidden, weight = batch.hidden.requires_grad_(needs[0]), batch.weight.requires_grad_(needs[1])
                head = dict(memory_budget=budget, bias=batch.bias.requires_grad_(needs[1]), softcap=5.0)
                given, _ = oracle.loss_inputs("kto", batch)
                packed, targets, cu = batch._replace(hidden=hidden.detach()).packed()
                results = [
                    fp.linear_logps(hidden, weight, batch.targets, **head).sum(),
                    *(
                        fp.linear_token_stats(hidden, weight, batch.targets, outputs=EXTRAS[:2], **head).entropy.sum()
                        for _ in range(needs[0])
                    ),
                    fp.linear_preference_loss(
                        hidden, weight, batch.targets, loss="kto", extras=("entropy", "top1"), **given, **head
                    ).loss,
                    fp.linear_preference_loss(
                        packed.requires_grad_(needs[0]), weight, targets, cu_seqlens=cu, loss=fp.RPO(0.2),
                        ref_hidden=packed.detach(), ref_weight=weight.detach(), ref_bias=batch.bias.detach(),
                        token_weights=torch.ones(targets.shape), totals=fp.Totals(8, 60, 26), **head,
                    ).loss,
                ]
                for result in results:
                    if result.requires_grad:
                        result.backward()
    return list(calls.seen.values())


@pytest.fixture(scope="module")
def calls():
    return every_call()


def test_every_registered_op_is_called(calls):
    """Of the head; those of compiled attention are checked in tests/train/test_compiled.py."""
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("fastpref::") and not name.startswith("fastpref::packed_attention")}
    assert {func._schema.name for func, _, _ in calls} == registered and registered


def test_only_the_padded_step_keeps_cuda_graphs_away(calls):
    """It reads its counts on the host; torch.compile(mode="reduce-overhead") then leaves it out of its graphs."""
    unsafe = {func._schema.name for func, _, _ in calls if torch.Tag.cudagraph_unsafe in func.tags}
    assert unsafe == {"fastpref::padded_preference_step"}
    for func, args, _ in calls:
        if "preference_step" in func._schema.name:
            assert (args[5] is None) == ("padded" in func._schema.name)


def test_opcheck(calls):
    for func, args, kwargs in calls:
        library.opcheck(func, args, kwargs)


def test_fake_outputs_have_the_shapes_dtypes_and_strides_of_the_real_ones(calls):
    from torch._subclasses import FakeTensorMode

    for func, args, kwargs in calls:
        real = func(*args, **kwargs)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            moved = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = func(*moved, **kwargs)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device), func


# --------------------------------------------------------------------------------------- torch.compile


def gradients_of(function, *tensors):
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def compare(function, *tensors, tolerance=1e-6):
    """Eager and compiled: the same value and gradients, with no graph break."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients_of(function, *tensors), gradients_of(compiled, *tensors), strict=True):
        assert a.dtype == b.dtype and relative(a, b) <= tolerance


LOSSES = ["sft", "rpo", "kto", lambda seq: (seq.logratios / 5).softmax(0).square().sum()]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: x if isinstance(x, str) else "callable")
def test_compile_linear_preference_loss(loss, layout):
    batch = make_batch()
    given, _ = oracle.loss_inputs(loss if isinstance(loss, str) else "dpo", batch)
    hidden, targets, cu = (batch.hidden, batch.targets, None) if layout == "padded" else batch.packed()

    def call(x, w, b):
        return fp.linear_preference_loss(x, w, targets, loss=loss, bias=b, cu_seqlens=cu, **given).loss

    compare(call, hidden, batch.weight, batch.bias)


def test_compile_every_output():
    batch = make_batch()
    refs = oracle.reference_logps(batch)

    def call(x, w):
        out = fp.linear_preference_loss(x, w, batch.targets, ref_logps=refs)
        return out.logps, out.lengths, out.metrics["rewards/margins"], out.ref_logps

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(batch.hidden, batch.weight)
    for a, b in zip(call(batch.hidden, batch.weight), compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_grad", [True, False])
def test_compile_linear_logps(weight_grad):
    batch = make_batch()
    upstream = torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(2))
    fixed = batch.weight.clone()
    if weight_grad:
        compare(lambda x, w: (fp.linear_logps(x, w, batch.targets) * upstream).sum(), batch.hidden, batch.weight)
    else:
        compare(lambda x: (fp.linear_logps(x, fixed, batch.targets) * upstream).sum(), batch.hidden)


@pytest.mark.parametrize("needs", [TT, TF], ids=["policy", "frozen"])
@pytest.mark.parametrize("used", ["logps", "entropy", "both"])
def test_compile_linear_token_stats(used, needs):
    batch = make_batch()
    batch.hidden[batch.targets == oracle.IGNORE] = float("nan")  # compiled, no row is left out
    fixed = batch.weight.clone()

    def call(x, w=fixed):
        found = fp.linear_token_stats(x, w, batch.targets, memory_budget=40_000)
        return found.logps.sum() * (used != "entropy") + found.entropy.square().sum() * (used != "logps")

    compare(call, batch.hidden, *([batch.weight] if needs[1] else []))


def test_compile_extras():
    batch = make_batch()
    refs = oracle.reference_logps(batch)

    def call(x, w):
        out = fp.linear_preference_loss(x, w, batch.targets, extras=("top1", "log_sum_p2"), ref_logps=refs)
        return out.loss + out.extras["top1"].sum() + out.extras["log_sum_p2"].sum()

    compare(call, batch.hidden, batch.weight)


class Tiny(nn.Module):
    """A trunk and a head of a few thousand parameters."""

    def __init__(self, vocab=263, width=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids, targets, refs):
        hidden = self.norm(self.embed(ids).cumsum(1) + self.mix(self.embed(ids)))
        loss = fp.RPO(0.2, eta=0.1)
        return fp.linear_preference_loss(hidden, self.head.weight, targets, loss=loss, ref_logps=refs).loss


def tiny(seed=0):
    torch.manual_seed(seed)
    model = Tiny()
    ids = torch.randint(0, 263, (4, 12))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(12) < 4, -100)
    return model, (ids, targets, torch.full((4,), -40.0))


def parameter_gradients(model, call):
    model.zero_grad()
    call.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_trunk_and_loss(backend):
    model, batch = tiny()
    eager = parameter_gradients(model, model(*batch))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):  # the second call must not recompile
        with torch._dynamo.config.patch(error_on_recompile=_ == 1):
            found = parameter_gradients(model, compiled(*batch))
    for name, grad in eager.items():
        assert relative(found[name], grad) <= 1e-5, name


# -------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize(
    "loss", ["dpo", lambda seq: (0.1 * seq.margins - 1).square().mean()], ids=["built-in", "callable"]
)
@pytest.mark.parametrize("budget", [None, 100_000])
def test_autocast_over_fp32_weights(loss, budget):
    """bf16 GEMMs, fp32 log-probs, and gradients in fp32 that are as close to fp64 as the same in plain torch."""
    batch = make_batch([37, 21, 30, 44], hidden_size=48)
    refs = oracle.sequence_sums(oracle.token_logps(*batch[:3]), None)
    hidden, weight = (t.clone().requires_grad_() for t in batch[:2])
    with torch.autocast("cpu", torch.bfloat16):
        out = fp.linear_preference_loss(
            hidden, weight, batch.targets, loss=loss, ref_logps=refs.float(), memory_budget=budget
        )
        tokens = fp.linear_logps(hidden, weight, batch.targets, memory_budget=budget)
    out.loss.backward()
    assert out.loss.dtype == out.logps.dtype == tokens.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32

    x, w = (t.clone().requires_grad_() for t in batch[:2])
    scored = batch.targets != oracle.IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        z = (x @ w.T).float().log_softmax(-1)
    logps = (z.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * scored).sum(-1)
    margins = oracle.delta(logps, refs.float())
    value = oracle.dpo(logps, None, refs=refs.float()) if loss == "dpo" else (0.1 * margins - 1).square().mean()
    value.backward()

    def exact_loss(a, b):
        return oracle.dpo(a, b, refs=refs) if loss == "dpo" else (0.1 * oracle.delta(a, refs) - 1).square().mean()

    exact = oracle.head_and_loss(*batch[:3], exact_loss)
    assert relative(hidden.grad, exact.hidden) <= 1.5 * relative(x.grad, exact.hidden)
    assert relative(weight.grad, exact.weight) <= 1.5 * relative(w.grad, exact.weight)


@pytest.mark.parametrize("budget", [None, 100_000])
def test_autocasts_weight_gradient_is_of_the_rows_that_the_logits_were_made_of(budget):
    """dW = U^T (g x) of x as rounded in the forward pass, bit by bit: TRL's own tests look for it. Every row is scored,
    so that rows are taken from `hidden` as they lie."""
    batch = make_batch([9, 14, 11, 6], hidden_size=48)
    targets = batch.targets.clamp(min=0)
    found = []
    for given in (batch.hidden, batch.hidden.bfloat16().float()):
        weight = batch.weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = fp.linear_preference_loss(given.clone().requires_grad_(), weight, targets, loss="cpo",
                                            memory_budget=budget)
            tokens = fp.linear_logps(given, weight, targets, memory_budget=budget)
        found.append(torch.autograd.grad(out.loss + tokens.sum(), weight)[0])
    assert not torch.equal(batch.hidden, batch.hidden.bfloat16().float())
    assert torch.equal(*found)


def test_autocast_in_a_training_step():
    """fp32 parameters, trunk and head in bf16: the gradient of every parameter is fp32 and points the same way."""
    model, batch = tiny()
    plain = parameter_gradients(model, model(*batch))
    with torch.autocast("cpu", torch.bfloat16):
        value = model(*batch)
    found = parameter_gradients(model, value)
    for name, grad in plain.items():
        assert found[name].dtype == torch.float32
        assert relative(found[name], grad) <= 0.05, name


def test_autocast_with_a_bf16_trunk_output():
    """Under autocast hidden may be bf16 while the head is fp32: dX comes back in bf16, dW in fp32."""
    batch = make_batch()
    hidden, weight = batch.hidden.bfloat16().requires_grad_(), batch.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fp.linear_preference_loss(hidden, weight, batch.targets, ref_logps=oracle.reference_logps(batch))
    out.loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------- accumulation


def test_two_accumulating_backwards_in_a_module():
    model, batch = tiny()
    once = parameter_gradients(model, model(*batch))
    model.zero_grad()
    for _ in range(2):
        (model(*batch) / 2).backward()
    for name, p in model.named_parameters():
        assert relative(p.grad, once[name]) <= 1e-6, name


def test_a_gradient_is_taken_over_without_a_copy():
    """dW is [V, H] in size: the tensor made in forward becomes weight.grad itself."""
    batch = make_batch()
    weight = batch.weight.requires_grad_()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == "fastpref":
                made.extend(t.data_ptr() for t in out if t.shape == weight.shape)
            return out

    with Watch():
        out = fp.linear_preference_loss(batch.hidden, weight, batch.targets, ref_logps=torch.zeros(4))
    out.loss.backward()
    assert made and weight.grad.data_ptr() in made


def test_gradient_checkpointing_over_the_loss():
    """Recomputing the loss in backward, as activation checkpointing does, gives the same gradients."""
    batch = make_batch()
    refs = oracle.reference_logps(batch)

    def call(x, w):
        return fp.linear_preference_loss(x, w, batch.targets, ref_logps=refs).loss

    def checkpointed(x, w):
        return torch.utils.checkpoint.checkpoint(call, x, w, use_reentrant=False)

    plain, again = (gradients_of(f, batch.hidden, batch.weight) for f in (call, checkpointed))
    assert all(relative(a, b) <= 1e-6 for a, b in zip(again, plain, strict=True))
