"""Reference log-probs: one forward pass before a stage begins, two floats a pair, kept in a file.

    run/reference/01-rpo-train.safetensors
        logps   [E, R] fp32, nats: of the R responses of each of E examples (R = 2 for pairs, chosen first)
        hashes  [E, 16] uint8: of the token ids they belong to
        kl      [K] fp32 and kl_offsets [B + 1] int64, KTO: of the mismatched sequences of the stage's B micro-batches,
                whose pairs are made over each global batch
        header  JSON in the file's metadata: model, revision, weights, dtype, tokenizer, truncation, records
        crc32   of the tensors, in the metadata too

The file is used again only if every field of its header is the same; a reference model is not needed once it is there.
Of a stream (`dataset_streaming`) the header names no records: each is looked up by its hash, and what is not there is
computed and added, so that a longer run goes on with the file of a shorter one.
While the pass lasts, 01-rpo-train.progress beside it has the log-probs so far, fp32, in the order of the batches, in
chunks that each say what they are of (that header, batch size and layout), the first one's place, their number and a
checksum: a pass that was ended goes on from there, and nothing is read that was not computed, whoever else wrote.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.data import (
    Batch,
    Example,
    Examples,
    Kind,
    Layout,
    collate,
    eval_order,
    identity_of,
    mismatched_parts,
)
from fastpref.errors import SaveError
from fastpref.files import replacing

from . import ranks
from .config import TrainConfig
from .display import Tick
from .micro_batches import by_turns
from .model import Policy

Steps = Sequence[Sequence[Sequence[int]]]  # global batches, each as its micro-batches of examples


@dataclass(frozen=True)
class ReferenceLogps:
    logps: Tensor  # [E, R] fp32
    kl: Tensor  # [K] fp32; empty where the loss has no mismatched sequences
    kl_offsets: Tensor  # [B + 1] int64

    def attach(self, examples: Sequence[Example]) -> Examples:
        """The examples with their `ref_logps`, which `collate` puts into batches."""
        columns = examples if isinstance(examples, Examples) else Examples.of(examples)
        return columns.with_ref_logps(self.logps.numpy())

    def of_batch(self, index: int) -> Tensor:
        """[K of that batch]: mismatched sequences of micro-batch `index` of the stage (CPU)."""
        return self.kl[self.kl_offsets[index] : self.kl_offsets[index + 1]]


def header_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, weights: str,
              examples: Sequence[Example], steps: Steps | None, *,
              stream: bool = False) -> dict[str, Any]:
    """What reference log-probs depend on. weights: the model's `fingerprint`; steps: KTO's; stream: whether the
    examples are a stream's first."""
    return {
        "format": 1,
        "model": config.ref_model_name_or_path or config.model_name_or_path,
        "revision": config.model_revision,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": str(tokenizer.name_or_path),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "truncation": [config.max_length, config.max_prompt_length, config.truncation_mode, config.overlong_response],
        "records": "stream" if stream else identity_of(examples),
        "batches": None if steps is None else hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:32],
    }


def mismatched(
    examples: Sequence[Example], steps: Steps, pad: int, layout: Layout
) -> Iterator[Batch | None]:
    """KTO: the mismatched sequences of each micro-batch."""
    parts = chain.from_iterable(mismatched_parts(examples, batches) for batches in steps)
    return (collate(part, pad, "kto", layout=layout, mismatched=()) if part else None for part in parts)


def compute(policy: Policy, examples: Sequence[Example], kind: Kind, batch_size: int, pad: int, tick: Tick,
            steps: Steps | None = None,
            progress: Progress | None = None) -> ReferenceLogps:
    """Log-probs of all responses, and of KTO's mismatched sequences in `steps`, under `policy`.

    progress: where what is done is kept, if the pass does not come to its end, and taken from.
    """
    was_training = policy.model.training
    policy.model.eval()
    order = eval_order(examples, batch_size)
    total = len(order) + sum(map(len, steps or ()))
    responses = len(examples[0].responses)
    scored: Iterator[Batch | None] = chain(
        (collate([examples[i] for i in batch], pad, kind, layout=policy.layout) for batch in order),
        mismatched(examples, steps or (), pad, policy.layout),
    )
    found: list[Tensor] = []
    waiting: list[Batch] = []  # one for each rank, whose log-probs come next

    def computed() -> None:
        for values in by_turns(policy, waiting):
            found.append(values)
            if progress is not None:
                progress.add(values)
        waiting.clear()

    try:
        for done, batch in enumerate(scored):
            tick(done, total)
            before = None if progress is None or batch is None else progress.take(batch.num_sequences)
            if before is not None:
                found.append(before)
            elif batch is None:
                computed()
                found.append(torch.empty(0))
            else:
                waiting.append(batch)
                if len(waiting) == ranks.size():
                    computed()
        computed()
    finally:
        if progress is not None:
            progress.flush()
    logps = torch.empty(len(examples), responses)
    for indices, values in zip(order, found):
        logps[indices] = values.view(responses, len(indices)).t().cpu()
    kl = found[len(order) :]
    policy.model.train(was_training)
    offsets = torch.tensor([0, *accumulate(len(part) for part in kl)])
    return ReferenceLogps(logps, torch.cat([part.cpu() for part in kl]) if kl else torch.empty(0), offsets)


