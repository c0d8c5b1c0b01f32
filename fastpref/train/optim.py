"""The optimiser and its learning rate. The rate is a function of the step alone: a resumed run needs no state of it.

    optim               weights       states, bytes a weight    what makes small updates count
    adamw_torch_fused   fp32          8                         fp32 weights
    adamw_torch_8bit    bf16 or fp32  2.03                      stochastic rounding (torchao)
    adamw_fp32_master   bf16          10                        the 16 bits that a bf16 weight lacks, kept beside it
    adamw_offload       bf16 or fp32  14 in host memory         the same, the step taken on the host (torchao)

At preference learning rates an update is far below half a unit in the last place of a bf16 weight (2^-9 of it), so
that rounding to nearest throws nearly all of them away: bf16 weights with plain AdamW are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastpref.errors import UserError

from .config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable


# Of losses in float16, dynamic as in arXiv 1710.03740: an eighth after a step that overflowed (five in a row, which
# end a run by default, come down from 65536 to 2), twice after so many that did not.
FIRST_SCALE, RAISED_EVERY = 2.0**16, 1000
SLICE = 2**24  # weights that MasterAdamW updates at a time


class _ExactLoad(torch.optim.Optimizer):
    """torch casts what it loads to the parameter's dtype: fp32 moments of a bf16 weight would come back rounded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            p = parameters[index]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    self.state[p][name] = value.to(p.device)


class MasterAdamW(_ExactLoad):
    """AdamW (arXiv 1711.05101) on bf16 parameters with a fp32 master copy that costs 2 bytes a weight.

    The bits of the master are those of the bf16 parameter, shifted up by 16, plus `low` (int16): the parameter is the
    master rounded to nearest. Update rule: torch's fused AdamW on the master, one parameter at a time, fp32 moments;
    bitwise the weights that fp32 training with the same gradients has. The forward pass, and the model that is saved,
    see the master rounded: a step shows there once the steps together reach half a unit in the last place.
    fp32 parameters are their own master.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        # "fused" is what makes torch load a step count to the device of its weight
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure: MasterAdamW takes gradients as they are, not a closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(p, dtype=torch.int16)
        parts = [p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]]
        if "low" in state:
            parts.append(state["low"])
        parts = [getattr(part, "_local_tensor", part) for part in parts]  # of a sharded weight: this rank's part
        before = state["step"].clone()
        # in slices: a fp32 master and gradient of the whole LM head would be 4 GiB for an 8B model
        slices = zip(*(part.view(-1).split(SLICE) if parts[0].numel() > SLICE else (part,) for part in parts))
        for weight, gradient, exp_avg, exp_avg_sq, *low in slices:
            master = join(weight, low[0]) if low else weight
            state["step"].copy_(before)
            adamw(
                [master], [gradient.float()], [exp_avg], [exp_avg_sq], [], [state["step"]], fused=True, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )
            if low:
                split(master, weight, low[0])


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 number whose bits are those of `high` (bf16) shifted up by 16, plus `low` (int16)."""
    return (high.detach().view(torch.int16).to(torch.int32).bitwise_left_shift_(16)).add_(low).view(torch.float32)


