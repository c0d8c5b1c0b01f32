"""Sampling against the model's own probabilities, enumerated in fp64; what a sample depends on, and what it leaves
alone. Best-of-n against all subsets."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import math
import random
import sys
import types
from collections import Counter
from itertools import combinations

import numpy
import pytest
import torch
from tiny import make, make_tokenizer
from transformers import GenerationConfig
from vllm_signatures import fields, published

from fastpref.errors import UserError
from fastpref.train import vllm_engine
from fastpref.train.best_of_n import best_of_n, expected_best
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.sample import InMemory, Sampling, sample
from fastpref.train.vllm_engine import VLLM, uses_vllm

EOS = 2


@pytest.fixture(scope="module")
def setup(world, tmp_path_factory):
    """A policy that is far from uniform, its tokenizer, and prompts of several lengths."""
    config = make(world, tmp_path_factory.mktemp("run"))
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(4)
    prompts = [tokenizer(text)["input_ids"] for text in ("abc:", "a:", "fedcba:", "bb:", "cafe:")]
    return policy, tokenizer, prompts


def probabilities(model, ids, temperature=1.0, top_p=1.0):
    """[rows, V] fp64, of the token after each row of `ids`."""
    with torch.no_grad():
        probs = (model(input_ids=torch.tensor(ids)).logits[:, -1].double() / temperature).softmax(-1)
    if top_p < 1:
        for row in probs:
            likeliest = sorted(range(len(row)), key=lambda token: -row[token])
            kept, mass = [], 0.0
            while mass < top_p:
                kept.append(likeliest[len(kept)])
                mass += float(row[kept[-1]])
            row[[token for token in range(len(row)) if token not in kept]] = 0
        probs /= probs.sum(-1, keepdim=True)
    return probs


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.4)])
def test_samples_follow_the_policy(setup, temperature, top_p):
    """Two tokens: chi-square of the likeliest outcomes against their joint probabilities; nothing impossible."""
    policy, tokenizer, prompts = setup
    prompt, count = prompts[0], 3000
    first = probabilities(policy.model, [prompt], temperature, top_p)[0]
    second = probabilities(policy.model, [[*prompt, token] for token in range(261)], temperature, top_p)
    joint = {(a, b): float(first[a] * second[a, b]) for a in range(261) for b in range(261) if a != EOS}
    joint[EOS,] = float(first[EOS])
    settings = Sampling(n=count, temperature=temperature, top_p=top_p, max_new_tokens=2, batch_size=count, seed=3)
    ((_, samples),) = sample(policy, tokenizer, [prompt], settings)
    found = Counter(tuple(s.ids) for s in samples)
    assert all(joint[ids] > 0 for ids in found)
    cells = [ids for ids, p in sorted(joint.items(), key=lambda item: -item[1])[:20] if p * count >= 5]
    assert len(cells) >= 4
    expected = [joint[ids] * count for ids in cells] + [(1 - sum(joint[ids] for ids in cells)) * count]
    observed = [found[ids] for ids in cells] + [count - sum(found[ids] for ids in cells)]
    square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = len(cells)
    assert square < degrees + 4 * math.sqrt(2 * degrees), (square, degrees)  # mean and deviation of chi-square


def test_temperature_0_is_argmax(setup):
    policy, tokenizer, prompts = setup
    found = dict(sample(policy, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=5, batch_size=2)))
    assert sorted(found) == list(range(len(prompts)))
    for index, (response,) in found.items():
        ids = list(prompts[index])
        while len(ids) < len(prompts[index]) + 5 and ids[-1] != EOS:
            ids.append(int(probabilities(policy.model, [ids])[0].argmax()))
        assert response.ids == ids[len(prompts[index]) :]
        assert response.ended == (ids[-1] == EOS)
        assert response.text == tokenizer.decode([i for i in response.ids if i != EOS]).strip()
    assert len({tuple(s[0].ids) for s in found.values()}) > 1


def test_a_tiny_temperature_is_argmax_too(setup):
    policy, tokenizer, prompts = setup
    greedy = dict(sample(policy, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=4)))
    assert dict(sample(policy, tokenizer, prompts, Sampling(temperature=1e-40, max_new_tokens=4))) == greedy


def test_what_a_sample_depends_on(setup):
    """Seed, index and number; not the batch, what came before, or torch's generators."""
    policy, tokenizer, prompts = setup
    settings = Sampling(n=3, max_new_tokens=4, batch_size=6, seed=9)
    torch.manual_seed(1)
    state = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    found = dict(sample(policy, tokenizer, prompts, settings))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (numpy.random.get_state()[1].tolist(), random.getstate()) == state[1:]
    torch.manual_seed(2)
    assert dict(sample(policy, tokenizer, prompts, settings)) == found
    for batch_size in (1, 4, 100):
        other = dataclasses.replace(settings, batch_size=batch_size)
        assert dict(sample(policy, tokenizer, prompts, other)) == found
    rest = dict(sample(policy, tokenizer, prompts, settings, done={0, 2}))
    assert rest == {index: found[index] for index in (1, 3, 4)}
    every = [tuple(s.ids) for samples in found.values() for s in samples]
    assert len(set(every)) == len(every)
    twice = dict(sample(policy, tokenizer, [prompts[0], prompts[0]], settings))
    assert twice[0] == found[0] and twice[1] != found[0]
    assert dict(sample(policy, tokenizer, prompts, dataclasses.replace(settings, seed=10))) != found


