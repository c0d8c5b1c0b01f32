"""Losses on pairs with a reference: DPO and its relatives.

r = logp - ref_logp of a sequence, log-probs summed over its scored tokens; D = r_chosen - r_rejected; s the logistic
function; |y| the number of scored tokens, at least 1. Each is a mean over the pairs of the batch of what a pair's own
log-probs give, so it adds up over pairs; AOT alone looks at the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .base import Coupling, Loss, check, check_number, check_smoothing, logistic, register
from .late import F, torch
from .sequences import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = 80.0  # of fp32's 88; TRL's


@dataclass(frozen=True)
class _Scored(Loss):
    """A loss of the difference of two scores, f'(pi / pi_ref) of f-DPO (arXiv 2309.16240), with t = pi / pi_ref = e^r:

        reverse_kl (DPO): r        js_divergence: log(2 t / (1 + t))
        forward_kl: 1 - 1 / t      alpha_divergence: (t^(a - 1) - 1) / (a - 1), a = f_alpha_divergence_coef (1: r)

    Exponents of t are cut off at 80, where fp32 ends. A sum over tokens of log t, whatever f.
    """

    beta: float = 0.1
    f_divergence: Divergence = field(default="reverse_kl", kw_only=True)
    f_alpha_divergence_coef: float = field(default=0.5, kw_only=True)

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        takes = ", ".join(map(repr, DIVERGENCES))
        check(self.f_divergence in DIVERGENCES, "f_divergence", self.f_divergence, takes)
        check_number("f_alpha_divergence_coef", self.f_alpha_divergence_coef)

    @property
    def _plain(self) -> bool:
        one = abs(self.f_alpha_divergence_coef - 1) < 1e-6
        return self.f_divergence == "reverse_kl" or (self.f_divergence == "alpha_divergence" and one)

    @property
    def antisymmetric(self) -> bool:
        return self._plain

    def scores(self, seq: SequenceLogps) -> Tensor:
        """[S]."""
        r = seq.logratios
        if self._plain:
            return r
        if self.f_divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(r)
        power = -1.0 if self.f_divergence == "forward_kl" else self.f_alpha_divergence_coef - 1
        return torch.expm1((power * r).clamp(max=_LARGEST_EXPONENT)) / power

    def score_margins(self, seq: SequenceLogps) -> Tensor:
        """[S / 2]; D for the reverse KL divergence."""
        scores = self.scores(seq)
        chosen, rejected = (scores * seq.per_length if self.length_averaged else scores).chunk(2)
        return chosen - rejected


@register
@dataclass(frozen=True)
class DPO(_Scored):
    """Direct preference optimisation, arXiv 2305.18290 eq. 7: L = mean over pairs of -log s(beta D).

    label_smoothing e (conservative DPO, arXiv 2305.18290 section 3 of E. Mitchell's note "A note on DPO with noisy
    preferences"): -(1 - e) log s(beta D) - e log s(-beta D). Log-probs are summed over tokens. Adds up over pairs.
    f_divergence, f_alpha_divergence_coef: f-DPO, arXiv 2309.16240: D becomes a difference of scores f'(pi / pi_ref),
    1 - 1 / t for "forward_kl", log(2 t / (1 + t)) for "js_divergence", (t^(a-1) - 1) / (a - 1) for "alpha_divergence".
    """

    name = "dpo"
    formula = "-log σ(β D)"
    paper = "arXiv 2305.18290"
    label_smoothing: float = 0.0

    def check_options(self) -> None:
        super().check_options()
        check_smoothing(self.label_smoothing)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return logistic(self.beta * self.score_margins(seq), self.label_smoothing)


@register
@dataclass(frozen=True)
class DPONorm(DPO):
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124; TRL's "sigmoid_norm"): mean over pairs of

        -log s(beta (r_chosen / |y_chosen| - r_rejected / |y_rejected|)).

    label_smoothing as in DPO; f_divergence: scores f'(pi / pi_ref) of the sums, divided by the lengths as TRL does.
    Since the margin is one of means over tokens, beta is some 50 times DPO's. Adds up over pairs.
    """

    name = "dpo_norm"
    formula = "-log σ(β (r_c/|y_c| - r_r/|y_r|))"
    paper = "arXiv 2411.15124"
    length_averaged = True


@register
@dataclass(frozen=True)
class RobustDPO(_Scored):
    """Provably robust DPO, arXiv 2403.00409: an unbiased estimate of DPO where a share e = label_smoothing of
    the preferences is flipped; mean over pairs of

        (-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e).

    Log-probs are summed over tokens; f_divergence as in DPO. Adds up over pairs. Unlike DPO's it can be negative.
    """

    name = "robust"
    formula = "(-(1-e) log σ(β D) + e log σ(-β D)) / (1-2e)"
    paper = "arXiv 2403.00409"
    label_smoothing: float = 0.1

    def check_options(self) -> None:
        super().check_options()
        check_smoothing(self.label_smoothing)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        h, e = self.beta * self.score_margins(seq), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


@register
@dataclass(frozen=True)
class IPO(_Scored):
    """Identity preference optimisation, arXiv 2310.12036 eq. 17: L = mean over pairs of (h - 1 / (2 beta))^2.

    length_norm="mean": h = r_chosen / |y_chosen| - r_rejected / |y_rejected| (its authors' correction, used by TRL).
    length_norm="sum": h = D, the paper's equation with log-probs summed over tokens. |y|: scored tokens, at least 1.
    f_divergence as in DPO, before the division by |y|. Adds up over pairs.
    """

    name = "ipo"
    formula = "(r_c/|y_c| - r_r/|y_r| - 1/(2β))²"
    paper = "arXiv 2310.12036"
    length_norm: Literal["mean", "sum"] = "mean"

    def check_options(self) -> None:
        super().check_options()
        check(self.length_norm in ("mean", "sum"), "length_norm", self.length_norm, "'mean' or 'sum'")

    @property
    def length_averaged(self) -> bool:
        return self.length_norm == "mean"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return (self.score_margins(seq) - 1 / (2 * self.beta)) ** 2


@register
@dataclass(frozen=True)
class Hinge(_Scored):
    """Hinge on implicit rewards (RSO, arXiv 2309.06657 eq. 9; TRL's "hinge"): mean over pairs of max(0, 1 - beta D).

    Log-probs are summed over tokens; f_divergence as in DPO. Adds up over pairs. Its gradient at the corner is 0.
    """

    name = "hinge"
    formula = "max(0, 1 - β D)"
    paper = "arXiv 2309.06657"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return F.relu(1 - self.beta * self.score_margins(seq))


@register
@dataclass(frozen=True)
class EXO(_Scored):
    """Efficient exact optimisation on preferences, arXiv 2402.00856 eq. 16 for two responses: the KL divergence from
    (1 - e, e) to p = (s(beta D), s(-beta D)), mean over pairs of

        p_1 (log p_1 - log(1 - e)) + p_2 (log p_2 - log e),        e = label_smoothing > 0 (the paper: 1e-3).

    Log-probs are summed over tokens; f_divergence as in DPO. Adds up over pairs.
    """

    name = "exo_pair"
    formula = "KL((σ(β D), σ(-β D)) || (1-e, e))"
    paper = "arXiv 2402.00856"
    label_smoothing: float = 1e-3

    def check_options(self) -> None:
        super().check_options()
        check_smoothing(self.label_smoothing, above=True)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        h, e = self.beta * self.score_margins(seq), self.label_smoothing
        better = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-e))
        return better + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(e))


