"""The head sharded over ranks (gloo, 2 and 3 of them) against plain fp64 maths over the whole batch and vocabulary."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastpref as fp
from fastpref import tail

HIDDEN, VOCAB, PAIRS, LENGTH = 24, 211, 7, 9  # neither vocabulary nor pairs divide by the ranks
CASES = {
    "dpo": {"loss": fp.DPO(beta=0.3)},
    "rpo, softcap, scale, temperature, bias": {
        "loss": fp.RPO(beta=0.2, eta=0.3, sft="tokens"), "softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3,
        "bias": True,
    },
    "recompute": {"loss": fp.IPO(beta=0.2), "memory_budget": 60_000, "bias": True},
    "recompute, a part stashed": {"loss": fp.DPO(beta=0.3), "memory_budget": 90_000, "softcap": 3.0},
    "callable": {"loss": lambda seq: (0.3 * seq.logps.sin()).sum() / seq.totals.sequences, "token_weights": True},
    "packed": {"loss": fp.DPO(beta=0.3), "packed": True, "bias": True},
    "frozen head": {"loss": fp.DPO(beta=0.3), "frozen": True, "softcap": 3.0},
    "frozen hidden": {"loss": fp.DPO(beta=0.3), "frozen_hidden": True},
    "few columns": {"loss": fp.DPO(beta=0.3), "vocab": 4},  # of 3 ranks the last one has none
    "large logits": {"loss": fp.DPO(beta=1e-4), "scale": 400.0},
    "replicas": {"loss": fp.DPO(beta=0.3), "bias": True, "replicas": True},
    "bf16": {"loss": fp.DPO(beta=0.3), "dtype": torch.bfloat16},
    "bf16, frozen head": {"loss": fp.DPO(beta=0.3), "dtype": torch.bfloat16, "frozen": True},
}
RANK1 = {"loss": fp.DPO(beta=0.01), "tail": "rank1", "tail_eps": 1e-2, "scale": 40.0}
CASES |= {
    "rank1": RANK1, "rank1, frozen head": RANK1 | {"frozen": True},
    "rank1, recompute": RANK1 | {"memory_budget": 187_000},
}


def problem(case):
    """hidden [S, T, H], weight, bias, targets, ref_logps, token_weights; a third of the tokens is not scored."""
    generator = torch.Generator().manual_seed(3)
    vocab = case.get("vocab", VOCAB)
    dtype = case.get("dtype", torch.float32)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = randn(2 * PAIRS, LENGTH, HIDDEN), randn(vocab, HIDDEN), randn(vocab)
    targets = torch.randint(0, vocab, (2 * PAIRS, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    weight *= case.get("scale", 1.0) / math.sqrt(HIDDEN)
    weights = torch.rand(targets.shape, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, randn(2 * PAIRS) * 3 - 20, weights


def totals(targets):
    scored = targets != -100
    return fp.Totals(2 * PAIRS, int(scored.sum()), int(scored[:PAIRS].sum()))


def expected(case):
    """(loss, logps [S], dX, dW, db) in fp64."""
    hidden, weight, bias, targets, ref_logps, weights = (x.double() if x.is_floating_point() else x
                                                         for x in problem(case))
    for x in (hidden, weight, bias):
        x.requires_grad_()
    z = hidden @ weight.t() + (bias if case.get("bias") else 0.0)
    z = z * case.get("logit_scale", 1.0)
    if "softcap" in case:
        z = case["softcap"] * torch.tanh(z / case["softcap"])
    scored = targets != -100
    logp = (z / case.get("temperature", 1.0)).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    logp = torch.where(scored, logp * (weights if case.get("token_weights") else 1.0), 0.0)
    seq = fp.SequenceLogps(logp.sum(1), scored.sum(1).double(), totals(targets), ref_logps)
    loss = case["loss"](seq)
    loss.backward()
    return loss.detach(), seq.logps.detach(), hidden.grad, weight.grad, bias.grad


def pairs_of(rank, world):
    """Uneven: of 7 pairs 2 ranks have 3 and 4, 3 ranks 2, 2 and 3."""
    return range(rank * PAIRS // world, (rank + 1) * PAIRS // world)


def part(x, rank, world):
    return torch.cat([half[list(pairs_of(rank, world))] for half in x.chunk(2)])


def run(case, rank, world):
    """This rank's loss, logps, dX, and the whole dW and db, gathered only to be looked at."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    hidden, weight, bias, targets, ref_logps, weights = problem(case)
    if case.get("replicas"):
        mesh, placements = init_device_mesh("cpu", (world, 1)), [Replicate(), Shard(0)]
    else:
        mesh, placements = init_device_mesh("cpu", (world,)), [Shard(0)]
    weight, bias = (distribute_tensor(x, mesh, placements).requires_grad_(not case.get("frozen"))
                    for x in (weight, bias))
    bias = bias if case.get("bias") else None
    names = ("loss", "softcap", "logit_scale", "temperature", "memory_budget", "tail", "tail_eps")
    options = {k: case[k] for k in names if k in case}
    mine = [part(x, rank, world) for x in (hidden, targets, ref_logps, weights)]
    own_hidden, own_targets, own_ref, own_weights = mine
    own_hidden = own_hidden.clone().requires_grad_(not case.get("frozen_hidden"))
    given, cu_seqlens = own_hidden, None
    if case.get("packed"):
        given, own_targets = own_hidden.flatten(0, 1), own_targets.flatten()
        cu_seqlens = [*range(0, len(own_targets) + 1, LENGTH)]
    if case.get("token_weights"):
        options["token_weights"] = own_weights
    out = fp.linear_preference_loss(given, weight, own_targets, bias=bias, ref_logps=own_ref, cu_seqlens=cu_seqlens,
                                    totals=totals(targets), **options)
    out.loss.backward()

    def whole(x):
        if x is None or x.grad is None:
            return None
        assert isinstance(x.grad, DTensor) and x.grad.placements == x.placements
        return x.grad.full_tensor()

    return out.loss.detach(), out.logps, own_hidden.grad, whole(weight), whole(bias)


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    multiply, multiplied = tail.multiply, []
    tail.TAIL_MOST = 0.9  # of so few columns the targets alone are half
    tail.multiply = lambda *given, **more: multiplied.append(1) or multiply(*given, **more)
    found, counts = {}, {}
    for name, case in CASES.items():
        found[name] = run(case, rank, world)
        counts[name] = len(multiplied)
        multiplied.clear()
    found["multiplied"] = counts
    found["checks"] = checks(rank, world)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves early closes connections the other still reads, and gloo aborts
    dist.destroy_process_group()


