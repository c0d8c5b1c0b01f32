"""A transformers causal language model taken apart into its trunk and its LM head, so that no logits are ever built.

    hidden = trunk(input_ids)                                    [B, L, H], the last norm included
    logits = softcap(logit_scale * (hidden W^T + b))             what the fused head computes, row by row

Nothing here knows a model family: trunk and head are asked for by transformers' own names, scale and softcap are read
from the configuration, and all of it is proven on a few tokens against the model's own logits.

A reward model comes apart in the same way, into its trunk and its score layer:

    reward = hidden[last token] w^T + b
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What configurations say about the logits. The names do not settle what is done with the number, nor whether before or
# behind the head (Granite divides logits by logits_scaling, MiniCPM3 hidden states, HyperCLOVA X multiplies; MPT has a
# logit_scale and ignores it), so that each stands for the factors it may mean, the usual one first; the proof decides.
_FACTORS: dict[str, Callable[[float, Any], tuple[float, ...]]] = {
    "logit_scale": lambda value, _: (value, 1.0),  # Cohere
    "logits_scaling": lambda value, _: (1 / value, value, 1.0),  # Granite, HyperCLOVA X, MiniCPM3
    "lm_head_multiplier": lambda value, _: (value, 1.0),  # Falcon-H1
    "output_multiplier": lambda value, _: (value, 1.0),  # maximal-update parametrisations
    "logits_mup_width_multiplier": lambda value, _: (1 / value, 1.0),
    "dim_model_base": lambda value, config: (value / config.hidden_size, 1.0),  # MiniCPM
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2, RecurrentGemma


@dataclass(frozen=True)
class LMHead:
    """An LM head and what the model does with its logits."""

    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0
    sharded: bool = False  # its parameters are DTensors over ranks with rows of their own, and go to the fused call so

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(hidden, weight, bias) whose product hidden weight^T + bias [..., V] is what the module computes. See
        `linear_operands`."""
        return (hidden, self.weight, self.bias) if self.sharded else linear_operands(self.module, hidden)

    @property
    def weight(self) -> Tensor:
        """[V, H] of a plain head."""
        return self.module.weight if self.sharded else _plain(self.module)[0]  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """[V] of a plain head that has one."""
        return self.module.bias if self.sharded else _plain(self.module)[1]  # type: ignore[return-value]


@dataclass(frozen=True)
class Parts:
    """What `take_apart` finds. model: without DDP, torch.compile or PEFT around it."""

    model: Any
    trunk: Any
    head: LMHead


def take_apart(model: Any, *, proof: bool = True) -> Parts:
    """Trunk and head of a transformers causal LM, or of a PeftModel around one, proven on a few tokens to give the
    model's own logits: two forward passes of at most 24 tokens. A model without weights to run (on the meta device, or
    sharded) is taken apart without proof, if its configuration leaves no doubt; without `proof`, for whoever runs
    nothing, by what it most likely means.

    Raises:
        ValueError: no trunk, no linear LM head, or logits that come about in another way; with what was looked for.
    """
    inner = unwrap(model)
    module = lm_head_of(inner)
    trunk = trunk_of(inner)
    if trunk is None:
        what = f"{type(inner).__name__}: has no trunk apart from its LM head"
        raise ValueError(f"{what} (looked for .base_model, .model)")
    candidates = list(_logit_maths(inner))
    if not proof or not _runs(inner):
        return Parts(inner, trunk, LMHead(module, *_undoubted(inner, candidates if proof else candidates[:1])))
    with torch.no_grad(), evaluating(inner):
        ids = _some_tokens(inner, module)
        expected = inner(input_ids=ids, use_cache=False).logits
        behind = torch.cat((ids, ids.flip(1)), dim=1)  # must not change what comes before: right padding
        hidden = trunk(input_ids=behind, use_cache=False).last_hidden_state[:, : ids.shape[1]]
        z = F.linear(*linear_operands(module, hidden))
    return Parts(inner, trunk, LMHead(module, *_settled(inner, z, expected, candidates)))


def trunk_of(inner: Any) -> Any:
    """What stands before the head of a transformers model; None where nothing does."""
    # Llama 4's text model has the prefix of the whole, so that base_model is the model itself.
    found = (getattr(inner, name, None) for name in ("base_model", "model"))
    return next((part for part in found if isinstance(part, nn.Module) and part is not inner), None)


