"""From scored responses to what a round trains on. Pure functions on text and numbers; nothing here knows a model.

    best_worst          the highest score against the lowest
    best_random         the highest score against one of those below it, at random
    policy_reference    a sample of the policy against one of the reference, whichever scores higher is chosen
    best_of_n           the highest score alone: rejection-sampling fine-tuning

A pair needs a gap in score: equal scores are a tie and make no pair. Of equal scores the response sampled first counts,
which is a fair choice: samples of a prompt are alike in distribution.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Pairing = Literal["best_worst", "best_random", "policy_reference", "best_of_n"]
Skipped = Literal["empty", "duplicate"]

# why a prompt makes no pair (policy_reference: why two samples do not)
FEW = "too few usable"
TIE = "ties"
GAP = "gap below min_gap"
LOW = "best below min_score"


@dataclass(frozen=True)
class Response:
    """One sampled response, and what became of it."""

    ids: list[int]  # as sampled, the token that ends it included
    text: str
    ended: bool  # False: cut at max_new_tokens
    of_reference: bool = False  # sampled from the reference instead of the policy
    skipped: Skipped | None = None  # never scored, never trained on
    score: float | None = None  # None: skipped, or the scorer failed

    @property
    def usable(self) -> bool:
        return self.score is not None

    @property
    def failed(self) -> bool:
        return self.score is None and self.skipped is None


@dataclass(frozen=True)
class Pair:
    chosen: Response
    rejected: Response | None  # None: best_of_n


def reason_to_skip(texts: Sequence[str]) -> list[Skipped | None]:
    """Of the samples of one prompt from one model: the empty ones, and those whose text an earlier one has."""
    found: list[Skipped | None] = []
    seen: set[str] = set()
    for text in texts:
        found.append("empty" if not text.strip() else "duplicate" if text in seen else None)
        seen.add(text)
    return found


def make_pairs(
    responses: Sequence[Response], pairing: Pairing, *, min_gap: float, min_score: float | None, rng: random.Random
) -> tuple[list[Pair], Counter[str]]:
    """Pairs of one prompt, and why those it could have had are not among them: one candidate a prompt, under
    policy_reference as many as there are samples of either model.

    min_gap: the least difference in score, which must be above 0 in any case; min_score: the least score of a chosen
    response.
    """
    usable = [r for r in responses if r.usable and not r.of_reference]
    if pairing == "policy_reference":
        theirs = [r for r in responses if r.usable and r.of_reference]
        candidates = max(sum(r.of_reference for r in responses), sum(not r.of_reference for r in responses))
        matched = list(zip(usable, theirs, strict=False))
        dropped = Counter({FEW: candidates - len(matched)})
        pairs = []
        for pair in matched:
            chosen, rejected = sorted(pair, key=_score, reverse=True)
            why = _too_close(chosen, rejected, min_gap) or _too_low(chosen, min_score)
            if why:
                dropped[why] += 1
            else:
                pairs.append(Pair(chosen, rejected))
        return pairs, +dropped
    if not usable:
        return [], Counter({FEW: 1})
    best = max(usable, key=_score)
    why = _too_low(best, min_score)
    if pairing == "best_of_n":
        return ([], Counter({why: 1})) if why else ([Pair(best, None)], Counter())
    if len(usable) < 2:
        return [], Counter({FEW: 1})
    worst = min(usable, key=_score)
    why = why or _too_close(best, worst, min_gap)
    if why:
        return [], Counter({why: 1})
    if pairing == "best_random":
        worst = rng.choice([r for r in usable if _too_close(best, r, min_gap) is None])
    return [Pair(best, worst)], Counter()


def _score(response: Response) -> float:
    assert response.score is not None
    return response.score


def _too_close(chosen: Response, rejected: Response, min_gap: float) -> str | None:
    gap = _score(chosen) - _score(rejected)
    return TIE if gap <= 0 else GAP if gap < min_gap else None


def _too_low(chosen: Response, min_score: float | None) -> str | None:
    return LOW if min_score is not None and _score(chosen) < min_score else None


def scores(responses: Sequence[Response]) -> list[float | None]:
    """Of all samples of one prompt from one model: a duplicate has the score of the response that it repeats."""
    first = {response.text: response.score for response in reversed(responses)}
    return [first[response.text] for response in responses]


def count(prompts: Sequence[Sequence[Response]]) -> dict[str, int]:
    """What became of the responses of all prompts; they add up: responses = empty + duplicates + failed + scored."""
    every = [response for responses in prompts for response in responses]
    return {
        "prompts": len(prompts),
        "responses": len(every),
        "empty": sum(r.skipped == "empty" for r in every),
        "duplicates": sum(r.skipped == "duplicate" for r in every),
        "failed": sum(r.failed for r in every),
        "scored": sum(r.usable for r in every),
        "cut": sum(not r.ended for r in every),
    }


def offline_count(online: int, ratio: float, available: int) -> int:
    """How many offline examples make up `ratio` of a round beside `online` of its own; never more than there are."""
    return min(round(online * ratio / (1 - ratio)), available)


def block(count: int, size: int | None, index: int, seed: int) -> list[int]:
    """The prompts of round `index`, 0 and up: the next `size` of an endless shuffled order in which each comes once an
    epoch; all of them, in their own order, if size is None. A function of its arguments alone.
    """
    if size is None:
        return list(range(count))
    found: list[int] = []
    at, end = index * size, (index + 1) * size
    while at < end:
        epoch, start = divmod(at, count)
        order = list(range(count))
        random.Random(f"fastpref prompts {seed} {epoch}").shuffle(order)
        part = order[start : start + end - at]
        found += part
        at += len(part)
    return found
