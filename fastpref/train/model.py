"""The policy: a transformers causal LM, loaded, taken apart into trunk and LM head (trunk.py), scored and saved."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpref.attention import backend, own_attention, replace_attention
from fastpref.data import Batch, Layout
from fastpref.head import PreferenceOutput, linear_preference_loss
from fastpref.losses import SFT, LossFunction, Totals
from fastpref.trunk import Head, check_vocabulary, unwrap
from fastpref.trunk import take_apart as find_parts

from .checkpoint import SHARDED, load_sharded_weights
from .config import TrainConfig, UserError
from .kernels import use_liger_kernels


@dataclass(frozen=True)
class Policy:
    """A model and its parts. fp32 weights with `compute_dtype` bf16: the forward pass runs under autocast."""

    model: Any  # what is trained, saved and generates: a PreTrainedModel, or a PeftModel around one
    trunk: Any
    head: Head
    device: torch.device
    compute_dtype: torch.dtype
    memory_budget: int | None
    layout: Layout = "padded"  # of the batches it takes
    padded_because: str = ""  # why not packed, where that was left to the program
    own_attention: str = ""  # the model's own attention, where packed batches have replaced it
    offload: bool = False  # what autograd saves outside checkpointed layers waits in host memory: the layers' inputs

    def hidden_rows(self, batch: Batch) -> Tensor:
        """[N, H]: the hidden rows that predict a scored token."""
        # No attention mask: padding is on the right, where causal attention never reaches it from a real token, and
        # without a mask SDPA takes its faster causal kernel.
        packed: dict[str, Any] = {}  # not every trunk takes positions
        if batch.attention_plan is not None:
            packed = {"position_ids": batch.position_ids, "attention_plan": batch.attention_plan}
        with self.autocast(), self._saving():
            hidden = self.trunk(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.score_rows)

    def score(self, batch: Batch, loss: LossFunction, totals: Totals | None = None, **inputs: Any) -> PreferenceOutput:
        """One call of `linear_preference_loss` on a batch that is on the device. `inputs` go to it as they are."""
        hidden = self.hidden_rows(batch)
        with self.autocast():  # the head then works in bf16, and its weight's gradient is still fp32
            hidden, weight, bias = self.head.operands(hidden)
            return linear_preference_loss(
                hidden,
                weight,
                batch.targets,
                loss=loss,
                cu_seqlens=batch.cu_seqlens,
                bias=bias,
                softcap=self.head.softcap,
                logit_scale=self.head.logit_scale,
                memory_budget=self.memory_budget,
                totals=totals,
                **inputs,
            )

    def sequence_logps(self, batch: Batch) -> Tensor:
        """[S] fp32, detached: one forward pass."""
        with torch.no_grad():
            return self.score(batch, SFT()).logps

    def autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == self.head.weight.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def generating(self) -> AbstractContextManager[None]:
        """The model with the attention it came with, which knows masks and caches."""
        return own_attention(unwrap(self.model), self.own_attention) if self.own_attention else nullcontext()

    def _saving(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    name = config.tokenizer_name_or_path or config.model_name_or_path
    revision = {} if config.tokenizer_name_or_path else {"revision": config.model_revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **revision)
    except Exception as error:  # missing files, the hub, the network, a broken tokenizer.json: each its own kind
        raise UserError(f"{name}: no tokenizer that loads ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no EOS token to end responses with; set its eos_token")
    return tokenizer


def load_policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, weights: str | Path | None = None) -> Policy:
    """The model to train, in `config.dtype`, on the GPU if there is one. weights: a folder that `save_model` wrote, or
    the checkpoint of several ranks.

    Raises UserError for a model that cannot be loaded, is not a causal LM, or computes its logits in a way that the
    fused head does not (found by comparing the two on a few tokens).
    """
    adapted = config.use_peft
    sharded = Path(weights, SHARDED) if weights and Path(weights, SHARDED).is_dir() else None
    model = _load_model(config, weights if weights and not adapted and not sharded else None)
    if sharded:
        load_sharded_weights(model, sharded)
    _no_dropout(model)
    if config.gradient_checkpointing == "offload" and model.device.type == "cpu":
        raise UserError("gradient_checkpointing is 'offload', from a GPU to host memory; the device is cpu: set full")
    if config.gradient_checkpointing != "none":
        enable_checkpointing(model, config.gradient_checkpointing)
    if adapted:
        model = _with_lora(config, model, weights)
    return take_apart(model, config, tokenizer)


def load_reference(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> Policy:
    """A frozen model from a folder or the hub, to be used for log-probs and let go."""
    if config.use_peft and (Path(name) / "adapter_config.json").is_file():
        return load_policy(config, tokenizer, name)
    return take_apart(_load_model(config, name).requires_grad_(False), config, tokenizer)


def pick_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
        raise UserError(f"gradient_checkpointing is {kind!r}: {_first_line(error)}") from None


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
    name = str(weights or config.model_name_or_path)
    dtype = getattr(torch, config.dtype)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if not weights:
        common["revision"] = config.model_revision
    try:
        if config.init_from_config and not weights:
            settings = AutoConfig.from_pretrained(name, **common)
            common.pop("revision")
            model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype, **common)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **common)
        model = model.to(pick_device())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing files, the hub, the network, a class that is no causal LM: each its own kind
        line = _first_line(error)
        if "safetensors" in line:
            line += "; only safetensors weights are loaded, because pickled ones can run code"
        raise UserError(f"{name}: no causal language model that loads ({line})") from error
    if config.use_liger_kernel:
        use_liger_kernels(model)
    return model


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _no_dropout(model: nn.Module) -> None:
    """Preference losses compare log-probs of two models; dropout would compare noise. LoRA's own comes later."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _with_lora(config: TrainConfig, model: Any, weights: str | Path | None) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("use_peft needs the package peft: pip install peft") from None
    if weights:
        return peft.PeftModel.from_pretrained(model, str(weights), is_trainable=True)
    targets: Any = list(config.lora_target_modules or ("all-linear",))
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules="all-linear" if targets == ["all-linear"] else targets,
            ),
        )
    except ValueError as error:
        raise UserError(f"lora_target_modules: {_first_line(error)}") from None


