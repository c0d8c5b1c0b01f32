"""Every loss through `linear_preference_loss`, in fp64, against the naive path: all logits, autograd over the batch.

In a budget that holds the batch, and in one that no pair of the longest fits: its gradients are then added up before
the loss knows its scalars (or, coupled over the batch, every row is multiplied twice).
"""

from __future__ import annotations

import pytest
import torch

import fastpref as fp
from fastpref.losses import SequenceLogps, Totals
from tests import oracle
from tests.losses.zoo import LOSSES, loss_id

LENGTHS = [150, 40, 30, 140, 30, 50]


@pytest.fixture(scope="module")
def batch():
    return oracle.make_batch(LENGTHS, hidden_size=6, vocab=150, dtype=torch.float64)


def inputs_of(loss, logps):
    """What the call takes, and the oracle."""
    gen = torch.Generator().manual_seed(1)
    given, known = {}, {}
    if loss.needs_reference:
        given["ref_logps"] = known["ref_logps"] = logps + 4 * torch.randn(6, generator=gen, dtype=torch.float64)
    if loss.needs_desirable:
        given["desirable"] = known["desirable"] = torch.arange(6) % 3 != 1
    if loss.needs_kl:
        given["kl_logps"], given["ref_kl_logps"] = torch.tensor([-20.0, -10.0]), torch.tensor([-21.0, -10.5])
        known["kl"] = torch.tensor(0.75)
    return given, known


def too_long(schedule):
    """Whether the longest sequence, or its pair, does not fit and the last one does; or nothing less than the batch."""
    if schedule.problem.coupling == "batch":
        return schedule.scheme == "recompute"
    return schedule.scheme == "groups" and schedule.groups[0].long and not schedule.groups[-1].long


def tight_budget(problem):
    """The largest for which the plan is such a one."""
    for budget in range(800_000, 0, -4_000):
        if too_long(fp.plan(problem, budget)):
            return budget
    raise AssertionError(problem)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "token_weights"])
@pytest.mark.parametrize("tight", [False, True], ids=["whole", "tight"])
@pytest.mark.parametrize("loss", LOSSES, ids=loss_id)
def test_against_the_naive_path(loss, tight, weighted, batch, monkeypatch):
    made = oracle.record(monkeypatch, fp.plan)
    scored = batch.targets != oracle.IGNORE
    weights = fp.tail_weights(scored, 0.5).double() if weighted else None
    tokens = oracle.token_logps(batch.hidden, batch.weight, batch.targets, batch.bias)
    p = oracle.full_logits(batch.hidden, batch.weight, batch.bias).softmax(-1)
    extras = {"log_sum_p2": torch.where(scored, p.square().sum(-1).log(), 0).sum(1)}
    given, known = inputs_of(loss, tokens.sum(1))

    def exact(logps, lengths):
        return loss(SequenceLogps(
            logps, lengths, Totals(6, sum(LENGTHS), sum(LENGTHS[:3])), extras=extras, unweighted=tokens.sum(1), **known
        ))

    expected = oracle.head_and_loss(*batch[:3], exact, bias=batch.bias, token_weights=weights)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]

    def call(budget):
        return fp.linear_preference_loss(
            leaves[0], leaves[1], batch.targets, bias=leaves[2], loss=loss, token_weights=weights,
            memory_budget=budget, **given,
        )

    out = call(None)
    schedule = made[-1]
    assert schedule.scheme == "groups" and len(schedule.groups) == 1
    if tight:
        out = call(tight_budget(schedule.problem))
        assert too_long(made[-1])
        assert made[-1].problem.scratches == (2 if loss.pairwise and not loss.antisymmetric else 1)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-11, abs=1e-13)
    for got, truth in zip(torch.autograd.grad(out.loss, leaves), expected[3:], strict=True):
        assert oracle.relative(got, truth) < 1e-10


def test_losses_compile(batch):
    """They are carried into the graph as strings; one function for all, so that options change between graphs."""

    def call(hidden, loss, given):
        return fp.linear_preference_loss(hidden, batch.weight, batch.targets, loss=loss, **given).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for loss in ("nca_pair", fp.DPO(0.1), fp.DPO(0.2), fp.SimPO(), fp.BCO(), fp.WPO(), fp.WeightedSum()):
        made = fp.get_loss(loss) if isinstance(loss, str) else loss
        given, _ = inputs_of(made, torch.full((6,), -300.0, dtype=torch.float64))
        hidden = batch.hidden.clone().requires_grad_()
        eager = torch.autograd.grad(call(hidden, loss, given), hidden)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(hidden, loss, given), hidden)[0], eager)
