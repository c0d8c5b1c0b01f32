"""DistributedDataParallel around a module whose forward is the fused loss: the gradients are all-reduced (gloo)."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import fastpref as fp

HIDDEN, VOCAB, PAIRS, LENGTH = 16, 211, 4, 9


class Model(torch.nn.Module):
    """A trunk and a head; the loss is inside forward, which is what DDP hooks into."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(HIDDEN, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB)

    def forward(self, inputs, targets, ref_logps, totals=None):
        return fp.linear_preference_loss(
            self.trunk(inputs).tanh(), self.head.weight, targets, bias=self.head.bias,
            loss=fp.RPO(sft="tokens", eta=0.3), ref_logps=ref_logps, totals=totals,
        ).loss


def batch():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * PAIRS, LENGTH, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    return inputs, targets, torch.randn(2 * PAIRS, generator=generator) - 30


def part(tensor, rank):
    """Every second pair: chosen halves and rejected halves stay in order."""
    return torch.cat([half[rank::2] for half in tensor.chunk(2)])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    inputs, targets, ref_logps = batch()
    scored = targets != -100
    # DDP averages over ranks: each loss is divided by the global counts over the number of ranks.
    totals = fp.Totals(2 * PAIRS / 2, scored.sum() / 2, scored[:PAIRS].sum() / 2)
    model = DistributedDataParallel(Model())
    model(part(inputs, rank), part(targets, rank), part(ref_logps, rank), totals).backward()
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    del model  # its reducer holds on to the group, whose threads must end before the interpreter does
    gc.collect()
    dist.barrier()  # a rank that leaves early closes connections the other still reads, and gloo aborts
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_gradients_are_those_of_the_whole_batch(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    model = Model()
    model(*batch()).backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, parameter in model.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], parameter.grad, rtol=1e-4, atol=1e-7)
