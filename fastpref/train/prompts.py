"""Prompts of a data set: what is sampled from, and the questions that greedy generations are to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Record
from fastpref.report.reading import text_of

PROSE = 8  # words: more than these are prose
Prompt = str | list[dict[str, Any]]  # a text, or messages


@dataclass(frozen=True)
class TokenizedPrompt:
    """What is sampled from."""

    prompt: Prompt  # as the record has it, for the scorer
    ids: list[int]


def first_prompts(records: Sequence[Record], examples: Sequence[Example], limit: int) -> list[TokenizedPrompt]:
    """The first so many different ones."""
    found: dict[tuple[int, ...], TokenizedPrompt] = {}
    for example in examples:
        if len(found) == limit:
            break
        prompt = records[example.record_id].prompt
        found.setdefault(tuple(example.prompt_ids), TokenizedPrompt(prompt, example.prompt_ids))
    return list(found.values())


def decoded_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], limit: int
) -> list[TokenizedPrompt]:
    """The same of examples whose records are not at hand."""
    different = dict.fromkeys(tuple(example.prompt_ids) for example in examples)
    return [
        TokenizedPrompt(str(tokenizer.decode(list(ids), skip_special_tokens=True)), list(ids))
        for ids in list(different)[:limit]
    ]


@dataclass(frozen=True)
class Question:
    """A held-out prompt and the answer its greedy generation should be; None: no one answer is right."""

    prompt: str  # for people
    prompt_ids: list[int]
    answer: str | None
    task: str | None  # the record's `task`, to group by
    asked: Prompt = ""  # as the record has it, for the scorer


def questions(records: Sequence[Record], examples: Sequence[Example], limit: int | None) -> list[Question]:
    """One a record. The answer is the record's field `answer`, else its chosen response or good completion; of messages
    only where that is no prose: nobody writes another's sentences word by word."""
    found: dict[int, Question] = {}
    for example in examples:
        record = records[example.record_id]
        answer = record.extra.get("answer")
        response = None if record.label is False else record.chosen if record.completion is None else record.completion
        if answer is None:
            answer = response[-1].get("content") if isinstance(response, list) else response
            if isinstance(response, list) and len(str(answer).split()) > PROSE:
                answer = None
        if (answer is not None or isinstance(response, list)) and example.record_id not in found:
            task = record.extra.get("task")
            found[example.record_id] = Question(
                text_of(record.prompt), example.prompt_ids, None if answer is None else str(answer).strip(),
                None if task is None else str(task), record.prompt)
    return list(found.values())[:limit]
