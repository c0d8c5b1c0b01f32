"""TRL's configs read: the loss they ask for, and what of them is refused, by name and with what to use instead
(docs/refusals.py lists it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig

from fastpref import losses
from fastpref.losses import Loss

# Options of DPOConfig that a loss takes, by its `loss_type`: TRL's name and ours.
_DIVERGENCE = {"f_divergence_type": "f_divergence", "f_alpha_divergence_coef": "f_alpha_divergence_coef"}
_SMOOTHING = {"label_smoothing": "label_smoothing"}
_BETA = {"beta": "beta"}
DPO_LOSSES: dict[str, tuple[str, dict[str, str]]] = {
    "sigmoid": ("dpo", _BETA | _DIVERGENCE),
    "sigmoid_norm": ("dpo_norm", _BETA | _DIVERGENCE),
    "robust": ("robust", _BETA | _DIVERGENCE | _SMOOTHING),
    "hinge": ("hinge", _BETA | _DIVERGENCE),
    "ipo": ("ipo", _BETA | _DIVERGENCE),
    "exo_pair": ("exo_pair", _BETA | _DIVERGENCE | _SMOOTHING),
    "discopop": ("discopop", _BETA | _DIVERGENCE | {"discopop_tau": "tau"}),
    "nca_pair": ("nca_pair", _BETA),
    "bco_pair": ("bco_pair", _BETA),
    "sppo_hard": ("sppo_hard", _BETA),
    "apo_zero": ("apo_zero", _BETA),
    "apo_down": ("apo_down", _BETA),
    "aot": ("aot", _BETA | _SMOOTHING),
    "aot_unpaired": ("aot_unpaired", _BETA | _SMOOTHING),
    "sft": ("chosen_sft", {}),
}
KTO_LOSSES = ("kto", "apo_zero_unpaired")
AVERAGED = ("ipo", "sigmoid_norm")  # divide by the lengths of the responses

# What the configs have beyond TrainingArguments: honoured here or by code of TRL's that stays, or refused below.
KNOWN = frozenset(
    "activation_offloading beta dataset_num_proc desirable_weight disable_dropout discopop_tau f_alpha_divergence_coef "
    "f_divergence_type label_smoothing ld_alpha loss_type loss_weights max_length model_init_kwargs pad_to_multiple_of "
    "pad_token padding_free precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha "
    "ref_model_sync_steps router_aux_loss_coef sync_ref_model truncation_mode trust_remote_code undesirable_weight "
    "use_weighting".split()
)

_INSTEAD = "use TRL's own trainer with fastpref.integrations.trl.patch()"


def dpo_loss(config: DPOConfig) -> Loss:
    """TRL's sum over `loss_type` of `loss_weights` times their means over pairs, weighted as in WPO if asked for."""
    parts = []
    for loss_type in config.loss_type:
        name, options = DPO_LOSSES[loss_type]
        parts.append(losses.get_loss(name, **{ours: getattr(config, theirs) for theirs, ours in options.items()}))
    weights = config.loss_weights or [1.0] * len(parts)
    loss = parts[0] if weights == [1.0] else losses.WeightedSum(tuple(parts), tuple(weights))
    return losses.WPO(loss) if config.use_weighting else loss


def kto_loss(config: KTOConfig) -> Loss:
    names = ("beta", "desirable_weight", "undesirable_weight")
    return losses.get_loss(config.loss_type, **{name: getattr(config, name) for name in names})


def refuse_config(config: Any) -> None:
    """ValueError for what the fused trainers do not do, and for what TRL would take without effect."""
    if config.label_smoothing_factor:
        _refuse("label_smoothing_factor", config.label_smoothing_factor, "it has no effect on preference losses: use "
                "DPOConfig(loss_type='robust', label_smoothing=...)")
    plugin = config.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        _refuse("deepspeed", "ZeRO-3", "it shards the LM head: use ZeRO-1, ZeRO-2 or FSDP2")
    known = {field.name for field in fields(TrainingArguments)} | KNOWN
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in known and getattr(config, field.name) not in (default, None):
            _refuse(field.name, getattr(config, field.name), f"a newer TRL has it and fastpref has not: leave it "
                    f"{default!r}, or {_INSTEAD}")
    if isinstance(config, DPOConfig):
        _refuse_dpo(config)
        return
    if config.loss_type not in KTO_LOSSES:
        _refuse("loss_type", config.loss_type, f"it takes {', '.join(KTO_LOSSES)}")
    kto_loss(config)  # a number outside its range is named here, before anything is loaded


def _refuse_dpo(config: DPOConfig) -> None:
    types = config.loss_type
    for loss_type in types:
        if loss_type not in DPO_LOSSES:
            own = f"; {loss_type!r} is a loss of `fastpref train` and of fp.linear_preference_loss"
            _refuse("loss_type", loss_type, f"it takes {', '.join(DPO_LOSSES)}"
                    + (own if loss_type in losses.CLASSES else ""))
    if config.padding_free:
        _refuse("padding_free", True, "TRL falls back to padding; leave it False (prompts and padding cost the "
                "fused head nothing)")
    used = {option for loss_type in types for option in DPO_LOSSES[loss_type][1]}
    if config.f_divergence_type != "alpha_divergence":
        used.discard("f_alpha_divergence_coef")
    for option, default, instead in (
        ("label_smoothing", 0.0, "loss_type 'robust', 'exo_pair', 'aot' or 'aot_unpaired'"),
        ("discopop_tau", 0.05, "loss_type 'discopop'"),
        ("f_alpha_divergence_coef", 0.5, "f_divergence_type='alpha_divergence'"),
    ):
        value = getattr(config, option)
        if option not in used and value != default:
            _refuse(option, value, f"it has no effect with loss_type {types}: use {instead}, or leave it {default}")
    if config.ld_alpha is not None:
        if not 0 <= config.ld_alpha <= 1:
            _refuse("ld_alpha", config.ld_alpha, "it takes a number in [0, 1]")
        # One pass sums each sequence's log-probs once, with their weights; these would need them without.
        if "sft" in types:
            _refuse("ld_alpha", config.ld_alpha, f"TRL does not apply it to loss_type 'sft': {_INSTEAD}")
        if config.use_weighting:
            _refuse("ld_alpha", config.ld_alpha, f"TRL does not apply it to use_weighting's weights: {_INSTEAD}")
    if config.use_weighting:
        for loss_type in ("sft", "aot", "aot_unpaired"):
            if loss_type in types:
                _refuse("use_weighting", True, f"loss_type {loss_type!r} is no mean over pairs: leave one of them out")
    dpo_loss(config)


def refuse_data(train_dataset: Any) -> None:
    """ValueError for images, which TRL looks for in the same way."""
    columns = getattr(train_dataset, "column_names", None) or next(iter(train_dataset or ()), ())
    for column in ("image", "images"):
        if column in columns:
            raise ValueError(f"train_dataset has a column {column!r}; the fused trainers take text: {_INSTEAD}")


def refuse_prompt_learning(configs: Mapping[str, Any]) -> None:
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            _refuse(name, config.peft_type.value, f"its virtual tokens move the targets: use LoRA, or {_INSTEAD}")


def _refuse(option: str, value: object, instead: str) -> None:
    raise ValueError(f"{option} is {value!r}; {instead}")
