"""Sampling from a server with the OpenAI completions API, and what it does where the server fails."""

from __future__ import annotations

import sys
import threading

import pytest
from completions_server import serving
from tiny import make, make_tokenizer

from fastpref.errors import UserError
from fastpref.train import server_engine
from fastpref.train.model import load_policy
from fastpref.train.sample import InMemory, Sampling, sample
from fastpref.train.server_engine import Probe, Server, agreement, reload

PROMPTS = [[1, *b"abc"], [1, *b"dada"], [1, *b"fee"]]


@pytest.fixture
def quick(monkeypatch):
    """Retries at once."""
    import openai._base_client as base

    monkeypatch.setattr(base.BaseClient, "_calculate_retry_timeout", lambda *_, **__: 0.0)


def connect(server, tokenizer, timeout=5.0, concurrency=4, **more):
    settings = {"stops": frozenset([2]), "positions": 128} | more
    return Server(server.url, "tiny", tokenizer, timeout=timeout, concurrency=concurrency, **settings)


def echo(body):
    text = body["prompt"] if isinstance(body["prompt"], str) else "".join(chr(i) for i in body["prompt"][1:])
    return f"{text}/{body['seed'] % 7}", "stop" if body["seed"] % 2 else "length"


def test_what_the_server_is_asked_and_how_its_answers_are_read():
    tokenizer = make_tokenizer()
    seeds = [2**62 + 5, 8, 9]
    with serving(echo) as server:
        engine = connect(server, tokenizer, concurrency=2)
        found = engine.generate(PROMPTS, seeds, Sampling(temperature=0.7, top_p=0.9, max_new_tokens=6))
        asked = {body["seed"]: body for body in server.requests}
        assert [asked[seed % 2**31]["prompt"] for seed in seeds] == PROMPTS and len(server.requests) == 3
        assert {"model": "tiny", "max_tokens": 6, "temperature": 0.7, "top_p": 0.9}.items() <= asked[8].items()
        assert server.most_at_once <= 2
    for ids, prompt, seed in zip(found, PROMPTS, seeds):
        text, reason = echo({"prompt": prompt, "seed": seed % 2**31})
        ended = [2] if reason == "stop" else []
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] + ended


def test_a_response_never_leaves_the_models_positions():
    with serving(echo) as server:
        connect(server, make_tokenizer(), positions=7).generate(PROMPTS[:1], [1], Sampling(max_new_tokens=50))
        assert server.requests[0]["max_tokens"] == 3


def test_a_server_that_takes_only_text():
    """It puts BOS before a prompt itself."""
    tokenizer = make_tokenizer()
    with serving(echo) as server:
        server.takes_tokens = False
        engine = connect(server, tokenizer)
        prompts = [tokenizer(text)["input_ids"] for text in ("ab", "c d", "é")]
        engine.generate(prompts, [1, 2, 3], Sampling())
        texts = [body["prompt"] for body in server.requests]
        assert texts[0] == prompts[0] and sorted(texts[1:]) == ["ab", "c d", "é"]  # tokens were tried once


