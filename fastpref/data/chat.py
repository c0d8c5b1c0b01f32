"""Messages -> text, as a tokenizer's chat template writes them, and which characters of it are the model's.

A response may be several turns, some of them a user's or a tool's. The model's are those that the template marks
({% generation %}); where it marks none, the conversation is rendered again with one message exchanged, and what differs
is that message. So it does not matter that many templates write a turn otherwise once another follows it.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fastpref.errors import first_line

from .records import Record
from .sources import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Spans = tuple[tuple[int, int], ...]  # runs [start, end) of positions: ascending, none empty, none touching another

MARKS = re.compile("\U000f0000(.*?)\U000f0001", re.DOTALL)  # a control token that is text; transformers' marks
_OTHER = "\U000f0002"  # what no conversation contains
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(?:'([^']*)'|\"([^\"]*)\")\s*\)")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}  # that a configuration may name


@dataclass(frozen=True)
class Rendering:
    """How a run reads conversations."""

    train_on: Literal["assistant", "all"] = "assistant"  # of a response: the model's turns, or every token
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # a record's own come before these
    date: str | None = None  # that the template's strftime_now tells, as 2026-11-28; None: the clock's
    sanitize_control_tokens: bool = False  # control tokens in what users and tools say are text like any other
    stops: frozenset[int] = frozenset()  # tokens that end a turn, beside EOS


def tells_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def common_length(a: Any, b: Any) -> int:
    """Of the longest common start of two strings or lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def is_prefill(messages: Sequence[Message]) -> bool:
    """Whether the response goes on with the prompt's last message."""
    last = messages[-1]
    return last["role"] == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


def _function(call: Any) -> dict[str, Any]:
    """Of a tool call, in OpenAI's form or without its wrapping."""
    found: dict[str, Any] = call.get("function") or {key: call[key] for key in ("name", "arguments") if key in call}
    return found


