"""Tokenised data as columns of int32: in memory, or in an Arrow file that a later start and other ranks map.

Of each example a row: its record, prompt and responses, the runs of a response that are scored, label, margin, content
hash, and where its record was read. Lengths and hashes are whole arrays, so that an order is planned without touching a
token; an `Example` is made when it is asked for.

The file is in the cache of `datasets` (HF_DATASETS_CACHE), under a name made of all that the tokens depend on: data,
tokenizer, chat template, every option, the versions and the text of the code that made them. `Dataset.from_file` reads
it. Without `datasets`, and of data of a single part, the columns stay in memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy
from numpy import ndarray

from fastpref.files import locked, remove_partials, replacing, write_text

from .chat import Rendering, tells_the_date
from .records import Invalid, Record, stream_records
from .sources import lines_of, load_dataset, reader_of
from .tokens import Example, Kind, TokenizeReport, tokenize_records, with_margins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = 1024  # records that are read and tokenised at a time: 10 MB or so of text, ids and what the tokenizer makes
Ragged = tuple[ndarray, ndarray]  # rows of different lengths: values [N], and offsets [E + 1] of the rows in them
Part = dict[str, Any]  # column -> ndarray or Ragged


class Examples(Sequence[Example]):
    """A sequence of `Example`s, made one by one from columns."""

    def __init__(self, parts: Sequence[Part], rows: ndarray | None = None, ref_logps: ndarray | None = None) -> None:
        self.parts = parts
        self.begins = numpy.cumsum([0, *(len(part["record_id"]) for part in parts)])
        self.rows = numpy.arange(self.begins[-1]) if rows is None else rows  # counted over all parts
        self.ref_logps = ref_logps  # [E, R] fp32
        names = parts[0] if parts else ()
        self.sides = [f"response_{i}" for i in range(2) if f"response_{i}" in names]

    @classmethod
    def of(cls, examples: Sequence[Example], sources: Sequence[str] | None = None) -> Examples:
        """In memory. sources: of each example's record."""
        return cls([_columns(examples, sources or [""] * len(examples))] if examples else [])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Examples: ...
    def __getitem__(self, i: int | slice) -> Example | Examples:
        if isinstance(i, slice):
            return self.select(numpy.arange(len(self))[i])
        part, row = self._place(i)

        def ids(name: str) -> list[int]:
            return _row(part[name], row).tolist()  # type: ignore[no-any-return]

        desirable, margin = int(part["desirable"][row]), float(part["margin"][row])
        scored = None
        if part["partly"][row]:
            runs = [ids(f"scored_{side}") for side in range(len(self.sides))]
            scored = tuple(tuple(zip(run[::2], run[1::2])) for run in runs)
        return Example(
            int(part["record_id"][row]), ids("prompt"), tuple(map(ids, self.sides)),
            desirable=None if desirable < 0 else bool(desirable),
            ref_logps=None if self.ref_logps is None else tuple(self.ref_logps[i].tolist()),
            margin=None if margin != margin else margin, scored=scored,
        )

    def _place(self, i: int) -> tuple[Part, int]:
        row = int(self.rows[i])
        number = int(numpy.searchsorted(self.begins, row, side="right")) - 1
        return self.parts[number], row - int(self.begins[number])

    def source(self, i: int) -> str:
        """Where its record was read."""
        part, row = self._place(i)
        return _row(part["source"], row).tobytes().decode()

    def select(self, index: Any) -> Examples:
        """Those of these indices, in their order."""
        index = numpy.asarray(index, dtype=numpy.int64)
        return Examples(self.parts, self.rows[index], None if self.ref_logps is None else self.ref_logps[index])

    def with_ref_logps(self, ref_logps: ndarray) -> Examples:
        """ref_logps: [E, R] fp32."""
        return Examples(self.parts, self.rows, ref_logps)

    def _whole(self, of_part: Callable[[Part], ndarray]) -> ndarray:
        return numpy.concatenate([of_part(part) for part in self.parts])[self.rows] if self.parts else numpy.zeros(0)

    @functools.cached_property
    def prompt_lengths(self) -> ndarray:
        """[E] tokens."""
        return self._whole(lambda part: numpy.diff(part["prompt"][1]))

    @functools.cached_property
    def response_lengths(self) -> ndarray:
        """[E, R] tokens."""
        return self._whole(lambda part: numpy.stack([numpy.diff(part[side][1]) for side in self.sides], 1))

    @property
    def scored_lengths(self) -> ndarray:
        """[E, R]: `Example.scored_tokens` of each."""
        def of_part(part: Part) -> ndarray:
            found = []
            for side, name in enumerate(self.sides):
                runs, offsets = part[f"scored_{side}"]
                before = numpy.concatenate([[0], numpy.cumsum(runs[1::2] - runs[::2])])[offsets // 2]
                found.append(numpy.where(part["partly"], numpy.diff(before), numpy.diff(part[name][1])))
            return numpy.stack(found, 1)

        return self._whole(of_part)

    @property
    def lengths(self) -> ndarray:
        """[E]: `Example.length` of each."""
        return self.prompt_lengths + self.response_lengths.max(1) if len(self) else numpy.zeros(0, int)

    def tokens(self, share_prompts: bool) -> ndarray:
        """[E]: `Example.tokens` of each."""
        if not len(self):
            return numpy.zeros(0, int)
        return self.prompt_lengths * (1 if share_prompts else len(self.sides)) + self.response_lengths.sum(1)

    @property
    def labels(self) -> ndarray:
        """[E] bool: KTO's."""
        return self._whole(lambda part: part["desirable"] > 0)

    @property
    def hashes(self) -> ndarray:
        """[E, 16] uint8: `Example.content_hash` of each."""
        return self._whole(lambda part: part["hash"][0].reshape(-1, 16))


def lengths_of(examples: Sequence[Example]) -> Any:
    """`Example.length` of each."""
    return examples.lengths if isinstance(examples, Examples) else [e.length for e in examples]


def tokens_of(examples: Sequence[Example], share_prompts: bool) -> Any:
    """`Example.tokens` of each."""
    return examples.tokens(share_prompts) if isinstance(examples, Examples) else [
        e.tokens(share_prompts) for e in examples]


def hashes_of(examples: Sequence[Example]) -> list[str]:
    """`Example.content_hash` of each."""
    if isinstance(examples, Examples):
        digits = examples.hashes.tobytes().hex()
        return [digits[i : i + 32] for i in range(0, len(digits), 32)]
    return [e.content_hash for e in examples]


def identity_of(examples: Sequence[Example]) -> str:
    """Of a tokenised data set: its examples and their order."""
    return hashlib.sha256("".join(hashes_of(examples)).encode()).hexdigest()[:32]


def _row(column: Ragged, row: int) -> ndarray:
    values, offsets = column
    return values[offsets[row] : offsets[row + 1]]


def _ragged(rows: Sequence[Any], dtype: Any = numpy.int32) -> Ragged:
    offsets = numpy.cumsum([0, *map(len, rows)], dtype=numpy.int32)
    return numpy.fromiter(chain.from_iterable(rows), dtype, int(offsets[-1])), offsets


def _columns(examples: Sequence[Example], sources: Sequence[str]) -> Part:
    columns: Part = {
        "record_id": numpy.array([e.record_id for e in examples], numpy.int32),
        "desirable": numpy.array([-1 if e.desirable is None else e.desirable for e in examples], numpy.int8),
        "margin": numpy.array([numpy.nan if e.margin is None else e.margin for e in examples], numpy.float64),
        "partly": numpy.array([e.scored is not None for e in examples], numpy.uint8),
        "hash": _ragged([bytes.fromhex(e.content_hash) for e in examples], numpy.uint8),
        "source": _ragged([source.encode() for source in sources], numpy.uint8),
        "prompt": _ragged([e.prompt_ids for e in examples]),
    }
    for side in range(len(examples[0].responses)):
        columns[f"response_{side}"] = _ragged([e.responses[side] for e in examples])
        columns[f"scored_{side}"] = _ragged(
            [list(chain.from_iterable(e.scored[side])) if e.scored else [] for e in examples])
    return columns


# ---- from a source to columns ----------------------------------------------------------------------------------------


def load_examples(
    source: Any, tokenizer: PreTrainedTokenizerBase, kind: Kind, *, drop_invalid: bool = False, margins: bool = False,
    tick: Callable[[int, int | None], None] = lambda done, of: None, **options: Any,
) -> tuple[Examples, TokenizeReport]:
    """`load_records` and `tokenize_records` (which takes the options), a part at a time, or what an earlier start kept.

    drop_invalid: leave out and count what cannot be read or rendered. margins: the examples have their records' margin.
    tick: called with the records done so far, and how many there are where that is known.
    """
    report = TokenizeReport(kind)

    def work(item: tuple[int, list[Record]]) -> tuple[Part | None, TokenizeReport]:
        first, part = item
        counted = Invalid() if drop_invalid else None
        examples, about = tokenize_records(part, tokenizer, kind, partial=True, invalid=counted, **options)
        if margins:
            examples = with_margins(examples, part, counted)
        about.invalid = counted or about.invalid
        sources = [part[e.record_id].source for e in examples]
        examples = [dataclasses.replace(e, record_id=first + e.record_id) for e in examples]
        return _columns(examples, sources) if examples else None, about

    def parts(processes: int) -> Iterator[Part]:
        """Of one example at least."""
        records, found = stream_records(source, streaming=False, invalid=report.invalid if drop_invalid else None), 0
        items = ((i * PART, part) for i, part in enumerate(iter(lambda: list(islice(records, PART)), [])))
        for columns, about in _in_order(work, items, processes):
            report.add(about)
            if columns:
                found += 1
                yield columns
            tick(report.records, lines)
        if not found:
            raise ValueError(f"{source}: {report.none_usable()}")

    lines = lines_of(source)
    rendering = options.get("rendering") or Rendering()
    date = tells_the_date(tokenizer) and (rendering.date or str(datetime.date.today()))
    keyed = options | {"rendering": dataclasses.replace(rendering, date=date or None)}
    path = _path_of(source, tokenizer, [kind, drop_invalid, margins, sorted(keyed.items())])
    if path and (found := _read(path)):
        return found
    begun = list(islice(rest := parts(_cores() if path else 1), 2))
    if path is None or len(begun) == 1:
        examples = Examples([*begun, *rest])
        report.count(examples)
        return examples, report
    with locked(path.with_suffix(".lock")):
        if not (found := _read(path)):  # else another process has made it meanwhile
            remove_partials(path)
            _write(path, chain(begun, rest), report)
            found = _read(path)
    assert found
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # elsewhere a fork is not safe


_work: Callable[[Any], Any]  # of a process of the pool, which has it from its parent


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes have the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _work(item)


def _in_order(work: Callable[[Any], Any], items: Iterator[Any], processes: int) -> Iterator[Any]:
    """`work` of each, in their order: the first two here, the others, if there are any, in so many processes. Templates
    are Python: threads would take turns."""
    yield from map(work, islice(items, 2 if processes > 1 else None))
    if not (ahead := list(islice(items, 2 * processes))):
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (work,))
    try:
        waiting = deque(pool.submit(_call, item) for item in ahead)
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_call, item) for item in islice(items, 1))
    except BrokenProcessPool:
        raise ValueError("a process that tokenises was ended from outside (out of memory?)") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---- the file --------------------------------------------------------------------------------------------------------


