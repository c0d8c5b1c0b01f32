"""Every loss there is, in the settings that change its traits, and a batch for it."""

from __future__ import annotations

from dataclasses import fields

import torch

from fastpref import losses
from fastpref.losses import SequenceLogps, Totals

SMOOTH = dict(label_smoothing=0.1)
FORWARD = dict(f_divergence="forward_kl")
LOSSES = [
    losses.SFT(),
    losses.ChosenSFT(),
    losses.DPO(0.2),
    losses.DPO(0.2, **SMOOTH),
    losses.DPO(0.2, **FORWARD),
    losses.DPO(0.2, f_divergence="js_divergence"),
    losses.DPO(0.2, f_divergence="alpha_divergence", f_alpha_divergence_coef=1.4),
    losses.DPONorm(2.0),
    losses.DPONorm(2.0, **FORWARD),
    losses.RobustDPO(0.2),
    losses.IPO(0.2),
    losses.IPO(0.2, length_norm="sum"),
    losses.IPO(0.2, **FORWARD),
    losses.Hinge(0.2),
    losses.EXO(0.2),
    losses.DiscoPOP(0.2),
    losses.NCA(0.2),
    losses.BCOPair(0.2),
    losses.SPPO(0.2),
    losses.APOZero(0.2),
    losses.APODown(0.2),
    losses.AOT(0.2),
    losses.AOTUnpaired(0.2, **SMOOTH),
    losses.RPO(0.2, eta=0.5, **SMOOTH),
    losses.RPO(0.2, eta=0.5, sft="tokens"),
    losses.IterativeRPO(0.2, alpha=0.3),
    losses.RDPO(0.2, alpha=0.1),
    losses.SLiC(delta=14.0, eta=0.05),
    losses.SLiC(delta=14.0, eta=0.0),
    losses.CPO(0.2),
    losses.CPO(0.2, alpha=0.0, **SMOOTH),
    losses.CPO(2.0, alpha=0.0, length_norm="mean"),
    losses.SimPO(),
    losses.SimPO(alpha=0.3),
    losses.ORPO(0.4),
    losses.KTO(0.2, desirable_weight=1.3),
    losses.APOZeroUnpaired(0.2, undesirable_weight=0.6),
    losses.BCO(0.2),
    losses.BCO(0.2, delta=0.4),
    losses.WPO(losses.DPO(0.2)),
    losses.WPO(losses.IPO(0.2)),
    losses.WPO(losses.RPO(0.2, eta=0.5)),
    losses.WeightedSum(),
    losses.WeightedSum((losses.DPO(0.2), losses.RDPO(0.3), losses.Hinge(0.1)), (0.5, 2.0, 1.0)),
    losses.WeightedSum((losses.IPO(0.2), losses.SimPO()), (0.01, 1.0)),
    losses.WeightedSum((losses.DPO(0.2), losses.IPO(0.2)), (1.0, 0.01)),
    losses.WeightedSum((losses.SFT(), losses.DPO(0.2)), (1.0, 2.0)),
    losses.WeightedSum((losses.AOT(0.2), losses.ChosenSFT()), (1.0, 1.0)),
    losses.WeightedSum((losses.SFT(), losses.KTO(0.2)), (1.0, 1.0)),
    losses.WeightedSum((losses.DPO(0.2), losses.WPO(losses.IPO(0.2))), (1.0, 0.01)),
]


def loss_id(loss):
    if isinstance(loss, losses.WeightedSum):
        return "+".join(map(loss_id, loss.losses))
    if isinstance(loss, losses.WPO):
        return f"wpo({loss_id(loss.loss)})"
    options = {f.name: getattr(loss, f.name) for f in fields(loss) if f.name != "beta"}
    changed = [str(value) for name, value in options.items() if value != getattr(type(loss)(), name)]
    return "-".join([loss.name, *changed])


def example(loss, lengths=(9, 4, 11, 6, 3, 7), dtype=torch.float64, seed=0):
    """A batch with everything this loss needs and nothing else; logps require grad."""
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, len(lengths), generator=gen, dtype=torch.float64)
    lengths = torch.tensor(lengths, dtype=dtype)
    logps = (-25 + 6 * noise[0]).clamp(max=-2).to(dtype).requires_grad_()
    half = len(lengths) // 2
    return SequenceLogps(
        logps,
        lengths,
        Totals(len(lengths), float(lengths.sum()), float(lengths[:half].sum())),
        logps.detach() + 4 * noise[1].to(dtype) if loss.needs_reference else None,
        torch.arange(len(lengths)) % 3 != 1 if loss.needs_desirable else None,
        torch.tensor(0.7, dtype=dtype) if loss.needs_kl else None,
        {"log_sum_p2": -2.2 * lengths} if loss.needs_extras else None,
    )
