"""Preference losses: a few lines of maths on sequence log-probs. Knows no kernel, no plan and no model.

Notation, per sequence: logp = sum over the scored tokens of log pi(token), ref_logp the same under the reference,
r = logp - ref_logp; per pair: D = r_chosen - r_rejected. s is the logistic function.

A loss is any callable `SequenceLogps -> scalar`. Those here are frozen dataclasses that also state what the schedule
must know (`coupling`), what they need (`needs_reference`, `needs_kl`, ...) and the scale of their implicit reward.

    sequences.py        what a loss sees           pairs.py            DPO and its relatives
    base.py             traits, names, gradient    unpaired.py         KTO, BCO: a flag a sequence
    combine.py          sums, WPO, LD-DPO          reference_free.py   SFT, SLiC, CPO, SimPO, ORPO
    reward.py           scalar rewards             policy_gradient.py  token ratios
"""

from .base import (
    ALIASES,
    CLASSES,
    Coupling,
    Loss,
    LossFunction,
    evaluate,
    from_spec,
    get_loss,
    loss_and_gradient,
    metrics,
)
from .combine import WPO, WeightedSum, tail_weights
from .pairs import (
    AOT,
    DPO,
    EXO,
    IPO,
    NCA,
    RDPO,
    RPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    DPONorm,
    Hinge,
    IterativeRPO,
    RobustDPO,
)
from .policy_gradient import PolicyGradient
from .reference_free import CPO, ORPO, SFT, ChosenSFT, SimPO, SLiC
from .reward import BradleyTerry
from .sequences import SequenceLogps, Totals
from .unpaired import BCO, KTO, APOZeroUnpaired

__all__ = [
    "ALIASES", "AOT", "APODown", "APOZero", "APOZeroUnpaired", "AOTUnpaired", "BCO", "BCOPair", "BradleyTerry",
    "CLASSES", "CPO", "ChosenSFT", "Coupling", "DPO", "DPONorm", "DiscoPOP", "EXO", "Hinge", "IPO", "IterativeRPO",
    "KTO", "Loss", "LossFunction", "NCA", "ORPO", "PolicyGradient", "RDPO", "RPO", "RobustDPO", "SFT", "SLiC", "SPPO",
    "SequenceLogps", "SimPO", "Totals", "WPO", "WeightedSum", "evaluate", "from_spec", "get_loss", "loss_and_gradient",
    "metrics", "tail_weights",
]
