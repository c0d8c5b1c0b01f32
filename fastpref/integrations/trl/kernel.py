"""The function behind every fused LM head of TRL's, replaced by `fastpref.linear_token_stats`.

TRL's `add_fused_lm_head` looks `_ChunkedLogProbFunction` up in `trl.trainer.utils` at each call; its SFT, DPO, KTO,
GRPO and RLOO trainers all go through it. (DistillationTrainer has a kernel of its own for two heads: not replaced.)
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpref.head import linear_token_stats

try:
    import trl
    from trl.trainer import utils
except ImportError as error:
    raise ImportError(f"fastpref.integrations.trl needs TRL 1.16: pip install 'fastpref[trl]' ({error})") from error

# Versions whose trainers were read and compared with ours, number by number (tests/integrations).
KNOWN_VERSIONS = ("1.16",)

_NAME = "_ChunkedLogProbFunction"
_PARAMETERS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
]
# TRL's name of a column: ours
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_p2",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}


class ChunkedLogProbs:
    """Stands where TRL has its autograd Function: the same call, the same five results."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OUTPUTS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs, entropy, log sum p^2, mean logit, top-1 hit) of softcap(logit_scale (h W^T + b)) / temperature.

        hidden [N, H], weight [V, H], bias [V], targets [N] in [0, V). Results [N], fp32, the last bool; None where not
        in `outputs`. Differentiable in the first two. `chunk_size` is of no use here: the memory budget of
        `fastpref.linear_token_stats` holds. Mixed dtypes as in TRL: all in autocast's, or in that of hidden.

        Raises:
            ValueError, TypeError: `weight` is a DTensor, or a parameter that DeepSpeed ZeRO-3 shards.
        """
        _check_whole(weight)
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        asked = tuple(ours for theirs, ours in _OUTPUTS.items() if theirs in outputs)
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            outputs=asked,
            bias=bias,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            temperature=temperature,
        )
        entropy, log_sum_p2, mean_logit = (
            None if x is None else x.float() for x in (stats.entropy, stats.log_sum_p2, stats.mean_logit)
        )
        return stats.logps.float(), entropy, log_sum_p2, mean_logit, None if stats.top1 is None else stats.top1.bool()


def _check_whole(weight: Tensor) -> None:
    if isinstance(weight, DTensor):
        raise TypeError("the LM head's weight is a DTensor; patch() takes the whole tensor: weight.full_tensor()")
    if hasattr(weight, "ds_id") or weight.numel() == 0:
        # TRL gathers it for the forward and again for the backward; what autograd saved would be empty by then.
        raise ValueError(
            "the LM head's weight is sharded by DeepSpeed ZeRO-3; patch() takes a whole weight: use ZeRO-1, ZeRO-2 or "
            "FSDP2, or unpatch()"
        )


@functools.cache
def check_version() -> None:
    """Refuses a TRL whose insides were not looked at."""
    version = ".".join(trl.__version__.split(".")[:2])
    reason = None
    if version not in KNOWN_VERSIONS:
        reason = f"its trainers were compared with those of TRL {', '.join(KNOWN_VERSIONS)} only"
    elif not hasattr(utils, _NAME):
        reason = f"trl.trainer.utils has no {_NAME}"
    else:
        found = list(inspect.signature(getattr(utils, _NAME).forward).parameters)
        if found != _PARAMETERS:
            reason = f"{_NAME}.forward takes {', '.join(found)}; expected {', '.join(_PARAMETERS)}"
    if reason:
        raise ImportError(f"TRL {trl.__version__} is not supported: {reason}")


_replaced: Any = None  # TRL's own function, while ours stands in its place


class _Patched:
    """What `patch` returns: `with patch(): ...` restores at the end, if it was this call that replaced."""

    def __init__(self, here: bool) -> None:
        self._here = here

    def __enter__(self) -> _Patched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            unpatch()


def patch() -> _Patched:
    """From now on, TRL's trainers compute token log-probs with `fastpref.linear_token_stats`.

    Trainers made before and after this call are both affected. Calling it twice is calling it once. As a context
    manager it restores TRL's function at the end.

    Raises:
        ImportError: a version of TRL that was not looked at, or that does not have what is replaced here.
    """
    global _replaced
    check_version()
    if _replaced is not None:
        return _Patched(here=False)
    _replaced = getattr(utils, _NAME)
    setattr(utils, _NAME, ChunkedLogProbs)
    return _Patched(here=True)


def unpatch() -> None:
    """TRL's own function again; nothing if `patch` was not called."""
    global _replaced
    if _replaced is not None:
        setattr(utils, _NAME, _replaced)
        _replaced = None
