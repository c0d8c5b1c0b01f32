"""What the rounds made of SmolLM2: constraints kept before and after, and whether the model is still the model it was.

    python -m examples.smollm2.report [runs/smollm2/rounds] [--prompts 3] [--questions 20]

Both models answer every held-out prompt once, drawn with the same seeds and settings as in the rounds, and 100 other
questions greedily. It prints, and writes to report.json and report.png in the folder of the run:

    satisfaction   by kind, with 95 % intervals (Wilson's; of the difference: normal, paired by prompt)
    KL             nats a response of KL(after || before), from the answers after
    perplexity     of each model's greedy answers under the first model
    share of empty and repeating answers
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fastpref.data import Example, collate
from fastpref.rounds.config import Config, config_from
from fastpref.train.display import quiet_imports
from fastpref.train.model import Policy, load_policy, load_tokenizer, pad_token
from fastpref.train.sample import Sample, Sampling, sample

from .make_prompts import DATA, KINDS, NEW_KINDS
from .verifier import meets, repeats

SEED, GREEDY_TOKENS, BATCH = 141, 96, 16
Z = 1.96


def read(name: str, most: int | None = None) -> list[dict[str, Any]]:
    """Records of a file, of each kind at most so many."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record.get("kind", ""), []).append(record)
    return [record for records in found.values() for record in records[:most]]


def prompt_ids(tokenizer: Any, records: Sequence[dict[str, Any]]) -> list[list[int]]:
    chats = [record["prompt"] for record in records]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]


def answers(policy: Policy, tokenizer: Any, ids: Sequence[list[int]], settings: Sampling) -> list[Sample]:
    found = {i: samples[0] for i, samples in sample(policy, tokenizer, ids, settings)}
    return [found[i] for i in range(len(ids))]


def logps(policy: Policy, tokenizer: Any, ids: Sequence[list[int]], samples: Sequence[Sample]) -> list[float]:
    """Of each response, nats."""
    examples = [Example(i, prompt, (s.ids,)) for i, (prompt, s) in enumerate(zip(ids, samples, strict=True))]
    layout = "packed" if policy.layout == "shared" else policy.layout
    found: list[float] = []
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH], pad_token(tokenizer), "sft", layout=layout)
        found += policy.sequence_logps(batch.to(policy.device)).tolist()
    return found


# ---- numbers ----


def wilson(count: int, n: int) -> tuple[float, float]:
    share, z2 = count / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - half, middle + half


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    half = Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), half


def satisfaction(
    records: Sequence[dict[str, Any]], before: Sequence[Sample], after: Sequence[Sample]
) -> dict[str, dict[str, Any]]:
    """By kind, and over all kinds that were trained, and all that were not."""
    met = [[meets(r["kind"], r["argument"], s.text) for r, s in zip(records, samples)] for samples in (before, after)]
    found = {}
    groups = {kind: {kind} for kind in KINDS} | {"trained kinds": KINDS.keys() - set(NEW_KINDS)}
    for name, kinds in (groups | {"held-out kinds": set(NEW_KINDS)}).items():
        index = [i for i, record in enumerate(records) if record["kind"] in kinds]
        counts = [sum(of_model[i] for i in index) for of_model in met]
        change, half = mean_and_half([met[1][i] - met[0][i] for i in index])
        found[name] = {"prompts": len(index), "change": change, "half": half} | {
            when: {"share": count / len(index), "interval": wilson(count, len(index))}
            for when, count in zip(("before", "after"), counts)
        }
    return found


