"""`fastpref preview CONFIG [n]`: the first records as training sees them, token by token.

What is shown comes out of `tokenize_records`, as what is trained on does, so it cannot be something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Invalid, Kind, Record, stream_records, tokenize_records
from fastpref.data.chat import common_length
from fastpref.errors import UserError

from .config import TrainConfig
from .display import Display
from .model import load_tokenizer
from .rendering import dated
from .stage_data import data_options

STYLES = {"prompt": "dim", "scored": "green", "end": "bold magenta", "other": "yellow", "cut": "red"}
WHOLE = 1 << 30  # a length that cuts nothing


@dataclass(frozen=True)
class Part:
    """A token, or a note of those that were cut where it stands."""

    text: str
    style: str  # of STYLES

    @property
    def shown(self) -> str:
        return f"[{self.text}]" if self.style in ("scored", "end") else self.text


def preview(config: TrainConfig, records: int = 3, display: Display | None = None) -> None:
    """Shows so many records of every stage's train_dataset. Raises UserError as `train` does."""
    console = (display or Display()).console
    if records < 1:
        raise UserError(f"n is {records}; it takes at least 1")
    tokenizer = load_tokenizer(config)
    seen: set[str] = set()
    for stage in dated(config, tokenizer).stage_configs():
        options = data_options(stage)
        if (key := repr((stage.train_dataset, stage.kind, options))) in seen:
            continue  # as the stage before
        seen.add(key)
        invalid = Invalid() if stage.invalid_records == "drop" else None
        stream = stream_records(stage.train_dataset, streaming=stage.dataset_streaming, invalid=invalid)
        first = list(islice(stream, records))
        console.print(Text(f"{stage.name}: {stage.train_dataset}", "bold"))
        show(console, first, tokenizer, stage.kind, options, invalid)


def show(console: Console, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, kind: Kind,
         options: dict[str, Any], invalid: Invalid | None = None) -> None:
    """options: of `tokenize_records`."""
    examples, report = tokenize_records(records, tokenizer, kind, partial=True, invalid=invalid, **options)
    uncut = options | {"max_length": WHOLE, "max_prompt_length": None}
    whole, _ = tokenize_records(records, tokenizer, kind, partial=True, invalid=invalid and Invalid(), **uncut)
    stops = {tokenizer.eos_token_id, *options["rendering"].stops}
    dropped = {source: reason for reason, sources in report.dropped.items() for source in sources}
    before = {(e.record_id, e.desirable): e for e in whole}
    for record_id, record in enumerate(records):
        own = [e for e in examples if e.record_id == record_id]
        for example in own:
            _print(console, record, example, before[record_id, example.desirable], tokenizer, stops)
        if not own:
            reason = dropped.get(record.source, "a broken record, see below")
            console.print(Text(f"\n{record.source}", "bold").append(f"\ndropped: {reason}", "red"))
    console.print()
    legend = Text("[scored]", STYLES["scored"]).append(" [end of a turn]", STYLES["end"])
    legend.append("  not scored: ", "").append("prompt", STYLES["prompt"]).append(", ")
    console.print(legend.append("turns of others", STYLES["other"]).append(", ").append("what was cut", STYLES["cut"]))
    console.print(str(report), soft_wrap=True, highlight=False, markup=False)
    for line in report.invalid.first if invalid is None else invalid.first:
        console.print(f"  dropped: {line}", soft_wrap=True, highlight=False, markup=False)


def show_record(console: Console, record: Record, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> None:
    """One record, of which nothing is cut."""
    examples, _ = tokenize_records([record], tokenizer, kind, max_length=WHOLE)
    for example in examples:
        _print(console, record, example, example, tokenizer, {tokenizer.eos_token_id})


def _print(console: Console, record: Record, example: Example, whole: Example, tokenizer: PreTrainedTokenizerBase,
           stops: set[int]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, tokens, parts in sequences(example, whole, tokenizer, stops):
        text = Text()
        for i, part in enumerate(parts):
            gap = "│" if i and part.style == parts[i - 1].style in ("prompt", "other") else ""
            text.append(gap, "dim").append(part.shown, STYLES[part.style])
        table.add_row(name, tokens, text)
    console.print(Text(f"\n{record.source}", "bold"))
    console.print(table)


def sequences(example: Example, whole: Example, tokenizer: PreTrainedTokenizerBase,
              stops: set[int]) -> Iterator[tuple[str, str, list[Part]]]:
    """The prompt and each response: its name, how many of its tokens are scored, and the tokens. whole: the same
    example, before anything was cut."""
    prompt, full = list(example.prompt_ids), list(whole.prompt_ids)
    kept = common_length(prompt, full)
    parts = [Part(text, "prompt") for text in texts(tokenizer, prompt)]
    if len(prompt) < len(full):
        parts.insert(kept, _cut(len(full) - len(prompt)))
    yield "prompt", f"{len(prompt):,}", parts
    label = {True: "desirable", False: "undesirable", None: "completion"}[example.desirable]
    names = ("chosen", "rejected") if len(example.responses) == 2 else (label,)
    for side, (name, response) in enumerate(zip(names, example.responses)):
        ids = list(response)
        scored = set(range(len(ids)))
        if example.scored is not None:
            scored = {i for start, end in example.scored[side] for i in range(start, end)}
        parts = [
            Part(text, "other" if i not in scored else "end" if ids[i] in stops else "scored")
            for i, text in enumerate(texts(tokenizer, ids))
        ]
        if len(ids) < len(whole.responses[side]):
            parts.append(_cut(len(whole.responses[side]) - len(ids)))
        yield name, f"{len(scored):,}" if len(scored) == len(ids) else f"{len(scored):,} of {len(ids):,}", parts


def _cut(tokens: int) -> Part:
    return Part(f" ✂ {tokens:,} tokens cut ✂ ", "cut")


def texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Of each token, on one line: a newline is ↵; of a part of a character the tokenizer's own name."""
    found = []
    for name, token in zip(tokenizer.convert_ids_to_tokens(list(ids)), ids, strict=True):
        text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "\N{REPLACEMENT CHARACTER}" in text:
            text = name
        elif name.startswith("▁") and not text.startswith(" "):
            text = f" {text}"
        found.append(text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍"))
    return found