def _path_of(source: Any, tokenizer: PreTrainedTokenizerBase, options: Any) -> Path | None:
    """None: without `datasets`, or of data that nothing identifies."""
    try:
        import datasets
    except ImportError:
        return None
    data = _data_key(source)
    if None in data:
        return None
    name = json.dumps([data, _tokenizer_key(tokenizer), _code_key(), repr(options)])
    return Path(datasets.config.HF_DATASETS_CACHE) / "fastpref" / f"{_digest(name.encode())}.arrow"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _data_key(source: Any) -> list[str | None]:
    """Files by their content: a time says less. A data set by the fingerprint that `datasets` gives it."""
    if isinstance(source, (list, tuple)):
        return [key for part in source for key in _data_key(part)]
    path = None if isinstance(source, Mapping) else Path(source)
    if path is None or reader_of(path) is None:
        data = load_dataset({"path": str(source)} if path else dict(source), None)
        return [repr(source), getattr(data, "_fingerprint", None)]
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return [str(source), digest.hexdigest()]


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        rules = json.loads(backend.to_str())
        words = json.dumps({key: value for key, value in rules.items() if key not in ("truncation", "padding")})
    settings = [type(tokenizer).__name__, str(tokenizer.special_tokens_map), str(tokenizer.chat_template),
                str(sorted((k, v) for k, v in tokenizer.init_kwargs.items() if isinstance(v, (str, int, float))))]
    return [_digest(words.encode()), *settings]


