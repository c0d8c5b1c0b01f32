"""Rows of files and data sets -> validated records, whatever form people have them in.

Formats, the ones TRL documents; each text is a string or a list of {"role", "content"} messages:

    {prompt, chosen, rejected}       preference pair
    {chosen, rejected}               the same with an implicit prompt: the common prefix of the two
    {prompt, completion, label}      unpaired preference (KTO)
    {prompt, completion}             supervised

and those that are read as these:

    {messages} or {conversations}    supervised: the prompt ends before the first assistant turn
    {conversations, label}           KTO: the prompt ends before the last turn
    {conversations, chosen, rejected}  a pair whose prompt is the conversation
    {instruction, input, output}     Alpaca: instruction and input are a user's message, output is the answer

Messages may be ShareGPT's {"from", "value"}, their content a list of text parts; one message may stand without a list.
A pair may say by how much the chosen response is better, {..., margin}; the loss of a reward model takes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .sources import Rows, open_source, parse_json, rows_in_memory

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
    repeated: bool = False  # the string prompt stood at the head of every response too, and was taken off there

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass
class Invalid:
    """Records that were left out because they cannot be read or rendered: how many, and what is wrong with the first
    ten."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: Exception) -> None:
        self.count += 1
        if len(self.first) < 10:
            self.first.append(str(error))

    def extend(self, other: Invalid) -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:10]


def load_records(source: Any, split: str | None = None, *, invalid: Invalid | None = None) -> list[Record]:
    """Reads preference, unpaired or supervised records.

    source: a .jsonl, .json or .parquet file (the former two also as .gz, .bz2, .xz or .zst); a name or folder for
        `datasets.load_dataset`; a dict of keyword arguments for it ({"path": ..., "name": ..., "split": ...}); or a
        list of any of these.
    split: which split of a `datasets` source; needed only where there is more than one.
    invalid: counts the broken records, which are then left out.

    Raises ValueError, one line that names file, line and field, for the first broken record, and for a source that is
    empty or cannot be read.
    """
    return list(_read(source, split, _parse, invalid))


def load_prompts(source: Any, split: str | None = None) -> list[Record]:
    """As `load_records`, of records that may also be a prompt alone: {prompt, ...}."""
    return list(_read(source, split, _parse_prompt, None))


def stream_records(source: Any, split: str | None = None, *, streaming: bool = True,
                   invalid: Invalid | None = None) -> Iterator[Record]:
    """The records of `load_records`, each when it is asked for: of a .jsonl or .parquet file no more is read, and a
    data set is streamed (`datasets`' streaming), unless `streaming` is False. Streaming, nothing is raised for a source
    without records."""
    return _read(source, split, _parse, invalid, streaming)


def records_from_rows(rows: Iterable[Mapping[str, Any]], name: str = "rows") -> list[Record]:
    """Validates rows that are already in memory (a list of dicts, a `datasets.Dataset`); errors as `load_records`."""
    return list(_parsed(name, rows_in_memory(rows, name), _parse, None, False))


def _read(source: Any, split: str | None, parse: Callable[[str, Any], Record], invalid: Invalid | None,
          streaming: bool = False) -> Iterator[Record]:
    if not isinstance(source, (list, tuple)):
        yield from _parsed(*open_source(source, split, streaming=streaming), parse, invalid, streaming)
    elif not source:
        raise ValueError("source: got an empty list, expected at least one file or data set")
    else:
        for part in source:
            yield from _read(part, split, parse, invalid, streaming)


def _parsed(name: str, rows: Rows, parse: Callable[[str, Any], Record], invalid: Invalid | None,
            may_be_empty: bool) -> Iterator[Record]:
    before, found = invalid.count if invalid else 0, may_be_empty
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            record = parse(where, row)
        except ValueError as error:
            if invalid is None:
                raise
            invalid.add(error)
            continue
        found = True
        yield record
    if not found:
        if invalid and (count := invalid.count - before):
            raise ValueError(f"{name}: all {count} records are invalid (first: {invalid.first[0]})")
        raise ValueError(f"{name}: no records, the data is empty")


