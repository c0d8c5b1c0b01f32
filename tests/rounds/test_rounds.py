"""Whole rounds of a tiny model: what is written, what is trained on, with which weights, and that all of it adds up."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest
import torch
from safetensors.torch import load_file
from small import lines, make, settings
from test_report import Page
from tiny import make_config, make_pairs, make_tokenizer, write_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from fastpref.data import load_records
from fastpref.errors import UserError
from fastpref.rounds import driver
from fastpref.rounds.config import config_from
from fastpref.rounds.driver import rounds
from fastpref.rounds.report import PARTS, judged, write_page
from fastpref.train import loop, stage
from fastpref.train.config import config_from_dict
from fastpref.train.model import fingerprint, weights_of
from fastpref.train.optim import learning_rate


def smooth(response):
    return sum(ord(c) % 7 for c in response) / max(len(response), 1)


def by_index(path):
    return {row["index"]: row for row in lines(path)}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Two rounds of DPO with evaluation."""
    import io

    from rich.console import Console

    from fastpref.train.display import Display

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        own, generated = stage.generate, []
        patch.setattr(stage, "generate", lambda *a: generated.append(1) or own(*a))
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        display = Display(Console(file=io.StringIO(), width=500))
        summary = rounds(
            make(world, run_dir, eval_dataset=str(world / "heldout.jsonl"), eval_generate=True, eval_max_new_tokens=5,
                 eval_num_generations=4),
            display=display,
        )
        assert len(generated) == 3  # greedily: before the first round, and after each
        return run_dir, summary, display.console.file.getvalue()


def test_what_a_run_writes(whole):
    run_dir, summary, printed = whole
    for number in (1, 2):
        folder = run_dir / f"round-00{number}"
        names = {path.name for path in folder.iterdir()}
        assert {"responses.jsonl", "pairs.jsonl", "evaluation.jsonl", "round.json", "train"} <= names
        for name in ("model/model.safetensors", "metrics.jsonl", "summary.json", "report.html", "config.yaml"):
            assert (folder / "train" / name).is_file()
        assert f"round {number}/2 | " in printed
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["model"] == "round-002/train/model"
    assert AutoModelForCausalLM.from_pretrained(run_dir / summary["model"])


def test_scores_are_the_scorers_and_counts_add_up(whole):
    run_dir, summary, _ = whole
    for row in summary["rounds"]:
        folder = run_dir / f"round-00{row['round']}"
        of_prompts = [line["responses"] for line in lines(folder / "responses.jsonl")]
        every = [r for responses in of_prompts for r in responses]
        counts = row["counts"]
        assert counts["prompts"] == 6 and counts["responses"] == len(every) == 18
        assert counts["responses"] == sum(counts[key] for key in ("empty", "duplicates", "failed", "scored"))
        assert counts["empty"] == sum(not r["text"] for r in every)
        for r in every:
            assert r["score"] == (None if r["skipped"] else smooth(r["text"]))
        # the mean of all samples, those that repeat another included
        assert row["reward"] == pytest.approx(sum(smooth(r["text"]) for r in every if r["text"])
                                              / sum(bool(r["text"]) for r in every))
        said = [[smooth(r["text"]) for r in responses if r["text"]] for responses in of_prompts]
        means = [statistics.mean(values) for values in said if values]
        assert row["reward_error"] == pytest.approx(statistics.stdev(means) / len(means) ** 0.5)
        assert row["pairs"] + sum(row["dropped"].values()) == 6
        for responses in of_prompts:
            texts = [r["text"] for r in responses]
            for i, r in enumerate(responses):
                assert (r["skipped"] == "duplicate") == (bool(r["text"]) and r["text"] in texts[:i])


