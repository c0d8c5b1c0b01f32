"""The policy: a transformers causal LM taken apart into its trunk and its LM head, so that no logits are ever built.

    hidden = trunk(input_ids)            [B, L, H], the last norm included
    logits = softcap(logit_scale * (hidden @ W.T + bias))        what the fused head computes from W, row by row
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastpref.data import Batch
from fastpref.head import PreferenceOutput, linear_preference_loss
from fastpref.losses import SFT, LossFunction, Totals

from .config import TrainConfig, UserError


@dataclass(frozen=True)
class Policy:
    """A model and its parts. Weights are fp32; with `compute_dtype` bf16 the forward pass runs under autocast."""

    model: Any  # what is trained, saved and generates: a PreTrainedModel, or a PeftModel around one
    trunk: Any
    head: nn.Linear
    logit_scale: float
    softcap: float | None
    device: torch.device
    compute_dtype: torch.dtype
    memory_budget: int | None

    def hidden_rows(self, batch: Batch) -> Tensor:
        """[N, H]: the hidden rows that predict a scored token."""
        # No attention mask: padding is on the right, where causal attention never reaches it from a real token, and
        # without a mask SDPA takes its faster causal kernel.
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}  # not all take any
        with self.autocast():
            hidden = self.trunk(input_ids=batch.input_ids, use_cache=False, **positions).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.score_rows)

    def score(self, batch: Batch, loss: LossFunction, totals: Totals | None = None, **inputs: Any) -> PreferenceOutput:
        """One call of `linear_preference_loss` on a batch that is on the device. `inputs` go to it as they are."""
        hidden = self.hidden_rows(batch)
        with self.autocast():  # the head then works in bf16, and its weight's gradient is still fp32
            return linear_preference_loss(
                hidden,
                self.head.weight,
                batch.targets,
                loss=loss,
                cu_seqlens=batch.cu_seqlens,
                bias=self.head.bias,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                memory_budget=self.memory_budget,
                totals=totals,
                **inputs,
            )

    def sequence_logps(self, batch: Batch) -> Tensor:
        """[S] fp32, detached: one forward pass."""
        with torch.no_grad():
            return self.score(batch, SFT()).logps

    def autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

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
    """The model to train, fp32 on the GPU if there is one. weights: a folder this module's `save_model` wrote.

    Raises UserError for a model that cannot be loaded, is not a causal LM, or computes its logits in a way that the
    fused head does not (found by comparing the two on a few tokens).
    """
    adapted = config.use_peft
    model = _load_model(config, weights if weights and not adapted else None)
    _no_dropout(model)
    if config.gradient_checkpointing:  # the newer of the two names came with transformers 5, the older goes with 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # reentrant, a frozen embedding (LoRA) would cut the gradients off
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


def _load_model(config: TrainConfig, weights: str | Path | None) -> Any:
    name = str(weights or config.model_name_or_path)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if not weights:
        common["revision"] = config.model_revision
    try:
        if config.init_from_config and not weights:
            settings = AutoConfig.from_pretrained(name, **common)
            common.pop("revision")
            model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **common)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **common)
        return model.to(pick_device())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing files, the hub, the network, a class that is no causal LM: each its own kind
        line = _first_line(error)
        if "safetensors" in line:
            line += "; only safetensors weights are loaded, because pickled ones can run code"
        raise UserError(f"{name}: no causal language model that loads ({line})") from error


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
    """Finds trunk and head, and proves on a few tokens that together they give the model's own logits."""
    inner = model.get_base_model() if config.use_peft and hasattr(model, "get_base_model") else model
    what = type(inner).__name__
    trunk, head = inner.base_model, inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        found = "none" if head is None else type(head).__name__
        hint = "; leave the LM head out of lora_target_modules" if "lora" in type(head).__module__ else ""
        raise UserError(f"{what}: its LM head is {found}, the fused head takes a torch.nn.Linear{hint}")
    if trunk is inner:
        raise UserError(f"{what}: has no trunk apart from its LM head")
    if len(tokenizer) > head.out_features:
        size = head.out_features
        raise UserError(f"{what}: its vocabulary of {size} is smaller than the tokenizer's {len(tokenizer)}")
    settings = inner.config.get_text_config()
    scale = getattr(settings, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(settings, "logits_scaling", None) or 1.0  # Granite
    scale *= getattr(settings, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    softcap = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
    softcap = softcap or getattr(settings, "logits_soft_cap", None)  # RecurrentGemma
    device = next(model.parameters()).device
    bf16 = config.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    policy = Policy(
        model=model,
        trunk=trunk,
        head=head,
        logit_scale=float(scale),
        softcap=softcap,
        device=device,
        compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        memory_budget=config.memory_budget,
    )
    _prove(policy, what)
    return policy


@torch.no_grad()
def _prove(policy: Policy, what: str) -> None:
    """A class may scale hidden rows or logits in a way that no common name tells; then its loss would be another's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.head.out_features, (1, 12), generator=generator).to(policy.device)
    was_training = policy.model.training
    policy.model.eval()
    expected = policy.model(input_ids=ids, use_cache=False).logits.float()
    padded = torch.cat((ids, ids.flip(1)), dim=1)  # what stands behind a token must not change it: right padding
    hidden = policy.trunk(input_ids=padded, use_cache=False).last_hidden_state[:, : ids.shape[1]]
    logits = policy.head(hidden).float() * policy.logit_scale
    if policy.softcap is not None:
        logits = policy.softcap * torch.tanh(logits / policy.softcap)
    policy.model.train(was_training)
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error < 1e-3:
        raise UserError(
            f"{what}: trunk and LM head do not give its logits (relative difference {error:.1g}); it computes them in "
            "a way that the fused head does not know, or does not attend causally"
        )


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights as safetensors (LoRA: the adapter's alone), configuration, tokenizer: what from_pretrained loads."""
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: SHA-256 over names, shapes, dtypes and a 64-bit sum of every tensor's bits.

    The sums are integer and position-weighted: exact, the same on every device, and without a copy to the host.
    """
    digest = hashlib.sha256(f"{transformers.__name__} {type(model).__name__}".encode())
    size = 1 << 22
    weights = None
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.detach().contiguous().view(-1)
        if bits.dtype != torch.bool:
            bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        if weights is None:
            weights = torch.arange(1, 2 * size, 2, device=bits.device) * 0x9E3779B1
        sums = [(part.long() * weights[: part.numel()]).sum() for part in bits.split(size)] if bits.numel() else []
        values = torch.stack(sums).tolist() if sums else []
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {values}".encode())
    return digest.hexdigest()[:32]