@register
@dataclass(frozen=True)
class DiscoPOP(_Scored):
    """Discovered preference optimisation, arXiv 2406.08414 eq. 5, with h = beta D; mean over pairs of

        (1 - m) (-log s(h)) + m exp(-h),        m = s(h / tau).

    The product m exp(-h) is made as one exponential: finite where exp(-h) alone overflows. Log-probs are summed over
    tokens; f_divergence as in DPO. Adds up over pairs. The paper's tau is 0.05.
    """

    name = "discopop"
    formula = "(1-m) (-log σ(h)) + m exp(-h), h = β D, m = σ(h/τ)"
    paper = "arXiv 2406.08414"
    tau: float = 0.05

    def check_options(self) -> None:
        super().check_options()
        check_number("tau", self.tau, above=0)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        h = self.beta * self.score_margins(seq)
        exponential = torch.exp(F.logsigmoid(h / self.tau) - h)
        return torch.sigmoid(-h / self.tau) * -F.logsigmoid(h) + exponential


@dataclass(frozen=True)
class _OfRatios(Loss):
    """A loss of r_chosen and r_rejected, other than through their difference."""

    beta: float = 0.1

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)


@register
@dataclass(frozen=True)
class NCA(_OfRatios):
    """Noise contrastive alignment, arXiv 2402.05369 (NCA for two responses; TRL's "nca_pair"): mean over pairs of

        -log s(beta r_chosen) - log s(-beta r_chosen) / 2 - log s(-beta r_rejected) / 2.

    Log-probs are summed over tokens. Adds up over pairs.
    """

    name = "nca_pair"
    formula = "-log σ(β r_c) - log σ(-β r_c)/2 - log σ(-β r_r)/2"
    paper = "arXiv 2402.05369"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        chosen, rejected = (self.beta * seq.logratios).chunk(2)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register
