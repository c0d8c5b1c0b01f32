"""Records -> token ids, with a report of what was cut or left out.

What is scored are the response tokens, the closing EOS included:

    input_ids    p p p p p r r r E       a prompt of 5 tokens (BOS among them), a response of 3, EOS
    targets              r r r E         hidden rows 4..7 predict them: score_rows
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy

from .chat import MARKS, Chat, Conversation, Rendering, Spans, common_length, is_empty, turns_in_text
from .records import Invalid, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["pair", "sft", "kto"]
KINDS = ("pair", "sft", "kto")


@dataclass(frozen=True)
class Example:
    """One tokenised record: a prompt and its one or two responses. Token ids as plain lists.

    A response may hold turns that are not the model's (a user's, a tool's). They are read and not scored.
    """

    record_id: int  # index into the list of records
    prompt_ids: list[int]  # BOS first where the tokenizer uses one; never empty
    responses: tuple[list[int], ...]  # (chosen, rejected) or (completion,); EOS last unless truncated
    desirable: bool | None = None  # KTO's label
    ref_logps: tuple[float, ...] | None = None  # of the responses under the reference model, nats; set by its cache
    margin: float | None = None  # of a pair, see `with_margins`; set where the loss takes it
    scored: tuple[Spans, ...] | None = None  # of each response, the runs of tokens that are scored; None: all of all

    @property
    def scored_tokens(self) -> list[int]:
        """How many tokens of each response are scored."""
        if self.scored is None:
            return [len(ids) for ids in self.responses]
        return [sum(end - start for start, end in spans) for spans in self.scored]

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
        """128 bits over exactly what a log-prob depends on: the ids of prompt and responses, and which are scored
        where not all are; and the margin."""
        digest = hashlib.sha256()
        for ids in (self.prompt_ids, *self.responses):
            digest.update(numpy.array([len(ids), *ids], dtype="<i8").tobytes())
        if self.margin is not None:
            digest.update(numpy.array([self.margin], dtype="<f8").tobytes())
        for spans in self.scored or ():
            digest.update(numpy.array([-1 - len(spans), *chain.from_iterable(spans)], dtype="<i8").tobytes())
        return digest.hexdigest()[:32]


@dataclass
class TokenizeReport:
    """What became of the records; `str()` is the line to show."""

    kind: Kind
    records: int = 0
    examples: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    prompts_repeated: int = 0  # see Record.repeated
    # The template, or a token that goes on into the response, makes the prompt alone another than in a conversation
    prompts_shortened_by_template: int = 0
    responses_retokenized: int = 0  # strings, whose tokens would be others if prompt and response were one text
    responses_with_other_turns: int = 0  # a user's or a tool's: not scored
    tokens_of_other_turns: int = 0
    control_tokens: int = 0  # records in which a user or a tool says one
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> sources of the records
    invalid: Invalid = field(default_factory=Invalid)  # of reading and of rendering
    prompt_tokens: tuple[float, int] = (0, 0)  # median, max per example
    response_tokens: tuple[float, int] = (0, 0)  # median, max per response

    def __str__(self) -> str:
        noun = {"pair": "pairs", "sft": "examples", "kto": "labelled examples"}[self.kind]
        parts = [f"{self.records:,} records -> {self.examples:,} {noun}"]
        parts += [f"{getattr(self, name):,} {what}" for name, what in _COUNTS.items() if getattr(self, name)]
        if self.responses_with_other_turns:
            parts.append(f"{self.responses_with_other_turns:,} responses with turns of others than the model, "
                         f"{self.tokens_of_other_turns:,} tokens that are read and not scored")
        parts += [f"{len(where):,} dropped: {why} (first: {where[0]})" for why, where in self.dropped.items()]
        if self.invalid.count:
            parts.append(f"{self.invalid.count:,} invalid records dropped")
        for what, (median, most) in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            parts.append(f"{what} tokens: median {median:g}, max {most:,}")
        return "; ".join(parts)

    def count(self, examples: Any) -> None:
        """Fills in what is said of the examples; zeros for none."""
        self.examples = len(examples)
        if hasattr(examples, "prompt_lengths"):  # columns: no token is read
            self.prompt_tokens = _median_max(examples.prompt_lengths)
            self.response_tokens = _median_max(examples.response_lengths)
        else:
            self.prompt_tokens = _median_max([len(e.prompt_ids) for e in examples])
            self.response_tokens = _median_max([len(ids) for e in examples for ids in e.responses])

    def add(self, other: TokenizeReport) -> None:
        """What became of further records; `count` is for the examples of both."""
        for name, value in vars(self).items():
            if isinstance(value, int):
                setattr(self, name, value + getattr(other, name))
        for reason, where in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(where)
        self.invalid.extend(other.invalid)

    def none_usable(self) -> str:
        why = "; ".join(f"{len(where)} {reason}" for reason, where in self.dropped.items()) or "all are invalid"
        return f"none of the {self.records} records is usable ({why})"


_COUNTS = {
    "prompts_truncated": "prompts truncated",
    "responses_truncated": "responses truncated",
    "prompts_repeated": "prompts repeated at the head of the responses, taken off",
    "prompts_shortened_by_template": "prompts shortened to what they share with the whole conversation",
    "responses_retokenized": "responses whose first tokens would be others had prompt and response been one text",
    "control_tokens": "records in which a user or a tool says a control token, which ends or begins a turn (to take it "
                      "as text: sanitize_control_tokens=true)",
}


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind = "pair",
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_end",
    overlong_response: Literal["error", "drop", "truncate"] = "error",
    rendering: Rendering = Rendering(),  # noqa: B008 (frozen)
    partial: bool = False,
    invalid: Invalid | None = None,
) -> tuple[list[Example], TokenizeReport]:
    """Token ids of prompts and responses, and a report of what was cut or left out.

    Messages are rendered together and cut where the prompt ends, between two of their tokens: where the prompt alone
    ends within a token of a response, or is rendered otherwise, it is shortened to what all have in common. Strings are
    tokenised apart: so the prompt's ids are those the model will see when it generates. BOS (whatever the tokenizer
    itself puts first) stands once; for messages the chat template alone decides about it. A response ends once, with
    EOS or the token of `rendering.stops` that it has, without what a chat template puts after it (ChatML's newline).

    Of a response of several turns the model's are scored (`Example.scored`); it ends with the last of them.

    kind: "pair" needs chosen and rejected; "kto" needs label, or takes a pair apart into a desirable and an
        undesirable example; "sft" takes completion or chosen, and leaves out completions labelled false.
    max_length: limit on prompt + longest response, in tokens. The prompt is cut to fit, at least one token of it stays.
    max_prompt_length: a limit on the prompt alone.
    truncation_mode: which end of a prompt that is cut stays; BOS stays in both cases, and so does what a chat template
        puts last, the header of the model's turn.
    overlong_response: a response of max_length tokens or more leaves no room for a prompt. "error" says so and stops,
        "drop" leaves the record out, "truncate" gives the prompt at most max_prompt_length (default: half of
        max_length) tokens and the response's first tokens the rest; it then has no EOS.
    rendering: of conversations.
    partial: the records are a part of the data: that none of them is usable is no error.
    invalid: counts the records that the chat template refuses or that lack what `kind` needs, which are left out.

    Also left out, and counted: pairs whose responses are equal, empty responses, and an empty prompt where the
    tokenizer has no BOS (nothing would predict the first token).

    Raises ValueError, one line, for a tokenizer without EOS, messages without a chat template, a record without the
    fields that `kind` needs, an overlong response under "error", and when no record is usable.
    """
    _check_limits(kind, max_length, max_prompt_length, truncation_mode, overlong_response)
    if not records:
        raise ValueError("records: got none, expected at least one")
    encoder = _Encoder(tokenizer, rendering)
    report = TokenizeReport(kind, records=len(records))
    said, conversations = _said(records, kind, encoder, invalid)
    examples: list[Example] = []
    overlong: list[str] = []
    for record_id, (prompt, answers, scored) in encoder.encode(records, said, conversations, report).items():
        record = records[record_id]
        report.prompts_repeated += record.repeated
        longest = max(map(len, answers))
        too_long = longest >= max_length
        reason = _unusable(record, said[record_id], kind, encoder, prompt, answers, scored)
        if too_long and overlong_response == "drop":
            reason = reason or f"response of max_length = {max_length} tokens or more"
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
            scored = [_clip(spans, max_length - room) for spans in scored]
        room = min(room, max_prompt_length or room)
        if len(prompt) > room:
            prompt = encoder.cut(record, prompt, room, truncation_mode)
            report.prompts_truncated += 1
        if reason := _nothing_to_learn(answers, scored):  # two answers may have differed only in what was cut off
            report.dropped.setdefault(f"{reason} once truncated", []).append(record.source)
            continue
        examples += _examples(record_id, record, kind, prompt, answers, scored, report)
    if overlong:
        raise ValueError(
            f"{overlong[0]} leaves no room for a prompt in max_length={max_length} ({len(overlong)} of {len(records)} "
            "records are like that): raise max_length, or set overlong_response to drop or truncate"
        )
    if not examples and not partial:
        raise ValueError(f"{records[0].source}: {report.none_usable()}")
    report.count(examples)
    return examples, report


def _check_limits(kind: str, max_length: int, max_prompt_length: int | None, truncation_mode: str,
                  overlong_response: str) -> None:
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


def _said(records: Sequence[Record], kind: Kind, encoder: _Encoder, invalid: Invalid | None
          ) -> tuple[dict[int, list[Any]], dict[int, Conversation]]:
    """The responses of each record that has them, and the conversations among those records."""
    said: dict[int, list[Any]] = {}
    conversations: dict[int, Conversation] = {}
    for record_id, record in enumerate(records):
        try:
            texts = _responses(record, kind)
            if record.conversational:
                conversations[record_id] = encoder.chat.conversation(record, texts)
            said[record_id] = texts
        except ValueError as error:
            if invalid is None or not encoder.tokenizer.chat_template and record.conversational:
                raise
            invalid.add(error)
    return said, conversations


def _unusable(record: Record, texts: list[Any], kind: Kind, encoder: _Encoder, prompt: list[int],
              answers: list[list[int]], scored: Sequence[Spans | None]) -> str | None:
    """Why a record is left out, or None."""
    if kind == "sft" and record.label is False:
        return "completion labelled false"
    if any(map(_says_nothing, texts)) or any(map(encoder.is_end, answers)):
        return "empty response"
    if reason := _nothing_to_learn(answers, scored):
        return reason
    return None if prompt else "empty prompt, and the tokenizer has no BOS"


def _nothing_to_learn(answers: list[list[int]], scored: Sequence[Spans | None]) -> str | None:
    if not all(spans is None or spans for spans in scored):
        return "no turn of the model in a response"
    return "chosen equals rejected" if len(answers) == 2 and answers[0] == answers[1] else None


def _examples(record_id: int, record: Record, kind: Kind, prompt: list[int], answers: list[list[int]],
              scored: Sequence[Spans | None], report: TokenizeReport) -> list[Example]:
    runs = tuple(((0, len(ids)),) if spans is None else spans for ids, spans in zip(answers, scored, strict=True))
    report.responses_with_other_turns += sum(spans is not None for spans in scored)
    report.tokens_of_other_turns += sum(map(len, answers)) - sum(end - start for run in runs for start, end in run)
    if kind == "kto" and record.completion is None:
        return [Example(record_id, prompt, (ids,), good, scored=None if spans is None else (spans,))
                for ids, spans, good in zip(answers, scored, (True, False), strict=True)]
    some = None if all(spans is None for spans in scored) else runs
    return [Example(record_id, prompt, tuple(answers), record.label if kind == "kto" else None, scored=some)]


def tokenize_prompts(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_end",
    rendering: Rendering = Rendering(),  # noqa: B008 (frozen)
) -> tuple[list[list[int]], int]:
    """Ids of the prompts alone, ready to be continued, and how many of them were cut to max_length tokens.

    They are those that `tokenize_records` gives the same records, unless the chat template renders a prompt otherwise
    once a response follows. Raises ValueError for messages without a chat template, and for an empty prompt where the
    tokenizer has no BOS.
    """
    encoder = _Encoder(tokenizer, rendering)
    prompts = encoder.prompts(records)
    for record, ids in zip(records, prompts, strict=True):
        if not ids:
            raise ValueError(f"{record.source}: the prompt is empty, and the tokenizer has no BOS")
    cut = [encoder.cut(record, ids, max_length, truncation_mode) if len(ids) > max_length else ids
           for record, ids in zip(records, prompts, strict=True)]
    return cut, sum(len(ids) > max_length for ids in prompts)


def with_margins(
    examples: Sequence[Example], records: Sequence[Record], invalid: Invalid | None = None
) -> list[Example]:
    """The examples with their records' field `margin`, TRL's name: how much better the chosen response is. Without it a
    pair has none, which is a margin of 0. Raises ValueError for one that is no finite number; or counts it as invalid.
    """
    found = []
    for example in examples:
        record = records[example.record_id]
        margin = record.extra.get("margin")
        if margin is not None and (
            isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin)
        ):
            error = ValueError(f"{record.source}: field 'margin' is {margin!r}, expected a finite number")
            if invalid is None:
                raise error
            invalid.add(error)
            continue
        found.append(replace(example, margin=None if margin is None else float(margin)))
    return found


def _median_max(lengths: Any) -> tuple[float, int]:
    return (float(numpy.median(lengths)), int(numpy.max(lengths))) if len(lengths) else (0, 0)


def _clip(spans: Spans | None, length: int) -> Spans | None:
    return None if spans is None else tuple((start, min(end, length)) for start, end in spans if start < length)


def _says_nothing(response: Any) -> bool:
    """A string, or messages of which one of the model's is empty: it would learn to end a turn at once."""
    if isinstance(response, str):
        return not response.strip()
    return any(is_empty(message) for message in response if message["role"] == "assistant")


def _responses(record: Record, kind: Kind) -> list[Any]:
    """Those that `kind` asks for."""
    where = record.source
    if kind == "pair":
        if record.rejected is None:
            missing = "chosen" if record.chosen is None else "rejected"
            raise ValueError(f"{where}: field '{missing}' is missing, preference pairs need chosen and rejected")
        return [record.chosen, record.rejected]
    if kind == "sft":
        return [record.chosen if record.completion is None else record.completion]
    if record.completion is None and record.rejected is None:
        raise ValueError(f"{where}: field 'rejected' is missing, KTO needs completion and label, or a pair")
    if record.completion is not None and record.label is None:
        raise ValueError(f"{where}: field 'label' is missing, KTO needs true or false")
    return [record.chosen, record.rejected] if record.completion is None else [record.completion]


Encoded = tuple[list[int], list[list[int]], list["Spans | None"]]  # prompt, responses, and what of each is scored


class _Encoder:
    """What has to be known about a tokenizer, found by asking it rather than by its class."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering):
        self.tokenizer, self.rendering = tokenizer, rendering
        self.chat = Chat(tokenizer, rendering)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {self.chat.name}: has no EOS token to end responses with; set its eos_token")
        self.eos: int = tokenizer.eos_token_id
        self.stops = {self.eos, *self.chat.stops}
        self._blank: dict[int, bool] = {}
        self._joins: dict[tuple[str, str], bool] = {}
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

    def encode(self, records: Sequence[Record], said: dict[int, list[Any]], conversations: dict[int, Conversation],
               report: TokenizeReport) -> dict[int, Encoded]:
        """said: the responses of each record by its index, strings or messages; conversations: of those with messages,
        rendered."""
        joint = iter(self._ids([text for c in conversations.values() for text in (c.prompt, *c.wholes)]))
        strings = [i for i in said if i not in conversations]
        prompts = iter(self.prompts([records[i] for i in strings]))
        apart = iter(self._apart([text for i in strings for text in said[i]]))
        found: dict[int, Encoded] = {}
        for i, texts in said.items():
            record, conversation = records[i], conversations.get(i)
            if conversation is None:
                prompt = next(prompts)
                answers = [self._string(record.prompt, text, next(apart)) for text in texts]
                report.responses_retokenized += sum(not self._joins_well(record.prompt, text) for text in texts)
            else:
                prompt, wholes = next(joint), [next(joint) for _ in texts]
                shared = min(common_length(prompt, ids) for ids in wholes)
                report.prompts_shortened_by_template += shared < len(prompt)
                report.control_tokens += self.chat.control_tokens(record, texts) > 0
                prompt = prompt[:shared]
                answers = [
                    self._turns(text, ids, spans, shared)
                    for text, ids, spans in zip(conversation.wholes, wholes, conversation.turns, strict=True)
                ]
            found[i] = prompt, [ids for ids, _ in answers], [spans for _, spans in answers]
        return found

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """With the tokenizer's own prefix once; a chat template has its own."""
        texts = [self.chat.prompt(r) if r.conversational else r.prompt for r in records]
        return [
            ids if record.conversational or ids[: len(self.prefix)] == self.prefix else self.prefix + ids
            for ids, record in zip(self._ids(texts), records, strict=True)
        ]

    def cut(self, record: Record, ids: list[int], room: int, mode: str) -> list[int]:
        """The first or last `room` tokens of a prompt. What the tokenizer puts first (BOS) stays first, and the header
        of the model's turn stays last."""
        kept = len(self.prefix) if self.prefix and ids[: len(self.prefix)] == self.prefix else 0
        kept = kept if kept <= room else 0
        tail = room - kept
        if mode == "keep_start":
            header = 0
            if record.conversational:
                header = len(ids) - common_length(ids, self._ids([self.chat.before_header(record)])[0])
            tail = min(header, tail)
            kept = room - tail
        return ids[:kept] + ids[len(ids) - tail :]

    def is_end(self, ids: list[int]) -> bool:
        """Whether a response is over before it begins."""
        return len(ids) == 1 and ids[0] in self.stops

    def _string(self, prompt: str, text: str, ids: list[int]) -> tuple[list[int], Spans | None]:
        spans = turns_in_text(prompt, text) if self.rendering.train_on == "assistant" else None
        if spans is None:
            return self._end(ids), None
        skip = len(self.anchor) if self.anchor and ids != self._ids([text])[0] else 0
        anchored = [(start + skip, end + skip) for start, end in spans]
        whole = [*self.anchor_ids, *ids] if skip else ids
        return self._scored(self.anchor[:skip] + text, whole, anchored, len(whole) - len(ids))

    def _turns(self, text: str, ids: list[int], spans: Spans | None, shared: int) -> tuple[list[int], Spans | None]:
        return (self._end(ids[shared:]), None) if spans is None else self._scored(text, ids, spans, shared)

    def _scored(self, text: str, ids: list[int], spans: Sequence[tuple[int, int]],
                shared: int) -> tuple[list[int], Spans | None]:
        """The response that begins at token `shared` of a text, and its tokens that are in these characters. It ends
        where the last of them do."""
        marks = [0] * len(ids)
        bounds = self._tokens_before(text, ids, [position for span in spans for position in span])
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            marks[start:end] = [1] * (end - start)
        marks = marks[shared:]
        if 1 not in marks:
            return ids[shared:], ()
        last = len(marks) - marks[::-1].index(1)
        if shared + last == len(ids):  # the model's turn is the last
            answer = self._end(ids[shared:])
        else:
            answer = ids[shared : shared + last]
        marks = marks[: len(answer)] + [1] * (len(answer) - len(marks))
        edges = [i for i in range(len(marks) + 1) if (marks[i - 1] if i else 0) != (marks[i] if i < len(marks) else 0)]
        found = tuple(zip(edges[::2], edges[1::2], strict=True))
        return answer, None if found == ((0, len(answer)),) else found

    def _tokens_before(self, text: str, ids: list[int], positions: list[int]) -> list[int]:
        """How many tokens of a text have ended at each of these characters."""
        if self.tokenizer.is_fast and not MARKS.search(text):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = [end for _, end in encoded["offset_mapping"]]
            return [bisect_right(ends, position) for position in positions]
        return [common_length(ids, part) for part in self._ids([text[:position] for position in positions])]

    def _joins_well(self, prompt: str, response: str) -> bool:
        """Whether the tokens about the boundary are those of the text in one piece. Looks at a few characters."""
        near = prompt[-12:], response[:12]
        if near not in self._joins:
            before, after, joint = self._ids([near[0], self.anchor + near[1], near[0] + near[1]])
            self._joins[near] = not near[0] or joint == before + after[len(self.anchor_ids) :]
        return self._joins[near]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for i in range(0, len(texts), 1024):
            part = self.tokenizer(
                texts[i : i + 1024], add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            ids += part["input_ids"]
        for i, text in enumerate(texts):
            if MARKS.search(text):
                ids[i] = self._marked_ids(text)
        return ids

    def _marked_ids(self, text: str) -> list[int]:
        """Of a text in which some control tokens are text like any other."""
        found: list[int] = []
        for i, piece in enumerate(MARKS.split(text)):
            if piece:
                anchor = self.anchor if found else ""
                ids = self.tokenizer(
                    anchor + piece, add_special_tokens=False, verbose=False, split_special_tokens=i % 2 == 1
                )["input_ids"]
                found += ids[len(self.anchor_ids) :] if anchor else ids
        return found

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _apart(self, texts: list[str]) -> list[list[int]]:
        """Ids of responses that are read without their prompts."""
        all_ids = self._ids([self.anchor + text for text in texts])
        if self.anchor:
            skip = len(self.anchor_ids)
            all_ids = [
                ids[skip:] if ids[:skip] == self.anchor_ids else self._ids([text])[0]
                for ids, text in zip(all_ids, texts, strict=True)
            ]
        return all_ids

    def _end(self, ids: list[int]) -> list[int]:
        """Ended exactly once: by the token that ends the turn, without what follows it, or else by EOS."""
        start = len(ids)  # of what is at the end and says nothing
        while start and (ids[start - 1] in self.stops or self._is_blank(ids[start - 1])):
            start -= 1
        end = next((i for i in range(start, len(ids)) if ids[i] in self.stops), None)
        return ids + [self.eos] if end is None else ids[: end + 1]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._decode([token]).strip()
        return self._blank[token]
