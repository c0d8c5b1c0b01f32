"""Learning-rate schedules against their closed forms; who decays."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import make

from fastpref.train.optim import learning_rate, make_optimizer


def test_schedules(world, tmp_path):
    def rates(**changes):
        config = make(world, tmp_path, learning_rate=2.0, **changes)
        return [learning_rate(config, step, 10) for step in range(10)]

    assert rates(lr_scheduler_type="constant") == [2.0] * 10
    assert rates() == pytest.approx([2 * (1 - s / 10) for s in range(10)])
    warm = rates(warmup_steps=4)
    assert warm[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert warm[4:] == pytest.approx([2 * (1 - s / 6) for s in range(6)])
    assert rates(warmup_ratio=0.31, lr_scheduler_type="cosine")[4:] == pytest.approx(
        [1 + math.cos(math.pi * s / 6) for s in range(6)]
    )
    assert rates(warmup_steps=30)[-1] == pytest.approx(2 * 10 / 31)


def test_matrices_decay_and_vectors_do_not(world, tmp_path):
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3,)))
    optimizer = make_optimizer([vector, matrix], make(world, tmp_path, learning_rate=0.1, weight_decay=0.5))
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(vector, torch.ones(3))
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))
