"""liger-kernel's RMSNorm, RoPE and SwiGLU in place of the model's own (`use_liger_kernel`)."""

from __future__ import annotations

from typing import Any

import torch

from fastpref.errors import UserError
from fastpref.trunk import evaluating


def use_liger_kernels(model: Any) -> None:
    """Replaces what liger-kernel has for this architecture, except its losses: the head is fused here already.

    Liger patches the module of the model's class too (RoPE is a function there), so that other models of that class
    get it as well. UserError where that cannot work, or changes the logits of a few tokens.
    """
    if model.device.type != "cuda":
        raise UserError("use_liger_kernel: liger-kernel's Triton kernels take a CUDA device; leave it out on this one")
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(f"use_liger_kernel needs liger-kernel: pip install liger-kernel ({error})") from None
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"use_liger_kernel: liger-kernel has none for {kind} models; leave it out")
    apply_kernels(model)


def apply_kernels(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    ids = torch.arange(3, 15, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), evaluating(model):
        before = model(input_ids=ids, use_cache=False).logits.double()
        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
        after = model(input_ids=ids, use_cache=False).logits.double()
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-6))
    if not error < (1e-3 if model.dtype == torch.float32 else 3e-2):
        raise UserError(
            f"use_liger_kernel: liger-kernel's kernels change this model's logits (relative difference {error:.1g}); "
            "leave it out, or try another version of liger-kernel"
        )
