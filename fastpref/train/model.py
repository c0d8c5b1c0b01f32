"""The policy: a transformers causal LM, loaded, taken apart into trunk and LM head (trunk.py), scored and saved; or a
reward model, whose head is a score layer."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from fastpref import arguments
from fastpref.attention import backend, check_replaceable, own_attention, replace_attention
from fastpref.data import Batch, Layout
from fastpref.errors import UserError, first_line
from fastpref.head import PreferenceOutput, linear_logps, linear_preference_loss
from fastpref.losses import SFT, Totals, WeightedSum
from fastpref.trunk import LMHead, in_place_of, router_coefficient, take_score_apart, unwrap
from fastpref.trunk import take_apart as find_parts

from . import quantized
from .checkpoint import SHARDED, save, verify
from .config import TrainConfig
from .liger_kernels import use_liger_kernels
from .rendering import set_template
from .shards import fill, load_sharded_weights
from .source import (
    Source,
    check_folder,
    check_whole,
    load_whole,
    lora_config,
    need_peft,
    put_adapter,
    some,
    source_of,
    source_of_run,
)
from .traits import adapted_share, fix_rope, free_routers, has_experts, hush, is_router, noise_of, save_config

BASE = "base"  # in output_dir: the model that merge_adapter makes, for an adapter on it


@dataclass(frozen=True)
class Policy:
    """A model and its parts. fp32 weights with `compute_dtype` bf16: the forward pass runs under autocast."""

    model: Any  # what is trained, saved and generates: a PreTrainedModel, or a PeftModel around one
    trunk: Any
    head: LMHead
    device: torch.device
    compute_dtype: torch.dtype
    memory_budget: int | None
    tail: str = "exact"
    layout: Layout = "padded"  # of the batches it takes
    padded_because: str = ""  # why not packed, where that was left to the program
    own_attention: str = ""  # the model's own attention, where packed batches have replaced it
    notes: tuple[str, ...] = ()  # what the log says of it
    router: float | None = None  # the weight of its router's loss, which is then a part of every loss
    compiled: bool = False  # the layers of its trunk are
    offload: bool = False  # what autograd saves outside checkpointed layers waits in host memory: the layers' inputs

    def rows(self, batch: Batch) -> Tensor:
        """Flat indices of the hidden rows that the head takes."""
        return batch.score_rows

    def hidden_rows(self, batch: Batch) -> Tensor:
        """[N, H]: the hidden rows that predict a scored token."""
        return self._run(batch)[0]

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Those rows, and the router's loss where there is one."""
        # No attention mask: padding is on the right, where causal attention never reaches it from a real token, and
        # without a mask SDPA takes its faster causal kernel.
        packed: dict[str, Any] = {}  # not every trunk takes positions
        if batch.attention_plan is not None:
            plan = batch.attention_plan
            packed = {"position_ids": batch.position_ids, "attention_plan": plan.lengths if self.compiled else plan}
        with self.autocast(), self._saving():
            aux_loss = None
            if self.router is None:
                hidden = self.trunk(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
            else:
                hidden, aux_loss = self._with_router(batch, packed)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.rows(batch)), aux_loss

    def _with_router(self, batch: Batch, packed: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The hidden rows as they come to the LM head in the model's own forward, which computes its router's loss
        behind it: over all tokens, prompts included, padding not."""
        seen: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden.new_zeros((*hidden.shape[:-1], 0))

        mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        with in_place_of(self.head.module, take):
            out = unwrap(self.model)(
                input_ids=batch.input_ids, use_cache=False, output_router_logits=True, **packed, **mask
            )
        return seen[0], out.aux_loss if isinstance(out.aux_loss, Tensor) else None

    def compute_loss(
        self, batch: Batch, loss: Callable[..., Tensor], totals: Totals | None = None, scale: float = 1.0, **inputs: Any
    ) -> PreferenceOutput:
        """One call of `linear_preference_loss` on a batch that is on the device. `inputs` go to it as they are.

        scale: of the loss, before gradients are rounded to the compute dtype (float16)."""
        loss = loss if scale == 1 else WeightedSum((loss,), (scale,))  # type: ignore[arg-type]
        hidden, aux_loss = self._run(batch)
        with self.autocast():  # the head then works in bf16, and its weight's gradient is still fp32
            hidden, weight, bias = self.head.operands(hidden)
            out = linear_preference_loss(
                hidden,
                weight,
                batch.targets,
                loss=loss,
                cu_seqlens=batch.cu_seqlens,
                bias=bias,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
                memory_budget=self.memory_budget,
                tail=self.tail,
                totals=totals,
                **inputs,
            )
        if aux_loss is None:
            return out
        # a mean over a micro-batch's tokens: of the global batch it is the mean by sequences
        sequences = out.logps.shape[0]
        share = sequences / totals.sequences if totals else 1.0
        metrics = out.metrics | {"aux_loss": aux_loss.detach().float().expand(sequences)}
        return out._replace(loss=out.loss + scale * share * (self.router or 0.0) * aux_loss, metrics=metrics)

    def sequence_logps(self, batch: Batch) -> Tensor:
        """[S] fp32, detached: one forward pass."""
        with torch.no_grad():
            return self.compute_loss(batch, SFT()).logps

    def token_logps(self, batch: Batch) -> Tensor:
        """[N] fp32, detached: of every scored token, sequence after sequence."""
        head = self.head
        with torch.no_grad():
            hidden = self.hidden_rows(batch)
            with self.autocast():
                hidden, weight, bias = head.operands(hidden)
                return linear_logps(hidden, weight, batch.targets, bias=bias, softcap=head.softcap,
                                    logit_scale=head.logit_scale, memory_budget=self.memory_budget)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == self.head.weight.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The model with the attention it came with, which knows masks and caches, and its layers as they came."""
        with (
            own_attention(unwrap(self.model), self.own_attention) if self.own_attention else nullcontext(),
            torch.compiler.set_stance("force_eager") if self.compiled else nullcontext(),
        ):
            yield

    def _saving(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class RewardOutput(NamedTuple):
    """What a reward model's `compute_loss` returns. It has no log-probs."""

    loss: Tensor  # scalar, differentiable
    rewards: Tensor  # [S] fp32 at least, detached
    metrics: dict[str, Tensor]  # [P]; mean_reward [S]
    logps: None = None
    ref_logps: None = None


@dataclass(frozen=True)
class RewardPolicy(Policy):
    """A reward model, R = w . h + b on the hidden row h of a sequence's last token (EOS); its head is that layer."""

    def rows(self, batch: Batch) -> Tensor:
        return batch.last_rows

    def rewards(self, batch: Batch) -> Tensor:
        """[S], differentiable. The product is fp32 at least, in any precision of the trunk: what counts is the
        difference of two rewards, and bf16 would leave it two or three digits."""
        hidden, weight, bias = self.head.operands(self.hidden_rows(batch))
        if self.head.sharded:  # a few numbers: every rank gathers them
            weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
        exact = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            return F.linear(hidden.to(exact), weight.to(exact), None if bias is None else bias.to(exact)).squeeze(1)

    def compute_loss(  # type: ignore[override]
        self, batch: Batch, loss: Callable[..., Tensor], totals: Totals | None = None, scale: float = 1.0, **inputs: Any
    ) -> RewardOutput:
        """loss: `fastpref.losses.BradleyTerry`. Metrics have the names that TRL's RewardTrainer gives them, those of
        the two sides its DPOTrainer's; accuracy is 1 where the chosen response has the larger reward."""
        rewards = self.rewards(batch)
        value = scale * loss(rewards, margin=batch.margins, pairs=None if totals is None else totals.pairs, **inputs)
        rewards = rewards.detach()
        chosen, rejected = rewards.chunk(2)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "mean_reward": rewards,
        }
        return RewardOutput(value, rewards, metrics)

    def sequence_logps(self, batch: Batch) -> Tensor:
        raise TypeError("a reward model has no log-probs")


def _gathered(weight: Any) -> Tensor:
    """A DTensor whole on every rank; the ranks' gradients, of sequences of their own, are added up."""
    from torch.distributed.tensor import Partial

    found: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return found


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    source = source_of_run(config)
    name, revision = (config.tokenizer_name_or_path, "main") if config.tokenizer_name_or_path else source.tokenizer
    check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, revision=revision)
    except Exception as error:  # missing files, the hub, the network, a broken tokenizer.json: each its own kind
        raise UserError(f"{name}: no tokenizer that loads ({first_line(error)})") from error
    if not hasattr(tokenizer, "chat_template"):  # MistralCommonBackend
        raise UserError(f"{name}: its tokenizer, a {type(tokenizer).__name__}, has no chat_template, nor the rest of "
                        "what transformers' own have: set tokenizer_name_or_path to one with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no EOS token to end responses with; set its eos_token")
    set_template(tokenizer, config)
    if config.reward_model:
        _pad_otherwise_than_eos(tokenizer, name, _vocabulary(config, source))
    return tokenizer


