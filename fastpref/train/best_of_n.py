"""Best-of-n: the reward of the best among n responses, estimated from N >= n sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt


@dataclass(frozen=True)
class BestOf:
    n: int
    reward: float  # mean over the prompts that have n scores or more
    error: float  # its standard error over prompts; NaN for one prompt
    prompts: int  # how many those are


def expected_best(scores: Sequence[float], n: int) -> float:
    """Mean over all subsets of size n of their largest score, without visiting them: with N sorted scores,

        sum_{i=n}^{N} C(i-1, n-1) / C(N, n) * score_(i)

    An unbiased estimate of the expected best of n fresh samples; n = 1 is the mean, n = N the largest.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"n: got {n}, expected 1 to {len(scores)}, the number of scores")
    ways = comb(len(scores), n)
    return sum(float(Fraction(comb(i, n - 1), ways)) * score for i, score in enumerate(sorted(scores)) if i >= n - 1)


def best_of_n(scores: Sequence[Sequence[float | None]]) -> list[BestOf]:
    """For n = 1, 2, 4, ... up to the most scores a prompt has. scores: of each prompt's samples; None: one that failed,
    which counts as not sampled. A prompt with fewer than n scores is left out at that n, and `prompts` tells."""
    kept = [[score for score in of_prompt if score is not None] for of_prompt in scores]
    found, n = [], 1
    while n <= max(map(len, kept), default=0):
        best = [expected_best(of_prompt, n) for of_prompt in kept if len(of_prompt) >= n]
        mean, count = sum(best) / len(best), len(best)
        variance = sum((x - mean) ** 2 for x in best) / (count - 1) if count > 1 else float("nan")
        found.append(BestOf(n, mean, sqrt(variance / count), count))
        n *= 2
    return found
