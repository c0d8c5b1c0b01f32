"""The head on a CUDA device: what only hardware shows. The rest of the contract is test_head.py's, on the CPU."""

import pytest
import torch

import fastpref as fp
from fastpref import plan as make_plan
from fastpref import rows
from fastpref.plan import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BACKENDS = [name for name in ("triton", "cuda") if rows.availability(name).available]
LENGTHS = [700, 12, 333, 1, 650, 40, 300, 77]


def batch(lengths=LENGTHS, hidden=512, vocab=32001, dtype=torch.bfloat16, seed=0):
    """Logits with a standard deviation of about 3 and targets near the top of their row, packed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    count = sum(lengths)
    x = torch.randn(count, hidden, device="cuda", generator=generator).to(dtype)
    w = (torch.randn(vocab, hidden, device="cuda", generator=generator) * 3 / hidden**0.5).to(dtype)
    targets = torch.randint(0, vocab, (count,), device="cuda", generator=generator)
    likely = torch.cat([(part.float() @ w.float().T).argmax(1) for part in x.split(4096)])
    targets = torch.where(torch.rand(count, device="cuda", generator=generator) < 0.7, likely, targets)
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    return dict(
        hidden=x.requires_grad_(), weight=w.requires_grad_(), targets=targets, cu_seqlens=cu,
        ref_logps=torch.randn(len(lengths), device="cuda") - 2 * torch.tensor(lengths, device="cuda"),
    )


def gradients(call, **options):
    leaves = [call["hidden"], call["weight"]]
    out = fp.linear_preference_loss(**call, **options)
    return (out.loss, out.logps, *torch.autograd.grad(out.loss, [x for x in leaves if x.requires_grad]))


def oracle(call, beta=0.1):
    """fp64: (loss, logps, dX, dW) of DPO over full logits."""
    x, w = (call[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    tokens = (x @ w.T).log_softmax(-1).gather(1, call["targets"][:, None])[:, 0]
    cu = call["cu_seqlens"]
    logps = torch.stack([tokens[a:b].sum() for a, b in zip(cu, cu[1:], strict=False)])
    chosen, rejected = (logps - call["ref_logps"].double()).chunk(2)
    loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    return loss.detach(), logps.detach(), *torch.autograd.grad(loss, (x, w))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [None, 128 * MIB, 96 * MIB])
def test_against_fp64(backend, budget):
    call = batch()
    loss, logps, dx, dw = oracle(call)
    found = gradients(call, backend=backend, memory_budget=budget)
    assert abs(found[0].item() - loss.item()) < 1e-3 * abs(loss.item())
    lengths = torch.tensor(LENGTHS, device="cuda")
    assert ((found[1] - logps).abs() / lengths).max() < 1e-4  # nats a token, fp32 logits from bf16 operands
    assert relative(found[2], dx) < 4e-3 and relative(found[3], dw) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_equal_to_its_reference(backend):
    call = batch()
    call["ref_logps"] = None
    same = dict(ref_hidden=call["hidden"].detach(), ref_weight=call["weight"].detach())
    out = fp.linear_preference_loss(**call, **same, backend=backend)
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert not out.metrics["rewards/margins"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [None, 96 * MIB])
def test_bitwise_equal_from_run_to_run(backend, budget):
    call = batch()
    first = gradients(call, backend=backend, memory_budget=budget)
    for _ in range(3):
        assert all(map(torch.equal, first, gradients(call, backend=backend, memory_budget=budget)))


def test_more_than_two_to_the_31_logits():
    """N * V passes 2^31 inside one stash: every offset is 64 bits wide. The last pair alone must say the same."""
    vocab, lengths = 128256, [4300, 4300, 4300, 4300]
    call = batch(lengths, hidden=64, vocab=vocab)
    assert sum(lengths) * vocab > 2**31
    budget = 6 * 1024 * MIB
    problem = fp.Problem(tuple(lengths), 64, vocab, device="cuda")
    assert make_plan(problem, budget).stash_rows * vocab > 2**31
    _, logps, dx, _ = gradients(call, memory_budget=budget)
    alone = {
        **call,
        "hidden": torch.cat([call["hidden"][4300:8600], call["hidden"][12900:]]).detach().requires_grad_(),
        "targets": torch.cat([call["targets"][4300:8600], call["targets"][12900:]]),
        "cu_seqlens": [0, 4300, 8600],
        "ref_logps": call["ref_logps"][1::2],
    }
    _, alone_logps, alone_dx, _ = gradients(alone, memory_budget=budget)
    torch.testing.assert_close(logps[1::2], alone_logps, rtol=1e-5, atol=1e-2)
    assert relative(torch.cat([dx[4300:8600], dx[12900:]]), alone_dx / 2) < 4e-3


@pytest.mark.parametrize(
    "budget, options",
    [(None, {}), (1024 * MIB, {}), (4096 * MIB, {}), (None, {"logits_dtype": "bf16"}), (None, {"frozen": True})],
    ids=str,
)
def test_peak_memory_is_the_plans(budget, options):
    options = dict(options)
    lengths, hidden, vocab = [512] * 16, 4096, 128256
    call = batch(lengths, hidden, vocab)
    call["weight"].requires_grad_(not options.pop("frozen", False))
    gradients(call, memory_budget=budget, **options)  # Triton compiles, cuBLAS takes its workspace
    problem = fp.Problem(
        tuple(lengths), hidden, vocab, logits_itemsize=2 if options else 4, scratches=1,
        needs_weight_grad=call["weight"].requires_grad, device="cuda",
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = gradients(call, memory_budget=budget, **options)
    made = sum(x.nbytes for x in kept[2:])
    peak = torch.cuda.max_memory_allocated() - before - made
    assert peak == pytest.approx(make_plan(problem, budget).bytes, rel=0.02)


@pytest.mark.parametrize("loss", ["dpo", "rpo", "ipo", "kto", "slic", "sft"])
@pytest.mark.parametrize("budget", [None, 96 * MIB])
def test_nothing_synchronises(loss, budget):
    call = batch()
    options = dict(loss=loss, memory_budget=budget)
    if loss == "kto":
        flags = torch.arange(len(LENGTHS), device="cuda") % 2 == 0
        options |= dict(desirable=flags, kl_logps=call["ref_logps"] + 1, ref_kl_logps=call["ref_logps"])
    upstream = torch.tensor(0.5, device="cuda")
    fp.linear_preference_loss(**call, **options).loss.backward(upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp.linear_preference_loss(**call, **options).loss.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_in_a_cuda_graph():
    call = batch()
    expected = gradients(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(call)
    with torch.no_grad():
        call["hidden"].mul_(0.5)
        graph.replay()
        assert not torch.equal(found[0], expected[0])
        call["hidden"].mul_(2)
        graph.replay()
    assert all(map(torch.equal, found, expected))


def test_the_tail_of_the_softmax_waits_for_nothing(monkeypatch):
    """The first call is exact, the next ones by a number of columns that it settled; in a CUDA graph too."""
    monkeypatch.setattr("fastpref.tail.Needed.of", {})
    call = batch()
    with torch.no_grad():  # a few tokens with large logits over a tail
        call["hidden"].mul_(4)
        call["weight"][2000:].mul_(0.1)
    exact = gradients(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second, third = (gradients(call, tail="rank1") for _ in range(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, exact)) and all(map(torch.equal, second, third))
    assert all(0 < relative(ours, whole) < 6e-3 for ours, whole in zip(second[2:], exact[2:]))
    active = fp.linear_preference_loss(**call, tail="rank1").metrics["tail/active"]
    assert 1 / 16 <= active.item() <= 1 / 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(call, tail="rank1")
    graph.replay()
    assert all(map(torch.equal, found, second))


def test_compiled_and_autocast():
    call = batch(dtype=torch.float32)

    def step(hidden, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return fp.linear_preference_loss(
                hidden.tanh(), weight, call["targets"], cu_seqlens=call["cu_seqlens"], ref_logps=call["ref_logps"]
            ).loss

    leaves = (call["hidden"], call["weight"])
    eager = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        assert a.dtype == torch.float32 and relative(b, a) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_outside_the_vocabulary(backend, monkeypatch):
    call = batch()
    call["targets"][LENGTHS[0] + 3] = 10**9
    out = fp.linear_preference_loss(**call, backend=backend)
    assert out.logps.isnan().tolist() == [i == 1 for i in range(len(LENGTHS))]
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    with pytest.raises(ValueError, match="targets holds 1000000000"):
        fp.linear_preference_loss(**call, backend=backend)


def test_ignored_rows_bring_in_nothing():
    call = batch()
    expected = gradients(call)
    keep = torch.rand(sum(LENGTHS), device="cuda") < 0.8
    call["targets"][~keep] = -100
    clean = gradients(call)
    with torch.no_grad():
        call["hidden"][~keep] = float("nan")
    found = gradients(call)
    assert not torch.equal(clean[0], expected[0]) and all(map(torch.equal, found, clean))
    assert not found[2][~keep].any()


def test_a_tensor_elsewhere_is_named():
    call = batch()
    with pytest.raises(ValueError, match="ref_logps is on cpu; it takes cuda:0"):
        fp.linear_preference_loss(**{**call, "ref_logps": call["ref_logps"].cpu()})
    with pytest.raises(ValueError, match="cu_seqlens is on cuda:0; it takes a list or a CPU tensor"):
        fp.linear_preference_loss(**{**call, "cu_seqlens": torch.tensor(call["cu_seqlens"], device="cuda")})