def _pad_otherwise_than_eos(tokenizer: PreTrainedTokenizerBase, name: str, size: int) -> None:
    """transformers reads a reward from the last token that is not padding: were EOS padding, from the one before it.
    size: of the model's vocabulary, which may end before a padding token that was added."""
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id not in (None, eos) and tokenizer.pad_token_id < size:
        return
    tokens = (tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
    ids = {str(token): int(tokenizer.convert_tokens_to_ids(str(token))) for token in tokens if token is not None}  # type: ignore[arg-type]
    others = [token for token, number in ids.items() if number != eos and number < size]
    if not others:
        raise UserError(f"{name}: the tokenizer has no special token but EOS, which ends every response, to fill rows "
                        "of a reward model up with; set its pad_token")
    tokenizer.pad_token = others[0]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows up: never read by a model nor scored, so any token will do, and EOS has a row in every model."""
    return int(tokenizer.eos_token_id)


def check_ids(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> None:
    """Raises UserError where a token of `rows` is beyond the vocabulary of the model, or of a reference."""
    names = {stage.ref_model_name_or_path for stage in config.stage_configs()}
    sources = [source_of_run(config), *(source_of(name) for name in sorted(filter(None, names)))]
    sizes = {source.model: _vocabulary(config, source) for source in sources}
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size >= len(tokenizer):
        return
    highest = max((max(ids) for ids in rows if len(ids)), default=0)
    if (found := max(int(highest), tokenizer.eos_token_id)) >= size:
        raise UserError(f"{name}: its vocabulary of {size} is smaller than the tokenizer's {len(tokenizer)}, and the "
                        f"token {tokenizer.convert_ids_to_tokens(found)!r} (id {found}) occurs in the data: the model "
                        "has no embedding for it")


def _vocabulary(config: TrainConfig, source: Source) -> int:
    """As config.json has it; without end where it says nothing, or where who loads the model tells what is wrong."""
    try:
        settings = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=config.trust_remote_code
        )
        return int(settings.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return sys.maxsize


def check_saves(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for settings that would be refused when the trained model is saved, hours later."""
    source = source_of_run(config)
    with tempfile.TemporaryDirectory() as folder:
        for what, settings in (("generation_config.json", GenerationConfig), ("config.json", AutoConfig)):
            try:
                found = settings.from_pretrained(source.model, revision=source.revision)
            except (OSError, ValueError, KeyError):  # there is none; or who loads the model says what is wrong with it
                continue
            try:
                found.save_pretrained(folder)
            except Exception as error:
                raise UserError(f"{source.model}: its {what} is one that transformers does not save "
                                f"({first_line(error)}): correct it there") from error
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer cannot be saved ({first_line(error)})") from error


def load_policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, weights: str | Path | None = None) -> Policy:
    """The model to train, in `config.dtype`, on the GPU if there is one. weights: a folder that `save_model` wrote, or
    the checkpoint of several ranks.

    Under a reward model's loss it is a sequence classifier with one label; its score layer is new and random where
    `model_name_or_path` has none (a causal LM).

    Raises UserError for a model that cannot be loaded, is not a causal LM, or computes its logits in a way that the
    fused head does not (found by comparing the two on a few tokens).
    """
    verify(Path(weights or config.model_name_or_path))
    sharded = Path(weights, SHARDED) if weights and Path(weights, SHARDED).is_dir() else None
    model = _load_model(config, weights if weights and not config.use_peft and not sharded else None)
    if sharded:
        load_sharded_weights(model, sharded)
    return prepared(model, config, tokenizer, weights if config.use_peft else None)


