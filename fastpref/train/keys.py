"""What a key of a configuration is: one declaration, from which its checks, `--help` and the docs' tables are made.

    save_steps: int = key(500, "0: only where a stage ends, and when stopped", "at least 0", FREE)
"""

from __future__ import annotations

import collections.abc
import datetime
import difflib
import functools
import json
import math
import shutil
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fastpref.errors import UserError

from .aliases import ALIASES, hint


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


# Rules of a key. A bound is what an error says that the key takes; None is always taken.
BOUNDS: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda value: 0 <= value < math.inf,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: value > 0,
    "above 0, at most 1": lambda value: 0 < value <= 1,
    "0 to 1": lambda value: 0 <= value <= 1,
    "0 to below 1": lambda value: 0 <= value < 1,
    "-1 or at least 1": lambda value: value == -1 or value >= 1,
    "a date as 2026-01-31": _is_date,
    "tensorboard, wandb or none": lambda value: value in ("tensorboard", "wandb"),
}
RUN = "the same for the whole run"  # a stage cannot have it for itself: there is one model and one output folder
COMMON = "common"  # `fastpref train --help` names it
FREE = "changes no weight"  # so it may differ between a checkpoint and the run that goes on from it


class Key(NamedTuple):
    name: str
    kind: Any  # the type of its values
    default: Any  # MISSING: required
    meaning: str
    rules: tuple[str, ...]  # bounds, RUN, FREE, COMMON
    section: str  # title of the table it stands in

    @property
    def bound(self) -> str | None:
        return next((rule for rule in self.rules if rule in BOUNDS), None)

    @property
    def takes(self) -> str:
        """For people: `whole number, at least 1`."""
        kind = words(self.kind)
        return kind if self.bound is None else f"{kind}, {self.bound}" if "number" in kind else self.bound

    @property
    def shown(self) -> str:
        """The default as a file says it."""
        if self.default is MISSING:
            return "required"
        if self.default in (None, (), {}):
            return "none"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def key(default: Any, meaning: str, *rules: str, section: str = "") -> Any:
    """A dataclass field that is a key; `section` begins a table, of this key and those after it."""
    if unknown := set(rules) - {*BOUNDS, RUN, FREE, COMMON}:
        raise TypeError(f"rules of a key: got {unknown}")
    described = {"key": (meaning, rules, section)}
    given: dict[str, Any] = {"default_factory": dict} if default == {} else {"default": default}
    return field(**given, metadata=described)


@functools.cache
def keys_of(config: Any) -> dict[str, Key]:
    """The keys of a dataclass, by name, as it declares them."""
    hints, found, title = get_type_hints(config), {}, ""
    for each in fields(config):
        if "key" in each.metadata:
            meaning, rules, section = each.metadata["key"]
            title = section or title
            default = each.default if each.default_factory is MISSING else each.default_factory()
            found[each.name] = Key(each.name, hints[each.name], default, meaning, rules, title)
    return found


def check_bounds(config: Any, prefix: str = "") -> None:
    for name, described in keys_of(config.__class__).items():
        value = getattr(config, name)
        for part in value if isinstance(value, tuple) else () if value is None else (value,):
            if described.bound and not BOUNDS[described.bound](part):
                raise UserError(f"{prefix}{name} is {part!r}; it takes {described.bound}")


def no_such_key(name: str, prefix: str, known: Iterable[str]) -> UserError:
    said = hint(str(name))
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    if said is None and near:
        said = f"the nearest is {near[0]}"
    return UserError(f"{prefix}{name}: no such key; {said or '`fastpref keys` lists them all'}")


def words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return words(args[0])
    if origin is Literal:
        return " / ".join(args)
    if origin is tuple:
        return "list of names" if args[0] is str else "list of sections"
    if origin is collections.abc.Mapping:
        return "keys and values"
    return {Any: "data", str: "text", int: "whole number", float: "number", bool: "true / false"}[kind]


def help_text(keys: Iterable[Key], prefix: str = "") -> str:
    """Keys for a terminal, a paragraph a section: name, default, meaning, what it takes."""
    lines: list[str] = []
    section, wrap = None, textwrap.TextWrapper(
        min(100, shutil.get_terminal_size().columns), subsequent_indent="      ", break_on_hyphens=False)
    for about in keys:
        if about.section != section:
            lines += ["", *wrap.wrap(about.section)]
            section = about.section
        lines += wrap.wrap(f"  {prefix}{about.name} [{about.shown}] {about.meaning} ({about.takes})")
    return "\n".join(lines[1:])


def matching(keys: Iterable[Key], word: str) -> list[Key]:
    """Those that have the word in their name or meaning, or that others call so."""
    wanted = word.lower().replace("-", "_")
    return [about for about in keys
            if about.name == ALIASES.get(wanted) or wanted in f"{about.name} {about.meaning}".lower()]


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`. YAML reads 1e-6 (no dot) as a string, so strings that are numbers pass for numbers."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None or (value in ("none", "null") and args[0] is not str):
            return None
        return convert(key, value, args[0])
    if origin is Literal:
        return _choice(key, value, args)
    if origin is tuple:
        return _names(key, value)
    if origin is collections.abc.Mapping:
        return _mapping(key, value)
    if kind is str and isinstance(value, datetime.date):  # as YAML reads 2026-01-31
        return value.isoformat()
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and (number := _number(value)) is not None and number == kind(number):
        return kind(number)
    takes = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{key} is {value!r}; it takes {takes}")


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    if isinstance(value, bool) and {"none", "full"} <= set(choices):  # gradient_checkpointing, as TRL has it
        value = "full" if value else "none"
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"{key} is {value!r}{hint}; it takes {', '.join(choices)}")


def _names(key: str, value: Any) -> tuple[str, ...]:
    if value is None or value == "none" or value == ["none"]:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{key} is {value!r}; it takes a name or a list of names")
    return tuple(items)


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{key} is {value!r}, which is not valid JSON ({error.msg})") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{key} is {value!r}; it takes keys and values")
    return dict(value)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None