def with_arguments(messages: Sequence[Message], text: bool) -> list[Message]:
    """Of tool calls the arguments, which people have as objects or as OpenAI's JSON in a string, in one of the forms:
    some templates take the one alone, and write the other quoted twice."""

    def one(call: Any) -> Any:
        arguments = _function(call).get("arguments")
        if text and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not text and isinstance(arguments, str):
            try:
                arguments = parsed if isinstance(parsed := parse_json(arguments), dict) else arguments
            except ValueError:
                pass
        else:
            return call
        inside = {"arguments": arguments}
        return {**call, "function": {**call["function"], **inside}} if "function" in call else {**call, **inside}

    return [{**message, "tool_calls": [one(call) for call in message["tool_calls"]]} if message.get("tool_calls")
            else message for message in messages]


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing at all: no content, no reasoning, no call of a tool."""
    return not any(value.strip() if isinstance(value, str) else value
                   for key, value in message.items() if key not in ("role", "name"))


@dataclass(frozen=True)
class Conversation:
    """The texts of a record."""

    prompt: str  # that a response goes on with: the header of the model's turn last, or what is begun of it
    wholes: list[str]  # the prompt and each response, rendered together
    turns: list[Spans | None]  # the characters of each whole that are the model's; None: all that follow the prompt


class Chat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self.tokenizer, self.rendering = tokenizer, rendering
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        # What is no control token ends no turn, whatever a configuration's default says (Llama's: token 2)
        self.stops = sorted(rendering.stops & tokenizer.added_tokens_decoder.keys())
        special = {*tokenizer.all_special_tokens, *map(str, tokenizer.convert_ids_to_tokens(self.stops))}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._templates: dict[bool, str] = {}
        self._ends: re.Pattern[str] | None = None

    def conversation(self, record: Record, responses: Sequence[Sequence[Message]]) -> Conversation:
        found = [self._whole(record, [*record.prompt], list(response)) for response in responses]
        return Conversation(self.prompt(record), [text for text, _ in found], [turns for _, turns in found])

    def prompt(self, record: Record) -> str:
        if not is_prefill(record.prompt):
            return self.render(record, record.prompt, add_generation_prompt=True)[0]
        # A space at the end is the next token's beginning.
        return self.render(record, record.prompt, continue_final_message=True)[0].rstrip(" ")

    def before_header(self, record: Record) -> str:
        """The prompt without what stands at its end for the model's turn: its header, and what is begun of the turn."""
        messages = record.prompt[:-1] if is_prefill(record.prompt) else record.prompt
        return self.render(record, messages)[0] if messages else ""

    def control_tokens(self, record: Record, responses: Sequence[Any]) -> int:
        """How many there are in what is said by others than the model, where they are not taken as text."""
        if self.rendering.sanitize_control_tokens:
            return 0
        messages = (m for part in (record.prompt, *responses) for m in part if m["role"] != "assistant")
        return sum(len(self.control.findall(m["content"])) for m in messages if isinstance(m.get("content"), str))

    def _whole(self, record: Record, prompt: list[Message], response: list[Message]) -> tuple[str, Spans | None]:
        if is_prefill(prompt):
            begun = prompt.pop()
            text = begun["content"] + (response[0].get("content") or "")
            response[0] = {**begun, **response[0], "content": text}
        messages = prompt + response
        text, marked = self.render(record, messages, marked=True)
        self._check_whole(record, messages, text)
        if self.rendering.train_on == "all" or (len(response) == 1 and marked is None):
            return text, None
        headers = self._headers(record, prompt, text) if prompt else []
        if marked is None:
            marked = []
            for i in range(len(prompt), len(messages)):
                if messages[i]["role"] == "assistant":
                    until = self._place(record, messages, i + 1, text)[0] if i + 1 < len(messages) else len(text)
                    start, end = self._place(record, messages, i, text, until)
                    before = marked[-1][1] if marked else 0
                    places = [text.rfind(header, before, start) for header in headers]
                    start = next((place for place in places if place >= 0), start)
                    marked.append(self._turn(record, text, start, end, until, headers))
            marked[0] = 0, marked[0][1]  # it begins where the prompt ends
        else:
            marked = [self._turn(record, text, start, end, end, headers) for start, end in marked]
        if response[-1]["role"] == "assistant" and marked:
            marked[-1] = marked[-1][0], len(text)
        return text, tuple((start, end) for start, end in marked if start < end)

    def _check_whole(self, record: Record, messages: list[Message], text: str) -> None:
        """Raises ValueError where the template writes nothing of a tool call, or of what others than the model say."""
        for i, message in enumerate(messages if text.strip() else ()):
            said, calls = message.get("content"), message.get("tool_calls")
            if message["role"] == "assistant":
                what, lost = "tool_calls", False
                if calls:
                    named = [{**call, "function": {**_function(call), "name": _OTHER}} for call in calls]
                    other = [*messages[:i], {**message, "tool_calls": named}, *messages[i + 1 :]]
                    with suppress(ValueError):
                        lost = self.render(record, other)[0] == text
            else:
                what = f"a message of role '{message['role']}'"
                lost = isinstance(said, str) and said.strip() not in text
                lost = lost and self._place(record, messages, i, text)[0] == len(text)
            if lost:
                raise ValueError(f"{record.source}: the chat template writes nothing of {what} (message {i + 1}): set "
                                 "chat_template to one that does, or take it out of the record")

    def _headers(self, record: Record, prompt: list[Message], text: str) -> list[str]:
        """Of the model's turn: as it is given to the model, and as much of that as stands in the conversation."""
        before = self.render(record, prompt)[0]
        header = self.render(record, prompt, add_generation_prompt=True)[0]
        header = header[common_length(header, before):]
        own = header[: common_length(header, text[len(before):])]
        return [part for part in dict.fromkeys((header, own)) if part.strip()]

    def _place(self, record: Record, messages: list[Message], index: int, text: str,
               until: int | None = None) -> tuple[int, int]:
        """Of what message `index` says, in the text of all of them; before `until`, where the next one speaks.
        (DeepSeek's template writes later calls otherwise where an earlier one is gone.)"""
        found = []
        message, other = messages[index], [*messages]
        calls = [{**call, "function": {**_function(call), "arguments": {_OTHER: _OTHER}}}
                 for call in message.get("tool_calls") or []]
        for exchanged in (
            {"role": message["role"], "content": _OTHER},
            {**message, "content": _OTHER},  # a tool's answer that follows may want its call
            {**message, "tool_calls": calls},
        ):
            other[index] = exchanged
            try:
                without = self.render(record, other)[0]
            except ValueError:
                continue
            if without != text:
                start = common_length(text, without)
                found.append((start, len(text) - common_length(text[start:][::-1], without[start:][::-1])))
                if until is None or found[-1][1] <= until:
                    return found[-1]
        return min(found, key=lambda place: place[1], default=(len(text), len(text)))

    def _turn(self, record: Record, text: str, start: int, end: int, until: int,
              headers: Sequence[str]) -> tuple[int, int]:
        """A turn of the model begins after its header, which is given to it, and ends with the token for that, which
        comes before `until`."""
        for header in headers:
            at = text.rfind(header, 0, start + len(header))
            if at >= 0 and start < at + len(header):
                start = at + len(header)
                break
        if self._ends is None:
            self._ends = self._find_ends(record)
        end = start + len(text[start:end].rstrip())
        closing = self._ends.match(text, end) or self._ends.search(text, end, until)
        return start, closing.end() if closing else end

    def _find_ends(self, record: Record) -> re.Pattern[str]:
        """What closes a turn: EOS, or the control token that the template writes after one."""
        ends = {str(self.tokenizer.eos_token), *self.tokenizer.convert_ids_to_tokens(self.stops)}
        asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": _OTHER}
        after = []
        for messages in ([asked, said], [asked, said, asked], [{**asked, "content": _OTHER}, {**said, "content": "b"}]):
            try:
                after.append(self.render(record, messages)[0].rpartition(_OTHER)[2].lstrip())
            except ValueError:  # the template takes no such conversation
                after.append("")
        own = [found[0] for text in (after[0], after[2]) if (found := self.control.match(text))]
        if not own:  # words instead, if any, that close the last turn and one before it
            own = [text] if (text := after[0][: common_length(*after[:2])].rstrip()) else []
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted({*ends, *own})))})")

    def render(self, record: Record, messages: Sequence[Message], *, marked: bool = False,
               as_text: bool = False, **how: bool) -> tuple[str, list[tuple[int, int]] | None]:
        """The text (arguments of tool calls as objects, or as_text); and, if asked for and the template has such marks,
        which characters of it the model writes."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{record.source}: has messages, but tokenizer {self.name} has no chat template; set chat_template to "
                f"a file with one, or to {', '.join(TEMPLATES)}"
            )
        tools, own = record.extra.get("tools") or None, record.extra.get("chat_template_kwargs") or {}
        template = self._template(bool(tools))
        if tools and not re.search(r"\btools\b", template):
            raise ValueError(f"{record.source}: the chat template writes nothing of tools: leave the field out, or set "
                             "chat_template to a file with one that does")
        given = {"tools": tools, **self.rendering.chat_template_kwargs, **own, **how}
        if self.rendering.sanitize_control_tokens:
            messages = [self._sanitized(message) for message in messages]
        messages = with_arguments(messages, as_text)
        try:
            if marked and _GENERATION.search(template):
                from transformers.utils.chat_template_utils import render_jinja_template

                texts, marks = render_jinja_template(  # type: ignore[str-unpack]
                    [copy.deepcopy(list(messages))], chat_template=template, return_assistant_tokens_mask=True,
                    **{**self.tokenizer.special_tokens_map, **given},
                )
                return str(texts[0]), list(map(tuple, marks[0]))  # type: ignore[arg-type]
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, **given)
        except Exception as error:  # templates raise whatever their author chose
            if not as_text and any(message.get("tool_calls") for message in messages):
                return self.render(record, messages, marked=marked, as_text=True, **how)
            line = first_line(error)
            raise ValueError(f"{record.source}: the chat template refuses the messages ({line})") from error
        return str(text), None

    def _template(self, tools: bool) -> str:
        """With the run's date in it."""
        if tools not in self._templates:
            template = str(self.tokenizer.get_chat_template(None, [{}] if tools else None))
            if self.rendering.date is not None:
                date = datetime.date.fromisoformat(self.rendering.date)
                template = _DATE.sub(lambda call: repr(date.strftime(call[1] or call[2] or "")), template)
                if re.search(r"strftime_now\s*\(", template):
                    raise ValueError(
                        f"tokenizer {self.name}: its chat template tells the time by strftime_now of something that is "
                        "no plain string, so one date cannot stand for the whole run; set chat_template to a file that "
                        "has the string instead"
                    )
            self._templates[tools] = template
        return self._templates[tools]

    def _sanitized(self, message: Message) -> Message:
        text = message.get("content")
        if message["role"] == "assistant" or not isinstance(text, str):
            return message
        return {**message, "content": self.control.sub(lambda found: f"\U000f0000{found[0]}\U000f0001", text)}


_TAG = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def turns_in_text(prompt: str, response: str) -> Spans | None:
    """The characters of a response that are the model's, in conversations written as HH has them ("\\n\\nHuman: ...
    \\n\\nAssistant: ..."); None: all."""
    if not re.match(r"\s*Human:", prompt):
        return None
    text, first = prompt + response, len(prompt)
    spans, start = [], None
    for tag in _TAG.finditer(text):
        if start is not None:
            spans.append((start, tag.start()))
        start = tag.end() if tag[1] == "Assistant" else None
    if start is not None:
        spans.append((start, len(text)))
    found = tuple((max(start, first) - first, end - first) for start, end in spans if end > first)
    return None if found == ((0, len(response)),) else found