def policy_on_meta(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, reference: str | None = None) -> Policy:
    """`load_policy` (`load_reference`) from the model's configuration alone: weights are neither read nor made, so
    nothing is proven, and nothing runs. Its device is where the weights would be."""
    source = source_of(reference) if reference else source_of_run(config)
    with torch.device("meta"):
        try:
            model = from_config(config, source)
        except Exception as error:  # as in _reading
            what = f"{source.model}: no {_kind(config)} whose configuration loads"
            raise UserError(f"{what} ({first_line(error)})") from error
        if reference is None:
            return prepared(_merged(config, model, source), config, tokenizer)
        return take_apart(_adapted(config, model, source), config, tokenizer)


def check_weights(config: TrainConfig) -> None:
    """Raises UserError where a tensor of the model, of a reference, or of an adapter, is not in its files as it has to
    be. From their headers: no model is loaded, and one that is not in a local folder is not looked at."""
    sources = [(source_of(name), False) for stage in config.stage_configs() if (name := stage.ref_model_name_or_path)]
    sources += [] if config.init_from_config else [(source_of_run(config), True)]
    for source, trained in sources:
        with _reading(config, source.model):
            _from_pretrained(config, source, new_score=True, trained=trained, read=check_whole)
            if trained and config.use_peft and (config.merge_adapter or not source.adapter):
                if config.peft or config.lora_target_modules:  # what matches no layer is told before any is loaded
                    with torch.device("meta"):
                        with_lora(config, from_config(config, source))
            if source.adapter:
                with torch.device("meta"):
                    model = from_config(config, source)
                    merge = trained and config.merge_adapter
                    _adapted(config, model, source, new_score=trained and config.reward_model, merge=merge)


