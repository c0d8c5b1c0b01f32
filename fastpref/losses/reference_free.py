"""Losses without a reference model: supervised fine-tuning, SLiC, CPO, SimPO, ORPO.

logp is summed over scored tokens; |y| the number of scored tokens, at least 1; s the logistic function. "Token mean of
the chosen NLL" is -(sum of logp_chosen over the pairs of the batch) / (number of scored chosen tokens of the batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .base import Coupling, Loss, check, check_number, check_smoothing, logistic, register
from .late import F, torch
from .sequences import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class SFT(Loss):
    """Supervised fine-tuning: L = - sum over all scored tokens of log pi(token) / (number of scored tokens).

    One mean over the tokens of the batch (not a mean of sequence means). Uses every sequence; reference-free.
    """

    name = "sft"
    formula = "-logp, per token"
    pairwise = False
    needs_reference = False

    @property
    def coupling(self) -> Coupling:
        return "sequence"

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.token_mean(-seq.logps)


@register
@dataclass(frozen=True)
class ChosenSFT(Loss):
    """Supervised fine-tuning on the chosen responses of pairs (TRL's DPO loss type "sft", a term of sums such as MPO,
    arXiv 2411.10442): -(sum of logp_chosen over pairs) / (number of scored chosen tokens of the batch).

    One mean over the chosen tokens of the batch; rejected responses have no gradient. Adds up over pairs.
    """

    name = "chosen_sft"
    formula = "-logp_c, per token"
    paper = "arXiv 2411.10442"
    needs_reference = False

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return seq.chosen_token_nll


@register
@dataclass(frozen=True)
class SLiC(Loss):
    """Sequence likelihood calibration, arXiv 2305.10425 eq. 1-2, with the chosen response as the SFT target:

        L = mean over pairs of max(0, delta - logp_chosen + logp_rejected) - eta * logp_chosen.

    Reference-free; log-probs summed over tokens. Its gradient at the hinge's corner is 0. Adds up over pairs.
    """

    name = "slic"
    formula = "max(0, δ - logp_c + logp_r) - η logp_c"
    paper = "arXiv 2305.10425"
    needs_reference = False
    delta: float = 1.0
    eta: float = 0.1

    def check_options(self) -> None:
        check_number("delta", self.delta, least=0)
        check_number("eta", self.eta, least=0)

    @property
    def antisymmetric(self) -> bool:
        return self.eta == 0

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return F.relu(self.delta - seq.chosen + seq.rejected) - self.eta * seq.chosen


@dataclass(frozen=True)
class _Likelihood(Loss):
    """Compares h_chosen with h_rejected, h the log-prob or its mean over tokens, and adds alpha * (token mean of the
    chosen NLL).
    """

    needs_reference = False

    @property
    def antisymmetric(self) -> bool:
        return self.alpha == 0  # type: ignore[attr-defined]

    def values(self, seq: SequenceLogps) -> Tensor:
        """h, [S]."""
        return seq.logps * seq.per_length if self.length_averaged else seq.logps

    def rewards(self, seq: SequenceLogps) -> Tensor | None:
        return self.reward_scale * self.values(seq)


@register
@dataclass(frozen=True)
class CPO(_Likelihood):
    """Contrastive preference optimisation, arXiv 2401.08417 eq. 3-5: DPO with a uniform reference, and likelihood,

        L = mean over pairs of -log s(beta (logp_chosen - logp_rejected)) + alpha * (token mean of the chosen NLL).

    length_norm="sum": log-probs summed over tokens, as in the paper; "mean": averaged over each response's tokens.
    label_smoothing e: -(1 - e) log s - e log s(-). The likelihood term is one mean over the chosen tokens of the batch,
    as in its authors' and TRL's code. Adds up over pairs. Charted rewards: beta logp.
    """

    name = "cpo"
    formula = "-log σ(β (logp_c - logp_r)) + α NLL_c"
    paper = "arXiv 2401.08417"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    length_norm: Literal["mean", "sum"] = "sum"

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        check_number("alpha", self.alpha, least=0)
        check_smoothing(self.label_smoothing)
        check(self.length_norm in ("mean", "sum"), "length_norm", self.length_norm, "'mean' or 'sum'")

    @property
    def length_averaged(self) -> bool:
        return self.length_norm == "mean"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        chosen, rejected = self.values(seq).chunk(2)
        return logistic(self.beta * (chosen - rejected), self.label_smoothing) + self.alpha * seq.chosen_token_nll


@register
@dataclass(frozen=True)
class SimPO(_Likelihood):
    """Simple preference optimisation, arXiv 2405.14734 eq. 6: mean over pairs of

        -log s(beta logp_chosen / |y_chosen| - beta logp_rejected / |y_rejected| - gamma).

    alpha adds alpha * (token mean of the chosen NLL): CPO-SimPO. label_smoothing e: -(1 - e) log s - e log s(-).
    The paper: beta 2 to 2.5, gamma 0.5 to 1.6. Adds up over pairs. Charted rewards: beta logp / |y|.
    """

    name = "simpo"
    formula = "-log σ(β (logp_c/|y_c| - logp_r/|y_r|) - γ)"
    paper = "arXiv 2405.14734"
    length_averaged = True
    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    alpha: float = 0.0

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        check_number("gamma", self.gamma, least=0)
        check_smoothing(self.label_smoothing)
        check_number("alpha", self.alpha, least=0)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        chosen, rejected = self.values(seq).chunk(2)
        loss = logistic(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)
        return loss if self.alpha == 0 else loss + self.alpha * seq.chosen_token_nll


@register
@dataclass(frozen=True)
class ORPO(_Likelihood):
    """Odds ratio preference optimisation, arXiv 2403.07691 eq. 6-7: mean over pairs of

        alpha * (token mean of the chosen NLL) - beta log s(log odds_chosen - log odds_rejected),

    log odds = h - log(1 - e^h) with h = logp / |y|, kept below 0 by a rounding error (where it is 0, as without scored
    tokens, the odds are infinite). beta is the paper's lambda. The likelihood term covers the scored tokens of the
    chosen responses (TRL's and the authors' code score the prompt there too) and has the weight alpha = 1 in the paper.
    Adds up over pairs. Charted rewards: beta logp / |y|.
    """

    name = "orpo"
    formula = "α NLL_c - β log σ(log odds_c - log odds_r)"
    paper = "arXiv 2403.07691"
    length_averaged = True
    antisymmetric = False  # the odds of each response, whatever alpha
    beta: float = 0.1
    alpha: float = 1.0

    def check_options(self) -> None:
        check_number("beta", self.beta, least=0)
        check_number("alpha", self.alpha, least=0)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        h = self.values(seq)
        h = h.clamp(max=-torch.finfo(h.dtype).eps)
        chosen, rejected = (h - torch.log(-torch.expm1(h))).chunk(2)
        return self.alpha * seq.chosen_token_nll - self.beta * F.logsigmoid(chosen - rejected)
