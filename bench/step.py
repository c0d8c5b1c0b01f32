"""A whole training step of a model: trunk forward and backward, head and loss, optimiser.

    fastpref bench step [--preset llama3-8b] [--pairs 4] [--rows 4096] [--layers 2] [--gradient-checkpointing]
    fastpref bench step --logits smollm2      # that model, on conversations of its own

Weights are random, tokens too (but for those of --logits smollm2), and the model is the same for everybody:
implementations differ in the head alone. The limit is the same step with the bare GEMMs in place of the head: trunk
forward, backward from a given gradient, the three GEMMs, optimiser. Parameters, gradients and AdamW's states have the
step's dtype (its cost is measured here, not its learning) and the learning rate is 0. Protocol: bench/README.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import command, smollm2
from .harness import (
    SLOW,
    Contestant,
    Gemms,
    all_right,
    check,
    clock_under,
    fill_times,
    prepare,
    table,
    time_interleaved,
    told,
    watched,
)
from .harness import Cell as HeadCell
from .head import Group
from .peers import BY_DEFAULT, MIB, Implementation, Missing
from .presets import PRESETS, QUICK, Preset
from .problem import DTYPES, IGNORE, LOSSES, REAL, REAL_SIZES, REFERENCE_STD, Batch, Shape, Truth
from .records import Row

# Four pairs of answers of 64 tokens to a question of 43: a third of the answers is shorter.
REAL_PRESET = Preset(Shape(512, *REAL_SIZES, pairs=4, prompt_share=0.4, logits=REAL), "llama", {})


@dataclass
class StepRow(Row):
    """Times and memory of the whole step; errors of the head alone, on the trunk's own hidden rows."""

    model: str = ""
    layers: int = 0
    gradient_checkpointing: bool = False
    tokens_per_s: float | None = None  # of the padded input, prompts too


def model_config(preset: Preset, layers: int | None = None) -> Any:
    from transformers import AutoConfig

    sizes = preset.config | ({} if layers is None else {"num_hidden_layers": layers})
    shape = preset.shape
    return AutoConfig.for_model(
        preset.model_type, hidden_size=shape.hidden, vocab_size=shape.vocab, use_cache=False, **sizes
    )


def make_model(preset: Preset, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights, made where they are used: an 8B model in bf16 takes a GPU seconds, a CPU minutes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(model_config(preset, layers), dtype=dtype)
    return model.to(device)  # buffers made elsewhere


class Step:
    """A model, a batch of tokens and an optimiser; a call with a head is a training step."""

    def __init__(self, model: Any, shape: Shape, loss: str) -> None:
        self.trunk, self.weight, self.loss = model.base_model, model.get_output_embeddings().weight, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)
        device = self.weight.device
        gen = torch.Generator(device=device).manual_seed(0)
        size, length = (shape.sequences, shape.padded_length), shape.padded_length
        if shape.logits == REAL:
            tokens = smollm2.windows(size[0], length + 1, shape.scored_length).to(device)
        else:
            tokens = torch.randint(0, shape.vocab, (size[0], length + 1), generator=gen, device=device)
        self.ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        targets[:, : length - shape.scored_length] = IGNORE
        index = (targets.flatten() != IGNORE).nonzero()[:, 0]
        with torch.no_grad():
            hidden = self.trunk(input_ids=self.ids, use_cache=False).last_hidden_state
        noise = torch.randn(5, size[0], generator=gen, device=device)
        # The head's weight without the graph of the model, for the check; `call` gives the model's own.
        batch = Batch(
            shape, hidden, self.weight.detach().clone(), targets, index, targets.flatten()[index],
            ref_logps=noise[0], desirable=torch.arange(size[0], device=device) % 2 == 0,
            kl_logps=noise[1], ref_kl_logps=noise[2],
        )
        self.truth = Truth(batch)
        self.batch = replace(batch, ref_logps=(self.truth.logps + REFERENCE_STD * noise[0]).float())
        self.gemms = Gemms(self.batch, "step")
        self.dx = torch.zeros_like(hidden)
        self.dx.flatten(0, 1)[index] = self.gemms.dx.normal_(std=1e-4, generator=gen)

    def hidden(self) -> Tensor:
        return self.trunk(input_ids=self.ids, use_cache=False).last_hidden_state

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def limit(self) -> None:
        self.hidden().backward(self.dx)
        self.gemms()
        if self.weight.grad is None:
            self.weight.grad = self.gemms.dw
        else:  # tied to the embedding
            self.weight.grad += self.gemms.dw
        self.optimizer.step()

    def call(self, implementation: Implementation) -> None:
        batch = replace(self.batch, hidden=self.hidden(), weight=self.weight)
        implementation.run(batch, self.loss).loss.backward()
        self.optimizer.step()


