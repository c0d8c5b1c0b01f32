"""The configuration of a run: one YAML file plus `key=value` overrides. Names are TRL's where TRL has one.

A run is one stage or several, one after the other, each starting from the weights the former ended with:

    model_name_or_path: meta-llama/Llama-3.1-8B
    train_dataset: pairs.jsonl
    learning_rate: 5e-7                  # holds for every stage that does not set its own
    stages:
      - {name: sft, loss: sft, learning_rate: 1e-5}
      - {name: rpo, loss: rpo, beta: 0.05, eta: 0.005}
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastpref import losses
from fastpref.data import Kind
from fastpref.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Every key of a configuration file, with its default. Lengths are in tokens; a step is an optimiser step.

    A loss's own options (beta, eta, label_smoothing, ...) are keys too and end up in `loss_options`; one that no
    stage's loss takes is an error. What may be left to the program is `None` by default.
    """

    # model: the same for every stage
    model_name_or_path: str  # hub id, or a local folder
    model_revision: str = "main"  # of a hub id: branch, tag or commit
    tokenizer_name_or_path: str | None = None  # None: the model's
    init_from_config: bool = False  # random weights from the folder's config.json instead of its weights
    chat_template: str | None = None  # a file, or chatml; None: the tokenizer's
    trust_remote_code: bool = False  # run Python code that comes with the model
    disable_dropout: bool = True  # the model's own dropout and router jitter are off
    use_peft: bool = False  # train a LoRA adapter; the weights stay as they are
    merge_adapter: bool = False  # where model_name_or_path is an adapter: add it to its model first, and train that
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float | None = None  # None: 0 if a stage's loss has a reference (which has none), else 0.05
    lora_target_modules: tuple[str, ...] | None = None  # None: every linear layer but the LM head
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; LoRA's adapter is float32 in any case
    bf16: bool | None = None  # autocast over fp32 weights; None: on a GPU that has it
    # Activations made again in the backward pass. selective: all but the matrix products; full: all (true);
    # offload: as full, and what a layer starts from waits in host memory
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = "none"
    use_liger_kernel: bool = False  # liger-kernel's RMSNorm, RoPE and SwiGLU; on a GPU, where it knows the model
    # Batches without padding, for which the model's attention must be replaced. None: where that is possible
    packing: bool | None = None
    prefix_sharing: bool = True  # packed: equal prompts once a micro-batch (LoRA's dropout is then the same for them)
    fsdp: bool | None = None  # weights sharded over the processes that torchrun started; None: if there are several
    dp_replicate: int = 1  # so many groups of processes each hold the whole model (HSDP: one a node)

    # run
    output_dir: str = field(kw_only=True)
    overwrite_output_dir: bool = False  # start over in a folder that holds a run
    reference_dir: str | None = None  # of cached reference log-probs, for several runs; None: output_dir/reference
    seed: int = 42
    report_to: tuple[str, ...] = ()  # "tensorboard", "wandb"
    logging_steps: int = 10
    save_steps: int = 500  # 0: only where a stage ends, and when stopped
    save_total_limit: int | None = 2  # older checkpoints are removed; None: all stay

    # data
    train_dataset: Any = field(kw_only=True)  # what data.load_records takes: a file, a data set, a list of them
    eval_dataset: Any = None
    dataset_streaming: bool = False  # train_dataset: read only its first records, as many as max_steps take
    max_length: int = 1024  # prompt + longest response
    max_prompt_length: int | None = None
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_end"  # of a prompt that is too long
    overlong_response: Literal["error", "drop", "truncate"] = "error"
    train_on: Literal["assistant", "all"] = "assistant"  # of a response: the model's turns alone, or every token
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for every record that does not set its own
    chat_template_date: str | None = None  # what strftime_now in a template tells; None: the day the run began
    # Control tokens that stand in what users and tools say (<|im_end|>) are text like any other; false: tokens
    sanitize_control_tokens: bool = False
    # Of a record that cannot be read, or that the chat template refuses: drop counts them and names the first ten
    invalid_records: Literal["error", "drop"] = "error"

    # stage
    name: str | None = None  # None: the loss's
    loss: str = "dpo"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    ref_model_name_or_path: str | None = None  # None: the policy as the stage found it
    check_reference: bool = True  # before step 1: what a training step scores has to agree with that policy
    per_device_train_batch_size: int | None = None  # examples (pairs) a micro-batch; None: 8, or what its tokens allow
    max_tokens_per_batch: int | None = None  # a micro-batch is filled up to so many tokens; None: no such limit
    gradient_accumulation_steps: int = 1  # micro-batches a step, on all GPUs together: their number changes no result
    num_train_epochs: float = 1.0
    max_steps: int = -1  # above 0: so many, whatever the epochs
    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # of the stage's steps; warmup_steps comes first
    # None: adamw_torch_8bit (stochastic rounding) for bfloat16 weights, else adamw_torch_fused
    optim: Literal["adamw_torch_fused", "adamw_torch_8bit", "adamw_fp32_master", "adamw_offload"] | None = None
    optim_in_backward: bool = False  # update each weight as soon as its gradient is there, then free the gradient
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    max_skipped_steps: int = 5  # so many steps in a row with NaN or inf gradients end the run
    memory_budget: int | None = None  # bytes of workspace for the LM head; None: its own default
    tail: Literal["exact", "rank1"] = "exact"  # of the LM head's gradients: of all vocabulary columns, or of few (CPU)

    # evaluation, at the stage's start, its end, and every eval_steps
    eval_steps: int | None = None
    per_device_eval_batch_size: int = 8
    eval_generate: bool = False  # exact match of greedy generations, at the stage's start and end
    eval_max_new_tokens: int = 128
    eval_generate_samples: int | None = None  # the first so many held-out prompts; None: all

    # watch on over-optimisation: KL and reward of responses that the policy samples now
    sample_steps: int | None = None  # every so many steps, and at the stage's end; None: never
    sample_prompts: int = 32  # a response to each of the first so many held-out prompts (without any: training prompts)
    sample_max_new_tokens: int = 128
    # Of the time of the training steps, the most that samples may take; what is due then waits. None: no limit, and the
    # stage's start is sampled too
    sample_time_share: float | None = 0.1
    scorer: str | None = None  # of the samples: module:function, the folder of a reward model, or implicit:FOLDER
    scorer_timeout: float | None = 10.0  # seconds that a module:function may take for a response; None: no limit
    # Nats a response: the stage keeps its first checkpoint with this KL to the reference, of fresh samples where there
    # are any, else of held-out responses where there is eval_steps, else of the training responses
    kl_budget: float | None = None
    kl_budget_action: Literal["stop", "continue"] = "stop"  # at the budget: the stage ends, or goes on

    stages: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for key, value, ok, takes in (
            *((k, getattr(self, k), getattr(self, k) >= 1, "at least 1") for k in _AT_LEAST_1),
            *((k, getattr(self, k), getattr(self, k) >= 0, "at least 0") for k in _AT_LEAST_0),
            *((k, v, v is None or v >= 1, "at least 1") for k in _NONE_OR_1 for v in (getattr(self, k),)),
            ("max_length", self.max_length, self.max_length >= 2, "at least 2"),
            ("num_train_epochs", self.num_train_epochs, self.num_train_epochs > 0, "above 0"),
            ("max_steps", self.max_steps, self.max_steps == -1 or self.max_steps >= 1, "-1 or at least 1"),
            ("warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio <= 1, "0 to 1"),
            ("adam_beta1", self.adam_beta1, 0 <= self.adam_beta1 < 1, "0 to below 1"),
            ("adam_beta2", self.adam_beta2, 0 <= self.adam_beta2 < 1, "0 to below 1"),
            ("lora_dropout", self.lora_dropout, 0 <= (self.lora_dropout or 0) < 1, "0 to below 1"),
            ("sample_prompts", self.sample_prompts, self.sample_prompts >= 2, "at least 2"),
            *((k, v, v is None or v > 0, "above 0") for k in _NONE_OR_POSITIVE for v in (getattr(self, k),)),
        ):
            if not ok:
                raise UserError(f"{key} is {value!r}; it takes {takes}")
        if self.chat_template_date is not None:
            try:
                datetime.date.fromisoformat(self.chat_template_date)
            except ValueError:
                raise UserError(f"chat_template_date is {self.chat_template_date!r}; it takes a date as 2026-01-31"
                                ) from None
        for target in self.report_to:
            if target not in ("tensorboard", "wandb"):
                raise UserError(f"report_to is {target!r}; it takes tensorboard, wandb or none")
        if self.use_peft and self.init_from_config:
            raise UserError("use_peft adapts pretrained weights; init_from_config makes random ones: set one of them")
        if self.packing is False and self.max_tokens_per_batch:
            raise UserError("max_tokens_per_batch fills packed batches, and packing is False: set one of them")
        if not self.stages:  # with stages, each is checked as it is made
            self._check_optimizer()
            if self.dataset_streaming and self.max_steps < 1:
                raise UserError("dataset_streaming reads as much of train_dataset as max_steps take: set max_steps (a "
                                "stream has no length to count epochs by)")

    def _check_optimizer(self) -> None:
        bf16_weights = self.dtype == "bfloat16" and not self.use_peft
        if self.dtype == "bfloat16" and self.bf16 is False:
            raise UserError("bf16 is False, but dtype=bfloat16 computes in bf16: leave one of them out")
        if bf16_weights and self.optimizer == "adamw_torch_fused":
            raise UserError(
                "optim is 'adamw_torch_fused', which rounds bfloat16 weights to nearest: at learning rates of "
                "preference training nearly every update is lost; take adamw_torch_8bit or adamw_fp32_master, or "
                "dtype=float32"
            )
        if self.optimizer == "adamw_fp32_master" and not bf16_weights:
            raise UserError("optim is 'adamw_fp32_master', but the weights that are trained are fp32: "
                            "set dtype=bfloat16 (without use_peft), or optim=adamw_torch_fused")
        if self.optim_in_backward and self.optimizer == "adamw_offload":
            raise UserError("optim_in_backward: adamw_offload frees each gradient already; set one of them")
        if self.optim_in_backward or self.optimizer == "adamw_offload":
            what = "optim_in_backward" if self.optim_in_backward else "optim adamw_offload"
            if self.gradient_accumulation_steps > 1:
                raise UserError(
                    f"{what} frees each gradient as it comes, so none is left to add the next micro-batch's to: set "
                    f"gradient_accumulation_steps=1 (it is {self.gradient_accumulation_steps}) and a larger batch"
                )
            if self.max_grad_norm:
                raise UserError(
                    f"{what} frees each gradient before the norm of all of them is known: set max_grad_norm=0 (it is "
                    f"{self.max_grad_norm:g})"
                )

    @property
    def optimizer(self) -> str:
        """`optim`, or what stands for None."""
        bf16_weights = self.dtype == "bfloat16" and not self.use_peft
        return self.optim or ("adamw_torch_8bit" if bf16_weights else "adamw_torch_fused")

    @property
    def adapter_dropout(self) -> float:
        """`lora_dropout`, or what stands for None."""
        if self.lora_dropout is not None:
            return self.lora_dropout
        return 0.0 if any(stage.loss_fn.needs_reference for stage in self.stage_configs()) else 0.05

    @property
    def batch_size(self) -> int | None:
        """The most examples of a micro-batch; None: as many as max_tokens_per_batch holds."""
        return self.per_device_train_batch_size or (None if self.max_tokens_per_batch else 8)

    @property
    def loss_fn(self) -> losses.Loss | losses.BradleyTerry:
        if self.reward_model:
            return losses.BradleyTerry(**self.loss_options)
        return losses.get_loss(self.loss, **self.loss_options)

    @property
    def reward_model(self) -> bool:
        """Whether what is trained is a reward model, which has a score layer in place of the LM head."""
        return losses.BradleyTerry.name in {section.get("loss", self.loss) for section in self.stages or ({},)}

    @property
    def kind(self) -> Kind:
        """What the loss trains on: pairs, labelled completions, or completions."""
        loss = self.loss_fn
        return "kto" if loss.needs_desirable else "pair" if loss.pairwise else "sft"

    def stage_configs(self) -> list[TrainConfig]:
        """One flat configuration a stage, in order, each with its name."""
        sections = self.stages or ({},)
        made = []
        for section in sections:
            own = {k: v for k, v in section.items() if k in _FIELDS}
            loss = own.get("loss", self.loss)
            inherited = {k: v for k, v in self.loss_options.items() if k in _options_of(loss)}
            options = inherited | {k: v for k, v in section.items() if k not in _FIELDS}
            name = own.get("name") or (self.name if not self.stages else None) or loss
            made.append(dataclasses.replace(self, **own | {"stages": (), "loss_options": options, "name": name}))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, in the form a configuration file has: loss options among the other keys."""
        found = {key: _plain(getattr(self, key)) for key in _FIELDS if key != "stages"}
        found |= _plain(self.loss_options)
        if self.stages:
            found["stages"] = _plain(self.stages)
        return found


_AT_LEAST_1 = (
    "gradient_accumulation_steps", "per_device_eval_batch_size", "logging_steps",
    "eval_max_new_tokens", "sample_max_new_tokens", "max_skipped_steps", "lora_r", "lora_alpha", "dp_replicate",
)
_AT_LEAST_0 = (
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "save_steps", "seed",
)
_NONE_OR_1 = (
    "eval_steps", "sample_steps", "save_total_limit", "eval_generate_samples", "max_prompt_length", "memory_budget",
    "per_device_train_batch_size", "max_tokens_per_batch",
)
_NONE_OR_POSITIVE = ("sample_time_share", "scorer_timeout", "kl_budget")

# What a stage cannot have for itself: there is one model and one output folder.
_RUN_KEYS = (
    "model_name_or_path", "model_revision", "tokenizer_name_or_path", "chat_template", "init_from_config",
    "trust_remote_code", "chat_template_date", "disable_dropout",
    "use_peft", "merge_adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "dtype", "bf16",
    "gradient_checkpointing", "use_liger_kernel", "tail", "packing", "prefix_sharing", "fsdp", "dp_replicate",
    "output_dir", "overwrite_output_dir", "reference_dir", "seed", "report_to", "save_total_limit", "invalid_records",
    "stages",
)
# What may differ between a checkpoint and the run that goes on from it: nothing here changes a weight.
MAY_DIFFER = (
    "output_dir", "overwrite_output_dir", "reference_dir", "report_to", "logging_steps", "save_steps",
    "save_total_limit", "check_reference",
    "eval_dataset", "eval_steps", "per_device_eval_batch_size", "eval_generate", "eval_max_new_tokens",
    "eval_generate_samples", "sample_steps", "sample_prompts", "sample_max_new_tokens", "sample_time_share", "scorer",
    "chat_template_date", "scorer_timeout", "kl_budget",
    "kl_budget_action", "memory_budget", "max_skipped_steps", "fsdp", "dp_replicate",
)

_FIELDS = {f.name: f for f in fields(TrainConfig) if f.name != "loss_options"}
_TYPES = get_type_hints(TrainConfig)


def _loss_classes() -> dict[str, type[losses.Loss] | type[losses.BradleyTerry]]:
    """Those whose options a line of a configuration can hold: not the ones made of other losses."""
    made_of_losses = (losses.WPO, losses.WeightedSum)
    found: dict[str, Any] = {n: cls for n, cls in losses.CLASSES.items() if not issubclass(cls, made_of_losses)}
    return found | {losses.BradleyTerry.name: losses.BradleyTerry}


def _options_of(loss: str) -> dict[str, Any]:
    """Option name -> type of the loss called `loss`."""
    if loss not in _loss_classes():
        near = difflib.get_close_matches(str(loss), _loss_classes(), n=1)
        raise UserError(
            f"loss is {loss!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"it takes {', '.join(sorted(_loss_classes()))}"
        )
    cls = _loss_classes()[loss]
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice: YAML itself takes the last without a word."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if (key.tag, str(key.value)) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise _Twice(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides; dots reach into stages and mappings.

    `learning_rate=1e-6`, `stages.rpo.beta=0.1` (a stage by its name), `stages.0.max_steps=100` (or by its place).

    Raises UserError, one line, for a file that cannot be read, an unknown key (naming the nearest known one), a value
    of another type, an option that no stage's loss takes, and an override that would have no effect.
    """
    return config_from_dict(read_values(path, overrides), str(path))


def load_config_of_run(run_dir: Path, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> TrainConfig:
    """What a run was started with. Its folder runs no code unasked: raises UserError where it says `trust_remote_code`
    and neither the caller nor an override does."""
    config = load_config(run_dir / "config.yaml", overrides)
    if config.trust_remote_code and not trust_remote_code and "trust_remote_code=true" not in overrides:
        raise UserError(f"{run_dir}/config.yaml: trust_remote_code is true, for {config.model_name_or_path}; a folder "
                        "of a run runs no code unasked: say trust_remote_code=true here as well")
    return config


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file says, with overrides applied; names and types are not checked yet. Errors as `load_config`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be read") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        what = problem if isinstance(error, _Twice) else f"not valid YAML ({problem})"
        raise UserError(f"{path}{where}: {what}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, got {type(values).__name__ if values else 'an empty file'}")
    for override in overrides:
        _apply(values, override)
    return values


def config_from_dict(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Checks names and types; `where` begins the messages. Errors as `load_config`."""
    try:
        sections = values.get("stages") or ()
        if not isinstance(sections, Sequence) or isinstance(sections, str):
            raise UserError(f"stages is {sections!r}; it takes a list of sections")
        checked = []
        for i, section in enumerate(sections):
            if not isinstance(section, Mapping):
                raise UserError(f"stages.{i} is {section!r}; it takes keys and values")
            for key in section:
                if key in _RUN_KEYS:
                    raise UserError(f"stages.{i}.{key}: is the same for the whole run; set it outside stages")
            checked.append(_checked(section, f"stages.{i}."))
        top = _checked({key: value for key, value in values.items() if key != "stages"}, "")
        for key in ("model_name_or_path", "train_dataset", "output_dir"):
            given = key in top or (checked and all(key in section for section in checked))
            if not given:
                raise UserError(f"{key} is missing")
        top.setdefault("train_dataset", None)
        own = {key: value for key, value in top.items() if key in _FIELDS}
        options = {key: value for key, value in top.items() if key not in _FIELDS}
        config = TrainConfig(**own, loss_options=options, stages=tuple(checked))
        _check_stages(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _check_stages(config: TrainConfig) -> None:
    stages = config.stage_configs()
    for i, (stage, section) in enumerate(zip(stages, config.stages or ({},), strict=True)):
        allowed = _options_of(stage.loss)
        for key in section:
            if key not in _FIELDS and key not in allowed:
                raise UserError(f"stages.{i}.{key}: loss {stage.loss!r} takes {', '.join(allowed) or 'no options'}")
        try:
            loss = stage.loss_fn
        except ValueError as error:
            raise UserError(f"stage {stage.name!r}: {error}" if config.stages else str(error)) from None
        if loss.coupling == "batch" and stage.gradient_accumulation_steps > 1:
            raise UserError(
                f"gradient_accumulation_steps is {stage.gradient_accumulation_steps}: loss {stage.loss!r} compares all "
                "sequences of a step with each other; it takes 1"
            )
        if loss.needs_kl and (stage.batch_size or 2) * stage.gradient_accumulation_steps == 1:
            raise UserError(
                f"per_device_train_batch_size is 1, of one micro-batch a step: loss {stage.loss!r} takes its baseline "
                "from other examples of the step; raise it, or gradient_accumulation_steps"
            )
        if section.get("kl_budget") is not None and not loss.needs_reference:
            raise UserError(f"kl_budget: loss {stage.loss!r} has no reference, so there is no KL to it")
        if stage.sample_steps and config.reward_model:
            raise UserError("sample_steps: a reward model generates nothing that could be sampled")
        if stage.scorer and not stage.sample_steps:
            raise UserError("scorer is set, but sample_steps is not, and without samples there is nothing to score")
        if stage.dataset_streaming and loss.needs_kl:
            raise UserError(
                f"dataset_streaming: loss {stage.loss!r} pairs each prompt with another one's completion, whose "
                "reference log-probs belong to the batches of a whole data set: leave it out"
            )
        if stage.ref_model_name_or_path and not loss.needs_reference:
            if not config.stages or "ref_model_name_or_path" in section:
                raise UserError(f"ref_model_name_or_path: loss {stage.loss!r} has no reference")
        if config.reward_model:
            _check_reward_stage(stage)
    taken = {key for stage in stages for key in _options_of(stage.loss)}
    for key in config.loss_options:
        if key not in taken:
            those = " and ".join(dict.fromkeys(repr(stage.loss) for stage in stages))
            raise UserError(f"{key}: no option of loss {those}, which takes {', '.join(sorted(taken)) or 'none'}")
    if config.kl_budget is not None and not any(stage.loss_fn.needs_reference for stage in stages):
        those = " and ".join(dict.fromkeys(repr(stage.loss) for stage in stages))
        raise UserError(f"kl_budget: loss {those} has no reference, so there is no KL to it")
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"stages: two are called {name!r}; give each its own name")
        if not name or not all(c.isalnum() or c in "_-." for c in name) or name.startswith("."):
            raise UserError(f"name is {name!r}; it takes letters, digits, '_', '-' and '.'")


def _check_reward_stage(stage: TrainConfig) -> None:
    reward = losses.BradleyTerry.name
    if not stage.reward_model:
        raise UserError(
            f"stages: {reward} trains a model with a score layer, {stage.loss!r} one with an LM head; make them two "
            "runs, the later one from the model of the earlier"
        )
    if stage.eval_generate:
        raise UserError(f"eval_generate: loss {reward!r} trains a reward model, which does not generate")
    if stage.memory_budget is not None:
        raise UserError(f"memory_budget is for the LM head; loss {reward!r} trains a reward model, which has none")
    if stage.tail != "exact":
        raise UserError(f"tail is for the LM head; loss {reward!r} trains a reward model, which has none")


def _checked(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Known keys only, with values of their types; loss options among them."""
    options = {key: kind for loss in _loss_classes() for key, kind in _options_of(loss).items()}
    found = {}
    for key, value in values.items():
        if key == "assistant_only_loss":  # TRL's
            if "train_on" in values:
                raise UserError(f"{prefix}{key} and {prefix}train_on say the same: set one of them")
            key, value = "train_on", "assistant" if convert(f"{prefix}{key}", value, bool) else "all"
        if key in _FIELDS:
            kind = _TYPES[key]
        elif key in options:
            kind = options[key]
        else:
            if key == "rounds":
                raise UserError(f"{prefix}rounds: belongs to `fastpref rounds`; `fastpref train` has no rounds")
            near = difflib.get_close_matches(str(key), [*_FIELDS, *options], n=1, cutoff=0.0)
            raise UserError(f"{prefix}{key}: no such key; the nearest is {near[0]}")
        found[key] = convert(f"{prefix}{key}", value, kind)
    return found


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`. YAML reads 1e-6 (no dot) as a string, so strings that are numbers pass for numbers."""
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (value in ("none", "null") and args[0] is not str):
            return None
        return convert(key, value, next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        if isinstance(value, bool) and {"none", "full"} <= set(args):  # gradient_checkpointing, as TRL has it
            value = "full" if value else "none"
        if value not in args:
            near = difflib.get_close_matches(str(value), args, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{key} is {value!r}{hint}; it takes {', '.join(args)}")
        return value
    if origin is tuple:
        if value is None or value == "none" or value == ["none"]:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{key} is {value!r}; it takes a name or a list of names")
        return tuple(items)
    if origin is collections.abc.Mapping:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{key} is {value!r}, which is not valid JSON ({error.msg})") from None
        if not isinstance(value, Mapping):
            raise UserError(f"{key} is {value!r}; it takes keys and values")
        return dict(value)
    if kind is str and isinstance(value, datetime.date):  # as YAML reads 2026-01-31
        return value.isoformat()
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    takes = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{key} is {value!r}; it takes {takes}")


def _apply(values: dict[str, Any], override: str) -> None:
    """`a.b=value` into nested mappings and lists; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key=value")
    try:
        value = yaml.load(text, _Loader)
    except _Twice as error:
        raise UserError(f"{override!r}: {error.problem}") from None
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    here: Any = values
    for i, part in enumerate(path):
        done = ".".join(path[: i + 1])
        if isinstance(here, list):
            here = here[_place(here, part, done)]
        elif isinstance(here, dict):
            if part == "stages" and not here.get(part):
                raise UserError(f"{key}: the configuration has no stages")
            here = here.setdefault(part, {})
        if not isinstance(here, (dict, list)):
            raise UserError(f"{key}: {done} is {here!r}, not a section")
    if isinstance(here, list):
        here[_place(here, last, key)] = value
        return
    stages = values.get("stages")
    if here is values and isinstance(stages, list) and stages and last != "stages":
        if all(isinstance(stage, dict) and last in stage for stage in stages):
            name = stages[-1].get("name", len(stages) - 1)
            raise UserError(f"{override}: every stage sets its own {last}; say which: stages.{name}.{override}")
    here[last] = value


def _place(items: list[Any], part: str, key: str) -> int:
    names = [str(item.get("name") or item.get("loss")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise UserError(f"{key}: no such entry; there are {', '.join(map(str, names))} (0 to {len(items) - 1})")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def differing_keys(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = MAY_DIFFER
) -> list[str]:
    """Dotted keys that differ between two `to_dict()`s and that change what is learnt, with both values."""
    different = []
    for key in dict.fromkeys([*saved, *now]):
        a, b = saved.get(key), now.get(key)
        if key not in saved and "model_name_or_path" in saved and key in _FIELDS:  # written before there was the key
            a = _plain(_FIELDS[key].default)
        if key in may_differ or a == b:
            continue
        if key == "stages" and a and b and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                different += [f"stages.{i}.{line}" for line in differing_keys(x, y)]
        else:
            different.append(f"{key} ({_short(a)} there, {_short(b)} now)")
    return different


def _short(value: Any) -> str:
    text = "unset" if value is None else f"{len(value)} sections" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
