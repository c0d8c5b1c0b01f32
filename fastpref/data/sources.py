"""Files and data sets -> rows, each with where it was read; one that cannot be read is a ValueError in its place.

    .jsonl .json (a list, or lines), these also as .gz, .bz2, .xz or .zst; .parquet; whatever `datasets` loads

Arrow (Parquet, `datasets`) gives every struct of a column the fields of all of them, null where a row has none: such
nulls are taken out at every depth, so that the rows are those of the same data in JSON lines.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from fastpref.errors import first_line

OTHER_FILES = {".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow", ".xlsx": "", ".xls": "", ".pkl": "",
               ".md": "", ".yaml": "", ".yml": ""}  # and what `datasets` calls them

Rows = Iterator[tuple[str, Any]]


def open_source(source: Any, split: str | None, *, streaming: bool = False) -> tuple[str, Rows]:
    """Its name for messages, and its rows, each with where it was read."""
    stream = {"streaming": True} if streaming else {}
    if isinstance(source, Mapping):
        return str(source.get("path")), _dataset_rows({**source, **stream}, split)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, expected a path, a data set's name, a dict or a list")
    path = Path(source)
    reader = reader_of(path)
    if reader is None:
        if path.suffix.lower() in OTHER_FILES or path.is_file():
            there = "" if path.is_file() else "no such file, and "
            raise ValueError(f"{source}: {there}not one of those that are read by their names, .jsonl, .json, "
                             f".parquet; {_otherwise(path)}")
        if is_path(str(source)) and not path.exists():  # a hub would be asked for it, again and again
            raise ValueError(f"{source}: no such file or folder")
        return str(source), _dataset_rows({"path": str(source), **stream}, split)
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    return str(source), reader(path)


def _otherwise(path: Path) -> str:
    if builder := OTHER_FILES.get(path.suffix.lower()):
        return f"the package datasets reads it as {{path: {builder}, data_files: {path}}}"
    return "write it as one of these"


def is_path(name: str) -> bool:
    """Whether it is one by its looks, and no hub id (owner/name)."""
    return name.startswith((".", "/", "~", "\\")) or name.endswith("/") or name.count("/") > 1


def reader_of(path: Path) -> Callable[[Path], Rows] | None:
    """None: not one of our files."""
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    name = path.name.lower()
    packed = next((ending for ending in _UNPACK if name.endswith(ending)), "")
    reader = readers.get(Path(name.removesuffix(packed)).suffix)
    return None if packed and reader is _parquet_rows else reader


def _unzstd(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"{path}: reading .zst needs pyarrow (pip install pyarrow)") from None
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_UNPACK: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _unzstd}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered; of a compressed file, unpacked as they are asked for."""
    unpack = _UNPACK.get(path.suffix.lower())
    try:
        with unpack(path) if unpack else path.open("rb") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from None


def _jsonl_rows(path: Path) -> Rows:
    for number, raw in _lines(path):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if line:
                yield where, parse_json(line)
        except UnicodeDecodeError as error:
            yield where, ValueError(f"{where}: not UTF-8 (byte {raw[error.start]:#04x} at {error.start})")
        except json.JSONDecodeError as error:
            yield where, ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            yield where, ValueError(f"{where}: {error}")


def lines_of(source: Any) -> int | None:
    """Of a file of JSON lines as it is, at the speed of a disk; None where that does not tell how many records are."""
    if not isinstance(source, (str, os.PathLike)) or not str(source).lower().endswith((".jsonl", ".ndjson")):
        return None
    try:
        with Path(source).open("rb") as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b"")) or None
    except OSError:
        return None


def _json_rows(path: Path) -> Rows:
    """A list of records; or JSON lines under this name."""
    first = next((line.strip() for _, line in _lines(path) if line.strip()), b"[]")
    try:
        if first.removeprefix(b"\xef\xbb\xbf").startswith(b"{") and parse_json(first.decode("utf-8-sig")):
            yield from _jsonl_rows(path)
            return
    except ValueError:
        pass  # an object over several lines, or not JSON at all: what follows says so
    try:
        rows = parse_json(b"".join(line for _, line in _lines(path)).decode("utf-8-sig") or "[]")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: got a JSON {type(rows).__name__}, expected a list of records, or one a line")
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row


def parse_json(text: str) -> Any:
    """As `json.loads`; also a ValueError for a field that stands twice and for what is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field '{next(name for name in names if names.count(name) > 1)}' stands twice in one object")
    return found


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{path}: column '{twice}' stands twice")
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
        for number, row in enumerate(rows, 1):
            yield f"{path}, record {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def _dataset_rows(arguments: dict[str, Any], split: str | None) -> Rows:
    name, data = arguments.get("path"), load_dataset(arguments, split)
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"{name}, record {number}", without_nulls(row)
    except (OSError, RuntimeError) as error:  # a stream: the hub, the network
        raise ValueError(f"{name}: cannot be read beyond record {number} ({first_line(error)})") from error


def load_dataset(arguments: dict[str, Any], split: str | None) -> Any:
    """The one split of a data set that is asked for."""
    name = arguments.get("path")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name}: not a .jsonl, .json or .parquet file, and a data set needs `datasets`") from None
    if split is not None:
        arguments.setdefault("split", split)
    try:
        data = datasets.load_dataset(**arguments)
    except Exception as error:  # the hub, the network, a missing builder: each raises its own kind
        raise ValueError(f"{name}: neither a data file here nor a data set that loads ({first_line(error)})") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"{name}: has splits {', '.join(data)}; split must name one")
        data = next(iter(data.values()))
    return data


def rows_in_memory(rows: Iterable[Any], name: str) -> Rows:
    """Of a list of dicts, or of a `datasets.Dataset`, which has Arrow's nulls."""
    arrow = getattr(rows, "features", None) is not None
    for number, row in enumerate(rows, 1):
        yield f"{name}, record {number}", without_nulls(row) if arrow else row


def without_nulls(value: Any) -> Any:
    """Objects lose the fields that are null, at every depth; a null in a list is a value, and stays."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(part) for part in value]
    return value
