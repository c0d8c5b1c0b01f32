"""The frontier of arXiv 2406.02900 (figures 1 and 2): gold reward against sqrt(KL) for DPO, IPO, SLiC and RPO.

    python examples/studies/frontier.py

The world is small enough to be exact: a prompt (16) and a response of 4 tokens (of 8) make 65,536 sequences, so KL and
expected rewards are sums over all of them, with no sampling noise. A seed draws a world of its own:

    corpus      a grammar allows 3 of the 8 tokens after each token (or prompt); one token in ten slips
    reference   a small network pretrained on that corpus: far from uniform
    gold        visible + hidden part, each of unit variance under the reference, the sum again scaled to that.
                Visible: a random value for each (prompt, place, token). Hidden: the share of tokens that the
                grammar allows; labels do not show it.
    data        2000 pairs sampled from the reference, labelled by Bradley-Terry on the visible part; 25 % flipped,
                which makes some 30 % of the labels wrong in all

From there each loss trains the network through `linear_preference_loss`, far beyond the peak. SLiC is that of the
paper, max(0, 1 - beta D), here called Hinge; RPO has eta 0.1. Recorded at 41 steps: KL(policy || reference) in nats
a response, expected gold reward and its parts minus the reference's, how often the implicit reward agrees with the
training labels, how far chosen log-probs have moved. Fitted to each seed's points of all beta, with d = sqrt(KL):
the law R = d (a - b log d) and the quadratic R = d (a - b d).
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study  # noqa: E402

import fastpref as fp  # noqa: E402
from fastpref.report import laws  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "frontier"
TITLES = {"DPO": "DPO", "IPO": "IPO", "SLiC": "SLiC (hinge)", "RPO": "RPO"}
KINDS = "own", "held_out"  # errors of fits: see compare
FORM_DASHES: dict[str, Any] = {"law": "-", "quadratic": (0, (4, 2))}


def make_loss(name: str, beta: float, settings: dict[str, Any]) -> fp.losses.Loss:
    if name == "DPO":
        return fp.losses.DPO(beta)
    if name == "IPO":
        return fp.losses.IPO(beta, length_norm="sum")
    if name == "SLiC":
        return fp.losses.Hinge(beta)
    return fp.losses.RPO(beta, eta=settings["eta"])


def settings(quick: bool) -> dict[str, Any]:
    common = {
        "allowed": 3, "slip": 0.1, "hidden_part": 1.0, "label_scale": 3.0, "flipped": 0.25, "lr": 7e-4, "eta": 0.1,
    }
    if quick:
        return common | {
            "prompts": 3, "vocab": 4, "tokens": 3, "corpus": 200, "pretrain_steps": 20, "width": 8, "pairs": 60,
            "batch": 20, "betas": [0.1, 0.5], "steps": checkpoints(10, 7),
        }
    return common | {
        "prompts": 16, "vocab": 8, "tokens": 4, "corpus": 8192, "pretrain_steps": 800, "width": 48, "pairs": 2000,
        "batch": 200, "betas": [0.05, 0.1, 0.2, 0.5, 1.0], "steps": checkpoints(1500, 40),
    }


def checkpoints(last: int, count: int) -> list[int]:
    """0 to `last`, dense at the start, where the policy moves fastest."""
    return sorted({round(last * (k / count) ** 2) for k in range(count + 1)})


# ---- the world -------------------------------------------------------------------------------------------------------


class Space:
    """All sequences. A sequence is a number: its digits are the prompt and then the tokens. So is a prefix of it; the
    prefixes are rows, the prompts first, then prompts with one token, ..., so that a policy is a table [rows, vocab].
    """

    def __init__(self, prompts: int, vocab: int, tokens: int) -> None:
        self.prompts, self.vocab, self.tokens = prompts, vocab, tokens
        self.sizes = [prompts * vocab**t for t in range(tokens)]  # prefixes with t tokens
        self.starts = [sum(self.sizes[:t]) for t in range(tokens)]
        padded = []
        for t, size in enumerate(self.sizes):
            digits = self._digits(torch.arange(size), t)
            padded.append(F.pad(digits, (0, tokens - 1 - t), value=vocab))
        self.prefixes = torch.cat(padded)  # [rows, tokens]: the prompt, then tokens, then padding, which is `vocab`

    def _digits(self, numbers: Tensor, tokens: int) -> Tensor:
        places = [numbers // self.vocab**tokens]
        places += [numbers // self.vocab ** (tokens - 1 - t) % self.vocab for t in range(tokens)]
        return torch.stack(places, 1)

    def rows(self, sequences: Tensor) -> Tensor:
        """[S, tokens]: the row that predicts each token."""
        prefixes = [start + sequences // self.vocab ** (self.tokens - t) for t, start in enumerate(self.starts)]
        return torch.stack(prefixes, 1)

    def targets(self, sequences: Tensor) -> Tensor:
        """[S, tokens]."""
        return self._digits(sequences, self.tokens)[:, 1:].contiguous()

    def totals(self, table: Tensor) -> Tensor:
        """[sequences]: the sum over its tokens of table [rows, vocab], for each sequence given its prompt."""
        total = table.new_zeros(self.prompts)
        for start, size in zip(self.starts, self.sizes):
            total = (total[:, None] + table[start : start + size]).flatten()
        return total

    def expected(self, logps: Tensor, table: Tensor) -> Tensor:
        """[...]: the mean over prompts of the expected `totals` of table [..., rows, vocab] under a policy's token
        log-probs [rows, vocab]: each token's value times the probability of coming to it."""
        reached, mass = logps.new_zeros(self.prompts), []
        for start, size in zip(self.starts, self.sizes):
            step = reached[:, None] + logps[start : start + size]
            mass.append(step.exp())
            reached = step.flatten()
        return (torch.cat(mass) * table).sum((-2, -1)) / self.prompts


