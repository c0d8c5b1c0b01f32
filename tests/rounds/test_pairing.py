"""Pairs are what the words say: every case compared with a brute-force search over all ordered pairs of responses."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from fastpref.rounds.pairing import (
    FEW,
    GAP,
    LOW,
    TIE,
    Response,
    block,
    count,
    make_pairs,
    offline_count,
    reason_to_skip,
    scores,
)


def response(number, score=None, *, skipped=None, of_reference=False, ended=True):
    return Response([number], f"r{number}", ended, of_reference, skipped, score)


def some(rng, size):
    """Scores with many ties, a few failures, a few that were skipped."""
    made = []
    for i in range(size):
        kind = rng.random()
        if kind < 0.15:
            made.append(response(i))
        elif kind < 0.3:
            made.append(response(i, skipped=rng.choice(("empty", "duplicate"))))
        else:
            made.append(response(i, rng.choice((0.0, 0.25, 0.5, 1.0))))
    return made


def pairs_of(responses, pairing, min_gap=0.0, min_score=None, seed=0):
    return make_pairs(responses, pairing, min_gap=min_gap, min_score=min_score, rng=random.Random(seed))


def all_pairs(responses, min_gap, min_score):
    """Every (chosen, rejected) that may be trained on at all."""
    return [
        (a, b)
        for a, b in itertools.permutations([r for r in responses if r.score is not None], 2)
        if a.score > b.score and a.score - b.score >= min_gap and (min_score is None or a.score >= min_score)
    ]


@pytest.mark.parametrize("min_gap", [0.0, 0.3])
@pytest.mark.parametrize("min_score", [None, 0.6])
def test_best_worst_and_best_random_against_all_pairs(min_gap, min_score):
    rng = random.Random(1)
    made = Counter()
    for _ in range(400):
        responses = some(rng, rng.randint(1, 6))
        allowed = all_pairs(responses, min_gap, min_score)
        widest = max((a.score - b.score for a, b in allowed), default=None)
        found, why = pairs_of(responses, "best_worst", min_gap, min_score)
        assert len(found) + why.total() == 1
        assert bool(found) == bool(allowed)
        for pair in found:
            assert (pair.chosen, pair.rejected) in allowed
            assert pair.chosen.score - pair.rejected.score == widest
            firsts = [a for a, b in allowed if a.score - b.score == widest]
            assert pair.chosen is min(firsts, key=responses.index)  # of equal ones the first that was sampled
        found, why = pairs_of(responses, "best_random", min_gap, min_score, seed=rng.random())
        assert len(found) + why.total() == 1 and bool(found) == bool(allowed)
        for pair in found:
            assert (pair.chosen, pair.rejected) in allowed
            assert pair.chosen.score == max(a.score for a, _ in allowed)
        made["pairs" if allowed else next(iter(why))] += 1
    assert made["pairs"] > 100 and made[FEW] and (made[TIE] or min_score) and (made[LOW] or min_score is None)


def test_best_random_takes_each_lower_one():
    responses = [response(i, s) for i, s in enumerate((0.5, 1.0, 0.0, 1.0, 0.9))]
    taken = Counter(pairs_of(responses, "best_random", seed=i)[0][0].rejected.ids[0] for i in range(900))
    assert set(taken) == {0, 2, 4} and min(taken.values()) > 240  # 300 each, standard deviation 14
    taken = {pairs_of(responses, "best_random", 0.3, seed=i)[0][0].rejected.ids[0] for i in range(50)}
    assert taken == {0, 2}


def test_best_of_n():
    rng = random.Random(2)
    for _ in range(200):
        responses = some(rng, rng.randint(1, 5))
        usable = [r.score for r in responses if r.score is not None]
        found, why = pairs_of(responses, "best_of_n", min_score=0.5)
        if usable and max(usable) >= 0.5:
            assert [(p.chosen.score, p.rejected) for p in found] == [(max(usable), None)] and not why
        else:
            assert not found and why == {LOW if usable else FEW: 1}


def test_policy_against_reference():
    rng = random.Random(3)
    for _ in range(300):
        n = rng.randint(1, 4)
        policy = some(rng, n)
        reference = [Response(r.ids, r.text, True, True, r.skipped, r.score) for r in some(rng, n)]
        found, why = pairs_of(policy + reference, "policy_reference", min_gap=0.3)
        assert len(found) + why.total() == n
        matched = list(zip([r for r in policy if r.usable], [r for r in reference if r.usable], strict=False))
        wide = [(a, b) for a, b in matched if abs(a.score - b.score) >= 0.3]
        assert [{p.chosen.of_reference, p.rejected.of_reference} for p in found] == [{False, True}] * len(wide)
        assert all(p.chosen.score - p.rejected.score >= 0.3 for p in found)
        assert why[TIE] == sum(a.score == b.score for a, b in matched)
        assert why[GAP] == sum(0 < abs(a.score - b.score) < 0.3 for a, b in matched)
        assert why[FEW] == n - len(matched)


def test_what_is_skipped_and_counted():
    texts = ["a", "", "b", "a", "  ", "a", "b "]
    assert reason_to_skip(texts) == [None, "empty", None, "duplicate", "empty", "duplicate", None]
    skipped = [response(1, skipped="empty"), response(2, skipped="duplicate")]
    found = count([[response(0, 1.0), *skipped, response(3, ended=False)], [response(4, 0.0)]])
    assert found == {"prompts": 2, "responses": 5, "empty": 1, "duplicates": 1, "failed": 1, "scored": 2, "cut": 1}
    assert found["responses"] == found["empty"] + found["duplicates"] + found["failed"] + found["scored"]


def test_a_duplicate_has_the_score_of_what_it_repeats():
    made = [Response([0], "x", True, score=0.5), Response([1], "x", True, skipped="duplicate"),
            Response([2], "", True, skipped="empty"), Response([3], "y", True)]
    assert scores(made) == [0.5, 0.5, None, None]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.9])
def test_the_offline_share_is_the_one_asked_for(ratio):
    for online in (1, 7, 100, 1000):
        offline = offline_count(online, ratio, 10**6)
        assert abs(offline - ratio * (online + offline)) <= 0.5 / (1 - ratio)
    assert offline_count(100, 0.5, 30) == 30


def test_blocks_of_prompts():
    assert block(5, None, 3, seed=0) == [0, 1, 2, 3, 4]
    for size in (1, 3, 5):
        stream = [i for index in range(15) for i in block(5, size, index, seed=7)]
        epochs = [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
        assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)  # each once an epoch
        assert len(set(map(tuple, epochs))) > 1  # in another order
    assert block(50, 50, 4, seed=7) == block(50, 50, 4, seed=7) != block(50, 50, 4, seed=8)
