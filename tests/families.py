"""Tiny, randomly initialised models of transformers' families, and the full-logits loss they are compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

VOCAB = 96
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)


def _config(name: str, **changes: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**(_SIZES | changes))


CONFIGS = {
    "llama": _config("Llama"),
    "qwen2, tied": _config("Qwen2", tie_word_embeddings=True),
    "qwen3": _config("Qwen3", head_dim=16),
    "mistral": _config("Mistral", head_dim=16, sliding_window=4),
    "gemma2, softcap": _config("Gemma2", head_dim=16, final_logit_softcapping=1.5, query_pre_attn_scalar=16),
    "granite, logits_scaling": _config("Granite", logits_scaling=4.0),
    "cohere, logit_scale": _config("Cohere", logit_scale=0.3, num_key_value_heads=2),
    "falcon_h1, lm_head_multiplier": _config(
        "FalconH1", lm_head_multiplier=0.5, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=8, mamba_chunk_size=8,
    ),
    "phi, bias": _config("Phi", num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "mpt, its logit_scale unused": _config("Mpt", d_model=32, n_heads=2, n_layers=2, max_seq_len=64, logit_scale=2.0),
    "falcon, attention of its own": transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_kv_heads=2,
    ),
    "bloom, no position ids": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2),
    "mixtral, router loss": _config(
        "Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1
    ),
    "gpt_oss, router loss": _config(
        "GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.1,
    ),
    "qwen2_moe, router loss": _config(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        output_router_logits=True, router_aux_loss_coef=0.1, decoder_sparse_step=1,
    ),
}
_LLAMA4: dict[str, Any] = {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2,
                           "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "pad_token_id": 0}
for _name, _label, _changes in (  # not in every version of transformers
    ("Llama4Text", "llama4, base_model is the model", _LLAMA4),
    ("HyperCLOVAX", "hyperclovax, logits_scaling multiplies", {"logits_scaling": 0.25, "head_dim": 16}),
    ("MiniCPM3", "minicpm3, scaled before the head", {
        "dim_model_base": 8, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16,
    }),
):
    if hasattr(transformers, f"{_name}Config"):
        CONFIGS[_label] = _config(_name, **_changes)


def make_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Visible biases and norms, and logits worth a soft cap. fp64, or fp32 where a family knows no other (experts)."""
    dtype = dtype or (torch.float32 if "router" in name else torch.float64)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def make_batch(pairs: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Right-padded, prompts not scored, in TRL's layout and names."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, VOCAB, (2 * pairs, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for s in range(2 * pairs):
        end, start = length - s % 3, 2 + s % 2
        attention_mask[s, end:] = 0
        completion_mask[s, start:end] = 1
        input_ids[s, end:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def full_logits_logps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """([S] sequence log-probs by autograd over the model's own logits, its output)."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logps = out.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    scored = (batch["completion_mask"] * batch["attention_mask"])[:, 1:]
    return (logps * scored).sum(1), out
