"""The tree MDP of arXiv 2406.02900 (appendix): how much probability DPO moves to leaves that no preference is about.

    python examples/studies/tree_mdp.py

A tree of depth 3 with 3 actions at each node has 27 leaves: the responses, of 3 tokens each. One to three preference
pairs name two to six of them; the others are out of distribution (OOD). DPO trains on the pairs; the mass of all OOD
leaves is summed exactly, no sampling. Conditions, each with every other:

    policy      rnn: an Elman network over the actions so far, its weights shared by all nodes (as a language model's);
                table: three free logits a node
    reference   fitted: to both responses of each pair, until the OOD leaves hold 0.5 %; uniform: as initialised, nearly
    parting     the actions in which the two responses of a pair differ: 3 is the last only, 123 are all of them
    beta        0.01, 0.1, 0.5
    variant     1, 2 or 3 pairs by gradient descent; 1 pair by Adam

Gradient descent takes steps of rate / beta, so that the first step is the same at every beta and beta only says how far
the log-ratios go. A seed is 32 trees, each with its own pairs and first weights, trained side by side: they come out so
differently that a seed's figure is the mean over its trees.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study  # noqa: E402

import fastpref as fp  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "tree_mdp"
ACTIONS, DEPTH, HIDDEN = 3, 3, 16
LEAVES = torch.tensor(list(itertools.product(range(ACTIONS), repeat=DEPTH)))  # [27, 3], a row of actions a leaf
PLACES = ACTIONS ** torch.arange(DEPTH - 1, -1, -1)  # (actions * PLACES).sum() is the leaf's row
REFERENCES = ("fitted", "uniform")

# Shapes: F trees, L = 27 leaves, P pairs, A actions, H hidden units.


class RNN(nn.Module):
    """F networks: h_t = tanh(embedding[a_(t-1)] + recurrent h_(t-1)); logits = weight h_t. Shared by a tree's nodes."""

    def __init__(self, trees: int, generator: torch.Generator) -> None:
        super().__init__()
        normal = lambda *shape: torch.randn(trees, *shape, generator=generator)  # noqa: E731
        self.embedding = nn.Parameter(normal(ACTIONS + 1, HIDDEN) * 0.5)  # the last row begins a response
        self.recurrent = nn.Parameter(normal(HIDDEN, HIDDEN) * HIDDEN**-0.5)
        self.weight = nn.Parameter(normal(ACTIONS, HIDDEN) * 0.1)  # small: a near-uniform policy

    def leaf_logps(self) -> Tensor:
        """[F, L]."""
        state, token, total = torch.zeros(1), torch.full((len(LEAVES),), ACTIONS), torch.zeros(1)
        for t in range(DEPTH):
            state = self.embedding[:, token] + (state @ self.recurrent.mT if t else 0)  # [F, L, H]
            state, token = torch.tanh(state), LEAVES[:, t]
            logps = (state @ self.weight.mT).log_softmax(-1)  # [F, L, A]
            total = total + logps[:, torch.arange(len(LEAVES)), token]
        return total


class Table(nn.Module):
    """F tables of logits, [nodes, A]: the root is node 0, the children of node n are 3 n + 1, 2, 3. Nothing shared."""

    def __init__(self, trees: int, generator: torch.Generator) -> None:
        super().__init__()
        nodes = (ACTIONS**DEPTH - 1) // (ACTIONS - 1)
        self.logits = nn.Parameter(torch.randn(trees, nodes, ACTIONS, generator=generator) * 0.1)

    def leaf_logps(self) -> Tensor:
        """[F, L]."""
        logps, node, total = self.logits.log_softmax(-1), torch.zeros(len(LEAVES), dtype=torch.int64), torch.zeros(1)
        for t in range(DEPTH):
            total = total + logps[:, node, LEAVES[:, t]]
            node = ACTIONS * node + 1 + LEAVES[:, t]
        return total


POLICIES = {"rnn": RNN, "table": Table}


