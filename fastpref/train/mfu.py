"""Model FLOP/s utilisation: what the steps had to compute, over what the device could have (arXiv 2204.02311, app. B).

Counted are 2 FLOP a weight and token for a forward pass, 2 for the gradient of the input, 2 for that of a weight that
is trained; the LM head's on scored tokens only; attention over the (query, key) pairs that the causal mask leaves. What
is computed again (checkpointing, a recomputing head) does not count, and a shared prompt counts once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastpref.data import Batch
from fastpref.trunk import unwrap

from .model import Policy
from .quantized import numbers
from .traits import has_experts

# Dense bf16 tensor-core TFLOP/s, fp32 accumulation: NVIDIA's data sheet of each product, for GeForce and RTX its GA102,
# Ada and Blackwell white papers (half the figure where a sheet gives it with sparsity); AMD's data sheet of MI300X.
PEAK_TFLOPS = {
    "B200": 2250, "GB200": 2500, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148,
    "A100": 312, "A30": 165, "A40": 149.7, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364,
    "RTX A6000": 154.8, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71, "MI300X": 1307,
}


def peak_flops(name: str, compute_dtype: torch.dtype) -> float | None:
    """FLOP/s of the device called `name`; None for one that is not known, a slice of one (MIG), and other than bf16."""
    if compute_dtype != torch.bfloat16 or "MIG" in name:
        return None
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


@dataclass(frozen=True)
class ModelFlops:
    """Weights that a token meets, and what a (query, key) pair costs in all layers."""

    trunk: int
    trunk_trained: int
    head: int
    head_trained: int
    pair: int  # FLOP, forward

    def of(self, batches: Sequence[Batch]) -> float:
        """FLOP of one step: forward and backward on `batches`, and forward on KTO's mismatched sequences."""
        total = 0
        for batch in batches:
            tokens, scored = batch.processed_tokens, batch.num_tokens
            total += tokens * (4 * self.trunk + 2 * self.trunk_trained)
            total += scored * (4 * self.head + 2 * self.head_trained) + 3 * self.pair * causal_pairs(batch)
            if batch.kl is not None:
                total += 2 * (batch.kl.processed_tokens * self.trunk + batch.kl.num_tokens * self.head)
                total += self.pair * causal_pairs(batch.kl)
        return float(total)


def causal_pairs(batch: Batch) -> int:
    """(query, key) pairs with the key no later than the query."""
    plan = batch.attention_plan
    queries, keys = (batch.lengths, batch.lengths) if plan is None else (plan.q_lengths, plan.k_lengths)
    return sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys))


def model_flops(policy: Policy) -> ModelFlops | None:
    """None for a mixture of experts, whose tokens meet a part of the weights only, and for layers that are no attention
    (Mamba, RWKV)."""
    config = unwrap(policy.model).config.get_text_config()
    if has_experts(policy.model) or not getattr(config, "num_attention_heads", None):
        return None
    weights = [
        (numbers(module), weight.requires_grad)
        for module in policy.trunk.modules()
        if not isinstance(module, nn.Embedding)
        and (weight := module._parameters.get("weight")) is not None
        and weight.ndim == 2
    ]
    head = policy.head.weight
    pair = 0
    if not getattr(config, "sliding_window", None):  # else some layers see fewer pairs: rather none than too many
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 4 * config.num_hidden_layers * config.num_attention_heads * width
    return ModelFlops(
        sum(count for count, _ in weights), sum(count for count, trained in weights if trained), head.numel(),
        head.numel() * head.requires_grad, pair,
    )