def test_the_policy_is_left_as_it_was(setup):
    policy, tokenizer, prompts = setup
    own = policy.model.generation_config
    own.repetition_penalty, own.temperature, own.top_k, own.do_sample = 1.9, 0.3, 2, True  # what an author may have set
    try:
        settings = Sampling(n=40, max_new_tokens=1, batch_size=40)
        policy.model.train()
        running = sample(policy, tokenizer, prompts[:2], settings)
        _, samples = next(running)
        assert policy.model.training and policy.model.generation_config is own  # while it waits as well
        assert len({s.ids[0] for s in samples}) > 2  # more than top_k
        running.close()
        policy.model.eval()
        list(sample(policy, tokenizer, prompts[:1], settings))
        assert not policy.model.training
        assert all(p.grad is None for p in policy.model.parameters())
    finally:
        policy.model.generation_config = GenerationConfig(eos_token_id=EOS)


def test_ends_and_cuts(setup):
    """A chat's end of turn, named by the model's settings, ends a response as EOS does."""
    policy, tokenizer, prompts = setup
    settings = Sampling(n=60, max_new_tokens=6, batch_size=60)
    ((_, plain),) = sample(policy, tokenizer, prompts[:1], settings)
    turn = Counter(token for s in plain for token in s.ids[1:] if token > EOS).most_common(1)[0][0]
    policy.model.generation_config = GenerationConfig(eos_token_id=[EOS, turn])
    try:
        ((_, samples),) = sample(policy, tokenizer, prompts[:1], settings)
    finally:
        policy.model.generation_config = GenerationConfig(eos_token_id=EOS)
    for before, after in zip(plain, samples, strict=True):
        end = next((i for i, token in enumerate(before.ids) if token in (EOS, turn)), None)
        assert after.ids == before.ids[: None if end is None else end + 1]
        assert after.ended == (end is not None)
        assert after.text == tokenizer.decode(after.ids[:end], skip_special_tokens=True).strip()
    assert any(s.ended for s in samples) and any(not s.ended and len(s.ids) == 6 for s in samples)


def test_responses_end_with_the_positions(setup):
    policy, tokenizer, prompts = setup
    settings = Sampling(temperature=0, max_new_tokens=9, batch_size=1)
    (_, (full,)), = sample(policy, tokenizer, [[7] * 100], settings)  # without EOS, so that the cut is seen
    (_, (short,)), = sample(policy, tokenizer, [[7] * 125], settings)
    assert len(full.ids) == 9 and len(short.ids) == 3 and not short.ended


class Spy:
    """An engine that says its prompt's last token and the seed, and keeps what it was asked."""

    stops, positions = frozenset([EOS]), 50

    def __init__(self):
        self.calls = []

    def generate(self, prompts, seeds, settings):
        self.calls.append([p[0] for p in prompts])
        return [[p[-1], seed % 1000 + 3] for p, seed in zip(prompts, seeds, strict=True)]


class Names:
    def decode(self, ids, **_):
        return f" {ids} "


