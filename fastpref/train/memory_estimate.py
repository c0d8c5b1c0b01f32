"""What training a model takes of a GPU's memory, term by term, before it is loaded: `fastpref plan --model`.

    weights       bf16 or fp32; under autocast also the bf16 copies it keeps of fp32 matrices; codes and scales of
                  layers in 4 or 8 bits
    gradients     of all weights (gradient accumulation needs them), or of the largest one where they leave as they come
    optimiser     states; optim.py lists their sizes
    activations   what waits for the backward pass, all layers together
    work          the largest of: one layer's backward pass, the LM head's pass (fastpref.plan), the optimiser's step
    context       CUDA's own, and cuBLAS's workspace: seen by nvidia-smi, not by torch's counters

Parameters are counted, and activations run, on torch's meta device: the model's own code goes through a forward and a
backward pass over `tokens` tokens in one packed row, every tensor it makes is counted while it lives, and nothing is
computed. Attention stands in with what a flash kernel keeps: q, k, v, its output and one float a head and token.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, library, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fastpref.errors import UserError, first_line
from fastpref.plan import Problem, plan
from fastpref.trunk import trunk_of

from .config import TrainConfig
from .model import enable_checkpointing, with_lora
from .optim import SLICE
from .quantized import found_in, is_packed
from .source import source_of
from .traits import free_routers, has_experts

GIB = 2**30
CONTEXT = 0.75 * GIB
ATTENTION = "fastpref_counted"
KINDS = ("none", "selective", "full", "offload")  # of gradient_checkpointing, by what is made again: least first
STEP_BYTES = 4 * 4 * SLICE  # MasterAdamW: fp32 master and gradient of a slice, and the bits that are split off


@dataclass(frozen=True)
class Activations:
    """Bytes at the end of a forward pass of the trunk, and what its backward pass holds beyond them at its peak."""

    kept: int
    work: int


@dataclass(frozen=True)
class Sizes:
    """What the terms are made of."""

    parameters: int
    matrices: int  # of linear layers, the LM head included: what autocast makes bf16 copies of
    largest: int  # numbers of the largest parameter
    hidden: int
    vocab: int
    adapters: int  # LoRA's parameters
    tokens: int
    full: Mapping[str, Activations]  # by gradient_checkpointing, all weights trained
    lora: Mapping[str, Activations]
    no_lora: str = ""  # why there is nothing about LoRA
    packed: int = 0  # numbers of linear layers but the LM head: what load_in_4bit quantises
    packed_rows: int = 0  # of them all
    few_bits: Mapping[int, Mapping[str, Activations]] = field(default_factory=dict)  # LoRA's, by bits


@dataclass(frozen=True)
class Recipe:
    """A way to train, as keys of a configuration."""

    label: str
    cost: int  # what is given up: nothing, exact moments, accumulation and clipping, speed, full-parameter training
    keys: Mapping[str, str]

    @property
    def bf16(self) -> bool:
        return self.keys["dtype"] == "bfloat16"

    @property
    def lora(self) -> bool:
        return "use_peft" in self.keys

    @property
    def bits(self) -> int:
        """Of a number in a frozen linear layer that is quantised; 0: none is."""
        return 4 if "load_in_4bit" in self.keys else 8 if "load_in_8bit" in self.keys else 0


_STREAMED = {"max_grad_norm": "0"}
RECIPES = (
    Recipe("fp32 AdamW", 0, {"dtype": "float32"}),
    Recipe("bf16, fp32 master", 0, {"dtype": "bfloat16", "optim": "adamw_fp32_master"}),
    Recipe("bf16, 8-bit AdamW", 1, {"dtype": "bfloat16", "optim": "adamw_torch_8bit"}),
    Recipe("  + in backward", 2,
           {"dtype": "bfloat16", "optim": "adamw_torch_8bit", "optim_in_backward": "true"} | _STREAMED),
    Recipe("bf16, states on host", 3, {"dtype": "bfloat16", "optim": "adamw_offload"} | _STREAMED),
    Recipe("LoRA on bf16", 4, {"dtype": "bfloat16", "use_peft": "true"}),
    Recipe("LoRA on 8 bits", 5, {"dtype": "bfloat16", "use_peft": "true", "load_in_8bit": "true"}),
    Recipe("QLoRA (4 bits)", 6,
           {"dtype": "bfloat16", "use_peft": "true", "load_in_4bit": "true", "use_bnb_nested_quant": "true"}),
)


@dataclass(frozen=True)
class Terms:
    """Bytes of one recipe on the GPU, and in host memory."""

    recipe: Recipe
    kind: str  # gradient_checkpointing
    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    host: int
    context: int = int(CONTEXT)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work + self.context

    @property
    def keys(self) -> dict[str, str]:
        return {**self.recipe.keys, "gradient_checkpointing": self.kind}


def recipe_of(stage: TrainConfig, settings: Any = None) -> Recipe:
    """What a configuration trains with. settings: the model's, which may be quantised already."""
    there = found_in(settings) if is_packed(settings) else {}
    named = {"optim_in_backward": stage.optim_in_backward, "use_peft": stage.use_peft,
             "load_in_4bit": stage.load_in_4bit or there.get("load_in_4bit"),
             "load_in_8bit": stage.load_in_8bit or there.get("load_in_8bit"),
             "use_bnb_nested_quant": stage.use_bnb_nested_quant or there.get("bnb_4bit_use_double_quant")}
    keys = {"dtype": stage.dtype, "optim": stage.optimizer}
    return Recipe("", 0, keys | {name: "true" for name, on in named.items() if on})


