"""Training on 2 and 3 ranks (gloo) is training on one: losses, weights, evaluation, checkpoints."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny import make, make_config, make_pairs, make_tokenizer, read_metrics, settings, write_rows
from transformers import LlamaForCausalLM

from fastpref.errors import SaveError, UserError
from fastpref.files import PARTIAL
from fastpref.train import checkpoint, ranks, sharding, stage
from fastpref.train.config import config_from_dict
from fastpref.train.display import Display
from fastpref.train.loop import Stopped, train
from fastpref.train.shards import load_sharded_weights

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
MEASURED = ("tokens_per_s", "scored_tokens_per_s", "saved_tokens_per_s", "peak_memory_mib",
            "rewards/accuracies")  # where the policy still is its reference: the sign of a rounding error


def runs(world):
    """Name -> what differs from `settings`. 3 micro-batches a step: of 2 ranks one idles in every second round."""
    dpo = {"gradient_accumulation_steps": 3, "packing": True, "eval_steps": 2, "save_steps": 2}
    stages = [{"loss": "sft", "max_steps": 2}, {"loss": "rpo", "eta": 0.1, "max_steps": 2}]
    kto = {"loss": "kto", "train_dataset": str(world / "kto.jsonl"), "eval_dataset": str(world / "kto.jsonl"),
           "gradient_accumulation_steps": 2}
    return {
        "stopped": dpo,
        "from one": dpo | {"max_tokens_per_batch": 90},
        "stages": dpo | {"stages": stages, "per_device_train_batch_size": 3},
        "kto, replicas": kto,
        "tied": {"model_name_or_path": str(world / "tied"), "gradient_accumulation_steps": 2},
        "bf16": {"dtype": "bfloat16", "optim": "adamw_fp32_master", "gradient_accumulation_steps": 2},
        "reward model": {"loss": "bradley_terry", "gradient_accumulation_steps": 3, "packing": True, "eval_steps": 2},
    }


def config_of(world, folder, name):
    copies = {"dp_replicate": 2} if "replicas" in name and ranks.size() > 1 else {}
    # At 1e-3 AdamW's first steps make 1e-6 of a weight out of what rounding does to its smallest gradients.
    values = settings(world, folder / name, learning_rate=1e-4, **runs(world)[name] | copies)
    return config_from_dict(values)


def quiet():
    return Display(Console(file=io.StringIO()))


def stop_after(step):
    """SIGTERM in this process, once that step is done."""
    own, steps = stage.train_step, iter(range(1, 99))

    def train_step(*args):
        values = own(*args)
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    stage.train_step = train_step
    return own


def work(rank, size, world, folder, names, resume=False):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    for name in names:
        train(config_of(world, folder, name), resume=resume or name == "from one", display=quiet())
    if not names:
        if rank == 1:  # one of the two hears of it
            stop_after(3)
        with pytest.raises(Stopped, match="stopped at dpo step 3/4, saved"):
            train(config_of(world, folder, "stopped"), display=quiet())
        with pytest.raises(UserError, match="--resume goes on with it"):  # of the first rank, on both
            train(config_of(world, folder, "stopped"), display=quiet())
        nodes_that_differ(rank, world, folder)
    dist.barrier()
    dist.destroy_process_group()


def nodes_that_differ(rank, world, folder):
    """The second has no data, no model, or other data: one error, the same on both, that names it."""
    where, node = f"^rank 1 on {socket.gethostname()}: ", folder / "node"
    if rank == 1:
        node.mkdir()
        shutil.copy(world / "heldout.jsonl", node / "many.jsonl")
        os.chdir(node)
    else:
        os.chdir(world)
        shutil.copy("train.jsonl", "many.jsonl")
    for changes, message in (({"train_dataset": "train.jsonl"}, f"{where}train.jsonl: no such file$"),
                             ({"eval_dataset": "heldout.jsonl"}, f"{where}heldout.jsonl: no such file$"),
                             ({"model_name_or_path": "./pretrained"}, f"{where}.*./pretrained"),
                             ({"train_dataset": "many.jsonl"}, "^rank 1 reads other examples than rank 0: train_data"),
                             ({"train_dataset": "none.jsonl"}, "^none.jsonl: no such file$")):
        with pytest.raises(ValueError, match=message):
            train(config_from_dict(settings(world, folder / "differ", gradient_accumulation_steps=2) | changes),
                  display=quiet())
    assert not (folder / "differ" / "config.yaml").exists()


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(a, b, tolerance=1e-6):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert float((other[name].double() - value.double()).norm() / value.double().norm()) < tolerance, (b, name)
    assert_same_values(read_metrics(a), read_metrics(b), tolerance)


def assert_same_values(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and (x["stage"], x["split"]) == (y["stage"], y["split"])
        for key in x.keys() - {"stage", "split", *MEASURED}:
            assert y[key] == pytest.approx(x[key], rel=5 * tolerance, abs=5 * tolerance), (x["step"], key)


def test_two_ranks_train_as_one(world, tmp_path):
    pairs = make_pairs(10, seed=4)
    rows = [{"prompt": p["prompt"], "completion": p[key], "label": key == "chosen"}
            for p in pairs for key in ("chosen", "rejected")]
    write_rows(world / "kto.jsonl", rows)
    torch.manual_seed(6)
    LlamaForCausalLM(make_config(tie_word_embeddings=True)).save_pretrained(world / "tied")
    make_tokenizer().save_pretrained(world / "tied")
    whole, folder = tmp_path / "whole", tmp_path / "ranks"
    names = ["from one", "stages", "kto, replicas", "tied", "bf16", "reward model"]
    for name in names:
        train(config_of(world, whole, name), display=quiet())
    own = stop_after(3)
    try:
        with pytest.raises(Stopped):
            train(config_of(world, folder, "from one"), display=quiet())
    finally:
        stage.train_step = own
    mp.spawn(work, (2, world, folder, names), nprocs=2)
    for name in names:
        assert_same_run(whole / name, folder / name, 5e-3 if name == "bf16" else 1e-6)
    a, b = load_file(world / "pretrained" / "model.safetensors"), weights(folder / "stages")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) > 1e-4  # it has trained
    assert LlamaForCausalLM.from_pretrained(folder / "tied" / "model").config.tie_word_embeddings
    saved = [[path.name for path in checkpoint.checkpoints(run / "stages")] for run in (whole, folder)]
    assert saved[0] == saved[1]


def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_three(world, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "ranks"
    train(config_of(world, whole, "stopped"), display=quiet())
    folder.mkdir()
    mp.spawn(work, (2, world, folder, []), nprocs=2)
    saved = checkpoint.checkpoints(folder / "stopped")[-1]
    assert saved.name == "00-dpo-00000003" and (saved / checkpoint.SHARDED / ".metadata").is_file()
    assert not list(folder.rglob(PARTIAL + "*"))
    alone = tmp_path / "alone"
    shutil.copytree(folder / "stopped", alone / "stopped")
    with pytest.raises(UserError, match=r"another model: model.embed_tokens.weight is \(261, 32\) there, \(300,"):
        other = make_config(vocab_size=300)
        other.save_pretrained(tmp_path / "other")
        load_sharded_weights(LlamaForCausalLM(other), saved / checkpoint.SHARDED)
    train(config_of(world, alone, "stopped"), resume=True, display=quiet())
    assert_same_run(whole / "stopped", alone / "stopped")
    mp.spawn(work, (3, world, folder, ["stopped"], True), nprocs=3)
    assert_same_run(whole / "stopped", folder / "stopped")


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (1, {"fsdp": True}, "fsdp is true, but this is one process alone: torchrun --nproc-per-node=GPUS"),
        (1, {"dp_replicate": 2}, "dp_replicate is 2, but this is one process alone"),
        (4, {"gradient_accumulation_steps": 2}, "4 ranks, but a step has 2 micro-batches .* a multiple of 4"),
        (2, {"fsdp": False}, "fsdp is false, but torchrun started 2 processes"),
        (4, {"dp_replicate": 3}, "dp_replicate is 3; it takes a divisor of the 4 ranks"),
        (2, {"dtype": "bfloat16", "dp_replicate": 2}, "optim adamw_torch_8bit rounds at random, and 2 copies of"),
        (2, {"use_peft": True, "loss": "bradley_terry"}, "use_peft: LoRA of a reward model trains on one GPU"),
    ],
)
def test_what_ranks_cannot_share_is_refused_at_once(world, tmp_path, monkeypatch, count, changes, message):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    config = make(world, tmp_path / "run", **{"gradient_accumulation_steps": 4} | changes)
    with pytest.raises(UserError, match=message) as caught:
        train(config, display=quiet())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists() and ranks.size() == 1


def test_restarts_over_nodes_take_a_store_that_is_not_shared(world, tmp_path, monkeypatch):
    """Its counts of restarts differ between nodes, and nothing else tells the attempts apart."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train(config_of(world, tmp_path, "stopped"), display=quiet())
    assert not (tmp_path / "stopped").exists() and ranks.size() == 1


