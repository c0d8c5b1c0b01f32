"""fastpref: preference losses fused with the LM head. The `[tokens, vocabulary]` logits are never built."""

from . import losses
from .head import PreferenceOutput, linear_logps, linear_preference_loss
from .losses import DPO, IPO, KTO, RPO, SFT, Hinge, SequenceLogps, SLiC, Totals, get_loss
from .plan import Plan, Problem, plan

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "RPO",
    "SFT",
    "Hinge",
    "Plan",
    "PreferenceOutput",
    "Problem",
    "SLiC",
    "SequenceLogps",
    "Totals",
    "get_loss",
    "linear_logps",
    "linear_preference_loss",
    "losses",
    "plan",
]
