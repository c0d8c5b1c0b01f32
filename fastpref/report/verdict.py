"""Whether a run worked, went too far, did nothing or broke: one verdict for terminal, report, rounds and summary.json.

`judge` looks at `Evidence` alone. Its rules, the first that holds; docs/watch.md has them in words, ROWS what to do:

    broken          NaN or skipped steps; a loss ten times its start; chosen responses less likely than blind guesses
    over-optimised  what was measured beside the loss (reward, exact match) is below its best or its start; or, where
                    nothing was: the held-out loss past its lowest, chosen log-probs half gone, KL above 1 nat a token
    nothing         neither that nor the loss has moved
    worked          otherwise
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .metrics import number, percent
from .reading import Run, Stage, as_row, is_number

SKIPPED = 0.1  # of all steps, for NaN or infinite gradients
TIMES = 10.0  # its start: a loss that has exploded
BLIND = 12.5  # nats a token: log V of 256k. Less likely than tokens drawn without looking
LOST = 0.1  # of what was won at the best, by which a reward must be below it; and by two standard errors
POINTS = 0.05  # by which an exact match must change: its number of prompts is not known here
PAST = 0.02  # of its way down, by which a loss must be above its lowest
MOVED = 0.01  # of its start, by which a loss must have moved
HALF = 0.5  # of its start, by which the chosen log-prob must fall, and LEAST nats
LEAST = 1.0
FAR = 1.0  # nats of KL a token
KLS = (("sample", "kl", "fresh samples"), ("eval", "watch/kl", "held-out responses"),
       ("train", "watch/kl", "training responses"))  # the best there is first
EXTREMES = ("loss", "rewards/margins", "rewards/accuracies")  # no news, good or bad, where KL or chosen are extreme

# What is seen, what it means, what helps: the table of docs/watch.md, to whose rows a verdict links
ROWS = {
    "broken": ("`loss` or `logps/chosen` beyond all measure, NaN, skipped steps", "the weights are destroyed",
               "start again from the model: a learning rate 10 to 100 times lower, `warmup_ratio: 0.1`, "
               "`max_grad_norm: 1`"),
    "past-peak": ("`reward` or `exact_match` below its best, `kl` still rising", "over-optimisation, measured",
                  "take the best checkpoint; a larger beta, fewer epochs; `kl_budget` at the peak's KL"),
    "chosen-fell": ("`watch/chosen_fell` near 1, `watch/rejected_change` far below `watch/chosen_change`",
                    "the margin grows by pushing down both sides; probability goes to what no response shows",
                    "an SFT term (`rpo` with a larger `eta`, `iterative_rpo`), warm-starting on the chosen responses, "
                    "lower learning rate"),
    "loss-past": ("held-out `loss` past its lowest", "the training pairs are learnt by heart",
                  "take an earlier checkpoint; fewer epochs, a lower learning rate, more data"),
    "far": ("`watch/kl` above 1 nat a token", "the policy is far from what its data can say anything about",
            "a larger beta, a lower learning rate, `kl_budget`; `sample_steps` and `scorer` to see what it costs"),
    "nothing": ("`loss` where it started, `watch/kl` near 0", "the policy has hardly moved",
                "a higher learning rate (LoRA takes about ten times that of full weights), more steps, a smaller beta"),
    "unmeasured": ("too few lines to compare", "nothing is known", "`eval_dataset` and `eval_steps`"),
    "leaked": ("held-out records among the training ones", "held-out numbers are of what was trained on",
               "another `eval_dataset`; then judge again"),
    "worked": ("`loss` lower, `reward` or `exact_match` not, `watch/kl` moderate", "it did what it was to do",
               "look at its responses; `sample_steps` and a `scorer` measure what the loss does not"),
    "length": ("`watch/length_correlation` far from 0, and more so than the data's own", "the policy learns length",
               "a loss that counts by the token (`simpo`, `dpo_norm`), `rdpo`, other data"),
    "flat": ("`rewards/accuracies` flat on held-out pairs, `watch/kl` rising",
             "nothing more is learnt, the policy drifts", "stop there; `kl_budget`"),
    "endless": ("`ended` falling, `response_length` at its limit", "responses do not end any more",
                "as above; look at the samples"),
    "not-scored": ("`not_scored` above 0", "the scorer fails on some responses; the mean is of the others",
                   "its messages"),
}


@dataclass(frozen=True)
class Gold:
    """Something measured beside the loss, better the larger it is: (step, value, standard error), in order."""

    name: str
    points: Sequence[tuple[float, float, float]]
    show: Callable[[float], str] = number
    least: float = 0.0  # change that counts
    at: str = "step"

    @functools.cached_property
    def steady(self) -> Sequence[tuple[float, float, float]]:
        """Of noisy points running means of a fifth of them: the best of many is the luckiest of them."""
        half = len(self.points) // 10
        if not half or not any(error for _, _, error in self.points):
            return self.points
        found = []
        for i, (step, _, _) in enumerate(self.points):
            near = self.points[max(0, i - half) : i + half + 1]
            error = math.sqrt(sum(error**2 for _, _, error in near)) / len(near)
            found.append((step, sum(value for _, value, _ in near) / len(near), error))
        return found

    def clear(self, a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
        """By how much two of them must differ."""
        return max(2 * math.hypot(a[2], b[2]), self.least)


@dataclass(frozen=True)
class Evidence:
    """What is known of a stage, or of rounds. Losses and log-probs: (step, value) from start to end."""

    golds: Sequence[Gold] = ()
    loss: Sequence[tuple[float, float]] = ()
    of: str = "held-out"  # where loss and log-probs are of
    chosen: tuple[float, float] | None = None  # log-prob at the start and at the end, nats
    kl: float | None = None  # at the end, nats a response
    kl_of: str = "held-out responses"
    tokens: float | None = None  # of a response
    damage: str = ""  # what says that the run broke
    leaked: float = 0.0  # share of held-out records that were trained on
    place: Callable[[float], str] = lambda step: ""  # where the weights of a step are; "" where they are not


@dataclass(frozen=True)
class Verdict:
    kind: str  # worked, over-optimised, nothing, broken
    because: tuple[str, ...]
    row: str  # of ROWS
    first: str = ""  # before what the row says
    extreme: bool = False  # KL or chosen log-probs: loss and margins are then no good news

    @property
    def title(self) -> str:
        return {"nothing": "nothing happened", "broken": "it broke"}.get(self.kind, self.kind)

    @property
    def helps(self) -> str:
        text = ROWS[self.row][2].replace("`", "")
        return f"{self.first}{text[:1].upper() + text[1:]}."

    @property
    def place(self) -> str:
        return f"docs/watch.md#{self.row}"

    def content(self) -> dict[str, Any]:
        """What summary.json has."""
        return {"kind": self.kind, "because": list(self.because), "next": f"{self.helps} ({self.place})"}


# ---- the rules -------------------------------------------------------------------------------------------------------


def judge(seen: Evidence) -> Verdict:
    fell, far = _chosen_fell(seen), _far(seen)
    facts = [_fact_of_kl(seen), _fact_of_chosen(seen)]
    said = functools.partial(_verdict, seen, extreme=bool(fell or far or seen.damage))
    if damage := seen.damage or _exploded(seen):
        return said("broken", "broken", [damage, *facts], extreme=True)
    for gold in seen.golds:
        if lost := _lost(gold):
            best = _best(gold)
            where = seen.place(best[0])
            first = f"Take {where} (step {number(best[0], 8)}). " if where else ""
            row = "chosen-fell" if fell and best is gold.steady[0] else "past-peak"
            return said("over-optimised", row, [lost, *facts], first=first)
    won = [words for gold in seen.golds if (words := _won(gold))]
    past = _past(seen)
    if not won:
        if past:
            return said("over-optimised", "loss-past", [past, *facts])
        if fell:
            return said("over-optimised", "chosen-fell", [fell, *facts])
        if far:
            return said("over-optimised", "far", [far, *facts])
    unmoved = [f"no clear change of {gold.name}: {_ends(gold)}" for gold in seen.golds] if not won else []
    if not (won or _better(seen)):
        row = "nothing" if seen.loss or seen.golds else "unmeasured"
        return said("nothing", row, [*unmoved, _fact_of_loss(seen), *facts])
    return said("worked", "worked", [*won, *unmoved, past or _fact_of_loss(seen), *facts])


def _verdict(seen: Evidence, kind: str, row: str, because: Sequence[str], first: str = "", *, extreme: bool) -> Verdict:
    """The two or three facts that say most; numbers that are not held out are the first of them."""
    found = list(dict.fromkeys(filter(None, because)))[:3]
    if seen.leaked:
        found = [f"{percent(seen.leaked)} of the held-out records are among the training ones", *found[:2]]
        row = row if kind == "broken" else "leaked"
    return Verdict(kind, tuple(found) or ("no two measurements to compare",), row, first, extreme)


def _exploded(seen: Evidence) -> str:
    if len(seen.loss) >= 2 and seen.loss[-1][1] > TIMES * max(abs(seen.loss[0][1]), 0.1):
        return _fact_of_loss(seen)
    if seen.chosen and seen.chosen[1] < -BLIND * (seen.tokens or math.inf) and seen.chosen[1] < seen.chosen[0]:
        return _fact_of_chosen(seen)
    if seen.kl_of == "fresh samples" and (seen.kl or 0) > BLIND * (seen.tokens or math.inf):
        return _fact_of_kl(seen)
    return ""


def _lost(gold: Gold) -> str:
    first, last, best = gold.steady[0], gold.steady[-1], _best(gold)
    if best[1] - last[1] <= max(gold.clear(best, last), LOST * (best[1] - first[1])):
        return ""
    if best is first:
        return f"{gold.name} fell: {_ends(gold)}"
    return (f"{gold.name} was highest at {gold.at} {number(best[0], 8)} ({_shown(gold, best)}) and ended at "
            f"{_shown(gold, last)}")


def _best(gold: Gold) -> tuple[float, float, float]:
    return max(gold.steady, key=lambda point: (point[1], -point[0]))


def _won(gold: Gold) -> str:
    first, last = gold.steady[0], gold.steady[-1]
    if last[1] - first[1] <= gold.clear(first, last):
        return ""
    return f"{gold.name} rose: {_ends(gold)}"


def _past(seen: Evidence) -> str:
    """Of held-out losses: a training loss is no loss of new pairs."""
    if len(seen.loss) < 2 or seen.of != "held-out":
        return ""
    (_, first), (_, last) = seen.loss[0], seen.loss[-1]
    step, lowest = min(seen.loss, key=lambda point: point[1])
    if last <= lowest + PAST * max(abs(lowest), abs(first - lowest)):
        return ""
    return f"held-out loss was lowest at step {number(step, 8)} ({number(lowest)}) and ended at {number(last)}"


def _better(seen: Evidence) -> bool:
    if len(seen.loss) < 2:
        return False
    return seen.loss[0][1] - seen.loss[-1][1] > MOVED * abs(seen.loss[0][1])


def _chosen_fell(seen: Evidence) -> str:
    if not seen.chosen:
        return ""
    start, end = seen.chosen
    return _fact_of_chosen(seen) if start - end > max(HALF * abs(start), LEAST) else ""


def _far(seen: Evidence) -> str:
    return _fact_of_kl(seen) if seen.kl is not None and seen.tokens and seen.kl > FAR * seen.tokens else ""


# ---- in words --------------------------------------------------------------------------------------------------------


def _shown(gold: Gold, point: tuple[float, float, float]) -> str:
    return gold.show(point[1]) + (f" ± {gold.show(point[2])}" if point[2] else "")


def _ends(gold: Gold) -> str:
    return f"{_shown(gold, gold.steady[0])} → {_shown(gold, gold.steady[-1])}"


def _fact_of_loss(seen: Evidence) -> str:
    return f"{seen.of} loss {number(seen.loss[0][1])} → {number(seen.loss[-1][1])}" if len(seen.loss) >= 2 else ""


def _fact_of_chosen(seen: Evidence) -> str:
    if not seen.chosen or abs(seen.chosen[1] - seen.chosen[0]) < 0.01:
        return ""
    start, end = seen.chosen
    return f"chosen log-prob {'fell' if end < start else 'rose'}: {number(start)} → {number(end)} nats a response"


def _fact_of_kl(seen: Evidence) -> str:
    if seen.kl is None:
        return ""
    each = f", {number(seen.kl / seen.tokens)} a token" if seen.tokens else ""
    return f"KL to the reference {number(seen.kl)} nats a response{each} ({seen.kl_of})"


# ---- from the files of a run -----------------------------------------------------------------------------------------


def verdict_of(run: Run) -> Verdict:
    """Of its last stage; of one that broke, if one did."""
    found = [judge(evidence_of(run, stage)) for stage in run.stages]
    broken = [verdict for verdict in found if verdict.kind == "broken"]
    return (broken or found or [judge(Evidence())])[-1]


def evidence_of(run: Run, stage: Stage) -> Evidence:
    loss, of, leaked = stage.series("eval", "loss"), "held-out", stage.history.get("leaked")
    if len(loss) < 2:
        ends, of = stage.ends("loss"), "training"
        loss = [(0, ends[0]), (math.inf, ends[1])] if ends else []
    split = "eval" if stage.series("eval", "watch/chosen_change") else "train"
    chosen, change = stage.series(split, "logps/chosen"), stage.series(split, "watch/chosen_change")
    kls = [(points[-1][1], words, where) for where, key, words in KLS if (points := stage.series(where, key))]
    kl, kl_of, where = kls[0] if kls else (None, "", "train")
    lengths = [y for at in (where, "eval", "train") for _, y in stage.series(at, "response_length")[-1:]]
    return Evidence(
        golds=_golds(stage), loss=loss, of=of,
        chosen=(chosen[-1][1] - change[-1][1], chosen[-1][1]) if chosen and change else None,
        kl=kl, kl_of=kl_of, tokens=lengths[0] if lengths else None, damage=_damage(stage),
        leaked=leaked if is_number(leaked) else 0.0, place=functools.partial(run.place_of, stage),
    )


def _golds(stage: Stage) -> list[Gold]:
    rewards = [(row["step"], row["reward"], row.get("reward_error") or 0.0)
               for row in stage.rows("sample") if is_number(row.get("reward"))]
    matches = [(step, value, 0.0) for step, value in stage.series("eval", "exact_match")]
    found = [Gold("reward of fresh samples", rewards), Gold("exact match", matches, percent, POINTS)]
    return [gold for gold in found if len(gold.points) >= 2]


def _damage(stage: Stage) -> str:
    for split in ("eval", "train"):
        rows = stage.rows(split)
        if rows and "loss" in rows[-1] and rows[-1]["loss"] is None:
            return f"the loss is NaN or infinite at step {number(rows[-1]['step'], 8)}"
    rows = stage.rows("train")
    skipped = rows[-1].get("skipped_steps") if rows else None
    if is_number(skipped) and skipped >= SKIPPED * rows[-1]["step"]:
        return f"{number(skipped)} of {number(rows[-1]['step'], 8)} steps were skipped for NaN or infinite gradients"
    return ""


def verdict_of_rounds(rows: Sequence[Mapping[str, Any]], golds: Sequence[Gold]) -> Verdict:
    """Of what is measured over all rounds; where that is nothing, what the last round's training was judged."""
    judged = [found for row in rows if (found := as_row(as_row(row.get("training")).get("verdict")))]
    damage = next((f"round {row['round']} broke: {found['because'][0]}" for row in rows
                   if (found := as_row(as_row(row.get("training")).get("verdict"))).get("kind") == "broken"), "")
    golds = [gold for gold in golds if len(gold.points) >= 2]
    if not (golds or damage) and judged:
        last = judged[-1]
        row = last["next"].rpartition("#")[2].rstrip(")")
        return Verdict(last["kind"], tuple(last["because"]), row if row in ROWS else "worked")
    kl = as_row(rows[-1].get("after")).get("watch/kl") if rows else None
    verdict = judge(Evidence(golds=golds, kl=kl, damage=damage))
    last_kl = [f"last round: {fact}" for fact in (judged[-1]["because"] if judged and kl is None else ())
               if fact.startswith("KL")]
    return replace(verdict, because=(*verdict.because, *last_kl)[:3])


def link_of(verdict: Verdict, folder: Path) -> str:
    """From a page in `folder` to the row of docs/watch.md, where both lie in one checkout."""
    root, folder = Path(__file__).parents[2], folder.resolve()
    there = (root / "docs" / "watch.md").is_file() and folder.is_relative_to(root)
    return f"{os.path.relpath(root / 'docs', folder)}/watch.md#{verdict.row}" if there else ""
