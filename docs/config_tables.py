"""Writes the tables of docs/training.md, docs/rounds.md and docs/watch.md from the code: every key of a configuration
file, every loss and its options, every metric.

    python docs/config_tables.py            rewrites what stands between the markers of the pages
    python docs/config_tables.py --check    exits with 1 where that would change them

What a key means and takes stands in its declaration in fastpref/train/config.py (rounds/config.py).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

import page_tables  # noqa: E402

from fastpref.data import records_from_rows
from fastpref.report.metrics import METRICS, SAMPLES
from fastpref.report.verdict import ROWS
from fastpref.rounds.config import RoundsConfig
from fastpref.train import config, preview
from fastpref.train.keys import keys_of

_with_tables = functools.partial(page_tables.with_tables, "config_tables.py")
PAGE, ROUNDS, WATCH = (Path(__file__).with_name(name) for name in ("training.md", "rounds.md", "watch.md"))


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def config_tables(cls: type = config.TrainConfig) -> str:
    parts: list[str] = []
    for section, found in itertools.groupby(keys_of(cls).values(), lambda key: key.section):
        parts += [f"### {section[0].upper()}{section[1:]}", "", "| key | takes | default | |", "|---|---|---|---|"]
        for key in found:
            default = key.shown if key.default in (None, (), {}, dataclasses.MISSING) else f"`{key.shown}`"
            parts.append(f"| `{key.name}` | {escaped(key.takes)} | {default} | {escaped(key.meaning)} |")
        parts.append("")
    return "\n".join(parts)


def plain(value: object) -> str:
    return "none" if value is None else str(value)


def loss_table() -> str:
    lines = ["| `loss` | formula | data | reference | options and defaults |", "|---|---|---|---|---|"]
    for name, cls in sorted(config.loss_classes().items()):
        loss = cls()
        options = ", ".join(f"`{f.name}={plain(getattr(loss, f.name))}`" for f in dataclasses.fields(cls)) or "none"
        data = "labelled" if loss.needs_desirable else "pairs" if loss.pairwise else "completions"
        formula = escaped(cls.formula)
        paper = re.search(r"\d{4}\.\d{5}", cls.paper)
        title = f"[`{name}`](https://arxiv.org/abs/{paper[0]})" if paper else f"`{name}`"
        lines.append(f"| {title} | {formula} | {data} | {'yes' if loss.needs_reference else 'no'} | {options} |")
    return "\n".join([*lines, ""])


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK = [said("user", "2+2?")]
HH = "\n\nHuman: 2+2?\n\nAssistant:"
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "a pair of strings": ("pair", {"prompt": "2+2 =", "chosen": " 4", "rejected": " 5"}),
    "a pair with its prompt in both responses": ("pair", {"chosen": "2+2 = 4", "rejected": "2+2 = 5"}),
    "a labelled completion": ("kto", {"prompt": "2+2 =", "completion": " 4", "label": True}),
    "a prompt and its completion": ("sft", {"prompt": "2+2 =", "completion": " 4"}),
    "messages": ("pair", {"prompt": ASK, "chosen": [said("assistant", "4")], "rejected": [said("assistant", "5")]}),
    "several turns": ("pair", {"prompt": ASK, "rejected": [said("assistant", "5")], "chosen": [
        said("assistant", "4"), said("user", "so?"), said("assistant", "yes")]}),
    "a begun turn": ("pair", {"prompt": [*ASK, said("assistant", "It is")], "chosen": [said("assistant", " 4")],
                              "rejected": [said("assistant", " 5")]}),
    "a conversation in HH's form": ("pair", {"chosen": f"{HH} 4\n\nHuman: so?\n\nAssistant: yes",
                                             "rejected": f"{HH} 5"}),
}


def examples_text() -> str:
    """What `fastpref preview` shows of one record a format, under the tokenizer of examples/model."""
    tokenizer = AutoTokenizer.from_pretrained(PAGE.parents[1] / "examples" / "model")
    tokenizer.chat_template = CHAT
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for name, (kind, row) in EXAMPLES.items():
        (record,) = records_from_rows([row])
        preview.show_record(console, dataclasses.replace(record, source=name), tokenizer, kind)
    lines = (line.rstrip() for line in console.file.getvalue().strip().splitlines())
    return "\n".join(["```text", *lines, "```", ""])


def metric_table(keys: Iterable[str] = METRICS) -> str:
    lines = ["| metric | unit | better | what it is |", "|---|---|---|---|"]
    found = [(key, METRICS[key]) for key in keys]
    lines += [f"| `{key}` | {about.unit} | {about.better} | {escaped(about.what)} |" for key, about in found]
    return "\n".join([*lines, ""])


def row_table() -> str:
    """What to do about what is seen; a verdict links to the rows."""
    lines = ["| what you see | what it means | what helps |", "|---|---|---|"]
    lines += [f'| <a id="{name}"></a>{" | ".join(cells)} |' for name, cells in ROWS.items()]
    return "\n".join([*lines, ""])


def written(page: str) -> str:
    """The page on training with its tables as the code has them now."""
    return _with_tables(page, {"examples": examples_text(), "config": config_tables(), "losses": loss_table(),
                               "metrics": metric_table()})


def written_rounds(page: str) -> str:
    return _with_tables(page, {"rounds": config_tables(RoundsConfig)})


def written_watch(page: str) -> str:
    always = ("logps/chosen", "logps/rejected", "rewards/accuracies", "rewards/margins",
              *(key for key in METRICS if key.startswith("watch/")))
    return _with_tables(page, {"watch": metric_table(always), "samples": metric_table(["kl", *SAMPLES]),
                               "rows": row_table()})


if __name__ == "__main__":
    page_tables.rewrite("config_tables.py", {PAGE: written, ROUNDS: written_rounds, WATCH: written_watch})
