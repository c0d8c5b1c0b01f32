"""What a model's name stands for: a model, or a LoRA adapter and the model it belongs to. Both are read strictly.

Of what a checkpoint lacks transformers makes random numbers, and what an adapter lacks peft leaves as new, with a
warning; here every tensor comes from the files.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import cached_file, find_adapter_config_file

from fastpref.data.sources import is_path
from fastpref.errors import UserError, first_line, refuse

from .config import FULL_RATE, LORA_RATE, TrainConfig
from .keys import no_such_key

LOG = logging.getLogger("fastpref")
HUB = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False,
       "_raise_exceptions_for_gated_repo": False}


@dataclass(frozen=True)
class Source:
    """Folders or hub ids."""

    model: str
    revision: str = "main"
    adapter: str | None = None  # on that model
    adapter_revision: str = "main"
    settings: Mapping[str, Any] = field(default_factory=dict)  # the adapter's adapter_config.json

    @property
    def tokenizer(self) -> tuple[str, str]:
        """Whose tokenizer it is, and its revision: the adapter's, where one was saved with it."""
        if self.adapter and cached_file(self.adapter, "tokenizer_config.json", revision=self.adapter_revision, **HUB):
            return self.adapter, self.adapter_revision
        return self.model, self.revision


def source_of(name: str, revision: str = "main") -> Source:
    """Raises UserError for a path that is no folder, and for an adapter whose model cannot be told."""
    check_folder(name)
    try:
        path = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):  # neither a folder nor on the hub: whoever loads it says so
        path = None
    if path is None:
        return Source(name, revision)
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if any(Path(name).glob("model*.safetensors")):
        raise UserError(f"{name}: has an adapter and a whole model; it takes one of them: move the other elsewhere")
    if not base:
        raise UserError(f"{path}: does not say which model the adapter belongs to: set base_model_name_or_path there")
    if (Path(base) / "adapter_config.json").is_file():
        raise UserError(f"{name}: its model {base} is an adapter itself: merge that one first")
    return Source(base, settings.get("revision") or "main", name, revision, settings)


def check_folder(name: str) -> None:
    """Raises UserError for what is a path and no hub id (owner/name), where there is no such folder: a hub would be
    asked for it again and again."""
    if (is_path(name) or os.path.isfile(name)) and not os.path.isdir(name):
        what = "a file, no folder of a model" if os.path.isfile(name) else "no such folder"
        if name.startswith("~") and os.path.isdir(os.path.expanduser(name)):
            what += f"; {os.path.expanduser(name)} is there"
        raise UserError(f"{name}: {what}")


def source_of_run(config: TrainConfig) -> Source:
    """Of `model_name_or_path`. Raises UserError where the configuration does not go with what is there."""
    name = config.model_name_or_path
    source = source_of(name, config.model_revision)
    if config.merge_adapter and not source.adapter:
        raise UserError(f"merge_adapter: {name} is no adapter (there is no adapter_config.json)")
    if not source.adapter:
        return source
    if config.init_from_config:
        raise UserError(f"init_from_config makes random weights, and {name} is an adapter: set one of them")
    if not (config.use_peft or config.merge_adapter):
        raise UserError(f"{name} is an adapter on {source.model}: set use_peft=true to go on training the adapter, or "
                        "merge_adapter=true to train the model that the two are together")
    if not config.merge_adapter:
        refuse((config.peft, f"peft has settings of a new adapter, and {name} goes on training with its own: leave it "
                "out, or set merge_adapter=true for a new adapter"))
        for key, theirs in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_target_modules", "target_modules")):
            own, there = getattr(config, key), source.settings.get(theirs)
            same = set(own) == set(there or ()) if isinstance(own, tuple) else own == there
            if own != TrainConfig.__dataclass_fields__[key].default and not same:
                raise UserError(f"{key} is {own}, and {there} in the adapter {name}, which goes on training: leave it "
                                "out, or set merge_adapter=true for a new adapter")
    return source


def goes_on_with_adapter(config: TrainConfig) -> bool:
    """Whether what is trained is the adapter that `model_name_or_path` is."""
    return config.use_peft and not config.merge_adapter and source_of_run(config).adapter is not None


