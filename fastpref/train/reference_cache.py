"""Reference log-probs from their file, or computed into it: at the start of a stage, and by `fastpref cache-ref`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref.data import Example, Examples, eval_order, hashes_of, identity_of
from fastpref.errors import UserError
from fastpref.files import FileLock, remove_partials

from . import checkpoint, ranks, reference
from .batch_order import BatchOrder
from .compiled import check_compiles, compile_layers
from .config import TrainConfig
from .display import Display, Tick, duration
from .model import Policy, fingerprint, load_policy, load_tokenizer, pad_token
from .positions import check_positions, longest_sequences
from .reference import ReferenceLogps, Steps
from .rendering import dated, keep_date
from .run_folder import file_of, reference_at_start
from .stage_data import StageData, load_data

WAIT = 0.5  # seconds between two looks at a lock that another run holds


@dataclass(frozen=True)
class CachedSplit:
    """Examples of a stage, and the file that their reference log-probs are in."""

    stage: TrainConfig
    name: str  # "train" or "eval"
    examples: Sequence[Example]
    steps: Steps | None  # KTO: the global batches, whose mismatched sequences are scored too
    path: Path
    stream: bool = False  # the examples are the first of a stream: the file may have others too
    used: Sequence[int] | None = None  # those of them that the stage's steps take; None: all


def cached_splits(
    config: TrainConfig, run_dir: Path, index: int, stage: TrainConfig, data: StageData, order: BatchOrder
) -> Iterator[CachedSplit]:
    """The training examples, and the held-out ones if there are any."""
    for name, examples in (("train", data.train), ("eval", data.eval)):
        if examples:
            steps: Steps | None = None
            if stage.loss_fn.needs_kl:
                held_out = eval_order(examples, stage.per_device_eval_batch_size)
                steps = order.all_steps() if name == "train" else [held_out]
            path = file_of(config, run_dir, index, stage, name)
            train = name == "train"
            used = order.used() if train and steps is None and not stage.dataset_streaming else None
            yield CachedSplit(stage, name, examples, steps, path, stage.dataset_streaming and train, used)


def cached_logps(split: CachedSplit, tokenizer: PreTrainedTokenizerBase, weights: str, like: Policy,
                 source: Callable[[], Policy], display: Display, watch: Callable[[Any], Tick], *,
                 replace: bool) -> ReferenceLogps:
    """From the file if its header is what it has to be; else computed and written.

    weights: fingerprint of the reference; like: a policy of the same dtype and layout; source: makes the reference;
    replace: whether a file with another header may be replaced.

    Raises UserError for a file with another header, naming what differs.
    """
    stage, examples, path, stream = split.stage, split.examples, split.path, split.stream
    if split.used is not None:
        return _of_used(split, split.used, tokenizer, weights, like, source, display, watch, replace)
    header = reference.header_of(stage, tokenizer, like.compute_dtype, weights, examples, split.steps, stream=stream)
    what = f"{stage.name}: reference log-probs of {len(examples):,} {split.name} examples"
    hashes = hashes_of(examples)

    def cached() -> tuple[dict[str, Tensor], ReferenceLogps | None]:
        """Of a stream what is known of it; and the log-probs, if they are all there."""
        if not stream:
            return {}, reference.read(path, header)
        known = reference.read_known(path, header)
        return known, reference.of_known(known, hashes) if known.keys() >= set(hashes) else None

    if (logps := cached()[1]) is not None:
        display.say(f"{what} from {path}")
        return logps
    counting = display.counting(f"{stage.name}: reference log-probs, {split.name}")
    with counting as show, _alone(path, display, watch(show)):
        known, logps = cached()  # another run may have computed them meanwhile
        if logps is not None:
            display.say(f"{what} from {path}")
            return logps
        different = ranks.on_first(lambda: reference.differing(path, header))
        if different and not replace:
            raise UserError(
                f"{path}: holds reference log-probs of something else: {'; '.join(different)}; delete it, or set "
                "another reference_dir, or overwrite_output_dir=true"
            )
        if not known and not different and ranks.on_first(path.is_file):
            display.say(f"{path}: damaged; computed again", "yellow")
        started = time.monotonic()
        size, pad = stage.per_device_eval_batch_size, pad_token(tokenizer)
        new = [example for example, code in zip(examples, hashes) if code not in known] if known else examples
        progress = reference.Progress(path, header | {"records": identity_of(new)}, size, like.layout)
        found = logps = reference.compute(source(), new, stage.kind, size, pad, watch(show), split.steps, progress)
        if stream:
            if known:
                what += f", {len(new):,} of them new to {path},"
            known |= dict(zip(hashes_of(new), found.logps))
            logps, found, hashes = reference.of_known(known, hashes), reference.of_known(known, known), list(known)
        ranks.on_first(lambda: reference.write(path, header, found, hashes))
        progress.discard()
    before = f", {progress.restored:,} log-probs of them from an earlier attempt" if progress.restored else ""
    display.say(f"{what} in {duration(time.monotonic() - started)}{before}")
    return logps


def _of_used(split: CachedSplit, used: Sequence[int], tokenizer: PreTrainedTokenizerBase, weights: str, like: Policy,
             source: Callable[[], Policy], display: Display, watch: Callable[[Any], Tick],
             replace: bool) -> ReferenceLogps:
    """`cached_logps` of the examples that steps take, NaN for the others: from a file of all, or from one that is
    looked up by content, as of a stream, and which a run of more steps adds to."""
    whole = dataclasses.replace(split, used=None)
    header = reference.header_of(split.stage, tokenizer, like.compute_dtype, weights, split.examples, split.steps)
    if reference.read(split.path, header) is not None:
        return cached_logps(whole, tokenizer, weights, like, source, display, watch, replace=replace)
    columns = split.examples if isinstance(split.examples, Examples) else Examples.of(split.examples)
    examples = columns.select(numpy.array(used))
    path = split.path.with_stem(f"{split.path.stem}-part")
    part = dataclasses.replace(whole, examples=examples, stream=True, path=path)
    found = cached_logps(part, tokenizer, weights, like, source, display, watch, replace=replace)
    logps = torch.full((len(columns), found.logps.shape[1]), torch.nan)
    logps[torch.as_tensor(used)] = found.logps
    return dataclasses.replace(found, logps=logps)


@contextmanager
def _alone(path: Path, display: Display, tick: Tick) -> Iterator[None]:
    """Within it no other run computes what goes into `path`; waits for one that does. Where the file system has no
    locks the work may be done twice, no more: each writes names of its own, and reads nothing that is not whole."""
    lock, told = FileLock(path.with_suffix(".lock")), False
    try:
        while holder := ranks.on_first(lock.take):
            if not told:
                display.say(f"waiting for {path}, which {holder} computes", "yellow")
            told = True
            tick(0, 1)
            time.sleep(WAIT)
        if lock.held:
            remove_partials(path)
        elif lock.impossible:
            display.say(f"{path}: no lock to be had there ({lock.impossible}): runs that start at once each compute it")
        yield
    finally:
        lock.release()


def cache_reference(config: TrainConfig, display: Display | None = None) -> list[Path]:
    """Computes the reference log-probs that `train` would start with, into the files where it looks for them.

    Goes on where an earlier call was ended. Returns the files. Raises UserError where no stage has a reference that is
    known before training, and for a file that is there with another header.
    """
    display = display or Display()
    run_dir = Path(config.output_dir)
    stages = config.stage_configs()
    wanted = [i for i, stage in enumerate(stages) if stage.loss_fn.needs_reference]
    known = [i for i in wanted if i == 0 or stages[i].ref_model_name_or_path]
    if not known:
        why = "no loss here has a reference" if not wanted else "each reference is what the stage before ends with"
        raise UserError(f"there is nothing to cache: {why}")
    found: list[Path] = []
    with checkpoint.lock(run_dir):
        checkpoint.seed_everything(config.seed)  # as `train` does: random weights are the same there and here
        tokenizer = load_tokenizer(config)
        config = dated(config, tokenizer)
        keep_date(config)
        check_compiles(config, tokenizer)
        stages = config.stage_configs()
        every = load_data(stages, tokenizer, display)
        check_positions(stages, longest_sequences(stages, every), display)
        policy = compile_layers(load_policy(config, tokenizer), config)
        for index in wanted:
            stage, data = stages[index], every[index]
            if index not in known:
                display.say(f"{stage.name}: its reference is what the stage before ends with; cached when it begins")
                continue
            order = BatchOrder(stage, data.train, config.seed + index)
            source = reference_at_start(stage, tokenizer, policy)
            weights = fingerprint(source.model)
            for split in cached_splits(config, run_dir, index, stage, data, order):
                cached_logps(split, tokenizer, weights, policy, lambda source=source: source, display,  # type: ignore[misc]
                             lambda show: show, replace=config.overwrite_output_dir)
                found.append(split.path)
    return found
