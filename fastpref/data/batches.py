"""Tokenised examples -> an order of batches, and each batch's tensors.

Packed with its prompt shared, a pair's last prompt row predicts two tokens and is scored twice:

    input_ids    p p p p p c c E r r r E
    targets      chosen: c c E from rows 4..6; rejected: r r r E from row 4 and rows 8..10

A user's or a tool's turn inside a response is read like the rest, and predicted by no row of score_rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from fastpref.attention import AttentionPlan

from .stored import lengths_of
from .tokens import KINDS, Example, Kind

Layout = Literal["padded", "packed", "shared"]  # one row a sequence; all in one row; that, with equal prompts once
LAYOUTS = ("padded", "packed", "shared")
Row = tuple[list[int], list[int], Sequence[int]]  # a sequence: prompt, response, the response's scored positions


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Tensors may live on a device; every count is on the host, so reading one never synchronises.

    Sequences: S = 2P for P pairs, first the P chosen, then the P rejected; else one per example. The trunk sees B = S
    rows padded on the right to L; or, packed, B = 1 row of L tokens with an `attention_plan`, no mask and positions
    that begin again in every sequence (in a response that shares its prompt, after the prompt). The N scored tokens
    are ordered by sequence, then by position; those of sequence s are score_rows[cu_seqlens[s]:cu_seqlens[s + 1]], and
    `hidden.view(B * L, H)[score_rows]` are the rows to score: the last row of a shared prompt once for each response.
    """

    kind: Kind
    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor | None  # [B, L] int64, 1 on tokens, 0 on padding; None: packed
    score_rows: Tensor  # [N] int64, flat indices into B * L of the hidden rows that predict a scored token
    last_rows: Tensor  # [S] int64, likewise: of the last token of each sequence, where a reward is read
    targets: Tensor  # [N] int64, the scored tokens: already shifted, none is ignored
    cu_seqlens: list[int]  # [S + 1], offsets of the sequences in the scored tokens
    lengths: list[int]  # [S], tokens of each sequence, prompt included, padding not
    record_ids: list[int]  # [P] or [S], one per example, into the list of records
    desirable: Tensor | None = None  # [S] bool, KTO
    kl: Batch | None = None  # KTO: prompts with another record's completion, K sequences; None where there is no other
    ref_logps: Tensor | None = None  # [S] fp32, nats
    ref_kl_logps: Tensor | None = None  # [K] fp32, nats
    margins: Tensor | None = None  # [P] fp32: of pairs, 0 where a record has none; None: no record has one
    position_ids: Tensor | None = None  # [B, L] int64; None: 0, 1, 2, ... in every row
    attention_plan: AttentionPlan | None = None  # packed; None: padded

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_pairs(self) -> int:
        return self.num_sequences // 2 if self.kind == "pair" else 0

    @property
    def num_tokens(self) -> int:
        """Scored tokens, N."""
        return self.cu_seqlens[-1]

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of the chosen responses; of all where there are no pairs."""
        return self.cu_seqlens[self.num_pairs or self.num_sequences]

    @property
    def processed_tokens(self) -> int:
        """Tokens the trunk reads, padding and the mismatched sequences of KTO not counted."""
        return self.attention_plan.num_tokens if self.attention_plan else sum(self.lengths)

    @property
    def saved_tokens(self) -> int:
        """Tokens of prompts that the trunk need not read again: they are shared."""
        return sum(self.lengths) - self.processed_tokens

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`. Copies to CUDA go through pinned memory: the host does not wait for them."""
        device = torch.device(device)
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
                moved[name] = pinned.to(device, non_blocking=True)
            elif isinstance(value, (Batch, AttentionPlan)):
                moved[name] = value.to(device)
        return replace(self, **moved)


