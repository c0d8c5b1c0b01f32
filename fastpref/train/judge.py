"""A judge: a chat model behind the OpenAI API that says which of two responses to a prompt is the better one.

    judge = Judge("judge:openai:http://localhost:8000/v1#Qwen/Qwen3-8B", 60, Judging())
    judge.compare([("What is 2 + 2?", "4", "5")])            # [1.0]: the first; 0.5 a tie, None no verdict

Both orders are asked at temperature 0, because judges prefer a position: a response that wins in both has won, and
orders that disagree are a tie, as in MT-Bench (arXiv 2306.05685, section 3.4). An answer without a verdict in either
order leaves the pair without one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.errors import UserError
from fastpref.report.reading import text_of

from .openai_client import Client, at_once

if TYPE_CHECKING:
    from .prompts import Prompt

SPEC = re.compile(r"judge:openai:(https?://[^#]+)#(.+)")
FORM = "judge:openai:URL#MODEL, such as judge:openai:http://localhost:8000/v1#Qwen/Qwen3-8B"
TEMPLATE = """Compare two responses to the same prompt and decide which one is better: more correct, more helpful to \
the one who asks, closer to what was asked for. Longer is not better, and neither is first.

<prompt>
{prompt}
</prompt>

<response A>
{response0}
</response A>

<response B>
{response1}
</response B>

Answer with [[A]] if response A is better, with [[B]] if response B is better, or with [[C]] if neither is."""
MOST_TOKENS = 1024  # of an answer: what a template that asks for reasons first may take
BRACKETED = re.compile(r"\[\[([ABC])\]\]")
VALUES = {"A": 1.0, "B": 0.0, "C": 0.5, "0": 1.0, "1": 0.0}  # "0" and "1" are those of TRL's templates
UNPARSED, SWAYED = "answers without a verdict", "pairs that the order decided"


@dataclass(frozen=True)
class Judging:
    """How a judge is asked.

    template: a file with {prompt}, {response0} and {response1}, for str.format; None: TEMPLATE. comparisons: each
    response is compared with so many that follow it, in a circle. concurrency: requests at once.
    """

    template: str | None = None
    comparisons: int = 2
    concurrency: int = 32


class Judge:
    def __init__(self, spec: str, timeout: float | None, judging: Judging) -> None:
        """Raises UserError for a spec of another form, a template that does not take the three, and a server that is
        not there."""
        found = SPEC.fullmatch(spec)
        if found is None:
            raise UserError(f"scorer {spec!r}: a judge is {FORM}")
        self.template, self.judging = _template(judging.template), judging
        self.client = Client("judge", *found.groups(), timeout=timeout, timeout_key="scorer_timeout",
                             model_key="what stands behind # in the scorer")
        self.client.reach()
        self.counts: Counter[str] = Counter({"pairs": 0, SWAYED: 0, "requests": 0, UNPARSED: 0})
        self.unparsed = ""  # the first of those answers
        self.closed = False  # what is still asked then is not

    def compare(self, pairs: Sequence[tuple[Prompt, str, str]]) -> list[float | None]:
        """1.0 where the first response wins, 0.0 where the second does. Raises UserError where the server fails."""
        asked = [(prompt, a, b) for prompt, first, second in pairs for a, b in ((first, second), (second, first))]
        answers = at_once(self.judging.concurrency, self._ask, asked)
        self.counts.update({"pairs": len(pairs), "requests": len(asked)})
        return [self._verdict(*both) for both in zip(answers[::2], answers[1::2])]

    def _ask(self, item: tuple[Prompt, str, str]) -> str:
        prompt, first, second = item
        if self.closed:
            raise self.client.wrong("was closed")
        content = self.template.format(prompt=text_of(prompt), response0=first, response1=second)
        return self.client.ask(lambda api: api.chat.completions.create(
            model=self.client.model, messages=[{"role": "user", "content": content}], temperature=0,
            max_tokens=MOST_TOKENS,
        )).text or ""

    def _verdict(self, answer: str, swapped: str) -> float | None:
        found = verdict(answer), verdict(swapped)
        for value, text in zip(found, (answer, swapped)):
            if value is None:
                self.counts[UNPARSED] += 1
                self.unparsed = self.unparsed or repr(text[-60:])
        if found[0] is None or found[1] is None:
            return None
        if found[0] == 1 - found[1]:
            return found[0]
        self.counts[SWAYED] += 1
        return 0.5


def verdict(answer: str) -> float | None:
    """Of the last [[A]], [[B]] or [[C]] in it; or of an answer that is nothing but a letter, 0 or 1."""
    return VALUES.get((BRACKETED.findall(answer) or [answer.strip().rstrip(".")])[-1])


def circle(count: int, comparisons: int) -> list[tuple[int, int]]:
    """Which of `count` responses are compared: each with the next so many, in a circle, and no pair twice."""
    steps = range(1, min(comparisons, count // 2) + 1)
    return sorted({(min(i, j), max(i, j)) for i in range(count) for step in steps for j in [(i + step) % count]})


def _template(path: str | None) -> str:
    if path is None:
        return TEMPLATE
    try:
        text = Path(path).read_text(encoding="utf-8")
        filled = text.format(prompt="\0p", response0="\0a", response1="\0b")
    except OSError as error:
        raise UserError(f"judge_prompt {path}: {error.strerror}") from error
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"judge_prompt {path}: takes {{prompt}}, {{response0}} and {{response1}}, and other braces "
                        f"doubled ({type(error).__name__}: {error})") from error
    missing = [name for name, mark in (("prompt", "\0p"), ("response0", "\0a"), ("response1", "\0b"))
               if mark not in filled]
    if missing:
        raise UserError(f"judge_prompt {path}: {{{missing[0]}}} does not stand in it")
    return text