def test_streams_batch_by_batch():
    """Longest first; a prompt is handed out with the batch that has its last response, also where it spans two."""
    spy, ticks = Spy(), []
    prompts = [[10 + i] * length for i, length in enumerate((2, 5, 3))]
    settings = Sampling(n=4, batch_size=3, max_new_tokens=2)
    seen = [
        (index, len(samples), len(spy.calls))
        for index, samples in sample(None, Names(), prompts, settings, lambda *at: ticks.append(at), spy)
    ]
    assert seen == [(1, 4, 2), (2, 4, 3), (0, 4, 4)]
    assert spy.calls == [[11] * 3, [11, 12, 12], [12, 12, 10], [10] * 3]
    assert ticks == [(0, 12), (3, 12), (6, 12), (9, 12)]
    again = Spy()
    rest = list(sample(None, Names(), prompts, settings, engine=again, done=[1]))
    assert [index for index, _ in rest] == [2, 0]
    assert again.calls == spy.calls[1:]  # the same batches, those without a prompt that is left excepted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n is 0; it takes at least 1"),
        ({"n": 2, "temperature": 0}, "temperature is 0, so the n = 2 responses of a prompt would be equal"),
        ({"temperature": -1.0}, "temperature is -1.0; it takes at least 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it takes above 0, at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Sampling(**changes)


def test_refused_before_anything_is_sampled(setup, monkeypatch):
    policy, tokenizer, prompts = setup
    monkeypatch.setattr(InMemory, "generate", lambda *_: pytest.fail("sampled"))
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        sample(policy, tokenizer, [prompts[0], []], Sampling())
    with pytest.raises(UserError, match="prompt 0 has 128 tokens, and the model 128 positions: none is left"):
        sample(policy, tokenizer, [[5] * 128], Sampling())


def test_a_policy_that_diverged(world, tmp_path):
    config = make(world, tmp_path)
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    with torch.no_grad():
        policy.head.weight[7] = math.nan
    with pytest.raises(UserError, match="probabilities are NaN"):
        list(sample(policy, tokenizer, [[1, 5]], Sampling(max_new_tokens=2)))


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class SamplingParams:
    """Takes what vLLM's takes, and has its defaults."""

    def __init__(self, *args, **kwargs):
        given = published("SamplingParams", "__init__").bind(self, *args, **kwargs)
        given.apply_defaults()
        vars(self).update({name: value for name, value in given.arguments.items() if name != "self"})

    def __eq__(self, other):
        return vars(self) == vars(other)


class LLM:
    """Takes what vLLM's takes: answers the seed's digits, then a stop token if the prompt is even in length."""

    leaves_out_the_stop = False

    def __init__(self, *args, **kwargs):
        self.given = published("LLM", "__init__").bind(self, *args, **kwargs).arguments
        assert set(self.given.get("kwargs", ())) <= fields("EngineArgs")
        if self.given.get("gpu_memory_utilization", 0) > 1:
            raise ValueError("Free memory is less than desired\nmore")
        self.down = False
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self._shutdown))

    def _shutdown(self, *args, **kwargs):
        published("EngineCoreClient", "shutdown").bind(self, *args, **kwargs)
        self.down = True

    def generate(self, *args, **kwargs):
        given = published("LLM", "generate").bind(self, *args, **kwargs)
        given.apply_defaults()
        prompts, sampling_params, use_tqdm = self.asked = given.args[1:3] + (given.kwargs["use_tqdm"],)
        assert all(prompt.keys() <= fields("TokensPrompt") for prompt in prompts)
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt, params):
        ids, stops = [3 + int(d) for d in str(params.seed)[: params.max_tokens - 1]], len(prompt) % 2 == 0
        end = [params.stop_token_ids[-1]] if stops else [3]
        out = types.SimpleNamespace(
            token_ids=tuple(ids + (end if not (stops and self.leaves_out_the_stop) else [])),
            finish_reason="stop" if stops else "length",
            stop_reason=end[0] if stops else None,
        )
        assert vars(out).keys() <= fields("CompletionOutput")
        return types.SimpleNamespace(outputs=[out])


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.mark.parametrize("leaves_out", [False, True])
def test_vllm_is_asked_for_what_was_set(setup, world, fake_vllm, monkeypatch, leaves_out):
    _, tokenizer, prompts = setup
    monkeypatch.setattr(LLM, "leaves_out_the_stop", leaves_out)
    settings = Sampling(n=2, temperature=0.7, top_p=0.9, max_new_tokens=4, batch_size=4, seed=5)
    with VLLM(world / "pretrained", tokenizer, dtype="bfloat16", gpu_memory_utilization=0.4) as engine:
        llm = engine.llm
        found = dict(sample(None, tokenizer, prompts, settings, engine=engine))
    assert llm.given == {"self": llm, "model": str(world / "pretrained"), "dtype": "bfloat16",
                         "gpu_memory_utilization": 0.4, "kwargs": {"generation_config": "vllm"}}
    assert llm.down and engine.llm is None
    requests, params, use_tqdm = llm.asked
    assert requests == [{"prompt_token_ids": prompts[1]}] * 2 and use_tqdm is False  # the shortest comes last
    wanted = dict(temperature=0.7, top_p=0.9, max_tokens=4, stop_token_ids=[EOS], ignore_eos=True, detokenize=False)
    assert params == [SamplingParams(seed=p.seed, **wanted) for p in params]
    assert params[0].seed != params[1].seed and all(0 <= p.seed < 2**63 for p in params)
    for index, samples in found.items():
        for s in samples:
            assert len(s.ids) == 4 and s.ended == (len(prompts[index]) % 2 == 0) and (s.ids[-1] == EOS) == s.ended
            assert s.text == tokenizer.decode(s.ids[:3] if s.ended else s.ids)
    engine = VLLM(world / "pretrained", tokenizer)
    engine.generate([[5] * 9, [5] * 126], [1, 2], settings)
    assert [p.max_tokens for p in engine.llm.asked[1]] == [4, 2]  # the model has 128 positions
    with pytest.raises(UserError, match=r"vLLM does not load it \(Free memory is less than desired\)"):
        VLLM(world / "pretrained", tokenizer, gpu_memory_utilization=2)