def adapter_lines(config: TrainConfig) -> list[str]:
    """What the log says of adapters among the models: one line each."""
    found = []
    rates = [stage.learning_rate or 0.0 for stage in config.stage_configs()] if config.use_peft else []
    if any(0 < rate <= FULL_RATE for rate in rates):
        found.append(f"learning_rate {min(rates):g} is one of full weights; LoRA takes about ten times as much "
                     f"({LORA_RATE:g} where none is set)")
    if (source := source_of_run(config)).adapter:
        then = f"merged into {source.model}" if config.merge_adapter else f"on {source.model}, goes on training"
        found.append(f"adapter {source.adapter} (r {source.settings.get('r')}): {then}")
    for name in sorted({stage.ref_model_name_or_path or "" for stage in config.stage_configs()} - {""}):
        if (source := source_of(name)).adapter:
            found.append(f"adapter {source.adapter} on {source.model}: the reference")
    return found


# ---- weights ---------------------------------------------------------------------------------------------------------


def load_whole(auto: Any, name: str, *, new_score: bool = False, **options: Any) -> Any:
    """`auto.from_pretrained`. new_score: a reward model's score layer may be missing, and is then random.

    Raises ValueError for a tensor that the files lack, have in another shape, or have of a layer that config.json does
    not name; and whatever `from_pretrained` raises.
    """
    with _without_report():
        model, found = auto.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for key, there, here in sorted(found["mismatched_keys"]):
        raise ValueError(f"its weights have {key} as {tuple(there)}, config.json as {tuple(here)}")
    missing = {key for key in found["missing_keys"] if not new_score or "." in key.partition(".")[2]}
    if missing:  # more than NAME.weight and NAME.bias of a new score layer
        raise ValueError(f"its weights lack {some(missing)}")
    left = set(found["unexpected_keys"])
    known = {_any_layer(key) for key in model.state_dict()}
    if beyond := {key for key in left if _any_layer(key) in known}:
        raise ValueError(f"its weights have {some(beyond)}, of which config.json says nothing")
    if left and not new_score:  # where a causal LM becomes a reward model its LM head is left, and should be
        LOG.warning("%s: %s: not used, the model has no such weights", name, some(left))
    return model


def check_whole(auto: Any, name: str, **options: Any) -> None:
    """`load_whole` without the weights, from what the headers of the files say; of a local folder that has some."""
    if any(Path(name).glob("*.safetensors*")) and importlib.util.find_spec("accelerate"):
        load_whole(auto, name, device_map="meta", **options)


def put_adapter(model: Any, name: str, revision: str = "main", *, reward: bool = False, new_score: bool = False,
                dropout: float | None = None, merge: bool = False) -> Any:
    """A PeftModel of `model` with the adapter in `name`, which is trainable. reward: whether it is a sequence
    classifier; new_score: whose score layer may be missing; dropout: instead of the adapter's. merge: the adapter added
    to the weights, and no PeftModel.

    Raises ValueError for an adapter that is not LoRA, or not of this model: weights that are missing, left over, or of
    another shape; and for one that has other weights beside (resized or trained embeddings), unless it is merged.
    """
    peft = need_peft()
    settings = peft.PeftConfig.from_pretrained(name, revision=revision)
    if settings.peft_type != "LORA":
        raise ValueError(f"it is of type {getattr(settings.peft_type, 'value', settings.peft_type)}; it takes LoRA")
    settings.inference_mode, settings.task_type = False, "SEQ_CLS" if reward else "CAUSAL_LM"
    if dropout is not None:
        settings.lora_dropout = dropout
    weights = peft.utils.load_peft_weights(name, device="cpu", revision=revision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model has another name here; that meta tensors take no values
        model = peft.get_peft_model(model, settings)
        own, every = peft.get_peft_model_state_dict(model, save_embedding_layers=False), model.state_dict()
        beside = {key for key in weights if key in every and key not in own}
        if other := {key for key in beside if weights[key].shape != every[key].shape}:
            raise ValueError(f"it has {some(other)} beside the adapter, in another shape than the model. Were tokens "
                             "added with it? Then resize the model, merge the two with peft, and start from that")
        changed = {key for key in beside if not _same(weights[key], every[key])}
        if changed and not merge:
            raise ValueError(f"it has {some(changed)} beside the adapter, other than the model's, which would be lost "
                             "where the adapter goes on training: set merge_adapter=true")
        score = {key: value for key, value in own.items() if "lora_" not in key} if new_score else {}
        try:
            found = peft.set_peft_model_state_dict(model, score | weights)
        except KeyError as error:
            raise ValueError(f"it lacks {error.args[0]}") from None
        except RuntimeError as error:  # a headline, and a line for each tensor
            raise ValueError(str(error).strip().splitlines()[-1].strip()) from None
    if found.unexpected_keys:
        raise ValueError(f"the model has no place for its {some(found.unexpected_keys)}")
    if missing := [key for key in found.missing_keys if ".default" in key]:  # peft's name of the adapter
        raise ValueError(f"it lacks {some(missing)}")
    if not merge:
        return model
    whole = model.merge_and_unload(safe_merge=not next(model.parameters()).is_meta)  # safe: no weight becomes NaN
    return whole.requires_grad_(True)


def need_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("adapters need the package peft: pip install peft") from None
    return peft


# peft's ways to begin that change the base: W - B A in place of W, so that the adapter switched off is no reference
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OURS = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
         "target_modules": "lora_target_modules"}