def take_score_apart(model: Any) -> Parts:
    """Trunk and score layer of a transformers sequence classifier with one label, or of a PeftModel around one, proven
    on a few tokens to give the model's own logit: three forward passes of at most 12 tokens and one of 24. One without
    weights to run is taken apart without proof.

    Raises:
        ValueError: no trunk, no single linear score layer, or a reward that comes about in another way (from another
            token, through a pooler, from tokens that see later ones).
    """
    inner = unwrap(model)
    what = type(inner).__name__
    trunk = trunk_of(inner)
    if trunk is None:
        raise ValueError(f"{what}: has no trunk apart from its score layer (looked for .base_model, .model)")
    beside = {name: child for name, child in inner.named_children() if child is not trunk}
    found = {name: child for name, child in beside.items() if getattr(_base(child), "out_features", None) == 1}
    if len(found) != 1:
        there = ", ".join(f"{name} ({type(child).__name__})" for name, child in beside.items()) or "nothing"
        raise ValueError(f"{what}: no score layer, one linear layer with one output beside its trunk (found {there})")
    ((name, module),) = found.items()
    try:
        _check(module)
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).replace('LM head', 'score layer')}") from None
    parts = Parts(inner, trunk, LMHead(module))
    if not _runs(inner):
        return parts
    pad = inner.config.get_text_config().pad_token_id
    with torch.no_grad(), evaluating(inner):
        embedding = inner.get_input_embeddings()
        ids = torch.randint(embedding.num_embeddings, (1, 12), generator=torch.Generator().manual_seed(0))
        ids[ids == pad] = 0 if pad else 1  # the model looks for the last token that is no padding
        ids = ids.to(next(embedding.parameters()).device)
        lengths = (5, 8, 12)
        expected = torch.cat([inner(input_ids=ids[:, :n], use_cache=False).logits.cpu() for n in lengths]).double()
        behind = torch.cat((ids, ids.flip(1)), dim=1)  # must not change what comes before: right padding
        hidden = trunk(input_ids=behind, use_cache=False).last_hidden_state[0, [n - 1 for n in lengths]]
        rows, weight, bias = linear_operands(module, hidden)
        z = F.linear(rows, weight, bias).cpu().double()
        # A single number may be small by chance: its rounding errors go with |h| |w| / sqrt(H), its size where h and w
        # have nothing to do with each other.
        usual = float(rows.norm(dim=1).max() * weight.norm()) / rows.shape[1] ** 0.5
        size = max(float(expected.abs().max()), usual, 1e-6)
        off = float((z - expected).abs().max()) / size if z.shape == expected.shape else math.inf
    if not off < 3 * _tolerance(hidden):
        raise ValueError(f"{what}: trunk and {name} do not give its logit (relative difference {off:.1g}); a reward "
                         "is taken as the score layer on the last token's hidden row, of a causal model")
    return parts


