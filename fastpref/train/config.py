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

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fastpref import losses
from fastpref.errors import UserError, refuse

from .keys import COMMON, FREE, RUN, Key, check_bounds, convert, key, keys_of, no_such_key
from .yaml_file import read_values

if TYPE_CHECKING:  # it needs torch, and keys are told without
    from fastpref.data import Kind

EngineName = Literal["auto", "transformers", "vllm"]


FULL_RATE, LORA_RATE = 1e-6, 1e-5  # learning rates, where none is set


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every key of a configuration file, with its default. Lengths are in tokens; a step is an optimiser step.

    A loss's own options (beta, eta, label_smoothing, ...) are keys too and end up in `loss_options`; one that no
    stage's loss takes is an error. What may be left to the program is `None` by default.
    """

    model_name_or_path: str = key(
        MISSING, "hub id, or a local folder", RUN, COMMON, section="model: the same for every stage")
    model_revision: str = key("main", "of a hub id: branch, tag or commit", RUN)
    tokenizer_name_or_path: str | None = key(None, "None: the model's", RUN)
    init_from_config: bool = key(False, "random weights from the folder's config.json instead of its weights", RUN)
    chat_template: str | None = key(None, "a file, or chatml; None: the tokenizer's", RUN)
    trust_remote_code: bool = key(False, "run Python code that comes with the model", RUN)
    disable_dropout: bool = key(True, "the model's own dropout and router jitter are off", RUN)
    use_peft: bool = key(False, "train a LoRA adapter; the weights stay as they are", RUN, COMMON)
    merge_adapter: bool = key(False, "model_name_or_path is an adapter: add it to its model first, and train that", RUN)
    lora_r: int = key(16, "rank of the adapter", "at least 1", RUN)
    lora_alpha: int = key(32, "what the adapter adds is scaled by lora_alpha / lora_r", "at least 1", RUN)
    lora_dropout: float | None = key(
        None, "None: 0 if a stage's loss has a reference (which has none), else 0.05", "0 to below 1", RUN)
    lora_target_modules: tuple[str, ...] | None = key(None, "None: every linear layer but the LM head", RUN)
    peft: Mapping[str, Any] = key(
        {}, "more of peft's LoraConfig, by its names: use_dora, use_rslora, modules_to_save, target_modules, ...", RUN)
    load_in_4bit: bool = key(False, "under use_peft: linear layers but the LM head have 4 bits a weight (bitsandbytes)",
                             RUN)
    load_in_8bit: bool = key(False, "the same with 8 bits", RUN)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "the 16 values that 4 bits stand for", RUN)
    use_bnb_nested_quant: bool = key(False, "the scales of 4-bit weights in 8 bits: 4.13 bits a weight, not 4.5", RUN)
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = key(
        "uint8", "what 4-bit weights are packed in", RUN, FREE)
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "of the weights; LoRA's adapter is float32 in any case", RUN, COMMON)
    bf16: bool | None = key(None, "autocast over fp32 weights; None: on a GPU that has it", RUN)
    fp16: bool | None = key(
        None, "autocast in float16 over fp32 weights, with a loss scaler; None: on a GPU without bf16 (T4, V100)", RUN)
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = key(
        "none", "Activations made again in the backward pass. selective: all but the matrix products; full: all (true);"
        " offload: as full, and what a layer starts from waits in host memory", RUN, COMMON)
    use_liger_kernel: bool = key(False, "liger-kernel's RMSNorm, RoPE, SwiGLU; on a GPU, where it knows the model", RUN)
    torch_compile: bool = key(
        False, "the trunk's layers compiled, each by itself; the first step takes half a minute or more", RUN)
    packing: bool | None = key(
        None, "Batches without padding, for which the model's attention must be replaced. None: where that is possible",
        RUN)
    prefix_sharing: bool = key(True, "packed: equal prompts once a micro-batch (with the same LoRA dropout)", RUN)
    fsdp: bool | None = key(None, "weights sharded over torchrun's processes; None: if there are several", RUN, FREE)
    dp_replicate: int = key(1, "groups that each hold the whole model (HSDP: one a node)", "at least 1", RUN, FREE)
    ddp_timeout: int = key(1800, "seconds that ranks wait for one that does not answer", "at least 1", RUN, FREE)

    output_dir: str = key(MISSING, "checkpoints, metrics and the trained model", RUN, FREE, COMMON, section="run")
    overwrite_output_dir: bool = key(False, "start over in a folder that holds a run", RUN, FREE)
    reference_dir: str | None = key(None, "reference log-probs of several runs; None: output_dir/reference", RUN, FREE)
    seed: int = key(42, "of new weights, dropout, the order of the data and samples", "at least 0", RUN)
    report_to: tuple[str, ...] = key((), "charts, besides metrics.jsonl", "tensorboard, wandb or none", RUN, FREE)
    logging_steps: int = key(10, "a line of metrics every so many steps", "at least 1", FREE)
    save_steps: int = key(500, "0: only where a stage ends, and when stopped", "at least 0", FREE)
    save_total_limit: int | None = key(2, "older checkpoints are removed; None: all stay", "at least 1", RUN, FREE)
    stages: tuple[Mapping[str, Any], ...] = key((), "one after the other, each with keys of its own", RUN)

    train_dataset: Any = key(
        MISSING, "a file, a data set, or a list of them (data.load_records)", COMMON, section="data")
    eval_dataset: Any = key(None, "held-out records, as train_dataset", FREE, COMMON)
    dataset_streaming: bool = key(False, "train_dataset: read only its first records, as many as max_steps take")
    max_length: int = key(1024, "prompt + longest response", "at least 2", COMMON)
    max_prompt_length: int | None = key(None, "a limit on the prompt alone", "at least 1")
    truncation_mode: Literal["keep_start", "keep_end"] = key("keep_end", "of a prompt that is too long")
    overlong_response: Literal["error", "drop", "truncate"] = key(
        "error", "a response that leaves no room for a prompt: drop leaves its record out")
    train_on: Literal["assistant", "all"] = key("assistant", "of a response: the model's turns alone, or every token")
    chat_template_kwargs: Mapping[str, Any] = key({}, "for every record that does not set its own")
    chat_template_date: str | None = key(
        None, "what strftime_now in a template tells; None: the day the run began", "a date as 2026-01-31", RUN,
        FREE)
    sanitize_control_tokens: bool = key(
        False, "Control tokens that stand in what users and tools say (<|im_end|>) are text like any other; false: "
        "tokens")
    invalid_records: Literal["error", "drop"] = key(
        "error", "Of a record that cannot be read, or that the chat template refuses: drop counts them and names the "
        "first ten", RUN)

    name: str | None = key(None, "None: the loss's", section="stage")
    loss: str = key("dpo", "`fastpref losses` lists them; their options are keys too", COMMON)
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    ref_model_name_or_path: str | None = key(None, "None: the policy as the stage found it")
    check_reference: bool = key(True, "before step 1: what a training step scores has to agree with that policy", FREE)
    per_device_train_batch_size: int | None = key(
        None, "examples (pairs) a micro-batch; None: 8, or what its tokens allow", "at least 1", COMMON)
    max_tokens_per_batch: int | None = key(None, "tokens that fill a micro-batch; None: no limit", "at least 1")
    gradient_accumulation_steps: int = key(
        1, "micro-batches a step, on all GPUs together: their number changes no result", "at least 1")
    num_train_epochs: float = key(1.0, "passes over the data", "above 0", COMMON)
    max_steps: int = key(-1, "above 0: so many, whatever the epochs", "-1 or at least 1")
    learning_rate: float | None = key(
        None, "after the warm-up; None: 1e-6, with use_peft 1e-5", "at least 0", COMMON)
    loraplus_lr_ratio: float = key(1.0, "LoRA+: the adapter's B learns so many times as fast as its A", "above 0")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = key("linear", "after the warm-up")
    warmup_steps: int = key(0, "the learning rate rises over so many", "at least 0")
    warmup_ratio: float = key(0.0, "of the stage's steps; warmup_steps comes first", "0 to 1")
    optim: Literal["adamw_torch_fused", "adamw_torch_8bit", "adamw_fp32_master", "adamw_offload"] | None = key(
        None, "None: adamw_torch_8bit (stochastic rounding) for bfloat16 weights, else adamw_torch_fused")
    optim_in_backward: bool = key(False, "update each weight as soon as its gradient is there, then free the gradient")
    weight_decay: float = key(0.0, "of matrices; biases and norms have none", "at least 0")
    adam_beta1: float = key(0.9, "decay of the first moment", "0 to below 1")
    adam_beta2: float = key(0.999, "decay of the second moment", "0 to below 1")
    adam_epsilon: float = key(1e-8, "added to the root of the second moment", "at least 0")
    max_grad_norm: float = key(1.0, "0: no clipping", "at least 0")
    max_skipped_steps: int = key(5, "so many steps in a row with NaN or inf gradients end the run", "at least 1", FREE)
    memory_budget: int | None = key(None, "bytes of workspace of the LM head; None: its default", "at least 1", FREE)
    tail: Literal["exact", "rank1"] = key("exact", "the LM head's gradients: all vocabulary columns, or few", RUN)

    eval_steps: int | None = key(
        None, "None: at the stage's start and its end alone", "at least 1", FREE,
        section="evaluation, at the stage's start, its end, and every eval_steps")
    per_device_eval_batch_size: int = key(8, "examples (pairs) a batch", "at least 1", FREE)
    eval_generate: bool = key(False, "exact match of greedy generations, at the stage's start and end", FREE)
    eval_max_new_tokens: int = key(128, "of a generation", "at least 1", FREE)
    eval_generate_samples: int | None = key(None, "the first so many held-out prompts; None: all", "at least 1", FREE)

    sample_steps: int | None = key(
        None, "every so many steps, and at the stage's end; None: never", "at least 1", FREE,
        section="watch on over-optimisation: KL and reward of responses that the policy samples now")
    sample_prompts: int = key(
        32, "a response to each of the first so many held-out prompts (without any: training prompts)", "at least 2",
        FREE)
    sample_max_new_tokens: int = key(128, "of a response", "at least 1", FREE)
    sample_time_share: float | None = key(
        0.1, "Of the time of the training steps, the most that samples may take; what is due then waits. None: no "
        "limit, and the stage's start is sampled too", "above 0", FREE)
    scorer: str | None = key(None, "of the samples: module:function, folder of a reward model or implicit:FOLDER", FREE)
    scorer_timeout: float | None = key(
        10.0, "seconds that a module:function may take for a response; None: no limit", "above 0", FREE)
    kl_budget: float | None = key(
        None, "Nats a response: the stage keeps its first checkpoint with this KL to the reference, of fresh samples "
        "where there are any, else of held-out responses where there is eval_steps, else of the training responses",
        "above 0", FREE)
    kl_budget_action: Literal["stop", "continue"] = key("stop", "at the budget: the stage ends, or goes on", FREE)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.learning_rate is None:  # LoRA's is ten times that of full weights (docs/training.md)
            object.__setattr__(self, "learning_rate", LORA_RATE if self.use_peft else FULL_RATE)
        refuse(
            (self.use_peft and self.init_from_config,
             "use_peft adapts pretrained weights; init_from_config makes random ones: set one of them"),
            *self._quantization(),
            (self.torch_compile and self.gradient_checkpointing == "offload",
             "torch_compile: compiled layers keep their weights for the backward pass, and gradient_checkpointing="
             "offload would move those to host memory too: set full, or leave torch_compile out"),
            (self.packing is False and self.max_tokens_per_batch,
             "max_tokens_per_batch fills packed batches, and packing is False: set one of them"),
            *((not self.use_peft and getattr(self, name) != _KEYS[name].default,
               f"{name} is of a LoRA adapter, and there is none: set use_peft=true, or leave it out")
              for name in _KEYS if name.startswith("lora")),
        )
        if not self.stages:  # with stages, each is checked as it is made
            self._check_optimizer()
            refuse((self.dataset_streaming and self.max_steps < 1,
                    "dataset_streaming reads as much of train_dataset as max_steps take: set max_steps (a stream has "
                    "no length to count epochs by)"))

    def _quantization(self) -> Iterator[tuple[Any, str]]:
        yield (self.peft and not self.use_peft, "peft has settings of an adapter, and use_peft is not set: set it")
        asked = "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else ""
        yield (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit: set one of them")
        yield (asked and not self.use_peft, f"{asked}: weights of so few bits are not trained: set use_peft=true for "
               "an adapter beside them, or leave it out")
        yield (asked and self.torch_compile, f"torch_compile and {asked}: layers of so few bits are not compiled: set "
               "one of them")
        yield (asked and self.merge_adapter, f"merge_adapter adds to whole weights, and {asked} holds codes: merge "
               "the two first, and start from that model")
        yield (asked and self.optim == "adamw_torch_8bit",
               f"optim is 'adamw_torch_8bit', and what is trained beside the weights of {asked} is a small float32 "
               "adapter: leave optim out")
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
            changed = getattr(self, name) != TrainConfig.__dataclass_fields__[name].default
            yield (changed and not self.load_in_4bit, f"{name} is of load_in_4bit, which is not set: set it, or leave "
                   f"{name} out")

    def _check_optimizer(self) -> None:
        offload = self.optimizer == "adamw_offload"
        frees = self.optim_in_backward or offload
        what = "optim_in_backward" if self.optim_in_backward else "optim adamw_offload"
        refuse(
            (self.dtype == "bfloat16" and self.bf16 is False,
             "bf16 is False, but dtype=bfloat16 computes in bf16: leave one of them out"),
            (self.fp16 and (self.bf16 or self.dtype == "bfloat16"),
             "fp16 is True, but dtype or bf16 asks to compute in bf16: leave one of them out"),
            (self.fp16 and frees, f"fp16: {what} updates a weight before it is known whether a gradient has left "
             "float16's range, and the step is to be skipped: leave one of them out"),
            (self._bf16_weights and self.optimizer == "adamw_torch_fused",
             "optim is 'adamw_torch_fused', which rounds bfloat16 weights to nearest: at learning rates of preference "
             "training nearly every update is lost; take adamw_torch_8bit or adamw_fp32_master, or dtype=float32"),
            (self.optimizer == "adamw_fp32_master" and not self._bf16_weights,
             "optim is 'adamw_fp32_master', but the weights that are trained are fp32: set dtype=bfloat16 (without "
             "use_peft), or optim=adamw_torch_fused"),
            (self.optim_in_backward and offload,
             "optim_in_backward: adamw_offload frees each gradient already; set one of them"),
            (frees and self.gradient_accumulation_steps > 1,
             f"{what} frees each gradient as it comes, so none is left to add the next micro-batch's to: set "
             f"gradient_accumulation_steps=1 (it is {self.gradient_accumulation_steps}) and a larger batch"),
            (frees and self.max_grad_norm,
             f"{what} frees each gradient before the norm of all of them is known: set max_grad_norm=0 (it is "
             f"{self.max_grad_norm:g})"),
        )

    @property
    def _bf16_weights(self) -> bool:
        return self.dtype == "bfloat16" and not self.use_peft

    @property
    def optimizer(self) -> str:
        """`optim`, or what stands for None."""
        return self.optim or ("adamw_torch_8bit" if self._bf16_weights else "adamw_torch_fused")

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

    def stage_configs(self) -> tuple[TrainConfig, ...]:
        """One flat configuration a stage, in order, each with its name."""
        return self._stage_configs

    @functools.cached_property
    def _stage_configs(self) -> tuple[TrainConfig, ...]:
        return tuple(self._stage(section) for section in self.stages or ({},))

    def _stage(self, section: Mapping[str, Any]) -> TrainConfig:
        own, options = _parted(section)
        loss = own.get("loss", self.loss)
        inherited = {k: v for k, v in self.loss_options.items() if k in _options_of(loss)}
        name = own.get("name") or (self.name if not self.stages else None) or loss
        return dataclasses.replace(self, **own | {"stages": (), "loss_options": inherited | options, "name": name})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, in the form a configuration file has: loss options among the other keys."""
        found = {name: _plain(getattr(self, name)) for name in _KEYS if name != "stages"}
        found |= _plain(self.loss_options)
        if self.stages:
            found["stages"] = _plain(self.stages)
        return found


