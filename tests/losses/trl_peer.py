"""TRL's own loss code on given log-probs: its methods, on a trainer without state and a model whose head already ran.

What is compared is thus not a copy of TRL's formulas but the code its trainers run.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

PROMPT = 2

accelerator = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, gather=lambda t: t, gather_for_metrics=lambda t: t,
    reduce=lambda t, reduction: t,
)


def spread(logps, lengths):
    """Sequence log-probs spread unevenly over their tokens, after a prompt: (tokens [S, T - 1], mask [S, T] of T)."""
    lengths = [int(n) for n in lengths]
    longest = PROMPT + max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    tokens = []
    for s, n in enumerate(lengths):
        mask[s, PROMPT : PROMPT + n] = 1
        row = torch.zeros(longest - 1, dtype=logps.dtype)
        share = torch.linspace(0.5, 1.5, n, dtype=logps.dtype)
        place = torch.arange(PROMPT - 1, PROMPT - 1 + n)
        tokens.append(row.index_put((place,), logps[s] * share / share.sum()))
    return torch.stack(tokens), mask


def fused_model(tokens, log_sum_p2=None):
    zeros = torch.zeros(tokens.shape)
    outputs = SimpleNamespace(
        log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=log_sum_p2
    )

    def model(**_):
        return outputs

    model.training = True
    return model


def dpo(
    types, tokens, mask, refs, *, beta, weights=None, label_smoothing=0.0, f_divergence="reverse_kl", f_alpha=0.5,
    tau=0.05, log_sum_p2=None, ld_alpha=None,
):
    """`DPOTrainer._compute_loss`: (loss, what it charted). refs: [S] sequence log-probs of the reference."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    model = fused_model(tokens, log_sum_p2)
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, ld_alpha=ld_alpha, precompute_ref_logps=True,
        f_divergence_type=f_divergence, f_alpha_divergence_coef=f_alpha, beta=beta, loss_types=list(types),
        loss_weights=list(weights or [1.0] * len(types)), label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=tau), use_weighting=log_sum_p2 is not None,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": refs.chunk(2)[0], "ref_rejected_logps": refs.chunk(2)[1],
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items() if v}


def kto(loss_type, tokens, mask, refs, desirable, kl_logps, ref_kl_logps, *, beta, weights=(1.0, 1.0)):
    """`KTOTrainer._compute_loss`."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    model = fused_model(tokens)
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=True, beta=beta,
        loss_type=loss_type, calculate_KL=loss_type == "kto", desirable_weight=weights[0],
        undesirable_weight=weights[1], _compute_kl_logps=lambda *_: kl_logps, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "label": desirable, "ref_logps": refs, "ref_KL_logps": ref_kl_logps,
    }
    return kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)


def reference_free(kind, logits, input_ids, labels, **options):
    """`get_batch_loss_metrics` of CPOTrainer or ORPOTrainer on logits [S, T, V]; labels [S, T], -100: not scored."""
    module = pytest.importorskip(f"trl.experimental.{kind}.{kind}_trainer")
    cls = module.CPOTrainer if kind == "cpo" else module.ORPOTrainer
    trainer = SimpleNamespace(
        accelerator=accelerator, is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0, padding_value=0,
        concatenated_inputs=cls.concatenated_inputs, get_batch_logps=cls.get_batch_logps, alpha=0.0, **options,
    )
    for method in ("concatenated_forward", f"{kind}_loss" if kind == "cpo" else "odds_ratio_loss"):
        setattr(trainer, method, partial(getattr(cls, method), trainer))
    batch = {}
    for side, ids, target in zip(("chosen", "rejected"), input_ids.chunk(2), labels.chunk(2)):
        batch[f"{side}_input_ids"], batch[f"{side}_labels"] = ids, target
        batch[f"{side}_attention_mask"] = (ids > 0).long()
    return cls.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)


def grpo(logps, mask, advantages, old, ref, *, tokens, **options):
    """`GRPOTrainer._compute_loss`; `tokens`: what dapo divides by."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    defaults = dict(
        loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2, beta=0.0, importance_sampling_level="token",
        max_completion_length=None,
    )
    args = SimpleNamespace(delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        **(defaults | options), args=args, model=SimpleNamespace(training=True), accelerator=accelerator,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "ref_per_token_logps": ref, "num_items_in_batch": torch.tensor(tokens),
    }
    if old is not None:
        inputs["old_per_token_logps"] = old
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


def reward(rewards, margin, center_coefficient):
    """`RewardTrainer.compute_loss`."""
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")

    def model(**_):
        return SimpleNamespace(logits=rewards[:, None])

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(center_rewards_coefficient=center_coefficient), _total_train_tokens=0, _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(rewards), 3)} | ({} if margin is None else {"margin": margin})
    return reward_trainer.RewardTrainer.compute_loss(trainer, model, inputs)