def prepared(
    model: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, adapter: str | Path | None = None
) -> Policy:
    """A model that is there, as `config` trains it. adapter: a folder with one to go on from (`use_peft`)."""
    if config.reward_model:  # what a saved one is read with: the padding that its reward is read before, its label
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
        model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    hush(model, noise=config.disable_dropout)
    if config.gradient_checkpointing == "offload" and pick_device().type == "cpu":
        raise UserError("gradient_checkpointing is 'offload', from a GPU to host memory; the device is cpu: set full")
    if config.gradient_checkpointing != "none":
        enable_checkpointing(model, config.gradient_checkpointing)
    if config.use_peft:
        source = source_of_run(config)
        if adapter:
            source = replace(source, adapter=str(adapter), adapter_revision="main")
        if adapter or (source.adapter and not config.merge_adapter):
            model = _adapted(config, model, source, new_score=config.reward_model and not adapter,
                             dropout=config.lora_dropout if config.adapter_dropout else 0.0)
        else:
            model = with_lora(config, model)
    return take_apart(model, config, tokenizer)


def settings_of(config: TrainConfig, source: Source) -> Any:
    """The configuration of a model; None where it does not load: whoever loads the model says what is missing."""
    trust = config.trust_remote_code
    try:
        return AutoConfig.from_pretrained(source.model, revision=source.revision, trust_remote_code=trust)
    except Exception:  # noqa: BLE001
        return None