def read(path: Path, header: dict[str, Any]) -> ReferenceLogps | None:
    """The cached log-probs, or None: no such file, one that is damaged, or another header. As the first rank sees it.
    """
    found = ranks.on_first(lambda: _read(path, header))
    return None if found is None else ReferenceLogps(found["logps"], found["kl"], found["kl_offsets"])


def _read(path: Path, header: dict[str, Any]) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if header != json.loads(metadata.get("header", "{}")):
                return None
            found = {name: file.get_tensor(name) for name in ("logps", "kl", "kl_offsets", "hashes")}
    except (OSError, SafetensorError, ValueError):
        return None
    if "crc32" not in metadata:  # by an older version, which could read a hole as zeros
        return found if bool(found["logps"].all()) else None
    return found if metadata["crc32"] == _crc32(found) else None


def _crc32(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().numpy().data, found)
    return f"{found:08x}"


def differing(path: Path, header: dict[str, Any]) -> list[str]:
    """What the header of the file says otherwise than `header`, field by field; none where there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("header", "{}"))
    except (OSError, SafetensorError, ValueError):
        return []
    names = dict.fromkeys([*header, *saved])
    return [
        f"{name} ({json.dumps(saved.get(name))} there, {json.dumps(header.get(name))} now)"
        for name in names
        if saved.get(name) != header.get(name)
    ]


class Progress:
    """The log-probs of a pass so far, in a file beside the one it is for. Raises SaveError where that cannot be."""

    EVERY = 64  # batches between two writes: each waits for the device
    CHUNK = struct.Struct("<16sQQI")  # whose, place of the first, how many, crc32 of that and of the log-probs

    def __init__(self, path: Path, header: dict[str, Any], batch_size: int, layout: str) -> None:
        self.path = path.with_suffix(".progress")
        whose = {"header": header, "batch_size": batch_size, "layout": layout}
        self.key = hashlib.sha256(json.dumps(whose).encode()).digest()[:16]
        self.restored = 0  # log-probs of an earlier attempt, used again
        self.taken = 0  # log-probs that the file holds of this pass
        self.pending: list[Tensor] = []
        self.valid: int | None  # bytes of the file that are ours; None once we have written to it
        self.values, self.valid = ranks.on_first(self._read)

    def _read(self) -> tuple[numpy.ndarray, int]:
        try:
            content = self.path.read_bytes()
        except OSError:
            content = b""
        values, place = bytearray(), 0
        while place + self.CHUNK.size <= len(content):
            key, start, count, crc = self.CHUNK.unpack_from(content, place)
            end = place + self.CHUNK.size + 4 * count
            data = content[place + self.CHUNK.size : end]
            if (key, 4 * start, 4 * count, crc) != (self.key, len(values), len(data), self._crc(start, data)):
                break
            values += data
            place = end
        return numpy.frombuffer(values, dtype="<f4"), place

    def _crc(self, start: int, data: bytes) -> int:
        return zlib.crc32(self.CHUNK.pack(self.key, start, len(data), 0) + data)

    def take(self, count: int) -> Tensor | None:
        """The next `count` log-probs, if they were computed before."""
        if self.taken + count > len(self.values):
            self.values = self.values[: self.taken]
            return None
        self.taken += count
        self.restored += count
        return torch.from_numpy(self.values[self.taken - count : self.taken].copy())

    def add(self, values: Tensor) -> None:
        self.pending.append(values)
        if len(self.pending) >= self.EVERY:
            self.flush()

    def flush(self) -> None:
        if self.pending and ranks.is_first():  # the others only count
            self._write()
        self.taken += sum(len(part) for part in self.pending)
        self.pending = []

    def _write(self) -> None:
        data = torch.cat([part.float().cpu() for part in self.pending]).numpy().astype("<f4").tobytes()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if self.valid is not None:
                    file.truncate(self.valid)
                file.write(self.CHUNK.pack(self.key, self.taken, len(data) // 4, self._crc(self.taken, data)) + data)
        except OSError as error:
            raise SaveError(f"could not write {self.path}: {error.strerror}") from error
        self.valid = None

    def discard(self) -> None:
        """Removes the file: the pass has come to its end."""
        if ranks.is_first():
            self.path.unlink(missing_ok=True)


def read_known(path: Path, header: dict[str, Any]) -> dict[str, Tensor]:
    """Of a stream: content hash -> [R] log-probs; none where `read` finds none."""
    found = ranks.on_first(lambda: _read(path, header))
    if found is None:
        return {}
    return {bytes(code).hex(): row for code, row in zip(found["hashes"].tolist(), found["logps"], strict=True)}


def of_known(known: Mapping[str, Tensor], hashes: Iterable[str]) -> ReferenceLogps:
    """The log-probs of those hashes, in their order. All of them have to be known."""
    return ReferenceLogps(torch.stack([known[code] for code in hashes]), torch.empty(0), torch.tensor([0]))


def write(path: Path, header: dict[str, Any], reference: ReferenceLogps, hashes: Iterable[str]) -> None:
    """hashes: `content_hash` of every example."""
    codes = torch.frombuffer(bytearray.fromhex("".join(hashes)), dtype=torch.uint8).view(-1, 16)
    tensors = {"logps": reference.logps, "kl": reference.kl, "kl_offsets": reference.kl_offsets, "hashes": codes}
    with replacing(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"header": json.dumps(header), "crc32": _crc32(tensors)})
