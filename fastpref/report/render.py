"""Templates -> markup: pages, charts and their style are in templates/, and what Python hands over is escaped there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .metrics import number, percent


def clip(text: object, most: int) -> str:
    """Cut with a note where it is longer than `most` characters."""
    text = str(text)
    return text[:most] + (f" … ({len(text) - most:,} more characters)" if len(text) > most else "")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
)
_TEMPLATES.filters |= {
    "number": number, "percent": percent, "count": "{:,}".format, "px": "{:.1f}".format, "clip": clip
}


def render(template: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(template).render(values))