def split(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Writes `value` (fp32) as `high` (bf16), rounded to nearest, and `low` (int16), so that `join` gives it back."""
    bits = value.view(torch.int32)
    rounded = (bits + 0x8000).bitwise_right_shift_(16)
    low.copy_(bits - (rounded << 16))
    high.detach().view(torch.int16).copy_(rounded)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    class AdamW8bitExact(_ExactLoad, AdamW8bit):  # type: ignore[misc, valid-type]
        """torchao's, with fp32 moments where a tensor is too small to be quantised: in bf16 a second moment cannot
        decay, 0.999 of a number rounds to that number. Of a sharded weight the whole decides, so that its moments are
        those of one process, cut at a block's end."""

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if not quantized(p):
                return torch.zeros_like(p, dtype=torch.float32).detach()
            if not hasattr(p, "device_mesh"):
                buffer: Tensor = self._subclass_zeros(p, signed, BLOCK)
                return buffer
            from torch.distributed.tensor import DTensor

            # shown as fp32: DTensor would take them for bf16 where torchao has just made them fp32
            local = self._subclass_zeros(p._local_tensor, signed, BLOCK).float()  # type: ignore[attr-defined]
            return DTensor.from_local(
                local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride(),  # type: ignore[attr-defined]
            )

    return AdamW8bitExact


BLOCK = 256  # numbers that share one scale in torchao's 8-bit moments


def quantized(p: Tensor) -> bool:
    """Whether adamw_torch_8bit keeps its moments in 8 bits: torchao's rule, of matrices."""
    return p.ndim >= 2 and p.numel() >= 4096 and p.numel() % BLOCK == 0


def check_shards(parameters: dict[str, nn.Parameter], count: int) -> None:
    """Raises UserError for a weight whose 8-bit moments cannot be cut over `count` ranks: inside a row's block, or
    leaving a rank without a row."""
    for name, p in parameters.items():
        if not quantized(p):
            continue
        row, each = p.numel() // len(p), -(-len(p) // count)
        why = ""
        if row % BLOCK:
            why = f"a row of {name} is {row} numbers, no multiple of the {BLOCK} that share a scale"
        elif each * (count - 1) >= len(p):
            why = f"{name} has {len(p)} rows, which leave one of {count} ranks without any"
        if why:
            raise UserError(f"optim adamw_torch_8bit cannot be sharded here: {why}; set optim=adamw_fp32_master")


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError for an optimiser that cannot run here: before the run, not at its first step."""
    name = config.optimizer
    if name in ("adamw_torch_8bit", "adamw_offload"):
        try:
            from torchao import optim  # noqa: F401
        except ImportError as error:
            why = "not installed" if isinstance(error, ModuleNotFoundError) else f"broken here ({error})"
            hint = "" if config.optim else " (the default for dtype=bfloat16)"
            other = "; optim=adamw_fp32_master needs only torch, and more memory" if config.dtype == "bfloat16" else ""
            raise UserError(f"optim {name}{hint} needs torchao, which is {why}: pip install torchao{other}") from None
    if name == "adamw_offload" and device.type != "cuda":
        raise UserError(f"optim adamw_offload keeps states of a GPU's weights in host memory; the device is {device}")


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) as `config.optimizer` says. Matrices decay; biases and norm weights do not. LoRA+ (arXiv
    2402.12354): B learns `loraplus_lr_ratio` times as fast as A; as in peft, so do vectors (DoRA's magnitudes)."""
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        ratio = config.loraplus_lr_ratio if "lora_B" in name or p.ndim < 2 else 1.0
        members.setdefault((p.ndim < 2, ratio), []).append(p)
    groups = [{"params": found, "weight_decay": 0.0 if vectors else config.weight_decay, "lr_ratio": ratio}
              for (vectors, ratio), found in sorted(members.items(), key=lambda item: item[0])]
    options: dict[str, Any] = {
        "lr": config.learning_rate or 0.0,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_torch_8bit":
        return _adamw_8bit()(groups, **options, bf16_stochastic_round=True)  # type: ignore[call-arg]
    if config.optimizer == "adamw_fp32_master":
        return MasterAdamW(groups, **options)
    if config.optimizer == "adamw_offload":
        from torchao.optim import CPUOffloadOptimizer

        return CPUOffloadOptimizer(groups, MasterAdamW, offload_gradients=True, **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, **options, fused=True)


class Updater:
    """An optimiser and when it runs: after the backward passes of a step, or inside the only one, gradient by gradient.

        updater.begin(rate)
        loss.backward()                     of every micro-batch
        norm = updater.gradient_norm()      clips, where a gradient is still there to be clipped
        updater.end(finite)                 the update, unless a gradient is NaN or inf; the gradients are gone

    In backward (`optim_in_backward`) each weight is updated as soon as its gradient is complete, which is then freed:
    the largest gradient is all that is ever held. Each is checked first, at the price of one synchronisation a weight.
    From the first one that is not finite the step goes no further; weights whose finite gradients came before keep
    their update. adamw_offload sends gradients to the host as they come and updates all weights or none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, *, scaled: bool = False) -> None:
        """scaled: losses are multiplied with `scale`, which float16's range needs; gradients are divided by it."""
        self.parameters = list(parameters.values())
        self.in_backward = config.optim_in_backward
        self.offloads = config.optimizer == "adamw_offload"
        self.streams = self.in_backward or self.offloads
        self.max_norm = config.max_grad_norm or math.inf
        self.norms: list[Tensor] = []
        self.broken = False
        self.hooks: list[Any] = []
        if self.streams:  # before the optimiser's own hooks, which free the gradients
            self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters]
        self.optimizer = make_optimizer(parameters, config)
        if scaled:  # in a group, where it is saved and loaded with the states
            self.optimizer.param_groups[0] |= {"loss_scale": FIRST_SCALE, "steps_at_scale": 0}

    @property
    def scale(self) -> float:
        return float(self.optimizer.param_groups[0].get("loss_scale", 1.0))

    def begin(self, rate: float) -> None:
        self.norms, self.broken = [], False
        for group in self.optimizer.param_groups:
            its = rate * group.get("lr_ratio", 1.0)
            if isinstance(group["lr"], Tensor):  # torchao compiles its step and would do so again for every number
                group["lr"].fill_(its)
            else:
                group["lr"] = its

    def _arrived(self, p: Tensor) -> None:
        assert p.grad is not None
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        self.norms.append(norm)
        if not self.in_backward:
            return
        self.broken = self.broken or not math.isfinite(norm.item())
        if not self.broken:
            self.optimizer.step()  # no other weight has a gradient at this moment
        p.grad = None

    def gradient_norm(self) -> Tensor:
        """Of all gradients, before clipping."""
        if self.streams:
            if not self.norms:  # no backward pass: the loss was not finite
                return torch.full((), math.nan, device=self.parameters[0].device)
            return torch.linalg.vector_norm(torch.stack(self.norms))
        if self.scale != 1:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1 / self.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all ranks' parts

    def end(self, finite: bool) -> None:
        if finite and not self.in_backward:
            self.optimizer.step()
        if "loss_scale" in (group := self.optimizer.param_groups[0]):
            group["steps_at_scale"] = group["steps_at_scale"] + 1 if finite else 0
            if not finite:
                group["loss_scale"] = max(group["loss_scale"] / 8, 1.0)
            elif group["steps_at_scale"] % RAISED_EVERY == 0:
                group["loss_scale"] = min(2 * group["loss_scale"], 2.0**24)
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Leaves the weights without hooks: those of a former optimiser would take the next one's gradients."""
        for hook in self.hooks:
            hook.remove()
        if self.offloads:  # torchao keeps no handles of its own
            for p in self.parameters:
                (p._post_accumulate_grad_hooks or {}).clear()  # type: ignore[attr-defined]


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1: linear warm-up, then linear or cosine to 0, or constant.

    The first step has a rate above 0, and the first after the warm-up the full one.
    """
    peak, warmup = config.learning_rate or 0.0, config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(steps - warmup, 1)
    if config.lr_scheduler_type == "linear":
        return peak * left
    if config.lr_scheduler_type == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * left))
    return peak
