"""A model of a few thousand weights, its tokenizer and a few pairs: everything a training test needs, in one folder."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import make_config, make_pairs, make_tokenizer, write_rows
from transformers import LlamaForCausalLM

from fastpref.train.display import Display


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitwise comparisons, and a shared machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config/ (no weights), pretrained/ (random weights), train.jsonl (22 pairs), heldout.jsonl (9 pairs)."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, config = make_tokenizer(), make_config()
    for name in ("config", "pretrained"):
        tokenizer.save_pretrained(folder / name)
    config.save_pretrained(folder / "config")
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder / "pretrained")
    write_rows(folder / "train.jsonl", make_pairs(22, seed=1))
    write_rows(folder / "heldout.jsonl", make_pairs(9, seed=2))
    return folder


@pytest.fixture
def quiet() -> Display:
    """A display that writes nowhere."""
    return Display(Console(file=io.StringIO()))
