"""Rounds on 2 and 3 ranks (gloo) are those of one process: what is sampled, scored, paired, trained, written."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from completions_server import serving
from rich.console import Console
from safetensors.torch import load_file
from small import lines, make, settings
from test_rounds_resume import SETTINGS, same
from test_served import Weights, letters  # noqa: F401 - a fixture
from tiny import make_config, make_tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from fastpref.errors import SaveError, UserError
from fastpref.rounds import collect, driver
from fastpref.rounds.driver import rounds
from fastpref.rounds.dry_run import dry_run
from fastpref.train import ranks, scorer, stage
from fastpref.train.display import Display
from fastpref.train.loop import Stopped
from fastpref.train.sample import InMemory

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def config_of(world, run_dir, **changes):
    # learning_rate: as in test_ranks.py
    values = dict(learning_rate=1e-4, per_device_train_batch_size=1, gradient_accumulation_steps=3, save_steps=1,
                  eval_dataset=str(world / "heldout.jsonl"), eval_num_generations=2, eval_prompts=5)
    return make(world, run_dir, **values | changes)


def quiet():
    return Display(Console(file=io.StringIO()))


def count(module, name, seen):
    own = getattr(module, name)
    setattr(module, name, lambda self, *given, **named: seen.append(name) or own(self, *given, **named))


def on_rank(rank, size, work, world, folder, *given):
    os.chdir(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    work(rank, world, folder, *given)
    dist.barrier()
    dist.destroy_process_group()


def both(rank, world, folder):
    seen = []
    count(InMemory, "generate", seen)
    count(scorer.FunctionScorer, "_one", seen)
    rounds(config_of(world, folder / "ranks", **GREEDY), display=quiet())
    (folder / f"seen{rank}.json").write_text(json.dumps([seen.count("generate"), seen.count("_one")]))
    if rank == 1:
        os.chdir(folder)  # where there are scorers, and no data
    with pytest.raises(UserError, match="^rank 1 on .*train.jsonl") as caught:
        rounds(config_of(world, folder / "other", prompts="train.jsonl", eval_dataset=None), display=quiet())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="2 ranks, but a round has 1 prompt .rounds.prompts_per_round.: raise it, or "):
        rounds(config_of(world, folder / "other", prompts_per_round=1, eval_dataset=None), display=quiet())


GREEDY = {"eval_generate": True, "eval_generate_samples": 5, "eval_max_new_tokens": 4}


def assert_same_rounds(one, other, base=None):
    """The first round to the byte, before its training; the rest up to rounding in another order."""
    for name in ("start/evaluation.jsonl", "round-001/responses.jsonl", "round-001/pairs.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert a["model"] == b["model"] and len(a["rounds"]) == len(b["rounds"])
    for x, y in zip(a["rounds"], b["rounds"]):
        assert x["counts"] == y["counts"] and x["reward"] == pytest.approx(y["reward"])
        assert x["best_of_n"] == [pytest.approx(values) for values in y["best_of_n"]]
        assert x.get("after") == pytest.approx(y.get("after"), rel=5e-6, abs=5e-6)  # as in test_ranks.py
    x, y = (weights(run / a["model"], base) for run in (one, other))
    for name, value in x.items():
        assert float((y[name] - value).norm() / value.norm()) < 1e-6, name


def weights(model, base):
    """In fp64; with an adapter merged into those of the base, as in test_ranks_light.py."""
    found = {name: value.double() for name, value in load_file(next(model.glob("*.safetensors"))).items()}
    if not (its := model / "adapter_config.json").is_file():
        return found
    of_base, settled = load_file(base / "model.safetensors"), json.loads(its.read_text())
    scale = settled["lora_alpha"] / settled["r"]
    names = [name.removesuffix(".lora_A.weight") for name in found if "lora_A" in name]
    return {name: of_base[f"{name.removeprefix('base_model.model.')}.weight"].double()
            + scale * found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] for name in names}


def test_two_ranks_are_one_process(world, tmp_path):
    (tmp_path / "checks.py").write_text((world / "checks.py").read_text())
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(InMemory, "generate", InMemory.generate)
        patch.setattr(scorer.FunctionScorer, "_one", scorer.FunctionScorer._one)
        count(InMemory, "generate", seen)
        count(scorer.FunctionScorer, "_one", seen)
        rounds(config_of(world, tmp_path / "one", **GREEDY), display=quiet())
    mp.spawn(on_rank, (2, both, world, tmp_path), nprocs=2)
    assert_same_rounds(tmp_path / "one", tmp_path / "ranks")
    shares = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)]
    assert [sum(share) for share in zip(*shares)] == [seen.count("generate"), seen.count("_one")]
    assert min(shares[1]) >= 0.3 * min(shares[0]) > 0  # they have shared it
    assert not (tmp_path / "other/config.yaml").exists()


def test_what_ranks_cannot_do_is_refused_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for changes, message in (
        ({}, "4 ranks, but a step has 3 micro-batches"),
        ({"engine": "vllm", "gradient_accumulation_steps": 4}, "samples in one process, and torchrun started 4: leave"),
        ({"prompts_per_round": 3, "gradient_accumulation_steps": 4}, "4 ranks, but a round has 3 prompts"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run(config_of(world, tmp_path / "run", **changes), quiet())
        if "prompts_per_round" not in changes:
            with pytest.raises(UserError, match=message):
                ranks.check(config_of(world, tmp_path / "run", **changes).train)
                driver.takes_vllm(config_of(world, tmp_path / "run", **changes))
    shown = quiet()
    dry_run(config_of(world, tmp_path / "run", gradient_accumulation_steps=4), shown)
    said = " ".join(shown.console.file.getvalue().split())
    assert "a round's responses are 3 batches, so 1 of 4 ranks have none to sample: lower " in said
    assert "rounds.generation_batch_size to 4" in said
    assert not (tmp_path / "run").exists()


# ---- slow ------------------------------------------------------------------------------------------------------------


def stop_at_step(step):
    own, steps = stage.train_step, iter(range(1, 99))

    def train_step(*given):
        values = own(*given)
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    stage.train_step = train_step


def part_of(rank, world, folder, changes):
    """Two ranks until one of them is asked to stop, in the middle of the second round; three up to the third."""
    config = config_of(world, folder / "parts", **changes)
    own, two = driver.run_round, ranks.size() == 2

    def run_round(session, number):
        if two and number == 2 and rank == 1:
            stop_at_step(1)
        if not two and number == 3:
            raise KeyboardInterrupt
        own(session, number)

    driver.run_round = run_round
    with pytest.raises(Stopped if two else KeyboardInterrupt, match="stopped at dpo .*round-002" if two else None):
        rounds(config, resume=not two, display=quiet())


VARIANTS = {
    "one schedule": {},
    "reference": {"pairing": "policy_reference", "schedule": "round"},
    "initial": {"start_from": "initial", "reference": "previous"},
    "lora": {"use_peft": True, "lora_dropout": 0.0},
    "reward model": {"scorer": "reward"},
    "implicit": {"scorer": "implicit"},
    "tied": {"model_name_or_path": "tied"},
    "samples": {"sample_steps": 1, "sample_time_share": None, "scorer": "checks:smooth"},
}


@pytest.fixture(scope="module")
def judges(world):
    """reward/: a reward model of random weights; warm/: a run whose implicit reward scores."""
    from fastpref.train.config import config_from_dict
    from fastpref.train.loop import train

    torch.manual_seed(3)
    tied = LlamaForCausalLM(make_config(hidden_size=16, intermediate_size=24, tie_word_embeddings=True))
    for model in (tied, make_tokenizer()):
        model.save_pretrained(world / "tied")
    config = make_config(hidden_size=16, intermediate_size=24, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(world / "reward")
    make_tokenizer().save_pretrained(world / "reward")
    values = settings(world, world / "warm", learning_rate=1e-2, max_steps=3)
    del values["rounds"]
    train(config_from_dict(values), display=quiet())
    return {"reward": str(world / "reward"), "implicit": f"implicit:{world / 'warm'}"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_then_three_then_one(world, tmp_path, judges, name):
    changes = {"number": 3} | VARIANTS[name]
    changes["scorer"] = judges.get(changes.get("scorer"), "checks:smooth")
    rounds(config_of(world, tmp_path / "one", **changes), display=quiet())
    mp.spawn(on_rank, (2, part_of, world, tmp_path, changes), nprocs=2)
    mp.spawn(on_rank, (3, part_of, world, tmp_path, changes), nprocs=3)
    rounds(config_of(world, tmp_path / "parts", **changes), resume=True, display=quiet())
    assert_same_rounds(tmp_path / "one", tmp_path / "parts", world / "pretrained")


def over_server(rank, world, folder, url):
    rounds(config_of(world, folder / "ranks", sampler=f"openai:{url}"), display=quiet())


@pytest.mark.slow
def test_one_rank_speaks_with_the_server(world, letters, tmp_path):  # noqa: F811
    (letters / "checks.py").write_text((world / "checks.py").read_text())
    asked = []
    for name in ("one", "ranks"):
        with serving(Weights()) as server:
            if name == "one":
                rounds(config_of(letters, tmp_path / name, sampler=f"openai:{server.url}"), display=quiet())
            else:
                mp.spawn(on_rank, (2, over_server, letters, tmp_path, server.url), nprocs=2)
            asked.append(len(server.requests))
    assert asked[0] == asked[1]
    assert_same_rounds(tmp_path / "one", tmp_path / "ranks")


def full_disk(rank, world, folder):
    config, own, calls = config_of(world, folder / "ranks"), collect._append, iter(range(99))

    def append(path, rows):
        if next(calls) == 2:
            with path.open("ab") as file:
                file.write(rows[0].encode()[:20])  # half a line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(path, rows)

    collect._append = append
    with pytest.raises(SaveError, match="could not write .*jsonl: No space left"):  # on both
        rounds(config, display=quiet())
    collect._append = own
    rounds(config, resume=True, display=quiet())


@pytest.mark.slow
def test_a_full_disk_loses_nothing(world, tmp_path):
    rounds(config_of(world, tmp_path / "one"), display=quiet())
    mp.spawn(on_rank, (2, full_disk, world, tmp_path), nprocs=2)
    assert_same_rounds(tmp_path / "one", tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("changes", [{}, {"start_from": "initial", "reference": "previous"}], ids=str)
def test_ranks_killed_at_any_moment_go_on_bitwise(world, tmp_path, changes):
    """Each attempt SIGKILLs one of the ranks (kill_rounds.py), torchrun starts both again."""
    changes = SETTINGS | {"gradient_accumulation_steps": 2, "eval_dataset": str(world / "heldout.jsonl")} | changes
    kills, script = 6, Path(__file__).with_name("kill_rounds.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    for name, restarts in (("whole", 0), ("parts", kills)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(world, tmp_path / name, **changes)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                   f"--max-restarts={restarts}", str(script), str(path), str(restarts), "5"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=world)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("SIGKILL, by its own hand") >= 4
    same(tmp_path / "whole", tmp_path / "parts")
    assert lines(tmp_path / "parts/round-003/pairs.jsonl")