def checks(rank, world):
    """What else is asked of the sharded head, in the same processes: (messages, numbers)."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    hidden, weight, bias, targets, *_ = problem({})
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    found = {}
    with torch.no_grad():
        found["no grad"] = fp.linear_logps(hidden, sharded, targets), fp.linear_logps(hidden, weight, targets)
    broken = hidden.clone()
    broken[1, 2] = math.nan
    broken[4, 0] = math.inf
    found["nan"] = fp.linear_logps(broken, sharded, torch.where(targets == -100, 5, targets)).isfinite()
    own = hidden[rank : rank + 1 + rank].clone().requires_grad_()  # retain_graph: the same gradients twice
    logps = fp.linear_logps(own, sharded, targets[rank : rank + 1 + rank])
    logps.sum().backward(retain_graph=True)
    once, wide = own.grad.clone(), sharded.grad.full_tensor()
    logps.sum().backward()
    found["twice"] = own.grad / 2 - once, sharded.grad.full_tensor() / 2 - wide
    messages = []
    for wrong in (
        {"weight": distribute_tensor(weight, mesh, [Shard(1)])},
        {"weight": distribute_tensor(weight, mesh, [Replicate()])},
        {"bias": bias},
        {"extras": ("entropy",)},
        {"accumulate_into": torch.zeros_like(weight)},
        {"targets": targets + VOCAB},
    ):
        given = {"weight": sharded, "targets": targets} | wrong
        with pytest.raises(ValueError) as caught:
            fp.linear_preference_loss(hidden, loss="sft", **given)
        messages.append(str(caught.value))
    return found | {"messages": messages}


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(tmp_path, world):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for name, case in CASES.items():
        losses, logps, dx, dw, db = zip(*(rank[name] for rank in ranks))
        loss, all_logps, dx_whole, dw_whole, db_whole = expected(case)
        tolerance, gradient_tolerance = (1e-6, 1e-6) if "dtype" not in case else (3e-3, 6e-3)
        if "tail" in case:
            gradient_tolerance = 6e-3
        assert all((rank["multiplied"][name] > 0) == ("tail" in case) for rank in ranks), name
        if name == "large logits":  # up to 1300, of which fp32 knows 2^-24, and so much of a probability
            gradient_tolerance = 1300 * 2.0**-24
        assert float(sum(losses)) == pytest.approx(float(loss), rel=tolerance), name
        for rank in range(world):
            assert distance(logps[rank], part(all_logps, rank, world)) < tolerance, name
            if not case.get("frozen_hidden"):
                assert distance(dx[rank], part(dx_whole, rank, world)) < gradient_tolerance, name
            if case.get("frozen"):
                assert dw[rank] is None and db[rank] is None
                continue
            assert torch.equal(dw[rank], dw[0])
            assert distance(dw[rank], dw_whole) < gradient_tolerance, name
            if case.get("bias"):
                assert distance(db[rank], db_whole) < 1e-6, name
    for found in (rank["checks"] for rank in ranks):
        sharded, whole = found["no grad"]
        assert distance(sharded, whole) < 1e-6
        finite = torch.ones(2 * PAIRS, LENGTH, dtype=torch.bool)
        finite[1, 2] = finite[4, 0] = False
        assert torch.equal(found["nan"], finite)
        assert all(float(x.abs().max()) == 0 for x in found["twice"])
        for message, text in zip(found["messages"], (
            "weight is a DTensor of placements S(1)", "weight is a DTensor of placements R; it takes one Shard(dim=0)",
            "bias is not sharded like weight", "extras is 'entropy'", "accumulate_into is given", "targets holds",
        ), strict=True):
            assert text in message
