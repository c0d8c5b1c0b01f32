"""Before a stage's first step: policy and reference are the same model, so what a training step scores must agree with
the reference's log-probs. What else differs there (noise in train mode, factors that follow the batch, a layout that
leaks, stale log-probs) would be trained on, and the loss would not tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastpref.data import Batch, Example, collate
from fastpref.errors import UserError
from fastpref.losses import SFT

from . import ranks
from .config import TrainConfig
from .model import Policy
from .traits import has_experts, noise_of

# Nats times the square root of a sequence's scored tokens: rounding errors of log-probs add up like that. Measured on
# SmolLM2-135M (CPU, 16 pairs of up to 348 tokens, reference in batches of 8, training in micro-batches of 2): padded
# fp32 5e-6, packed fp32 and bf16 0, padded bf16 0.08; there every other shape of a batch rounds otherwise.
FLOORS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
PADDED_BF16 = 0.25


def check(policy: Policy, stage: TrainConfig, examples: Sequence[Example], parts: Sequence[Sequence[int]],
          pad: int) -> str:
    """Scores the micro-batches `parts` of examples that have their reference log-probs as a training step does; costs
    their forward passes. Returns what to say. Raises UserError where they do not agree, with the likely causes."""
    batches = [
        collate([examples[i] for i in part], pad, stage.kind, layout=policy.layout, mismatched=()) for part in parts
    ]
    sixteen = policy.compute_dtype in (torch.bfloat16, torch.float16)
    floor = PADDED_BF16 if sixteen and policy.layout == "padded" else FLOORS[policy.compute_dtype]
    policy.model.train()
    worst, off = _differences(policy, batches, floor)
    found = f"policy and reference, still the same, differ by up to {worst:.1e} nats a sequence"
    seen = f"({len(parts)} micro-batches scored as in training)"
    if off <= 1:
        return f"{found} {seen}: the noise floor"
    noise = sorted({f"{name} {value:g}" for _, name, value in noise_of(policy.model)})
    if noise:  # nothing is left of it but what the configuration asks for
        return f"{found} {seen}: the noise that is asked for ({', '.join(noise)})"
    again, _ = _differences(policy, batches, floor)
    policy.model.eval()
    calm = _differences(policy, batches, floor)[1] <= 1
    policy.model.train()
    raise UserError(
        f"stage {stage.name!r}: {found} {seen}, {off:.3g} times what rounding explains in "
        f"{str(policy.compute_dtype).removeprefix('torch.')}: {_causes(policy, stage, again != worst, calm)}; "
        "check_reference=false trains all the same"
    )


def _differences(policy: Policy, batches: Sequence[Batch], floor: float) -> tuple[float, float]:
    """(the largest |log-ratio| of a sequence, the largest over its floor) on all ranks."""
    worst = off = 0.0
    with torch.set_grad_enabled(ranks.size() == 1):  # without a backward pass FSDP would wait for one
        for batch, _ in ranks.share(batches):
            batch = batch.to(policy.device)
            logps = policy.compute_loss(batch, SFT()).logps.detach()
            assert batch.ref_logps is not None
            ratios = (logps - batch.ref_logps).abs().cpu().double().nan_to_num(math.inf)
            tokens = torch.tensor(batch.cu_seqlens).diff().clamp(min=1).double()
            worst = max(worst, float(ratios.max()))
            off = max(off, float((ratios / (floor * tokens.sqrt())).max()))
    return tuple(ranks.largest(round(1e9 * min(x, 1e9))) / 1e9 for x in (worst, off))  # type: ignore[return-value]


def _causes(policy: Policy, stage: TrainConfig, random: bool, calm: bool) -> str:
    if random:
        return "two passes over one batch differ too: its code draws random numbers in train mode"
    if calm:
        return "without train mode they agree: its code does something else there (noise, another kernel)"
    causes = ["reference log-probs of other weights, precision or kernels (delete the cached file)"]
    if policy.layout != "padded":
        causes.append("packed sequences that see each other (packing=false)")
    if has_experts(policy.model):
        causes.append("tokens near a tie between two experts")
    return f"likely {', '.join([*causes, 'a model whose log-probs depend on the rest of the batch'])}"