@dataclass(frozen=True)
class BCOPair(_OfRatios):
    """Binary classifier optimisation on pairs, arXiv 2404.04656 with a reward shift of 0 (TRL's "bco_pair"): mean over
    pairs of -log s(beta r_chosen) - log s(-beta r_rejected).

    Log-probs are summed over tokens. Adds up over pairs. With a shift, or without pairs: `BCO`.
    """

    name = "bco_pair"
    formula = "-log σ(β r_c) - log σ(-β r_r)"
    paper = "arXiv 2404.04656"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        chosen, rejected = (self.beta * seq.logratios).chunk(2)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@register
@dataclass(frozen=True)
class SPPO(_OfRatios):
    """Self-play preference optimisation, arXiv 2405.00675 eq. 4.7 with P = 1 for the chosen and 0 for the rejected
    response (TRL's "sppo_hard"), beta = 1 / eta: mean over pairs of

        (r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2.

    Log-probs are summed over tokens. Adds up over pairs.
    """

    name = "sppo_hard"
    formula = "(r_c - 1/(2β))² + (r_r + 1/(2β))²"
    paper = "arXiv 2405.00675"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        (chosen, rejected), target = seq.logratios.chunk(2), 0.5 / self.beta
        return (chosen - target) ** 2 + (rejected + target) ** 2


@register
@dataclass(frozen=True)
class APOZero(_OfRatios):
    """Anchored preference optimisation, arXiv 2408.06266 eq. 7, for chosen responses better than the model's own: mean
    over pairs of 1 - s(beta r_chosen) + s(beta r_rejected).

    Log-probs are summed over tokens. Adds up over pairs. Without pairs: `APOZeroUnpaired`.
    """

    name = "apo_zero"
    formula = "1 - σ(β r_c) + σ(β r_r)"
    paper = "arXiv 2408.06266"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        chosen, rejected = (self.beta * seq.logratios).chunk(2)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)  # s(-x) is 1 - s(x) without its cancellation


@register
@dataclass(frozen=True)
class APODown(_OfRatios):
    """Anchored preference optimisation, arXiv 2408.06266 eq. 8, for chosen responses worse than the model's own: mean
    over pairs of s(beta r_chosen) + 1 - s(beta D).

    Log-probs are summed over tokens. Adds up over pairs. It lowers chosen responses, and rejected ones more.
    """

    name = "apo_down"
    formula = "σ(β r_c) + 1 - σ(β D)"
    paper = "arXiv 2408.06266"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        return torch.sigmoid(self.beta * seq.logratios.chunk(2)[0]) + torch.sigmoid(-self.beta * seq.margins)


@dataclass(frozen=True)
class _Transport(_OfRatios):
    """Sorted over the batch of one call: means over parts of a batch are means of their own transports, so `totals`
    makes the parts comparable in scale but not equal to the whole.
    """

    label_smoothing: float = 0.0

    def check_options(self) -> None:
        super().check_options()
        check_smoothing(self.label_smoothing)

    @property
    def coupling(self) -> Coupling:
        return "batch"


@register
@dataclass(frozen=True)
class AOT(_Transport):
    """Alignment via optimal transport, paired, arXiv 2406.05882: with both margins sorted over the batch, i the rank,

        L = mean over i of -log s(beta (sort(logp_chosen - logp_rejected)_i - sort(ref_chosen - ref_rejected)_i)).

    label_smoothing e: -(1 - e) log s - e log s(-). Log-probs are summed over tokens; a mean over the ranks, as many as
    pairs. Does NOT add up over pairs: its micro-batches are sorted one by one.
    """

    name = "aot"
    formula = "-log σ(β (sort(logp_c - logp_r) - sort(ref_c - ref_r)))"
    paper = "arXiv 2406.05882"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        """By rank, not by pair."""
        ref_chosen, ref_rejected = seq.reference.chunk(2)
        margins, ref_margins = seq.chosen - seq.rejected, ref_chosen - ref_rejected
        return logistic(self.beta * (margins.sort().values - ref_margins.sort().values), self.label_smoothing)