def logit_maths(model: Any) -> tuple[float | None, float]:
    """(softcap, logit_scale) of what `model` does with its LM head's output, proven on a few tokens: one forward pass.

    The same as in `take_apart`, for who reads hidden states at the head's door instead of running the trunk.
    """
    inner = unwrap(model)
    module = lm_head_of(inner)
    candidates = list(_logit_maths(inner))
    if not _runs(inner):
        return _undoubted(inner, candidates)
    seen: list[Tensor] = []
    watch = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad(), evaluating(inner):
            ids = _some_tokens(inner, module)
            expected = inner(input_ids=ids, use_cache=False).logits
            if len(seen) != 1:
                raise ValueError(f"{type(inner).__name__}: calls its LM head {len(seen)} times in one forward pass")
            z = F.linear(*linear_operands(module, seen[0]))
    finally:
        watch.remove()
    return _settled(inner, z, expected, candidates)


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, torch.compile, a PeftModel."""
    while True:
        inside = getattr(model, "_modules", {})
        if "_orig_mod" in inside:  # torch.compile
            model = inside["_orig_mod"]
        elif "module" in inside and not hasattr(type(model), "get_output_embeddings"):  # DDP, FSDP 1, DeepSpeed
            model = inside["module"]
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            return model


def layers_of(inner: Any, trunk: Any) -> list[nn.Module]:
    """The decoder layers of a trunk, by the classes that the model says are not to be split; [] where it says none."""
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    return [module for module in trunk.modules() if type(module).__name__ in kinds]


def lm_head_of(inner: Any) -> nn.Module:
    """The LM head of a transformers model; ValueError if it is nothing that the fused head can compute."""
    what = type(inner).__name__
    if not hasattr(inner, "get_output_embeddings"):
        raise ValueError(f"{what}: not a transformers model (looked for .get_output_embeddings())")
    module = inner.get_output_embeddings()
    if module is None:
        raise ValueError(f"{what}: its LM head is none (looked for .get_output_embeddings())")
    try:
        _check(module)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return module


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """ValueError if the tokenizer has ids that the LM head (a reward model: the embedding) has no row for."""
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    size = inner.get_input_embeddings().num_embeddings if head is None else _base(lm_head_of(inner)).out_features
    if len(tokenizer) > size:
        what = type(inner).__name__
        raise ValueError(f"{what}: its vocabulary of {size} is smaller than the tokenizer's {len(tokenizer)}")


# ---------------------------------------------------------------------------------------------------------------------
# The head's module: a linear layer, or PEFT's around one
# ---------------------------------------------------------------------------------------------------------------------


def linear_operands(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) with hidden weight^T + bias = module(hidden), differentiable in all parameters.

    LoRA on the head, z = x W^T + s D(x) A^T B^T, is one product over H + r columns: [x, s D(x) A^T] [W, B]^T. So its
    log-probs, its dropout D and the gradients of A and B are exact, with W never rounded to W + s B A. It costs a copy
    of W, and the third GEMM although W is frozen, because [W, B] is not.

    Raises:
        ValueError: an empty shard (ZeRO-3), sharded hidden states, or a module whose product is another.
    """
    _check(module)
    if hasattr(hidden, "full_tensor"):
        raise ValueError("hidden is a DTensor (sequence parallelism?); it takes a tensor that is whole on each rank")
    if _is_modules_to_save(module):
        return linear_operands(_active_copy(module), hidden)
    if hidden.dtype == torch.float32 and next(module.parameters()).dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.to(next(module.parameters()).dtype)  # as Mamba does between a fp32 residual and its LM head
    if not _is_lora(module):
        weight, bias = _plain(module)
        return hidden, weight, bias
    base: Any = module
    weight, bias = _plain(base.base_layer)
    if base.disable_adapters or base.merged:
        return hidden, weight, bias
    inputs, columns = [hidden], [weight]
    for name in base.active_adapters:
        if name in base.lora_A:
            a, b = base.lora_A[name], base.lora_B[name]
            x = base.lora_dropout[name](hidden).to(a.weight.dtype)
            inputs.append((base.scaling[name] * F.linear(x, a.weight)).to(hidden.dtype))
            columns.append(b.weight.to(weight.dtype))
            if b.bias is not None:
                extra = base.scaling[name] * b.bias
                bias = extra if bias is None else bias + extra
    return torch.cat(inputs, dim=-1), torch.cat(columns, dim=1), bias


def _check(module: nn.Module) -> None:
    if _is_modules_to_save(module):
        return _check(_active_copy(module))
    base = _base(module)
    found = f"its LM head is {type(module).__module__}.{type(module).__qualname__}"
    if module is not base:  # LoRA
        lora: Any = module
        variants = {
            *getattr(lora, "lora_variant", {}),
            *(name for name, on in getattr(lora, "use_dora", {}).items() if on),
        }
        if variants.intersection(lora.active_adapters):
            raise ValueError(f"{found} with a variant of LoRA (DoRA, ...); the fused head takes plain LoRA: leave the "
                             "LM head out of target_modules")
    # Subclasses with another forward compute something else (quantised weights, ...); FSDP's own ones keep it.
    if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
        hint = "; leave the LM head out of target_modules" if "peft" in type(module).__module__ else ""
        raise ValueError(f"{found}, the fused head takes a torch.nn.Linear (or LoRA around one){hint}")


def _base(module: Any) -> Any:
    """The linear layer inside PEFT's."""
    if _is_modules_to_save(module):
        return _base(_active_copy(module))
    return _base(module.base_layer) if _is_lora(module) else module


