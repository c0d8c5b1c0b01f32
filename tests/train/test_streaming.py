"""A stream is read as far as the steps take it; what it trains, caches and resumes is what a data set of that would."""

from __future__ import annotations

import os
import signal
from itertools import count, islice

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make, make_pairs, read_metrics, write_rows

from fastpref.data import load_records, stream_records
from fastpref.errors import UserError
from fastpref.train import loop, reference, stage, stage_data
from fastpref.train.batch_order import BatchOrder
from fastpref.train.loop import Stopped, train
from fastpref.train.reference_cache import cache_reference

datasets = pytest.importorskip("datasets")


@pytest.fixture
def endless(monkeypatch):
    """`load_dataset` gives a stream without end; every third pair has equal responses, and is left out."""
    read = []

    def rows():
        for i in count():
            (row,) = make_pairs(1, seed=i)
            read.append(i)
            yield row if i % 3 != 2 else row | {"rejected": row["chosen"]}

    def load_dataset(path, **options):
        assert (path, options) == ("someone/pairs", {"streaming": True, "split": "train"})
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(stage_data, "STREAM_PART", 5)
    return read


STREAM = {"train_dataset": {"path": "someone/pairs", "split": "train"}, "dataset_streaming": True,
          "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}


def first(folder, usable):
    """The stream's records that hold so many usable ones, as a file."""
    rows = [row | ({"rejected": row["chosen"]} if i % 3 == 2 else {})
            for i, (row,) in enumerate(make_pairs(1, seed=i) for i in range(usable * 3 // 2))]
    return str(write_rows(folder / "first.jsonl", rows))


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(a, b):
    one, other = weights(a), weights(b)
    assert all(one[name].equal(other[name]) for name in one)
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert (x["step"], x["loss"]) == (y["step"], y["loss"])


def test_an_endless_stream_is_a_file_of_its_first_records(world, tmp_path, endless, quiet):
    """4 steps of 2 micro-batches of 3 pairs: 24 pairs."""
    train(make(world, tmp_path / "stream", **STREAM), display=quiet)
    assert len(endless) == 35  # in parts of 5; the 24th usable one is the last of them
    whole = STREAM | {"dataset_streaming": False, "train_dataset": first(tmp_path, 24)}
    train(make(world, tmp_path / "file", **whole), display=quiet)
    assert_same_run(tmp_path / "stream", tmp_path / "file")


@pytest.mark.parametrize("change", [{}, {"max_tokens_per_batch": 60, "packing": True}])
def test_as_much_as_the_steps_take(world, tmp_path, endless, quiet, change):
    """24 pairs, or 4 x 2 x 60 tokens: then no micro-batch lacks anything, whatever fills it."""
    config = make(world, tmp_path, **STREAM | ({"per_device_train_batch_size": None} if change else {}) | change)
    (data,) = stage_data.load_data([config], loop.load_tokenizer(config), quiet)
    tokens = [e.tokens(True) for e in data.train]
    if change:
        assert sum(tokens[:-1]) < 4 * 2 * 60 <= sum(tokens) and max(tokens) <= 60
    else:
        assert len(data.train) == 24
    schedule = BatchOrder(config, data.train, 0)
    assert all(len(schedule.of_step(step)[1]) == 2 for step in range(4)) and schedule.epoch(3) < 1
    source = STREAM | {"dataset_streaming": False, "train_dataset": first(tmp_path, len(data.train))}
    (whole,) = stage_data.load_data([make(world, tmp_path, **source)], loop.load_tokenizer(config), quiet)
    assert list(whole.train) == list(data.train)


def test_a_stopped_run_goes_on(world, tmp_path, endless, quiet, monkeypatch):
    train(make(world, tmp_path / "whole", **STREAM), display=quiet)
    own, steps = stage.train_step, count(1)

    def train_step(*args):
        values = own(*args)
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stage, "train_step", train_step)
        train(make(world, tmp_path / "run", **STREAM), display=quiet)
    train(make(world, tmp_path / "run", **STREAM), resume=True, display=quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_log_probs_are_looked_up_by_record(world, tmp_path, endless, quiet, monkeypatch):
    """A cache of two steps serves one step, and four with what is new."""
    computed = []
    own = reference.compute
    monkeypatch.setattr(reference, "compute", lambda policy, examples, *rest: computed.append(len(examples)) or own(
        policy, examples, *rest))
    shared = STREAM | {"reference_dir": str(tmp_path / "reference"), "eval_dataset": None}
    (path,) = cache_reference(make(world, tmp_path / "run", **shared, max_steps=2), quiet)
    assert computed == [12]
    train(make(world, tmp_path / "one", **shared, max_steps=1), display=quiet)
    assert computed == [12]
    train(make(world, tmp_path / "four", **shared), display=quiet)
    assert computed == [12, 12]
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("logps").shape == (24, 2) and '"records": "stream"' in file.metadata()["header"]
    train(make(world, tmp_path / "alone", **STREAM | {"eval_dataset": None}), display=quiet)
    assert computed == [12, 12, 24]
    for name, value in weights(tmp_path / "alone").items():  # batched otherwise in the reference's pass
        assert float((weights(tmp_path / "four")[name] - value).abs().max()) < 1e-6
    other = STREAM | {"reference_dir": str(tmp_path / "reference"), "dataset_streaming": False,
                      "train_dataset": first(tmp_path, 24)}
    with pytest.raises(UserError, match=r'records \("stream" there, "'):
        train(make(world, tmp_path / "file", **other), display=quiet)


def test_a_stream_that_ends_is_taken_again(world, tmp_path, quiet):
    """Of 5 pairs: an epoch has two steps of up to 4."""
    path = write_rows(tmp_path / "few.jsonl", make_pairs(5, seed=9))
    for name, streaming in (("file", False), ("stream", True)):
        train(make(world, tmp_path / name, train_dataset=str(path), dataset_streaming=streaming), display=quiet)
    assert_same_run(tmp_path / "file", tmp_path / "stream")


def test_files_are_read_no_further(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", make_pairs(3, seed=1))
    with path.open("a") as file:
        file.write("not JSON\n")
    stream = stream_records([str(path), str(path)])
    assert [r.chosen for r in islice(stream, 3)] == [row["chosen"] for row in make_pairs(3, seed=1)]
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: not valid JSON"):
        next(stream)
    with pytest.raises(ValueError, match=r"pairs.jsonl:4: not valid JSON"):
        load_records(str(path))


def test_a_stream_that_breaks_off_says_where(monkeypatch):
    def rows():
        yield make_pairs(1, seed=0)[0]
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(datasets, "load_dataset", lambda **options: rows())
    stream = stream_records("someone/pairs")
    next(stream)
    with pytest.raises(ValueError, match="someone/pairs: cannot be read beyond record 1 .the hub is away"):
        next(stream)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "dataset_streaming reads as much of train_dataset as max_steps take: set max_steps"),
        ({"loss": "kto"}, "dataset_streaming: loss 'kto' pairs each prompt with another one's completion"),
        ({"max_tokens_per_batch": 12, "packing": True}, "record 1: prompt and responses are .*_tokens_per_batch=12"),
    ],
)
def test_what_a_stream_cannot_is_refused_at_once(world, tmp_path, endless, quiet, changes, message):
    with pytest.raises(UserError, match=message):
        train(make(world, tmp_path / "run", **STREAM | changes), display=quiet)
    assert not (tmp_path / "run" / "model").exists()


def test_a_stream_of_nothing(world, tmp_path, quiet):
    path = write_rows(tmp_path / "none.jsonl", [])
    with pytest.raises(UserError, match="none.jsonl': the stream has no records"):
        train(make(world, tmp_path / "run", train_dataset=str(path), dataset_streaming=True), display=quiet)
    rows = [row | {"rejected": row["chosen"]} for row in make_pairs(3, seed=1)]
    write_rows(path, rows)
    with pytest.raises(UserError, match=r"none of the 3 records is usable .3 chosen equals rejected"):
        train(make(world, tmp_path / "run", train_dataset=str(path), dataset_streaming=True), display=quiet)