def test_pairs_are_best_against_worst_of_the_very_tokens(whole):
    run_dir, summary, _ = whole
    for row in summary["rounds"]:
        folder = run_dir / f"round-00{row['round']}"
        pairs = lines(folder / "pairs.jsonl")
        assert len(pairs) == row["pairs"] > 0
        assert len(load_records(folder / "pairs.jsonl")) == len(pairs)  # a data set for `fastpref train`
        sampled = {line["prompt"]: line["responses"] for line in lines(folder / "responses.jsonl")}
        for pair in pairs:
            scored = {tuple(r["ids"]): r["score"] for r in sampled[pair["prompt"]] if r["score"] is not None}
            chosen, rejected = (scored[tuple(ids)] for ids in pair["response_ids"])
            assert [chosen, rejected] == pair["scores"] == [max(scored.values()), min(scored.values())]
            assert chosen > rejected
        trained = json.loads((folder / "train" / "summary.json").read_text())
        assert trained["stages"]["dpo"]["steps"] == math.ceil(row["pairs"] / 4)


def test_the_wall_time_adds_up(whole):
    _, summary, printed = whole
    for row in summary["rounds"]:
        seconds = row["seconds"]
        parts = {key: value for key, value in seconds.items() if key != "total"}
        assert set(parts) >= set(PARTS) - {"watch"}
        assert sum(parts.values()) == pytest.approx(seconds["total"])
        assert all(value >= 0 for value in parts.values())
        assert seconds["between"] < 0.3 * seconds["total"]
    assert "sampling" in printed and "between" not in summary["start"]


def test_best_of_n_is_that_of_the_evaluations_samples(whole):
    run_dir, summary, _ = whole
    for folder, row in (("start", summary["start"]), ("round-002", summary["rounds"][1])):
        of_prompts = [line["responses"] for line in lines(run_dir / folder / "evaluation.jsonl")]
        assert len(of_prompts) == 9 and all(len(responses) == 4 for responses in of_prompts)
        known = [[smooth(r["text"]) for r in responses if r["text"]] for responses in of_prompts]
        one, _, four = row["best_of_n"]
        means = [sum(values) / len(values) for values in known if values]
        assert (one["n"], one["reward"]) == (1, pytest.approx(sum(means) / len(means)))
        best = [max(values) for values in known if len(values) == 4]
        assert (four["n"], four["prompts"]) == (4, len(best))
        assert four["reward"] == pytest.approx(sum(best) / len(best))


def test_exact_match_is_not_generated_twice_for_the_same_weights(whole):
    run_dir, summary, _ = whole
    first, second = (row["training"] for row in summary["rounds"])
    assert second["before"]["exact_match"] == first["after"]["exact_match"]
    assert summary["start"]["after"]["exact_match"] == first["before"]["exact_match"]


def test_the_page(whole):
    run_dir, summary, _ = whole
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {"round-001/train/report.html", "round-002/train/report.html"}
    assert all((run_dir / link).is_file() for link in links)
    for row in summary["rounds"]:
        assert f"{row['counts']['duplicates']}" in page.text
    assert "Reward" in page.text and "Wall time" in page.text and "best of 4" in page.text
    assert "held-out sample, round 0: " in page.text and "step 0" not in page.text


def made_up(number, reward, error, kl):
    counts = dict.fromkeys(("prompts", "responses", "empty", "duplicates", "failed", "cut"), 7)
    return {"round": number, "counts": counts, "pairs": 5, "dropped": {"all equal": 2}, "reward": 0.5, "offline": 0,
            "after": {"watch/kl": kl, "exact_match": 0.5}, "best_of_n": [{"n": 1, "reward": reward, "error": error}],
            "seconds": {"sampling": 3.0, "total": 4.0}, "resumed": False}


