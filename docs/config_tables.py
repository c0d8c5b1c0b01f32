"""Writes the tables of docs/training.md, docs/rounds.md and docs/watch.md from the code: every key of a configuration
file, every loss and its options, every metric.

    python docs/config_tables.py            rewrites what stands between the markers of the pages
    python docs/config_tables.py --check    exits with 1 where that would change them

A key's meaning is the comment beside its field in fastpref/train/config.py (rounds/config.py), a table's title the
comment above it.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from transformers import AutoTokenizer

from fastpref import losses
from fastpref.data import records_from_rows
from fastpref.report.metrics import METRICS, SAMPLES
from fastpref.rounds.config import RoundsConfig
from fastpref.rounds.pairing import Pairing
from fastpref.train import config, preview
from fastpref.train.vllm_engine import EngineName

PAGE, ROUNDS, WATCH = (Path(__file__).with_name(name) for name in ("training.md", "rounds.md", "watch.md"))
FIELD = re.compile(r"    (?P<name>\w+): (?P<type>[^=#]+?)(?: = (?P<default>.+?))?(?:  # (?P<comment>.*))?$")
COMMENT = re.compile(r"    # (.*)$")


def sections(cls: type) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """(title, [(key, type, default, meaning)]) in the order of the source. A field without a section joins the last."""
    source = inspect.getsource(cls).partition('"""')[2].partition('"""')[2]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    found: list[tuple[str, list[tuple[str, str, str, str]]]] = []
    pending: list[str] = []  # comment lines that stand alone, above what they belong to
    blank = True
    for line in source.partition("    def ")[0].splitlines():
        comment, field = COMMENT.match(line), FIELD.match(line)
        if not line.strip():
            blank = True
        elif comment:
            pending.append(comment[1])
        elif field and field["name"] in fields:
            if blank and pending:
                found.append((pending.pop(0), []))
            elif not found:
                found.append(("run", []))
            name, kind = field["name"], field["type"].strip()
            if name not in ("loss_options", "stages"):
                meaning = " ".join([*pending, field["comment"] or ""]).strip()
                found[-1][1].append((name, pretty_type(kind), pretty_default(fields[name]), meaning))
            pending, blank = [], False
    return [section for section in found if section[1]]


def pretty_type(kind: str) -> str:
    kind = re.sub(r"Literal\[(.*)\]", lambda match: match[1].replace('"', "").replace(", ", " / "), kind)
    kind = kind.replace("tuple[str, ...]", "list of names").replace(" | None", "").replace("Any", "data")
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true / false"}
    words |= {"Pairing": " / ".join(get_args(Pairing)), "EngineName": " / ".join(get_args(EngineName))}
    return words.get(kind, kind)


def pretty_default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return f"`{', '.join(field.default)}`" if field.default else "none"
    if field.default is None:
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def config_tables(cls: type = config.TrainConfig) -> str:
    parts = []
    for title, rows in sections(cls):
        parts += [f"### {title[0].upper()}{title[1:]}", "", "| key | takes | default | |", "|---|---|---|---|"]
        parts += [f"| `{key}` | {escaped(kind)} | {default} | {escaped(what)} |" for key, kind, default, what in rows]
        parts.append("")
    return "\n".join(parts)


def loss_classes() -> dict[str, type[losses.Loss]]:
    """What a configuration may name."""
    return dict(sorted(config._loss_classes().items()))


def plain(value: object) -> str:
    return "none" if value is None else str(value)


def loss_table() -> str:
    lines = ["| `loss` | formula | data | reference | options and defaults |", "|---|---|---|---|---|"]
    for name, cls in loss_classes().items():
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


def written(page: str) -> str:
    """The page on training with its tables as the code has them now."""
    return _with_tables(page, {"examples": examples_text(), "config": config_tables(), "losses": loss_table(),
                               "metrics": metric_table()})


def written_rounds(page: str) -> str:
    return _with_tables(page, {"rounds": config_tables(RoundsConfig)})


def written_watch(page: str) -> str:
    always = ("logps/chosen", "logps/rejected", "rewards/accuracies", "rewards/margins", "kl",
              *(key for key in METRICS if key.startswith("watch/")))
    return _with_tables(page, {"watch": metric_table(always), "samples": metric_table(["kl", *SAMPLES])})


def _with_tables(page: str, tables: dict[str, str]) -> str:
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by docs/config_tables.py -->\n", f"<!-- end of {name} -->\n"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"takes exactly one {begin.strip()} and one {end.strip()}")
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    for path, write in ((PAGE, written), (ROUNDS, written_rounds), (WATCH, written_watch)):
        before = path.read_text(encoding="utf-8")
        after = write(before)
        if "--check" not in sys.argv:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{path} differs from the code: python docs/config_tables.py")
