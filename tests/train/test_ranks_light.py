"""What fits more model into less memory, on 2 and 3 ranks (gloo): 8-bit moments and LoRA are those of one process."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_ranks import assert_same_values, quiet
from tiny import make, make_config, make_tokenizer, read_metrics
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import LlamaForCausalLM

from fastpref.errors import UserError
from fastpref.train import checkpoint, ranks
from fastpref.train.config import TrainConfig
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import train
from fastpref.train.optim import check_shards, make_optimizer

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
COMMON = {"gradient_accumulation_steps": 3, "learning_rate": 1e-4, "save_steps": 2, "save_total_limit": None}
EIGHT = COMMON | {"optim": "adamw_torch_8bit", "eval_dataset": None}
RUNS = {
    "8 bit": EIGHT,
    "bf16, 8 bit": EIGHT | {"dtype": "bfloat16"},
    "lora": COMMON | {"use_peft": True, "lora_dropout": 0.0, "eval_steps": 2, "packing": True},
    "lora, gone on": COMMON | {"use_peft": True, "lora_dropout": 0.0, "eval_steps": 2},
    "lora on bf16": COMMON | {"use_peft": True, "lora_dropout": 0.0, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def wide(world):
    """Rows of 256 numbers, as many as share a scale in 8 bits; a vocabulary that 2 and 3 do not divide."""
    torch.manual_seed(6)
    LlamaForCausalLM(make_config(hidden_size=256, intermediate_size=256)).save_pretrained(world / "wide")
    make_tokenizer().save_pretrained(world / "wide")
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(world / "wide"), lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(world / "wide adapter")
    return world


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step, 15 s a shape on a CPU; the same Python does without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def config_of(world, folder, name):
    model = world / ("wide adapter" if name == "lora, gone on" else "wide")
    return make(world, folder / name, model_name_or_path=str(model), **RUNS[name])


def work(rank, size, world, folder, names, resume=False):
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    if not resume:
        moments_of_shards(size)
        one_after_another(rank, size)
    for name in names:
        train(config_of(world, folder, name), resume=resume, display=quiet())
    dist.barrier()
    dist.destroy_process_group()


def moments_of_shards(size):
    """Of the same gradients the same moments and weights, bit by bit."""
    mesh = init_device_mesh("cpu", (size,))
    gen = torch.Generator().manual_seed(0)
    settings = TrainConfig(model_name_or_path="m", output_dir="o", train_dataset="d", optim="adamw_torch_8bit",
                           learning_rate=1e-3)
    whole = [torch.nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((23, 512), (300,), (8, 96))]
    shards = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    one, other = (make_optimizer({str(i): p for i, p in enumerate(ps)}, settings) for ps in (whole, shards))
    for _ in range(3):
        for p, q in zip(whole, shards):
            p.grad = torch.randn(p.shape, generator=gen)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        one.step()
        other.step()
    assert [hasattr(one.state[p]["exp_avg"], "codes") for p in whole] == [True, False, False]
    for p, q in zip(whole, shards):
        assert q.full_tensor().equal(p)
    codes = other.state[shards[0]]["exp_avg_sq"].to_local().codes
    begin = dist.get_rank() * -(-23 // size)
    assert codes.equal(one.state[whole[0]]["exp_avg_sq"].codes[begin : begin + len(codes)]) and len(codes) > 0


def one_after_another(rank, size):
    """No two ranks work at once; an error of one is raised on all, with its name, and holds nobody up."""

    def work():
        begun = time.monotonic()
        time.sleep(0.1)
        return begun, time.monotonic()

    def fails():
        if rank == 1:
            raise UserError("of rank 1")

    every = [None] * size
    dist.all_gather_object(every, ranks.in_turns(work))
    spans = sorted(every)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    with pytest.raises(UserError, match="^rank 1 on .+: of rank 1$"):
        ranks.in_turns(fails)


def weights(run):
    """With an adapter merged into those that it adapts."""
    (path,) = (run / "model").glob("*model.safetensors")
    found = load_file(path)
    if not (run / "model" / "adapter_config.json").is_file():
        return found
    pairs = {name: (found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"])
             for name in (key.removesuffix(".lora_A.weight") for key in found if "lora_A" in key)}
    assert len(pairs) == 14 and 2 * len(pairs) == len(found)  # 7 linear layers in each of two
    base = load_file(run.parents[1] / "wide.safetensors")
    scale = 2  # lora_alpha / lora_r
    return {name: base[f"{name.removeprefix('base_model.model.')}.weight"] + scale * b @ a
            for name, (a, b) in pairs.items()}


def assert_same_run(a, b, tolerance=1e-6, of_values=None):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = float((other[name].double() - value.double()).norm())
        assert difference <= tolerance * float(value.double().norm()), (b, name)
    assert_same_values(read_metrics(a), read_metrics(b), of_values or tolerance)


def test_two_ranks_train_as_one(wide, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "ranks"
    folder.mkdir()
    shutil.copy(wide / "wide" / "model.safetensors", tmp_path / "wide.safetensors")
    names = ["bf16, 8 bit", "lora", "lora, gone on"]
    for name in names:
        train(config_of(wide, whole, name), display=quiet())
    mp.spawn(work, (2, wide, folder, names), nprocs=2)
    for name in names[1:]:
        assert_same_run(whole / name, folder / name)
    # rounded at random, one way and another: 2^-8 of a weight, four times
    assert_same_run(whole / names[0], folder / names[0], 2**-6, of_values=5e-3)
    adapter = load_file(folder / "lora" / "model" / "adapter_model.safetensors")
    assert min(float(p.abs().max()) for name, p in adapter.items() if "lora_B" in name) > 1e-4
    for name in names:
        saved = [[path.name for path in checkpoint.checkpoints(run / name)] for run in (whole, folder)]
        assert saved[0] == saved[1]
        shutil.rmtree(folder / name / "reference")  # loaded again by one process, it is the ranks' reference
        found = evaluate_run(folder / name, [f"eval_dataset={wide / 'heldout.jsonl'}"], quiet())
        expected = evaluate_run(whole / name, [f"eval_dataset={wide / 'heldout.jsonl'}"], quiet())
        assert found["rewards/margins"] == pytest.approx(expected["rewards/margins"], abs=1e-2 if "8" in name else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8 bit", "lora", "lora on bf16"])
def test_checkpoints_go_on_on_other_numbers_of_ranks(wide, tmp_path, name):
    """From one to two, from two to one and to three."""
    shutil.copy(wide / "wide" / "model.safetensors", tmp_path / "wide.safetensors")
    train(config_of(wide, tmp_path / "1", name), display=quiet())
    (tmp_path / "2").mkdir()
    mp.spawn(work, (2, wide, tmp_path / "2", [name]), nprocs=2)
    for before, count in (("1", 2), ("2", 1), ("2", 3)):
        folder = tmp_path / f"{before} to {count}"
        shutil.copytree(tmp_path / before / name, folder / name)
        shutil.rmtree(folder / name / "model")
        (folder / name / "summary.json").unlink()
        for path in checkpoint.checkpoints(folder / name):
            if not path.name.endswith("00000002"):
                shutil.rmtree(path)
        if count == 1:
            train(config_of(wide, folder, name), resume=True, display=quiet())
        else:
            mp.spawn(work, (count, wide, folder, [name], True), nprocs=count)
        # a moment between two of the 8-bit codes goes to either, for the last bit of its gradient
        assert_same_run(tmp_path / "1" / name, folder / name, {"8 bit": 1e-5, "lora": 1e-6}.get(name, 2e-2))


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((128, 384), 2, "a row of some.weight is 384 numbers, no multiple of the 256 that share a scale"),
        ((17, 256), 16, "some.weight has 17 rows, which leave one of 16 ranks without any"),
        ((8, 256), 16, None),  # too small to be quantised
        ((16, 256), 16, None),
        ((8192,), 3, None),
    ],
)
def test_8_bit_moments_are_cut_at_blocks(shape, count, message):
    parameters = {"some.weight": torch.nn.Parameter(torch.zeros(shape))}
    if message is None:
        check_shards(parameters, count)
        return
    with pytest.raises(UserError, match=f"optim adamw_torch_8bit cannot be sharded here: {message}; set optim="):
        check_shards(parameters, count)