@pytest.mark.parametrize(("last", "mood"), [(0.9, "better"), (0.62, ""), (0.1, "worse")])
def test_the_page_says_what_the_errors_allow(tmp_path, last, mood):
    """A change of 0.4, 0.12 and -0.4 with standard errors of 0.06 and 0.08, 0.1 together: two of them are 0.2."""
    rounds = [made_up(1, 1.0, 0.06, 0.53), made_up(2, last, 0.08, 0.58)]
    start = {"round": 0, "best_of_n": [{"n": 1, "reward": 0.5, "error": 0.06}], "seconds": {}}
    (tmp_path / "summary.json").write_text(json.dumps({"start": start, "rounds": rounds}))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    html = write_page(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    change = f"{'▲' if last > 0.5 else '▼'} {abs(last - 0.5):.3g} ± 0.1 {mood} before round 1"
    assert " ".join(change.split()) in page.text
    past = f"Held-out reward was highest after round 1 (1) and ended at {last}: the rounds went on past their best."
    assert (past in page.text) == (last < 0.9)  # 0.1 is one standard error, 0.38 nearly four
    kl = html[html.index("<h3>KL to the reference"):]
    ticks = re.findall(r'<text class="tick"[^>]*text-anchor="(end|middle)">([^<]*)<', kl[:kl.index("</figure>")])
    assert [text for side, text in ticks if side == "end"][0] == "0"  # not from 0.53 on
    assert [text for side, text in ticks if side == "middle"] == ["1", "2"]  # no round 1.5
    assert html.count('class="error"') == 3
    assert "2 all equal" in page.text


@pytest.mark.parametrize(("last", "kind", "mood"), [(0.9, "worked", "better"), (0.55, "nothing", ""),
                                                    (0.1, "over-optimised", "worse")])
def test_without_held_out_records_the_sampled_rewards_are_judged(tmp_path, last, kind, mood):
    """Changes of 0.4, 0.05, -0.4 with a standard error of sqrt(2) 0.05; the last round's training knows the KL."""
    kl = "KL to the reference 3 nats a response (training responses)"
    rounds = [made_up(i, 0, 0, 0) | {"reward": reward, "reward_error": 0.05, "best_of_n": [], "after": {}, "training": {
        "verdict": {"kind": "worked", "because": ["training loss 1 → 0.5", kl], "next": "(docs/watch.md#worked)"}}}
        for i, reward in ((1, 0.5), (2, last))]
    summary = {"start": {"round": 0, "best_of_n": [], "seconds": {}}, "rounds": rounds}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    verdict = judged([summary["start"], *rounds])
    assert verdict.kind == kind and verdict.because[-1] == f"last round: {kl}"
    html = write_page(tmp_path).read_text(encoding="utf-8")
    assert f'<div class="card number {mood}"><dt>Sampled reward</dt><dd><strong>{last}</strong>' in html
    assert html.count('class="error"') == 2 and ">start</td>" not in html and "in round 1: 0.5" in html


# ---- weights ---------------------------------------------------------------------------------------------------------


def logps(model, prompt, response):
    """fp64, from the definition."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        rows = model.double()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None]).sum()


def reference_file(run_dir):
    return load_file(run_dir / "reference" / "00-dpo-train.safetensors")["logps"]


@pytest.mark.parametrize("start_from", ["initial", "previous"])
@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_every_round_begins_and_compares_with_the_weights_asked_for(
    world, tmp_path, quiet, monkeypatch, start_from, reference
):
    begun, loaded = [], []
    own_train, own_load = loop.train_policy, AutoModelForCausalLM.from_pretrained

    def train(policy, *args, **more):
        begun.append({name: tensor.clone() for name, tensor in weights_of(policy).items()})
        return own_train(policy, *args, **more)

    monkeypatch.setattr(driver, "train_policy", train)

    def load(*args, **options):
        loaded.append(options.get("device_map"))
        return own_load(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    rounds(make(world, tmp_path / "run", start_from=start_from, reference=reference), display=quiet)
    assert loaded == ["meta", None]  # names and shapes, and the policy, once
    folders = {"initial": tmp_path / "run/start/model", "previous": tmp_path / "run/round-001/train/model"}
    wanted = load_file(folders[start_from] / "model.safetensors")
    assert all(torch.equal(begun[1][name], tensor) for name, tensor in wanted.items())
    model = AutoModelForCausalLM.from_pretrained(folders[reference])
    pairs = lines(tmp_path / "run/round-002/pairs.jsonl")
    expected = [[float(logps(model, p["prompt_ids"], ids)) for ids in p["response_ids"]] for p in pairs]
    torch.testing.assert_close(reference_file(tmp_path / "run").double(), torch.tensor(expected).double(),
                               atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["run", "round"])
def test_online_dpo_is_one_training_or_many(world, tmp_path, quiet, schedule):
    """Rounds of one step, written out with torch: the same weights; moments and rate go on, or begin anew."""
    config = make(world, tmp_path / "run", number=3, schedule=schedule, per_device_train_batch_size=8, warmup_steps=1,
                  max_grad_norm=0.0)
    rounds(config, display=quiet)
    stage = config.stage
    model = AutoModelForCausalLM.from_pretrained(world / "pretrained").double()
    initial = AutoModelForCausalLM.from_pretrained(world / "pretrained").double()
    moments: dict[str, list[torch.Tensor]] = {}
    for number in range(3):
        at, of = (number, 3) if schedule == "run" else (0, 1)
        if schedule == "round":
            moments = {}
        pairs = lines(tmp_path / f"run/round-00{number + 1}/pairs.jsonl")
        losses = []
        for pair in pairs:
            sides = []
            for ids in pair["response_ids"]:
                rows = model(torch.tensor([pair["prompt_ids"] + ids])).logits[0, len(pair["prompt_ids"]) - 1 : -1]
                own = rows.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
                sides.append(own - logps(initial, pair["prompt_ids"], ids))
            losses.append(-torch.nn.functional.logsigmoid(0.5 * (sides[0] - sides[1])))
        model.zero_grad()
        torch.stack(losses).mean().backward()
        rate = learning_rate(stage, at, of)
        with torch.no_grad():
            for name, p in model.named_parameters():  # AdamW, from the paper
                m, v, t = moments.get(name, [torch.zeros_like(p), torch.zeros_like(p), 0])
                m, v, t = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2, t + 1
                moments[name] = [m, v, t]
                p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        saved = load_file(tmp_path / f"run/round-00{number + 1}/train/model/model.safetensors")
        parts = dict(model.named_parameters())
        error = max(float((saved[name] - parts[name].detach()).abs().max()) for name in saved)
        assert error < 0.02 * rate, (number, error)  # a wrong moment is off by a good part of the rate


def test_the_learning_rates_of_all_rounds_are_one_schedule(world, tmp_path, quiet):
    config = make(world, tmp_path / "run", max_steps=3, lr_scheduler_type="cosine", warmup_steps=2)
    rounds(config, display=quiet)
    found = [
        row["learning_rate"]
        for number in (1, 2)
        for row in lines(tmp_path / f"run/round-00{number}/train/metrics.jsonl")
        if row["split"] == "train"
    ]
    # linear to the full rate over 2 of 6 steps, then half a cosine
    wave = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert found == pytest.approx([1e-2 / 3, 2e-2 / 3, *(1e-2 * w for w in wave)])


def test_saved_every_so_many_rounds(world, tmp_path, quiet):
    every = dict(number=3, prompts_per_round=3, num_generations=2)
    rounds(make(world, tmp_path / "all", **every), display=quiet)
    rounds(make(world, tmp_path / "some", save_rounds=2, **every), display=quiet)
    there = [(tmp_path / f"some/round-00{i}/train/model").is_dir() for i in range(1, 4)]
    assert there == [False, True, True]
    a, b = (load_file(tmp_path / name / "round-003/train/model/model.safetensors") for name in ("all", "some"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- pairings --------------------------------------------------------------------------------------------------------


def test_policy_against_reference(world, tmp_path, quiet, monkeypatch):
    own_sample, used, seeds = driver.sample, [], []

    def sample(policy, *more):
        made = own_sample(policy, *more)
        if len(more) > 3:  # not the checks before
            used.append(fingerprint(policy.model))
            seeds.append(more[2].seed)
        return made

    monkeypatch.setattr(driver, "sample", sample)
    rounds(make(world, tmp_path / "run", pairing="policy_reference", num_generations=2), display=quiet)
    folder = tmp_path / "run/round-002"
    own, theirs = by_index(folder / "responses.jsonl"), by_index(folder / "reference_responses.jsonl")
    prompts = {row["prompt"]: index for index, row in own.items()}
    pairs = lines(folder / "pairs.jsonl")
    for pair in pairs:
        index = prompts[pair["prompt"]]
        sides = [{tuple(r["ids"]) for r in source[index]["responses"]} for source in (own, theirs)]
        chosen, rejected = map(tuple, pair["response_ids"])
        assert (chosen in sides[0] and rejected in sides[1]) or (chosen in sides[1] and rejected in sides[0])
        assert pair["scores"][0] > pair["scores"][1]
    folders = (tmp_path / "run/start/model", tmp_path / "run/round-001/train/model")
    initial, trained = (fingerprint(AutoModelForCausalLM.from_pretrained(path)) for path in folders)
    assert used == [initial, initial, trained, initial]
    assert len(set(seeds)) == 4  # no two draw the same numbers
    row = json.loads((folder / "round.json").read_text())
    assert row["pairs"] + sum(row["dropped"].values()) == 12 and row["counts"]["responses"] == 24


def test_rejection_sampling_fine_tuning(world, tmp_path, quiet):
    summary = rounds(
        make(world, tmp_path / "run", loss="sft", pairing="best_of_n", min_score=4.5, number=3, prompts_per_round=None,
             learning_rate=3e-2, num_train_epochs=3), display=quiet)
    for row in summary["rounds"]:
        folder = tmp_path / f"run/round-00{row['round']}"
        sampled = {line["prompt"]: line["responses"] for line in lines(folder / "responses.jsonl")}
        examples = lines(folder / "pairs.jsonl")
        for example in examples:
            scores = [r["score"] for r in sampled[example["prompt"]] if r["score"] is not None]
            assert example["scores"] == [max(scores)] and max(scores) >= 4.5
        best = [max(r["score"] or 0.0 for r in responses) for responses in sampled.values()]
        assert len(examples) == sum(score >= 4.5 for score in best)
    rewards = [row["reward"] for row in summary["rounds"]]
    assert rewards[2] > rewards[0] + 0.2  # it learns to please the scorer


def test_kto_takes_pairs_apart(world, tmp_path, quiet):
    summary = rounds(make(world, tmp_path / "run", loss="kto", number=1), display=quiet)
    examples = lines(tmp_path / "run/round-001/pairs.jsonl")
    assert [e["label"] for e in examples] == [True, False] * summary["rounds"][0]["pairs"]
    assert summary["rounds"][0]["offline"] == 0


def test_a_share_of_offline_pairs(world, tmp_path, quiet):
    for name in ("a", "b"):
        rounds(make(world, tmp_path / name, offline_ratio=0.5), display=quiet)
    row = json.loads((tmp_path / "a/round-002/round.json").read_text())
    pairs = lines(tmp_path / "a/round-002/pairs.jsonl")
    assert row["offline"] == row["pairs"] == len(pairs) / 2
    offline = [pair for pair in pairs if pair.get("offline")]
    known = {(r["prompt"], r["chosen"], r["rejected"]) for r in make_pairs(22, seed=1)}
    assert len(offline) == row["pairs"] and {(p["prompt"], p["chosen"], p["rejected"]) for p in offline} <= known
    assert [p["prompt"] for p in offline] != [p["prompt"] for p in lines(tmp_path / "a/round-001/pairs.jsonl")
                                              if p.get("offline")]
    for number in (1, 2):
        a, b = ((tmp_path / name / f"round-00{number}/pairs.jsonl").read_bytes() for name in ("a", "b"))
        assert a == b


def test_a_warm_up_stage_comes_first(world, tmp_path, quiet):
    config = settings(world, tmp_path / "run", number=1) | {
        "stages": [{"loss": "sft", "max_steps": 3}, {"loss": "dpo", "beta": 0.5}],
    }
    config.pop("beta")
    rounds(config_from(config), display=quiet)
    alone = {key: value for key, value in config.items() if key != "rounds"}
    alone |= {"stages": config["stages"][:1], "output_dir": str(tmp_path / "alone")}
    loop.train(config_from_dict(alone), display=quiet)
    a, b = (path / "model/model.safetensors" for path in (tmp_path / "run/start", tmp_path / "alone"))
    assert a.read_bytes() == b.read_bytes()


def test_a_warm_up_stage_compares_fresh_samples_with_its_own_first_weights(world, tmp_path, quiet):
    sampled = {"sample_steps": 2, "sample_time_share": None, "sample_prompts": 4, "sample_max_new_tokens": 4}
    config = settings(world, tmp_path / "run", number=1) | {"stages": [
        {"name": "a", "loss": "sft", "max_steps": 2}, {"name": "b", "loss": "sft", "max_steps": 2} | sampled,
        {"loss": "dpo", "beta": 0.5},
    ]}
    config.pop("beta")
    rounds(config_from(config), display=quiet)
    rows = [row for row in lines(tmp_path / "run/start/metrics.jsonl") if row["split"] == "sample"]
    assert [row["step"] for row in rows] == [0, 2] and rows[0]["kl"] == 0 < rows[1]["kl"]


def test_an_adapter(world, tmp_path, quiet):
    pytest.importorskip("peft")
    config = make(world, tmp_path / "run", use_peft=True, lora_r=4, start_from="initial", reference="previous")
    rounds(config, display=quiet)
    first, second = (
        load_file(tmp_path / f"run/round-00{i}/train/model/adapter_model.safetensors") for i in (1, 2)
    )
    start = load_file(tmp_path / "run/start/model/adapter_model.safetensors")
    for name in (name for name in start if "lora_B" in name):
        assert not torch.equal(start[name], first[name]) and not torch.equal(first[name], second[name])


def test_an_adapter_on_4_bits(world, tmp_path, quiet):
    """The rounds of the base that the codes stand for: the same responses, pairs and, to rounding, adapters."""
    pytest.importorskip("bitsandbytes")
    codes = AutoModelForCausalLM.from_pretrained(
        world / "pretrained", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    codes.dequantize(torch.float32).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    changes = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-3}
    rounds(make(world, tmp_path / "a", model_name_or_path=str(tmp_path / "whole"), **changes), display=quiet)
    rounds(make(world, tmp_path / "b", load_in_4bit=True, **changes), display=quiet)
    for i in (1, 2):
        ours, theirs = (lines(tmp_path / run / f"round-00{i}/pairs.jsonl") for run in "ba")
        assert [(r["chosen"], r["rejected"]) for r in ours] == [(r["chosen"], r["rejected"]) for r in theirs] != []
        model = f"round-00{i}/train/model/adapter_model.safetensors"
        ours, theirs = (load_file(tmp_path / run / model) for run in "ba")
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_prompts_of_their_own(world, tmp_path, quiet):
    rows = [{"prompt": f"{word}:", "note": 1} for word in ("abc", "fed", "abc", "deaf")]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    values = settings(world, tmp_path / "run", prompts=str(prompts), prompts_per_round=None, number=1)
    values.pop("train_dataset")
    summary = rounds(config_from(values), display=quiet)
    assert summary["rounds"][0]["counts"]["prompts"] == 3  # each once
    assert "4 records -> 3 prompts" in quiet.console.file.getvalue()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_the_scorer_fails_on_is_counted_and_not_trained_on(world, tmp_path, quiet):
    config = make(world, tmp_path / "run", scorer="checks:moody", number=1, prompts_per_round=None)
    summary = rounds(config, display=quiet)
    row = summary["rounds"][0]
    of_prompts = [line["responses"] for line in lines(tmp_path / "run/round-001/responses.jsonl")]
    asked = [r for responses in of_prompts for r in responses if not r["skipped"]]
    bad = [r for r in asked if sum(map(ord, r["text"])) % 4 < 2]
    assert 0 < len(bad) == row["counts"]["failed"] and all(r["score"] is None for r in bad)
    bad_ids = {tuple(r["ids"]) for r in bad}
    trained = [tuple(ids) for pair in lines(tmp_path / "run/round-001/pairs.jsonl") for ids in pair["response_ids"]]
    assert trained and not bad_ids & set(trained)
    printed = quiet.console.file.getvalue()
    assert f"{len(bad)} of {len(asked)} not scored" in printed and "raised (first: ValueError" in printed


def test_a_scorer_that_always_fails_ends_it_at_once(world, tmp_path, quiet):
    with pytest.raises(UserError, match="'checks:broken' gave no score at all.*no judge today"):
        rounds(make(world, tmp_path / "run", scorer="checks:broken", prompts_per_round=None, num_generations=4,
                    generation_batch_size=16), display=quiet)
    assert len(lines(tmp_path / "run/round-001/responses.jsonl")) < 21  # before everything is sampled


def test_no_pair_at_all(world, tmp_path, quiet):
    with pytest.raises(UserError, match="round 1: none of the 6 prompts makes a pair: 6 ties"):
        rounds(make(world, tmp_path / "run", scorer="checks:equal"), display=quiet)


def test_a_later_round_without_a_pair_is_passed_over(world, tmp_path, quiet, monkeypatch):
    own = driver.make_pairs
    rng = {"round": 0}

    def pairs(responses, *more, **options):
        return own(responses, *more, **options) if rng["round"] < 2 else ([], driver.Counter({"ties": 1}))

    started = driver.run_round

    def run_round(session, number):
        rng["round"] = number
        started(session, number)

    monkeypatch.setattr(driver, "make_pairs", pairs)
    monkeypatch.setattr(driver, "run_round", run_round)
    config = make(world, tmp_path / "run", number=3, save_rounds=3)
    summary = rounds(config, display=quiet)
    assert [row["pairs"] > 0 for row in summary["rounds"]] == [True, False, False]
    assert "round 2: none of the 6 prompts makes a pair (6 ties); nothing is trained" in quiet.console.file.getvalue()
    assert summary["model"] == "model"  # those of round 1, which was not to be saved
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "rounds.num_generations is 1, but pairing best_worst needs at least 2"),
        ({"num_generations": 1, "pairing": "best_random"}, "pairing best_random needs at least 2"),
        ({"num_generations": 1, "pairing": "best_of_n", "loss": "sft"}, "the best of one is no choice"),
        ({"pairing": "best_of_n"}, "best_of_n makes completions, but loss 'dpo' trains on pairs"),
        ({"loss": "sft"}, "loss 'sft' trains on completions, but rounds.pairing best_worst makes pairs"),
        ({"pairing": "best_wrost"}, "did you mean best_worst"),
        ({"number": 0}, "rounds.number is 0; it takes at least 1"),
        ({"number": "two"}, "rounds.number is 'two'; it takes a whole number"),
        ({"offline_ratio": 1}, "rounds.offline_ratio is 1.0; it takes 0 to below 1"),
        ({"start_from": "initial", "schedule": "run"}, "rounds.schedule is run"),
        ({"pairing": "policy_reference", "reference": "previous"}, "both samples come from the same"),
        ({"max_new_tokens": 48}, "leaves no room for a prompt in max_length=48"),
        ({"loss": "simpo", "reference": "initial"}, "loss 'simpo' has no reference"),
        ({"ref_model_name_or_path": "x", "reference": "initial"}, "name two references"),
        ({"loss": "bradley_terry"}, "trains a reward model"),
        ({"scorer": ""}, "rounds.scorer is missing"),
        ({"dataset_streaming": True, "max_steps": 3}, "rounds read all of their prompts"),
    ],
)
def test_settings_that_cannot_work(world, tmp_path, changes, message):
    values = settings(world, tmp_path / "run", **changes)
    if changes.get("loss") in ("simpo", "bradley_terry"):
        values.pop("beta")
    with pytest.raises(UserError, match=message) as caught:
        config_from(values)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_names_the_nearest(world, tmp_path):
    values = settings(world, tmp_path / "run")
    values["rounds"]["num_generation"] = 3
    with pytest.raises(UserError, match="rounds.num_generation: no such key; the nearest is num_generations"):
        config_from(values)
    with pytest.raises(UserError, match="rounds: a section of keys and values is missing"):
        config_from({key: value for key, value in values.items() if key != "rounds"})


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("no_such_module:f", "there is no module"),
        ("checks:nothing", "has no 'nothing'"),
        ("implicit:nowhere", "nowhere is neither"),
    ],
)
def test_a_scorer_that_is_not_there(world, tmp_path, quiet, monkeypatch, scorer, message):
    monkeypatch.setattr(driver.sharding, "load", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        rounds(make(world, tmp_path / "run", scorer=scorer), display=quiet)
    assert not (tmp_path / "run/config.yaml").exists()


def test_more_prompts_than_there_are(world, tmp_path, quiet):
    with pytest.raises(UserError, match="rounds.prompts_per_round is 22, but there are 21"):
        rounds(make(world, tmp_path / "run", prompts_per_round=22), display=quiet)


def test_examples_that_could_not_fit_a_batch(world, tmp_path, quiet):
    with pytest.raises(UserError, match="max_tokens_per_batch is 15, but the longest prompt"):
        rounds(make(world, tmp_path / "run", max_tokens_per_batch=15), display=quiet)


@pytest.mark.parametrize("merge", [False, True])
def test_rounds_from_an_adapter(world, tmp_path, quiet, merge):
    """Rounds of a learning rate of 0 end with what they began with: base and adapter, as peft reads them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world / "pretrained"), lora)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "sft")
    changes = {"model_name_or_path": str(tmp_path / "sft"), "use_peft": True, "merge_adapter": merge}
    summary = rounds(make(world, tmp_path / "run", learning_rate=0.0, number=1, **changes), display=quiet)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / summary["model"]).eval()
    ids = torch.tensor([[1, 40, 41, 42]])
    assert torch.allclose(found(ids).logits, model.eval()(ids).logits, atol=1e-5)
    assert found.peft_config["default"].base_model_name_or_path.endswith("run/base" if merge else "pretrained")


