"""Sampled and scored responses of a set of prompts, in a file that a later run goes on from.

One line a prompt, in the order in which they were completed:

    {"index": 3, "prompt": ..., "responses": [{"text", "ids", "ended", "score", "skipped"}, ...]}

Scoring runs beside sampling where the scorer can (a function has a process of its own), and what is done with a
prompt's responses happens as soon as they are scored. Lines are written in groups of a fixed number of prompts, each of
which is scored in one call: a run that goes on cuts the file to whole groups and scores the same groups again, so that
even a model's rounding, which depends on its batches, is that of a run that was never ended.

Under torchrun every rank has a scorer, and the ranks take the groups in turns; the first one writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.data import Rendering, load_prompts, tokenize_prompts
from fastpref.errors import SaveError, UserError
from fastpref.files import to_disk
from fastpref.train import ranks
from fastpref.train.display import Display
from fastpref.train.prompts import Prompt
from fastpref.train.run import spent
from fastpref.train.sample import Sample
from fastpref.train.scorer import Scorer, prompt_key

from .pairing import Response, reason_to_skip

ALL_FAILED = 32  # so many responses, and every one failed: the scorer is broken, and the rest would fail too

# completed prompts, the indices given left out: (index, its samples)
Source = Callable[[Collection[int]], Generator[tuple[int, list[Sample]], None, None]]
Scored = list[Response]


@dataclass(frozen=True)
class Prompts:
    shown: list[Prompt]  # what the scorer gets: a text, or messages
    ids: list[list[int]]

    def take(self, indices: Sequence[int]) -> Prompts:
        return Prompts([self.shown[i] for i in indices], [self.ids[i] for i in indices])


def read_prompts(
    source: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation_mode: Any,
    rendering: Rendering, what: str, display: Display,
) -> Prompts:
    """Each prompt once, in the order of the data; says how many there are and what was cut."""
    records = load_prompts(source)
    every, cut = tokenize_prompts(records, tokenizer, max_length, truncation_mode, rendering)
    first = {tuple(ids): i for i, ids in reversed(list(enumerate(every)))}
    kept = sorted(first.values())
    parts = [f"{len(records):,} records -> {len(kept):,} prompts", f"longest {max(map(len, every)):,} tokens"]
    if cut:
        parts.insert(1, f"{cut:,} truncated")
    display.say(f"{what}: {'; '.join(parts)}")
    return Prompts([records[i].prompt for i in kept], [every[i] for i in kept])


def collect(
    path: Path, prompts: Prompts, source: Source, scorer: Scorer, *, group: int, seconds: dict[str, float],
    of_reference: bool = False, each: Callable[[int, Scored], None] = lambda index, responses: None,
) -> list[Scored]:
    """The responses of every prompt, in the order of the prompts: from the file as far as it has them, else sampled and
    scored into it. All ranks call it, and have what comes of it.

    group: prompts that are scored in one call. seconds: "sampling" and "scoring" are added to it, the latter without
    what runs beside sampling. each: called with every prompt as it is complete.

    Raises UserError for a file of other prompts, and for a scorer that fails on the first ALL_FAILED responses, or on
    all there are.
    """
    found, size = ranks.on_first(lambda: _read(path, prompts, group, of_reference))
    for index, responses in found.items():
        each(index, responses)
    if len(found) == len(prompts.ids):
        return [found[i] for i in range(len(prompts.ids))]
    groups: dict[int, list[tuple[int, Scored]]] = {}  # that wait for their scores, by number
    under_way: dict[int, Future[list[float | None]]] = {}  # of this rank's
    scores: dict[int, list[float | None]] = {}
    begun = tried = failed = 0

    def score(batch: list[tuple[int, list[Sample]]], last: bool) -> None:
        """A group to each rank; then all hear what is scored by now, or (last) at the end."""
        nonlocal begun
        for start in range(0, len(batch), group):
            part = batch[start : start + group]
            groups[begun + start // group] = [(i, _responses(of, prompts.shown[i], of_reference)) for i, of in part]

        def mine() -> dict[int, list[float | None]]:
            if (number := begun + ranks.rank()) in groups:
                asked = [(prompts.shown[i], r.text) for i, of in groups[number] for r in of if not r.skipped]
                under_way[number] = scorer.submit([prompt for prompt, _ in asked], [text for _, text in asked])
            ready = [number for number, future in under_way.items() if last or future.done()]
            return {number: under_way.pop(number).result() for number in ready}

        with spent(seconds, "scoring"):
            for known in ranks.told(ranks.everywhere(mine)):
                scores.update(known)
        begun += -(-len(batch) // group)
        lines: list[str] = []
        while groups and (number := min(groups)) in scores:
            lines += finished(groups.pop(number), iter(scores.pop(number)))
        if lines:
            ranks.on_first(lambda: _append(path, lines))

    def finished(unscored: list[tuple[int, Scored]], values: Iterator[float | None]) -> list[str]:
        nonlocal tried, failed
        lines = []
        for index, responses in unscored:
            scored = [r if r.skipped else _with_score(r, next(values)) for r in responses]
            tried += sum(not r.skipped for r in scored)
            failed += sum(r.failed for r in scored)
            found[index] = scored
            lines.append(_line(index, prompts.shown[index], scored))
            each(index, scored)
        if tried == failed and (failed >= ALL_FAILED or len(found) == len(prompts.ids) and failed):
            raise UserError(f"scorer {scorer.name!r} gave no score at all: {scorer.total().report()}")
        return lines

    try:
        ranks.on_first(lambda: _begin(path, size))
        with closing(source(found.keys())) as samples:
            batch = []
            item: tuple[int, list[Sample]] | None = (0, [])
            while item is not None:
                with spent(seconds, "sampling"):
                    item = next(samples, None)
                if item is not None:
                    batch.append(item)
                if item is None or len(batch) == group * ranks.size():
                    score(batch, item is None)
                    batch = []
        ranks.on_first(lambda: to_disk(path))
    except OSError as error:
        raise SaveError(f"could not write {path}: {error.strerror}") from error
    return [found[i] for i in range(len(prompts.ids))]


def rivals(path: Path) -> dict[str, list[str]]:
    """The responses in a file that are not empty, by their prompts' keys: what a judge compares others with."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {prompt_key(line["prompt"]): [r["text"] for r in line["responses"] if r["skipped"] != "empty"]
            for line in lines}