def _is_lora(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def _is_modules_to_save(module: nn.Module) -> bool:
    return type(module).__name__ == "ModulesToSaveWrapper"


def _active_copy(module: Any) -> nn.Module:
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _plain(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = _base(module).weight, _base(module).bias
    return _whole(weight, "weight"), None if bias is None else _whole(bias, "bias")


def _whole(parameter: Tensor, name: str) -> Tensor:
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"the LM head's {name} is partitioned by DeepSpeed ZeRO-3; use FSDP2, or ZeRO-2 or below")
    if parameter.numel() == 0:
        raise ValueError(
            f"the LM head's {name} is an empty shard {tuple(parameter.shape)}: call the wrapped model, whose forward "
            "gathers it, and not the module inside"
        )
    if hasattr(parameter, "full_tensor"):
        # A DTensor. FSDP2's are gathered by its hooks before the head's forward; what is left is tensor-parallel, where
        # every rank has the same hidden rows, so the gradient of the whole is the same everywhere and each keeps its
        # part. Each rank holds all of W and dW while the head works: V * H * (2 to 4) bytes twice.
        return parameter.full_tensor()
    return parameter


# ---------------------------------------------------------------------------------------------------------------------
# What is done with the logits, and its proof
# ---------------------------------------------------------------------------------------------------------------------


def _logit_maths(inner: Any) -> Iterator[tuple[float | None, float]]:
    """(softcap, logit_scale) that the configuration may mean, the likeliest first, each once."""
    config = inner.config.get_text_config()
    softcap = next((float(cap) for cap in (getattr(config, name, None) for name in _SOFTCAPS) if cap), None)
    given = [(meaning, getattr(config, name, None)) for name, meaning in _FACTORS.items()]
    choices = [meaning(float(value), config) for meaning, value in given if isinstance(value, int | float) and value]
    seen = set()
    for chosen in itertools.product(*choices):
        scale = float(math.prod(chosen))
        if scale > 0 and scale not in seen:
            seen.add(scale)
            yield softcap, scale


def _settled(
    inner: Any, z: Tensor, expected: Tensor, candidates: list[tuple[float | None, float]]
) -> tuple[float | None, float]:
    """The first candidate that makes `expected` of the head's output z, both [1, L, V]."""
    what = type(inner).__name__
    if z.shape != expected.shape:
        raise ValueError(f"{what}: its LM head gives {z.shape[-1]} logits a token, of which it returns "
                         f"{expected.shape[-1]}; the fused head takes them all")
    tolerance, sixteen = _tolerance(z), z.element_size() == 2
    z, expected = z.cpu().double(), expected.cpu().double()  # MPS has no float64
    if not expected.any():  # an LM head of zeros would prove anything
        return _undoubted(inner, candidates)
    errors = []
    for softcap, scale in candidates:
        logits = scale * z
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        off = (logits - expected).abs().amax(-1) / expected.abs().max().clamp(min=1e-6)  # of each token
        # in 16 bits another length sends single tokens to other experts, where two are nearly as good
        errors.append(float(off.median() if sixteen else off.max()))
        if errors[-1] < tolerance:
            return softcap, scale
    names = ", ".join((*_FACTORS, *_SOFTCAPS))
    raise ValueError(
        f"{what}: trunk and LM head do not give its logits (relative difference {min(errors):.1g}); it computes them "
        f"in a way that the fused head does not know (looked for {names} in its config), or does not attend causally"
    )


def _tolerance(x: Tensor) -> float:
    """16-bit models round the logits once or twice on the way, and the second pass has another length."""
    return 1e-3 if x.dtype in (torch.float32, torch.float64) else 3e-2


def _undoubted(inner: Any, candidates: list[tuple[float | None, float]]) -> tuple[float | None, float]:
    if len(candidates) > 1:
        scales = " or ".join(f"{scale:g}" for _, scale in candidates)
        raise ValueError(
            f"{type(inner).__name__}: its config may mean a logit scale of {scales}, which only a forward pass with "
            "weights can tell; take it apart before it is sharded"
        )
    return candidates[0]


def _runs(inner: nn.Module) -> bool:
    """Whether this process alone can run the model: its weights are real and whole."""
    return all(
        not p.is_meta and p.numel() > 0 and not hasattr(p, "full_tensor") and not hasattr(p, "ds_id")
        for p in inner.parameters()
    )


def _some_tokens(inner: Any, module: nn.Module) -> Tensor:
    """[1, 12] ids that both the embedding and the head have."""
    embedding = inner.get_input_embeddings()
    count = min(_base(module).out_features, getattr(embedding, "num_embeddings", 1 << 62))
    device = next(embedding.parameters()).device
    return torch.randint(count, (1, 12), generator=torch.Generator().manual_seed(0)).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` runs where the module's own would: between its hooks, by which FSDP, DeepSpeed and accelerate gather
    its weights. (accelerate puts the hooks themselves in `forward` and the module's own in `_old_forward`.)"""
    own = vars(module)
    slot = "_old_forward" if "_old_forward" in own else "forward"
    before = own.get(slot)
    own[slot] = forward
    try:
        yield
    finally:
        if before is None:
            del own[slot]
        else:
            own[slot] = before


def router_coefficient(model: Any) -> float:
    """The weight of the router's loss."""
    names, places = ("router_aux_loss_coef", "aux_loss_coef"), (model, model.config.get_text_config())
    given = (getattr(place, name, None) for name in names for place in places)
    found = next((value for value in given if value is not None), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__}: returns a router loss but no weight for it (looked for {' and '.join(names)})"
        )
    return float(found)
