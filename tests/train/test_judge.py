"""A judge over a stand-in server: orders, ties, verdicts that cannot be read, win rates, and a server that fails."""

from __future__ import annotations

import itertools
import re

import pytest
from completions_server import serving

from fastpref.errors import UserError
from fastpref.train.judge import SWAYED, TEMPLATE, UNPARSED, Judge, Judging, circle, verdict
from fastpref.train.scorer import load_scorer, prompt_key

BOTH = re.compile(r"<response A>\n(.*)\n</response A>.*<response B>\n(.*)\n</response B>", re.DOTALL)


@pytest.fixture
def quick(monkeypatch):
    """Retries at once."""
    import openai._base_client as base

    monkeypatch.setattr(base.BaseClient, "_calculate_retry_timeout", lambda *_, **__: 0.0)


def longer(body):
    """Prefers the longer; of two as long the first; says nothing of "mumble"."""
    first, second = BOTH.search(body["messages"][0]["content"]).groups()
    if "mumble" in (first, second):
        return "I find them both quite good.", "stop"
    return f"[[C]]? No: [[{'A' if len(first) >= len(second) else 'B'}]]", "stop"


def spec(server, model="m"):
    return f"judge:openai:{server.url}#{model}"


def test_both_orders_are_asked_and_what_the_order_decides_is_a_tie():
    with serving(longer) as server:
        judge = Judge(spec(server, "org/m#1"), 5.0, Judging(concurrency=2))
        messages = [{"role": "user", "content": "Say {this}"}, {"role": "assistant", "content": "this"}]
        pairs = [("p {0}", "long", "x"), (messages, "x", "long"), ("p", "ab", "cd"), ("p", "mumble", "x")]
        assert judge.compare(pairs) == [1.0, 0.0, 0.5, None]
        assert judge.counts == {"pairs": 4, "requests": 8, SWAYED: 1, UNPARSED: 2}
        assert server.most_at_once <= 2
        asked = [body["messages"][0]["content"] for body in server.requests]
        assert sorted(asked)[0].startswith(TEMPLATE[:40]) and {body["model"] for body in server.requests} == {"org/m#1"}
        assert {body["temperature"] for body in server.requests} == {0}
        for prompt, (_, first, second) in zip(("p {0}", "user: Say {this}\nassistant: this", "p"), pairs):
            for a, b in ((first, second), (second, first)):
                assert sum(f"\n{prompt}\n" in text and BOTH.search(text).groups() == (a, b) for text in asked) == 1


@pytest.mark.parametrize(("answer", "value"), [
    ("[[A]]", 1.0), ("because ... [[B]].", 0.0), ("[[C]]", 0.5), ("[[A]] first, but then [[B]]", 0.0), (" B. ", 0.0),
    ("0", 1.0), ("1", 0.0), ("A is better", None), ("", None), ("[[D]]", None), ("[A]", None),
])
def test_how_an_answer_is_read(answer, value):
    assert verdict(answer) == value


def test_the_circle_compares_each_as_often_and_no_pair_twice():
    assert circle(1, 2) == [] and circle(2, 2) == [(0, 1)]
    assert circle(4, 2) == circle(4, 9) == list(itertools.combinations(range(4), 2))
    found = circle(7, 2)
    assert len(found) == len(set(found)) == 14
    assert [sum(i in pair for pair in found) for i in range(7)] == [4] * 7
    assert circle(5, 1) == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]


def test_win_rates():
    """By hand: of five, each is compared with both neighbours."""
    with serving(longer) as server, load_scorer(spec(server), judging=Judging(comparisons=1)) as scorer:
        prompts = ["p"] * 5 + ["q"] + ["r"] * 3
        responses = ["a", "bb", "ccc", "dd", "eeeee", "alone", "mumble", "x", " "]
        # p: a < bb < ccc > dd < eeeee > a; r: mumble against x says nothing, and the third is empty
        assert scorer.score(prompts, responses) == [0.0, 0.5, 1.0, 0.0, 1.0, 0.5, None, None, None]
        assert scorer.report() == ("3 of 9 not scored: 2 no verdict (first: such as 'I find them both quite good.'); "
                                   "1 empty response (first: nothing but white space)")
        assert scorer.counts["pairs"] == 6 and len(server.requests) == 12


