"""The watch: estimators against a model's whole distribution, correlations against numpy, budgets, and that none of it
changes a run."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import make, make_config, read_metrics, settings, write_rows
from transformers import LlamaForCausalLM

from fastpref.data import Example, load_records, tokenize_records
from fastpref.errors import UserError
from fastpref.report.metrics import METRICS
from fastpref.report.page import write_report
from fastpref.train import checkpoint, fresh_samples, pair_metrics, stage
from fastpref.train.checkpoint import State
from fastpref.train.config import config_from_dict
from fastpref.train.evaluate import evaluate
from fastpref.train.fresh_samples import FreshSamples
from fastpref.train.loop import Stopped, train
from fastpref.train.model import load_policy, load_tokenizer
from fastpref.train.pair_metrics import MetricSums, StartLogps
from fastpref.train.prompts import TokenizedPrompt

EOS, LENGTH = 2, 3


def tick(done, of):
    pass


# ---- KL, against every sequence there is -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory, world):
    """Two policies over five tokens, and the exact KL(one || other) of their responses of at most three tokens."""
    folder = tmp_path_factory.mktemp("five")
    policies = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(make_config(vocab_size=5, hidden_size=8, intermediate_size=8, num_attention_heads=1))
        with torch.no_grad():
            model.lm_head.weight.mul_(12)  # far from uniform
        model.save_pretrained(folder / str(seed))
        tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=0, decode=lambda ids, **_: "", __len__=lambda: 5)
        config = make(world, folder / "run", model_name_or_path=str(folder / str(seed)))
        policies.append(load_policy(config, tokenizer))
    prompt = [1, 3, 4]
    exact = 0.0
    for response in itertools.product(range(5), repeat=LENGTH):
        if EOS in response[:-1]:
            continue  # goes on behind its end: counted where it ends
        exact += term(policies, prompt, response)
    for length in range(1, LENGTH):
        for head in itertools.product([0, 1, 3, 4], repeat=length - 1):
            exact += term(policies, prompt, (*head, EOS))
    return policies, tokenizer, config, prompt, exact


@torch.no_grad()
def term(policies, prompt, response):
    """p log(p / q) of one response, fp64, from full logits."""
    logps = []
    for policy in policies:
        rows = policy.model(torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)[len(prompt) - 1 :]
        logps.append(float(sum(row[token] for row, token in zip(rows, response, strict=False))))
    return math.exp(logps[0]) * (logps[0] - logps[1])


@pytest.fixture(scope="module")
def estimates(two):
    """3,000 responses, drawn by `Fresh` in ten samplings: k1 and k3 of each."""
    policies, tokenizer, config, prompt, exact = two
    stage = config_from_dict(
        config.to_dict() | {"sample_steps": 1, "sample_max_new_tokens": LENGTH, "per_device_eval_batch_size": 300}
    )
    fresh = FreshSamples(stage, tokenizer, [TokenizedPrompt("", prompt)] * 300, lambda: nullcontext(policies[1]), None)
    found = [fresh._measure(policies[0], seed, tick) for seed in range(10)]
    return exact, found


@torch.no_grad()
def test_exact_kl_is_one_of_distributions(two):
    """The enumeration misses nothing: probabilities add up to 1."""
    policies, _, _, prompt, exact = two
    total = 0.0
    responses = [r for r in itertools.product(range(5), repeat=LENGTH) if EOS not in r[:-1]]
    responses += [(*head, EOS) for n in (1, 2) for head in itertools.product([0, 1, 3, 4], repeat=n - 1)]
    for r in responses:
        logps = policies[0].model(torch.tensor([[*prompt, *r]])).logits[0].double().log_softmax(-1)
        total += math.exp(sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(r)))
    assert total == pytest.approx(1.0, abs=1e-6) and exact > 0.05


@pytest.mark.parametrize("name", ["kl_k1", "kl_k3"])
def test_estimators_are_unbiased(estimates, name):
    exact, found = estimates
    mean = numpy.mean([values[name] for values in found])
    error = math.sqrt(sum(values[f"{name}_error"] ** 2 for values in found)) / len(found)
    assert abs(mean - exact) < 4 * error and error < 0.2 * exact
    spread = numpy.std([values[name] for values in found], ddof=1)
    assert 0.5 < spread / numpy.mean([values[f"{name}_error"] for values in found]) < 2  # the error it claims


def test_k3_has_the_lower_variance_and_both_come_from_temperature_one(estimates):
    _, found = estimates
    for values in found:
        assert values["kl_k3_error"] < 0.9 * values["kl_k1_error"] and values["samples"] == 300


def test_a_policy_has_no_distance_from_itself(two):
    policies, tokenizer, config, prompt, _ = two
    fresh = FreshSamples(config, tokenizer, [TokenizedPrompt("", prompt)] * 4, lambda: nullcontext(policies[0]), None)
    values = fresh._measure(policies[0], 0, tick)
    assert values["kl_k1"] == values["kl_k3"] == 0.0


# ---- per pair --------------------------------------------------------------------------------------------------------


def test_correlation_is_that_of_all_pairs_together():
    """Uneven batches in three steps, sums carried through JSON, against numpy on what they hold together."""
    rng = numpy.random.default_rng(0)
    gaps = rng.integers(-30, 30, size=23).astype(float)
    margins = (0.02 * gaps + rng.normal(size=23) + 5).astype(numpy.float32)
    window: dict[str, float] = {}
    for step in ((0, 1), (1, 9, 11), (11, 20, 21, 23)):
        sums = MetricSums()
        for a, b in itertools.pairwise(step):
            sums.add(pair_metrics.moments(torch.from_numpy(margins[a:b]), torch.from_numpy(gaps[a:b])))
        values = sums.read()
        pair_metrics.to_sums(values, step[-1] - step[0])
        for name, value in json.loads(json.dumps(values)).items():
            window[name] = window.get(name, 0.0) + value
    found = pair_metrics.take_correlation(window)
    assert found["watch/length_correlation"] == pytest.approx(numpy.corrcoef(margins, gaps)[0, 1], abs=1e-10)
    assert window == {}


def test_what_does_not_vary_has_no_correlation():
    for x, y in ((torch.full((4,), 3.0), torch.arange(4)), (1e-6 * torch.arange(4), torch.tensor([3.0, 1, 4, 1])),
                 (torch.arange(4), torch.ones(4))):
        values = {name: float(v.mean()) for name, v in pair_metrics.moments(x, y).items()}
        pair_metrics.to_sums(values, 4)
        assert pair_metrics.take_correlation(values) == {}
    assert pair_metrics.take_correlation({"loss": 1.0}) == {}


def logps_of(model, example):
    found = []
    for response in example.responses:
        ids = torch.tensor([example.prompt_ids + response])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
        found.append(sum(float(logps[len(example.prompt_ids) + t - 1, token]) for t, token in enumerate(response)))
    return found


def uneven(tmp_path, count=11):
    """Pairs whose two responses differ in length."""
    rows = [
        {"prompt": "ab:", "chosen": f" {chr(99 + i)}" * (1 + i % 4), "rejected": " yz" * (3 * i % 5 + 1)}
        for i in range(count)
    ]
    return str(write_rows(tmp_path / "uneven.jsonl", rows))


@pytest.mark.parametrize("loss", ["dpo", "simpo", "slic"])
def test_held_out_changes_are_against_the_stages_start(world, tmp_path, loss):
    config = make(world, tmp_path, loss=loss, train_dataset=uneven(tmp_path))
    tokenizer = load_tokenizer(config)
    policy = load_policy(config, tokenizer)
    examples, _ = tokenize_records(load_records(config.train_dataset), tokenizer, "pair", max_length=64)
    before = torch.tensor([logps_of(policy.model, e) for e in examples])
    if loss == "dpo":
        examples = [Example(**vars(e) | {"ref_logps": (-20.0, -30.0)}) for e in examples]
    start = StartLogps(examples)
    values = evaluate(policy, examples, "pair", config.loss_fn, 4, 0, None, tick, start)
    assert values["watch/chosen_change"] == values["watch/rejected_change"] == values["watch/chosen_fell"] == 0
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    after = torch.tensor([logps_of(policy.model, e) for e in examples])
    copy = StartLogps(examples)
    copy.restore(start.tensors())  # as from a checkpoint
    values = evaluate(policy, examples, "pair", config.loss_fn, 4, 0, None, tick, copy)
    change = (after - before).numpy()
    assert values["watch/chosen_change"] == pytest.approx(change[:, 0].mean(), abs=1e-4)
    assert values["watch/rejected_change"] == pytest.approx(change[:, 1].mean(), abs=1e-4)
    fell = (change[:, 0] < -0.01).mean()
    assert values["watch/chosen_fell"] == pytest.approx(fell, abs=1e-6) and 0 < fell < 1
    lengths = numpy.array([[len(r) for r in e.responses] for e in examples])
    margins = after.numpy() / (lengths if loss == "simpo" else 1)
    if loss == "dpo":
        margins = margins - numpy.array([-20.0, -30.0])
    r = numpy.corrcoef(margins[:, 0] - margins[:, 1], lengths[:, 0] - lengths[:, 1])[0, 1]
    assert values["watch/length_correlation"] == pytest.approx(r, abs=1e-4)


def test_start_of_other_data_is_not_used(world):
    examples = [Example(i, [1], ([4, 2], [5, 2])) for i in range(3)]
    start = StartLogps(examples)
    start.of([2, 0, 1], torch.tensor([-1.0, -2, -3, -4, -5, -6]), counts=True)
    start.complete()
    assert start.logps.tolist() == [[-2, -5], [-3, -6], [-1, -4]]
    assert start.of([1, 2], torch.zeros(4), counts=True).tolist() == [-3, -1, -6, -4]
    other = StartLogps(examples[:2])
    other.restore(start.tensors())
    assert not other.known


def test_kto_counts_each_kind_by_itself():
    change = torch.tensor([-1.0, 2.0, 0.5, -3.0])
    found = pair_metrics.changes(change, torch.tensor([True, False, True, False]))
    assert found["watch/chosen_change"].nanmean() == -0.25 and found["watch/rejected_change"].nanmean() == -0.5
    assert found["watch/chosen_fell"].nanmean() == 0.5
    pairs = pair_metrics.changes(torch.tensor([-0.011, -0.009, 4.0, 5.0]), None)
    assert pairs["watch/chosen_fell"].tolist() == [1.0, 0.0]  # rounding is no fall


def test_training_lines_are_means_over_what_the_steps_saw(world, tmp_path, quiet, monkeypatch):
    """Three micro-batches a step: KL, changes and correlation of a line against the log-probs of its steps."""
    seen = []
    own = stage.metrics_of_pairs

    def watched(kind, out, batch, start):
        seen.append((out.logps.double(), start.double(), out.lengths.double()))
        return own(kind, out, batch, start)

    monkeypatch.setattr(stage, "metrics_of_pairs", watched)
    config = make(world, tmp_path / "run", train_dataset=uneven(tmp_path), eval_dataset=None, max_steps=2,
                  per_device_train_batch_size=3, gradient_accumulation_steps=3, beta=0.2)
    train(config, display=quiet)
    (line,) = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert len(seen) == 4  # of 11 pairs: 3 + 3 + 3, then 2
    own_means = {"watch/chosen_change": [], "watch/chosen_fell": [], "watch/kl": []}
    margins, gaps = [], []
    for step in (seen[:3], seen[3:]):
        change = torch.cat([(logps - start).view(2, -1) for logps, start, _ in step], dim=1)
        lengths = torch.cat([n.view(2, -1) for _, _, n in step], dim=1)
        own_means["watch/chosen_change"].append(change[0].mean())
        own_means["watch/chosen_fell"].append((change[0] < -0.01).double().mean())
        rho = change / lengths
        own_means["watch/kl"].append((lengths * (rho.exp() - 1 - rho)).mean())
        margins.append(change[0] - change[1])
        gaps.append(lengths[0] - lengths[1])
    for name, values in own_means.items():
        assert line[name] == pytest.approx(float(sum(values)) / 2, abs=1e-5), name
    r = numpy.corrcoef(torch.cat(margins), torch.cat(gaps))[0, 1]
    assert line["watch/length_correlation"] == pytest.approx(r, abs=1e-5)


# ---- runs ------------------------------------------------------------------------------------------------------------

SAMPLED = {"sample_steps": 2, "sample_max_new_tokens": 5, "sample_time_share": None, "sample_prompts": 4}


def weights(run_dir):
    return load_file(next((run_dir / "model").glob("*.safetensors")))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [False, True])
def test_fresh_samples_change_no_weight_and_survive_a_stop(world, tmp_path, quiet, monkeypatch, lora):
    """With and without, in one go and stopped after step 3: the same weights and, but for times, the same lines."""
    if lora:
        pytest.importorskip("peft")
    changes = {"max_steps": 6, "eval_steps": 3, "save_steps": 0, "use_peft": lora}
    if lora:
        changes |= {"learning_rate": 0.05, "lora_dropout": 0.1}
    plain, sampled, stopped = (tmp_path / name for name in ("plain", "sampled", "stopped"))
    train(make(world, plain, **changes), display=quiet)
    train(make(world, sampled, **changes | SAMPLED), display=quiet)
    assert same(weights(plain), weights(sampled))
    own, steps = stage.train_step, itertools.count(1)

    def train_step(*args):
        values = own(*args)
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_step", train_step)
        with pytest.raises(Stopped):
            train(make(world, stopped, **changes | SAMPLED), display=quiet)
    shutil.rmtree(stopped / "reference")
    train(make(world, stopped, **changes | SAMPLED), resume=True, display=quiet)
    assert same(weights(stopped), weights(sampled))
    lines = [[{k: v for k, v in row.items() if not k.endswith(("seconds", "_s", "time_share", "memory_mib"))}
              for row in read_metrics(folder)] for folder in (sampled, stopped)]
    assert lines[0] == lines[1]
    steps = [row["step"] for row in lines[0] if row["split"] == "sample"]
    assert steps == [0, 2, 4, 6]
    kl = [row["kl_k3"] for row in lines[0] if row["split"] == "sample"]
    assert kl[0] == 0 and kl[-1] > 1e-5


def test_the_reference_of_fresh_samples(world, tmp_path, quiet):
    """Second stage: its first weights; named: that model, which is not the policy even before the first step."""
    stages = [{"loss": "sft", "max_steps": 2}, {"loss": "simpo", "max_steps": 2, **SAMPLED}]
    train(make(world, tmp_path / "own", stages=stages), display=quiet)
    rows = [row for row in read_metrics(tmp_path / "own") if row["split"] == "sample"]
    assert [(row["stage"], row["step"]) for row in rows] == [("simpo", 0), ("simpo", 2)]
    assert rows[0]["kl_k3"] == 0 < rows[1]["kl_k3"]
    first = tmp_path / "own" / "checkpoints" / "01-simpo-00000000"
    config = make(world, tmp_path / "named", loss="dpo", ref_model_name_or_path=str(first), max_steps=1, **SAMPLED)
    train(config, display=quiet)
    row = next(row for row in read_metrics(tmp_path / "named") if row["split"] == "sample")
    assert row["step"] == 0 and row["kl_k3"] > 1e-4


def write_scorer(tmp_path, monkeypatch, body):
    (tmp_path / "checks_of_watch.py").write_text(f"def score(prompt, response):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "checks_of_watch:score"


def test_rewards_of_fresh_samples_and_the_best_checkpoint(world, tmp_path, quiet, monkeypatch):
    """A scorer that fails on one prompt and prefers what came first: the first checkpoint stays."""
    body = "return 1 / 0 if prompt.startswith(FIRST) else float(len(response.encode()) + len(prompt))"
    prompts = [json.loads(line)["prompt"] for line in (world / "heldout.jsonl").read_text().splitlines()]
    scorer = write_scorer(tmp_path, monkeypatch, body.replace("FIRST", repr(prompts[0])))
    rewards, own = iter([5.0, 9.0, 8.0, 7.0, 6.0]), fresh_samples.mean_and_error

    def mean_and_error(name, values):
        if name == "reward":
            assert len(values) == 3 and (values > 3).all()  # prompt and response, of those that did not fail
            return {"reward": next(rewards), "reward_error": 0.1}
        return own(name, values)

    monkeypatch.setattr(fresh_samples, "mean_and_error", mean_and_error)
    config = make(world, tmp_path / "run", max_steps=8, save_steps=2, save_total_limit=1, scorer=scorer,
                  eval_generate=True, eval_max_new_tokens=3, **SAMPLED)
    summary = train(config, display=quiet)
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] == "sample"]
    assert [row["reward"] for row in rows] == [5.0, 9.0, 8.0, 7.0, 6.0]
    assert all(row["not_scored"] == 1 for row in rows)
    logged = {key.removesuffix("_error") for row in read_metrics(tmp_path / "run") for key in row
              if not key.startswith("exact_match/")}
    assert logged - {"stage", "split", "step"} <= set(METRICS)
    assert summary["stages"]["dpo"]["best"]["step"] == 2
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["00-dpo-00000002", "00-dpo-00000006"]
    html = write_report(tmp_path / "run").read_text()
    assert "Best held-out reward 9 ± 0.1 at step 2" in html and "(checkpoints/00-dpo-00000002)" in html
    assert "5 points cannot tell" in html or "different distances" in html
    first, *others = summary["samples"]  # greedy, before and after: scored too
    assert first["prompt"] == prompts[0] and first["rewards"] == [None, None] and others
    for one in others:
        assert one["rewards"] == [len(one[when].encode()) + len(one["prompt"]) for when in ("before", "after")]
    assert f"reward {others[0]['rewards'][1]:g}</span>" in html


def test_time_share(world, tmp_path, quiet, monkeypatch):
    """Sampling never takes more than its share, but for one batch of the first: what is due waits, and comes later."""
    clock = [0.0]
    monkeypatch.setattr(fresh_samples, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    stage = make(world, tmp_path, sample_steps=10, sample_time_share=0.2)
    fresh, state, taken = FreshSamples(stage, None, [], None, None), State(), []

    def measure(policy, seed, tick):
        for batch in range(4):
            tick(8 * batch, 32)
            clock[0] += 1.0
        return {}

    monkeypatch.setattr(fresh, "_measure", measure)
    for step in range(100):
        state.step, state.seconds = step, float(step)  # a step takes a second, a sampling four
        if fresh.is_due(state, last=False) and fresh.measure(None, state, 0, tick) is not None:
            taken.append(step)
        assert state.sampling.get("seconds", 0.0) <= max(0.2 * step, 3.0)
    assert taken == [25, 45, 65, 85]  # broken off once at step 10, after one batch: 1 + 4 n seconds fit in a fifth
    assert state.sampling["seconds"] == 17
    none = FreshSamples(make(world, tmp_path, sample_steps=10, sample_time_share=None), None, [], None, None)
    monkeypatch.setattr(none, "_measure", measure)
    state, taken = State(), []
    for step in range(26):
        state.step = step
        if none.is_due(state, last=step == 25):
            none.measure(None, state, 0, tick)
            taken.append(step)
    assert taken == [0, 10, 20, 25]


@pytest.mark.parametrize("of", ["fresh samples", "held-out responses", "training responses"])
def test_a_budget_stops_and_keeps_the_checkpoint(world, tmp_path, quiet, of):
    changes = {"max_steps": 12, "save_steps": 5, "save_total_limit": 1, "learning_rate": 5e-3, "eval_generate": True,
               "eval_max_new_tokens": 3, "logging_steps": 3}
    if of == "fresh samples":
        changes |= SAMPLED
    if of == "held-out responses":
        changes["eval_steps"] = 4
    folder = tmp_path / "stop"
    config = make(world, folder, kl_budget=0.01, **changes)
    summary = train(config, display=quiet)
    budget, every = summary["stages"]["dpo"]["kl_budget"], {"f": 2, "h": 4, "t": 3}[of[0]]
    step = budget["step"]
    assert budget["of"] == of and budget["kl"] >= 0.01 and 0 < step < 12 and step % every == 0
    assert summary["stages"]["dpo"]["steps"] == step
    rows = read_metrics(folder)
    split, key = {"f": ("sample", "kl"), "h": ("eval", "watch/kl"), "t": ("train", "watch/kl")}[of[0]]
    measured = {row["step"]: row[key] for row in rows if row["split"] == split and row["step"]}
    assert measured[step] == budget["kl"] and all(kl < 0.01 for at, kl in measured.items() if at < step)
    assert max(row["step"] for row in rows) == step and max(r["step"] for r in rows if r["split"] == "train") == step
    assert summary["after"]["exact_match"] is not None and "watch/kl" in summary["after"]  # evaluated where it ended
    assert sum(row["split"] == "eval" and row["step"] == step for row in rows) == 1
    kept = folder / "checkpoints" / budget["checkpoint"]
    assert same(load_file(kept / "model.safetensors"), weights(folder))
    assert f"KL budget of 0.01 nats was reached at step {step}" in (folder / "report.html").read_text()
    assert train(config, resume=True, display=quiet) == summary  # complete
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    again = train(config, resume=True, display=quiet)  # killed just before its end
    assert again["stages"]["dpo"]["kl_budget"] == budget and again["after"] == summary["after"]
    on = tmp_path / "continue"
    summary = train(make(world, on, kl_budget=0.01, kl_budget_action="continue", **changes), display=quiet)
    assert summary["stages"]["dpo"]["steps"] == 12
    assert summary["stages"]["dpo"]["kl_budget"] == budget | {"action": "continue"}
    left = [path.name for path in checkpoint.checkpoints(on)]
    assert left == sorted({budget["checkpoint"], "00-dpo-00000010"})
    again = on / "checkpoints" / budget["checkpoint"] / "model.safetensors"
    assert same(load_file(again), load_file(kept / "model.safetensors"))


def test_a_budget_ends_its_stage_and_the_next_one_begins(world, tmp_path, quiet):
    stages = [{"name": "one", "loss": "dpo", "max_steps": 9}, {"name": "two", "loss": "orpo", "max_steps": 2}]
    summary = train(make(world, tmp_path / "run", stages=stages, kl_budget=1e-4, learning_rate=5e-3), display=quiet)
    assert summary["stages"]["one"]["steps"] == summary["stages"]["one"]["kl_budget"]["step"] < 9
    assert summary["stages"]["two"]["steps"] == 2 and "kl_budget" not in summary["stages"]["two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_budget": 3.0, "loss": "simpo"}, "kl_budget: loss 'simpo' has no reference, so there is no KL to it"),
        ({"kl_budget": 3.0, "stages": [{"loss": "sft"}]}, "kl_budget: loss 'sft' has no reference"),
        ({"kl_budget": 0}, "kl_budget is 0.0; it takes above 0"),
        ({"kl_budget_action": "go"}, "kl_budget_action is 'go'; it takes stop, continue"),
        ({"sample_steps": 0}, "sample_steps is 0; it takes at least 1"),
        ({"sample_prompts": 1}, "sample_prompts is 1; it takes at least 2"),
        ({"sample_time_share": 0}, "sample_time_share is 0.0; it takes above 0"),
        ({"scorer": "checks:score"}, "scorer is set, but sample_steps is not"),
        ({"loss": "bradley_terry", "sample_steps": 5}, "sample_steps: a reward model generates nothing"),
    ],
)
def test_bad_configurations(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config_from_dict(settings(world, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "no_such_module:score"}, "scorer 'no_such_module:score'.*no_such_module"),
        ({"max_length": 200}, "sample_steps: prompt 1 has 141 tokens, and the model 128 positions: none is left"),
    ],
)
def test_bad_sampling_is_refused_before_anything_is_written(world, tmp_path, quiet, changes, message):
    rows = [{"prompt": "x" * n, "chosen": " y", "rejected": " z"} for n in (3, 140)]
    changes = changes | {"eval_dataset": str(write_rows(tmp_path / "long.jsonl", rows))}
    with pytest.raises(UserError, match=message):
        train(make(world, tmp_path / "run", sample_steps=2, **changes), display=quiet)
    assert not list((tmp_path / "run").iterdir())


# ---- the report ------------------------------------------------------------------------------------------------------


def write_run(folder, distances, rewards, **summary):
    folder.mkdir()
    rows = [
        {"stage": "dpo", "split": "sample", "step": 10 * i, "kl": d * d, "kl_k1": d * d + 0.1, "kl_k1_error": 0.2,
         "kl_k3": d * d, "kl_k3_error": 0.05, "samples": 64, "reward": r, "reward_error": 0.01}
        for i, (d, r) in enumerate(zip(distances, rewards, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"stages": {"dpo": summary}}))
    return folder


def words_of(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    return " ".join(html.replace("−", "-").replace("&#39;", "'").split())


def test_the_report_fits_what_the_samples_say(tmp_path):
    """On a planted law: its parameters, its peak and the best step stand there, and the best one has a ring."""
    d = numpy.linspace(0, 3, 13)
    reward = 0.2 + numpy.array([x * (1.0 - 0.8 * math.log(x)) if x else 0.0 for x in d])
    budget = {"budget": 4.0, "kl": 4.1, "of": "fresh samples", "step": 80, "action": "continue",
              "checkpoint": "00-dpo-80"}
    folder = write_run(tmp_path / "law", d, reward, kl_budget=budget)
    best = 10 * int(reward.argmax())
    (folder / "checkpoints" / f"00-dpo-{best:08d}").mkdir(parents=True)
    page = words_of(folder)
    assert "a = 1 [1, 1], b = 0.8 [0.8, 0.8] (95 % intervals); peak at √KL 1.28." in page  # exp(1 / 0.8 - 1)
    assert "The law fits better than the quadratic" in page
    assert f"at step {best}, √KL {d[reward.argmax()]:.3g} (checkpoints/00-dpo-{best:08d})" in page
    assert f"best, √KL {d[reward.argmax()]:.3g}: {reward.max():.4g}" in page and 'class="ring"' in page
    assert "dpo: the KL budget of 4 nats was reached at step 80 (4.1, fresh samples); checkpoint 00-dpo-80 was" in page
    assert "13 times 64 responses; the last: 9 nats by k3, 9.1 by k1" in page
    assert page.count('class="error"') == 13 + 2 * 13  # rewards, and both estimators


def test_the_report_says_what_it_cannot_tell(tmp_path):
    rng = numpy.random.default_rng(0)
    d = numpy.linspace(1, 1.4, 7)
    page = words_of(write_run(tmp_path / "noise", d, 0.5 + 0.1 * rng.normal(size=7)))
    assert "The data cannot tell the law from a quadratic" in page and "(no checkpoint was saved there)" in page
    (tmp_path / "noise" / "model").mkdir()
    assert "(model/), the last measured." in words_of(tmp_path / "noise")  # by this seed it is
    page = words_of(write_run(tmp_path / "few", [0.0, 1.0, 2.0], [0.1, 0.3, 0.2]))
    assert "No law is fitted: 3 points at 3 different distances" in page
    assert "cannot tell" not in page and "Best held-out reward 0.3 ± 0.01 at step 10" in page
    assert "gold" not in page


def test_without_a_scorer_the_report_says_so(tmp_path):
    rows = [
        {"stage": "dpo", "split": "eval", "step": 10 * i, "watch/kl": 0.5 * i, "rewards/margins": 0.1 * i}
        for i in range(9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = words_of(tmp_path)
    assert "Not a gold reward: no scorer was given" in page
    assert "no law is fitted to it. Highest at step 80: 0.8" in page
    assert "95 % intervals" not in page
