"""The studies of examples/studies: what they compute, that they run, go on and refuse; README tells the JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parent.parent / "examples" / "studies"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(STUDIES))
    yield
    sys.path.remove(str(STUDIES))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(name, *arguments):
    """The exit code of `python examples/studies/NAME.py ARGUMENTS`, in this process."""
    return load(STUDIES / "study.py").run(load(STUDIES / f"{name}.py"), arguments)


# ---------------------------------------------------------------------------------------------- the tree


def logits_at(policy, tree, actions):
    """fp64 logits of the node that the actions lead to, written anew: one tree, one node."""
    weights = {name: p[tree].detach().double().numpy() for name, p in policy.named_parameters()}
    if "logits" in weights:  # breadth first: the nodes of the levels above, then the place among those of this one
        node = sum(3**t for t in range(len(actions))) + sum(a * 3**i for i, a in enumerate(reversed(actions)))
        return weights["logits"][node]
    state = np.zeros(weights["recurrent"].shape[0])
    for token in [3, *actions]:
        state = np.tanh(weights["embedding"][token] + weights["recurrent"] @ state)
    return weights["weight"] @ state


def masses(policy, tree, actions=(), probability=1.0):
    """{leaf: probability}, by walking the tree."""
    if len(actions) == 3:
        return {tuple(actions): probability}
    z = np.exp(logits_at(policy, tree, actions))
    found = {}
    for action, p in enumerate(z / z.sum()):
        found |= masses(policy, tree, [*actions, action], probability * p)
    return found


def leaf(index):
    return index // 9, index // 3 % 3, index % 3


@pytest.mark.parametrize("kind", ["rnn", "table"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masses_and_training_on_the_tree(kind, optimizer):
    """Against a walk of the tree in fp64; and the first step against DPO's gradient by finite differences."""
    tree = load(STUDIES / "tree_mdp.py")
    settings = tree.settings(quick=False) | {"steps": [0, 1, 20]}
    generator = torch.Generator().manual_seed(3)
    pairs = tree.draw_pairs(2, 2, "123", generator)
    policy = tree.POLICIES[kind](2, generator)
    for recorded, values in enumerate(tree.prefer(policy, pairs, 0.2, optimizer, settings)):
        found = [masses(policy, i) for i in range(2)]  # the generator waits: the weights are those of this step
        for i, expected in enumerate(found):
            chosen, rejected = ([leaf(index) for index in side] for side in pairs[i].tolist())
            assert sum(expected.values()) == pytest.approx(1)
            ood = sum(p for name, p in expected.items() if name not in chosen + rejected)
            assert values["ood"][i].item() == pytest.approx(ood, rel=1e-4)
            assert values["chosen"][i].item() == pytest.approx(sum(expected[name] for name in chosen), rel=1e-4)
        if recorded == 0:
            start, slope = found, slopes(policy, pairs, 0.2)
            before = next(policy.parameters()).detach().clone()
        if recorded == 1 and optimizer == "sgd":
            step = (next(policy.parameters()).detach() - before).flatten(1)[:, 0].numpy()
            assert abs(slope).max() > 1e-3
            assert step == pytest.approx(-settings["rate"] / 0.2 * slope, rel=1e-2, abs=1e-6)
    for i, expected in enumerate(found):  # it learnt
        for c, r in zip(*pairs[i].tolist()):
            gains = [math.log(expected[leaf(index)] / start[i][leaf(index)]) for index in (c, r)]
            assert gains[0] - gains[1] > 0.3


def slopes(policy, pairs, beta, h=1e-3):
    """Of each tree's DPO loss where policy = reference, in the first entry of the first parameter: differences."""
    p = next(policy.parameters())
    reference, found = [masses(policy, i) for i in range(len(pairs))], []
    for i, (chosen, rejected) in enumerate(pairs.tolist()):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p[i].view(-1)[0] += sign * h
            now = masses(policy, i)
            with torch.no_grad():
                p[i].view(-1)[0] -= sign * h
            ratio = {name: math.log(now[name] / reference[i][name]) for name in now}
            margins = [ratio[leaf(c)] - ratio[leaf(r)] for c, r in zip(chosen, rejected)]
            values.append(np.mean([math.log1p(math.exp(-beta * margin)) for margin in margins]))
        found.append((values[0] - values[1]) / (2 * h))
    return np.array(found)


@pytest.mark.parametrize("parting", ["3", "2", "1", "23", "123"])
def test_pairs_differ_where_they_say(parting):
    tree = load(STUDIES / "tree_mdp.py")
    for one in tree.draw_pairs(20, 3, parting, torch.Generator().manual_seed(0)).tolist():
        assert len({index for side in one for index in side}) == 6
        for c, r in zip(*one):
            assert "".join(str(t + 1) for t in range(3) if leaf(c)[t] != leaf(r)[t]) == parting


