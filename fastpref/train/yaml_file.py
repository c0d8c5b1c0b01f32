"""A configuration file as written: YAML, with `key=value` overrides applied. What its keys mean stands in config.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastpref.errors import UserError


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice: YAML itself takes the last without a word."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (key.tag, str(key.value)) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise _Twice(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file says, with overrides applied; names and types are not checked yet. Errors as `load_config`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be read") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        what = problem if isinstance(error, _Twice) else f"not valid YAML ({problem})"
        raise UserError(f"{path}{where}: {what}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__ if values else 'an empty file'}")
    for override in overrides:
        _apply(values, override)
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """`a.b=value` into nested mappings and lists; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key=value")
    try:
        value = yaml.load(text, _Loader)
    except _Twice as error:
        raise UserError(f"{override!r}: {error.problem}") from None
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    here: Any = values
    for i, part in enumerate(path):
        done = ".".join(path[: i + 1])
        if isinstance(here, list):
            here = here[_place(here, part, done)]
        elif isinstance(here, dict):
            if part == "stages" and not here.get(part):
                raise UserError(f"{key}: the configuration has no stages")
            here = here.setdefault(part, {})
        if not isinstance(here, (dict, list)):
            raise UserError(f"{key}: {done} is {here!r}, not a section")
    if isinstance(here, list):
        here[_place(here, last, key)] = value
        return
    stages = values.get("stages")
    if here is values and isinstance(stages, list) and stages and last != "stages":
        if all(isinstance(stage, dict) and last in stage for stage in stages):
            name = stages[-1].get("name", len(stages) - 1)
            raise UserError(f"{override}: every stage sets its own {last}; say which: stages.{name}.{override}")
    here[last] = value


def _place(items: list[Any], part: str, key: str) -> int:
    names = [str(item.get("name") or item.get("loss")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise UserError(f"{key}: no such entry; there are {', '.join(map(str, names))} (0 to {len(items) - 1})")