def collate(examples: Sequence[Example], pad_token_id: int, kind: Kind = "pair", *, layout: Layout = "padded",
            mismatched: Sequence[Example] | None = None) -> Batch:
    """Examples -> one Batch on the CPU.

    layout: "padded", one row a sequence, filled up on the right with pad_token_id; "packed", all sequences one after
        another; "shared", the same with each prompt once, before all responses of the batch that belong to it. The
        packed ones need a model whose attention takes the batch's plan (`fastpref.attention`). All three give the same
        log-probs, in the same order.

    mismatched: KTO's, `kl` of the batch, where these examples are a part of a global batch (`mismatch`); None: they are
        the whole of it.

    `ref_logps` is filled if every example has them, `margins` if any has one. Raises ValueError for an empty list and
    examples of another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    per_example = 2 if kind == "pair" else 1
    for example in examples:
        if len(example.responses) != per_example or (kind == "kto") != (example.desirable is not None):
            raise ValueError(f"examples: record {example.record_id} was not tokenised with kind={kind!r}")

    sequences = [(e.prompt_ids, e.responses[i], _scored(e, i)) for i in range(per_example) for e in examples]
    record_ids = [e.record_id for e in examples]

    def lay_out(sequences: list[Row]) -> Batch:
        if layout == "padded":
            return _pad(sequences, record_ids, pad_token_id, kind)
        return _pack(sequences, record_ids, kind, share_prompts=layout == "shared")

    batch = lay_out(sequences)
    extra: dict[str, Any] = {}
    if kind == "kto":
        extra["desirable"] = torch.tensor([e.desirable for e in examples], dtype=torch.bool)
        others = mismatch(examples) if mismatched is None else mismatched
        if others:
            extra["kl"] = lay_out([(e.prompt_ids, e.responses[0], _scored(e, 0)) for e in others])
    if all(e.ref_logps is not None for e in examples):
        logps = [e.ref_logps[i] for i in range(per_example) for e in examples]  # type: ignore[index]
        extra["ref_logps"] = torch.tensor(logps, dtype=torch.float32)
    if any(e.margin is not None for e in examples):
        extra["margins"] = torch.tensor([e.margin or 0.0 for e in examples], dtype=torch.float32)
    return replace(batch, **extra)


def _scored(example: Example, side: int) -> Sequence[int]:
    """Positions in a response of the tokens that are scored."""
    if example.scored is None:
        return range(len(example.responses[side]))
    return [position for start, end in example.scored[side] for position in range(start, end)]


def mismatch(examples: Sequence[Example]) -> list[Example]:
    """KTO's baseline over a global batch: each prompt with the completion of the next example (cyclically) that has
    another prompt. No sequence is longer than the batch's longest real one: its completion loses its last tokens.

    Where all prompts are equal there are none, and the baseline is 0.
    """
    n, longest = len(examples), max(e.length for e in examples)
    found: list[Example] = []
    after = next((i for i in range(n) if examples[i].prompt_ids != examples[0].prompt_ids), None)
    if after is None:
        return []
    for i in reversed(range(n)):  # `after`: the next one behind i that has another prompt than i
        if examples[(i + 1) % n].prompt_ids != examples[i].prompt_ids:
            after = (i + 1) % n
        other, room = examples[after], longest - len(examples[i].prompt_ids)
        spans = other.scored and (tuple((start, min(end, room)) for start, end in other.scored[0] if start < room),)
        found.append(replace(examples[i], responses=(other.responses[0][:room],), scored=spans))
    return found[::-1]


def mismatched_parts(examples: Sequence[Example], parts: Sequence[Sequence[int]]) -> list[list[Example]]:
    """`mismatch` of a global batch that comes in parts (indices of examples): those of each part. Which sequences they
    are does not depend on how the batch is cut or ordered."""
    whole = sorted(i for part in parts for i in part)
    of = dict(zip(whole, mismatch([examples[i] for i in whole])))
    return [[of[i] for i in part if of] for part in parts]


def _pad(sequences: list[Row], record_ids: list[int], pad: int, kind: Kind) -> Batch:
    lengths = [len(prompt) + len(response) for prompt, response, _ in sequences]
    width = max(lengths)
    rows = [prompt + response + [pad] * (width - len(prompt) - len(response)) for prompt, response, _ in sequences]
    mask = [[1] * length + [0] * (width - length) for length in lengths]
    score_rows = [b * width + len(prompt) - 1 + t for b, (prompt, _, scored) in enumerate(sequences) for t in scored]
    return Batch(
        kind=kind,
        input_ids=torch.tensor(rows, dtype=torch.int64),
        attention_mask=torch.tensor(mask, dtype=torch.int64),
        score_rows=torch.tensor(score_rows, dtype=torch.int64),
        last_rows=torch.tensor([b * width + length - 1 for b, length in enumerate(lengths)], dtype=torch.int64),
        lengths=lengths,
        record_ids=record_ids,
        **_targets(sequences),
    )


def _pack(sequences: list[Row], record_ids: list[int], kind: Kind, *, share_prompts: bool) -> Batch:
    groups: dict[Any, list[int]] = {}  # sequences with one prompt
    for s, (prompt, _, _) in enumerate(sequences):
        groups.setdefault(tuple(prompt) if share_prompts else s, []).append(s)
    ids: list[int] = []
    rows: list[list[int]] = [[] for _ in sequences]  # that predict the scored tokens of each response
    last_rows = [0] * len(sequences)
    for members in groups.values():
        ids += sequences[members[0]][0]
        last = len(ids) - 1
        for s in members:
            _, response, scored = sequences[s]
            rows[s] = [len(ids) + t - 1 if t else last for t in scored]
            ids += response
            last_rows[s] = len(ids) - 1
    plan = AttentionPlan.of([
        (len(sequences[members[0]][0]), [len(sequences[s][1]) for s in members]) for members in groups.values()
    ])
    return Batch(
        kind=kind,
        input_ids=torch.tensor([ids], dtype=torch.int64),
        attention_mask=None,
        score_rows=torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64),
        last_rows=torch.tensor(last_rows, dtype=torch.int64),
        lengths=[len(prompt) + len(response) for prompt, response, _ in sequences],
        record_ids=record_ids,
        position_ids=torch.tensor([plan.positions], dtype=torch.int64),
        attention_plan=plan,
        **_targets(sequences),
    )


def _targets(sequences: list[Row]) -> dict[str, Any]:
    """What no layout changes."""
    targets = [response[t] for _, response, scored in sequences for t in scored]
    offsets = [0, *accumulate(len(scored) for _, _, scored in sequences)]
    return {"targets": torch.tensor(targets, dtype=torch.int64), "cu_seqlens": offsets}


def batch_order(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, window: int = 50, shuffle: bool = True
) -> list[list[int]]:
    """One epoch's batches, as lists of indices into `lengths`; every index once, the last batch may be short.

    Random, yet alike in length within a batch: all indices are shuffled, each window of `window` batches is sorted by
    length and cut into batches, and the batches are shuffled. The order is a function of the arguments alone, so that a
    position is restored from (epoch, number of batches done). shuffle=False sorts everything by length: evaluation.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    sizes, indices = numpy.asarray(lengths), list(range(len(lengths)))
    rng = random.Random(f"fastpref {seed} {epoch}")
    if shuffle:
        rng.shuffle(indices)
    size = window * batch_size if shuffle else max(len(indices), 1)
    batches = []
    for start in range(0, len(indices), size):
        part = _sorted(indices[start : start + size], sizes)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    if shuffle:
        rng.shuffle(batches)
    return batches


