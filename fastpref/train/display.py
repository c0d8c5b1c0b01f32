"""What a run shows while it runs: a progress bar in a terminal, plain lines elsewhere; and the table at its end."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fastpref.report.metrics import metric, without_ties

Tick = Callable[[int, int], None]  # (done, of): called between forward passes; may raise to stop


def quiet_imports() -> None:
    """transformers imports torchao, which tells of parts it cannot load, peft asks transformers by an old name: lines
    that no user can do anything about."""
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


# in the progress line
SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "margin", "accuracy", "tokens_per_s", "mfu",
         "scored_tokens_per_s", "saved_tokens_per_s")
# in the table at the end, and in a line
ROWS = ("exact_match", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "mean_reward", "logps/chosen",
        "logps/rejected", "watch/chosen_change", "watch/chosen_fell", "watch/length_correlation", "watch/kl",
        "kl", "loss")


FIRST = ("exact_match", "loss", "rewards/accuracies", "accuracy", "rewards/margins", "margin", "watch/kl",
         "watch/chosen_change")  # of ROWS, where there is no room for all
STYLES = {"worked": "green", "over-optimised": "yellow", "nothing": "cyan", "broken": "red"}


def number(name: str, value: float, digits: int = 4) -> str:
    unit = metric(name).unit
    if unit == "share":
        return f"{100 * value:.{max(digits - 3, 0)}f} %"
    if unit in ("tokens/s", "MiB"):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _line(keys: Sequence[str], values: Mapping[str, float], digits: int = 4) -> list[str]:
    values = without_ties(values)
    return [f"{metric(key).short} {number(key, values[key], digits)}" for key in keys
            if key in values and (values[key] or key != "saved_tokens_per_s")]


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


EVERY = 10.0  # seconds between two lines of a pass over data


class Display:
    """One console. Steps are a bar in a terminal; in a pipe or a file they are the logged lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.progress: Progress | None = None

    def say(self, text: str, style: str = "") -> None:
        """One line, never broken at the console's width: in a pipe other programs read it."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def values(self, head: str, values: Mapping[str, float], style: str = "") -> None:
        """A line of metrics; in a terminal as many of them as it is wide, those first that say most."""
        parts = {key: part for key in ROWS if key in values for part in _line([key], values)}
        if self.console.is_terminal:
            room, kept = self.console.width - len(head), set()
            for key in sorted(parts, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST)):
                room -= len(parts[key]) + 3
                kept |= {key} if room >= 0 else set()
            parts = {key: part for key, part in parts.items() if key in kept}
        self.say(" | ".join([head, *parts.values()]), style)

    def verdict(self, found: Mapping[str, Any]) -> None:
        """`Verdict.content`: its word, the facts, what next."""
        self.console.print(Text(f"verdict {found['kind']}", style=f"bold {STYLES.get(found['kind'], '')}"))
        for text in (*found["because"], f"next: {found['next']}"):
            if self.console.is_terminal:
                self.console.print(Padding(Text(text), (0, 0, 0, 2)))
            else:
                self.say(f"  {text}")

    @contextmanager
    def steps(self, name: str, done: int, total: int) -> Iterator[StepBar]:
        """Shows the steps of a stage."""
        bar = StepBar(self, name, done, total)
        if not self.console.is_terminal:
            yield bar
            return
        # eta before the values: on a narrow terminal it is their end that is cut off
        bar_width = max(10, min(40, self.console.width - 95))
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width), _Count(), _Eta(), _Values())
        with Progress(*columns, console=self.console) as self.progress:
            bar.task = self.progress.add_task(escape(name), total=total, completed=done, values={})
            try:
                yield bar
            finally:
                self.progress = None

    @contextmanager
    def counting(self, what: str) -> Iterator[Any]:
        """Shows a pass over data; what it gives is called with (done, of). In a pipe or a file: a line every ten
        seconds."""
        if not self.console.is_terminal:
            begun = said = time.monotonic()

            def line(done: int, of: int | None) -> None:
                nonlocal said
                now = time.monotonic()
                if now - said >= EVERY:
                    said = now
                    share = f"{done:,} of {of:,}" if of else f"{done:,}"
                    eta = f" | eta {duration((now - begun) / done * (of - done))}" if of and done else ""
                    self.say(f"{what}: {share} in {duration(now - begun)}{eta}")

            yield line
            return
        own = self.progress is None
        progress = self.progress or Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), _Count(), _Eta(), console=self.console,
            transient=True
        )
        task = progress.add_task(escape(what), total=None, values={})
        if own:
            progress.start()
        try:
            yield lambda done, of: progress.update(task, completed=done, total=of)
        finally:
            progress.remove_task(task)
            if own:
                progress.stop()


class StepBar:
    def __init__(self, display: Display, name: str, done: int, total: int) -> None:
        self.display, self.name, self.total = display, name, total
        self.started, self.first = time.monotonic(), done
        self.task: TaskID | None = None

    def advance(self, step: int) -> None:
        if self.task is not None and self.display.progress is not None:
            self.display.progress.update(self.task, completed=step)

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        if self.task is not None and self.display.progress is not None:
            self.display.progress.update(self.task, completed=step, values=values)
            return
        left = (time.monotonic() - self.started) / max(step - self.first, 1) * (self.total - step)
        parts = " | ".join(_line(SHOWN, values))
        self.display.say(f"{self.name} {step}/{self.total} | {parts} | eta {duration(left)}")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{int(task.completed):,}" if task.completed else "")
        return Text(f"{int(task.completed)}/{int(task.total)}")


class _Values(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("  ".join(_line(SHOWN, task.fields["values"], 3)), no_wrap=True, overflow="ellipsis")


class _Eta(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"eta {duration(left)}", style="dim")


def samples_line(values: Mapping[str, float]) -> str:
    """Of fresh samples: their KL by both estimators, their reward, and what they cost."""
    parts = [f"kl {_with_error('kl_k3', values)} (k3), {_with_error('kl_k1', values)} (k1)"]
    if "reward" in values:
        parts.append(f"reward {_with_error('reward', values)}")
    if values.get("not_scored"):
        parts.append(f"{values['not_scored']:.0f} not scored")
    share = f", {100 * values['time_share']:.0f} % of the training time" if "time_share" in values else ""
    return " | ".join([*parts, f"{values['seconds']:.1f} s{share}"])


def _with_error(name: str, values: Mapping[str, float]) -> str:
    error = values.get(f"{name}_error")
    return f"{values[name]:.3g}" + ("" if error is None else f" ± {error:.2g}")


def evaluation_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Held-out metrics, one column each."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("held-out")
    for name in columns:
        table.add_column(escape(name), justify="right")
    for key in ROWS:
        if any(key in values for values in columns.values()):
            cells = (_cell(key, values) for values in columns.values())
            about = metric(key)
            table.add_row(f"{about.name}, {about.unit}" if about.unit == "nats" else about.name, *cells)
    return table


def _cell(key: str, values: Mapping[str, float]) -> str:
    if values.get(key) is None:
        return ""
    return number(key, values[key]) if key in without_ties(values) else "all tied"
