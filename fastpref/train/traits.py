"""What a model brings along that would make training compare two different things, seen from its configuration and its
modules: noise in train mode, positions that it does not have, rotary factors that follow the longest row of a batch.

Nothing here names a family where a name, a type or a tensor tells.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpref.errors import UserError
from fastpref.trunk import unwrap

from .quantized import numbers, parameters_of

# ---- noise -----------------------------------------------------------------------------------------------------------

_DROPOUT = nn.modules.dropout._DropoutNd  # what nn.Dropout and its relatives are


def noise_of(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """(module or configuration, attribute, value) of everything random in train mode: dropout of modules, of numbers
    that a forward pass reads from its module or from the configuration (Falcon), of whole layers; routers' jitter."""
    for module in model.modules():
        for name, value in vars(module).items():
            rate = "drop" in name or (name == "p" and isinstance(module, _DROPOUT))
            if isinstance(value, float) and value and (rate or ("jitter" in name and not _is_quiet(module))):
                yield module, name, value
    for config in _configs(unwrap(model).config):
        for name, value in vars(config).items():
            if isinstance(value, float) and value and "drop" in name:
                yield config, name, value


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def hush(model: Any, *, noise: bool = True) -> None:
    """Switches all of it off: a preference loss compares log-probs of two models, and would compare noise. Only for
    training: `save_config` writes what the configuration said before.

    A router with jitter stays in evaluation mode: PhiMoE's also samples its experts in train mode, and reads the number
    as a threshold in both. RWKV divides weights in evaluation mode, for fp16's range, and would be saved so: off in any
    case.
    """
    changed: list[tuple[Any, str, Any]] = model.__dict__.setdefault("fastpref_said", [])
    for owner, name, value in list(noise_of(model)) if noise else ():
        if "jitter" in name:
            owner.register_forward_pre_hook(_evaluate)
            continue
        if not isinstance(owner, nn.Module):
            changed.append((owner, name, value))
        setattr(owner, name, 0.0)
    if getattr(model.config, "rescale_every", 0):
        changed.append((model.config, "rescale_every", model.config.rescale_every))
        model.config.rescale_every = 0


def _evaluate(module: nn.Module, args: Any) -> None:
    module.training = False


def _is_quiet(module: nn.Module) -> bool:
    return _evaluate in module._forward_pre_hooks.values()


def save_config(model: Any, folder: Path) -> None:
    """The configuration as the model came with it, where `hush` has changed it."""
    inner = unwrap(model)
    changed = inner.__dict__.get("fastpref_said")
    if not changed:
        return
    memo: dict[int, Any] = {}
    config = copy.deepcopy(inner.config, memo)
    for owner, name, value in changed:
        setattr(memo.get(id(owner), config), name, value)
    config.save_pretrained(folder)


# ---- positions -------------------------------------------------------------------------------------------------------

# GPT-2's wpe, OPT's embed_positions, GPT-1's positions_embed, GPT-J's and CodeGen's tables of angles, CTRL's
# pos_encoding; not XGLM's, which grows
_TABLE = re.compile(r"(^|\.)(wpe|pos\w*_embed\w*|embed_pos\w*|pos_enc\w*)(\.weight)?$")


def positions_of(config: Any) -> int | None:
    """How many positions a model was made for; None: no such number (ALiBi of BLOOM, Mamba)."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    for rope in _ropes(text):
        scaled = rope.get("factor") if rope.get("rope_type") in ("linear", "dynamic", "yarn") else None
        if found and scaled:  # the number may be the one before scaling
            found = max(found, int(scaled * rope.get("original_max_position_embeddings", found)))
    return found if isinstance(found, int) else None


def has_table(model: nn.Module, positions: int) -> bool:
    """Whether positions are rows of a table, so that there are no more of them. (OPT's table has two rows before.)"""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return unwrap(model).config.model_type == "mpt" or any(  # whose ALiBi is made for so many keys
        _TABLE.search(name) and tensor.ndim == 2 and positions <= len(tensor) <= positions + 4
        for name, tensor in tensors
    )


# ---- rotary factors that follow a batch ------------------------------------------------------------------------------