def _sorted(indices: list[int], sizes: numpy.ndarray) -> list[int]:
    """By size; equal ones in the order they have."""
    return numpy.array(indices)[numpy.argsort(sizes[indices], kind="stable")].tolist()  # type: ignore[no-any-return]


def eval_order(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Batches of what is only scored, alike in length, as indices of examples."""
    return batch_order(lengths_of(examples), batch_size, seed=0, epoch=0, shuffle=False)


def fill_batches(
    tokens: Sequence[int], max_tokens: int, *, batch_size: int | None = None, seed: int, epoch: int, window: int = 50
) -> list[list[int]]:
    """One epoch's batches of at most `max_tokens` tokens (and `batch_size` examples), as lists of indices into
    `tokens`; every index once.

    Random, yet well filled: all indices are shuffled, and what fills about `window` batches is put, longest first, each
    into the first batch that has room for it; then the batches are shuffled. Like `batch_order` a function of its
    arguments alone. How many batches there are differs from epoch to epoch.

    Raises ValueError for an example of more than max_tokens.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    longest_first = -numpy.asarray(tokens, dtype=numpy.int64)
    tokens = (-longest_first).tolist()
    if tokens and max(tokens) > max_tokens:
        raise ValueError(f"tokens: got {max(tokens)}, expected at most max_tokens = {max_tokens}")
    rng = random.Random(f"fastpref {seed} {epoch}")
    indices = list(range(len(tokens)))
    rng.shuffle(indices)
    batches: list[list[int]] = []
    start = total = 0
    for end, index in enumerate(indices, 1):
        total += tokens[index]
        if total >= window * max_tokens or end == len(indices):
            batches += _first_fit(_sorted(indices[start:end], longest_first), tokens, max_tokens, batch_size)
            start, total = end, 0
    rng.shuffle(batches)
    return batches


def _first_fit(
    indices: Sequence[int], tokens: Sequence[int], max_tokens: int, batch_size: int | None
) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        place = next((b for b, free in enumerate(room) if free >= tokens[index]), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[place].append(index)
        room[place] -= tokens[index]
        if len(batches[place]) == batch_size:
            room[place] = 0
    return batches
