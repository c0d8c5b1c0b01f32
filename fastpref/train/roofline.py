"""Time of a training step on paper, on one GPU or many: `fastpref plan --model M --gpus 8 --nodes 4`.

A step of N tokens a GPU takes as long as the slowest roof lets it, each roof reached to EFFICIENCY of its data sheet:

    linear layers    2 FLOP a weight and token; forward, again (checkpointing), and twice backward
    attention        4 FLOP a (query, key) pair, head and width; backward 2.5 times the forward pass (a flash kernel
                     makes its scores again)
    LM head          three GEMMs
    elementwise      bytes: every linear layer's input written and output read once, the residual stream read and
                     written twice a layer, each pass; as fused kernels or torch_compile have it
    optimiser        bytes: weight, gradient and states of the shard, read and written
    all-gather       bf16 weights of the trunk, forward and backward      hidden behind the layers' work,
    reduce-scatter   fp32 gradients of them                               but what exceeds it
    rows             the sharded head's: bf16 rows of all ranks to each, the fp32 gradient back. Not hidden

A collective over n GPUs in m nodes of g moves (n - 1) / n of its bytes into each GPU over NVLink and (m - 1) / m into
each node over g network cards. No latency, no stragglers, no loading: what is measured stays below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .memory_estimate import _on_meta
from .mfu import PEAK_TFLOPS


@dataclass(frozen=True)
class Machine:
    name: str
    flops: float  # dense bf16, 1/s
    memory: float  # bytes/s
    link: float  # bytes/s into a GPU from others of its node
    network: float  # bytes/s into a node, for each of its GPUs


H100 = Machine("H100 SXM", PEAK_TFLOPS["H100"] * 1e12, 3.35e12, 450e9, 50e9)
EFFICIENCY = 0.7  # of every roof. GEMMs alone reached 790 of 989 TFLOP/s on an H200
OPTIMIZER_BYTES = 10  # a number of the shard: bf16 weight and two 8-bit states read and written, bf16 gradient read


@dataclass(frozen=True)
class Model:
    """Of one token, or one (query, key) pair."""

    trunk: int  # numbers of the trunk that are gathered
    linear: int  # weights of its linear layers
    elementwise: int  # bytes of a forward pass
    pair: int  # FLOP of a forward pass
    head: int  # weights
    hidden: int

    @classmethod
    def of(cls, config: Any) -> Model:
        model, settings = _on_meta(config), config.get_text_config()
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        parameters = {id(p): p.numel() for p in model.parameters()}
        layers, heads = settings.num_hidden_layers, settings.num_attention_heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
        stream = 4 * layers * settings.hidden_size
        return cls(
            sum(parameters.values()) - head.weight.numel(), sum(m.weight.numel() for m in linear),
            2 * (sum(m.in_features + m.out_features for m in linear) + stream),
            4 * layers * heads * width, head.weight.numel(), head.in_features,
        )

    def flops(self, tokens: int, length: int) -> float:
        """Model FLOPs: three passes, nothing made again (mfu.py)."""
        return 3.0 * tokens * (2 * (self.linear + self.head) + self.pair * length / 2)


@dataclass(frozen=True)
class Step:
    """Seconds of a step, a GPU."""

    machine: Machine
    gpus: int  # in all
    linear: float
    attention: float
    head: float
    elementwise: float
    optimizer: float
    gather: float
    reduce: float
    rows: float
    flops: float  # model FLOPs

    @property
    def hiding(self) -> float:
        return self.linear + self.attention + self.elementwise

    @property
    def exposed(self) -> float:
        """Of all-gather and reduce-scatter, beyond what the layers' work hides."""
        return max(0.0, self.gather + self.reduce - self.hiding)

    @property
    def seconds(self) -> float:
        return self.hiding + self.head + self.optimizer + self.exposed + self.rows

    @property
    def mfu(self) -> float:
        return self.flops / self.machine.flops / self.seconds


