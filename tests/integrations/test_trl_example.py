"""The TRL example runs, learns, and leaves nothing behind."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_dpo.py"


def test_it_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # no telemetry
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLE))["main"](steps=60, batch_size=4, learning_rate=1e-3)
    assert len(found) == 6 and found[-1] < 0.8 * found[0]
    assert not list(tmp_path.iterdir())
