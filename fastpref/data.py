"""From records to batches: reads preference data, tokenises it, orders it and collates it.

    load_records -> [Record] -> tokenize_records -> [Example] -> batch_order, collate -> Batch

Nothing here needs a GPU or knows a loss. Every count a training step needs (sequences, scored tokens, offsets) is a
Python number made here, so that nothing later has to ask the device for it.

Formats, the ones TRL documents; each text is a string or a list of {"role", "content"} messages:

    {prompt, chosen, rejected}       preference pair
    {chosen, rejected}               the same with an implicit prompt: the common prefix of the two
    {prompt, completion, label}      unpaired preference (KTO)
    {prompt, completion}             supervised

A pair may say by how much the chosen response is better, {..., margin}; the loss of a reward model takes it.

What is scored are the response tokens, the closing EOS included:

    input_ids    p p p p p r r r E       a prompt of 5 tokens (BOS among them), a response of 3, EOS
    targets              r r r E         hidden rows 4..7 predict them: score_rows

Packed with its prompt shared, a pair's last prompt row predicts two tokens and is scored twice:

    input_ids    p p p p p c c E r r r E
    targets      chosen: c c E from rows 4..6; rejected: r r r E from row 4 and rows 8..10
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from torch import Tensor

from .attention import AttentionPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["pair", "sft", "kto"]
KINDS = ("pair", "sft", "kto")
Layout = Literal["padded", "packed", "shared"]  # one row a sequence; all in one row; that, with equal prompts once
LAYOUTS = ("padded", "packed", "shared")
FORMATS = "{prompt, chosen, rejected}, {chosen, rejected}, {prompt, completion, label} or {prompt, completion}"


# ---- records ---------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


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
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{name}: neither a data file here nor a data set that loads ({first})") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"{name}: has splits {', '.join(data)}; split must name one")
        data = next(iter(data.values()))
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"{name}, record {number}", row
    except (OSError, RuntimeError) as error:  # a stream: the hub, the network
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: cannot be read beyond record {number} ({first})") from error


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
            head = _common_prefix(whole[0][:-1], whole[-1][:-1])
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


def _common_prefix(a: Any, b: Any) -> Any:
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
        prompt = _common_prefix(chosen[:-1], rejected[:-1])
        if not prompt:
            raise ValueError(f"{where}: field 'prompt' is missing and 'chosen' and 'rejected' share no first message")
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    cut = len(_common_prefix(chosen, rejected))
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


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One tokenised record: a prompt and its one or two responses. Token ids as plain lists."""

    record_id: int  # index into the list of records
    prompt_ids: list[int]  # BOS first where the tokenizer uses one; never empty
    responses: tuple[list[int], ...]  # (chosen, rejected) or (completion,); EOS last unless truncated
    desirable: bool | None = None  # KTO's label
    ref_logps: tuple[float, ...] | None = None  # of the responses under the reference model, nats; set by its cache
    margin: float | None = None  # of a pair, see `with_margins`; set where the loss takes it

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences: what batches are sorted by."""
        return len(self.prompt_ids) + max(map(len, self.responses))

    def tokens(self, share_prompts: bool) -> int:
        """What the trunk reads of it: its responses, and its prompt once or before each of them."""
        prompts = 1 if share_prompts else len(self.responses)
        return prompts * len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def content_hash(self) -> str:
        """128 bits over exactly what a log-prob depends on, the prompt's and the responses' ids; and the margin."""
        digest = hashlib.sha256()
        for ids in (self.prompt_ids, *self.responses):
            digest.update(numpy.array([len(ids), *ids], dtype="<i8").tobytes())
        if self.margin is not None:
            digest.update(numpy.array([self.margin], dtype="<f8").tobytes())
        return digest.hexdigest()[:32]


@dataclass
class TokenizeReport:
    """What became of the records; `str()` is the line to show."""

    kind: Kind
    records: int = 0
    examples: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    prompts_shortened_by_template: int = 0  # the template renders the prompt alone unlike the prompt of a conversation
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> sources of the records
    prompt_tokens: tuple[float, int] = (0, 0)  # median, max per example
    response_tokens: tuple[float, int] = (0, 0)  # median, max per response

    def __str__(self) -> str:
        noun = {"pair": "pairs", "sft": "examples", "kto": "labelled examples"}[self.kind]
        parts = [f"{self.records:,} records -> {self.examples:,} {noun}"]
        parts += [f"{count:,} {what}" for what, count in (
            ("prompts truncated", self.prompts_truncated),
            ("responses truncated", self.responses_truncated),
            ("prompts shortened to what the chat template keeps", self.prompts_shortened_by_template),
        ) if count]  # fmt: skip
        parts += [f"{len(where):,} dropped: {why} (first: {where[0]})" for why, where in self.dropped.items()]
        for what, (median, most) in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            parts.append(f"{what} tokens: median {median:g}, max {most:,}")
        return "; ".join(parts)

    def count(self, examples: Sequence[Example]) -> None:
        """Fills in what is said of the examples; zeros for none."""
        self.examples = len(examples)
        self.prompt_tokens = _median_max(len(e.prompt_ids) for e in examples)
        self.response_tokens = _median_max(len(ids) for e in examples for ids in e.responses)

    def add(self, other: TokenizeReport) -> None:
        """What became of further records; `count` is for the examples of both."""
        for name in ("records", "prompts_truncated", "responses_truncated", "prompts_shortened_by_template"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, where in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(where)

    def none_usable(self) -> str:
        why = "; ".join(f"{len(where)} {reason}" for reason, where in self.dropped.items())
        return f"none of the {self.records} records is usable ({why})"


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind = "pair",
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_end",
    overlong_response: Literal["error", "drop", "truncate"] = "error",
    partial: bool = False,
) -> tuple[list[Example], TokenizeReport]:
    """Token ids of prompts and responses, and a report of what was cut or left out.

    Prompt and response are tokenised apart. So the prompt's ids are those the model will see when it generates, they
    are the same for chosen and rejected, and no token straddles the boundary. BOS (whatever the tokenizer itself puts
    first) stands once; for messages the chat template alone decides about it. EOS ends every response once, text that
    a chat template puts after it (ChatML's newline) is left out.

    kind: "pair" needs chosen and rejected; "kto" needs label, or takes a pair apart into a desirable and an
        undesirable example; "sft" takes completion or chosen, and leaves out completions labelled false.
    max_length: limit on prompt + longest response, in tokens. The prompt is cut to fit, at least one token of it stays.
    max_prompt_length: a limit on the prompt alone.
    truncation_mode: which end of a prompt that is cut stays; BOS stays in both cases.
    overlong_response: a response of max_length tokens or more leaves no room for a prompt. "error" says so and stops,
        "drop" leaves the record out, "truncate" gives the prompt at most max_prompt_length (default: half of
        max_length) tokens and the response's first tokens the rest; it then has no EOS.
    partial: the records are a part of the data: that none of them is usable is no error.

    Also left out, and counted: pairs whose responses are equal, empty responses, and an empty prompt where the
    tokenizer has no BOS (nothing would predict the first token).

    Raises ValueError, one line, for a tokenizer without EOS, messages without a chat template, a record without the
    fields that `kind` needs, an overlong response under "error", and when no record is usable.
    """
    for name, value, allowed in (
        ("kind", kind, KINDS),
        ("truncation_mode", truncation_mode, ("keep_start", "keep_end")),
        ("overlong_response", overlong_response, ("error", "drop", "truncate")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2 (one prompt and one response token)")
    if max_prompt_length is not None and not 1 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length: got {max_prompt_length}, expected 1 to max_length - 1 = {max_length - 1}")
    if not records:
        raise ValueError("records: got none, expected at least one")

    encoder = _Encoder(tokenizer)
    report = TokenizeReport(kind, records=len(records))
    rendered = [_render(record, encoder, kind, report) for record in records]
    prompts = encoder.prompts([(text, record.conversational) for text, record in zip(
        (r[0] for r in rendered), records, strict=True)])  # fmt: skip
    responses = iter(encoder.responses([text for r in rendered for text in r[1]]))

    examples: list[Example] = []
    overlong: list[str] = []
    for record_id, (record, prompt, (_, texts)) in enumerate(zip(records, prompts, rendered, strict=True)):
        answers = [next(responses) for _ in texts]
        longest = max(map(len, answers))
        too_long = longest >= max_length
        reason = None
        if kind == "sft" and record.label is False:
            reason = "completion labelled false"
        elif any(not text.strip() for text in texts) or any(answer == [encoder.eos] for answer in answers):
            reason = "empty response"
        elif len(answers) == 2 and answers[0] == answers[1]:
            reason = "chosen equals rejected"
        elif not prompt:
            reason = "empty prompt, and the tokenizer has no BOS"
        elif too_long and overlong_response == "drop":
            reason = f"response of max_length = {max_length} tokens or more"
        if reason:
            report.dropped.setdefault(reason, []).append(record.source)
            continue
        if too_long and overlong_response == "error":
            fields = ("completion",) if record.completion is not None else ("chosen", "rejected")
            name = max(zip(map(len, answers), fields, strict=False))[1]
            overlong.append(f"{record.source}: field '{name}' has {longest} tokens with EOS, which")
            continue
        room = max_length - longest
        if too_long:
            room = min(len(prompt), max_prompt_length or max_length // 2)
            report.responses_truncated += sum(len(answer) > max_length - room for answer in answers)
            answers = [answer[: max_length - room] for answer in answers]
        room = min(room, max_prompt_length or room)
        if len(prompt) > room:
            prompt = _cut_prompt(prompt, room, truncation_mode, encoder.prefix)
            report.prompts_truncated += 1
        if len(answers) == 2 and answers[0] == answers[1]:  # they differed only in what was cut off
            report.dropped.setdefault("chosen equals rejected once truncated", []).append(record.source)
        elif kind == "kto" and record.completion is None:
            examples += [Example(record_id, prompt, (a,), good) for a, good in zip(answers, (True, False), strict=True)]
        else:
            examples.append(Example(record_id, prompt, tuple(answers), record.label if kind == "kto" else None))

    if overlong:
        raise ValueError(
            f"{overlong[0]} leaves no room for a prompt in max_length={max_length} ({len(overlong)} of {len(records)} "
            "records are like that): raise max_length, or set overlong_response to drop or truncate"
        )
    if not examples and not partial:
        raise ValueError(f"{records[0].source}: {report.none_usable()}")
    report.count(examples)
    return examples, report


def tokenize_prompts(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_end",
) -> tuple[list[list[int]], int]:
    """Ids of the prompts alone, ready to be continued, and how many of them were cut to max_length tokens.

    They are those that `tokenize_records` gives the same records, unless the chat template renders a prompt otherwise
    once a response follows. Raises ValueError for messages without a chat template, and for an empty prompt where the
    tokenizer has no BOS.
    """
    encoder = _Encoder(tokenizer)
    texts = [
        (encoder.template(r, r.prompt, is_prompt=True) if r.conversational else r.prompt, r.conversational)
        for r in records
    ]
    prompts = encoder.prompts(texts)
    for record, ids in zip(records, prompts, strict=True):
        if not ids:
            raise ValueError(f"{record.source}: the prompt is empty, and the tokenizer has no BOS")
    cut = [_cut_prompt(ids, max_length, truncation_mode, encoder.prefix) if len(ids) > max_length else ids
           for ids in prompts]  # fmt: skip
    return cut, sum(len(ids) > max_length for ids in prompts)


def with_margins(examples: Sequence[Example], records: Sequence[Record]) -> list[Example]:
    """The examples with their records' field `margin`, TRL's name: how much better the chosen response is. Without it a
    pair has none, which is a margin of 0. Raises ValueError for one that is no finite number.
    """
    found = []
    for example in examples:
        record = records[example.record_id]
        margin = record.extra.get("margin")
        if margin is not None and (
            isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin)
        ):
            raise ValueError(f"{record.source}: field 'margin' is {margin!r}, expected a finite number")
        found.append(replace(example, margin=None if margin is None else float(margin)))
    return found


def _median_max(lengths: Iterable[int]) -> tuple[float, int]:
    lengths = list(lengths)
    return (statistics.median(lengths), max(lengths)) if lengths else (0, 0)


def _cut_prompt(ids: list[int], room: int, mode: str, prefix: list[int]) -> list[int]:
    """The first or last `room` tokens; what the tokenizer puts first (BOS) stays first."""
    kept = len(prefix) if prefix and ids[: len(prefix)] == prefix and len(prefix) <= room else 0
    return ids[:room] if mode == "keep_start" else ids[:kept] + ids[len(ids) - (room - kept) :]


def _render(record: Record, encoder: _Encoder, kind: Kind, report: TokenizeReport) -> tuple[str, list[str]]:
    """Texts of the prompt and of the responses that `kind` asks for."""
    where = record.source
    if kind == "pair":
        if record.rejected is None:
            missing = "chosen" if record.chosen is None else "rejected"
            raise ValueError(f"{where}: field '{missing}' is missing, preference pairs need chosen and rejected")
        responses = [record.chosen, record.rejected]
    elif kind == "sft":
        responses = [record.chosen if record.completion is None else record.completion]
    else:
        if record.completion is None and record.rejected is None:
            raise ValueError(f"{where}: field 'rejected' is missing, KTO needs completion and label, or a pair")
        if record.completion is not None and record.label is None:
            raise ValueError(f"{where}: field 'label' is missing, KTO needs true or false")
        responses = [record.chosen, record.rejected] if record.completion is None else [record.completion]
    if not record.conversational:
        return record.prompt, responses
    prompt = encoder.template(record, record.prompt, is_prompt=True)
    wholes = [encoder.template(record, record.prompt + messages) for messages in responses]
    start = prompt
    for whole in wholes:  # some templates render a prompt alone unlike the same prompt inside a conversation
        start = start if whole.startswith(start) else _common_prefix(start, whole)
    report.prompts_shortened_by_template += len(start) < len(prompt)
    return start, [whole[len(start) :] for whole in wholes]


class _Encoder:
    """What has to be known about a tokenizer, found by asking it rather than by its class."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {self.name}: has no EOS token to end responses with; set its eos_token")
        self.eos: int = tokenizer.eos_token_id
        bare, full = self._ids(["a"])[0], tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = list(full[:start])  # what the tokenizer puts before every text: [BOS] or nothing
        # SentencePiece tokenizers put a space before every text they are given, so also before a response that has
        # none. Reading the response after a newline, whose tokens are then taken off, avoids it.
        self.anchor, self.anchor_ids = "", []
        first, second = self._ids(["a", "b"])
        if self._decode(first + second) != "ab":
            anchor_ids, anchored = self._ids(["\n", "\nb"])
            tail = anchored[len(anchor_ids) :]
            if anchored[: len(anchor_ids)] == anchor_ids and self._decode(first + tail) == "ab":
                self.anchor, self.anchor_ids = "\n", anchor_ids

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for i in range(0, len(texts), 1024):
            part = self.tokenizer(
                texts[i : i + 1024], add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            ids += part["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def template(self, record: Record, messages: list[dict[str, Any]], is_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(f"{record.source}: has messages, but tokenizer {self.name} has no chat template")
        tools = record.extra.get("tools") or None
        open_ended = is_prompt and messages[-1]["role"] == "assistant"  # the response goes on with the last message
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                tokenize=False,
                add_generation_prompt=is_prompt and not open_ended,
                continue_final_message=open_ended,
                **record.extra.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # templates raise whatever their author chose
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{record.source}: the chat template refuses the messages ({first})") from error
        return str(text)

    def prompts(self, texts: list[tuple[str, bool]]) -> list[list[int]]:
        """(text, rendered by a chat template) -> ids, with the tokenizer's own prefix once; a template has its own."""
        all_ids = self._ids([text for text, _ in texts])
        return [
            ids if templated or ids[: len(self.prefix)] == self.prefix else self.prefix + ids
            for ids, (_, templated) in zip(all_ids, texts, strict=True)
        ]

    def responses(self, texts: list[str]) -> list[list[int]]:
        """Ids that end in exactly one EOS."""
        all_ids = self._ids([self.anchor + text for text in texts])
        if self.anchor:
            skip = len(self.anchor_ids)
            all_ids = [
                ids[skip:] if ids[:skip] == self.anchor_ids else self._ids([text])[0]
                for ids, text in zip(all_ids, texts, strict=True)
            ]
        return [self._end(ids) for ids in all_ids]

    def _end(self, ids: list[int]) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] != self.eos:
            end -= 1
        if end and not self._decode(ids[end:]).strip():  # what a template puts after EOS
            ids = ids[:end]
        while ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return ids + [self.eos]


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Tensors may live on a device; every count is on the host, so reading one never synchronises.

    Sequences: S = 2P for P pairs, first the P chosen, then the P rejected; else one per example. The trunk sees B = S
    rows padded on the right to L; or, packed, B = 1 row of L tokens with an `attention_plan`, no mask and positions
    that begin again in every sequence (in a response that shares its prompt, after the prompt). The N scored tokens
    are ordered by sequence, then by position; those of sequence s are score_rows[cu_seqlens[s]:cu_seqlens[s + 1]], and
    `hidden.view(B * L, H)[score_rows]` are the rows to score: the last row of a shared prompt once for each response.
    """

    kind: Kind
    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor | None  # [B, L] int64, 1 on tokens, 0 on padding; None: packed
    score_rows: Tensor  # [N] int64, flat indices into B * L of the hidden rows that predict a scored token
    last_rows: Tensor  # [S] int64, likewise: of the last token of each sequence, where a reward is read
    targets: Tensor  # [N] int64, the scored tokens: already shifted, none is ignored
    cu_seqlens: list[int]  # [S + 1], offsets of the sequences in the scored tokens
    lengths: list[int]  # [S], tokens of each sequence, prompt included, padding not
    record_ids: list[int]  # [P] or [S], one per example, into the list of records
    desirable: Tensor | None = None  # [S] bool, KTO
    kl: Batch | None = None  # KTO: prompts with another record's completion, K sequences; None where there is no other
    ref_logps: Tensor | None = None  # [S] fp32, nats
    ref_kl_logps: Tensor | None = None  # [K] fp32, nats
    margins: Tensor | None = None  # [P] fp32: of pairs, 0 where a record has none; None: no record has one
    position_ids: Tensor | None = None  # [B, L] int64; None: 0, 1, 2, ... in every row
    attention_plan: AttentionPlan | None = None  # packed; None: padded

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_pairs(self) -> int:
        return self.num_sequences // 2 if self.kind == "pair" else 0

    @property
    def num_tokens(self) -> int:
        """Scored tokens, N."""
        return self.cu_seqlens[-1]

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of the chosen responses; of all where there are no pairs."""
        return self.cu_seqlens[self.num_pairs or self.num_sequences]

    @property
    def processed_tokens(self) -> int:
        """Tokens the trunk reads, padding and the mismatched sequences of KTO not counted."""
        return self.attention_plan.num_tokens if self.attention_plan else sum(self.lengths)

    @property
    def saved_tokens(self) -> int:
        """Tokens of prompts that the trunk need not read again: they are shared."""
        return sum(self.lengths) - self.processed_tokens

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`. Copies to CUDA go through pinned memory: the host does not wait for them."""
        device = torch.device(device)
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
                moved[name] = pinned.to(device, non_blocking=True)
            elif isinstance(value, (Batch, AttentionPlan)):
                moved[name] = value.to(device)
        return replace(self, **moved)


def collate(examples: Sequence[Example], pad_token_id: int, kind: Kind = "pair", *, layout: Layout = "padded") -> Batch:
    """Examples -> one Batch on the CPU.

    layout: "padded", one row a sequence, filled up on the right with pad_token_id; "packed", all sequences one after
        another; "shared", the same with each prompt once, before all responses of the batch that belong to it. The
        packed ones need a model whose attention takes the batch's plan (`fastpref.attention`). All three give the same
        log-probs, in the same order.

    KTO's baseline needs mismatched sequences: prompt i with the completion of the next example (cyclically) that has
    another prompt. A batch with one prompt only has none: `kl` is None, and it adds nothing to the baseline's mean.
    A mismatched sequence is never longer than the batch's longest real one: its completion loses its last tokens.

    `ref_logps` is filled if every example has them, `margins` if any has one. Raises ValueError for an empty list and
    examples of another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    per_example = 2 if kind == "pair" else 1
    for example in examples:
        if len(example.responses) != per_example or (kind == "kto") != (example.desirable is not None):
            raise ValueError(f"examples: record {example.record_id} was not tokenised with kind={kind!r}")

    sequences = [(e.prompt_ids, e.responses[i]) for i in range(per_example) for e in examples]
    record_ids = [e.record_id for e in examples]

    def lay_out(sequences: list[tuple[list[int], list[int]]]) -> Batch:
        if layout == "padded":
            return _pad(sequences, record_ids, pad_token_id, kind)
        return _pack(sequences, record_ids, kind, share_prompts=layout == "shared")

    batch = lay_out(sequences)
    extra: dict[str, Any] = {}
    if kind == "kto":
        extra["desirable"] = torch.tensor([e.desirable for e in examples], dtype=torch.bool)
        mismatched = _mismatch(examples, max(batch.lengths))
        if mismatched:
            extra["kl"] = lay_out(mismatched)
    if all(e.ref_logps is not None for e in examples):
        logps = [e.ref_logps[i] for i in range(per_example) for e in examples]  # type: ignore[index]
        extra["ref_logps"] = torch.tensor(logps, dtype=torch.float32)
    if any(e.margin is not None for e in examples):
        extra["margins"] = torch.tensor([e.margin or 0.0 for e in examples], dtype=torch.float32)
    return replace(batch, **extra)


def _mismatch(examples: Sequence[Example], max_length: int) -> list[tuple[list[int], list[int]]]:
    n = len(examples)
    mismatched = []
    for i, example in enumerate(examples):
        others = (examples[(i + j) % n] for j in range(1, n))
        other = next((e for e in others if e.prompt_ids != example.prompt_ids), None)
        if other is None:
            return []  # every prompt is the same
        mismatched.append((example.prompt_ids, other.responses[0][: max_length - len(example.prompt_ids)]))
    return mismatched


def _pad(sequences: list[tuple[list[int], list[int]]], record_ids: list[int], pad: int, kind: Kind) -> Batch:
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    width = max(lengths)
    rows = [prompt + response + [pad] * (width - len(prompt) - len(response)) for prompt, response in sequences]
    mask = [[1] * length + [0] * (width - length) for length in lengths]
    score_rows = [
        b * width + len(prompt) - 1 + t for b, (prompt, response) in enumerate(sequences) for t in range(len(response))
    ]
    return Batch(
        kind=kind,
        input_ids=torch.tensor(rows, dtype=torch.int64),
        attention_mask=torch.tensor(mask, dtype=torch.int64),
        score_rows=torch.tensor(score_rows, dtype=torch.int64),
        last_rows=torch.tensor([b * width + length - 1 for b, length in enumerate(lengths)], dtype=torch.int64),
        targets=torch.tensor([token for _, response in sequences for token in response], dtype=torch.int64),
        cu_seqlens=[0, *accumulate(len(response) for _, response in sequences)],
        lengths=lengths,
        record_ids=record_ids,
    )


def _pack(
    sequences: list[tuple[list[int], list[int]]], record_ids: list[int], kind: Kind, *, share_prompts: bool
) -> Batch:
    groups: dict[Any, list[int]] = {}  # sequences with one prompt
    for s, (prompt, _) in enumerate(sequences):
        groups.setdefault(tuple(prompt) if share_prompts else s, []).append(s)
    ids: list[int] = []
    rows: list[list[int]] = [[] for _ in sequences]  # that predict the tokens of each response
    last_rows = [0] * len(sequences)
    for members in groups.values():
        ids += sequences[members[0]][0]
        last = len(ids) - 1
        for s in members:
            response = sequences[s][1]
            rows[s] = [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response
            last_rows[s] = len(ids) - 1
    plan = AttentionPlan.of([
        (len(sequences[members[0]][0]), [len(sequences[s][1]) for s in members]) for members in groups.values()
    ])  # fmt: skip
    return Batch(
        kind=kind,
        input_ids=torch.tensor([ids], dtype=torch.int64),
        attention_mask=None,
        score_rows=torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64),
        last_rows=torch.tensor(last_rows, dtype=torch.int64),
        targets=torch.tensor([token for _, response in sequences for token in response], dtype=torch.int64),
        cu_seqlens=[0, *accumulate(len(response) for _, response in sequences)],
        lengths=[len(prompt) + len(response) for prompt, response in sequences],
        record_ids=record_ids,
        position_ids=torch.tensor([plan.positions], dtype=torch.int64),
        attention_plan=plan,
    )


def batch_order(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, window: int = 50, shuffle: bool = True
) -> list[list[int]]:
    """One epoch's batches, as lists of indices into `lengths`; every index once, the last batch may be short.

    Random, yet alike in length within a batch: all indices are shuffled, each window of `window` batches is sorted by
    length and cut into batches, and the batches are shuffled. The order is a function of the arguments alone, so that a
    position is restored from (epoch, number of batches done). shuffle=False sorts everything by length: evaluation.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    indices = list(range(len(lengths)))
    if not shuffle:
        indices.sort(key=lambda i: lengths[i])
        return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    rng = random.Random(f"fastpref {seed} {epoch}")
    rng.shuffle(indices)
    size = window * batch_size
    batches = []
    for start in range(0, len(indices), size):
        part = sorted(indices[start : start + size], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches


def fill_batches(
    tokens: Sequence[int], max_tokens: int, *, batch_size: int | None = None, seed: int, epoch: int, window: int = 50
) -> list[list[int]]:
    """One epoch's batches of at most `max_tokens` tokens (and `batch_size` examples), as lists of indices into
    `tokens`; every index once.

    Random, yet well filled: all indices are shuffled, and what fills about `window` batches is put, longest first, each
    into the first batch that has room for it; then the batches are shuffled. Like `batch_order` a function of its
    arguments alone. How many batches there are differs from epoch to epoch.

    Raises ValueError for an example of more than max_tokens.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if tokens and max(tokens) > max_tokens:
        raise ValueError(f"tokens: got {max(tokens)}, expected at most max_tokens = {max_tokens}")
    rng = random.Random(f"fastpref {seed} {epoch}")
    indices = list(range(len(tokens)))
    rng.shuffle(indices)
    batches: list[list[int]] = []
    start = total = 0
    for end, index in enumerate(indices, 1):
        total += tokens[index]
        if total >= window * max_tokens or end == len(indices):
            batches += _first_fit(sorted(indices[start:end], key=lambda i: -tokens[i]), tokens, max_tokens, batch_size)
            start, total = end, 0
    rng.shuffle(batches)
    return batches


def _first_fit(
    indices: Sequence[int], tokens: Sequence[int], max_tokens: int, batch_size: int | None
) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        place = next((b for b, free in enumerate(room) if free >= tokens[index]), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[place].append(index)
        room[place] -= tokens[index]
        if len(batches[place]) == batch_size:
            room[place] = 0
    return batches