@pytest.mark.parametrize("failing", [["500"], ["429", "500", "500"], ["slow"], ["half"], ["half", "500"], ["revision"]])
def test_what_passes_is_tried_again(quick, failing):
    with serving(echo) as server:
        engine = connect(server, make_tokenizer(), timeout=0.5)
        engine.generate(PROMPTS[:1], [3], Sampling())
        server.failing = list(failing)
        found = engine.generate(PROMPTS[1:2], [5], Sampling())
        assert found == engine.generate(PROMPTS[1:2], [5], Sampling()) and not server.failing


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (["500"] * 6, "fails after 5 retries, or refuses: .*not now"),
        (["404"], "fails after 5 retries, or refuses: .*not now"),
        (["slow"] * 6, r"did not answer in 0.3 s, 6 times \(rounds.sampler_timeout\)"),
        (["half"] * 6, "cannot be reached, or ends in the middle of an answer"),
        (["two"], "answered with 2 responses where one was asked for"),
        (["none"], "answered with 0 responses where one was asked for"),
        (["no text"], "answered without a text"),
        (["html"], "answers with what is no completion"),
        (["same id"], "gave completion cmpl-1 twice: a cache between"),
        (["other model"], "answered as model 'gpt-2', not 'tiny': set rounds.sampler_model"),
    ],
)
def test_what_does_not_pass_is_one_line(quick, failing, message):
    with serving(echo) as server:
        engine = connect(server, make_tokenizer(), timeout=0.3)
        engine.generate(PROMPTS[:1], [3], Sampling())
        server.failing = list(failing)
        with pytest.raises(UserError, match=f"^sampler openai:{server.url} {message}") as caught:
            engine.generate(PROMPTS[1:2], [5], Sampling())
        assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there(quick):
    with serving(echo) as server:
        pass
    engine = connect(server, make_tokenizer())
    with pytest.raises(UserError, match=r"cannot be reached, .*refused.*: start it, and --resume goes on"):
        engine.generate(PROMPTS, [1, 2, 3], Sampling())
    with pytest.raises(UserError, match=rf"^sampler openai:{server.url} cannot be reached \(.*refused.*: start it fi"):
        engine.client.reach()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with serving(echo) as server, pytest.raises(UserError, match="takes the package openai: pip install openai"):
        connect(server, make_tokenizer())


@pytest.fixture(scope="module")
def policy(world, tmp_path_factory):
    return load_policy(make(world, tmp_path_factory.mktemp("run")), make_tokenizer())


def test_greedy_answers_over_the_wire_are_the_policys(policy):
    """The tiny tokenizer's every byte has a token, but most bytes alone are no text: only ASCII answers travel."""
    tokenizer, lock = make_tokenizer(), threading.Lock()
    inner = InMemory(policy, tokenizer)

    def answer(body):
        with lock:
            ids = inner.generate([body["prompt"]], [body["seed"]], Sampling(temperature=0, max_new_tokens=8))[0]
        return tokenizer.decode(ids, skip_special_tokens=True), "stop" if ids[-1] == 2 else "length"

    with serving(answer) as server:
        wire = dict(sample(None, tokenizer, PROMPTS, Sampling(temperature=0, max_new_tokens=8),
                           engine=connect(server, tokenizer)))
    own = dict(sample(policy, tokenizer, PROMPTS, Sampling(temperature=0, max_new_tokens=8)))
    assert {i: found[0].text for i, found in wire.items()} == {i: found[0].text for i, found in own.items()}


# ---- which weights answer ----


def test_agreement_counts_tokens_before_the_first_difference():
    assert agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6
    assert agreement([[1, 2]], [[1, 2, 3]]) == 1 and agreement([[1, 2]], [[]]) == 0


def test_stale_weights_and_other_weights_are_refused():
    first = Probe([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    first.check(None, "u")
    Probe([[1, 2, 3, 5]], [[1, 2, 3, 6]]).check(first, "u")  # another rounding
    Probe([[1, 2, 3, 4]], [[1, 2, 3, 4]]).check(first, "u")  # training changed nothing that shows
    with pytest.raises(UserError, match="openai:u answers as before it was given this round's weights"):
        Probe([[1, 2, 3, 5]], [[1, 2, 3, 4]]).check(first, "u")
    with pytest.raises(UserError, match="openai:u answers with other weights, .*25% of its greedy tokens"):
        Probe([[1, 2, 3, 4]], [[1, 9, 3, 4]]).check(None, "u")


def test_the_command_that_makes_it_load_weights(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    reload(f"{sys.executable} -c \"import sys; open(sys.argv[1] + '/seen', 'w').close()\" {{folder}}", folder)
    assert (folder / "seen").exists()
    with pytest.raises(UserError, match=r"sampler_reload ended with exit code 3 \(no such route\): sh -c"):
        reload("sh -c 'echo no such route >&2; exit 3'", folder)
    with pytest.raises(UserError, match="sampler_reload: no-such-command: No such file"):
        reload("no-such-command {folder}", folder)
    assert server_engine.PROBED.temperature == 0