def draw_pairs(trees: int, pairs: int, parting: str, generator: torch.Generator) -> Tensor:
    """[F, 2, P] leaves, chosen and rejected: those of a pair differ in the actions that `parting` counts (from 1) and
    in no other, and no leaf of a tree stands in two places."""
    differs = torch.tensor([str(t + 1) in parting for t in range(DEPTH)])
    found = []
    while len(found) < trees:
        chosen = torch.randint(ACTIONS, (pairs, DEPTH), generator=generator)
        other = (chosen + torch.randint(1, ACTIONS, (pairs, DEPTH), generator=generator)) % ACTIONS
        both = (torch.stack((chosen, torch.where(differs, other, chosen))) * PLACES).sum(-1)  # [2, P]
        if len(both.unique()) == 2 * pairs:
            found.append(both)
    return torch.stack(found)


def mass_of(logps: Tensor, leaves: Tensor) -> Tensor:
    """[F]: the probability of those leaves [F, n], which differ from each other."""
    return logps.detach().gather(1, leaves.flatten(1)).exp().sum(1)


def ood_mass(logps: Tensor, pairs: Tensor) -> Tensor:
    """[F]: the probability of all leaves that no pair names. A sum of small terms, not 1 minus a sum near 1."""
    named = torch.zeros_like(logps, dtype=torch.bool).scatter_(1, pairs.flatten(1), True)
    return logps.detach().exp().masked_fill(named, 0).sum(1)


def sequences(logps: Tensor, pairs: Tensor, ref_logps: Tensor | None = None) -> fp.SequenceLogps:
    """What a loss sees: the chosen responses of all trees, then the rejected ones."""

    def of_pairs(x: Tensor) -> Tensor:
        return x.gather(1, pairs.flatten(1)).view(pairs.shape).transpose(0, 1).flatten()

    count = pairs.numel()
    totals = fp.Totals(sequences=count, tokens=count * DEPTH, chosen_tokens=count * DEPTH / 2)
    ref = None if ref_logps is None else of_pairs(ref_logps)
    return fp.SequenceLogps(of_pairs(logps), torch.full((count,), float(DEPTH)), totals, ref)