def longest_of(config: TrainConfig) -> int:
    """The max_length of all stages."""
    return max(stage.max_length for stage in config.stage_configs())


def load_reference(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> Policy:
    """A frozen model from a folder or the hub, an adapter among them, to be used for log-probs and let go."""
    verify(Path(name))
    source = source_of(str(name))
    with _reading(config, source.model):
        model = _placed(_from_pretrained(config, source, trained=False))
    return take_apart(_adapted(config, model, source).requires_grad_(False), config, tokenizer)


def pick_device() -> torch.device:
    """A GPU if torch has one (ROCm's are called cuda too), else the CPU; or what FASTPREF_DEVICE names: mps is never
    taken unasked."""
    name = os.environ.get("FASTPREF_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind):
        raise UserError(f"FASTPREF_DEVICE is {name!r}; of cpu, cuda and mps this torch has "
                        f"{', '.join(kind for kind, has in there.items() if has)} here")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def compute_dtype_of(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the forward pass. On a GPU under fp32 weights bf16 is the default, and fp16 with a loss scaler where bf16 is
    only emulated (T4, V100)."""
    if config.bf16 or config.dtype == "bfloat16":
        return torch.bfloat16
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.bf16 is None and native and not config.fp16:
        return torch.bfloat16
    fp16 = device.type == "cuda" and not native and config.bf16 is None if config.fp16 is None else config.fp16
    return torch.float16 if fp16 else torch.float32


def enable_checkpointing(model: Any, kind: str) -> None:
    """Every layer keeps its input alone (kind "full", "offload"), or also attention and wide matrix products
    ("selective"), and makes the rest again in the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False}  # reentrant, a frozen embedding would cut the gradients off
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    # the newer of the two names came with transformers 5, the older goes with 6
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(options)
    except ValueError as error:
        raise UserError(f"gradient_checkpointing is {kind!r}: {first_line(error)}") from None


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps what is dear to make again for its size: attention, and products at least as wide as their input. The
    narrowing ones are cheap (K and V of grouped queries) or not needed (the MLP's last: only the residual sees it)."""
    name = op.overloadpacket.__name__
    keep = "attention" in name or "attn" in name
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inner, outer = args[-1].shape
        keep = outer >= inner
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _load_model(config: TrainConfig, weights: str | Path | None) -> Any:
    """What is trained, before any adapter that goes on training: of `weights`, which this run has saved, or of
    `model_name_or_path`."""
    source = Source(str(weights)) if weights else source_of_run(config)
    with _reading(config, source.model):
        if config.init_from_config and not weights:
            model = from_config(config, source)
        else:
            new_score = config.reward_model and not weights
            model = _from_pretrained(config, source, new_score=new_score)
        model = _placed(model)
    model = model if weights else _merged(config, model, source)
    if config.use_liger_kernel:
        use_liger_kernels(model)
    return model


@contextmanager
def _reading(config: TrainConfig, name: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # missing files, the hub, the network, a class that is no causal LM: each its own kind
        line = first_line(error)
        if "safetensors" in line and "No such file" not in line:
            line += "; only safetensors weights are loaded, because pickled ones can run code"
        elif "Unrecognized configuration class" in line and hasattr(settings_of(config, Source(name)), "vision_config"):
            line = "it reads images too; TRL's DPOTrainer with fastpref.integrations.trl.patch() trains it"
        raise UserError(f"{name}: no {_kind(config)} that loads ({line})") from error


def _kind(config: TrainConfig) -> str:
    return "sequence classifier with one label" if config.reward_model else "causal language model"


def from_config(config: TrainConfig, source: Source) -> Any:
    """Random weights, or none on the meta device."""
    trust = {"trust_remote_code": config.trust_remote_code}
    settings = AutoConfig.from_pretrained(source.model, revision=source.revision, **trust)
    auto: Any = AutoModelForCausalLM
    if config.reward_model:
        auto, settings.num_labels = AutoModelForSequenceClassification, 1
    return auto.from_config(settings, dtype=getattr(torch, config.dtype), **trust)


def _from_pretrained(config: TrainConfig, source: Source, *, new_score: bool = False, trained: bool = True,
                     read: Callable[..., Any] = load_whole) -> Any:
    settings, device = settings_of(config, source), pick_device()
    quantized.check(config, source, settings, device, trained=trained)
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": config.trust_remote_code}
    options["dtype"] = getattr(torch, config.dtype)
    if read is load_whole:
        options |= quantized.options_of(config, settings, device)
    elif quantized.found_in(settings):  # whose tensors have other names and shapes than the model's: left to the run
        return None
    if config.reward_model:
        return read(AutoModelForSequenceClassification, source.model, new_score=new_score, num_labels=1, **options)
    return read(AutoModelForCausalLM, source.model, **options)


def _placed(model: Any) -> Any:
    """On the device; quantised models are made there."""
    return model if getattr(model, "is_quantized", False) else model.to(pick_device())


def _merged(config: TrainConfig, model: Any, source: Source) -> Any:
    """The model that `merge_adapter` makes, where it is set."""
    if not config.merge_adapter:
        return model
    return _adapted(config, model, source, new_score=config.reward_model, merge=True)


def _adapted(config: TrainConfig, model: Any, source: Source, **options: Any) -> Any:
    """The model with the source's adapter, if it has one. options: of `put_adapter`."""
    if not source.adapter:
        return model
    try:
        return put_adapter(model, source.adapter, source.adapter_revision, reward=config.reward_model, **options)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # damaged files, another model's, kinds that peft or this version does not know
        raise UserError(f"{source.adapter}: no adapter that loads on {source.model} ({first_line(error)})") from error


def with_lora(config: TrainConfig, model: Any) -> Any:
    """A new adapter. On a merged model it belongs to the folder where `keep_merged` puts that."""
    settings = lora_config(config)
    every = settings.target_modules == "all-linear"
    if every:
        left = [name for name, _ in model.named_modules() if _is_left(model, name)]
        settings.exclude_modules = [*left, *(settings.exclude_modules or ())] or None
    if config.lora_dropout is None and "lora_dropout" not in config.peft and has_experts(model):
        settings.lora_dropout = 0.0  # peft has none for 3-D weights
    try:
        adapted = need_peft().get_peft_model(model, settings)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        what = "peft" if config.peft else "lora_target_modules"
        raise UserError(f"{what}: {first_line(error)}") from None
    if every:
        free_routers(adapted)
    if any(stage.loraplus_lr_ratio != 1 for stage in config.stage_configs()):
        beside = next((name for name, _ in adapted.named_parameters() if "lora_embedding" in name), None)
        if beside:  # peft gives these a third rate
            raise UserError(f"loraplus_lr_ratio is of adapters beside linear layers, and {beside} is beside an "
                            "embedding: leave one of the two out")
    if config.merge_adapter:
        adapted.peft_config["default"].base_model_name_or_path = str(Path(config.output_dir, BASE).absolute())
    return adapted


def _is_left(model: Any, name: str) -> bool:
    return is_router(model, name) or _refused_by_peft(model, name)


def _refused_by_peft(model: Any, name: str) -> bool:
    """Layers whose weight a kernel reads past an adapter (Mamba's out_proj)."""
    utils = importlib.import_module("peft.tuners.tuners_utils")
    check = getattr(utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(need_peft().LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def take_apart(model: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Finds trunk and head (see `fastpref.trunk`)."""
    quantized.settle(model)
    try:
        on_meta = next(model.parameters()).is_meta  # a dry run
        parts = take_score_apart(model) if config.reward_model else find_parts(model, proof=not on_meta)
    except ValueError as error:
        raise UserError(str(error)) from None
    device = pick_device() if on_meta else next(model.parameters()).device
    compute_dtype = compute_dtype_of(config, device)
    notes = [note for note in (quantized.note(model), fix_rope(model, longest_of(config))) if note]
    settings, router = unwrap(model).config.get_text_config(), None
    if getattr(settings, "output_router_logits", False):
        try:
            router = None if config.reward_model else router_coefficient(unwrap(model))
        except ValueError as error:
            raise UserError(f"{error}; output_router_logits=false in its config.json leaves it out") from None
        notes.append("output_router_logits: a reward model has no router loss" if router is None
                     else f"router loss times {router:g} in every loss")
    if config.use_peft and hasattr(model, "peft_config"):
        notes.append(adapted_share(model))
    if device.type == "cpu" and compute_dtype in arguments.SLOW_DTYPES:
        name = str(compute_dtype).removeprefix("torch.")
        notes.append(f"in {name} this CPU multiplies slower than in float32, whose weights take twice the memory")
    layout, own, because = _layout(config, model, parts.trunk, compute_dtype)
    made = RewardPolicy if config.reward_model else Policy
    return made(
        model=model,
        trunk=parts.trunk,
        head=parts.head,
        device=device,
        compute_dtype=compute_dtype,
        memory_budget=config.memory_budget,
        tail=config.tail,
        layout=layout,
        padded_because=because,
        own_attention=own,
        notes=tuple(notes),
        router=router,
        offload=config.gradient_checkpointing == "offload",
    )


def _layout(config: TrainConfig, model: Any, trunk: Any, compute_dtype: torch.dtype) -> tuple[Layout, str, str]:
    """(layout, name of the attention that packed batches replaced, why the layout is padded)."""
    asked = config.packing or any(stage.max_tokens_per_batch for stage in config.stage_configs())
    if config.packing is False:
        return "padded", "", ""
    device = pick_device()
    if not asked and device.type == "cuda" and backend(device, compute_dtype) == "torch":
        return "padded", "", f"no attention kernel of variable length for {compute_dtype} on this GPU"
    own = ""
    try:
        kept = [f"{name} {rate:g}" for _, name, rate in noise_of(unwrap(model)) if "att" in name]
        if kept and not config.disable_dropout:
            raise ValueError(f"disable_dropout=false keeps {kept[0]}, and packed batches have none")
        if next(model.parameters()).is_meta:
            check_replaceable(unwrap(model))
        else:
            own = replace_attention(unwrap(model), trunk, compute_dtype)
    except ValueError as error:
        if asked:
            raise UserError(f"{error}; packing=false (without max_tokens_per_batch) pads instead") from None
        return "padded", "", str(error)
    return "shared" if config.prefix_sharing else "packed", own, ""


def keep_merged(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Saves the model that `merge_adapter` makes, where a new adapter is trained on it: nobody else has it."""
    if not (config.merge_adapter and config.use_peft) or (run_dir / BASE).is_dir():
        return
    model = _load_model(config, None)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save(run_dir / BASE, write)


def is_quantised(config: TrainConfig) -> bool:
    """Whether the base of a run's adapter has 4 or 8 bits."""
    return bool(quantized.asked_for(config)) or quantized.is_packed(settings_of(config, source_of_run(config)))


def load_merged(config: TrainConfig, adapter: str | Path, dtype: torch.dtype) -> Any:
    """The model that a run's adapter (a folder) and its base are together, in `dtype`, without peft. A base of 4 or 8
    bits is dequantised: the sum Q + B A is exact in float32, and rounded once to `dtype`, which is what is lost."""
    source = replace(source_of_run(config), adapter=str(adapter), adapter_revision="main")
    with _reading(config, source.model):
        model = _from_pretrained(config, source)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(torch.float32)
    return _adapted(config, model, source, merge=True).to(dtype)


def save_model(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Weights as safetensors (LoRA: the adapter's alone), configuration, tokenizer: what from_pretrained loads.

    weights: a copy of `weights_of(policy)` instead of what the model holds now.
    """
    policy.model.save_pretrained(folder, state_dict=weights)
    if not hasattr(policy.model, "peft_config"):
        save_config(policy.model, folder)
    tokenizer.save_pretrained(folder)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """The tensors that `save_model` writes: all, or with LoRA those that are trained. Of a sharded policy what this
    rank has of them."""
    found = {name: _here(tensor) for name, tensor in policy.model.state_dict().items()}
    if not hasattr(policy.model, "peft_config"):
        return found
    trained = policy.trainable()
    return {name: tensor for name, tensor in found.items() if name in trained}


def _here(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


@torch.no_grad()
def set_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Copies what a `snapshot` of `weights_of(policy)` holds into the policy, in place."""
    for name, tensor in weights_of(policy).items():
        tensor.copy_(weights[name])


@torch.no_grad()
def load_weights(policy: Policy, folder: Path) -> None:
    """Copies what `save_model`, or the ranks of a run, wrote into the policy, in place, tensor by tensor: no second
    model is built.

    Raises UserError for the weights of another model, and for damaged ones.
    """
    verify(folder)
    if (folder / SHARDED).is_dir():
        load_sharded_weights(policy.model, folder / SHARDED)
        return
    if hasattr(policy.model, "peft_config"):
        peft = need_peft()
        wanted = peft.get_peft_model_state_dict(policy.model, save_embedding_layers=False)
        saved = peft.load_peft_weights(str(folder), device="cpu")
        if other := wanted.keys() ^ saved.keys():
            raise UserError(f"{folder}: no weights of this adapter ({some(other)} is in one of the two alone)")
        peft.set_peft_model_state_dict(policy.model, saved)
        return
    own: dict[str, Tensor] = policy.model.state_dict()
    try:
        with ExitStack() as held:
            files = [held.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")]
            saved = {name: file for file in files for name in file.keys()}
            covered = {_here(own[name]).data_ptr() for name in saved if name in own}  # of tied weights one is saved
            if all(name in own for name in saved) and all(_here(t).data_ptr() in covered for t in own.values()):
                for name, file in saved.items():
                    fill(own[name], file.get_tensor(name))
                return
        # an architecture whose names on the disk are not those of its modules: transformers knows how to translate
        dtype = policy.head.weight.dtype
        other = load_whole(AutoModelForCausalLM, str(folder), dtype=dtype).state_dict()
        for name, tensor in own.items():
            fill(tensor, other[name])
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no weights of this model ({first_line(error)})") from error


@contextmanager
def exchanged(policy: Policy, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it the policy has `weights`, a `snapshot` of `weights_of(policy)`, and that holds the policy's own: two
    models in the room of one and a host copy."""

    @torch.no_grad()
    def exchange() -> None:
        done = set()
        for name, tensor in weights_of(policy).items():
            if tensor.data_ptr() not in done:  # tied weights share their memory, here and there
                done.add(tensor.data_ptr())
                own = tensor.to("cpu", copy=True)
                tensor.copy_(weights[name])
                weights[name].copy_(own)

    exchange()
    try:
        yield
    finally:
        exchange()


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: SHA-256 over names, shapes, dtypes and a 64-bit sum of every tensor's bits.

    The sums are integer and position-weighted: exact, the same on every device, and without a copy to the host.
    """
    digest = hashlib.sha256(f"{transformers.__name__} {type(model).__name__}".encode())
    size = 1 << 22
    weights = None
    for name, tensor in sorted(quantized.states_of(model).items()):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        bits = tensor.detach().contiguous().view(-1)
        if bits.dtype != torch.bool:
            bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        if weights is None:
            weights = torch.arange(1, 2 * size, 2, device=bits.device) * 0x9E3779B1
        sums = [(part.long() * weights[: part.numel()]).sum() for part in bits.split(size)] if bits.numel() else []
        values = torch.stack(sums).tolist() if sums else []
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {values}".encode())
    return digest.hexdigest()[:32]
