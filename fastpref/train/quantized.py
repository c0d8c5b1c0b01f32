"""Bases of 4 or 8 bits (bitsandbytes) under an adapter: asked for, read, computed with, merged.

    y = x Q^T + B A x     Q: the weight as its codes say, in the compute dtype; frozen. A, B: float32, trained

Q is made for each product and let go, in both passes. Embeddings, norms, biases and the LM head are not quantised, so
that log-probs are those of a model with weights Q, exactly. What bitsandbytes would do otherwise, and would make policy
and reference two different models, is off: on CPUs with AVX512-BF16 it packs 4-bit weights anew in evaluation mode and
multiplies in bf16; 8-bit layers quantise activations too, by what else is in the batch, but on a CPU in train mode.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from fastpref.errors import UserError, first_line

from .source import Source

if TYPE_CHECKING:
    from .config import TrainConfig

METHOD = "bitsandbytes"
logging.getLogger(METHOD).setLevel(logging.ERROR)  # kernels of a hub that a CPU could have; casts in layers not used
WHOLE = ("mxfp4", "fp8")  # which transformers reads as 16-bit weights, if asked to


def found_in(settings: Any) -> dict[str, Any]:
    """The quantization_config of a model's configuration; {} for one that is not quantised."""
    found = getattr(settings, "quantization_config", None)
    return dict(found if isinstance(found, dict) else found.to_dict()) if found else {}


def is_packed(settings: Any) -> bool:
    """Whether a model's files hold codes in place of weights."""
    return found_in(settings).get("quant_method") == METHOD


def asked_for(config: TrainConfig) -> str:
    """The key that asks for it, or ""."""
    return "load_in_4bit" if config.load_in_4bit else "load_in_8bit" if config.load_in_8bit else ""


def check(config: TrainConfig, source: Source, settings: Any, device: torch.device, *, trained: bool) -> None:
    """Raises UserError for a model that is quantised in a way that is not trained here, or for want of bitsandbytes.
    settings: the model's configuration, or None; trained: no mere reference."""
    there, key = found_in(settings), asked_for(config)
    method = str(getattr(there.get("quant_method"), "value", there.get("quant_method") or ""))
    if method and method != METHOD and method not in WHOLE:
        raise UserError(f"{source.model}: is quantised already, with {method}; of quantised models it takes those of "
                        "bitsandbytes: take the model that it was made from, with load_in_4bit=true")
    if method and method != METHOD and key:
        raise UserError(f"{key}: {source.model} is quantised already, with {method}; leave it out (it is then read as "
                        "16-bit weights), or take the model that it was made from")
    if method == METHOD:
        bits = "4" if there.get("load_in_4bit", there.get("_load_in_4bit")) else "8"
        if trained and not config.use_peft:
            raise UserError(f"{source.model}: is quantised already, to {bits} bits, and such weights are not trained: "
                            "set use_peft=true for an adapter beside them, or take the model that it was made from")
        if key and bits not in key:
            raise UserError(f"{key}: {source.model} is quantised already, to {bits} bits: leave it out, or take the "
                            "model that it was made from")
        if trained and config.merge_adapter:
            raise UserError(f"merge_adapter adds to whole weights, and {source.model} is quantised, to {bits} bits: "
                            "merge into the model that it was made from, and load that with load_in_4bit=true")
    if key or method == METHOD:
        _need(key or f"{source.model}, which is quantised,", device)


def _need(what: str, device: torch.device) -> None:
    for package in (METHOD, "accelerate"):
        if find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed: pip install {package}")
    try:
        import bitsandbytes
    except Exception as error:  # a library that does not load
        raise UserError(f"{what} needs bitsandbytes, which is broken here ({first_line(error)}): pip install "
                        "--force-reinstall bitsandbytes") from None
    known = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in known:
        raise UserError(f"{what} needs a bitsandbytes with a backend for {device.type}; {bitsandbytes.__version__} has "
                        f"{', '.join(sorted(known))}: pip install --upgrade bitsandbytes")


def options_of(config: TrainConfig, settings: Any, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes beside the usual, for a model whose configuration is `settings`."""
    there, key = found_in(settings), asked_for(config)
    if there and not is_packed(settings):
        import transformers

        kind = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}[str(there["quant_method"])]
        return {"quantization_config": getattr(transformers, kind)(dequantize=True)}
    if not (key or there):
        return {}
    options: dict[str, Any] = {"device_map": {"": str(device)}}  # a weight is read, quantised there, and let go
    if not there:
        storage = config.bnb_4bit_quant_storage
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.load_in_4bit,
            load_in_8bit=config.load_in_8bit,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
            bnb_4bit_quant_storage=storage,
        )
    return options


# ---- what its layers compute -----------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> Iterator[Any]:
    """The quantised ones."""
    if METHOD in sys.modules:  # else nobody has made any
        bnb = importlib.import_module(METHOD).nn
        yield from (m for m in model.modules() if isinstance(m, (bnb.Linear4bit, bnb.Linear8bitLt)))


def settle(model: nn.Module) -> None:
    """Products in the dtype of the input, or of autocast, the same in train and evaluation mode, and whatever else is
    in a batch."""
    for layer in layers_of(model):
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()
            layer.state.CB = None  # the weight itself, which FSDP cuts
        layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if hasattr(layer, "quant_state"):
        state = layer.weight.quant_state if hasattr(layer.weight, "quant_state") else layer.quant_state  # FSDP has cut
        product: Tensor = importlib.import_module(METHOD).matmul_4bit(x, layer.weight, bias=bias, quant_state=state)
        return product
    product = _Product8bit.apply(x, layer.weight.data, layer.state.SCB)
    return product if bias is None else product + bias


class _Product8bit(torch.autograd.Function):
    """x Q^T with Q = codes * scales / 127. bitsandbytes' own keeps x, of which a frozen weight has no use, and which
    checkpointing could not free."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, _whole(codes, scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ _whole(*ctx.saved_tensors).to(gradient.dtype), None, None


def _whole(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.mul(codes, (scales.float() / 127.0)[:, None])


def numbers(module: Any) -> int:
    """How many numbers a module's own weight has: of 4-bit ones two or more lie in one element."""
    state = getattr(module, "quant_state", None)
    return math.prod(state.shape) if state is not None else module.weight.numel()


def parameters_of(model: nn.Module) -> int:
    """All of a model's numbers."""
    packed = sum(numbers(layer) - layer.weight.numel() for layer in layers_of(model))
    return packed + sum(p.numel() for p in model.parameters())


def note(model: nn.Module) -> str:
    """For the log: how many of the weights are quantised; "" for a model without such."""
    layers = list(layers_of(model))
    if not layers:
        return ""
    first, share = layers[0].weight, 100 * sum(map(numbers, layers)) / parameters_of(model)
    kind = "8 bits"
    if hasattr(layers[0], "quant_state"):
        kind = f"4 bits ({first.quant_type}{', nested scales' if first.compress_statistics else ''})"
    return f"{share:.2g} % of the weights in {kind}"


def states_of(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, with the scales of 4-bit weights also where FSDP has cut those, which then do not tell of them."""
    found: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if getattr(module, "quant_state", None) is not None:
            parts = module.quant_state.as_dict(packed=True)
            found |= {f"{name}.weight.{key}": value for key, value in parts.items()}
    return found