def test_win_rates_against_rivals():
    with serving(longer) as server, load_scorer(spec(server)) as scorer:
        given = {prompt_key("p"): ["bb", "dddd", "f"], prompt_key("q"): []}
        other = scorer.against(lambda: given)
        # "ccc" against bb and dddd, "a" against dddd and f (as long: a tie), "eeeee" against f and bb
        assert other.score(["p", "p", "p", "q"], ["ccc", "a", "eeeee", "zz"]) == [0.5, 0.25, 1.0, 0.5]
        assert scorer.counts["pairs"] == 6
    with pytest.raises(UserError, match="was closed"):
        scorer.judge.compare([("p", "a", "b")])
    with load_scorer("math:pow") as function:
        assert function.against(lambda: {}) is function


@pytest.mark.parametrize("failing", [["500"], ["429", "500", "500"], ["slow"], ["half"], ["revision"], ["same id"] * 2])
def test_what_passes_is_asked_again(quick, failing):
    with serving(longer) as server:
        judge = Judge(spec(server), 0.5, Judging())
        server.failing = list(failing)
        assert judge.compare([("p", "long", "x")]) == [1.0] and not server.failing


@pytest.mark.parametrize(("failing", "message"), [
    (["500"] * 12, "fails after 5 retries, or refuses: .*not now"),
    (["404"], "fails after 5 retries, or refuses: .*not now"),
    (["slow"] * 12, r"did not answer in 0.3 s, 6 times \(scorer_timeout\)"),
    (["half"] * 12, "cannot be reached, or ends in the middle of an answer"),
    (["two"], "answered with 2 responses where one was asked for"),
    (["none"], "answered with 0 responses where one was asked for"),
    (["html"], "answers with what is no completion"),
    (["other model"], "answered as model 'gpt-2', not 'm': set what stands behind # in the scorer"),
])
def test_a_server_that_fails_is_one_line_and_no_score(quick, failing, message):
    with serving(longer) as server, load_scorer(spec(server), timeout=0.3) as scorer:
        server.failing = list(failing)
        with pytest.raises(UserError, match=f"^judge openai:{server.url} {message}") as caught:
            scorer.score(["p", "p"], ["long", "x"])
        assert "\n" not in str(caught.value)


def test_what_is_refused_before_anything_is_asked(tmp_path, quick):
    with serving(longer) as server:
        pass
    with pytest.raises(UserError, match=r"^judge openai:.* cannot be reached \(.*refused.*\): start it first"):
        load_scorer(spec(server))
    with pytest.raises(UserError, match="a judge is judge:openai:URL#MODEL, such as"):
        load_scorer("judge:openai:http://localhost:8000/v1")
    for text, message in (("{prompt} {response0}", r"\{response1\} does not stand in it"),
                          ('{"a": {prompt}}', r"takes \{prompt\}, .*doubled \(KeyError"),
                          ("{prompt", "doubled")):
        (tmp_path / "t").write_text(text)
        with pytest.raises(UserError, match=f"judge_prompt {tmp_path}/t: .*{message}"):
            load_scorer("judge:openai:http://localhost:8000/v1#m", judging=Judging(str(tmp_path / "t")))
    with pytest.raises(UserError, match="judge_prompt none: No such file"):
        load_scorer("judge:openai:http://localhost:8000/v1#m", judging=Judging("none"))


def test_another_template(tmp_path):
    (tmp_path / "t").write_text('{{"q": "{prompt}", "a": "{response0}", "b": "{response1}"}}')
    with serving(lambda body: ("0" if '"a": "yes"' in body["messages"][0]["content"] else "1", "stop")) as server:
        judge = Judge(spec(server), 5.0, Judging(str(tmp_path / "t")))
        assert judge.compare([("p", "yes", "no")]) == [1.0]
        assert {body["messages"][0]["content"] for body in server.requests} == {
            '{"q": "p", "a": "yes", "b": "no"}', '{"q": "p", "a": "no", "b": "yes"}'}