def test_a_fitted_reference_holds_what_it_says():
    tree = load(STUDIES / "tree_mdp.py")
    generator = torch.Generator().manual_seed(0)
    pairs = tree.draw_pairs(3, 1, "2", generator)
    policy = tree.RNN(3, generator)
    tree.fit(policy, pairs, tree.settings(quick=False))
    for i, one in enumerate(pairs.flatten(1).tolist()):
        found = masses(policy, i)
        both = [found[leaf(index)] for index in one]
        assert 0.995 <= sum(both) < 0.9965 and both[0] == pytest.approx(both[1], rel=0.5)


# ---------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("name", ["tree_mdp", "rpo_figure", "tail"])
def test_a_quick_run_leaves_json_and_figures(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(name, "--quick", "--output", str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert record["schema"] == 1 and record["seeds"] == [0] and record["versions"]["torch"]
    assert load(STUDIES / "study.py").is_finite(record["results"])
    figures = {path.suffix for path in (tmp_path / "out").iterdir()} - {".json"}
    assert figures == {".png", ".svg"}
    assert not list((tmp_path / "out").glob("*.part"))
    assert "seed 0" in capsys.readouterr().out  # progress


FAKE = '''
"""A study that stops when a file says so."""
from pathlib import Path
from matplotlib.figure import Figure
NAME = "fake"
def settings(quick): return {"quick": quick}
def one_seed(seed, settings, folder, say):
    here = Path(__file__).parent
    if seed == 1 and (here / "stop").exists():
        raise KeyboardInterrupt
    with (here / "ran").open("a") as file:
        file.write(f"{seed} ")
    return seed * 1.5
def summarize(results): return sum(results.values())
def table(record): return "table"
def draw(record): return {}
'''


def test_finished_seeds_are_kept(tmp_path, capsys):
    study, output = load(STUDIES / "study.py"), tmp_path / "out"
    (tmp_path / "fake.py").write_text(FAKE)
    fake = load(tmp_path / "fake.py")
    (tmp_path / "stop").touch()
    run = ["--seeds", "3", "--jobs", "1", "--output", str(output)]
    assert study.run(fake, run) == 130
    assert "1 finished seeds are kept" in capsys.readouterr().err
    assert not (output / "fake.json").exists()
    (tmp_path / "stop").unlink()
    assert study.run(fake, run) == 0
    assert (tmp_path / "ran").read_text() == "0 1 2 "  # seed 0 once
    assert json.loads((output / "fake.json").read_text())["results"] == {"0": 0.0, "1": 1.5, "2": 3.0}
    assert study.run(fake, [*run, "--quick"]) == 0  # complete, and of other settings: from the beginning
    assert (tmp_path / "ran").read_text() == "0 1 2 0 1 2 "


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seeds", "0"], "--seeds is '0'; it takes a number of seeds"),
        (["--seeds", "x"], "--seeds is 'x'"),
        (["--seeds", "1,1"], "--seeds is '1,1'"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--output", __file__], "it takes a folder"),
        (["--draw", "--output", "nowhere"], "nowhere/tree_mdp.json: cannot be drawn"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("tree_mdp", "--quick", *arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


# ---------------------------------------------------------------------------------------------- what is committed


def committed(name):
    return json.loads((STUDIES / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(("name", "seeds"), [("tree_mdp", 5), ("rpo_figure", 5), ("tail", 3), ("tail_smollm2", 3)])
def test_committed_results(name, seeds):
    study, module, record = load(STUDIES / "study.py"), load(STUDIES / f"{name}.py"), committed(name)
    assert record["schema"] == study.SCHEMA and record["study"] == name
    assert len(set(record["seeds"])) >= seeds and set(record["results"]) == set(map(str, record["seeds"]))
    assert {"python", "torch", "fastpref", "numpy", "matplotlib"} <= set(record["versions"])
    if name != "tail_smollm2":  # that asks for its pairs
        assert record["settings"] == module.settings(quick=False)
    assert study.is_finite(record["results"])
    assert record["summary"] == module.summarize(record["results"])
    for suffix in ("png", "svg"):
        for path in (STUDIES / "results").glob(f"{name}*.{suffix}"):
            assert path.stat().st_size < 400_000


@pytest.mark.parametrize("name", ["tree_mdp", "rpo_figure", "tail", "tail_smollm2"])
def test_readme_tells_what_the_json_holds(name):
    """The table is the JSON's; and no figure stands in the text around it that is not in the table."""
    readme = (STUDIES / "README.md").read_text(encoding="utf-8")
    table = load(STUDIES / f"{name}.py").table(committed(name))
    section = next(part for part in re.split(r"^## ", readme, flags=re.M) if f"<!-- {name} -->" in part)
    before, rest = section.split(f"<!-- {name} -->\n\n")
    inside, after = rest.split(f"\n\n<!-- /{name} -->")
    assert inside == table
    for figure in re.findall(r"−?\d+(?:\.\d+)? ± \d+(?:\.\d+)?|\d+(?:\.\d+)? %", before + after):
        assert figure in table, figure
    for link in re.findall(r"\]\(([^)]+\.(?:png|svg))\)", section):
        assert (STUDIES / link).is_file()
