"""Writes files whole: at every instant a path has its old or its new content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import SaveError, first_line

PARTIAL = ".partial-"  # before the name of a folder or file that is being written, or removed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end: on the disk, at once, or not at all.

    Raises SaveError for what a writer says of a full or failing disk; nothing of the attempt stays.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: how their writers report a full disk
        raise SaveError(f"could not write {path}: {reason(error, path)}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception, path: Path) -> str:
    """Why writing `path` failed, with the space that is left there."""
    free = shutil.disk_usage(_existing(path)).free
    return f"{getattr(error, 'strerror', None) or first_line(error)} ({free / 2**20:,.0f} MiB free on that disk)"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
