"""Liger's GRPO and its relatives on our token log-probs: `LigerFusedLinearGRPOLoss`, for online trainers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, distributed, nn

from fastpref.head import linear_logps

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_BY_TOKEN = ("cispo", "sapo", "vespo")  # have no ratio of a sequence


class LigerFusedLinearGRPOLoss(nn.Module):
    """Liger's GRPO, BNPO, Dr. GRPO, DAPO, CISPO, SAPO, LUSPO and VESPO. With rho_t = pi(t) / pi_old(t), per token

        l_t = -min(rho_t A, clip(rho_t, 1 - epsilon_low, 1 + epsilon_high) A) vllm_is_ratio + beta k3_t

    (CISPO, SAPO and VESPO put another term in place of the minimum), which `loss_type` averages as Liger does.

    Args:
        compiled, chunk_size: taken, and without a meaning here (one pass over tiles of tokens).
        use_ref_model: False leaves k3 at 0, whatever beta is.
        others: as in liger_kernel.chunked_loss.

    Raises:
        ValueError: an unknown loss_type or importance_sampling_level, or the two do not go together; a temperature of
            SAPO or delta that is not above 0; no max_completion_length with "dr_grpo".

    Call: `(_input [B, T, H], lin_weight [V, H], selected_token_ids [B, T], attention_mask [B, T], advantages [B],
    bias=None, ref_per_token_logps=None, old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None,
    vllm_is_ratio=None, num_items_in_batch=None)`. Returns `(loss, (mean k3 if beta is not 0, share of clipped
    tokens))`. Only tokens of the mask enter the head (all for LUSPO, whose mean is over them): three GEMMs, four for
    rows that the memory budget does not keep.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        levels = ("token",) if loss_type in _BY_TOKEN else ("token", "sequence")
        for name, value, ok, takes in (
            ("loss_type", loss_type, loss_type in LOSS_TYPES, ", ".join(LOSS_TYPES)),
            ("importance_sampling_level", importance_sampling_level, importance_sampling_level in levels,
             f"{' or '.join(map(repr, levels))} with loss_type {loss_type!r}"),
            ("sapo_temperature_pos", sapo_temperature_pos, sapo_temperature_pos > 0, "a number above 0"),
            ("sapo_temperature_neg", sapo_temperature_neg, sapo_temperature_neg > 0, "a number above 0"),
            ("delta", delta, delta is None or delta > 0, "None or a number above 0"),
            ("max_completion_length", max_completion_length, loss_type != "dr_grpo" or max_completion_length,
             "a number of tokens with loss_type 'dr_grpo'"),
        ):
            if not ok:
                raise ValueError(f"{name} is {value!r}; it takes {takes}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask = attention_mask.bool()
        counted = torch.ones_like(mask) if self.loss_type == "luspo" else mask
        targets = selected_token_ids.masked_fill(~counted, -100)
        logps = linear_logps(_input, lin_weight, targets, bias=bias, temperature=self.temperature)
        if not self.use_ref_model:
            ref_per_token_logps = None
        elif ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("ref_per_token_logps is None; it takes the reference's log-probs, or ref_input and "
                                 "ref_weight, or construct with use_ref_model=False")
            with torch.no_grad():
                ref_per_token_logps = linear_logps(
                    ref_input, ref_weight, targets, bias=ref_bias, temperature=self.temperature
                )
        known = (logps.detach() if x is None else x.float() for x in (old_per_token_logps, ref_per_token_logps))
        # What other tokens hold has no part in anything, NaN included.
        old, ref = (torch.where(counted, x, 0) for x in known)
        if vllm_is_ratio is not None:
            vllm_is_ratio = _by_sequence(vllm_is_ratio, mask)
        log_ratio = log_weights = logps - old
        if self.importance_sampling_level == "sequence":
            log_weights = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
        ratio, advantages = torch.exp(log_weights), advantages[:, None]
        terms, clipped = self._terms(logps, log_ratio, ratio, advantages, vllm_is_ratio)
        tokens = mask.sum().clamp(min=1)
        beside = []
        if self.beta != 0:
            k3 = torch.exp(ref - logps) - (ref - logps) - 1
            k3 = k3 * ratio if self.use_bias_correction_kl else k3
            terms = terms + self.beta * k3
            beside.append((k3.detach() * mask).sum() / tokens)
        beside.append((clipped & mask).sum() / tokens)
        return self._reduce(terms * counted, mask, num_items_in_batch), tuple(beside)

    def _terms(
        self, logps: Tensor, log_ratio: Tensor, ratio: Tensor, advantages: Tensor, vllm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """([B, T] or [B, 1] the policy's terms, which of them are clipped)."""
        never, above = torch.zeros_like(ratio, dtype=torch.bool), advantages > 0
        if self.loss_type == "vespo":  # takes the correction into its weights
            return -self._vespo_weights(log_ratio, advantages, vllm) * advantages * logps, never
        if self.loss_type == "cispo":
            terms = -ratio.clamp(max=self.epsilon_high).detach() * advantages * logps
            clipped = (ratio > self.epsilon_high) & above
        elif self.loss_type == "sapo":
            gate: Callable[[float], Tensor] = lambda t: torch.sigmoid(t * (ratio - 1)) * 4 / t  # noqa: E731
            gated = torch.where(above, gate(self.sapo_temperature_pos), gate(self.sapo_temperature_neg))
            terms, clipped = -gated * advantages, never
        else:
            low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
            bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
            terms = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
            clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & above)
        return terms if vllm is None else terms * vllm, clipped

    @torch.no_grad()
    def _vespo_weights(self, log_ratio: Tensor, advantages: Tensor, vllm: Tensor | None) -> Tensor:
        """[B, 1]: e^lambda w^k e^(-lambda w), w the ratio of the sequence; 1 at w = 1."""
        bound = partial(torch.clamp, min=math.log(1e-8), max=20.0)
        log_w = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
        if vllm is not None:
            log_w = log_w + bound(vllm.log()).sum(1, keepdim=True)
        log_w, gained = bound(log_w), advantages >= 0
        k = torch.where(gained, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(gained, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _reduce(self, terms: Tensor, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
        sequences, lengths = mask.shape[0], mask.sum(1)
        if self.loss_type in ("grpo", "sapo"):
            return (terms.sum(1) / lengths.clamp(min=1)).sum() / sequences
        if self.loss_type == "bnpo":
            return terms.sum() / mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return terms.sum() / (sequences * self.max_completion_length)
        if self.loss_type == "luspo":
            return (terms * lengths[:, None]).mean()
        return terms.sum() / _tokens_a_process(mask, num_items_in_batch)


def _by_sequence(ratio: Tensor, mask: Tensor) -> Tensor:
    """[B, T] or [B, 1], 1 where nothing is scored."""
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    if ratio.shape not in (mask.shape, (mask.shape[0], 1)):
        raise ValueError(f"vllm_is_ratio is of shape {tuple(ratio.shape)}; it takes [B], [B, 1] or {tuple(mask.shape)}")
    return ratio if ratio.shape[1] == 1 else torch.where(mask, ratio, 1)


def _tokens_a_process(mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """The tokens of the batch, in all or of these calls, over the number of processes."""
    spread = distributed.is_available() and distributed.is_initialized()
    if num_items_in_batch is None:
        tokens = mask.sum().float()
        if spread:
            distributed.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (tokens / (distributed.get_world_size() if spread else 1)).clamp(min=1)
