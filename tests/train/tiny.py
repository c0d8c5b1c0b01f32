"""What training tests are made of: a tokenizer, a model configuration, pairs, and run configurations over them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fastpref.train.config import TrainConfig, config_from_dict
from fastpref.train.metrics_log import MetricsLog


def make_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, BOS first."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words |= {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 3)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def make_config(**changes: Any) -> LlamaConfig:
    sizes = dict(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    return LlamaConfig(**(sizes | changes))


def make_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Copy a word (chosen), or shout it (rejected)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choice("abcdef") for _ in range(rng.randint(2, 6)))
        row = {"prompt": f"{word}:", "chosen": f" {word}", "rejected": f" {word.upper()}", "answer": word}
        rows.append(row | {"task": "long" if len(word) > 4 else "short"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(world: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as a YAML file would give it."""
    values = {
        "model_name_or_path": str(world / "pretrained"),
        "train_dataset": str(world / "train.jsonl"),
        "eval_dataset": str(world / "heldout.jsonl"),
        "output_dir": str(run_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 64,
        "logging_steps": 2,
        "max_steps": 4,
        "packing": False,  # most tests make padded batches for the model themselves; test_packing.py is about the rest
    }
    return values | changes


def make(world: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    return config_from_dict(settings(world, run_dir, **changes))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in it ends, as by Ctrl-C, with its line of training step `step`."""
    write = MetricsLog.write

    def stops(self: MetricsLog, stage: str, split: str, at: int, *rest: Any) -> None:
        write(self, stage, split, at, *rest)
        if split == "train" and at == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MetricsLog, "write", stops)
        yield