def fit(policy: RNN | Table, pairs: Tensor, settings: dict[str, Any]) -> None:
    """Supervised, on all responses, each tree until its OOD leaves hold no more than `fitted_to`; then it stays."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings["fit_rate"])
    for _ in range(settings["most_fit_steps"]):
        logps = policy.leaf_logps()
        done = ood_mass(logps, pairs) <= settings["fitted_to"]
        if done.all():
            return
        before = [p.detach().clone() for p in policy.parameters()]
        optimizer.zero_grad()
        (len(pairs) * fp.SFT()(sequences(logps, pairs))).backward()
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(policy.parameters(), before):
                p[done] = old[done]
    raise study.Failed(f"a reference did not fit its pairs in {settings['most_fit_steps']} steps")


def prefer(policy: RNN | Table, pairs: Tensor, beta: float, optimizer: str, settings: dict[str, Any]
           ) -> Iterator[dict[str, Tensor]]:
    """DPO from `policy` on; at each recorded step the masses of all trees, [F]."""
    ref_logps, loss = policy.leaf_logps().detach(), fp.DPO(beta=beta)
    if optimizer == "adam":
        steps: torch.optim.Optimizer = torch.optim.Adam(policy.parameters(), lr=settings["adam_rate"])
    else:
        steps = torch.optim.SGD(policy.parameters(), lr=settings["rate"] / beta)
    for step in range(settings["steps"][-1] + 1):
        logps = policy.leaf_logps()
        if step in settings["steps"]:
            yield {
                "ood": ood_mass(logps, pairs),
                "chosen": mass_of(logps, pairs[:, 0]),
            }
        steps.zero_grad()
        (len(pairs) * loss(sequences(logps, pairs, ref_logps))).backward()  # each tree has its own mean over pairs
        steps.step()


def settings(quick: bool) -> dict[str, Any]:
    common = {"fitted_to": 0.005, "fit_rate": 0.02, "most_fit_steps": 2000, "rate": 0.05, "adam_rate": 0.01}
    if quick:
        return common | {"trees": 2, "betas": [0.1], "partings": ["23", "123"], "variants": [["sgd", 1]],
                         "steps": [0, 2, 4]}
    return common | {
        "trees": 32, "betas": [0.01, 0.1, 0.5], "partings": ["3", "2", "1", "23", "123"],
        "variants": [["sgd", 1], ["sgd", 2], ["sgd", 3], ["adam", 1]],
        "steps": [0, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300],
    }


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """Curves of every condition, means over the trees; and the share of trees that end with OOD mass above 0.1."""
    trees, partings = settings["trees"], settings["partings"]
    found: dict[str, dict[str, Any]] = {}
    for (optimizer, count), kind in itertools.product(settings["variants"], POLICIES):
        say(f"{kind}, {count} pair{'s' * (count > 1)}, {optimizer}")
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.cat([draw_pairs(trees, count, parting, generator) for parting in partings])
        first = POLICIES[kind](len(pairs), generator)
        fitted = copy.deepcopy(first)
        fit(fitted, pairs, settings)
        for reference, beta in itertools.product(REFERENCES, settings["betas"]):
            policy = copy.deepcopy(fitted if reference == "fitted" else first)
            recorded = list(prefer(policy, pairs, beta, optimizer, settings))
            for i, parting in enumerate(partings):
                own = slice(i * trees, (i + 1) * trees)
                curves = {name: [values[name][own].mean().item() for values in recorded] for name in recorded[0]}
                high = (recorded[-1]["ood"][own] > 0.1).float().mean().item()
                found[condition(kind, reference, parting, beta, optimizer, count)] = {
                    "ood": [study.significant(value, 3) for value in curves["ood"]],
                    "chosen": study.significant(curves["chosen"][-1], 3),
                    "high": study.significant(high, 3),
                }
    return found


def condition(kind: str, reference: str, parting: str, beta: float, optimizer: str = "sgd", pairs: int = 1) -> str:
    """What the JSON calls it."""
    return f"{kind} {reference} {parting} {beta:g} {optimizer} {pairs}"


# ---- what is shown ---------------------------------------------------------------------------------------------------

WORDS = {"3": "last only", "2": "middle only", "1": "first only", "23": "middle and last", "123": "all three"}
COLOURS = {"3": "#cc79a7", "2": "#d55e00", "1": "#e69f00", "23": "#0072b2", "123": "#009e73"}  # Okabe and Ito


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, by condition: OOD mass at the last step, and the share of trees where it is above 0.1."""
    seeds = list(results.values())
    return {
        name: {"end": study.spread([seed[name]["ood"][-1] for seed in seeds]),
               "high": study.spread([seed[name]["high"] for seed in seeds])}
        for name in seeds[0]
    }


def table(record: dict[str, Any]) -> str:
    """A row a setting, a column a parting."""
    summary, asked = record["summary"], record["settings"]
    rows = {f"β {b:g}": ("rnn", "fitted", b, "sgd", 1) for b in asked["betas"]}
    for (optimizer, pairs), b in itertools.product(asked["variants"], asked["betas"]):
        if pairs > 1 and b == 0.1:
            rows[f"{pairs} pairs, β {b:g}"] = ("rnn", "fitted", b, optimizer, pairs)
        elif optimizer == "adam":
            rows[f"Adam, β {b:g}"] = ("rnn", "fitted", b, optimizer, pairs)
    rows |= {f"uniform reference, β {b:g}": ("rnn", "uniform", b, "sgd", 1) for b in asked["betas"]}
    for optimizer, pairs in asked["variants"]:
        if pairs == 1:
            name = "table, β" if optimizer == "sgd" else "table, Adam, β"
            rows |= {f"{name} {b:g}": ("table", "fitted", b, optimizer, pairs) for b in asked["betas"]}
    lines = [f"| they differ in | {' | '.join(WORDS[parting] for parting in asked['partings'])} |"]
    lines.append("|---" * (len(asked["partings"]) + 1) + "|")
    for name, (kind, reference, b, optimizer, pairs) in rows.items():
        of = [summary[condition(kind, reference, parting, b, optimizer, pairs)] for parting in asked["partings"]]
        digits = 3 if kind == "table" else 2
        lines.append(f"| {name} | {' | '.join(study.plus_minus(one['end'], digits) for one in of)} |")
        if name == "β 0.1":
            cells = " | ".join(f"{study.plus_minus(one['high'], 0, 100)} %" for one in of)
            lines.append(f"| β 0.1: trees above 0.1 | {cells} |")
    return "\n".join([*lines, "", study.origin(record)])


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    found = {NAME: _over_steps(record)}
    if len(record["settings"]["variants"]) > 1:
        found[f"{NAME}-pairs"] = _variants(record)
    return found