@register
@dataclass(frozen=True)
class AOTUnpaired(_Transport):
    """Alignment via optimal transport, unpaired, arXiv 2406.05882: with the log-ratios of chosen and of rejected
    responses sorted over the batch, i the rank,

        L = mean over i of -log s(beta (sort(r_chosen)_i - sort(r_rejected)_i)).

    label_smoothing as in AOT. Log-probs are summed over tokens. Takes as many chosen as rejected responses, each in any
    order. Does NOT add up over pairs.
    """

    name = "aot_unpaired"
    formula = "-log σ(β (sort(r_c) - sort(r_r)))"
    paper = "arXiv 2406.05882"

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        """By rank, not by pair."""
        chosen, rejected = seq.logratios.chunk(2)
        return logistic(self.beta * (chosen.sort().values - rejected.sort().values), self.label_smoothing)


@register
@dataclass(frozen=True)
class RPO(Loss):
    """Regularised preference optimisation, arXiv 2405.16436 eq. 4.8: DPO plus an SFT term on the chosen responses,

        L = mean over pairs of -log s(beta D)  +  eta * beta * SFT.

    sft="sum": SFT = mean over pairs of -logp_chosen, log-probs summed over tokens (the paper's equation).
    sft="tokens": SFT = -(sum of logp_chosen over pairs) / (number of scored chosen tokens of the batch), the
    token-averaged variant of the paper's appendix F (there with eta 0.2, beta 0.5).
    The SFT term keeps the chosen log-probs from falling; the paper's main setting is beta 0.01, eta 0.005.
    label_smoothing, of the first term, as in DPO. Adds up over pairs.
    """

    name = "rpo"
    formula = "-log σ(β D) - η β logp_c"
    paper = "arXiv 2405.16436"
    beta: float = 0.1
    eta: float = 0.005
    sft: Literal["sum", "tokens"] = "sum"
    label_smoothing: float = 0.0

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        check_number("eta", self.eta, least=0)
        check(self.sft in ("sum", "tokens"), "sft", self.sft, "'sum' or 'tokens'")
        check_smoothing(self.label_smoothing)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        nll = -seq.chosen if self.sft == "sum" else seq.chosen_token_nll
        return logistic(self.beta * seq.margins, self.label_smoothing) + self.eta * self.beta * nll


@register
@dataclass(frozen=True)
class IterativeRPO(Loss):
    """Iterative reasoning preference optimisation (Pang et al.), arXiv 2404.19733 eq. 1: mean over pairs of

        -log s(beta D) - alpha logp_chosen / |y_chosen|.

    The likelihood term is averaged over the tokens of EACH response, where RPO sums or takes one mean over all tokens
    of the batch (as did TRL's `rpo_alpha`). The paper: alpha 1, beta 0.1. label_smoothing, of the first term, as in
    DPO. Adds up over pairs.
    """

    name = "iterative_rpo"
    formula = "-log σ(β D) - α logp_c/|y_c|"
    paper = "arXiv 2404.19733"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        check_number("alpha", self.alpha, least=0)
        check_smoothing(self.label_smoothing)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        nll = -seq.chosen * seq.per_length.chunk(2)[0]
        return logistic(self.beta * seq.margins, self.label_smoothing) + self.alpha * nll


@register
@dataclass(frozen=True)
class RDPO(Loss):
    """Length-regularised DPO (R-DPO), arXiv 2403.19159: mean over pairs of

        -log s(beta D + alpha (|y_chosen| - |y_rejected|)).

    It is DPO for the reward less alpha nats a token of length: a longer chosen response counts as won by that much
    already, and is pushed less. label_smoothing as in DPO. Log-probs are summed over tokens. Adds up over pairs.
    """

    name = "rdpo"
    formula = "-log σ(β D + α (|y_c| - |y_r|))"
    paper = "arXiv 2403.19159"
    antisymmetric = True
    beta: float = 0.1
    alpha: float = 0.01
    label_smoothing: float = 0.0

    def check_options(self) -> None:
        check_number("beta", self.beta, above=0)
        check_number("alpha", self.alpha, least=0)
        check_smoothing(self.label_smoothing)

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        longer = seq.chosen_lengths - seq.rejected_lengths
        return logistic(self.beta * seq.margins + self.alpha * longer, self.label_smoothing)
