"""Reference log-probs: what is cached, when it is used again, and that LoRA's reference is the adapter switched off."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make, make_pairs, read_metrics, settings, write_rows

from fastpref.data import batch_order, collate, load_records, tokenize_records
from fastpref.errors import UserError
from fastpref.files import FileLock
from fastpref.train import reference, reference_cache
from fastpref.train.display import Display
from fastpref.train.loop import train
from fastpref.train.model import Policy, load_policy, load_tokenizer
from fastpref.train.reference_cache import cache_reference


def tick(done, of):
    pass


@pytest.fixture
def parts(world, tmp_path):
    config = make(world, tmp_path)
    tokenizer = load_tokenizer(config)
    return config, tokenizer, load_policy(config, tokenizer), load_records(config.train_dataset)


def test_each_examples_log_probs_in_its_place(parts):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "pair", max_length=64)
    found = reference.compute(policy, examples, "pair", 5, 0, tick)
    alone = [policy.sequence_logps(collate([e], 0)).tolist() for e in examples]
    assert torch.allclose(found.logps, torch.tensor(alone), atol=1e-5)
    attached = found.attach(examples)
    assert attached[3].ref_logps == tuple(found.logps[3].tolist()) and attached[3].prompt_ids == examples[3].prompt_ids


def test_mismatched_sequences_of_every_micro_batch(parts):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    batches = batch_order([e.length for e in examples], 3, seed=1, epoch=0)
    batches.append([0, 1])  # the two sides of one pair: one prompt, so nothing to mismatch
    found = reference.compute(policy, examples, "kto", 5, 0, tick, [[batch] for batch in batches])
    assert found.logps.shape == (len(examples), 1)
    for i, batch in enumerate(batches):
        kl = collate([examples[j] for j in sorted(batch)], 0, "kto").kl  # whatever the order of the batch
        if kl is None:
            assert len(found.of_batch(i)) == 0
        else:
            expected = dict(zip(sorted(batch), policy.sequence_logps(kl).tolist(), strict=True))
            assert found.of_batch(i).tolist() == pytest.approx([expected[j] for j in batch], abs=1e-5)
    assert len(found.of_batch(len(batches) - 1)) == 0


def test_the_file_is_used_only_under_the_same_header(parts, tmp_path):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "pair", max_length=64)
    found = reference.compute(policy, examples, "pair", 5, 0, tick)

    def header(weights="w", dtype=torch.float32, examples=examples, **changes):
        values = make(config_world(config), tmp_path, **changes)
        return reference.header_of(values, tokenizer, dtype, weights, examples, None)

    path = tmp_path / "reference" / "r.safetensors"
    assert reference.read(path, header()) is None
    reference.write(path, header(), found, [e.content_hash for e in examples])
    again = reference.read(path, header())
    assert again is not None and torch.equal(again.logps, found.logps)
    for other in (
        header(weights="x"),
        header(dtype=torch.bfloat16),
        header(examples=examples[::-1]),
        header(max_length=63),
        header(ref_model_name_or_path="other"),
    ):
        assert reference.read(path, other) is None
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["header"])["weights"] == "w"
        assert bytes(file.get_tensor("hashes")[2].tolist()).hex() == examples[2].content_hash
    path.write_bytes(path.read_bytes()[:100])
    assert reference.read(path, header()) is None


def config_world(config):
    return Path(config.model_name_or_path).parent


def test_loras_reference_is_the_adapter_switched_off(world, tmp_path):
    config = make(world, tmp_path, use_peft=True, lora_dropout=0.5)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    assert all("lora" in name for name in policy.trainable())
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    policy.model.train()
    found = reference.compute(policy, examples, "pair", 4, 0, tick)  # dropout is off in it
    assert policy.model.training
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    moved = reference.compute(policy, examples, "pair", 4, 0, tick)
    with policy.model.disable_adapter():
        off = reference.compute(policy, examples, "pair", 4, 0, tick)
    assert torch.equal(off.logps, found.logps)
    assert not torch.allclose(moved.logps, found.logps, atol=1e-2)


# ---- fastpref cache-ref ----------------------------------------------------------------------------------------------


def test_cached_before_and_used_by_training(world, tmp_path, quiet, monkeypatch):
    shared = str(tmp_path / "cache")
    changes = {"loss": "kto", "learning_rate": 1e-2}
    train(make(world, tmp_path / "plain", **changes), display=quiet)
    files = cache_reference(make(world, tmp_path / "a", reference_dir=shared, **changes), quiet)
    assert [path.name for path in files] == ["00-kto-train.safetensors", "00-kto-eval.safetensors"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(path.name for path in files)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "compute", lambda *args: pytest.fail("computed again"))
        for run in "ab":  # another run may share the files
            train(make(world, tmp_path / run, reference_dir=shared, **changes), display=quiet)
    assert [row["loss"] for row in read_metrics(tmp_path / "a")] == [
        row["loss"] for row in read_metrics(tmp_path / "plain")
    ]
    assert not (tmp_path / "a" / "reference").exists()


def test_another_header_is_refused_by_name(world, tmp_path, quiet):
    cache_reference(make(world, tmp_path), quiet)
    config = make(world, tmp_path, max_length=60, model_name_or_path=str(world / "config"), init_from_config=True)
    for attempt in (cache_reference, train):
        with pytest.raises(UserError) as caught:
            attempt(config, display=quiet)
        message = str(caught.value)
        assert "00-dpo-train.safetensors: holds reference log-probs of something else: model (" in message
        assert 'truncation ([64, null, "keep_end", "error"] there, [60, null' in message and "weights (" in message
        assert "\n" not in message and "revision" not in message
    train(make(world, tmp_path, max_length=60, max_steps=1, overwrite_output_dir=True), display=quiet)


def test_a_run_of_few_steps_references_what_they_take(world, tmp_path, quiet):
    """Two steps of four pairs, of 40: 8 are scored, and the run is the one whose reference was computed whole. More
    steps add to the same file."""
    write_rows(tmp_path / "many.jsonl", make_pairs(40, seed=5))
    few = {"train_dataset": str(tmp_path / "many.jsonl"), "max_steps": 2, "logging_steps": 1}
    rows = {}
    for name in ("part", "whole"):
        config = make(world, tmp_path / name, **few, reference_dir=str(tmp_path / f"{name}-reference"))
        if name == "whole":
            cache_reference(dataclasses.replace(config, max_steps=-1, output_dir=str(tmp_path / "other")), quiet)
        train(config, display=quiet)
        rows[name] = [[row[key] for key in ("loss", "rewards/margins", "grad_norm")] for row in
                      read_metrics(tmp_path / name) if row["split"] == "train"]
    assert len(rows["part"]) == 2
    for part, whole in zip(rows["part"], rows["whole"]):
        assert part == pytest.approx(whole, rel=1e-4, abs=1e-5)
    path = tmp_path / "part-reference" / "00-dpo-train-part.safetensors"
    assert load_file(path)["logps"].shape == (8, 2) and not path.with_name("00-dpo-train.safetensors").exists()
    whole = load_file(tmp_path / "whole-reference" / "00-dpo-train.safetensors")
    place = {bytes(code): row for code, row in zip(whole["hashes"].tolist(), whole["logps"])}
    part = load_file(path)
    for code, row in zip(part["hashes"].tolist(), part["logps"]):
        assert torch.allclose(row, place[bytes(code)], rtol=0, atol=1e-5)
    train(make(world, tmp_path / "more", **few | {"max_steps": 3}, reference_dir=str(path.parent)), display=quiet)
    assert load_file(path)["logps"].shape == (12, 2)


def test_nothing_to_cache(world, tmp_path, quiet):
    with pytest.raises(UserError, match="nothing to cache: no loss here has a reference"):
        cache_reference(make(world, tmp_path, loss="sft"), quiet)
    stages = [{"loss": "sft"}, {"loss": "dpo"}]
    with pytest.raises(UserError, match="nothing to cache: each reference is what the stage before ends with"):
        cache_reference(make(world, tmp_path, stages=stages), quiet)
    named = [{"loss": "sft"}, {"loss": "dpo", "ref_model_name_or_path": str(world / "pretrained")}]
    assert [path.name for path in cache_reference(make(world, tmp_path, stages=named), quiet)] == [
        "01-dpo-train.safetensors", "01-dpo-eval.safetensors",
    ]


@pytest.mark.parametrize("torn", [False, True])
def test_an_ended_pass_goes_on_where_it_was(parts, tmp_path, monkeypatch, torn):
    config, tokenizer, policy, records = parts
    examples, _ = tokenize_records(records, tokenizer, "kto", max_length=64)
    batches = batch_order([e.length for e in examples], 6, seed=1, epoch=0)
    whole = reference.compute(policy, examples, "kto", 6, 0, tick, [batches])
    calls = []
    own = Policy.sequence_logps
    monkeypatch.setattr(Policy, "sequence_logps", lambda self, batch: calls.append(0) or own(self, batch))
    monkeypatch.setattr(reference.Progress, "EVERY", 2)

    def stop_at(step):
        def stop(done, of):
            if done == step:
                raise KeyboardInterrupt

        return stop

    path, passes = tmp_path / "r.safetensors", 2 * len(batches)
    for stops_at in (3, len(batches) + 1):  # in the log-probs, then in the mismatched ones
        with pytest.raises(KeyboardInterrupt):
            progress = reference.Progress(path, {"weights": "w"}, 6, "padded")
            reference.compute(policy, examples, "kto", 6, 0, stop_at(stops_at), [batches], progress)
    lost = 0
    if torn:  # the machine went down in the middle of a number: the chunk it belongs to is computed again
        content = progress.path.read_bytes()
        progress.path.write_bytes(content[:-2])
        lost = 2
    assert len(calls) == len(batches) + 1
    progress = reference.Progress(path, {"weights": "w"}, 6, "padded")
    again = reference.compute(policy, examples, "kto", 6, 0, tick, [batches], progress)
    assert len(calls) == passes + lost and progress.restored > 0
    assert torch.equal(again.logps, whole.logps) and torch.equal(again.kl, whole.kl)
    progress.discard()
    assert not progress.path.exists()
    other = reference.Progress(path, {"weights": "x"}, 6, "padded")
    assert other.take(1) is None


# ---- a folder that several runs share --------------------------------------------------------------------------------


def cached(folder):
    (path,) = folder.glob("*-train.safetensors")
    return load_file(path)["logps"]


def test_two_runs_killed_again_and_again_share_one_right_file(world, tmp_path, quiet):
    """Every one of its log-probs is what is computed alone: none is a hole, or another's."""
    write_rows(tmp_path / "many.jsonl", make_pairs(250, seed=3))
    changes = {"train_dataset": str(tmp_path / "many.jsonl"), "eval_dataset": None, "per_device_eval_batch_size": 2,
               "max_steps": 63}
    cache_reference(make(world, tmp_path / "alone", **changes), quiet)
    shared = tmp_path / "shared"
    values = settings(world, tmp_path, reference_dir=str(shared), **changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    script = Path(__file__).with_name("kill_and_share.py")
    command = [sys.executable, str(script), str(tmp_path / "run.yaml"), "5", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and int(done.stdout) >= 5, done.stderr[-2000:]
    assert torch.equal(cached(shared), cached(tmp_path / "alone" / "reference"))
    assert [path.name for path in shared.iterdir()] == ["00-dpo-train.safetensors"]


def stored(path, count, whose="w"):
    """A file of progress that holds 0, 1, ..., in chunks of four."""
    progress = reference.Progress(path, {"weights": whose}, 6, "padded")
    for start in range(0, count, 4):
        progress.add(torch.arange(start, start + 4.0))
        progress.flush()
    return progress.path


def read_back(path):
    progress = reference.Progress(path, {"weights": "w"}, 6, "padded")
    return [found.tolist() for found in iter(lambda: progress.take(4), None)]


def test_nothing_is_read_that_was_not_stored(tmp_path):
    """A hole, a flipped bit, another run's chunk, one in the wrong place: what is before them stays."""
    path = tmp_path / "r.safetensors"
    whole, size = stored(path, 12).read_bytes(), reference.Progress.CHUNK.size + 16
    chunks = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert read_back(path) == chunks and len(whole) == 3 * size
    other = stored(tmp_path / "other", 8, whose="x").read_bytes()
    flipped = bytearray(whole)
    flipped[2 * size - 1] ^= 1
    for content in (
        whole[:size] + bytes(size) + whole[2 * size :],  # two wrote with seek and truncate
        whole[:size] + whole[2 * size :],
        whole[:size] + other[size:] + whole[2 * size :],
        bytes(flipped),
        whole[: 2 * size - 1],
    ):
        path.with_suffix(".progress").write_bytes(content)
        assert read_back(path) == chunks[:1]
    progress = reference.Progress(path, {"weights": "w"}, 6, "padded")  # goes on from there
    assert progress.take(4) is not None and progress.take(4) is None
    progress.add(torch.arange(4.0, 8))
    progress.flush()
    assert read_back(path) == chunks[:2] and progress.path.read_bytes() == whole[: 2 * size]


def test_a_damaged_file_is_computed_again(world, tmp_path):
    said = Display(Console(file=io.StringIO()))
    config = make(world, tmp_path, eval_dataset=None)
    (path,) = cache_reference(config, said)
    whole, found, right = path.read_bytes(), load_file(path), cached(path.parent)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    cache_reference(config, said)
    assert torch.equal(cached(path.parent), right)
    assert f"{path}: damaged; computed again" in said.console.file.getvalue()
    found["logps"][3] = 0.0
    with safe_open(path, framework="pt") as file:
        save_file(found, path, metadata={"header": file.metadata()["header"]})  # as an older version left a hole
    cache_reference(config, said)
    assert torch.equal(cached(path.parent), right) and bool(right.all())


def test_waits_for_the_run_that_holds_the_lock(world, tmp_path, monkeypatch):
    said = Display(Console(file=io.StringIO()))
    (path,) = cache_reference(make(world, tmp_path / "first", eval_dataset=None), said)
    shared = tmp_path / "shared" / path.name
    other, looks = FileLock(shared.with_suffix(".lock")), []

    def meanwhile(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            path.rename(shared)
            other.release()

    assert other.take() == ""
    monkeypatch.setattr(reference_cache.time, "sleep", meanwhile)
    monkeypatch.setattr(reference, "compute", lambda *args: pytest.fail("computed again"))
    cache_reference(make(world, tmp_path / "second", eval_dataset=None, reference_dir=str(shared.parent)), said)
    text = said.console.file.getvalue()
    assert text.count("waiting for") == 1 and len(looks) == 3
    assert re.search(rf"waiting for {shared}, which process {os.getpid()} on \S+ computes\n", text)
    assert [found.name for found in shared.parent.iterdir()] == [path.name]


def test_a_file_system_without_locks(world, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = Display(Console(file=io.StringIO()))
    with pytest.warns(UserWarning, match="no lock to be had there .No locks available."):
        (path,) = cache_reference(make(world, tmp_path, eval_dataset=None), said)
    assert f"{path}: no lock to be had there (No locks available): runs that start" in said.console.file.getvalue()
    assert len(cached(path.parent)) == 22