def _parse(where: str, row: Any) -> Record:
    """Validates one row and brings the texts into one form (all strings or all messages)."""
    row = _as_trl_names_it(where, row)
    texts = {key: _text(where, key, row[key]) for key in ("prompt", *_RESPONSES) if key in row}
    extra = {key: value for key, value in row.items() if key not in texts and key != "label"}
    _refuse_unread(where, extra, texts)

    if "completion" in texts and ("chosen" in texts or "rejected" in texts):
        raise ValueError(f"{where}: has field 'completion' and 'chosen' or 'rejected', expected one of {FORMATS}")
    if "completion" in texts:
        if "prompt" not in texts:
            raise ValueError(f"{where}: field 'prompt' is missing")
        (completion,), prompt, repeated = _one_form(where, texts["prompt"], {"completion": texts["completion"]})
        label = _label(where, row.get("label"))
        return Record(where, prompt, completion=completion, label=label, extra=extra, repeated=repeated)
    if "chosen" not in texts:
        missing = "chosen" if "rejected" in texts else "chosen' or 'completion"
        raise ValueError(f"{where}: field '{missing}' is missing, expected {FORMATS}")
    if "label" in row:
        extra["label"] = row["label"]
    if "rejected" not in texts:
        if "prompt" not in texts:
            raise ValueError(f"{where}: field 'rejected' is missing, and without a 'prompt' too; expected {FORMATS}")
        (chosen,), prompt, repeated = _one_form(where, texts["prompt"], {"chosen": texts["chosen"]})
        return Record(where, prompt, chosen=chosen, extra=extra, repeated=repeated)
    pair, repeated = {"chosen": texts["chosen"], "rejected": texts["rejected"]}, False
    if "prompt" in texts:
        (chosen, rejected), prompt, repeated = _one_form(where, texts["prompt"], pair)
    else:
        prompt, chosen, rejected = _implicit_prompt(where, **pair)
    return Record(where, prompt, chosen=chosen, rejected=rejected, extra=extra, repeated=repeated)


def _parse_prompt(where: str, row: Any) -> Record:
    """`_parse`, where a prompt without a response will do."""
    row = _as_trl_names_it(where, row)
    if any(key in row for key in _RESPONSES) or "prompt" not in row:
        return _parse(where, row)
    prompt = _text(where, "prompt", row["prompt"])
    extra = {key: value for key, value in row.items() if key != "prompt"}
    _refuse_unread(where, extra, {"prompt": prompt})
    return Record(where, prompt, extra=extra)


# ---- columns ---------------------------------------------------------------------------------------------------------

_RESPONSES = ("chosen", "rejected", "completion")
_CONVERSATIONS = ("conversations", "conversation", "messages")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TEXT_ALONE = ("text alone is trained on here; for images, videos and audio use TRL's DPOTrainer with "
               "fastpref.integrations.trl.patch()")
# What else the question may be called; nobody reads these beside responses
_CONTEXT = ("system", "system_prompt", "system_message", "history")
_QUESTIONS = (*_CONTEXT, "question", "instruction", "input", "inputs", "query", "problem", "context", "post", "prompts",
              "context_messages", "user", "user_prompt", "user_input", "prompt_text", "dialogue", *_CONVERSATIONS)


def _as_trl_names_it(where: str, row: Any) -> dict[str, Any]:
    """The row without null fields, ShareGPT's and Alpaca's columns as prompt and responses; `tools` and
    `chat_template_kwargs`, which may be JSON in a string, as what they say."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, expected an object {FORMATS}")
    row = {key: value for key, value in row.items() if value is not None}  # Parquet writes null for "not there"
    for key in _MEDIA:
        if row.get(key):
            raise ValueError(f"{where}: field '{key}': {_TEXT_ALONE}")
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if isinstance(row.get(key), str):
            try:
                row[key] = parse_json(row[key].strip() or "null") or kind()
            except ValueError as error:
                raise ValueError(f"{where}: field '{key}' is a string, but not of JSON ({error})") from None
        if not isinstance(row.get(key, kind()), kind):
            what = "a list" if kind is list else "an object"
            raise ValueError(f"{where}: field '{key}' is {type(row[key]).__name__}, expected {what}")
    if "kto_tag" in row:  # LLaMA-Factory
        row.setdefault("label", row.pop("kto_tag"))
    if "prompt" in row:
        return row
    name = next((key for key in _CONVERSATIONS if row.get(key)), None)
    responses = any(key in row for key in _RESPONSES)
    if name is not None:
        turns = _text(where, name, row[name])
        if isinstance(turns, str):
            raise ValueError(f"{where}: field '{name}' is str, expected a list of messages")
        answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
        if not answers or answers[-1] < len(turns) - 1:  # ends with a question: the responses are elsewhere
            if not responses and answers:
                raise ValueError(f"{where}: field '{name}' ends with role '{turns[-1]['role']}', expected 'assistant'")
            row["prompt"] = turns
        elif responses:
            return row
        else:
            cut = answers[-1 if "label" in row else 0]
            row |= {"prompt": turns[:cut], "completion": turns[cut:]}
        del row[name]
    elif not responses and "instruction" in row:
        texts = [row.pop("instruction"), row.pop("input", "")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: fields 'instruction' and 'input' have to be strings")
        row["prompt"] = [*_history(where, row.pop("history", [])),
                         {"role": "user", "content": "\n".join(text for text in texts if text)}]
        if "output" in row:
            row["completion"] = row.pop("output")
    else:
        return row
    if row.get("system") and (not row["prompt"] or row["prompt"][0]["role"] != "system"):
        row["prompt"] = [{"role": "system", "content": row.pop("system")}, *row["prompt"]]
    if not row["prompt"]:
        raise ValueError(f"{where}: field '{name}' begins with the assistant's turn, which nothing leads to")
    return row


def _history(where: str, turns: Any) -> list[dict[str, str]]:
    """Alpaca's: [[question, answer], ...]"""
    if not isinstance(turns, (list, tuple)) or not all(isinstance(t, (list, tuple)) and len(t) == 2 for t in turns):
        raise ValueError(f"{where}: field 'history' is no list of [question, answer]")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


