"""TRL's DPO and KTO trainers with the loss computed inside the model's forward: three GEMMs of the head, no logits.

Only what computes numbers is replaced: the log-probs of policy and reference, and the loss. Data, reference models,
PEFT, distribution, checkpoints, evaluation and logs are TRL's own code; metrics have its names and its averages.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastpref.integrations.transformers import (
    PreferenceRequest,
    add_preference_head,
    sequence_logps,
    targets_of,
)
from fastpref.losses import LossFunction, SequenceLogps, tail_weights
from fastpref.trunk import unwrap

from .kernel import check_version
from .options import AVERAGED, dpo_loss, kto_loss, refuse_config, refuse_data, refuse_prompt_learning

Inputs = dict[str, Tensor]
Scored = Any  # a PreferenceModelOutput whose loss and extras are there

_MEASURED = ("entropy", "mean_logit", "top1")  # sums over the scored tokens that TRL charts


@contextmanager
def _preference_heads(trainer: type) -> Iterator[None]:
    """The constructor of TRL's trainer gives policy and reference its fused head before it shards, wraps or uses them;
    while this lasts, they get ours at the same moment."""
    module: Any = sys.modules[trainer.__module__]
    theirs = module.add_fused_lm_head

    def both(model: Any, *args: Any, **kwargs: Any) -> None:
        theirs(model, *args, **kwargs)
        add_preference_head(model)

    module.add_fused_lm_head = both
    try:
        yield
    finally:
        module.add_fused_lm_head = theirs


class _Fused:
    """What both trainers have in common; mixed in before one of TRL's, whose attributes `self: Any` has."""

    _READ: Callable[[Any], LossFunction]  # a config's loss

    def __init__(self: Any, model: Any, ref_model: Any = None, args: Any = None, *more: Any, **given: Any) -> None:
        trls = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("trl."))
        check_version("add_fused_lm_head", trls.__name__)
        # All that can be refused before the models are loaded.
        named = inspect.signature(trls).bind(model, ref_model, args, *more, **given).arguments
        if args is not None:
            refuse_config(args)
        refuse_data(named.get("train_dataset"))
        refuse_prompt_learning({"peft_config": named.get("peft_config")})
        with _preference_heads(trls):
            super().__init__(model, ref_model, args, *more, **given)  # type: ignore[call-arg]
        if is_peft_model(self.model):
            refuse_prompt_learning(self.model.peft_config)
        self._preference_loss = self._READ(self.args)
        if hasattr(self.model.config.get_text_config(), "output_router_logits"):
            unwrap(self.model).router_aux_loss_coef = self.router_aux_loss_coef  # its weight in the forward's loss

    @property
    def _reference(self: Any) -> Any:
        return self.model if self.ref_model is None else self.ref_model

    @contextmanager
    def _as_reference(self: Any) -> Iterator[None]:
        """TRL's conditions for a forward pass of the reference; a PeftModel that trains is its own reference, without
        its adapters or with the copy of them named "ref"."""
        adapter: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with checkpointing, adapter, self.accelerator.autocast():
            yield

    def _forward(self: Any, model: Any, batch: Inputs, others: set[str], **request: Any) -> Scored:
        """The policy's forward, through whatever wraps it. others: entries of the batch that are not the model's."""
        passed: dict[str, Any] = {name: value for name, value in batch.items() if name not in others}
        if self.aux_loss_enabled:
            passed["output_router_logits"] = True
        return model(**passed, preference=PreferenceRequest(targets_of(batch), extras=_MEASURED, **request))

    def _total(self: Any, x: Tensor) -> float:
        """The sum over all entries and processes."""
        return self.accelerator.gather_for_metrics(x.sum()).sum().item()

    def _chart(self: Any, mode: str, batch: Inputs, out: Scored) -> None:
        """What both trainers log of any batch, under TRL's names."""
        log = self._metrics[mode]
        tokens = self._total(out.lengths)
        log["entropy"].append(self._total(out.extras["entropy"]) / tokens if tokens else 0.0)
        if mode == "train":
            self._total_train_tokens += self._total(batch["attention_mask"]) // self._tp_size
        log["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            log["aux_loss"].append(self.accelerator.gather_for_metrics(out.aux_loss).mean().item())

    def _result(self: Any, model: Any, batch: Inputs, others: set[str], loss: Tensor, return_outputs: bool) -> Any:
        if not return_outputs:
            return loss
        warnings.warn(
            "return_outputs=True takes one more forward pass, which builds the logits that compute_metrics is given; "
            "TRL 2.0 drops them",
            FutureWarning,
            stacklevel=4,
        )
        with torch.no_grad():
            return loss, model(**{name: value for name, value in batch.items() if name not in others}, use_cache=False)


class FusedDPOTrainer(_Fused, DPOTrainer):
    """`trl.DPOTrainer` on `fastpref.linear_preference_loss`: the same arguments, configs, metrics and files.

    A reference is scored without dropout. With disable_dropout=False TRL leaves it on where the reference is a PEFT
    model without its adapter.

    Raises:
        ValueError: at construction, for what of DPOConfig is not honoured (or has no effect in TRL), by name and with
            what to use instead; for a model whose LM head the fused loss does not compute.
        ImportError: a TRL in which what is replaced here is not as it was compared, with the command that installs one.
    """

    _READ = staticmethod(dpo_loss)
    _OTHERS = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}

    def compute_ref_log_probs(self: Any, model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        batch = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
        with self._as_reference():
            chosen, rejected = sequence_logps(model, batch, **self._token_weights(inputs)).chunk(2)
        return chosen, rejected

    def _token_weights(self, inputs: Inputs) -> dict[str, Tensor]:
        if self.ld_alpha is None:
            return {}
        return {"token_weights": tail_weights(targets_of(inputs) != -100, self.ld_alpha)}

    def _loss_of(self, inputs: Inputs) -> LossFunction:
        """The loss, with the lengths that TRL divides by: where nothing precedes a response, its first token counts
        although nothing predicts it."""
        loss, mask = self._preference_loss, inputs["completion_mask"]
        if not set(AVERAGED) & set(self.loss_types) or not mask[:, 0].any():
            return loss

        def with_lengths(seq: SequenceLogps) -> Tensor:
            lengths = mask.sum(1).to(seq.lengths)
            if not self.use_weighting:
                return loss(replace(seq, lengths=lengths))
            # WPO's weights are means over the tokens that were predicted: sums that have the same mean over these.
            sums = (seq.logps if seq.unweighted is None else seq.unweighted, seq.extra("log_sum_p2"))
            logps, log_sum_p2 = (x * seq.per_length * lengths for x in sums)
            return loss(replace(seq, lengths=lengths, unweighted=logps, extras={"log_sum_p2": log_sum_p2}))

        with_lengths.needs_extras = getattr(loss, "needs_extras", ())  # type: ignore[attr-defined]
        return with_lengths

    def _compute_loss(self: Any, model: Any, inputs: Inputs, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        if self.precompute_ref_logps:
            ref_logps = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        else:
            ref_logps = torch.cat(self.compute_ref_log_probs(self._reference, inputs))
        loss, weights = self._loss_of(inputs), self._token_weights(inputs)
        out = self._forward(model, inputs, self._OTHERS, loss=loss, ref_logps=ref_logps, **weights)
        self._chart(mode, inputs, out)
        # TRL's reward is beta times the log-ratio, also for a loss without a beta
        self._chart_pairs(self._metrics[mode], out, self.beta / getattr(loss, "reward_scale", 1.0))
        return self._result(model, inputs, self._OTHERS, out.loss, return_outputs)

    def _chart_pairs(self, log: dict[str, list[float]], out: Scored, reward_scale: float) -> None:
        chosen, rejected = out.lengths.chunk(2)
        tokens = {"chosen": self._total(chosen), "rejected": self._total(rejected)}
        for side, logits in zip(tokens, out.extras["mean_logit"].chunk(2)):
            log[f"logits/{side}"].append(self._total(logits) / tokens[side] if tokens[side] else 0.0)
        hits = self._total(out.extras["top1"].chunk(2)[0])
        log["mean_token_accuracy"].append(hits / tokens["chosen"] if tokens["chosen"] else 0.0)
        for name, values in out.metrics.items():
            if name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
                values = values * reward_scale
            log[name].append(self.accelerator.gather(values).mean().item())


class FusedKTOTrainer(_Fused, KTOTrainer):
    """`trl.KTOTrainer` on `fastpref.linear_preference_loss`: the same arguments, configs, metrics and files.

    The baseline is TRL's: the mean over processes of mismatched log-ratios, clamped at 0 afterwards. Raises as
    `FusedDPOTrainer`.
    """

    _READ = staticmethod(kto_loss)
    _OTHERS = {
        "completion_mask", "KL_input_ids", "KL_attention_mask", "KL_completion_mask", "label", "ref_logps",
        "ref_KL_logps",
    }

    def compute_ref_log_probs(self: Any, model: Any, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        batch = {name: value for name, value in inputs.items() if name not in self._OTHERS - {"completion_mask"}}
        with self._as_reference():
            return sequence_logps(model, batch), self._compute_kl_logps(model, inputs)

    def _compute_kl_logps(self, model: Any, batch: Inputs) -> Tensor | None:
        if not self.calculate_KL:
            return None
        mismatched = {name: value for name, value in batch.items() if name not in self._OTHERS}
        for name in ("input_ids", "attention_mask", "completion_mask"):
            mismatched[name] = batch[f"KL_{name}"]
        return sequence_logps(model, mismatched)

    def _compute_loss(self: Any, model: Any, inputs: Inputs, return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        kl_logps = self._compute_kl_logps(model, inputs)
        if self.precompute_ref_logps:
            ref_logps, ref_kl_logps = inputs["ref_logps"], inputs.get("ref_KL_logps")
        else:
            ref_logps, ref_kl_logps = self.compute_ref_log_probs(self._reference, inputs)
        desirable = inputs["label"].bool()
        request: dict[str, Any] = {}
        kl = 0.0
        if kl_logps is not None:
            baseline = self.accelerator.gather_for_metrics((kl_logps - ref_kl_logps).mean()).mean()
            request = {"kl_logps": baseline[None], "ref_kl_logps": torch.zeros_like(baseline)[None]}
            kl = baseline.clamp(min=0).item()
        request |= {"loss": self._preference_loss, "ref_logps": ref_logps, "desirable": desirable}
        out = self._forward(model, inputs, self._OTHERS, **request)
        self._metrics[mode]["kl"].append(kl)
        self._chart(mode, inputs, out)
        self._chart_sequences(self._metrics[mode], out, desirable)
        return self._result(model, inputs, self._OTHERS, out.loss, return_outputs)

    def _chart_sequences(self, log: dict[str, list[float]], out: Scored, desirable: Tensor) -> None:
        counts = {}
        for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
            tokens, counts[side] = self._total(out.lengths[mask]), self._total(mask)
            logits = self._total(out.extras["mean_logit"][mask])
            if tokens:
                log[f"logits/{side}"].append(logits / tokens)
            for name in (f"rewards/{side}", f"logps/{side}"):
                total = self._total(out.metrics[name].nansum())
                if counts[side]:
                    log[name].append(total / counts[side])
        if all(counts.values()):
            log["rewards/margins"].append(log["rewards/chosen"][-1] - log["rewards/rejected"][-1])
