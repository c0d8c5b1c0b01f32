"""A verifier for `fastpref rounds`: 1 for a response that meets the constraint of its prompt in examples/smollm2/data.

    scorer: examples.smollm2.verifier:satisfied

What has fewer than three words of its own, or says the same over and over, meets none: "Yes" has no commas either, and
the words to end with are no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
LEAST_WORDS = 3
DISTINCT = 0.5  # of the runs of four words, the least share that is new


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def repeats(text: str) -> bool:
    """Whether half of its runs of four words, or more, stood there before."""
    found = [word.lower() for word in words(text)]
    runs = list(zip(found, found[1:], found[2:], found[3:]))
    return len(runs) >= 8 and len(set(runs)) <= DISTINCT * len(runs)


def count_word(text: str, word: str) -> int:
    return sum(found.lower() == word for found in words(text))


def count_sentences(text: str) -> int:
    """Ends with . ! or ? before white space or the end; what is left without one counts too."""
    parts = re.split(r"[.!?]+[\"'”’)\]]*(?:\s+|$)", text.strip())
    return sum(bool(words(part)) for part in parts)


def _json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return isinstance(found, dict) and bool(found)


def _numbered(text: str, n: int) -> bool:
    return [int(i) for i in re.findall(r"^\s*(\d+)[.)]\s+\S", text, re.MULTILINE)] == list(range(1, n + 1))


def _begins(text: str, phrase: str) -> bool:
    return text.lower().startswith(phrase.lower()) and not text[len(phrase) :][:1].isalnum()


def _paragraphs(text: str) -> int:
    return sum(bool(words(part)) for part in re.split(r"\n\s*\n", text))


# kind -> whether a response, without white space around it, meets it, given the argument of make_prompts.py
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "lowercase": lambda text, _: text == text.lower(),
    "uppercase": lambda text, _: text == text.upper(),
    "sentences": lambda text, n: count_sentences(text) == n,
    "bullets": lambda text, n: len(re.findall(r"^\s*\*\s+\S", text, re.MULTILINE)) == n,
    "include": lambda text, word: count_word(text, word) > 0,
    "exclude": lambda text, word: count_word(text, word) == 0,
    "begin": _begins,
    "end": lambda text, phrase: text.rstrip("\"'”’ ").lower().endswith(phrase.lower()),
    "at_most_words": lambda text, n: len(words(text)) <= n,
    "at_least_words": lambda text, n: len(words(text)) >= n,
    "quoted": lambda text, _: text[0] in '"“' and text[-1] in '"”',
    "no_commas": lambda text, _: "," not in text,
    "title": lambda text, _: bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text)),
    "json": lambda text, _: _json(text),
    "numbered": _numbered,
    "paragraphs": lambda text, n: _paragraphs(text) == n,
    "postscript": lambda text, _: bool(re.search(r"\S\s*\nP\.\s?S\.", text)),
    "repeated": lambda text, word: count_word(text, word) >= 2,
}


def meets(kind: str, argument: Any, response: str) -> bool:
    text = response.strip()
    given = len(words(argument)) if kind in ("begin", "end") else 0
    return len(words(text)) >= given + LEAST_WORDS and not repeats(text) and CHECKS[kind](text, argument)


@cache
def constraints() -> dict[str, tuple[str, Any]]:
    """The text of a prompt -> its kind of constraint, and the argument of that."""
    found = {}
    for name in ("train", "heldout"):
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[record["prompt"][-1]["content"]] = record["kind"], record["argument"]
    return found


def satisfied(prompt: list[dict[str, str]], response: str) -> float:
    return float(meets(*constraints()[prompt[-1]["content"]], response))
