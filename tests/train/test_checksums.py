"""A flipped byte in a checkpoint or a model of a run is found, and named, before anything goes on from it."""

from __future__ import annotations

import io
import shutil
import zlib
from pathlib import Path

import pytest
from rich.console import Console
from tiny import make

from fastpref.errors import UserError
from fastpref.files import read_checksums
from fastpref.train import checkpoint
from fastpref.train.display import Display
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import train
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.reference_cache import cache_reference
from fastpref.train.scorer import load_scorer


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def copied(run, tmp_path, name):
    return Path(shutil.copytree(run, tmp_path / name))


@pytest.fixture(scope="module")
def ended(world, tmp_path_factory):
    """A run that was ended after its third step: a checkpoint, and no model yet."""
    folder = tmp_path_factory.mktemp("checksums") / "run"
    train(make(world, folder, save_steps=3), display=Display(Console(file=io.StringIO())))
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    return folder


def test_a_flipped_byte_in_any_file_is_found_and_named(world, ended, tmp_path, quiet):
    listed = read_checksums(checkpoint.checkpoints(ended)[-1])
    for name, crc in listed.items():
        assert crc == f"{zlib.crc32((checkpoint.checkpoints(ended)[-1] / name).read_bytes()):08x}"
    assert listed.keys() >= {"model.safetensors", "optimizer.pt", "state.json", "config.json", "tokenizer.json"}
    for name in [*listed, "checksums.txt"]:
        run = copied(ended, tmp_path, name)
        saved = checkpoint.checkpoints(run)[-1]
        flip(saved / name, (saved / name).stat().st_size // 2)
        for read in (
            lambda run=run: train(make(world, run, save_steps=3), resume=True, display=quiet),
            lambda run=run: evaluate_run(run, display=quiet),
            lambda run=run: load_scorer(f"implicit:{run}"),
            lambda saved=saved: load_policy(make(world, tmp_path), load_tokenizer(make(world, tmp_path)), saved),
        ):
            with pytest.raises(UserError, match=f"^{saved / name}: is (damaged|not what was saved)") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_and_a_checkpoint_without_checksums(world, ended, tmp_path):
    run = copied(ended, tmp_path, "run")
    saved = checkpoint.checkpoints(run)[-1]
    (saved / "generation_config.json").unlink()
    with pytest.raises(UserError, match="generation_config.json: is not what was saved .*; put it back, or delete"):
        evaluate_run(run)
    (saved / "checksums.txt").unlink()
    said = Display(Console(file=io.StringIO()))
    train(make(world, run, save_steps=3), resume=True, display=said)
    assert f"{saved}: has no checksums (an older version wrote it)" in said.console.file.getvalue()
    assert read_checksums(run / "model").keys() >= {"model.safetensors", "config.json"}


def test_a_reference_and_a_starting_model_are_compared_too(world, ended, tmp_path, quiet):
    """A model folder of a run, where it is read for another one: by train, cache-ref and as a reference."""
    run = copied(ended, tmp_path, "run")
    train(make(world, run, save_steps=3), resume=True, display=quiet)
    flip(run / "model" / "model.safetensors")
    line = f"^{run / 'model' / 'model.safetensors'}: is not what was saved"
    for changes in ({"model_name_or_path": str(run / "model")}, {"ref_model_name_or_path": str(run / "model")}):
        with pytest.raises(UserError, match=line):
            cache_reference(make(world, tmp_path / "other", **changes), quiet)
    with pytest.raises(UserError, match=line):
        evaluate_run(run, display=quiet)