def test_a_call_that_vllm_does_not_take_is_found_out(world, fake_vllm):
    with pytest.raises(TypeError, match="unexpected keyword argument 'best_of'"):
        SamplingParams(best_of=2)
    with pytest.raises(AssertionError):
        VLLM(world / "pretrained", make_tokenizer(), no_such_option=1)


def test_when_vllm_is_used(monkeypatch, fake_vllm):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert uses_vllm("auto") and uses_vllm("vllm") and not uses_vllm("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not uses_vllm("auto")
    with pytest.raises(UserError, match="needs a GPU"):
        uses_vllm("vllm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    assert not uses_vllm("auto")
    with pytest.raises(UserError, match="not installed"):
        uses_vllm("vllm")


# ---- best of n -------------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_over_all_subsets():
    scores = [0.3, -1.2, 2.5, 0.3, 7.0, -4.0, 1.1]
    for n in range(1, len(scores) + 1):
        subsets = [max(subset) for subset in combinations(scores, n)]
        assert expected_best(scores, n) == pytest.approx(sum(subsets) / len(subsets), rel=1e-14)
    for n in (0, 8):
        with pytest.raises(ValueError, match=f"n: got {n}, expected 1 to 7"):
            expected_best(scores, n)


def test_best_of_n_over_prompts():
    """A failed score counts as not sampled; a prompt with too few is left out, and counted."""
    found = best_of_n([[1.0, 3.0, None, 5.0, 7.0], [2.0, None, 4.0], [None, None]])
    assert [(b.n, b.prompts) for b in found] == [(1, 2), (2, 2), (4, 1)]
    assert [b.reward for b in found] == pytest.approx([(4 + 3) / 2, (17 / 3 + 4) / 2, 7])  # 3 5 7 5 7 7 over 6
    assert found[0].error == pytest.approx(0.5) and math.isnan(found[2].error)
    assert best_of_n([[None], []]) == []


def test_best_of_n_of_large_counts():
    """C(1000, 500) is beyond a double; the weights are not."""
    scores = [float(i) for i in range(1000)]
    assert expected_best(scores, 500) == pytest.approx(500 * 1001 / 501 - 1)  # of a uniform order statistic
