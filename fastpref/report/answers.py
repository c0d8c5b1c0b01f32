"""Answers of several models to the same prompts, side by side, as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastpref.files import write_text

from .render import render


def write_answers(path: Path, names: Sequence[str], prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    """answers: of each name, one a prompt."""
    rows = list(zip(prompts, zip(*answers, strict=True), strict=True))
    write_text(path, render("answers.html", title=" beside ".join(names), names=names, rows=rows))
