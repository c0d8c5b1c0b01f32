"""`torch_compile`: each layer of the trunk compiled by itself, as torchtitan does it; all of a kind share one code.

    embedding, positions     as they are
    layer, layer, ...        one graph each, without a break; sizes of batches are symbols in it
    final norm, LM head      as they are (the head is fused already)

A layer's `forward` is what is compiled, in its place: names of weights stay as they are, and hooks (FSDP's, which
gather weights) run before and behind it. Checkpointing is inside. Generation runs the layers as they came.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental import _config as symbols
from transformers import PreTrainedTokenizerBase, masking_utils, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpref.attention import attend_packed
from fastpref.data import Example, collate
from fastpref.errors import UserError, first_line
from fastpref.trunk import layers_of, unwrap

from .config import TrainConfig
from .model import Policy, is_quantised, pick_device, policy_on_meta

LOG = logging.getLogger(__name__)
BACKEND = "inductor"
# Graphs of one code: kinds of layers, times training, scoring without gradient, and that without an adapter. torch's
# own limit of 8 ends a run.
MOST_GRAPHS = 64


def compile_layers(policy: Policy, config: TrainConfig) -> Policy:
    """The policy with its layers compiled, if the configuration says so; after sharding."""
    if not config.torch_compile:
        return policy
    compile_in_place(layers_of(unwrap(policy.model), policy.trunk), BACKEND)
    return replace(policy, compiled=True)


def compile_in_place(layers: Iterable[Any], backend: str) -> None:
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    symbols.use_duck_shape = False  # else a batch of as many tokens as a weight has rows makes code for that number
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)


def check_compiles(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError, before weights are loaded, where the layers cannot be compiled: they are traced on the meta
    device, forward and backward."""
    if not config.torch_compile:
        return
    if lacks := _lacks(config, pick_device()):
        raise UserError(f"torch_compile {lacks}; or leave torch_compile out")
    if is_quantised(config):  # config.json says so: where a key asks for it, the configuration is refused
        raise UserError(f"torch_compile: {config.model_name_or_path} is quantised, and layers of so few bits are not "
                        "compiled: leave it out")
    policy = policy_on_meta(config, tokenizer)
    model = unwrap(policy.model)
    layers = layers_of(model, policy.trunk)
    if not layers:
        raise UserError(f"torch_compile: {type(model).__name__} names no layers (_no_split_modules): leave it out")
    if policy.router is not None:
        raise UserError(f"torch_compile: the layers of {type(model).__name__} cannot be compiled in one piece, its "
                        "router's loss is collected in them: set output_router_logits=false in its config.json, or "
                        "leave it out")
    if policy.layout != "padded":
        attend_packed(model)
    batch = collate([Example(0, [1, 1, 1], ([1, 1, 1], [1, 1]))], 0, layout=policy.layout).to("meta")
    policy.model.train()
    try:
        compile_in_place(layers, "aot_eager")
        # transformers looks at values of masks and ids where nothing traces it, and the meta device has none.
        in_masks, in_models = (patch.object(module, "is_tracing", lambda *_: True, create=True)
                               for module in (masking_utils, modeling_utils))
        with in_masks, in_models:
            replace(policy, compiled=True).hidden_rows(batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"torch_compile: the layers of {type(model).__name__} cannot be compiled in one piece "
                        f"({first_line(error)}): leave it out") from error
    except Exception as error:  # noqa: BLE001  # code outside the layers that looks at values: the run will tell
        LOG.debug("torch_compile: not tried on the meta device: %s", first_line(error))
    finally:
        torch.compiler.reset()


def _lacks(config: TrainConfig, device: torch.device) -> str:
    """What compiled code needs and is not here, and the way out; "" if nothing is missing."""
    if device.type not in ("cpu", "cuda"):
        return f"takes a GPU of CUDA or ROCm, or a CPU, and the device is {device.type}"
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(compiler.split()[0]) is None:
        return f"needs a C++ compiler, and {compiler} is not installed: install it, or name another in CXX (GPU: CC)"
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "needs triton, which is not installed: pip install triton"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
            return f"needs a GPU of compute capability 7.0 or newer, and {torch.cuda.get_device_name(device)} is older"
    if config.gradient_checkpointing == "selective" and "__call__" in vars(GradientCheckpointingLayer):
        return "under gradient_checkpointing=selective needs a newer transformers (5.23 will do): upgrade it, set full"
    return ""
