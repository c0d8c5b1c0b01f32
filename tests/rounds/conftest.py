"""The tiny model of the training tests, pretrained a little, with a verifier that it can learn from."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # tiny

from tiny import make_config, make_pairs, make_tokenizer, write_rows  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from fastpref.train.display import Display  # noqa: E402

CHECKS = '''
import time


def smooth(prompt, response):
    """Something to be learnt, with few ties."""
    return sum(ord(c) % 7 for c in response) / max(len(response), 1)


def broken(prompt, response):
    raise ValueError("no judge today")


def moody(prompt, response):
    if sum(map(ord, response)) % 4 == 0:
        raise ValueError("a quarter of them")
    if sum(map(ord, response)) % 4 == 1:
        return float("nan")
    return smooth(prompt, response)


def equal(prompt, response):
    return 1.0


def slow(prompt, response):
    time.sleep(0.02)
    return smooth(prompt, response)
'''


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitwise comparisons, and a shared machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrained/ (random weights), train.jsonl (22 pairs), heldout.jsonl (9 pairs), checks.py (scorers)."""
    folder = tmp_path_factory.mktemp("rounds")
    make_tokenizer().save_pretrained(folder / "pretrained")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config(hidden_size=16, intermediate_size=24)).save_pretrained(folder / "pretrained")
    write_rows(folder / "train.jsonl", make_pairs(22, seed=1))
    write_rows(folder / "heldout.jsonl", make_pairs(9, seed=2))
    (folder / "checks.py").write_text(CHECKS)
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer's module is looked for in the folder that the command was called in."""
    monkeypatch.chdir(world)


@pytest.fixture
def quiet() -> Display:
    """A display whose lines are in `.console.file`."""
    return Display(Console(file=io.StringIO(), width=500))
