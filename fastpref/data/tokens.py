"""Records -> token ids, with a report of what was cut or left out.

What is scored are the response tokens, the closing EOS included:

    input_ids    p p p p p r r r E       a prompt of 5 tokens (BOS among them), a response of 3, EOS
    targets              r r r E         hidden rows 4..7 predict them: score_rows
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy

from fastpref.errors import first_line

from .records import Invalid, Record, common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["pair", "sft", "kto"]
KINDS = ("pair", "sft", "kto")
Spans = tuple[tuple[int, int], ...]  # runs [start, end) of positions: ascending, none empty, none touching another


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
    prompts_shortened_by_template: int = 0  # the template renders the prompt alone unlike the prompt of a conversation
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> sources of the records
    invalid: Invalid = field(default_factory=Invalid)  # of reading and of rendering
    prompt_tokens: tuple[float, int] = (0, 0)  # median, max per example
    response_tokens: tuple[float, int] = (0, 0)  # median, max per response

    def __str__(self) -> str:
        noun = {"pair": "pairs", "sft": "examples", "kto": "labelled examples"}[self.kind]
        parts = [f"{self.records:,} records -> {self.examples:,} {noun}"]
        parts += [f"{count:,} {what}" for what, count in (
            ("prompts truncated", self.prompts_truncated),
            ("responses truncated", self.responses_truncated),
            ("prompts repeated at the head of the responses, taken off", self.prompts_repeated),
            ("prompts shortened to what the chat template keeps", self.prompts_shortened_by_template),
        ) if count]
        parts += [f"{len(where):,} dropped: {why} (first: {where[0]})" for why, where in self.dropped.items()]
        if self.invalid.count:
            parts.append(f"{self.invalid.count:,} invalid records dropped")
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
        for name, value in vars(self).items():
            if isinstance(value, int):
                setattr(self, name, value + getattr(other, name))
        for reason, where in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(where)

    def none_usable(self) -> str:
        why = "; ".join(f"{len(where)} {reason}" for reason, where in self.dropped.items()) or "all are invalid"
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
    invalid: Invalid | None = None,
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
    invalid: counts the records that the chat template refuses or that lack what `kind` needs, which are left out.

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
    rendered: dict[int, tuple[str, list[str]]] = {}
    for record_id, record in enumerate(records):
        try:
            rendered[record_id] = _render(record, encoder, kind, report)
        except ValueError as error:
            if invalid is None or not encoder.tokenizer.chat_template and record.conversational:
                raise
            invalid.add(error)
    prompts = encoder.prompts([(text, records[i].conversational) for i, (text, _) in rendered.items()])
    responses = iter(encoder.responses([text for r in rendered.values() for text in r[1]]))

    examples: list[Example] = []
    overlong: list[str] = []
    for (record_id, (_, texts)), prompt in zip(rendered.items(), prompts, strict=True):
        record = records[record_id]
        report.prompts_repeated += record.repeated
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
           for ids in prompts]
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
        start = start if whole.startswith(start) else common_prefix(start, whole)
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
        open_ended = is_prompt and messages[-1]["role"] == "assistant"  # the response goes on with the last message
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=record.extra.get("tools") or None,
                tokenize=False,
                add_generation_prompt=is_prompt and not open_ended,
                continue_final_message=open_ended,
                **record.extra.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # templates raise whatever their author chose
            line = first_line(error)
            raise ValueError(f"{record.source}: the chat template refuses the messages ({line})") from error
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
