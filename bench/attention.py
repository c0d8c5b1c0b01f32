"""Shared prompts against repeated ones: pairs a second through a model's trunk, forward and backward.

    fastpref bench attention [--ratio 0.4 1 4 11] [--pairs 8] [--response 64] [--layers 4] [--dtype fp32]

    padded      one row a sequence, filled up to the longest, the model's own attention: what trainers do
    packed      all sequences one after another, every prompt twice
    fastpref    the same with each prompt once

Responses differ in length (by up to a factor of four, evenly in the logarithm), a pair's prompt is `ratio` times the
mean of its two responses. Against packed, sharing wins (2r + 2) / (r + 2), the ceiling, if all that costs time is
proportional to tokens; against padded also what padding cost. Every way is checked against the padded one first: hidden
rows that are scored, and the gradient of every weight, from one random cotangent. Protocol: bench/README.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import fastpref
from fastpref import attention
from fastpref.data import Batch, Example, Layout, collate

from . import command
from .harness import Contestant, clock_under, fill_times, time_interleaved, told
from .presets import PRESETS, QUICK, Preset
from .problem import DTYPES, relative
from .records import Row
from .step import make_model

RATIOS = (0.4, 1.0, 4.0, 11.0)
WAYS: dict[str, Layout] = {"padded": "padded", "packed": "packed", "fastpref": "shared"}
VOCAB = 1024  # the embedding's gradient would cost everybody the same
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative Frobenius norm


@dataclass
class AttentionRow(Row):
    """N: scored rows. dx_rel_err: of the scored hidden rows, dw_rel_err: of all gradients, both against padded."""

    model: str = ""
    layers: int = 0
    prompt_ratio: float = 0.0  # tokens of a prompt / tokens of a response
    response: int = 0  # tokens, geometric mean
    tokens: int = 0  # that the trunk reads, padding included
    ceiling: float = 0.0  # of over_packed: tokens with every prompt twice / tokens with each once
    pairs_per_s: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None  # padded's time / its time, median over rounds
    over_packed: float | None = None  # packed's time / its time, likewise


class Cell(NamedTuple):
    name: str  # of the preset
    layers: int
    pairs: int
    response: int
    ratio: float
    dtype: str

    def __str__(self) -> str:
        shape = f"{self.pairs} pairs, responses about {self.response} tokens, prompts {self.ratio:g} times that"
        return f"{self.name}, {self.layers} layers, {self.dtype}, {shape}"


def make_pairs(pairs: int, response: int, ratio: float) -> list[Example]:
    gen = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, VOCAB, (count,), generator=gen).tolist()

    found = []
    for i in range(pairs):
        spread = torch.rand(2, generator=gen).mul(math.log(4)).sub(math.log(2)).exp()
        lengths = (spread * response).round().clamp(min=1).int().tolist()
        prompt = max(1, round(ratio * sum(lengths) / 2))
        found.append(Example(i, ids(prompt), (ids(lengths[0]), ids(lengths[1]))))
    return found


class Trunk:
    """One model and one batch of pairs in each of the layouts."""

    def __init__(self, model: Any, examples: Sequence[Example], device: torch.device) -> None:
        self.model, self.trunk = model, model.base_model
        self.own = attention.replace_attention(model, self.trunk)
        self.batches = {way: collate(examples, 0, layout=layout).to(device) for way, layout in WAYS.items()}
        shape = len(self.batches["padded"].targets), model.config.hidden_size
        gen = torch.Generator(device=device).manual_seed(1)
        self.cotangent = torch.randn(shape, generator=gen, device=device).to(next(model.parameters()).dtype)

    def before(self, way: str) -> None:
        self.model.set_attn_implementation(self.own if way == "padded" else attention.NAME)
        self.model.zero_grad(set_to_none=True)

    def hidden(self, batch: Batch) -> Tensor:
        packed: dict[str, Any] = {}
        if batch.attention_plan is not None:
            packed = {"position_ids": batch.position_ids, "attention_plan": batch.attention_plan}
        hidden = self.trunk(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.score_rows)

    def __call__(self, way: str) -> Tensor:
        hidden = self.hidden(self.batches[way])
        hidden.backward(self.cotangent)
        return hidden.detach()

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.trunk.parameters() if p.grad is not None])


def check(trunk: Trunk, rows: Sequence[AttentionRow]) -> None:
    """Runs everybody once and compares with the padded way."""
    expected: tuple[Tensor, Tensor] | None = None
    for row in rows:
        try:
            trunk.before(row.impl)
            found = trunk(row.impl), trunk.gradients()
            expected = expected or found
            row.dx_rel_err, row.dw_rel_err = (relative(a, b.double()) for a, b in zip(found, expected))
            if not max(row.dx_rel_err, row.dw_rel_err) <= TOLERANCE[DTYPES[row.dtype]]:
                errors = f"hidden rows off by {row.dx_rel_err:.2g}, gradients by {row.dw_rel_err:.2g}"
                row.status, row.note = "wrong", errors
        except Exception as error:
            row.status, row.note = told(error)
    trunk.before("padded")


def measure(cell: Cell, trunk: Trunk, run: command.Session) -> list[AttentionRow]:
    rows = rows_of(cell, trunk, run.device)
    check(trunk, rows)
    running = [row for row in rows if row.status == "ok"]
    if [row.impl for row in running[:2]] != ["padded", "packed"]:
        return rows  # nothing to compare with
    contestants = [Contestant(partial(trunk.before, row.impl), partial(trunk, row.impl)) for row in running]
    times = time_interleaved(
        contestants, run.rounds, run.device, slow=[False] * len(running), deadline=run.deadline, least=run.least
    )
    trunk.before("padded")
    clock = clock_under(partial(trunk, "padded"), run.device)
    for row, of_one in zip(running, times):
        for name, other in (("over_packed", times[1]), ("speedup", times[0])):
            fill_times(row, of_one, other)
            setattr(row, name, 1 / row.ratio if row.ratio else None)
        row.clock_mhz = clock
        if row.ms_median:
            row.pairs_per_s, row.tokens_per_s = cell.pairs / row.ms_median * 1e3, row.tokens / row.ms_median * 1e3
    return rows


def rows_of(cell: Cell, trunk: Trunk, device: torch.device) -> list[AttentionRow]:
    batch, config = trunk.batches["padded"], trunk.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared, packed = (trunk.batches[way].processed_tokens for way in ("fastpref", "packed"))
    found = []
    for way in WAYS:
        backend = None if way == "padded" else attention.backend(device, DTYPES[cell.dtype], head_dim)
        found.append(AttentionRow(
            way, "trunk", "", batch.num_tokens, config.hidden_size, VOCAB, cell.dtype, version=fastpref.__version__,
            backend=backend or trunk.own, pairs=cell.pairs, benchmark="attention", model=cell.name,
            layers=cell.layers, prompt_ratio=cell.ratio, response=cell.response,
            tokens=trunk.batches[way].input_ids.numel(), ceiling=packed / shared,
        ))
    return found


def table(title: str, rows: Sequence[AttentionRow]) -> Table:
    found = Table(title=title, title_justify="left", caption_justify="left")
    columns = ("tokens", "ms", "p10-p90", "pairs/s", "x padded", "x packed", "ceiling", "X err", "dW err")
    for name in ("", "attention", *columns):
        found.add_column(name, justify="right" if name in columns else "left")
    for row in rows:
        if row.ms_median is None:
            found.add_row(row.impl, row.backend, f"{row.tokens:,}", f"{row.status}: {row.note}")
            continue
        found.add_row(
            row.impl, row.backend, f"{row.tokens:,}", f"{row.ms_median:.1f}", f"{row.ms_p10:.1f}-{row.ms_p90:.1f}",
            f"{row.pairs_per_s:.2f}", f"{row.speedup:.2f}", f"{row.over_packed:.2f}",
            f"{row.ceiling:.2f}" if row.impl == "fastpref" else "", f"{row.dx_rel_err:.1e}", f"{row.dw_rel_err:.1e}",
        )
    return found


def _preset(name: str, layers: int) -> Preset:
    found = QUICK if name == "quick" else PRESETS[name]
    return replace(
        found, shape=replace(found.shape, vocab=VOCAB), config=found.config | {"num_hidden_layers": layers}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("attention", __doc__ or "")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--ratio", nargs="+", type=float, default=list(RATIOS), help="default: 0.4 1 4 11")
    parser.add_argument("--pairs", type=command.positive, help="default: 8 on a CPU, 16 on a GPU")
    parser.add_argument("--response", type=command.positive, help="tokens; default: 64 on a CPU, 256 on a GPU")
    parser.add_argument("--layers", type=command.positive, help="default: 4")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    options = parser.parse_args(arguments)
    if not all(0 < ratio < math.inf for ratio in options.ratio):
        raise ValueError(f"--ratio is {options.ratio}; it takes numbers above 0")
    with command.session(options, "attention", AttentionRow) as run:
        cuda = run.device.type == "cuda"
        names = ["quick"] if options.quick else options.preset or ["llama3-8b" if cuda else "cpu-small"]
        layers = options.layers or (2 if options.quick else 4)
        pairs = options.pairs or (2 if options.quick else 16 if cuda else 8)
        response = options.response or (8 if options.quick else 256 if cuda else 64)
        for name in names:
            for dtype in options.dtype or ["bf16" if cuda else "fp32"]:
                model = make_model(_preset(name, layers), None, DTYPES[dtype], run.device)
                for number, ratio in enumerate(options.ratio, 1):
                    cell = Cell(name, layers, pairs, response, ratio, dtype)
                    run.progress(number, len(options.ratio), cell)
                    _run_cell(cell, model, run)
                del model
        command.finish(run)
    return int(any(row.status in ("wrong", "error", "oom") for row in run.results.rows))


def _run_cell(cell: Cell, model: Any, run: command.Session) -> None:
    """Measures what the results do not have yet."""
    started = time.monotonic()
    trunk = Trunk(model, make_pairs(cell.pairs, cell.response, cell.ratio), run.device)
    rows = rows_of(cell, trunk, run.device)
    if all(run.results.has(row) for row in rows):
        run.screen.print("  nothing left to do")
    elif run.out_of_time:
        for row in rows:
            row.status, row.note = "skipped", "time budget"
        run.results.add(rows)
    else:
        rows = measure(cell, trunk, run)
        run.screen.print(table(f"{cell} ({time.monotonic() - started:.0f} s)", rows))
        run.results.add(rows)
    trunk.before("padded")  # the model as the next cell expects it


if __name__ == "__main__":
    raise SystemExit(main())
