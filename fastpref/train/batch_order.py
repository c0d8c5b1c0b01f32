"""The order in which a stage's steps take its examples."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from fastpref.data import Example, batch_order, fill_batches, lengths_of, tokens_of

from .config import TrainConfig


class BatchOrder:
    """Which micro-batches make up which step: a function of configuration and data lengths, so it needs no state."""

    def __init__(self, stage: TrainConfig, examples: Sequence[Example], seed: int) -> None:
        self.seed, self.batch_size, self.max_tokens = seed, stage.batch_size, stage.max_tokens_per_batch
        self.lengths = tokens_of(examples, stage.prefix_sharing) if self.max_tokens else lengths_of(examples)
        self.accumulation = stage.gradient_accumulation_steps
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._begins = [(0, 0)]  # of each epoch so far, and of the next: its first step, its first micro-batch
        self.steps = stage.max_steps
        if self.steps < 1:
            whole = math.floor(stage.num_train_epochs)
            rest = (stage.num_train_epochs - whole) * self._steps(whole) if stage.num_train_epochs > whole else 0
            self.steps = self._begin(whole)[0] + math.ceil(rest)

    def of_step(self, step: int) -> tuple[int, list[list[int]]]:
        """The number of the step's first micro-batch, counted from the stage's start; its micro-batches, as indices of
        examples. A step does not reach from one epoch into the next: the last of an epoch may be smaller.
        """
        epoch = self._epoch_of(step)
        first_step, first_batch = self._begin(epoch)
        start = (step - first_step) * self.accumulation
        return first_batch + start, self._batches(epoch)[start : start + self.accumulation]

    def epoch(self, step: int) -> float:
        epoch = self._epoch_of(step)
        return epoch + (step - self._begin(epoch)[0]) / self._steps(epoch)

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch != self._epoch[0]:
            if self.max_tokens:
                batches = fill_batches(
                    self.lengths, self.max_tokens, batch_size=self.batch_size, seed=self.seed, epoch=epoch
                )
            else:
                batches = batch_order(self.lengths, self.batch_size or 1, seed=self.seed, epoch=epoch)
            self._epoch = epoch, batches
        return self._epoch[1]

    def _steps(self, epoch: int) -> int:
        return self._begin(epoch + 1)[0] - self._begin(epoch)[0]

    def _begin(self, epoch: int) -> tuple[int, int]:
        while len(self._begins) <= epoch:
            steps, batches = self._begins[-1]
            if self.max_tokens:
                count = len(self._batches(len(self._begins) - 1))
            else:
                count = math.ceil(len(self.lengths) / (self.batch_size or 1))
            self._begins.append((steps + math.ceil(count / self.accumulation), batches + count))
        return self._begins[epoch]

    def _epoch_of(self, step: int) -> int:
        epoch = bisect_right(self._begins, step, key=lambda begin: begin[0]) - 1
        while step >= self._begin(epoch + 1)[0]:
            epoch += 1
        return epoch

    def some(self, count: int) -> list[list[int]]:
        """Micro-batches of the first epoch that steps take, from that of the shortest longest example to that of the
        longest."""
        taken = self._batches(0)[: self.steps * self.accumulation]
        batches = sorted(taken, key=lambda batch: max(self.lengths[i] for i in batch))
        last = len(batches) - 1
        return [batches[place] for place in sorted({round(n * last / (count - 1)) for n in range(count)})]

    def used(self) -> list[int] | None:
        """The examples that some step takes, in their order; None: more than half of all."""
        if 2 * self.steps > self._begin(1)[0]:
            return None
        found = sorted({i for batches in self.all_steps() for batch in batches for i in batch})
        return found if 2 * len(found) <= len(self.lengths) else None

    def all_steps(self) -> list[list[list[int]]]:
        return [self.of_step(step)[1] for step in range(self.steps)]