@functools.cache
def _code_key() -> list[str]:
    """What a change of would change tokens: this folder's code, and the libraries that render and tokenise."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    libraries = [dist.version for name in ("transformers", "tokenizers", "jinja2")
                 for dist in importlib.metadata.distributions(name=name)]
    return [_digest(code), *libraries]


def _write(path: Path, parts: Iterable[Part], report: TokenizeReport) -> None:
    """The report is written last and read first: where it is, the tokens are whole."""
    import pyarrow

    def arrow(column: Any) -> Any:
        if isinstance(column, tuple):
            values, offsets = map(pyarrow.array, column)
            return pyarrow.ListArray.from_arrays(offsets, values)
        return pyarrow.array(column)

    writer = None
    with replacing(path) as partial, partial.open("wb") as file:
        for part in parts:
            batch = pyarrow.RecordBatch.from_arrays(list(map(arrow, part.values())), list(part))
            writer = writer or pyarrow.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        writer.close()  # type: ignore[union-attr]
    report.count(_map(path))
    write_text(path.with_suffix(".json"), json.dumps(dataclasses.asdict(report)))


def _read(path: Path) -> tuple[Examples, TokenizeReport] | None:
    try:
        saved = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        examples = _map(path)
    except (OSError, ValueError):
        return None
    saved |= {name: tuple(saved[name]) for name in ("prompt_tokens", "response_tokens")}
    return examples, TokenizeReport(**saved | {"invalid": Invalid(**saved["invalid"])})


def _map(path: Path) -> Examples:
    """Pages of the file itself, which all processes of a host share; nothing is read before it is asked for."""
    import datasets

    parts = []
    for batch in datasets.Dataset.from_file(str(path)).data.table.to_batches():
        part: Part = {}
        for name, column in zip(batch.schema.names, batch.columns):
            if hasattr(column, "offsets"):
                part[name] = column.values.to_numpy(), column.offsets.to_numpy()
            else:
                part[name] = column.to_numpy()
        parts.append(part)
    return Examples(parts)