def a_model(folder, **changes):
    """Its configuration and tokenizer, no weights: whoever reads them fails otherwise."""
    make_config(**changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_rotary_factors_that_vllm_would_choose_for_itself(world, tmp_path, monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    source = a_model(tmp_path / "dynamic", rope_parameters=rope)
    monkeypatch.setattr(driver, "uses_vllm", lambda name: True)
    assert driver.takes_vllm(make(world, tmp_path / "run"))
    assert not driver.takes_vllm(make(world, tmp_path / "run", model_name_or_path=source))
    with pytest.raises(UserError, match="rounds.engine is 'vllm', which chooses LongRoPE and dynamic NTK factors by"):
        driver.takes_vllm(make(world, tmp_path / "run", model_name_or_path=source, engine="vllm"))


def test_prompts_with_their_responses_beyond_the_models_positions(world, tmp_path, quiet):
    source = tmp_path / "gpt2"
    GPT2Config(vocab_size=261, n_positions=12, n_embd=16, n_layer=1, n_head=2).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    with pytest.raises(UserError, match=r"has 12 positions, and the longest prompt with rounds.max_new_tokens=6 14 "
                                        r"tokens, for which there is none: lower it \(together at most 12\)"):
        rounds(make(world, tmp_path / "run", model_name_or_path=str(source)), display=quiet)
