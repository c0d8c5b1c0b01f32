"""Memory kept between calls on the CPU: never in two tensors, reused, bounded, given back on request."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastpref as fp
from fastpref import workspace
from fastpref.plan import KEPT, MIB, Problem, plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    fp.release_workspaces()
    yield
    fp.release_workspaces()


def block(mib, dtype=torch.float32):
    return workspace.empty((mib, MIB // dtype.itemsize), dtype, CPU)


def test_memory_of_a_tensor_that_is_gone_is_used_again_and_that_of_a_living_one_never():
    first = block(8)
    assert first.shape == (8, MIB // 4) and first.is_contiguous() and not first._is_view()
    at, row = first.data_ptr(), first[3]
    assert block(8).data_ptr() != at
    del first
    assert block(8).data_ptr() != at  # a view of it lives
    del row
    again = block(7, torch.bfloat16)
    assert again.data_ptr() == at and again.dtype == torch.bfloat16
    assert block(2).data_ptr() != at and workspace.empty((3,), torch.float32, torch.device("meta")).is_meta


def test_what_is_kept_is_bounded_and_released(monkeypatch):
    monkeypatch.setattr(workspace, "KEPT", 40 * MIB)
    for size in (8, 9, 12, 20, 20):  # one that is too small goes for a larger one
        block(size)
    assert workspace.kept_bytes() == 20 * MIB
    held = [block(size) for size in (20, 12, 12, 12)]
    assert workspace.kept_bytes() == 56 * MIB  # in use
    del held
    block(30)  # of the five no more than 40 MiB in all stay
    assert workspace.kept_bytes() <= 40 * MIB
    block(64)
    assert workspace.kept_bytes() <= 40 * MIB  # larger than all that is kept: it is not
    fp.release_workspaces()
    assert workspace.kept_bytes() == 0


def test_released_while_in_use_it_lives_as_long_as_its_tensor():
    x = block(8).fill_(3.0)
    fp.release_workspaces()
    y = block(8).fill_(5.0)
    assert (x == 3).all() and (y == 5).all()


def test_threads_share_none():
    def fill(number):
        for _ in range(20):
            x = block(4).fill_(number)
            assert (x == number).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    assert workspace.kept_bytes() <= 32 * MIB  # a thread holds the last one while it makes the next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_reuse_stash_and_gradient_and_change_no_bit(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(8, 48, 256).to(dtype).requires_grad_()
    weight = (torch.randn(12000, 256) / 16).to(dtype).requires_grad_()
    targets = torch.randint(0, 12000, (8, 48))

    def step():
        hidden.grad = weight.grad = None
        fp.linear_preference_loss(hidden, weight, targets, ref_logps=torch.zeros(8)).loss.backward()
        return weight.grad.data_ptr(), weight.grad.clone(), hidden.grad.clone()

    first, second = step(), step()
    kept = workspace.kept_bytes()
    assert second[0] == first[0]  # autograd took the tensor over, and once it was gone its memory came back
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    before = weight.grad
    third = step()  # somebody holds the last gradient
    assert third[0] != first[0] and torch.equal(before, first[1])
    size = dtype.itemsize
    told = plan(Problem((48,) * 8, 256, 12000, size, size, size, scratches=1)).kept_bytes
    assert 0.9 * told <= kept <= told


def test_the_plan_counts_it():
    llama = dict(hidden=4096, vocab=128256)
    assert "kept         up to 1024.0 MiB between calls" in str(plan(Problem((512,) * 8, **llama)))
    assert plan(Problem((512,) * 8, **llama, device="cuda")).kept_bytes == 0
    small = plan(Problem((4, 4), 8, 100, 4, 4, 4))
    assert small.kept_bytes == small.bytes + 100 * 8 * 4 < KEPT