def take_apart(model: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Finds trunk and head (see `fastpref.trunk`), and checks that the vocabulary holds the tokenizer's ids."""
    try:
        check_vocabulary(model, tokenizer)
        parts = find_parts(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    device = next(model.parameters()).device
    bf16 = config.bf16 or config.dtype == "bfloat16"
    if config.bf16 is None and not bf16:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    compute_dtype = torch.bfloat16 if bf16 else torch.float32
    layout, own, because = _layout(config, model, parts.trunk, compute_dtype)
    return Policy(
        model=model,
        trunk=parts.trunk,
        head=parts.head,
        device=device,
        compute_dtype=compute_dtype,
        memory_budget=config.memory_budget,
        layout=layout,
        padded_because=because,
        own_attention=own,
        offload=config.gradient_checkpointing == "offload",
    )


def _layout(config: TrainConfig, model: Any, trunk: Any, compute_dtype: torch.dtype) -> tuple[Layout, str, str]:
    """(layout, name of the attention that packed batches replaced, why the layout is padded)."""
    asked = config.packing or any(stage.max_tokens_per_batch for stage in config.stage_configs())
    if config.packing is False:
        return "padded", "", ""
    device = next(model.parameters()).device
    if not asked and device.type == "cuda" and backend(device, compute_dtype) == "torch":
        return "padded", "", f"no attention kernel of variable length for {compute_dtype} on this GPU"
    try:
        own = replace_attention(unwrap(model), trunk, compute_dtype)
    except ValueError as error:
        if asked:
            raise UserError(f"{error}; packing=false (without max_tokens_per_batch) pads instead") from None
        return "padded", "", str(error)
    return "shared" if config.prefix_sharing else "packed", own, ""


def save_model(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Weights as safetensors (LoRA: the adapter's alone), configuration, tokenizer: what from_pretrained loads.

    weights: a copy of `weights_of(policy)` instead of what the model holds now.
    """
    policy.model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """The tensors that `save_model` writes: all, or with LoRA those that are trained."""
    found: dict[str, Tensor] = policy.model.state_dict()
    if not hasattr(policy.model, "peft_config"):
        return found
    trained = policy.trainable()
    return {name: tensor for name, tensor in found.items() if name in trained}


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: SHA-256 over names, shapes, dtypes and a 64-bit sum of every tensor's bits.

    The sums are integer and position-weighted: exact, the same on every device, and without a copy to the host.
    """
    digest = hashlib.sha256(f"{transformers.__name__} {type(model).__name__}".encode())
    size = 1 << 22
    weights = None
    for name, tensor in sorted(model.state_dict().items()):
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