def kl(after: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """Log-probs of the answers after, under both models: the plain estimate, and the one that is never negative."""
    ratios = [b - a for a, b in zip(after, before, strict=True)]
    mean, half = mean_and_half([-r for r in ratios])
    k3 = statistics.fmean(math.expm1(min(r, 80.0)) - r for r in ratios)
    return {"nats_per_response": mean, "half": half, "k3": k3}


def soundness(samples: Sequence[Sample]) -> dict[str, float]:
    n = len(samples)
    return {
        "empty": sum(not s.text.strip() for s in samples) / n, "repeating": sum(repeats(s.text) for s in samples) / n,
        "cut": sum(not s.ended for s in samples) / n, "tokens": statistics.fmean(len(s.ids) for s in samples),
    }


def perplexity(logps: Sequence[float], samples: Sequence[Sample]) -> float:
    return math.exp(-sum(logps) / sum(len(s.ids) for s in samples))


# ---- the run ----


def measure(
    config: Config, model: Path, most: int | None = None, questions: int | None = None, seed: int = SEED
) -> dict[str, Any]:
    """Of the model of `config` and what it became; at most so many prompts a kind, and questions."""
    train = replace(config.train, init_from_config=False)
    tokenizer = load_tokenizer(train)
    held_out, asked = read("heldout", most), read("questions")[:questions]
    ids, asked_ids = prompt_ids(tokenizer, held_out), prompt_ids(tokenizer, asked)
    rounds = config.rounds
    drawn = Sampling(temperature=rounds.temperature, top_p=rounds.top_p, max_new_tokens=rounds.max_new_tokens,
                     batch_size=rounds.generation_batch_size, seed=seed)
    greedy = replace(drawn, temperature=0.0, top_p=1.0, max_new_tokens=GREEDY_TOKENS)
    after_policy = load_policy(train, tokenizer, model)
    after, greedy_after = (answers(after_policy, tokenizer, *part) for part in ((ids, drawn), (asked_ids, greedy)))
    under_after = logps(after_policy, tokenizer, ids, after)
    del after_policy
    policy = load_policy(train, tokenizer)
    before, greedy_before = (answers(policy, tokenizer, *part) for part in ((ids, drawn), (asked_ids, greedy)))
    under_before = logps(policy, tokenizer, ids, after)
    ppl = {when: perplexity(logps(policy, tokenizer, asked_ids, samples), samples)
           for when, samples in (("before", greedy_before), ("after", greedy_after))}
    return {
        "satisfaction": satisfaction(held_out, before, after), "kl": kl(under_after, under_before),
        "perplexity_under_start": ppl,
        "held_out_answers": {"before": soundness(before), "after": soundness(after)},
        "greedy_answers": {"before": soundness(greedy_before), "after": soundness(greedy_after)},
        "examples": [
            {"prompt": held_out[i]["prompt"][-1]["content"], "before": before[i].text, "after": after[i].text}
            for i in range(0, len(held_out), 20)
        ],
    }


def text(found: dict[str, Any]) -> str:
    lines = ["| constraint | prompts | before | after | change |", "|---|---|---|---|---|"]
    for name, row in found["satisfaction"].items():
        cells = [f"{row[w]['share']:.0%} ({row[w]['interval'][0]:.0%}-{row[w]['interval'][1]:.0%})"
                 for w in ("before", "after")]
        new = " (held out)" if name in NEW_KINDS else ""
        lines.append(f"| {name}{new} | {row['prompts']} | {' | '.join(cells)} | "
                     f"{100 * row['change']:+.0f} ± {100 * row['half']:.0f} points |")
    nats, ppl = found["kl"], found["perplexity_under_start"]
    lines += ["", f"KL(after || before): {nats['nats_per_response']:.2f} ± {nats['half']:.2f} nats a response",
              f"perplexity of greedy answers under the first model: {ppl['before']:.2f} -> {ppl['after']:.2f}"]
    for what in ("held_out_answers", "greedy_answers"):
        b, a = found[what]["before"], found[what]["after"]
        lines.append(f"{what.replace('_', ' ')}: " + ", ".join(f"{k} {b[k]:.1%} -> {a[k]:.1%}" for k in
                     ("empty", "repeating", "cut")) + f", tokens {b['tokens']:.0f} -> {a['tokens']:.0f}")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(found["satisfaction"].items())[::-1]
    figure, axes = plt.subplots(figsize=(7, 7), layout="constrained")
    for offset, when, colour in ((0.15, "before", "#999999"), (-0.15, "after", "#0072b2")):
        shares = [row[when]["share"] for _, row in rows]
        errors = [[abs(s - row[when]["interval"][side]) for s, (_, row) in zip(shares, rows)] for side in (0, 1)]
        axes.errorbar(shares, [i + offset for i in range(len(rows))], xerr=errors, fmt="o", color=colour, label=when)
    axes.set_yticks(range(len(rows)), [name + " *" * (name in NEW_KINDS) for name, _ in rows])
    axes.set(xlim=(-0.02, 1.02), xlabel="share of held-out prompts whose constraint is met (* never trained)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/smollm2/rounds"))
    parser.add_argument("--prompts", type=int, help="of each kind; default: all")
    parser.add_argument("--questions", type=int, help="default: all")
    options = parser.parse_args(arguments)
    quiet_imports()
    try:
        summary = json.loads((options.run / "summary.json").read_text(encoding="utf-8"))
    except OSError:
        raise SystemExit(f"smollm2: {options.run} holds no finished rounds: `make smollm2` runs them") from None
    config = config_from(yaml.safe_load((options.run / "config.yaml").read_text(encoding="utf-8")))
    found = measure(config, options.run / summary["model"], options.prompts, options.questions)
    (options.run / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, options.run / "report.png")
    print(text(found), f"\n{options.run / 'report.json'}, {options.run / 'report.png'}")


if __name__ == "__main__":
    main()