def _refuse_unread(where: str, extra: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    """A question in a column of its own would be lost, unless the prompt has it, or every response."""
    names = _CONTEXT if "prompt" in texts else _QUESTIONS
    for key in extra:
        if not texts or not extra[key] or key.lower() not in names:
            continue
        sides = {name: list(_strings(text)) for name, text in texts.items()}
        prompt = sides.pop("prompt", [])
        for part in _strings(extra[key]):
            within = [any(part.strip() in text for text in side) for side in (prompt, *sides.values())]
            if not within[0] and not (sides and all(within[1:])):
                way = f"put it into 'prompt', for example as messages; remove the field if '{key}' is not to be read"
                raise ValueError(f"{where}: field '{key}' would be lost, only 'prompt' is read: {way}")


def _strings(value: Any) -> Iterator[str]:
    """Texts of messages but the assistant's, however they are nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if _SHAREGPT.get(str(value.get("role", value.get("from")))) != "assistant":
            yield from _strings([value.get(key) for key in ("content", "value", "text")])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def _label(where: str, label: Any) -> bool | None:
    """true, 1, 1.0, "true", "True", "1" and their opposites."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(label).strip().lower())
    if found is None and label is not None:
        raise ValueError(f"{where}: field 'label' is {label!r}, expected true or false")
    return found


# ---- texts -----------------------------------------------------------------------------------------------------------

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}


def _text(where: str, key: str, value: Any) -> Any:
    """A string or a list of messages, checked."""
    if isinstance(value, str) and (messages := _messages_in(value)) is None:
        return _utf8(where, key, value)
    value = messages if isinstance(value, str) else value
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: field '{key}' is {type(value).__name__}, expected a string or a list of messages")
    if not value:
        raise ValueError(f"{where}: field '{key}' is an empty list of messages")
    return [_message(where, f"{key}[{i}]", message) for i, message in enumerate(value)]


def _messages_in(text: str) -> list[Any] | None:
    """Messages that were written as JSON into a column of strings."""
    if not re.match(r"""\s*\[\s*\{\s*"(role|from|content|value)"\s*:""", text):
        return None
    try:
        found = parse_json(text)
    except ValueError:
        return None
    whole = all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in found)
    return found if whole and isinstance(found, list) else None


def _message(where: str, key: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: field '{key}' is {type(message).__name__}, expected a message {{role, content}}")
    message = {name: part for name, part in message.items() if part is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(where, key, message)
    if media := next((name for name in _MEDIA if message.get(name)), None):
        raise ValueError(f"{where}: field '{key}.{media}': {_TEXT_ALONE}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: field '{key}.role' is missing or not a string")
    if "tool_calls" not in message or "content" in message:  # a tool call may come without content
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = message["content"] = _joined_parts(where, key, content)
        if not isinstance(content, str):
            raise ValueError(f"{where}: field '{key}.content' is missing or not a string")
        _utf8(where, f"{key}.content", content)
    return message


def _from_sharegpt(where: str, key: str, message: dict[str, Any]) -> dict[str, Any]:
    speaker, value = message.pop("from"), message.pop("value", None)
    role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where}: field '{key}.from' is {speaker!r}, expected one of {', '.join(_SHAREGPT)}")
    if speaker != "function_call":
        return {"role": role, "content": value, **message}
    try:
        calls = parse_json(value) if isinstance(value, str) else value
        calls = [{"name": call["name"], "arguments": call["arguments"]}
                 for call in (calls if isinstance(calls, list) else [calls])]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{where}: field '{key}.value' is no function call {{name, arguments}} in JSON") from None
    return {"role": role, "tool_calls": [{"type": "function", "function": call} for call in calls], **message}


def _joined_parts(where: str, key: str, parts: Iterable[Any]) -> str:
    texts = []
    for i, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}: field '{key}.content[{i}]' is of type {kind!r}: {_TEXT_ALONE}")
        texts.append(text)
    return "".join(texts)


def _utf8(where: str, key: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field '{key}' has a lone surrogate at character {error.start}") from None
    return text


REPEATED = 8  # characters: fewer may begin a prompt and its responses by chance ("Hello")


def _one_form(where: str, prompt: Any, responses: dict[str, Any]) -> tuple[list[Any], Any, bool]:
    """Responses and prompt as all strings or all messages; responses that all repeat the prompt lose it, and whether
    strings did."""
    if isinstance(prompt, str) and all(isinstance(text, str) for text in responses.values()):
        texts = list(responses.values())
        if len(prompt.strip()) < REPEATED or not all(text.startswith(prompt) and text != prompt for text in texts):
            return texts, prompt, False
        return [text[len(prompt) :] for text in texts], prompt, True
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
    return list(messages.values()), prompt, False


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
