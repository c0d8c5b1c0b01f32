"""The processes of one run under torchrun: who they are, how they share work, and what they agree on.

Every rank knows the whole data order, and so all counts of a step: nothing of that is communicated. Control (a signal,
an error of the first rank) goes over gloo between the hosts; a GPU never waits for it. Alone, all of this is nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from fastpref.errors import RankLost, UserError, first_line

from .config import TrainConfig
from .display import Display
from .machine import versions

T = TypeVar("T")
R = TypeVar("R")
LAUNCH = "torchrun --nproc-per-node=GPUS -m fastpref train CONFIG.yaml"
ROLL_CALL = 5.0  # seconds


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def started() -> int:
    """How many processes torchrun has started, whether they have joined yet or not."""
    return size() if size() > 1 else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def heard(display: Display | None) -> Iterator[Display]:
    """What shows a run on this rank: of the first one alone a word is heard."""
    if (rank() if size() > 1 else int(os.environ.get("RANK", "0"))) == 0:
        yield display or Display()
        return
    with Path(os.devnull).open("w") as nowhere:
        yield Display(Console(file=nowhere))


def check(config: TrainConfig) -> None:
    """Raises UserError for a configuration that the processes which were started cannot share."""
    for stage in config.stage_configs() if started() > 1 else ():
        _check(stage, started())


@contextmanager
def joined(config: TrainConfig, more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within it the processes that torchrun started are one run. Raises UserError, on every rank and before anything is
    read, for a configuration that they cannot share. more: what else must be the same on all of them."""
    here_already = size() > 1
    if started() == 1:
        if config.fsdp and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError(f"fsdp is true, but this is one process alone: {LAUNCH}")
        if config.dp_replicate > 1:
            raise UserError(f"dp_replicate is {config.dp_replicate}, but this is one process alone: {LAUNCH}")
        yield
        return
    check(config)
    if here_already:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise UserError(f"torchrun started more processes here than there are GPUs: --nproc-per-node={found}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, mine, count = _store_of_this_attempt()
    wait = timedelta(seconds=config.ddp_timeout)
    dist.init_process_group(backend, store=store, rank=mine, world_size=count, timeout=wait)
    try:
        _refuse_differing(told(versions() | config.to_dict() | dict(more or {})))
        yield
        # Only where all ranks come to the end: after an error on one of them torchrun ends the others.
        dist.barrier()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankLost(_roll_call(store, mine, count, config.ddp_timeout, first_line(error))) from error
    dist.destroy_process_group()


def _store_of_this_attempt() -> tuple[dist.Store, int, int]:
    """Where the ranks find each other, this one's number, and how many they are.

    torchrun's c10d rendezvous keeps one store over its restarts, in which the addresses of the processes that are gone
    still stand (pytorch issue 135712; torch 2.13): each attempt of a node that is alone gets a corner of its own. Over
    several nodes the counts of restarts differ, so torchrun must not share its store there."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UserError(f"torchrun --max-restarts={restarts} over several nodes: its restarts fail while it shares its "
                        "store (pytorch issue 135712); start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    store, mine, count = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared and restarts else "0"
    return dist.PrefixStore(f"fastpref attempt {attempt}", store), mine, count


def _refuse_differing(of_ranks: Sequence[dict[str, Any]]) -> None:
    """Versions and configurations; what every rank knows of all."""
    first = of_ranks[0]
    for other, found in enumerate(of_ranks):
        for name in first.keys() | found.keys():
            if first.get(name) != found.get(name):
                raise UserError(f"{name} is {first.get(name)!r} on rank 0, and {found.get(name)!r} on rank {other}: "
                                "the ranks need the same versions and the same configuration")


def _roll_call(store: dist.Store, mine: int, count: int, wait: float, why: str) -> str:
    """Which ranks do not say, within a few seconds, that they too have lost one."""
    missing = set(range(count)) - {mine}
    try:
        store.set(f"lost {mine}", "")
        end = time.monotonic() + min(ROLL_CALL, wait)
        while missing and time.monotonic() < end:
            missing = {other for other in missing if not store.check([f"lost {other}"])}
            time.sleep(0.1)
    except RuntimeError:
        missing = {0}  # that keeps the store
    names = ", ".join(map(str, sorted(missing)))
    who = f"rank{'s' * (len(missing) > 1)} {names} of {count}" if missing else f"a rank of {count}"
    return (f"{who} ended, or did not answer for {wait:g} s (ddp_timeout); what it said tells why, and --resume goes "
            f"on from the last checkpoint ({why})")


def _check(stage: TrainConfig, count: int) -> None:
    steps = stage.gradient_accumulation_steps
    if stage.fsdp is False:
        raise UserError(f"fsdp is false, but torchrun started {count} processes: leave it out, or start one without it")
    if count > steps:
        raise UserError(
            f"{count} ranks, but a step has {steps} micro-batch{'es' * (steps > 1)} (gradient_accumulation_steps, all "
            f"ranks together): set gradient_accumulation_steps to a multiple of {count}, or start at most {steps}"
        )
    if count % stage.dp_replicate:
        raise UserError(f"dp_replicate is {stage.dp_replicate}; it takes a divisor of the {count} ranks")
    whole = {
        "optim adamw_offload": stage.optimizer == "adamw_offload",
        "optim_in_backward": stage.optim_in_backward,
    }
    other = "adamw_fp32_master" if stage.dtype == "bfloat16" else "adamw_torch_fused"
    for name in (name for name, asked in whole.items() if asked):
        raise UserError(f"{name} cannot be sharded over {count} ranks: set optim={other}, which can")
    if stage.optimizer == "adamw_torch_8bit" and stage.dp_replicate > 1:
        raise UserError(f"optim adamw_torch_8bit rounds at random, and {stage.dp_replicate} copies of a model "
                        f"(dp_replicate) must not part: set optim={other}, or dp_replicate=1")
    if stage.use_peft and stage.reward_model:
        raise UserError(f"use_peft: LoRA of a reward model trains on one GPU, not sharded over {count} ranks; leave it "
                        "out, or torchrun")


# ---- agreement -------------------------------------------------------------------------------------------------------


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns, or raises, on the first rank, on all of them; the others do not run it."""
    if size() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = work()
        except Exception as error:  # noqa: BLE001 - raised again, everywhere
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def everywhere(work: Callable[[], T]) -> T:
    """What `work` returns here; what it raises on one rank is raised on all, with the rank's name where it is something
    that its node alone lacks (a file). It must not need the other ranks."""
    if size() == 1:
        return work()
    box: list[T] = []
    wrong: Exception | None = None
    try:
        box.append(work())
    except (ValueError, TypeError, OSError, ImportError) as error:
        wrong = error
        said: Exception | None = UserError(" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - raised below: the others are told
        wrong = said = error
    else:
        said = None
    of_ranks = enumerate(told((socket.gethostname(), said)))
    failed = [(other, host, found) for other, (host, found) in of_ranks if found is not None]
    if not failed:
        return box[0]
    other, host, first = failed[0]
    if wrong is not None and len({str(found) for _, _, found in failed}) == 1 and len(failed) == size():
        raise wrong
    if not isinstance(first, UserError):
        raise first
    raise UserError(f"rank {other} on {host}: {first}") from wrong


def told(mine: T) -> list[T]:
    """What every rank has, by rank, on all of them."""
    found: list[Any] = [mine] * size()
    if size() > 1:
        dist.all_gather_object(found, mine)
    return found


def in_turns(work: Callable[[], T]) -> T:
    """What `work` returns here; the ranks of a host do it one after another, so that what it takes of the host's memory
    for a while (a model on its way to the GPU) is there once. It must not need the other ranks."""
    if size() == 1:
        return work()
    mine, box = int(os.environ.get("LOCAL_RANK", rank())), list[T]()
    for turn in range(largest(mine) + 1):
        everywhere(lambda: box.append(work()) if turn == mine else None)  # noqa: B023 - called at once; all ranks wait here
    return box[0]


def largest(value: int) -> int:
    """Of all ranks."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def total(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of weights that every rank holds whole: the sum over all ranks, in one go. Those of shards are sums already."""
    whole = [p for p in parameters if not hasattr(p, "device_mesh")] if size() > 1 else []
    if whole:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
        sums = total(torch.cat([gradient.flatten() for gradient in gradients]))
        for p, part in zip(whole, sums.split([p.numel() for p in whole])):
            p.grad = part.view_as(p)


# ---- shares ----------------------------------------------------------------------------------------------------------


def share(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This rank's items of those that all know, the same number on each rank: the ranks of a sharded model run it
    together. Where the items run out a rank gets one of another's, and False: what comes of that does not count."""
    for start in range(0, len(items), size()):
        mine = start + rank()
        yield (items[mine], True) if mine < len(items) else (items[start], False)


def dealt(items: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Every item, and what `work` makes of it on one of the ranks; in their order, on all ranks. What it raises on one
    rank all raise."""
    for start in range(0, len(items), size()):
        part = items[start : start + size()]
        mine = everywhere(lambda: work(part[rank()]) if rank() < len(part) else None)  # noqa: B023 - called at once
        yield from zip(part, told(mine))  # type: ignore[arg-type]


def gathered(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Vectors of one `share` round, by rank; counts: their lengths, of the first ranks only if the items ran out."""
    if size() == 1:
        return [values]
    filled = values.new_zeros(max(counts))
    if rank() < len(counts):
        filled[: counts[rank()]] = values
    parts = [torch.empty_like(filled) for _ in range(size())]
    dist.all_gather(parts, filled)
    return [part[:count] for part, count in zip(parts, counts)]