def _over_steps(record: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    from bench.plots import FAINT, GRID, INK

    seeds, asked = list(record["results"].values()), record["settings"]
    figure = Figure(figsize=(3.4 * len(asked["betas"]), 6.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09)
    axes = figure.subplots(2, len(asked["betas"]), squeeze=False, sharex=True)
    for line, reference in zip(axes, REFERENCES):
        for ax, beta in zip(line, asked["betas"]):
            curves = {}
            for parting in asked["partings"]:
                name = condition("rnn", reference, parting, beta)
                curves[WORDS[parting]] = [seed[name]["ood"] for seed in seeds], COLOURS[parting]
            if reference == "fitted":
                of_table = [[s[condition("table", reference, parting, beta)]["ood"] for parting in asked["partings"]]
                            for s in seeds]
                curves["table, any of these"] = ([study.band(one)[0] for one in of_table], FAINT)
            ax.set_ylim(0, 1 if reference == "uniform" else 0.85)
            ax.set_xlim(0, asked["steps"][-1])
            ax.grid(axis="y", color=GRID)
            study.lines(ax, asked["steps"], curves)
            ax.set_title(f"{reference} reference, β = {beta:g}", color=INK)
        line[0].set_ylabel("probability of OOD leaves")
    for ax in axes[-1]:
        ax.set_xlabel("DPO step")
    figure.supxlabel(
        f"Lines: the actions in which a pair's responses differ; mean and one standard deviation over {len(seeds)} "
        "seeds", fontsize=9, color=FAINT,
    )
    return figure


def _variants(record: dict[str, Any]) -> Figure:
    """The end of the fitted reference's runs by number of pairs and optimiser, a dot a seed."""
    from matplotlib.figure import Figure

    from bench.plots import GRID

    seeds, asked = list(record["results"].values()), record["settings"]
    names = [f"{pairs} pair{'s' * (pairs > 1)}" + ("\nAdam" if optimizer == "adam" else "")
             for optimizer, pairs in asked["variants"]]
    figure = Figure(figsize=(3.4 * len(asked["betas"]), 3.4), layout="constrained")
    for ax, beta in zip(figure.subplots(1, len(asked["betas"]), squeeze=False, sharey=True)[0], asked["betas"]):
        for i, parting in enumerate(asked["partings"]):
            shift = 0.15 * (i - (len(asked["partings"]) - 1) / 2)
            for x, (optimizer, pairs) in enumerate(asked["variants"]):
                key = condition("rnn", "fitted", parting, beta, optimizer, pairs)
                values = [seed[key]["ood"][-1] for seed in seeds]
                ax.scatter([x + shift] * len(values), values, s=12, color=COLOURS[parting], linewidth=0, alpha=0.55)
                ax.plot([x + shift - 0.06, x + shift + 0.06], [sum(values) / len(values)] * 2, color=COLOURS[parting],
                        linewidth=2.2, label=WORDS[parting] if x == 0 else None)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylim(0, 0.85)
        ax.grid(axis="y", color=GRID)
        ax.set_title(f"fitted reference, β = {beta:g}")
    figure.axes[0].set_ylabel("probability of OOD leaves at the end")
    figure.axes[-1].legend(title="the responses differ in", fontsize=8.5, title_fontsize=8.5, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