def _ropes(text: Any) -> Sequence[dict[str, Any]]:
    """What a configuration says of rotary embeddings; of several kinds of layers each for itself."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [part for part in found.values() if isinstance(part, dict)] or [found]


def _follows(kind: Any) -> bool:
    return kind == "longrope" or "dynamic" in str(kind)


def follows_length(config: Any) -> bool:
    """Whether the rotary factors depend on the longest row of a batch (LongRoPE, dynamic NTK)."""
    return any(_follows(rope.get("rope_type", rope.get("type"))) for rope in _ropes(config.get_text_config()))


@torch.no_grad()
def fix_rope(model: Any, length: int) -> str:
    """Takes the factors of a batch of `length` positions for every batch; "" where they do not depend on it. Returns
    which. Raises UserError for a model whose factors still do."""
    config = unwrap(model).config
    if not follows_length(config):
        return ""
    said = ""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            if _follows(kind) and hasattr(module, "config"):
                said = _fix(module, layers, kind, length)
                if layers is None and not module.inv_freq.is_meta:
                    _prove(module, length)
    if not said:
        raise UserError(f"{type(unwrap(model)).__name__}: its rotary factors follow the longest row of a batch, "
                        "and are made by code of its own: set another rope_type in config.json")
    return said


def _fix(module: Any, layers: str | None, kind: Any, length: int) -> str:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix, options = (f"{layers}_", {"layer_type": layers}) if layers else ("", {})
    rope = module.config.rope_parameters[layers] if layers else module.config.rope_parameters
    original = rope.get("original_max_position_embeddings") or module.config.max_position_embeddings
    longest = length if kind == "longrope" else max(length, original)
    inv_freq = getattr(module, f"{prefix}inv_freq")
    made, _ = ROPE_INIT_FUNCTIONS[kind](module.config, inv_freq.device, seq_len=longest, **options)
    module.register_buffer(f"{prefix}inv_freq", made.to(inv_freq), persistent=False)
    for name in ("original_inv_freq", "long_inv_freq"):  # whichever it would go over to
        setattr(module, f"{prefix}{name}", made.to(inv_freq).clone())
    module.original_max_seq_len, module.max_seq_len_cached = 0, 1 << 60  # never back, never on
    setattr(module, f"{prefix}max_seq_len_cached", 1 << 60)
    which = "long" if longest > original else "short"
    if "short_mscale" in rope:  # PhiMoE has a second choice of its own
        module.config = copy.deepcopy(module.config)
        scale = rope[f"{which}_mscale"]
        module.config.rope_parameters |= {"short_mscale": scale, "long_mscale": scale}
    if kind == "longrope":
        return f"LongRoPE with its {which} factors for every batch (max_length {length:,}, {original:,} positions)"
    return f"dynamic NTK as for {longest:,} positions for every batch"


def _prove(module: Any, length: int) -> None:
    """The angles of the first positions are the same in a short and in a long batch."""
    x = torch.zeros(1, dtype=torch.float32, device=module.inv_freq.device)
    few = torch.arange(4, device=x.device)[None]
    far = torch.cat((few, few + 8 * max(length, getattr(module.config, "max_position_embeddings", 0))), dim=1)
    for short, long in zip(module(x, few), module(x, far)):
        if not torch.equal(short, long[:, :4]):
            raise UserError(f"{type(module).__name__}: its angles follow the longest row of a batch in a way that is "
                            "not known here: set another rope_type in config.json")


# ---- mixtures of experts ---------------------------------------------------------------------------------------------

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|gating|wg)(\.layer|\.classifier)?$")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def has_experts(model: Any) -> bool:
    settings = unwrap(model).config.get_text_config()
    configs = [settings, *(part for part in vars(settings).values() if hasattr(part, "to_dict"))]  # DBRX: ffn_config
    return any((getattr(config, name, None) or 0) > 1 for config in configs for name in _EXPERTS)


def is_router(model: Any, name: str) -> bool:
    """Whether a module tells which experts a token goes to."""
    return bool(_ROUTER.search(name)) and "att" not in name and has_experts(model)


def free_routers(model: Any) -> None:
    """Takes off a PeftModel what peft puts beside routers that are no linear layers ("all-linear", Mixtral)."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and is_router(model, name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
            settings = model.peft_config["default"]
            settings.target_parameters = [
                key for key in settings.target_parameters or () if not is_router(model, key.removesuffix(".weight"))
            ]


def adapted_share(model: Any) -> str:
    """Of a PeftModel: what share of the weights has an adapter beside it."""
    weights = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    total = parameters_of(model) - sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    experts, adapted = [p for p in weights.values() if p.ndim == 3], {}
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            base, name = module.get_base_layer(), getattr(module, "parameter_name", "weight")
            weight = getattr(base, name)
            adapted[id(weight)] = numbers(base) if name == "weight" else weight.numel()
    share = 100 * sum(adapted.values()) / total
    left = sum(p.numel() for p in experts if id(p) not in adapted)
    beside = f"; not beside experts' 3-D weights, {100 * left / total:.2g} % of all" if left else ""
    return f"LoRA beside {share:.2g} % of the weights{beside}"