def test_ranks_that_differ_are_named():
    same = {"torch": "2.13.0", "learning_rate": 1e-6}
    ranks._refuse_differing([same, dict(same)])
    with pytest.raises(UserError, match="learning_rate is 1e-06 on rank 0, and 1e-05 on rank 2: the ranks need"):
        ranks._refuse_differing([same, same, same | {"learning_rate": 1e-5}])
    with pytest.raises(UserError, match="triton is None on rank 0, and '3.7.0' on rank 1"):
        ranks._refuse_differing([same, same | {"triton": "3.7.0"}])


def test_a_roll_call_names_who_is_missing(monkeypatch):
    monkeypatch.setattr(ranks, "ROLL_CALL", 0.3)
    store = dist.HashStore()
    store.set("lost 2", "")
    said = ranks._roll_call(store, 0, 4, 60, "Connection closed by peer")
    assert said.startswith("ranks 1, 3 of 4 ended, or did not answer for 60 s (ddp_timeout)") and "Connection" in said
    assert ranks._roll_call(store, 1, 4, 60, "x").startswith("rank 3 of 4 ended")


def test_the_rank_that_keeps_the_store_is_gone(monkeypatch):
    class Gone:
        def set(self, name, value):
            raise dist.DistNetworkError("Connection reset by peer")

    assert ranks._roll_call(Gone(), 2, 3, 60, "x").startswith("rank 0 of 3 ended")