def _begin(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(size)


def _append(path: Path, lines: list[str]) -> None:
    with path.open("ab") as file:
        file.write("".join(lines).encode())


def _responses(samples: Sequence[Sample], prompt: Prompt, of_reference: bool) -> Scored:
    why = reason_to_skip([sample.text for sample in samples])
    return [
        Response(sample.ids, sample.after(prompt), sample.ended, of_reference, skipped)
        for sample, skipped in zip(samples, why, strict=True)
    ]


def _with_score(response: Response, score: float | None) -> Response:
    return Response(response.ids, response.text, response.ended, response.of_reference, None, score)


def _line(index: int, prompt: Prompt, responses: Scored) -> str:
    fields = ("text", "ids", "ended", "score", "skipped")
    content = {"index": index, "prompt": prompt}
    content["responses"] = [{name: getattr(response, name) for name in fields} for response in responses]
    return json.dumps(content, ensure_ascii=False) + "\n"


def _read(path: Path, prompts: Prompts, group: int, of_reference: bool) -> tuple[dict[int, Scored], int]:
    """Prompt -> responses, and the bytes that these are: whole groups of whole lines, or all."""
    found: dict[int, Scored] = {}
    sizes = [0]
    for raw in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            content = json.loads(raw)
            index = content["index"]
            responses = [Response(of_reference=of_reference, **response) for response in content["responses"]]
        except (ValueError, KeyError, TypeError):  # half a line: the process was killed while it wrote
            break
        if not raw.endswith(b"\n"):
            break
        if not 0 <= index < len(prompts.ids) or content["prompt"] != prompts.shown[index]:
            raise UserError(f"{path}: was sampled from other prompts than rounds.prompts (or eval_dataset) has now")
        found[index] = responses
        sizes.append(sizes[-1] + len(raw))
    if len(found) == len(prompts.ids):
        return found, sizes[-1]
    whole = len(found) // group * group
    return dict(list(found.items())[:whole]), sizes[whole]
