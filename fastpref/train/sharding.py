"""A policy sharded over ranks (FSDP2), and its checkpoints, which any number of ranks can read.

    trunk     fully_shard: each layer's weights are gathered while it works, its gradients reduced when it is done
    LM head   each rank keeps its rows of W and multiplies all ranks' hidden rows with them (fastpref/sharded.py)
    LoRA      whole on every rank: adapters are small; their gradients are added up before the update

Gradients are SUMS over ranks: losses are normalised by the counts of the global batch, so that their parts add up. With
`dp_replicate` (HSDP) each of so many groups of ranks holds the whole model, and only gradients travel between them.

    checkpoint/sharded/     torch.distributed.checkpoint: "model.NAME", and "optimizer.NAME.STATE" of what is trained
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastpref.errors import SaveError, UserError
from fastpref.files import crc32_of
from fastpref.trunk import layers_of, unwrap

from . import ranks
from .checkpoint import SHARDED, verify
from .compiled import compile_layers
from .config import TrainConfig
from .model import Policy, load_policy, weights_of
from .optim import check_shards
from .shards import last_line, read_sharded, sharded_metadata


def load(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, weights: str | Path | None = None) -> Policy:
    """`load_policy`, sharded, then compiled. The ranks of a host load one after another: its memory holds one model on
    its way to the GPUs, not as many as there are."""
    verify(Path(weights or config.model_name_or_path), together=True)
    return compile_layers(shard(ranks.in_turns(lambda: load_policy(config, tokenizer, weights)), config), config)


def shard(policy: Policy, config: TrainConfig) -> Policy:
    """The policy with its weights spread over the ranks of this run; every rank has them whole before."""
    if ranks.size() == 1:
        return policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not config.use_peft and any(stage.optimizer == "adamw_torch_8bit" for stage in config.stage_configs()):
        check_shards(policy.trainable(), ranks.size())
    head: Any = policy.head.module
    inner, copies = unwrap(policy.model), config.dp_replicate
    names = ("replicate", "shard")
    if copies > 1:
        mesh = init_device_mesh(policy.device.type, (copies, ranks.size() // copies), mesh_dim_names=names)
    else:
        mesh = init_device_mesh(policy.device.type, (ranks.size(),), mesh_dim_names=names[1:])
    adapters = set(policy.trainable().values()) if config.use_peft else set()
    if any(p in adapters for p in head.parameters()):
        raise UserError("lora_target_modules: the LM head is among them, and a sharded one takes no adapter")
    embedding = inner.get_input_embeddings()
    tied = embedding.weight is head.weight
    # bf16 gradients are added up in fp32 on their way
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    ignored = adapters | ({head.weight} if tied else set())
    for module in layers_of(inner, policy.trunk):
        fully_shard(module, **options, ignored_params=ignored)
    # Resharded after a forward pass without gradient too: whoever looks at the weights finds their shards.
    fully_shard(policy.trunk, **options, reshard_after_forward=True, ignored_params=ignored)
    for module in policy.trunk.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for name, p in list(head.named_parameters(recurse=False)):
        spread = distribute_tensor(p.detach(), mesh, placements, src_data_rank=None)
        setattr(head, name, nn.Parameter(spread, requires_grad=p.requires_grad))
    if tied:
        embedding.weight = head.weight
        _gather_in_forward(embedding)
    return replace(policy, head=replace(policy.head, sharded=True))


def _gather_in_forward(embedding: nn.Module) -> None:
    """An embedding that is the head's weight: gathered while it looks tokens up; its gradient is reduced to shards."""
    from torch.distributed.tensor import Partial

    kept: list[Any] = []

    def gather(module: nn.Module, args: Any) -> None:
        if not hasattr(module.weight, "full_tensor"):  # `unsharded`
            return
        weight: Any = module._parameters.pop("weight")
        kept.append(weight)
        module.weight = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)

    def put_back(module: nn.Module, args: Any, output: Any) -> None:
        if kept:
            del module.weight
            module._parameters["weight"] = kept.pop()

    embedding.register_forward_pre_hook(gather)
    embedding.register_forward_hook(put_back, always_call=True)


@contextmanager
def unsharded(policy: Policy) -> Iterator[None]:
    """Within it every rank has all weights, and a forward pass without gradient waits for no other rank: what a policy
    generates with. All ranks enter and leave together."""
    if not policy.head.sharded:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    head: Any = policy.head.module
    embedding: Any = unwrap(policy.model).get_input_embeddings()
    tied, kept = embedding.weight is head.weight, dict(head._parameters)
    layers = [module for module in policy.trunk.modules() if isinstance(module, FSDPModule)]

    def put(parameters: dict[str, Any]) -> None:
        head._parameters.update(parameters)
        if tied:
            embedding._parameters["weight"] = head._parameters["weight"]

    policy.trunk.set_reshard_after_forward(False)
    try:
        for layer in layers:
            layer.unshard()
        put({name: p if p is None else nn.Parameter(whole(p.detach()), False) for name, p in kept.items()})
        yield
    finally:
        put(kept)
        policy.trunk.set_reshard_after_forward(True)
        for layer in layers:
            layer.reshard()