def weight_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """What stays on the device, without the adapter. Of 4 bits 64 numbers share a float32 scale, and with nested scales
    these have 8 bits, of which 256 share one; of 8 bits a row does."""
    s, size = sizes, 2 if recipe.bf16 else 4
    packed = s.packed if recipe.bits else 0
    scales = {0: 0.0, 4: s.packed * 4 / 64, 8: 4.0 * s.packed_rows}[recipe.bits]
    if recipe.bits == 4 and "use_bnb_nested_quant" in recipe.keys:
        scales = s.packed * (1 + 4 / 256) / 64
    copies = 0 if recipe.bf16 else 2 * (s.matrices - packed)
    return size * (s.parameters - packed) + recipe.bits * packed // 8 + int(scales) + copies


def states(sizes: Sizes, recipe: Recipe) -> tuple[int, int, int, int, int]:
    """Bytes of what stays from step to step: weights, gradients, optimiser; of the optimiser's step; on the host."""
    s, keys, size = sizes, recipe.keys, 2 if recipe.bf16 else 4
    trained = s.adapters if recipe.lora else s.parameters
    grad_size = 4 if recipe.lora else size
    weights = weight_bytes(s, recipe) + 4 * s.adapters * recipe.lora
    optim = keys.get("optim", "adamw_torch_fused")
    state, host, step = {
        "adamw_torch_fused": (8 * trained, 0, 0),
        "adamw_fp32_master": (10 * trained, 0, STEP_BYTES),
        "adamw_torch_8bit": (trained * (2 + 8 / 256), 0, 0),
        "adamw_offload": (0, 14 * trained, 0),
    }[optim]
    gradients = grad_size * trained
    if "optim_in_backward" in keys:
        gradients = grad_size * s.largest
    elif optim == "adamw_offload":
        gradients = 2 * grad_size * s.largest  # one on its way to the host while the next is made
    return weights, gradients, int(state), step, host


def terms(sizes: Sizes, recipe: Recipe, kind: str, memory_budget: int | None = None) -> Terms:
    """The terms of `recipe`. memory_budget: bytes of workspace for the LM head, None: its default."""
    s, size = sizes, 2 if recipe.bf16 else 4
    acts = (s.few_bits[recipe.bits] if recipe.bits else s.lora if recipe.lora else s.full)[kind]
    weights, gradients, state, step, host = states(s, recipe)
    kept = acts.kept * (1 if recipe.bf16 or kind not in ("full", "offload") else 2)  # autocast: fp32 between layers
    if kind == "offload":
        kept, host = 0, host + kept
    head = head_bytes(s, frozen=recipe.lora, grad_size=size, memory_budget=memory_budget)
    return Terms(recipe, kind, weights, gradients, state, kept, max(acts.work, head, step), host)