def measure(
    step: Step, cell: HeadCell, rows: Sequence[StepRow], implementations: Sequence[Implementation], run: command.Session
) -> None:
    """Fills the rows: each head is checked on the trunk's hidden rows before its step is timed."""
    device = run.device
    step.zero_grad()
    limit_alone = watched(step.limit, device).milliseconds  # the optimiser's states come to be here
    alone = [0.0] * len(rows)
    for i, (row, implementation) in enumerate(zip(rows, implementations)):
        if row.status == "ok" and cell.loss not in implementation.losses:
            row.status, row.note = "missing", f"has no {cell.loss}"
        elif row.status == "ok":
            try:
                check(implementation, step.batch, step.truth, "step", cell.loss, row)
                if row.status == "ok":
                    call = partial(step.call, implementation)
                    step.zero_grad()
                    call()
                    step.zero_grad()
                    seen = watched(call, device)
                    row.peak_extra_mib, alone[i] = seen.extra_bytes / MIB, seen.milliseconds
            except NotImplementedError as error:
                row.status, row.note = "missing", str(error)
            except Exception as error:
                row.status, row.note = told(error)
        prepare(step.batch, "forward")
        step.zero_grad()
        run.say(f"  {implementation.label}: {row.status} {row.note}")
    running = [i for i, row in enumerate(rows) if row.status == "ok"]
    contestants = [Contestant(step.zero_grad, step.limit)]
    contestants += [Contestant(step.zero_grad, partial(step.call, implementations[i])) for i in running]
    slow = [False, *(rows[i].impl != "fastpref" and alone[i] > SLOW * limit_alone for i in running)]
    limit_times, *times = time_interleaved(
        contestants, run.rounds, device, slow=slow, deadline=run.deadline, least=run.least
    )
    step.zero_grad()
    clock = clock_under(step.gemms, device)
    for i, of_one in zip(running, times):
        row = rows[i]
        fill_times(row, of_one, limit_times)
        row.clock_mhz = clock
        if row.ms_median:
            row.tokens_per_s = step.ids.numel() / row.ms_median * 1e3


def run_group(group: Group, name: str, model: Any, run: command.Session) -> None:
    """Measures what the results do not have yet."""
    given = list(group.contestants(run.device))
    cell, running = group.cell, [each for each in given if isinstance(each, Implementation)]
    layers, checkpointing = len(model.base_model.layers), run.options.gradient_checkpointing
    rows = [
        StepRow(
            **asdict(cell.row(each, run.device.type)), model=name, layers=layers, gradient_checkpointing=checkpointing
        )
        for each in running
    ]
    left = [i for i, row in enumerate(rows) if not run.results.has(row)]
    rows, running = [rows[i] for i in left], [running[i] for i in left]
    if run.out_of_time or not rows:
        for row in rows:
            row.status, row.note = "skipped", "time budget"
    else:
        started = time.monotonic()
        try:
            measure(Step(model, cell.shape, cell.loss), cell, rows, running, run)
        except Exception as error:
            for row in rows:
                row.status, row.note = told(error)
        what = f"{name}, {layers} layers, {cell} ({time.monotonic() - started:.0f} s)"
        gaps = [cell.gap(each.name, "missing", each.why) for each in given if isinstance(each, Missing)]
        run.screen.print(table(what, [*rows, *gaps], "trunk, bare GEMMs, optimiser"))
    run.results.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("step", __doc__ or "")
    command.add_shapes(parser)
    command.add_budgets(parser)
    parser.add_argument("--loss", choices=LOSSES, default="dpo", help="default: dpo")
    parser.add_argument("--layers", type=command.positive, help="in place of the preset's")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in every layer of the trunk")
    parser.add_argument("--logits", nargs=1, choices=("trained", REAL), default=["trained"], help="default: trained")
    options = parser.parse_args(arguments)
    real = options.logits == [REAL]
    if real and (options.preset or options.layers):
        raise ValueError(f"--logits {REAL} is that model: --preset and --layers choose another")
    if options.hidden or options.vocab:
        raise ValueError("--hidden and --vocab are the preset's here; --rows, --pairs and --layers can be given")
    with command.session(options, "step", StepRow) as run:
        cuda = run.device.type == "cuda"
        presets = {name: PRESETS[name] for name in options.preset or ["llama3-8b" if cuda else "cpu-small"]}
        if options.quick:
            presets = {"quick": QUICK}
        if real:
            presets = {REAL: REAL_PRESET}
        named = options.impl or ["fastpref", *BY_DEFAULT]
        peers = tuple(name for name in named if name != "fastpref")
        budgets = command.budgets(options) if "fastpref" in named else ()
        todo = list(product(presets.items(), options.dtype or ["bf16" if cuda else "fp32"]))
        for number, ((name, preset), dtype) in enumerate(todo, 1):
            run.progress(number, len(todo), f"{name}, {dtype}")
            if real:
                model = smollm2.load_model(DTYPES[dtype]).to(run.device)
            else:
                model = make_model(preset, options.layers, DTYPES[dtype], run.device)
            if options.gradient_checkpointing:
                # The newer of the two names came with transformers 5, the older goes with 6.
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            for shape in command.resized(options, [preset.shape]):
                run_group(Group(HeadCell(shape, dtype, "step", options.loss, "step"), peers, budgets), name, model, run)
            del model
        command.finish(run)
    return int(not all_right(run.results.rows))
