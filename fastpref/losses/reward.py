"""The reward model's loss: on one scalar a sequence, whatever model makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Coupling, check, check_number
from .late import F
from .sequences import Number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BradleyTerry:
    """Bradley-Terry loss of a reward model (arXiv 2203.02155 eq. 1), R the reward of a whole sequence:

        L = mean over pairs of -log s(R_chosen - R_rejected - margin) + center_coefficient (R_chosen + R_rejected)^2.

    margin: how much better the chosen response is (Llama 2, arXiv 2307.09288 eq. 2), 0 by default. The last term keeps
    rewards around 0 (arXiv 2312.09244; TRL's `center_rewards_coefficient`, there 0.01). Adds up over pairs.

    `fastpref train` takes it as `loss: bradley_terry` and then trains a reward model; it is no loss for an LM head.
    """

    name: ClassVar[str] = "bradley_terry"
    formula: ClassVar[str] = "-log σ(R_c - R_r - margin) + κ (R_c + R_r)²"
    paper: ClassVar[str] = "arXiv 2203.02155"
    # What a trainer asks of any loss, see `Loss`.
    pairwise: ClassVar[bool] = True
    coupling: ClassVar[Coupling] = "pair"
    needs_reference: ClassVar[bool] = False
    needs_desirable: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False

    center_coefficient: float = 0.0

    def __post_init__(self) -> None:
        check_number("center_coefficient", self.center_coefficient, least=0)

    def __call__(self, rewards: Tensor, *, margin: Tensor | None = None, pairs: Number | None = None) -> Tensor:
        """rewards [2 P], first half chosen; margin [P]; pairs: what the mean divides by (None: P). A scalar."""
        check(rewards.dim() == 1 and rewards.shape[0] % 2 == 0, "rewards", tuple(rewards.shape), "[2 P]")
        chosen, rejected = rewards.chunk(2)
        difference = chosen - rejected
        if margin is not None:
            check(margin.shape == chosen.shape, "margin", tuple(margin.shape), f"{tuple(chosen.shape)}, one a pair")
            difference = difference - margin
        loss = -F.logsigmoid(difference)
        if self.center_coefficient:
            loss = loss + self.center_coefficient * (chosen + rejected) ** 2
        return loss.sum() / (max(chosen.shape[0], 1) if pairs is None else pairs)