class Policy(nn.Module):
    """Hidden rows of prefixes: embeddings side by side, two tanh layers; logits are `hidden @ weight.T`."""

    def __init__(self, space: Space, width: int) -> None:
        super().__init__()
        self.prompt, self.token = nn.Embedding(space.prompts, width // 4), nn.Embedding(space.vocab + 1, width // 4)
        self.first, self.second = nn.Linear(space.tokens * (width // 4), width), nn.Linear(width, width)
        self.weight = nn.Parameter(torch.randn(space.vocab, width) * width**-0.5)

    def forward(self, prefixes: Tensor) -> Tensor:
        """[..., tokens] -> [..., width]."""
        embedded = torch.cat((self.prompt(prefixes[..., 0]), self.token(prefixes[..., 1:]).flatten(-2)), -1)
        return torch.tanh(self.second(torch.tanh(self.first(embedded))))


class World(NamedTuple):
    space: Space
    policy: Policy  # the reference's weights
    reference: Tensor  # [rows, vocab] fp64: its token log-probs
    gold: Tensor  # [rows, vocab]: a sequence's reward is the sum over its tokens; 0 on average, variance 1
    visible: Tensor  # the part that labels show, alike
    allowed: Tensor  # 1 / tokens where the grammar allows the token, else 0: sums to the share
    chosen: Tensor  # [pairs], sequences
    rejected: Tensor


def token_logps(space: Space, policy: Policy) -> Tensor:
    """[rows, vocab], fp64."""
    with torch.no_grad():
        return F.log_softmax((policy(space.prefixes) @ policy.weight.T).double(), -1)


def make_world(seed: int, settings: dict[str, Any]) -> World:
    space, draw = Space(settings["prompts"], settings["vocab"], settings["tokens"]), torch.Generator().manual_seed(seed)
    place = (space.prefixes[:, 1:] < space.vocab).sum(1)  # [rows]: tokens so far
    last = space.prefixes.gather(1, place[:, None])[:, 0]  # the token before; at place 0 the prompt
    first, last = (place == 0)[:, None], last.clamp(max=space.vocab - 1)

    shares = _grammar(space.prompts, settings, draw), _grammar(space.vocab, settings, draw)
    grammar = torch.where(first, shares[0][space.prefixes[:, 0]], shares[1][last])
    slipping = (1 - settings["slip"]) * grammar + settings["slip"] / space.vocab
    prompts = torch.randint(space.prompts, (settings["corpus"],), generator=draw)
    policy = _pretrain(space, sample(space, slipping, prompts, draw), seed, settings, draw)
    reference = token_logps(space, policy)

    by_place = torch.randn(space.prompts, space.tokens, space.vocab, generator=draw, dtype=torch.float64)
    visible = standard(space, by_place[space.prefixes[:, 0], place], reference)
    allowed = (grammar > 0).double() / space.tokens
    hidden = standard(space, allowed, reference)
    gold = standard(space, visible + settings["hidden_part"] * hidden, reference)

    count = settings["pairs"]
    prompts = torch.randint(space.prompts, (2 * count,), generator=draw)  # more than enough: equal responses go
    one, other = (sample(space, reference.exp(), prompts, draw) for _ in range(2))
    one, other = one[one != other][:count], other[one != other][:count]
    wins = preferred(space.totals(visible)[one] - space.totals(visible)[other], settings)
    wins = torch.rand(count, generator=draw) < wins
    chosen, rejected = torch.where(wins, one, other), torch.where(wins, other, one)
    return World(space, policy, reference, gold, visible, allowed, chosen, rejected)


def preferred(difference: Tensor, settings: dict[str, Any]) -> Tensor:
    """The probability that a response is labelled better: Bradley-Terry, and some labels flipped."""
    flipped = settings["flipped"]
    return flipped + (1 - 2 * flipped) * torch.sigmoid(settings["label_scale"] * difference)


def sample(space: Space, probabilities: Tensor, prompts: Tensor, draw: torch.Generator) -> Tensor:
    """[S]: a sequence for each of these prompts."""
    numbers = prompts
    for start in space.starts:
        tokens = torch.multinomial(probabilities[start + numbers], 1, generator=draw)[:, 0]
        numbers = numbers * space.vocab + tokens
    return numbers


def standard(space: Space, table: Tensor, reference: Tensor) -> Tensor:
    """The same rewards up to a number for each prompt, with mean 0 and (over all prompts) variance 1 under the
    reference."""
    probabilities = space.totals(reference).exp().view(space.prompts, -1)
    rewards = space.totals(table).view(space.prompts, -1)
    mean = (probabilities * rewards).sum(1)
    deviation = (probabilities * (rewards - mean[:, None]) ** 2).sum(1).mean().sqrt()
    return (table - mean[space.prefixes[:, :1]] / space.tokens) / deviation


def _grammar(count: int, settings: dict[str, Any], draw: torch.Generator) -> Tensor:
    """[count, vocab]: after each of these, the shares of the tokens; 0 where it is not allowed."""
    shares, allowed = torch.zeros(count, settings["vocab"]), settings["allowed"]
    which = torch.rand(shares.shape, generator=draw).argsort(1)[:, :allowed]
    shares.scatter_(1, which, 0.2 + torch.rand(which.shape, generator=draw))
    return shares / shares.sum(1, keepdim=True)


def _pretrain(space: Space, corpus: Tensor, seed: int, settings: dict[str, Any], draw: torch.Generator) -> Policy:
    torch.manual_seed(seed)
    policy = Policy(space, settings["width"])
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(settings["pretrain_steps"]):
        batch = corpus[torch.randint(len(corpus), (128,), generator=draw)]
        hidden = policy(space.prefixes[space.rows(batch)])
        fp.linear_preference_loss(hidden, policy.weight, space.targets(batch), loss="sft").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


# ---- training --------------------------------------------------------------------------------------------------------


def measure(world: World, policy: Policy) -> dict[str, float]:
    """What is recorded of a policy. All exact; rewards relative to the reference's."""
    space, logps = world.space, token_logps(world.space, policy)
    tables = torch.stack((logps - world.reference, world.gold, world.visible, world.allowed))
    kl, gold, visible, allowed = space.expected(logps, tables).tolist()
    before = space.expected(world.reference, torch.stack((world.gold, world.visible, world.allowed))).tolist()
    logratios = space.totals(logps - world.reference)
    chosen, rejected = logratios[world.chosen], logratios[world.rejected]
    found = {
        "kl": max(kl, 0.0), "gold": gold - before[0], "visible": visible - before[1], "allowed": allowed - before[2],
        "accuracy": (chosen > rejected).double().mean().item(), "chosen": chosen.mean().item(),
    }
    return {name: study.significant(value, 5) for name, value in found.items()}


def train(world: World, loss: fp.losses.Loss, seed: int, settings: dict[str, Any]) -> tuple[Policy, dict[str, Any]]:
    """The trained policy, and `measure` at each of settings["steps"]: name -> [values]. Batches do not depend on the
    loss."""
    policy, space, draw = copy.deepcopy(world.policy), world.space, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings["lr"])
    ref_logps = space.totals(world.reference).float()
    recorded: list[dict[str, float]] = []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(settings["steps"][-1] + 1):
        if step in settings["steps"]:
            recorded.append(measure(world, policy))
        if step == settings["steps"][-1]:
            break
        if len(order) < settings["batch"]:
            order = torch.randperm(len(world.chosen), generator=draw)
        batch, order = order[: settings["batch"]], order[settings["batch"] :]
        sequences = torch.cat((world.chosen[batch], world.rejected[batch]))
        hidden = policy(space.prefixes[space.rows(sequences)])  # [S, tokens, width]
        out = fp.linear_preference_loss(
            hidden, policy.weight, space.targets(sequences), loss=loss, ref_logps=ref_logps[sequences]
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy, {name: [values[name] for values in recorded] for name in recorded[0]}


def one_seed(seed: int, settings: dict[str, Any], folder: Path, say: study.Say) -> dict[str, Any]:
    """Curves by loss and beta: {loss: {beta: {name: [values]}}}. Those that an interrupted run finished lie in
    `folder`."""
    folder.mkdir(exist_ok=True)
    world = make_world(seed, settings)
    found: dict[str, dict[str, Any]] = {}
    for name in TITLES:
        for beta in settings["betas"]:
            path = folder / f"{name}-{beta:g}.json"
            kept = json.loads(path.read_text()) if path.is_file() else {}
            if kept.get("settings") != settings:
                kept = {"settings": settings, "curve": train(world, make_loss(name, beta, settings), seed, settings)[1]}
                path.with_suffix(".tmp").write_text(json.dumps(kept))
                path.with_suffix(".tmp").replace(path)
            curve = found.setdefault(name, {})[f"{beta:g}"] = kept["curve"]
            if not study.is_finite(curve):
                raise study.Failed(f"{name} at beta {beta:g} diverged")
            best = peak(curve)
            say(f"{name:4} beta {beta:<4g} gold {best['gold']:.2f} at {best['kl']:.2f} nats, in the end "
                f"{curve['gold'][-1]:.2f} at {curve['kl'][-1]:.2f}")
    return found


def peak(curve: dict[str, list[float]]) -> dict[str, float]:
    """Where the gold reward was highest: `at` (index of the step), gold, kl."""
    at = max(range(len(curve["gold"])), key=curve["gold"].__getitem__)
    return {"at": at, "gold": curve["gold"][at], "kl": curve["kl"][at]}


# ---- what it says ----------------------------------------------------------------------------------------------------


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Per loss: the fits of both forms and what tells them apart; per loss and beta: the peak and the end."""
    found: dict[str, Any] = {}
    for name in TITLES:
        curves = {seed: result[name] for seed, result in results.items()}
        found[name] = {"fits": compare([list(of.values()) for of in curves.values()]), "beta": {}}
        for beta in next(iter(curves.values())):
            of = [curves[seed][beta] for seed in curves]
            peaks = [peak(curve) for curve in of]
            found[name]["beta"][beta] = {
                "peak_gold": study.spread([p["gold"] for p in peaks]),
                "peak_kl": study.spread([p["kl"] for p in peaks]),
                "peak_is_last": sum(p["at"] == len(c["gold"]) - 1 for p, c in zip(peaks, of)),
            } | {f"last_{k}": study.spread([curve[k][-1] for curve in of]) for k in of[0]}
    return found


def compare(seeds: list[list[dict[str, list[float]]]]) -> dict[str, Any]:
    """The law beside the quadratic. seeds: for each seed its curves, one a beta.

    Each seed's points are fitted by themselves, through R(0) = 0; a, b: means over seeds and 95 % t intervals of them.
    own: root mean square error of those fits. held_out: that of the mean a, b of the OTHER seeds. Points of one curve
    are not independent, so AICc would promise too much; what counts is the difference between the forms, law -
    quadratic, over seeds: `better` names a form where its interval excludes 0.
    """
    points = [_points(curves) for curves in seeds]
    found: dict[str, Any] = {}
    errors: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for form in laws.FORMS:
        values = []
        for d, rewards in points:
            fit = laws.fit(form, d, rewards, origin=False)
            values.append((fit.a.value, fit.b.value))
        others = [np.mean(values[:i] + values[i + 1 :], axis=0) for i in range(len(values)) if len(values) > 1]
        errors["own"][form] = [_error(form, value, *at) for value, at in zip(values, points)]
        errors["held_out"][form] = [_error(form, value, *at) for value, at in zip(others, points)]
        found[form] = {"a": interval([a for a, _ in values]), "b": interval([b for _, b in values])}
        found[form] |= {kind: study.spread(of[form]) if of[form] else None for kind, of in errors.items()}
    for kind, of in errors.items():
        differences = np.subtract(of["law"], of["quadratic"]).tolist()
        found[f"{kind}_difference"] = interval(differences) if differences else None
    single = [[laws.fit(form, *_points([curve]), origin=False).residual for form in laws.FORMS]
              for curves in seeds for curve in curves]
    found["curves"], found["curves_law_closer"] = len(single), sum(law < quadratic for law, quadratic in single)
    found["better"] = {kind: _better(found[f"{kind}_difference"]) for kind in KINDS}
    return found


def _points(curves: list[dict[str, list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """d = sqrt(KL) and gold rewards of all curves."""
    return np.sqrt(np.concatenate([c["kl"] for c in curves])), np.concatenate([c["gold"] for c in curves])


def _error(form: str, values: Any, d: np.ndarray, rewards: np.ndarray) -> float:
    """Root mean square of what R = a d + b FORM(d) leaves."""
    return float(np.sqrt(np.mean((rewards - values[0] * d - values[1] * laws.FORMS[form](d)) ** 2)))


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds, standard deviation, and the 95 % t interval of the mean (of one seed: no interval)."""
    found = study.spread(values)
    half = laws.t_quantile(0.975, len(values) - 1) * found["sd"] / len(values) ** 0.5 if len(values) > 1 else None
    bounds = {} if half is None else {"low": found["mean"] - half, "high": found["mean"] + half}
    return found | {name: study.significant(value) for name, value in bounds.items()}


def _better(difference: dict[str, float] | None) -> str | None:
    if difference is None or "low" not in difference or difference["low"] <= 0 <= difference["high"]:
        return None
    return "law" if difference["mean"] < 0 else "quadratic"


def table(record: dict[str, Any]) -> str:
    summary, seeds = record["summary"], len(record["seeds"])
    lines = [
        "| loss | β | peak gold reward (sd) | KL there (nats) | at the last step: gold | KL | visible part |"
        " allowed tokens (points) | peak before the last step |", "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, loss in summary.items():
        for beta, of in loss["beta"].items():
            shown = "peak_gold", "peak_kl", "last_gold", "last_kl", "last_visible"
            cells = [study.plus_minus(of[key]) for key in shown]
            cells += [study.plus_minus(of["last_allowed"], 1, 100), f"{seeds - of['peak_is_last']} of {seeds} seeds"]
            lines.append(" | ".join([f"| {name}", beta, *cells]) + " |")
    lines += ["", "| loss | form | a | b | error of a seed's own fit | of the other seeds' fit |",
              "|---|---|---|---|---|---|"]
    for name, loss in summary.items():
        for form in laws.FORMS:
            of = loss["fits"][form]
            cells = [_with_interval(of["a"]), _with_interval(of["b"])]
            cells += [study.plus_minus(of[kind], 3) if of[kind] else "n/a" for kind in KINDS]
            lines.append(" | ".join([f"| {name}", form, *cells]) + " |")
    lines += ["", "| loss | error of law − quadratic, own fit | other seeds' fit | single curves nearer to the law | "
              "closer |", "|---|---|---|---|---|"]
    for name, loss in summary.items():
        fits = loss["fits"]
        cells = [_with_interval(fits[f"{kind}_difference"], 3) for kind in KINDS]
        cells += [f"{fits['curves_law_closer']} of {fits['curves']}", _verdict(fits["better"])]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    return "\n".join([*lines, "", f"In brackets: 95 % t intervals of means over seeds. {study.origin(record)}"])


def _verdict(better: dict[str, str | None]) -> str:
    if better["own"] != better["held_out"]:
        return "; ".join(f"{text}: {better[kind] or 'not told apart'}" for kind, text in zip(KINDS, ("own", "others'")))
    return better["own"] or "not told apart"


def _with_interval(of: dict[str, float] | None, digits: int = 2) -> str:
    if of is None:
        return "n/a"
    mean, *bounds = (f"{round(of[key], digits) + 0.0:.{digits}f}" for key in ("mean", "low", "high") if key in of)
    return (mean + f" [{', '.join(bounds)}]" * bool(bounds)).replace("-", "−")


# viridis, its light end darkened: an order that every eye tells apart, and in print
COLOURS = ["#440154", "#3b528b", "#21918c", "#5db33c", "#d9a400"]
INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    return {NAME: _frontier(record), f"{NAME}_peaks": _peaks(record)}


def _frontier(record: dict[str, Any]) -> Figure:
    """Gold reward against sqrt(KL), a panel a loss: seeds thin, their mean at each step thick, both fitted forms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    reach, ends = 0.0, []
    for ax, (name, loss) in zip(axes.flat, record["summary"].items()):
        furthest = 0.0
        ends.append((ax, []))
        for beta, colour in zip(loss["beta"], COLOURS):
            curves = [(np.sqrt(of[name][beta]["kl"]), of[name][beta]["gold"]) for of in record["results"].values()]
            for d, gold in curves:
                ax.plot(d, gold, color=colour, linewidth=0.7, alpha=0.35)
            d, gold = (study.band(of)[0] for of in zip(*curves))
            ax.plot(d, gold, color=colour, linewidth=2.4)
            ax.plot(d[-1], gold[-1], "o", color=colour, markersize=5)
            ends[-1][1].append((d[-1], gold[-1], f"β {beta}", colour))
            furthest = max(furthest, *(max(d) for d, _ in curves))
        reach = max(reach, furthest)
        at = np.linspace(0, furthest, 200)
        for form, dashes in FORM_DASHES.items():
            a, b = (loss["fits"][form][key]["mean"] for key in "ab")
            ax.plot(at, a * at + b * laws.FORMS[form](at), color=INK, linewidth=1.5, linestyle=dashes)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        ax.set_title(TITLES[name])
        text = "\n".join(f"{form}: a = {_with_interval(loss['fits'][form]['a'])}, b = "
                         f"{_with_interval(loss['fits'][form]['b'])}" for form in laws.FORMS)
        ax.text(0.02, 0.02, text, transform=ax.transAxes, fontsize=8, color=FAINT)
        ax.grid(color=GRID)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low - 0.1 * (high - low), high)  # room for the numbers
    axes[0, 0].set_xlim(-0.03 * reach, 1.14 * reach)
    for ax, of in ends:
        _label_ends(ax, of)
    handles = [_line(color=INK, linewidth=1.5, linestyle=dashes) for dashes in FORM_DASHES.values()]
    handles += [_line(color=COLOURS[2], linewidth=2.4), _line(color=COLOURS[2], linewidth=0.7, alpha=0.5)]
    said = ["law  d (a − b log d)", "quadratic  d (a − b d)", f"mean of {len(record['seeds'])} seeds", "one seed"]
    figure.legend(handles, said, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("d = √KL(policy ‖ reference), √nats", fontsize=10)
    figure.supylabel("gold reward above the reference's, standard deviations", fontsize=10)
    return figure


def _peaks(record: dict[str, Any]) -> Figure:
    """The highest gold reward of each run and the KL there: a dot a seed (hollow: at the last step), a bar the mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = axes = figure.subplots(2, 1, sharex=True)
    places, names = [], []
    for i, (name, loss) in enumerate(record["summary"].items()):
        for j, (beta, colour) in enumerate(zip(loss["beta"], COLOURS)):
            x, curves = i * (len(loss["beta"]) + 1) + j, [of[name][beta] for of in record["results"].values()]
            places, names = [*places, x], [*names, beta]
            for k, curve in enumerate(curves):
                best, beside = peak(curve), x + 0.5 * ((k + 0.5) / len(curves) - 0.5)
                face = "white" if best["at"] == len(curve["gold"]) - 1 else colour
                for ax, key in zip(axes, ("gold", "kl")):
                    ax.plot(beside, best[key], "o", color=colour, markerfacecolor=face, markersize=5)
            for ax, key in zip(axes, ("gold", "kl")):
                mean = statistics.fmean(peak(curve)[key] for curve in curves)
                ax.plot([x - 0.38, x + 0.38], [mean, mean], color=colour, linewidth=2.2)
        middle = i * (len(loss["beta"]) + 1) + (len(loss["beta"]) - 1) / 2
        above.annotate(TITLES[name], (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontweight="bold")
    below.set_xticks(places, names)
    below.set_xlabel("β")
    above.set_ylabel("peak gold reward\n(above the reference's, sd)")
    below.set_ylabel("KL at the peak, nats")
    below.set_yscale("log")
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    below.yaxis.set_minor_locator(NullLocator())
    above.set_ylim(bottom=0)
    said = "a dot is a seed, hollow where the peak is the last step; a bar is their mean"
    figure.supxlabel(said, fontsize=9, color=FAINT)
    for ax in axes:
        ax.grid(axis="y", color=GRID)
        ax.tick_params(axis="x", length=0)
    return figure


def _line(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the ends of curves, on a white halo; beside, above or below, wherever no other name or end is."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    (left, right), (bottom, top), (wide, high) = ax.get_xlim(), ax.get_ylim(), (310, 240)  # points, about
    at = [(wide * (x - left) / (right - left), high * (y - bottom) / (top - bottom)) for x, y, *_ in ends]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in at]
    for (x, y, text, colour), (px, py) in zip(ends, at):
        width, places = 6.2 * len(text), []
        for dx, dy in ((8, 0), (-width / 2, 13), (-width / 2, -13), (8, 13), (8, -13), (-width / 2, 26), (0, -26)):
            box = (px + dx, py + dy - 6, px + dx + width, py + dy + 6)
            crossed = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            places.append((crossed, (dx, dy), box))
        _, by, box = min(places, key=lambda place: place[0])  # of equals the first
        taken.append(box)
        ax.annotate(text, (x, y), by, textcoords="offset points", color=colour, va="center", fontweight="bold",
                    path_effects=halo)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
