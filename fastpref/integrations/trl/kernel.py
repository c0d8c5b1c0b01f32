"""The function behind every fused LM head of TRL's, replaced by `fastpref.linear_token_stats`.

TRL's `add_fused_lm_head` looks `_ChunkedLogProbFunction` up in `trl.trainer.utils` at each call; its SFT, DPO, KTO,
GRPO and RLOO trainers all go through it. (DistillationTrainer has a kernel of its own for two heads: not replaced.)
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpref.head import linear_token_stats

INSTALL = "pip install 'trl==1.16.0'"

try:
    import trl
    from trl.trainer import utils
except ImportError as error:
    raise ImportError(f"fastpref.integrations.trl needs TRL: {INSTALL} ({error})") from error

_NAME = "_ChunkedLogProbFunction"
# What is replaced, and what calls it: the hash of its source as it was read and compared with ours, number by number
# (tests/integrations), and the versions that have it. A version of TRL is taken for what it has of these, not for its
# number; what it is refused for is named with the hash to add here once those tests pass.
COMPARED: dict[str, dict[str, str]] = {
    "trl.trainer.utils:_ChunkedLogProbFunction": {"4046f521dc0d": "1.16"},
    "trl.trainer.utils:add_fused_lm_head": {"5f4aa2119cf1": "1.16"},
    "trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs": {"2e9d3bad4fc7": "1.16"},
    "trl.trainer.dpo_trainer:DPOTrainer._compute_loss": {"c7f0caad2e5f": "1.16"},
    "trl.trainer.kto_trainer:KTOTrainer.compute_ref_log_probs": {"11817c89f35a": "1.16"},
    "trl.trainer.kto_trainer:KTOTrainer._compute_kl_logps": {"410f2d549e05": "1.16"},
    "trl.trainer.kto_trainer:KTOTrainer._compute_loss": {"c1199cfee455": "1.16"},
}
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


def source_hash(thing: Any) -> str:
    """Of its lines without indentation, blank ones and comments, which change nothing."""
    lines = (line.strip() for line in inspect.getsource(thing).splitlines())
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def check_version(*owners: str) -> None:
    """ImportError where the TRL installed has something else of `COMPARED`, of these owners ("DPOTrainer", ...)."""
    for path, known in COMPARED.items():
        name = path.partition(":")[2]
        if name.partition(".")[0] not in owners:
            continue
        try:
            found = source_hash(resolve_name(path))
        except (ImportError, AttributeError):
            found = ""
        if found not in known:
            reason = f"its {name} ({found}) is not one that was compared with ours" if found else f"it has no {name}"
            raise ImportError(f"TRL {trl.__version__} is not supported: {reason}; {INSTALL}")


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
        ImportError: a TRL in which what is replaced here is not as it was compared, with the command that installs one.
    """
    global _replaced
    if _replaced is not None:
        return _Patched(here=False)
    check_version(_NAME, "add_fused_lm_head")
    _replaced = getattr(utils, _NAME)
    setattr(utils, _NAME, ChunkedLogProbs)
    return _Patched(here=True)


def unpatch() -> None:
    """TRL's own function again; nothing if `patch` was not called."""
    global _replaced
    if _replaced is not None:
        setattr(utils, _NAME, _replaced)
        _replaced = None