def step(
    model: Model, tokens: int, length: int, gpus: int = 1, nodes: int = 1, *, again: bool = True,
    machine: Machine = H100, efficiency: float = EFFICIENCY, sharded_head: bool = True,
) -> Step:
    """tokens: of each GPU, in sequences of `length`, all scored. gpus: of each node. again: checkpointing "full"."""
    count = gpus * nodes
    flops, memory = efficiency * machine.flops, efficiency * machine.memory

    def wire(size: float) -> float:
        within, between = (count - 1) / count / machine.link, (nodes - 1) / nodes / (gpus * machine.network)
        return size * max(within, between) / efficiency

    pairs = model.pair * tokens * length / 2
    rows = count * tokens * model.hidden * (2 + 4) * sharded_head
    return Step(
        machine, count,
        linear=2 * model.linear * tokens * (3 + again) / flops,
        attention=pairs * (3.5 + again) / flops,
        head=3 * 2 * model.head * tokens / flops,
        elementwise=model.elementwise * tokens * (3 + again) / memory,
        optimizer=OPTIMIZER_BYTES * (model.trunk + model.head) / count / memory,
        gather=wire(2 * 2 * model.trunk),
        reduce=wire(4 * model.trunk),
        rows=wire(rows),
        flops=model.flops(tokens, length),
    )


def hidden_from(model: Model, length: int, gpus: int, nodes: int) -> int:
    """The fewest tokens a GPU for which all-gather and reduce-scatter hide behind the layers' work."""
    one = step(model, 1, length, gpus, nodes)
    return -int(-(one.gather + one.reduce) // one.hiding)


def doubled(nodes: int, most: int = 64) -> Iterator[int]:
    """1, 2, 4, ..., and `nodes` among them."""
    yield from sorted({2**i for i in range(most.bit_length())} | {nodes})


def roofline_text(name: str, model: Model, tokens: int, length: int, gpus: int, nodes: int) -> str:
    asked, alone = step(model, tokens, length, gpus, nodes), step(model, tokens, length)
    rate = alone.seconds / tokens
    lines = [
        f"{name}: {nodes} x {gpus} {H100.name}",
        f"{tokens:,} tokens a GPU and step, in sequences of {length:,}, all scored",
        f"layers made again in backward; {EFFICIENCY:.0%} of every roof. Arithmetic, not measured", "",
        f"{'':28}{'ms':>9}{'share':>8}",
    ]
    parts = (
        ("linear layers", asked.linear), ("attention", asked.attention), ("elementwise (HBM)", asked.elementwise),
        ("LM head", asked.head), ("optimiser (HBM)", asked.optimizer), ("head's rows exchanged", asked.rows),
        ("gather, reduce: not hidden", asked.exposed),
    )
    lines += [f"{what:28}{1e3 * time:9.1f}{time / asked.seconds:8.1%}" for what, time in parts]
    lines += [
        f"{'step':28}{1e3 * asked.seconds:9.1f}   {tokens / asked.seconds:,.0f} tokens/s a GPU, MFU {asked.mfu:.1%}",
        f"hidden: all-gather {1e3 * asked.gather:.1f} ms, reduce-scatter {1e3 * asked.reduce:.1f} ms"
        + (f"; from {hidden_from(model, length, gpus, nodes):,} tokens a GPU on" if gpus * nodes > 1 else ""), "",
        f"{'nodes':>7}{'GPUs':>7}{'ms':>9}{'MFU':>8}{'of one GPU':>12}",
    ]
    stops = None
    for n in doubled(nodes):
        found = step(model, tokens, length, gpus, n)
        share = rate * tokens / found.seconds
        stops = n if stops is None and share < 0.8 else stops
        lines.append(f"{n:7}{found.gpus:7}{1e3 * found.seconds:9.1f}{found.mfu:8.1%}{share:12.1%}")
    lines.append(
        f"Below 80 % of one GPU's rate from {stops} nodes on, by the rows that all exchange:\nset dp_replicate there"
        if stops else "Above 80 % of one GPU's rate throughout"
    )
    return "\n".join(lines)

