"""fastpref: preference losses fused with the LM head. The `[tokens, vocabulary]` logits are never built."""

import importlib
from typing import TYPE_CHECKING, Any

from . import losses
from .losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    NCA,
    ORPO,
    RDPO,
    RPO,
    SFT,
    SPPO,
    WPO,
    AOTUnpaired,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    BradleyTerry,
    ChosenSFT,
    DiscoPOP,
    DPONorm,
    Hinge,
    IterativeRPO,
    PolicyGradient,
    RobustDPO,
    SequenceLogps,
    SimPO,
    SLiC,
    Totals,
    WeightedSum,
    get_loss,
    tail_weights,
)
from .plan import Plan, Problem, plan

if TYPE_CHECKING:
    from .head import PreferenceOutput, TokenStats, linear_logps, linear_preference_loss, linear_token_stats
    from .modules import (
        AOTLoss,
        AOTUnpairedLoss,
        APODownLoss,
        APOZeroLoss,
        APOZeroUnpairedLoss,
        BCOLoss,
        BCOPairLoss,
        ChosenSFTLoss,
        CPOLoss,
        DiscoPOPLoss,
        DPOLoss,
        DPONormLoss,
        EXOLoss,
        HingeLoss,
        IPOLoss,
        IterativeRPOLoss,
        KTOLoss,
        NCALoss,
        ORPOLoss,
        PreferenceLoss,
        RDPOLoss,
        RobustDPOLoss,
        RPOLoss,
        SFTLoss,
        SimPOLoss,
        SLiCLoss,
        SPPOLoss,
        WeightedSumLoss,
        WPOLoss,
    )
    from .workspace import release_workspaces

__version__ = "0.1.0"

__all__ = [
    "AOT", "AOTLoss", "AOTUnpaired", "AOTUnpairedLoss", "APODown", "APODownLoss", "APOZero", "APOZeroLoss",
    "APOZeroUnpaired", "APOZeroUnpairedLoss", "BCO", "BCOLoss", "BCOPair", "BCOPairLoss", "BradleyTerry", "CPO",
    "CPOLoss", "ChosenSFT", "ChosenSFTLoss", "DPO", "DPOLoss", "DPONorm", "DPONormLoss", "DiscoPOP", "DiscoPOPLoss",
    "EXO", "EXOLoss", "Hinge", "HingeLoss", "IPO", "IPOLoss", "IterativeRPO", "IterativeRPOLoss", "KTO", "KTOLoss",
    "NCA", "NCALoss", "ORPO", "ORPOLoss", "Plan", "PolicyGradient", "PreferenceLoss", "PreferenceOutput", "Problem",
    "RDPO", "RDPOLoss", "RPO", "RPOLoss", "RobustDPO", "RobustDPOLoss", "SFT", "SFTLoss", "SLiC", "SLiCLoss", "SPPO",
    "SPPOLoss", "SequenceLogps", "SimPO", "SimPOLoss", "TokenStats", "Totals", "WPO", "WPOLoss", "WeightedSum",
    "WeightedSumLoss", "get_loss", "linear_logps", "linear_preference_loss", "linear_token_stats", "losses", "plan",
    "release_workspaces", "tail_weights",
]


def __getattr__(name: str) -> Any:
    """What computes is imported when it is asked for: it needs torch, which takes a second or two to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = ".modules" if name.endswith("Loss") else ".workspace" if name == "release_workspaces" else ".head"
    home = importlib.import_module(room, __name__)
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
