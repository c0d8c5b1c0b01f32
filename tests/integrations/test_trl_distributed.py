"""Two processes (gloo, on the CPU): the fused trainers do what TRL's do, number by number, under DDP and FSDP2."""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

# trainer, wrapper, model, options; evaluation on a number of rows that no batch divides
CASES = {
    "ddp dpo": ("dpo", "ddp", "llama", {"loss_type": ["ipo", "aot"], "eval_rows": 5}),
    "ddp kto": ("kto", "ddp", "tied", {"eval_rows": 7}),
    "fsdp2 dpo": ("dpo", "fsdp2", "llama", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "fsdp2 kto": ("kto", "fsdp2", "gemma2", {"gradient_checkpointing": False, "eval_rows": 4}),
    "fsdp2 dpo, bf16": ("dpo", "fsdp2", "tied", {"bf16": True}),
}
PATCHED = "fsdp2 dpo"  # run once more, by TRL's trainer under patch()
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def cases_of(wrapper: str) -> list[str]:
    return [name for name, case in CASES.items() if case[1] == wrapper]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def work(rank: int, folder: str, port: int, wrapper: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": f"{folder}/cache",
    }
    from fastpref.integrations.trl import FusedDPOTrainer, FusedKTOTrainer, patch, unpatch

    classes = {"dpo": (trl.DPOTrainer, FusedDPOTrainer), "kto": (trl.KTOTrainer, FusedKTOTrainer)}
    for case in cases_of(wrapper):
        trainer = CASES[case][0]
        theirs, ours = classes[trainer]
        run(theirs, case, rank, f"{folder}/{case} theirs {rank}")
        if case == PATCHED:
            patch()
            run(theirs, case, rank, f"{folder}/{case} patched {rank}")
            unpatch()
        run(ours, case, rank, f"{folder}/{case} ours {rank}")
    dist.barrier()  # a rank that leaves early closes connections the other still reads, and gloo aborts
    dist.destroy_process_group()


def run(cls: type, case: str, rank: int, name: str) -> None:
    from accelerate.state import DistributedType, PartialState

    from tests.integrations import trl_world as world

    trainer, wrapper, kind, given = CASES[case]
    given = {
        "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "per_device_train_batch_size": 2, "ddp_backend": "gloo",
        "output_dir": tempfile.mkdtemp(),
    } | given
    if rows := given.pop("eval_rows", 0):
        given["eval_dataset"] = (world.pairs if trainer == "dpo" else world.unpaired)(rows, 2)
        given |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 2}
    os.environ |= dict.fromkeys(FSDP2, "") | {"ACCELERATE_USE_FSDP": "false"} if wrapper == "ddp" else FSDP2

    def made(*args, **kwargs):
        config = real(*args, **kwargs)
        assert config.device.type == "cpu"
        if wrapper == "fsdp2":
            # accelerate shards on accelerators alone; what it shards, gathers and reduces is the same here
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return config

    real, world.arguments = world.arguments, made
    try:
        make = world.make_dpo if trainer == "dpo" else world.make_kto
        folder = given.pop("output_dir")
        trained = make(cls, Path(folder), world.make_model(kind), **given)
        trained.train()
    finally:
        world.arguments = real
    expected = {"ddp": "DistributedDataParallel", "fsdp2": f"FSDP{type(world.make_model(kind)).__name__}"}
    assert type(trained.model_wrapped).__name__ == expected[wrapper]
    weights = {n: p.detach() for n, p in trained.model.named_parameters()}
    # an evaluation leaves the last layers of FSDP2 gathered
    torch.save({n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}, f"{name}.pt")
    Path(f"{name}.json").write_text(json.dumps(world.history(trained)))
    del trained
    gc.collect()  # a reducer holds on to the group, whose threads must end before the interpreter does


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> Path:
    """The folder where two processes left what all cases of one wrapper gave."""
    folder = tmp_path_factory.mktemp(request.param)
    mp.spawn(work, (str(folder), free_port(), request.param), nprocs=2)
    return folder


@pytest.mark.parametrize("case", cases_of("ddp"))
@pytest.mark.parametrize("results", ["ddp"], indirect=True)
def test_ddp_is_trls(case, results):
    compare(case, "ours", results)


@pytest.mark.slow
@pytest.mark.parametrize("case, side", [*((case, "ours") for case in cases_of("fsdp2")), (PATCHED, "patched")])
@pytest.mark.parametrize("results", ["fsdp2"], indirect=True)
def test_fsdp2_is_trls(case, side, results):
    compare(case, side, results)


def compare(case: str, side: str, results: Path) -> None:
    from tests.integrations.trl_world import assert_same_entries, make_model

    _, _, kind, given = CASES[case]
    rough = "bf16" in given  # under which FSDP2 rounds all that a forward returns
    mine, other, its = (
        torch.load(results / f"{case} {name}.pt", weights_only=True) for name in (f"{side} 0", f"{side} 1", "theirs 0")
    )
    first = dict(make_model(kind).named_parameters())
    assert any((mine[name] - value).abs().max() > 1e-3 for name, value in first.items())
    for name, value in mine.items():
        assert torch.equal(value, other[name])
        torch.testing.assert_close(value, its[name], rtol=0, atol=1e-2 if rough else 2e-6)
    entries = [json.loads((results / f"{case} {name} 0.json").read_text()) for name in (side, "theirs")]
    assert_same_entries(*entries, tolerance=5e-2 if rough else 1e-5)
