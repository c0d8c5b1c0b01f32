"""Reads preference data: files and data sets -> validated records.

Formats, the ones TRL documents; each text is a string or a list of {"role", "content"} messages:

    {prompt, chosen, rejected}       preference pair
    {chosen, rejected}               the same with an implicit prompt: the common prefix of the two
    {prompt, completion, label}      unpaired preference (KTO)
    {prompt, completion}             supervised

A pair may say by how much the chosen response is better, {..., margin}; the loss of a reward model takes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fastpref.errors import first_line

FORMATS = "{prompt, chosen, rejected}, {chosen, rejected}, {prompt, completion, label} or {prompt, completion}"


@dataclass(frozen=True)
class Record:
    """One validated record. Its texts are all strings or all lists of messages."""

    source: str  # where it was read, for messages: "train.jsonl:12"
    prompt: Any
    chosen: Any = None
    rejected: Any = None
    completion: Any = None
    label: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # every other field, e.g. "answer"; evaluation reads it

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def load_records(source: Any, split: str | None = None) -> list[Record]:
    """Reads preference, unpaired or supervised records.

    source: a .jsonl, .json (a list of objects) or .parquet file; a name or folder for `datasets.load_dataset`; a dict
        of keyword arguments for it ({"path": ..., "name": ..., "split": ...}); or a list of any of these.
    split: which split of a `datasets` source; needed only where there is more than one.

    Raises ValueError, one line that names file, line and field, for the first broken record, and for a source that is
    empty or cannot be read.
    """
    return _load(source, split, _parse)


def load_prompts(source: Any, split: str | None = None) -> list[Record]:
    """As `load_records`, of records that may also be a prompt alone: {prompt, ...}."""
    return _load(source, split, _parse_prompt)


def stream_records(source: Any, split: str | None = None) -> Iterator[Record]:
    """The records of `load_records`, each when it is asked for: a data set is streamed (`datasets`' streaming), of a
    .jsonl or .parquet file no more is read. Nothing is raised for a source without records."""
    if isinstance(source, (list, tuple)):
        for part in source:
            yield from stream_records(part, split)
        return
    _, rows = _open(source, split, streaming=True)
    for where, row in rows:
        yield _parse(where, row)


def _load(source: Any, split: str | None, parse: Callable[[str, Any], Record]) -> list[Record]:
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("source: got an empty list, expected at least one file or data set")
        return [record for part in source for record in _load(part, split, parse)]
    name, rows = _open(source, split)
    records = [parse(where, row) for where, row in rows]
    if not records:
        raise ValueError(f"{name}: no records, the data is empty")
    return records


def _open(source: Any, split: str | None, *, streaming: bool = False) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Its name for messages, and its rows, each with where it was read."""
    stream = {"streaming": True} if streaming else {}
    if isinstance(source, Mapping):
        name, rows = str(source.get("path")), _dataset_rows({**source, **stream}, split)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name, readers = str(source), {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
        if path.suffix in readers:
            if not path.is_file():
                raise ValueError(f"{name}: no such file")
            rows = readers[path.suffix](path)
        else:
            rows = _dataset_rows({"path": name, **stream}, split)
    else:
        raise TypeError(f"source: got {type(source).__name__}, expected a path, a data set's name, a dict or a list")
    return name, rows


def records_from_rows(rows: Iterable[Mapping[str, Any]], name: str = "rows") -> list[Record]:
    """Validates rows that are already in memory (a list of dicts, a `datasets.Dataset`); errors as `load_records`."""
    records = [_parse(f"{name}, record {i}", row) for i, row in enumerate(rows, 1)]
    if not records:
        raise ValueError(f"{name}: no records, the data is empty")
    return records


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield where, json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start})") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: got a JSON {type(rows).__name__}, expected a list of records (or name it .jsonl)")
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        for number, row in enumerate(rows, 1):
            yield f"{path}, record {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def _dataset_rows(arguments: dict[str, Any], split: str | None) -> Iterator[tuple[str, Any]]:
    name = arguments.get("path")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name}: not a .jsonl, .json or .parquet file, and a data set needs `datasets`") from None
    if split is not None:
        arguments.setdefault("split", split)
    try:
        data = datasets.load_dataset(**arguments)
    except Exception as error:  # the hub, the network, a missing builder: each raises its own kind
        raise ValueError(f"{name}: neither a data file here nor a data set that loads ({first_line(error)})") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"{name}: has splits {', '.join(data)}; split must name one")
        data = next(iter(data.values()))
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"{name}, record {number}", row
    except (OSError, RuntimeError) as error:  # a stream: the hub, the network
        raise ValueError(f"{name}: cannot be read beyond record {number} ({first_line(error)})") from error