def processes(commands, **environment):
    """Started side by side as ranks of one run, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    its = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(commands)), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(Path(__file__).parents[2])} | environment
    return [subprocess.Popen([sys.executable, "-m", "fastpref", "train", *command], stderr=subprocess.PIPE, text=True,
                             stdout=subprocess.DEVNULL, env=os.environ | its | {"RANK": str(rank)})
            for rank, command in enumerate(commands)]


@pytest.mark.slow
def test_a_rank_that_is_silent_is_named(world, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(world, tmp_path, "stopped").to_dict() | {"max_steps": 2000,
                                                                                     "ddp_timeout": 8}))
    first, second = processes([[str(path)], [str(path)]])
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.is_file() and '"train"' in metrics.read_text()):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.2)
    second.send_signal(signal.SIGSTOP)
    said = first.communicate(timeout=90)[1]
    second.kill()
    assert first.returncode == 1 and "fastpref: rank 1 of 2 ended, or did not answer for 8 s (ddp_timeout)" in said


@pytest.mark.slow
def test_what_all_ranks_meet_is_said_by_the_first(world, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(world, tmp_path, "stopped").to_dict()))
    first, second = processes([[str(path)], [str(path), "learning_rate=0.5"]])
    said = [one.communicate(timeout=90)[1].splitlines()[-1] for one in (first, second)]
    line = "learning_rate is 0.0001 on rank 0, and 0.5 on rank 1: the ranks need the same versions and the same "
    assert said[0] == f"fastpref: {line}configuration" and said[1].startswith("fastpref: rank 1 on ")
    assert (first.returncode, second.returncode) == (2, 2) and not (tmp_path / "stopped").exists()


def full_disk(rank, size, world, folder):
    """The second rank cannot write its part of the first checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    own, before = sharding.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*given):
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            return own(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    sharding.save = save
    with pytest.raises(SaveError, match=f"^could not save {folder}/stopped/checkpoints: ") as caught:
        train(config_of(world, folder, "stopped"), display=quiet())
    assert "\n" not in str(caught.value) and not checkpoint.checkpoints(folder / "stopped")
    sharding.save = own
    train(config_of(world, folder, "stopped"), resume=True, display=quiet())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_full_disk_on_one_rank_loses_nothing(world, tmp_path):
    train(config_of(world, tmp_path / "whole", "stopped"), display=quiet())
    mp.spawn(full_disk, (2, world, tmp_path), nprocs=2)
    assert_same_run(tmp_path / "whole" / "stopped", tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob(PARTIAL + "*"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_torchrun_restarts_and_the_run_goes_on(world, tmp_path, where):
    train(config_of(world, tmp_path / "whole", "stopped"), display=quiet())
    path, marker = tmp_path / "config.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(config_of(world, tmp_path / "ranks", "stopped").to_dict()))
    script = Path(__file__).with_name("kill_a_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([*command, str(script), str(path), str(marker), where], capture_output=True, text=True,
                          env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists()
    assert_same_run(tmp_path / "whole" / "stopped", tmp_path / "ranks" / "stopped")
