"""A folder of a run is data: what several ranks wrote is read without running anything that it says."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from tiny import make
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from fastpref.errors import UserError
from fastpref.train import checkpoint
from fastpref.train.evaluate_run import evaluate_run
from fastpref.train.loop import train
from fastpref.train.scorer import load_scorer
from fastpref.train.shards import load_sharded_weights, read_sharded, sharded_metadata


class Runs:
    """What a pickle may hold: a call that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write(content, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder, no_dist=True)


def read_whole(folder):
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)  # noqa: S301 - our own


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run of several ranks that has not come to its end, as one process can make it."""
    folder = tmp_path_factory.mktemp("shards") / "run"
    train(make(world, folder, save_steps=2, save_total_limit=None))
    shutil.rmtree(folder / "model")
    (folder / "summary.json").unlink()
    saved = checkpoint.checkpoints(folder)[-1]
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    (saved / "checksums.txt").unlink(missing_ok=True)
    states = {f"optimizer.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in weights.items()}
    write({f"model.{name}": tensor for name, tensor in weights.items()} | states, saved / checkpoint.SHARDED)
    return folder


def test_what_describes_tensors_is_read(tmp_path):
    """Every dtype that weights and states of optimisers have, scalars, and a checkpoint of torch's own."""
    content = {f"model.{dtype}": torch.arange(4).to(dtype) for dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool)}
    content["optimizer.w.step"] = torch.tensor(3.0)
    write(content | {"other": {"not": "a tensor"}}, tmp_path)
    assert {key: tuple(it.size) for key, it in sharded_metadata(tmp_path).items()} == {
        key: tuple(tensor.shape) for key, tensor in content.items()
    }
    wanted = {key: torch.empty_like(tensor) for key, tensor in content.items()}
    read_sharded(wanted, tmp_path)
    assert all(torch.equal(wanted[key], content[key]) for key in content)


def test_nothing_in_a_run_folder_runs_code(world, run, tmp_path, quiet):
    crafted, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(run, crafted)
    folder = checkpoint.checkpoints(crafted)[-1] / checkpoint.SHARDED
    content = read_whole(folder)
    assert 0 < evaluate_run(crafted, display=quiet)["loss"] < 2
    content.storage_meta = Runs(marker)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    config = make(world, crafted, save_steps=2, save_total_limit=None)
    for read in (
        lambda: evaluate_run(crafted, display=quiet),
        lambda: train(config, resume=True, display=quiet),
        lambda: load_scorer(f"implicit:{crafted}"),
        lambda: load_scorer(f"implicit:{folder.parent}"),
    ):
        with pytest.raises(UserError, match=r"sharded/.metadata: cannot be read .it names posix.mkdir, which"):
            read()
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - it would have
    assert marker.exists()


def test_a_tensor_that_is_a_pickle_is_not_read(tmp_path):
    """What is no tensor is unpickled by torch's reader, unrestricted."""
    marker = tmp_path / "marker"
    write({"model.weight": Runs(marker)}, tmp_path / "saved")
    assert isinstance(read_whole(tmp_path / "saved").state_dict_metadata["model.weight"], BytesStorageMetadata)
    model = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match="weight is missing there"):
        load_sharded_weights(model, tmp_path / "saved")
    with pytest.raises(UserError, match="cannot be read"):
        read_sharded({"model.weight": model.weight.detach()}, tmp_path / "saved")
    assert not marker.exists()


def test_code_that_comes_with_a_model_is_asked_for_by_the_user(run, tmp_path, quiet):
    """Whoever gets a run's folder has not set the trust_remote_code in it."""
    crafted = tmp_path / "run"
    shutil.copytree(run, crafted)
    values = yaml.safe_load((crafted / "config.yaml").read_text())
    (crafted / "config.yaml").write_text(yaml.safe_dump(values | {"trust_remote_code": True}))
    line = r"config.yaml: trust_remote_code is true, for \S+; a folder of a run runs no code unasked: say"
    with pytest.raises(UserError, match=line):
        evaluate_run(crafted, display=quiet)
    with pytest.raises(UserError, match=line):
        load_scorer(f"implicit:{crafted}")
    assert evaluate_run(crafted, ["trust_remote_code=true"], quiet)["loss"] > 0
    load_scorer(f"implicit:{crafted}", trust_remote_code=True)