def _parse(where: str, row: Any) -> Record:
    """Validates one row and brings the texts into one form (all strings or all messages)."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, expected an object {FORMATS}")
    row = {key: value for key, value in row.items() if value is not None}  # Parquet writes null for "not there"
    texts = {key: _text(where, key, row[key]) for key in ("prompt", "chosen", "rejected", "completion") if key in row}
    extra = {key: value for key, value in row.items() if key not in texts and key != "label"}

    if "completion" in texts and ("chosen" in texts or "rejected" in texts):
        raise ValueError(f"{where}: has field 'completion' and 'chosen' or 'rejected', expected one of {FORMATS}")
    if "completion" in texts:
        if "prompt" not in texts:
            raise ValueError(f"{where}: field 'prompt' is missing")
        label = row.get("label")
        if label is not None and label not in (0, 1):
            raise ValueError(f"{where}: field 'label' is {label!r}, expected true or false")
        (completion,), prompt = _one_form(where, texts["prompt"], {"completion": texts["completion"]})
        return Record(where, prompt, completion=completion, label=None if label is None else bool(label), extra=extra)
    if "chosen" not in texts:
        missing = "chosen" if "rejected" in texts else "chosen' or 'completion"
        raise ValueError(f"{where}: field '{missing}' is missing, expected {FORMATS}")
    if "label" in row:
        extra["label"] = row["label"]
    if "rejected" not in texts:
        if "prompt" not in texts:
            raise ValueError(f"{where}: field 'rejected' is missing, and without a 'prompt' too; expected {FORMATS}")
        (chosen,), prompt = _one_form(where, texts["prompt"], {"chosen": texts["chosen"]})
        return Record(where, prompt, chosen=chosen, extra=extra)
    pair = {"chosen": texts["chosen"], "rejected": texts["rejected"]}
    if "prompt" in texts:
        (chosen, rejected), prompt = _one_form(where, texts["prompt"], pair)
    else:
        prompt, chosen, rejected = _implicit_prompt(where, **pair)
    return Record(where, prompt, chosen=chosen, rejected=rejected, extra=extra)


def _parse_prompt(where: str, row: Any) -> Record:
    """`_parse`, where a prompt without a response will do."""
    responses = ("chosen", "rejected", "completion")
    if not isinstance(row, Mapping) or any(row.get(key) is not None for key in responses) or row.get("prompt") is None:
        return _parse(where, row)
    extra = {key: value for key, value in row.items() if value is not None and key != "prompt"}
    return Record(where, _text(where, "prompt", row["prompt"]), extra=extra)


def _text(where: str, key: str, value: Any) -> Any:
    """A string or a list of messages, checked; messages lose the null entries Parquet gives them."""
    if isinstance(value, str):
        return _utf8(where, key, value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: field '{key}' is {type(value).__name__}, expected a string or a list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise ValueError(f"{where}: field '{key}[{i}]' is {kind}, expected a message {{role, content}}")
        message = {name: part for name, part in message.items() if part is not None}
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: field '{key}[{i}].role' is missing or not a string")
        if "tool_calls" not in message or "content" in message:  # a tool call may come without content
            if not isinstance(message.get("content"), str):
                raise ValueError(f"{where}: field '{key}[{i}].content' is missing or not a string")
            _utf8(where, f"{key}[{i}].content", message["content"])
        messages.append(message)
    if not messages:
        raise ValueError(f"{where}: field '{key}' is an empty list of messages")
    return messages


def _utf8(where: str, key: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field '{key}' has a lone surrogate at character {error.start}") from None
    return text


def _one_form(where: str, prompt: Any, responses: dict[str, Any]) -> tuple[list[Any], Any]:
    """Prompt and responses as all strings or all messages; responses that repeat the prompt's messages lose them."""
    if isinstance(prompt, str) and all(isinstance(text, str) for text in responses.values()):
        return list(responses.values()), prompt
    messages = {
        key: [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for key, text in responses.items()
    }
    if isinstance(prompt, str):
        if all(text[0]["role"] == "assistant" for text in messages.values()):
            prompt = [{"role": "user", "content": prompt}]
        else:  # UltraFeedback: the prompt as a string beside whole conversations that contain it
            whole = list(messages.values())
            head = common_prefix(whole[0][:-1], whole[-1][:-1])
            if not any(message.get("content") == prompt for message in head):
                raise ValueError(f"{where}: field 'prompt' is not among the first messages of '{next(iter(messages))}'")
            prompt = head
    if all(text[: len(prompt)] == prompt for text in messages.values()):
        messages = {key: text[len(prompt) :] for key, text in messages.items()}
    for key, text in messages.items():
        if not text:
            raise ValueError(f"{where}: field '{key}' has no message after the prompt's")
        if (role := text[0]["role"]) != "assistant":
            raise ValueError(
                f"{where}: field '{key}' starts with role '{role}', expected 'assistant' or the prompt's messages"
            )
    return list(messages.values()), prompt


def common_prefix(a: Any, b: Any) -> Any:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _implicit_prompt(where: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Splits off the common prefix. A string is never cut inside a word, nor so that a response would be empty; spaces
    before the cut go to the responses, where byte-level BPE wants them. Moving the cut back is harmless: tokens that
    both sides share have the same log-prob on both.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: fields 'chosen' and 'rejected' differ in form, expected two strings or two lists")
    if not isinstance(chosen, str):
        prompt = common_prefix(chosen[:-1], rejected[:-1])
        if not prompt:
            raise ValueError(f"{where}: field 'prompt' is missing and 'chosen' and 'rejected' share no first message")
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    cut = len(common_prefix(chosen, rejected))
    whole = min(len(chosen), len(rejected))
    if cut == whole:  # one is the start of the other: it keeps its last word
        cut = len(chosen[:cut].rstrip())
        while cut and not chosen[cut - 1].isspace():
            cut -= 1
    elif chosen[cut].isalnum() or rejected[cut].isalnum():
        while cut and chosen[cut - 1].isalnum():
            cut -= 1
    cut = len(chosen[:cut].rstrip(" "))
    return chosen[:cut], chosen[cut:], rejected[cut:]
