"""The frontier study: its world, KL and rewards against enumeration in fp64, its fits, resume and committed JSON."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parent.parent / "examples" / "studies"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDIES))
    try:
        import study

        yield study
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def frontier(study):
    return study.load(STUDIES / "frontier.py")


@pytest.fixture(scope="module")
def small(frontier):
    """Settings and a world of 3 prompts and 64 responses to each."""
    settings = frontier.settings(quick=True) | {"steps": [0, 30, 60], "lr": 5e-3, "pretrain_steps": 60}
    return settings, frontier.make_world(3, settings)


# ---- enumeration, written anew ---------------------------------------------------------------------------------------


def token_probabilities(policy, prefix, tokens, vocab):
    """[vocab] fp64, of a prefix (prompt, token, ...), from the weights alone."""
    w = {name: p.detach().double().numpy() for name, p in policy.named_parameters()}
    padded = [*prefix[1:], *[vocab] * (tokens - len(prefix))]
    x = np.concatenate([w["prompt.weight"][prefix[0]], *(w["token.weight"][token] for token in padded)])
    for layer in ("first", "second"):
        x = np.tanh(w[f"{layer}.weight"] @ x + w[f"{layer}.bias"])
    e = np.exp(w["weight"] @ x)
    return e / e.sum()


def enumerate_all(policy, settings):
    """{(prompt, token, ...): probability given the prompt}."""
    tokens, vocab = settings["tokens"], settings["vocab"]
    known = {}
    for t in range(tokens):
        for prefix in itertools.product(range(settings["prompts"]), *[range(vocab)] * t):
            known[prefix] = token_probabilities(policy, prefix, tokens, vocab)
    found = {}
    for sequence in itertools.product(range(settings["prompts"]), *[range(vocab)] * tokens):
        found[sequence] = math.prod(known[sequence[: t + 1]][sequence[t + 1]] for t in range(tokens))
    return found


def reward_of(table, world, settings):
    """{sequence: the sum over its tokens}: rows are looked up by their prefix."""
    rows = {tuple(prefix): row for prefix, row in zip(world.space.prefixes.tolist(), table.tolist())}
    tokens, vocab = settings["tokens"], settings["vocab"]
    found = {}
    for sequence in itertools.product(range(settings["prompts"]), *[range(vocab)] * tokens):
        prefixes = [sequence[: t + 1] + (vocab,) * (tokens - 1 - t) for t in range(tokens)]
        found[sequence] = sum(rows[prefix][token] for prefix, token in zip(prefixes, sequence[1:]))
    return found


def mean(probabilities, values, prompts):
    return sum(p * values[sequence] for sequence, p in probabilities.items()) / prompts


def as_number(sequence, vocab):
    number = 0
    for digit in sequence:
        number = number * vocab + digit
    return number


def test_kl_and_rewards_are_those_of_enumeration(frontier, small):
    settings, world = small
    policy, curve = frontier.train(world, frontier.make_loss("DPO", 0.1, settings), 3, settings)
    reference, trained = enumerate_all(world.policy, settings), enumerate_all(policy, settings)
    assert sum(trained.values()) == pytest.approx(settings["prompts"])
    logratios = {sequence: math.log(p / reference[sequence]) for sequence, p in trained.items()}
    expected = {"kl": mean(trained, logratios, settings["prompts"])}
    for name in ("gold", "visible", "allowed"):
        rewards = reward_of(getattr(world, name), world, settings)
        expected[name] = mean(trained, rewards, settings["prompts"]) - mean(reference, rewards, settings["prompts"])
    by_number = {as_number(sequence, settings["vocab"]): r for sequence, r in logratios.items()}
    chosen, rejected = ([by_number[n] for n in side.tolist()] for side in (world.chosen, world.rejected))
    expected["chosen"] = np.mean(chosen)
    expected["accuracy"] = np.mean([c > r for c, r in zip(chosen, rejected)])
    assert {name: values[-1] for name, values in curve.items()} == pytest.approx(expected, rel=2e-4, abs=2e-6)
    assert curve["kl"][0] == curve["gold"][0] == 0
    assert curve["kl"][-1] > 0.1 and curve["accuracy"][-1] > 0.6  # it moved: the comparison is of something


def test_rewards_are_what_the_docstring_says(frontier, small):
    """Gold = visible + hidden, each of variance 1; the hidden part is the share of allowed tokens."""
    settings, world = small
    reference = enumerate_all(world.policy, settings)
    rewards = {name: reward_of(getattr(world, name), world, settings) for name in ("gold", "visible", "allowed")}
    prompts = range(settings["prompts"])
    within = {name: {p: sum(q * of[s] for s, q in reference.items() if s[0] == p) for p in prompts}
              for name, of in rewards.items()}
    variance = {name: mean(reference, {s: (x - within[name][s[0]]) ** 2 for s, x in of.items()}, len(prompts))
                for name, of in rewards.items()}
    assert [*within["gold"].values(), *within["visible"].values()] == pytest.approx([0] * 2 * len(prompts), abs=1e-6)
    assert (variance["gold"], variance["visible"]) == pytest.approx((1, 1), rel=1e-5)
    total = {s: rewards["visible"][s] + (share - within["allowed"][s[0]]) / variance["allowed"] ** 0.5
             for s, share in rewards["allowed"].items()}
    scale = mean(reference, {s: x**2 for s, x in total.items()}, len(prompts)) ** 0.5
    assert all(rewards["gold"][s] == pytest.approx(x / scale, abs=1e-5) for s, x in total.items())
    after: dict = {}
    for prefix, row in zip(world.space.prefixes.tolist(), world.allowed.tolist()):
        tokens = [token for token in prefix[1:] if token < settings["vocab"]]
        after.setdefault(("token", tokens[-1]) if tokens else ("prompt", prefix[0]), set()).add(tuple(row))
    assert len(after) == settings["prompts"] + settings["vocab"] and all(len(rows) == 1 for rows in after.values())
    assert all(sorted(row) == [0] + [1 / settings["tokens"]] * 3 for rows in after.values() for row in rows)


def test_labels_show_the_visible_part_alone(frontier):
    settings = frontier.settings(quick=True) | {"pairs": 4000}
    world = frontier.make_world(1, settings)
    visible, allowed = (reward_of(getattr(world, name), world, settings) for name in ("visible", "allowed"))
    number = {as_number(sequence, settings["vocab"]): sequence for sequence in visible}
    pairs = [(number[c], number[r]) for c, r in zip(world.chosen.tolist(), world.rejected.tolist())]
    assert len(pairs) == 4000 and all(c[0] == r[0] and c != r for c, r in pairs)  # one prompt, two responses
    shown = np.array([visible[c] - visible[r] for c, r in pairs])
    hidden = np.array([allowed[c] - allowed[r] for c, r in pairs])
    wins = 0.25 + 0.5 / (1 + np.exp(-3 * np.abs(shown)))  # of the response that shows more
    surprise = (shown > 0) - wins
    assert abs(surprise.sum()) < 4 * np.sqrt((wins * (1 - wins)).sum())
    signed = surprise * hidden * np.sign(shown)  # would not vanish on average if labels knew the hidden part
    assert abs(signed.sum()) < 4 * np.sqrt((wins * (1 - wins) * hidden**2).sum())
    assert 0.25 < (shown < 0).mean() < 0.4  # label noise, all told


def test_losses_are_those_of_the_papers(frontier, small):
    import fastpref as fp

    settings, _ = small
    logps = torch.tensor([-3.0, -5.0, -4.0, -4.5], dtype=torch.float64)
    ref = torch.tensor([-3.5, -4.0, -4.5, -5.0], dtype=torch.float64)
    seq = fp.SequenceLogps(logps, torch.full((4,), 4.0).double(), fp.Totals(4, 16, 8), ref)
    d, beta = np.array([0.5 - 0.5, -1.0 - 0.5]), 0.2
    expected = {
        "DPO": np.log1p(np.exp(-beta * d)).mean(), "IPO": ((d - 1 / (2 * beta)) ** 2).mean(),
        "SLiC": np.maximum(0, 1 - beta * d).mean(), "RPO": np.log1p(np.exp(-beta * d)).mean() + 0.1 * beta * 4.0,
    }
    found = {name: frontier.make_loss(name, beta, settings)(seq).item() for name in frontier.TITLES}
    assert found == pytest.approx(expected)


# ---- fits ------------------------------------------------------------------------------------------------------------


def made_up(form, noise, seeds=5):
    random, found = np.random.default_rng(0), []
    for _ in range(seeds):
        a, b = 0.8 + 0.03 * random.standard_normal(), 0.5 + 0.03 * random.standard_normal()
        curves = []
        for end in (1.5, 3.0):
            d = np.linspace(0, end, 25)
            gold = d * (a - b * (np.log(np.maximum(d, 1e-9)) if form == "law" else d))
            gold[1:] += noise * random.standard_normal(24)
            curves.append({"kl": (d**2).tolist(), "gold": gold.tolist()})
        found.append(curves)
    return found


@pytest.mark.parametrize("form", ["law", "quadratic"])
def test_the_form_that_made_the_points_is_found(frontier, form):
    found = frontier.compare(made_up(form, 0.02))
    assert found["better"] == {"own": form, "held_out": form}
    assert found[form]["a"]["low"] < 0.8 < found[form]["a"]["high"]
    assert found[form]["b"]["low"] < 0.5 < found[form]["b"]["high"]
    assert found[form]["own"]["mean"] == pytest.approx(0.02, rel=0.2)
    assert found[form]["held_out"]["mean"] > found[form]["own"]["mean"]
    assert (found["curves_law_closer"], found["curves"]) == (10 if form == "law" else 0, 10)


def test_errors_are_of_own_and_of_other_seeds_fits(frontier):
    """Two seeds: the other's fit is that of one other seed; written anew with numpy's least squares."""
    seeds = made_up("law", 0.1, seeds=2)
    found, errors = frontier.compare(seeds), {}
    points = [(np.sqrt(np.concatenate([c["kl"] for c in curves])), np.concatenate([c["gold"] for c in curves]))
              for curves in seeds]
    for form in ("law", "quadratic"):
        designs = [np.stack([d, -d * (np.log(np.maximum(d, 1e-300)) if form == "law" else d)], 1) for d, _ in points]
        fits = [np.linalg.lstsq(design, gold, rcond=None)[0] for design, (_, gold) in zip(designs, points)]
        for kind, order in (("own", (0, 1)), ("held_out", (1, 0))):
            errors[form, kind] = [np.sqrt(np.mean((gold - design @ fits[i]) ** 2))
                                  for design, (_, gold), i in zip(designs, points, order)]
            assert found[form][kind]["mean"] == pytest.approx(np.mean(errors[form, kind]), rel=1e-3)
        assert (found[form]["a"]["mean"], found[form]["b"]["mean"]) == pytest.approx(np.mean(fits, 0), rel=1e-3)
    for kind in ("own", "held_out"):
        difference = np.subtract(errors["law", kind], errors["quadratic", kind]).mean()
        assert found[f"{kind}_difference"]["mean"] == pytest.approx(difference, rel=1e-3)


def test_noise_is_not_told_apart(frontier):
    assert frontier.compare(made_up("law", 3.0))["better"] == {"own": None, "held_out": None}
    alone = frontier.compare(made_up("law", 0.02, seeds=1))
    assert alone["better"] == {"own": None, "held_out": None} and alone["held_out_difference"] is None


def test_interval(frontier):
    found = frontier.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5 / 5)  # Student's t, 4 degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((3 - half, 3 + half), rel=1e-3)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_quick_run(study, frontier, tmp_path, capsys):
    assert study.run(frontier, ["--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "frontier.json").read_text())
    curve = record["results"]["0"]["SLiC"]["0.5"]
    assert {len(values) for values in curve.values()} == {len(record["settings"]["steps"])}
    figures = {f"{name}.{suffix}" for name in ("frontier", "frontier_peaks") for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"frontier.json"} | figures
    assert "RPO  beta 0.5" in capsys.readouterr().out
    assert study.run(frontier, ["--seeds", "-1", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_finished_curves_are_kept(frontier, tmp_path, monkeypatch):
    settings = frontier.settings(quick=True)
    whole, trained, train = frontier.one_seed(0, settings, tmp_path / "whole", lambda _: None), [], frontier.train

    def stops(*arguments):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(frontier, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        frontier.one_seed(0, settings, tmp_path / "part", lambda _: None)
    monkeypatch.setattr(frontier, "train", lambda *arguments: trained.append(arguments) or train(*arguments))
    assert frontier.one_seed(0, settings, tmp_path / "part", lambda _: None) == whole
    assert len(trained) == 4 * len(settings["betas"])  # 3 before, the others after
    frontier.one_seed(0, settings | {"lr": 2e-3}, tmp_path / "part", lambda _: None)
    assert len(trained) == 8 * len(settings["betas"])  # of other settings: from the beginning


# ---- what is committed -----------------------------------------------------------------------------------------------


def test_committed(study, frontier):
    path = STUDIES / "results" / "frontier.json"
    record = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000 and record["settings"] == frontier.settings(quick=False)
    assert len(set(record["seeds"])) >= 5 and study.is_finite(record["results"])
    assert record["summary"] == frontier.summarize(record["results"])
    readme = (STUDIES / "README.md").read_text(encoding="utf-8")
    section = next(part for part in re.split(r"^## ", readme, flags=re.M) if "<!-- frontier -->" in part)
    before, rest = section.split("<!-- frontier -->\n\n")
    table, after = rest.split("\n\n<!-- /frontier -->")
    assert table == frontier.table(record)
    for figure in re.findall(r"−?\d+(?:\.\d+)? ± \d+(?:\.\d+)?", before + after):
        assert figure in table, figure
    for link in re.findall(r"\]\(([^)]+\.(?:png|svg))\)", section):
        assert (STUDIES / link).is_file()