_SET_BY_THE_RUN = ("task_type", "inference_mode", "peft_type", "base_model_name_or_path", "revision", "auto_mapping")
# What acts outside the layers that it is beside: in PeftModel.forward, which the trunk does not go through, in a loss
# of its own, in another number of layers.
_OUTSIDE = ("alora_invocation_tokens", "arrow_config", "monteclora_config", "velora_config", "kasa_config",
            "use_bdlora", "megatron_config", "layer_replication", "use_qalora")


def lora_config(config: TrainConfig) -> Any:
    """peft's settings of a new adapter: those of `peft` under its names, the rest of the keys lora_*. Raises UserError
    for what peft does not know or refuses, and for what the reference or the loop could not keep."""
    peft = need_peft()
    given, known = dict(config.peft), {f.name for f in fields(peft.LoraConfig)}
    for name in given:
        if name not in known:
            raise no_such_key(name, "peft.", known)
        refuse((name in _SET_BY_THE_RUN, f"peft.{name}: is set by the run: leave it out"),
               (name in _OUTSIDE and given[name], f"peft.{name}: acts elsewhere than in the layers that an adapter is "
                "beside, which is all that runs here: leave it out"))
    for name, ours in _OURS.items():
        default = TrainConfig.__dataclass_fields__[ours].default
        refuse((name in given and getattr(config, ours) != default,
                f"peft.{name} and {ours} say the same: set one of them"))
    begins = str(given.get("init_lora_weights", True)).lower()
    refuse(
        (given.get("bias", "none") != "none", f"peft.bias is {given.get('bias')!r}, which trains the base's own "
         "biases: the adapter switched off would be no reference; leave it out"),
        (begins.startswith(_CHANGES_BASE),
         f"peft.init_lora_weights is {begins!r}, which changes the base weights: the adapter switched off would be no "
         "reference, and the saved adapter would not fit the base; make base and adapter with peft, save the changed "
         "base, and the adapter with init_lora_weights=True, and go on with that (model_name_or_path)"),
        (begins == "eva", "peft.init_lora_weights is 'eva', which begins from activations that the run does not "
         "give it: initialise the adapter with peft, save it, and go on with it (model_name_or_path)"),
    )
    targets = list(config.lora_target_modules or ()) or ["all-linear"]
    defaults = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.adapter_dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }
    # of a classifier peft trains and saves the score layer too, whole
    task = "SEQ_CLS" if config.reward_model else "CAUSAL_LM"
    try:
        return peft.LoraConfig(task_type=task, **defaults | given)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {first_line(error)}") from None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """As far as can be told: b may be on the meta device."""
    return a.shape == b.shape and (b.is_meta or torch.equal(a.to(b), b))


def some(names: Collection[str]) -> str:
    """The first of them, and how many there are beside."""
    return min(names) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _any_layer(key: str) -> str:
    return re.sub(r"\d+", "*", key)


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a table of what is new and what is left over."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