def whole(x: Any) -> Tensor:
    """A tensor that may be sharded, gathered on every rank: all of them have to ask."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """The model's state in host memory of the first rank (empty on the others); tied weights stay one."""
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in policy.model.state_dict().items():
        key = getattr(tensor, "_local_tensor", tensor).data_ptr()
        full = seen.get(key) if tensor.numel() and key else None
        if full is None or full.shape != tensor.shape:
            full = whole(tensor.detach())
            full = full.cpu() if ranks.is_first() else full.new_empty(tensor.shape, device="meta")
            seen[key] = full
        found[name] = full
    return found if ranks.is_first() else {}


def to_save(policy: Policy) -> dict[str, Tensor] | None:
    """The `weights` that `save_model` is given by the first rank, gathered there: all ranks have to ask. None alone."""
    if ranks.size() == 1:
        return None
    return weights_of(policy) if hasattr(policy.model, "peft_config") else whole_weights(policy)


def whole_states(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's states as one process has them, in host memory of the first rank: all ranks have to ask."""
    states = {i: {key: _on_host(value) for key, value in state.items()} for i, state in state_dict["state"].items()}
    return state_dict | {"state": states}


def _on_host(x: Any) -> Any:
    if not hasattr(x, "full_tensor"):
        return x
    full = x.full_tensor()
    return full.cpu() if ranks.is_first() else None


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(policy: Policy, optimizer: torch.optim.Optimizer | None, folder: Path) -> dict[str, str]:
    """All ranks write what they hold, and the checksums of that. Raises SaveError on all of them if one cannot."""
    content: dict[str, Any] = {f"model.{name}": tensor for name, tensor in policy.model.state_dict().items()}
    for name, p in policy.trainable().items() if optimizer is not None else ():
        state = optimizer.state.get(p, {}) if optimizer is not None else {}
        content |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    try:
        dcp.save(content, checkpoint_id=folder)
        mine = {f"{SHARDED}/{path.name}": crc32_of(path) for path in folder.glob(f"__{ranks.rank()}_*")}
    except (Exception, dcp.api.CheckpointException) as error:
        raise SaveError(f"could not save {folder.parent}: {last_line(error)}") from error
    return {name: crc for part in ranks.told(mine) for name, crc in part.items()}


def load_optimizer(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any] | None
) -> None:
    """States as a checkpoint has them: sharded, or (`state_dict`) those of a run on one GPU."""
    if (folder / SHARDED).is_dir():
        for p, state in _read_states(folder / SHARDED, policy, optimizer).items():
            optimizer.state[p].update(state)
    elif state_dict is not None:
        set_states(policy, optimizer, state_dict)


def set_states(policy: Policy, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """state_dict: of an optimiser like this one, or of one on one GPU (`whole_states`)."""
    if not any(hasattr(p, "device_mesh") for p in policy.trainable().values()):
        optimizer.load_state_dict(state_dict)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, found in state_dict["state"].items():
        optimizer.state[parameters[i]].update(_like(parameters[i], found, optimizer))


def _like(p: Any, state: dict[str, Any], optimizer: Any) -> Iterator[tuple[str, Any]]:
    """States of a whole weight, sharded as it now is; those that are stay."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for key, value in state.items():
        value = value if hasattr(value, "device_mesh") else value.to(p.device)
        if hasattr(value, "device_mesh"):
            pass
        elif hasattr(value, "codes"):  # torchao's 8 bits
            (rows, *_), (first, *_) = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            whole, value = value, optimizer._new_buffer(p, value.signed)
            value._local_tensor.copy_(whole[first : first + rows])
        elif value.shape == p.shape:
            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        yield key, value


def _read_states(folder: Path, policy: Policy, optimizer: Any) -> dict[nn.Parameter, dict[str, Tensor]]:
    saved = sharded_metadata(folder)
    wanted: dict[str, Tensor] = {}
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, p in policy.trainable().items():
        prefix = f"optimizer.{name}."
        for key in (key for key in saved if key.startswith(prefix)):
            dtype, shape = saved[key].properties.dtype, saved[key].size
            alone = torch.zeros(shape, dtype=dtype, device=p.device)
            state = key.removeprefix(prefix)
            if shape != p.shape:
                wanted[key] = alone
            elif hasattr(optimizer, "_new_buffer"):  # torchao's 8 bits
                wanted[key] = optimizer._new_buffer(p, state == "exp_avg")
            else:
                wanted[key] = torch.zeros_like(p, dtype=dtype).detach()
            states.setdefault(p, {})[state] = wanted[key]
    read_sharded(wanted, folder)
    return states