def head_bytes(sizes: Sizes, *, frozen: bool, grad_size: int, memory_budget: int | None) -> int:
    """The LM head's pass if every token is scored: plan's bytes, the rows it reads and their gradient."""
    lengths = (512,) * (sizes.tokens // 512) + ((sizes.tokens % 512,) if sizes.tokens % 512 else ())
    problem = Problem(
        lengths=lengths, hidden=sizes.hidden, vocab=sizes.vocab, grad_itemsize=grad_size,
        needs_weight_grad=not frozen, coupling="sequence", scratches=1, cast_weight=grad_size == 4, device="cuda",
    )
    return plan(problem, memory_budget).bytes + 2 * 2 * sizes.tokens * sizes.hidden


def check_fits(config: TrainConfig, ranks: int, gpu_bytes: int, generates: bool = False) -> None:
    """Raises UserError where weights, gradients and optimiser states, shared out over `ranks` GPUs of `gpu_bytes` each,
    are more than a GPU has: before the model is loaded. Activations are not in it, so what passes may still be too
    large; nor are reward models and models that cannot be counted. generates: ranks that sample have all weights
    beside their shards meanwhile (so do those that `eval_generate` and `sample_steps` ask).
    """
    stages = [stage for stage in config.stage_configs() if not stage.reward_model]
    if not stages:
        return
    try:
        settings = AutoConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        sizes = counted(settings, partial(with_lora, config) if config.use_peft else None)
        recipes = [recipe_of(stage, settings) for stage in stages]
    except Exception:  # the run itself says what is wrong with its model
        return
    found = [states(sizes, recipe) for recipe in recipes]
    needed, room = max(sum(parts[:3]) for parts in found), int(gpu_bytes - CONTEXT)
    shards = max(1, ranks // config.dp_replicate)
    # each rank loads the model, then shards it
    whole = weight_bytes(sizes, recipes[0]) if recipes[0].bits else (4 - 2 * recipes[0].bf16) * sizes.parameters
    generates = ranks > 1 and (generates or any(stage.eval_generate or stage.sample_steps for stage in stages))
    left = room - whole * generates
    if needed / shards <= left and whole <= room:
        return
    enough = f"take at least {-(-needed // left) * config.dp_replicate} GPUs, or " if whole <= room and left > 0 else ""
    alone = f", the weights alone {whole / GIB:.1f}" if whole > room else ""
    beside = f", and ranks that sample have all weights ({whole / GIB:.1f}) beside their part" if generates else ""
    raise UserError(
        f"{config.model_name_or_path}: weights, gradients and optimiser states are {needed / GIB:.1f} GiB{alone}"
        f"{beside}; there {'is' if ranks == 1 else 'are'} {ranks} GPU{'s' * (ranks > 1)} of {gpu_bytes / GIB:.1f} GiB: "
        f"{enough}what `fastpref plan --model` says fits"
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def choose(sizes: Sizes, gpu_bytes: int, memory_budget: int | None = None,
           host_bytes: float = math.inf) -> tuple[list[Terms], Terms | None]:
    """All recipes with all kinds of checkpointing, and of those that fit the one that gives up least: in its recipe,
    then in copies of activations to the host and back, then in what is made again. host_bytes: of the host's memory."""
    found = [
        terms(sizes, recipe, kind, memory_budget)
        for recipe in RECIPES
        for kind in KINDS
        if sizes.lora or not recipe.lora
    ]
    fitting = [t for t in found if t.total <= gpu_bytes and t.host <= host_bytes]
    return found, min(fitting, key=lambda t: (t.recipe.cost, t.kind == "offload"), default=None)


def plan_text(model: str, sizes: Sizes, gpu_gib: float, memory_budget: int | None = None,
              host_gib: float = math.inf) -> str:
    """The table of terms, and the command line of the best recipe that fits."""
    found, best = choose(sizes, int(gpu_gib * GIB), memory_budget, host_gib * GIB)
    names = ("weights", "gradients", "optimiser", "activations", "work", "context", "total", "host")
    lines = [
        f"{model}: {sizes.parameters / 1e9:.2f}B parameters, {sizes.tokens:,} tokens a micro-batch; GiB on the "
        "GPU, and in host memory",
        f"{'recipe':21}{'checkpointing':14}" + "".join(f"{name:>{len(name) + 2}}" for name in names) + "  ",
    ]
    for t in found:
        parts = (t.weights, t.gradients, t.optimizer, t.activations, t.work, t.context, t.total, t.host)
        cells = "".join(f"{part / GIB:{len(name) + 2}.1f}" for name, part in zip(names, parts))
        fits = "best" if t is best else "fits" if t.total <= gpu_gib * GIB else ""
        fits = "host" if fits == "fits" and t.host > host_gib * GIB else fits
        lines.append(f"{t.recipe.label if t.kind == KINDS[0] else '':21}{t.kind:14}{cells}  {fits}".rstrip())
    if sizes.no_lora:
        lines.append(f"without LoRA: {sizes.no_lora}")
    if any(line.endswith("  host") for line in lines):
        lines.append(f"host: takes more than the {host_gib:.0f} GiB of host memory that there are (--host-gib)")
    if best is None:
        lines.append(f"nothing fits {gpu_gib:g} GiB: take fewer --max-tokens, a larger GPU, or several")
        return "\n".join(lines)
    keys = " ".join(f"{key}={value}" for key, value in {**best.keys, "max_tokens_per_batch": sizes.tokens}.items())
    host = f" (and {best.host / GIB:.0f} GiB of host memory)" if best.host else ""
    lines.append(f"best for {gpu_gib:g} GiB{host}:")
    lines.append(f"  fastpref train CONFIG.yaml model_name_or_path={model} {keys}")
    return "\n".join(lines)


def host_memory_gib() -> float:
    """Of this machine; infinite where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):
        return math.inf


# ---- sizes of a model ------------------------------------------------------------------------------------------------


def config_of(model: str, revision: str = "main") -> Any:
    """From a hub id (its config.json alone is read) or a local folder; of an adapter, its model's. Raises UserError for
    one that cannot be."""
    source = source_of(model, revision)
    try:
        return AutoConfig.from_pretrained(source.model, revision=source.revision)
    except Exception as error:  # no file, no network, no permission, an unknown model type: each its own kind
        where = "no usable config.json" if Path(model).is_dir() else "no folder, and not to be had from the hub"
        raise UserError(f"--model {model}: {where} ({first_line(error)})") from None


def measure(config: Any, tokens: int, lora_r: int = 16, only: tuple[str, Recipe] | None = None,
            adapt: Callable[[Any], Any] | None = None) -> Sizes:
    """Sizes of the causal LM that `config` describes; activations of `tokens` tokens in bf16.

    only: (kind of checkpointing, recipe): activations of nothing else, which takes a twelfth of the time.
    adapt: puts a LoRA adapter beside a model; None: of rank `lora_r`, beside all linear layers.
    """
    adapt = adapt or partial(_all_linear, lora_r)
    kinds = KINDS if only is None else (only[0],)
    sizes = counted(config)
    full = {} if only and only[1].lora else _by_kind(_on_meta(config), tokens, kinds)
    if only and not only[1].lora:
        return replace(sizes, tokens=tokens, full=full)
    bits = (0, 4, 8) if only is None else (only[1].bits,)
    adapters, lora, no_lora = _of_lora(config, tokens, adapt, kinds, bits)
    few = {n: found for n, found in lora.items() if n}
    return replace(sizes, adapters=adapters, tokens=tokens, full=full, lora=lora.get(0, {}), few_bits=few,
                   no_lora=no_lora)


def counted(config: Any, adapt: Callable[[Any], Any] | None = None) -> Sizes:
    """Sizes without activations. adapt: puts an adapter beside a model, to be counted too."""
    model = _on_meta(config)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: its LM head is {type(head).__name__}; fastpref takes a linear layer")
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    packed = [w for w in linear.values() if w is not head.weight]
    counts = [p.numel() for p in model.parameters()]
    return Sizes(
        parameters=sum(counts), matrices=sum(w.numel() for w in linear.values()), largest=max(counts),
        hidden=head.in_features, vocab=head.out_features,
        adapters=_of_lora(config, 0, adapt, ())[0] if adapt else 0, tokens=0, full={}, lora={},
        packed=sum(w.numel() for w in packed), packed_rows=sum(len(w) for w in packed),
    )


def _all_linear(lora_r: int, model: Any) -> Any:
    import peft

    dropout = 0.0 if has_experts(model) else 0.05  # peft has none for 3-D weights
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=lora_r, lora_dropout=dropout, target_modules="all-linear")
    adapted = peft.get_peft_model(model, lora)
    free_routers(adapted)
    return adapted


def _of_lora(
    config: Any, tokens: int, adapt: Callable[[Any], Any], kinds: Sequence[str], bits: Sequence[int] = ()
) -> tuple[int, Mapping[int, Mapping[str, Activations]], str]:
    """The adapter's parameters, activations with it by the base's bits (0: whole), and why there are none."""
    try:
        adapters, found = 0, {}
        for count in bits or (0,):  # each with a model of its own: checkpointing leaves a hook on the embedding
            model = _on_meta(config)
            with torch.device("meta"):
                adapted = adapt(model)
            adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            for layer in (m.base_layer for m in adapted.modules() if hasattr(m, "base_layer") and count):
                if isinstance(layer, (nn.Linear, Conv1D)):
                    layer.forward = partial(_of_codes, layer, count)  # type: ignore[method-assign]
            found[count] = _by_kind(adapted.get_base_model(), tokens, kinds)
        return adapters, found, ""
    except ImportError:
        return 0, {}, "it needs peft (pip install peft)"
    except (ValueError, TypeError, RuntimeError) as error:  # what peft does not adapt, a mixture's experts say
        return 0, {}, first_line(error)


def _of_codes(layer: Any, bits: int, x: Tensor) -> Tensor:
    out: Tensor = _OfCodes.apply(x, layer.out_features if isinstance(layer, nn.Linear) else layer.nf, bits)
    return out.clone() if bits == 4 else out  # as peft has it


class _OfCodes(torch.autograd.Function):
    """A product with a weight that is made for it: in 16 bits, from 8 bits by way of 32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, bits: int) -> Tensor:
        ctx.made = rows, x.shape[-1], bits
        return torch.nn.functional.linear(x, _made(x, *ctx.made))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ _made(gradient, *ctx.made), None, None


def _made(x: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    return x.new_empty(rows, columns, dtype=torch.float32 if bits == 8 else x.dtype).to(x.dtype)


def _by_kind(model: Any, tokens: int, kinds: Sequence[str]) -> dict[str, Activations]:
    same = {kind: "full" if kind == "offload" else kind for kind in kinds}  # the same tensors, elsewhere
    try:
        found = {kind: _activations(model, tokens, kind) for kind in dict.fromkeys(same.values())}
    except UserError:
        raise
    except Exception as error:  # code that looks at values, which the meta device has none of
        what = type(model).__name__
        raise UserError(f"{what}: its activations cannot be counted without data ({first_line(error)})") from None
    return {kind: found[name] for kind, name in same.items()}


def _on_meta(config: Any) -> Any:
    AttentionInterface.register(ATTENTION, _attention)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        except ValueError as error:
            raise UserError(f"{config.model_type}: no causal language model ({first_line(error)})") from None
        except KeyError:
            what = f"{config.model_type}: it takes no other attention than its own, whose activations are not counted"
            raise UserError(what) from None


# A namespace of its own: fastpref's ops have kernels, this one is shapes only.
@library.custom_op("fastpref_meta::counted_attention", mutates_args=())
def _counted_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a flash kernel gives: q, k, v [B, heads, T, d] -> output [B, T, heads, d], log-sum-exp [B, heads, T]."""
    raise NotImplementedError("memory is counted on the meta device")


@_counted_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1]), q.new_empty(batch, heads, tokens, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _, lse = ctx.saved_tensors
    sums = (torch.empty_like(q, dtype=torch.float32), torch.empty_like(lse))  # dq adds up in fp32; rows of dO * O
    found = tuple(torch.empty_like(part) for part in (q, k, v))
    del sums
    return found


_counted_attention.register_autograd(_attention_backward, setup_context=_keep)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    return _counted_attention(query, key, value)[0], None


class _Live(TorchDispatchMode):
    """Bytes of the storages made under it and alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [a.untyped_storage() for a in args if isinstance(a, Tensor)]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen and all(storage is not other for other in inputs):
                    self.add(storage)
        return out

    def add(self, storage: Any) -> None:
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, size)

    def gone(self, size: int) -> None:
        self.now -= size


def _activations(model: Any, tokens: int, kind: str) -> Activations:
    """Of the trunk's passes over `tokens` tokens in one row."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    if kind != "none":
        enable_checkpointing(model, kind)
    model.train()
    return count(model, torch.zeros(1, tokens, dtype=torch.int64, device="meta"))


class _Autocast(torch.autocast):
    """torch's own knows no meta device, on which peft switches it off around the weights of experts."""

    def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)


def count(model: Any, ids: Tensor) -> Activations:
    """Runs the trunk of `model` forward and backward, gradients of weights leaving as they come."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with _Live() as live, patch.object(torch, "autocast", _Autocast):
            hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
            kept = live.now
            live.most = 0
            hidden.backward(torch.empty_like(hidden))
        return Activations(kept, live.most - kept)
    finally:
        for hook in hooks:
            hook.remove()