_KEYS = keys_of(TrainConfig)


def _parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys, loss options)."""
    return ({k: v for k, v in values.items() if k in _KEYS}, {k: v for k, v in values.items() if k not in _KEYS})


@functools.cache
def loss_classes() -> dict[str, type[losses.Loss] | type[losses.BradleyTerry]]:
    """Those whose options a line of a configuration can hold: not the ones made of other losses."""
    made_of_losses = (losses.WPO, losses.WeightedSum)
    found: dict[str, Any] = {n: cls for n, cls in losses.CLASSES.items() if not issubclass(cls, made_of_losses)}
    return found | {losses.BradleyTerry.name: losses.BradleyTerry}


def _options_of(loss: str) -> dict[str, Any]:
    """Option name -> type of the loss called `loss`."""
    if loss not in loss_classes():
        near = difflib.get_close_matches(str(loss), loss_classes(), n=1)
        raise UserError(
            f"loss is {loss!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"it takes {', '.join(sorted(loss_classes()))}"
        )
    cls = loss_classes()[loss]
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def options_of_losses() -> list[Key]:
    """For people: each with the losses that take it, and its default there."""
    found: dict[str, list[Key]] = {}
    for name in loss_classes():
        for option, kind in _options_of(name).items():
            about = Key(option, kind, getattr(loss_classes()[name](), option), name, (), "options of losses")
            found.setdefault(option, []).append(about)
    return [keys[0]._replace(default=" / ".join(dict.fromkeys(key.shown for key in keys)),
                             meaning="of " + ", ".join(key.meaning for key in keys)) for keys in found.values()]


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


def config_from_dict(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Checks names and types; `where` begins the messages. Errors as `load_config`."""
    try:
        return checked_config(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def checked_config(values: Mapping[str, Any]) -> TrainConfig:
    sections = _sections(values.get("stages") or ())
    top = _checked({name: value for name, value in values.items() if name != "stages"}, "")
    for name in ("model_name_or_path", "train_dataset", "output_dir"):
        if name not in top and not (sections and all(name in section for section in sections)):
            raise UserError(f"{name} is missing")
    own, options = _parted({"train_dataset": None} | top)
    config = TrainConfig(**own, loss_options=options, stages=sections)
    _check_stages(config)
    return config


def _sections(sections: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise UserError(f"stages is {sections!r}; it takes a list of sections")
    checked = []
    for i, section in enumerate(sections):
        if not isinstance(section, Mapping):
            raise UserError(f"stages.{i} is {section!r}; it takes keys and values")
        for name in section:
            if name in _KEYS and RUN in _KEYS[name].rules:
                raise UserError(f"stages.{i}.{name}: is {RUN}; set it outside stages")
        checked.append(_checked(section, f"stages.{i}."))
    return tuple(checked)


def _check_stages(config: TrainConfig) -> None:
    stages = config.stage_configs()
    for i, (stage, section) in enumerate(zip(stages, config.stages or ({},), strict=True)):
        allowed = _options_of(stage.loss)
        for name in section:
            if name not in _KEYS and name not in allowed:
                raise UserError(f"stages.{i}.{name}: loss {stage.loss!r} takes {', '.join(allowed) or 'no options'}")
        try:
            loss = stage.loss_fn
        except ValueError as error:
            raise UserError(f"stage {stage.name!r}: {error}" if config.stages else str(error)) from None
        _check_stage(stage, section, loss, config)
    those = " and ".join(dict.fromkeys(repr(stage.loss) for stage in stages))
    taken = {name for stage in stages for name in _options_of(stage.loss)}
    for name in config.loss_options:
        if name not in taken:
            raise UserError(f"{name}: no option of loss {those}, which takes {', '.join(sorted(taken)) or 'none'}")
    if config.kl_budget is not None and not any(stage.loss_fn.needs_reference for stage in stages):
        raise UserError(f"kl_budget: loss {those} has no reference, so there is no KL to it")
    called = [str(stage.name) for stage in stages]
    for name in called:
        refuse((called.count(name) > 1, f"stages: two are called {name!r}; give each its own name"),
               (not re.fullmatch(r"(?!\.)[\w.-]+", name),
                f"name is {name!r}; it takes letters, digits, '_', '-' and '.'"))


def _check_stage(stage: TrainConfig, section: Mapping[str, Any], loss: Any, config: TrainConfig) -> None:
    name, micro_batches = repr(stage.loss), stage.gradient_accumulation_steps
    reward, trains_reward = losses.BradleyTerry.name, config.reward_model
    refuse(
        (loss.coupling == "batch" and micro_batches > 1,
         f"gradient_accumulation_steps is {micro_batches}: loss {name} compares all sequences of a step with each "
         "other; it takes 1"),
        (loss.needs_kl and (stage.batch_size or 2) * micro_batches == 1,
         f"per_device_train_batch_size is 1, of one micro-batch a step: loss {name} takes its baseline from other "
         "examples of the step; raise it, or gradient_accumulation_steps"),
        (section.get("kl_budget") is not None and not loss.needs_reference,
         f"kl_budget: loss {name} has no reference, so there is no KL to it"),
        (stage.sample_steps and trains_reward,
         "sample_steps: a reward model generates nothing that could be sampled"),
        ((stage.scorer or "").startswith("judge:openai:"),
         "scorer: a judge compares responses to one prompt, and of fresh samples there is one a prompt: it scores in "
         "`fastpref rounds`"),
        (stage.scorer and not stage.sample_steps,
         "scorer is set, but sample_steps is not, and without samples there is nothing to score"),
        (stage.dataset_streaming and loss.needs_kl,
         f"dataset_streaming: loss {name} pairs each prompt with another one's completion, whose reference log-probs "
         "belong to the batches of a whole data set: leave it out"),
        (stage.ref_model_name_or_path and not loss.needs_reference
         and (not config.stages or "ref_model_name_or_path" in section),
         f"ref_model_name_or_path: loss {name} has no reference"),
        (trains_reward and not stage.reward_model,
         f"stages: {reward} trains a model with a score layer, {name} one with an LM head; make them two runs, the "
         "later one from the model of the earlier"),
        (trains_reward and stage.eval_generate,
         f"eval_generate: loss {reward!r} trains a reward model, which does not generate"),
        (trains_reward and stage.memory_budget is not None,
         f"memory_budget is for the LM head; loss {reward!r} trains a reward model, which has none"),
        (trains_reward and stage.tail != "exact",
         f"tail is for the LM head; loss {reward!r} trains a reward model, which has none"),
    )


def _checked(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Known keys only, with values of their types; loss options among them."""
    kinds = {name: kind for loss in loss_classes() for name, kind in _options_of(loss).items()}
    kinds |= {name: known.kind for name, known in _KEYS.items()}
    found = {}
    for name, value in values.items():
        if name == "assistant_only_loss":  # TRL's
            if "train_on" in values:
                raise UserError(f"{prefix}{name} and {prefix}train_on say the same: set one of them")
            name, value = "train_on", "assistant" if convert(f"{prefix}{name}", value, bool) else "all"
        if name == "rounds":
            raise UserError(f"{prefix}rounds: belongs to `fastpref rounds`; `fastpref train` has no rounds")
        if name not in kinds:
            raise no_such_key(name, prefix, kinds)
        found[name] = convert(f"{prefix}{name}", value, kinds[name])
        if name == "loss":
            found[name] = losses.ALIASES.get(found[name], found[name])
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def differing_keys(saved: Mapping[str, Any], now: Mapping[str, Any],
                   keys: Mapping[str, Key] = _KEYS, *, whole: bool = True) -> list[str]:
    """Dotted keys that differ between two `to_dict()`s and that change what is learnt, with both values.

    whole: a key that `saved` lacks had its default: it was written before there was the key.
    """
    different = []
    for name in dict.fromkeys([*saved, *now]):
        known = keys.get(name)
        a, b = saved.get(name, _plain(known.default) if known and whole else None), now.get(name)
        if a == b or (known and FREE in known.rules):
            continue
        if name == "stages" and a and b and len(a) == len(b):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                different += [f"stages.{i}.{line}" for line in differing_keys(x, y, whole=False)]
        else:
            different.append(f"{name} ({_short(a)} there, {_short(b)} now)")
    return different


def lengthened(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`saved` with the length of its (last) stage as in `now`, where that is greater: what a run that has ended may go
    on with."""
    found = dict(saved)
    for name in ("max_steps", "num_train_epochs"):
        if isinstance(saved.get(name), (int, float)) and (now.get(name) or 0) > saved[name]:
            found[name] = now[name]
    stages, others = saved.get("stages") or [], now.get("stages") or []
    if stages and len(stages) == len(others):
        found["stages"] = [*stages[:-1], lengthened(stages[-1], others[-1])]
    return found


def _short(value: Any) -> str:
    text = "unset" if value in (None, MISSING) else f"{len(value)} sections" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
