"""The examples run and learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plain_pytorch", "transformers_trainer"])
def test_it_learns(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example finds its model and data wherever it is called from
    found = load(name).main(steps=60, batch_size=4, learning_rate=1e-3)
    assert sum(found[-len(found) // 3 :]) / len(found[-len(found) // 3 :]) < 0.9 * found[0]
    assert not list(tmp_path.iterdir())
