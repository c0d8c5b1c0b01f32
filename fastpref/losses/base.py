"""What every loss here is: its traits, its name, its value and gradient. Knows no formula."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias, TypeVar

from .late import F, torch
from .sequences import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor

Coupling = Literal["sequence", "pair", "batch"]
LossFunction: TypeAlias = "Callable[[SequenceLogps], Tensor]"

CLASSES: dict[str, type[Loss]] = {}  # by name, those of this package
_OPTIONS: dict[str, tuple[str, ...]] = {}
# `loss_type` of TRL's trainers, where it is another name for one of these.
ALIASES = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm"}


@dataclass(frozen=True)
class Loss:
    """Base of the losses here. A subclass states its traits (the properties below), its options as dataclass fields,
    and `per_pair`; or, where it is no mean over pairs, `__call__`.
    """

    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""  # in a line, for `fastpref losses`
    paper: ClassVar[str] = ""
    _spec: ClassVar[str | None] = None

    @property
    def pairwise(self) -> bool:
        """First half chosen, second half rejected; otherwise sequences in any order."""
        return True

    @property
    def coupling(self) -> Coupling:
        """Which log-probs one gradient scalar depends on: its own "sequence", its "pair", or the whole "batch". Only a
        loss that adds up over its groups (see `SequenceLogps`) may state less than "batch".
        """
        return "pair"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_desirable(self) -> bool:
        """Takes a flag for each sequence instead of pairs."""
        return False

    @property
    def needs_kl(self) -> bool:
        """Takes the log-probs of mismatched pairs, KTO's baseline."""
        return False

    @property
    def needs_extras(self) -> tuple[str, ...]:
        """Names of the rows' extras whose sums it reads from `SequenceLogps.extras`."""
        return ()

    @property
    def antisymmetric(self) -> bool:
        """Depends on the log-probs of a pair only through chosen - rejected (see `coefficients`)."""
        return False

    @property
    def length_averaged(self) -> bool:
        """Of an antisymmetric loss: that difference is one of means over tokens, not of sums."""
        return False

    @property
    def parts(self) -> tuple[Loss, ...]:
        """The losses it is made of."""
        return ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        hooks, parent = ("__call__", "per_pair"), cls.__mro__[1]
        has_formula = any(getattr(parent, hook) is not getattr(Loss, hook) for hook in hooks)
        if has_formula and any(hook in cls.__dict__ for hook in hooks) and "antisymmetric" not in cls.__dict__:
            # Another formula: what its parent says of its own no longer holds.
            setattr(cls, "antisymmetric", False)  # noqa: B010

    def check_options(self) -> None:
        """Raises ValueError or TypeError."""

    def __post_init__(self) -> None:
        self.check_options()
        # Made here, once: under torch.compile an option may become symbolic, a string of it would not.
        object.__setattr__(self, "_spec", _spec_of(self))

    def per_pair(self, seq: SequenceLogps) -> Tensor:
        """[S / 2]: the value of each pair; the loss is their mean over the pairs of the batch."""
        raise NotImplementedError

    def __call__(self, seq: SequenceLogps) -> Tensor:
        return seq.pair_mean(self.per_pair(seq))

    @property
    def scratches(self) -> int:
        """Scalars of one item that are unknown until its last token: what a pair longer than the budget accumulates."""
        return 2 if self.pairwise and not self.antisymmetric else 1

    def coefficients(self, seq: SequenceLogps) -> Tensor:
        """c, [S], known beforehand, with dL / dlogp_s = G c_s for one G per item (for two if it has two scratches)."""
        if not self.antisymmetric:
            return torch.ones_like(seq.logps)
        chosen, rejected = (seq.per_length if self.length_averaged else torch.ones_like(seq.logps)).chunk(2)
        return torch.cat((chosen, -rejected))

    @property
    def reward_scale(self) -> float:
        """The implicit reward is reward_scale * (logp - ref_logp): beta, or 1 for a loss without one."""
        return getattr(self, "beta", 1.0)

    def rewards(self, seq: SequenceLogps) -> Tensor | None:
        """Implicit rewards, [S], that metrics chart; None where there is nothing to compare with."""
        return None if seq.ref_logps is None else self.reward_scale * seq.logratios

    @property
    def spec(self) -> str | None:
        """Name and options as one string, what a custom op carries; None for classes defined elsewhere."""
        return self._spec


L = TypeVar("L", bound=Loss)


def register(cls: type[L]) -> type[L]:
    """For the losses of this package: found by name, and carried by custom ops as name and options."""
    CLASSES[cls.name] = cls
    _OPTIONS[cls.name] = tuple(f.name for f in fields(cls))
    return cls


def _spec_of(loss: Loss) -> str | None:
    if CLASSES.get(loss.name) is not type(loss) or any(part._spec is None for part in loss.parts):
        return None
    return f"{loss.name} { {name: _literal(getattr(loss, name)) for name in _OPTIONS[loss.name]} }"


def _literal(value: object) -> object:
    """A value of an option in Python literals; a loss as {"loss": its spec}."""
    if isinstance(value, Loss):
        return {"loss": value._spec}
    if isinstance(value, tuple):
        return tuple([_literal(item) for item in value])
    return value if value is None or isinstance(value, str) else float(value)  # type: ignore[arg-type]


def _from_literal(value: object) -> object:
    if isinstance(value, dict):
        return from_spec(value["loss"])
    return tuple(_from_literal(item) for item in value) if isinstance(value, tuple) else value


@lru_cache(maxsize=256)
def from_spec(spec: str) -> Loss:
    name, _, options = spec.partition(" ")
    return CLASSES[name](**{key: _from_literal(value) for key, value in ast.literal_eval(options).items()})


def get_loss(name: str, **options: object) -> Loss:
    """The loss called `name` with these options: `get_loss("rpo", beta=0.05, eta=0.01)`.

    Raises:
        ValueError: unknown name or option; the message lists those there are.
    """
    name = ALIASES.get(name, name)
    if name not in CLASSES:
        near = difflib.get_close_matches(str(name), CLASSES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known_names = ", ".join(sorted(CLASSES))
        raise ValueError(f"loss is {name!r}{hint}; it takes {known_names}, a fastpref.losses object or a callable")
    cls, known = CLASSES[name], _OPTIONS[name]
    for option in options:
        if option not in known:
            raise ValueError(f"loss {name!r} has no option {option!r}; it takes {', '.join(known) or 'none'}")
    return cls(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of options, and the formula that most losses share
# ---------------------------------------------------------------------------------------------------------------------


def check(ok: bool, name: str, value: object, takes: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; it takes {takes}")


def check_number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    takes = "a finite number"
    if above is not None:
        takes = f"a number above {above:g}"
    elif least is not None:
        takes = f"a number of at least {least:g}"
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it takes {takes}")
    ok = math.isfinite(value) and (above is None or value > above) and (least is None or value >= least)
    check(ok, name, value, takes)


def check_smoothing(value: float, *, above: bool = False) -> None:
    check_number("label_smoothing", value, least=0)
    takes = "a number in (0, 0.5)" if above else "a number in [0, 0.5)"
    check(value < 0.5 and (value > 0 or not above), "label_smoothing", value, takes)


def logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x)."""
    loss = -F.logsigmoid(x)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-x)


# ---------------------------------------------------------------------------------------------------------------------
# Value, gradient, metrics
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(loss: LossFunction, seq: SequenceLogps) -> Tensor:
    """The scalar a loss returns; anything else is a ValueError."""
    value = loss(seq)
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"loss returned {got}; it must return a scalar tensor")
    return value


def loss_and_gradient(loss: LossFunction, seq: SequenceLogps) -> tuple[Tensor, Tensor]:
    """(L, dL / d logps), both detached."""
    # Inside a custom op the autograd keys are switched off for the whole thread: on again for these few floats.
    autograd_on = torch._C._SetExcludeDispatchKeyGuard(torch.DispatchKey.AutogradFunctionality, False)
    with autograd_on, torch.enable_grad():
        logps = seq.logps.detach().clone().requires_grad_()
        value = evaluate(loss, replace(seq, logps=logps))
        if not value.requires_grad:  # a constant
            return value.detach(), torch.zeros_like(logps)
        (gradient,) = torch.autograd.grad(value, logps)
    return value.detach(), gradient


def metrics(loss: LossFunction, seq: SequenceLogps) -> dict[str, Tensor]:
    """What TRL users chart, detached, fp32, not reduced.

    Pairs, one value a pair: logps/chosen, logps/rejected and, with a reference, rewards/chosen, rewards/rejected,
    rewards/margins, rewards/accuracies (1 if the chosen reward is larger); reward = reward_scale * (logp - ref_logp),
    or what a reference-free loss compares (CPO, SimPO, ORPO: beta times the log-prob or its mean over tokens).
    With `desirable` flags, one value a sequence: the same names (no margins, no accuracies), NaN where a sequence is of
    the other kind (reduce with nanmean), and kl, KTO's baseline z >= 0 (a scalar). Otherwise logps and rewards, [S].
    """
    logps = seq.logps.detach().float()
    if isinstance(loss, Loss):
        rewards = loss.rewards(seq)
    else:
        rewards = None if seq.ref_logps is None else seq.logratios
    rewards = None if rewards is None else rewards.detach().float()
    found: dict[str, Tensor] = {}
    if seq.desirable is not None:
        nan = torch.full_like(logps, float("nan"))
        for name, values in (("logps", logps), ("rewards", rewards)):
            if values is not None:
                found[f"{name}/chosen"] = torch.where(seq.desirable, values, nan)
                found[f"{name}/rejected"] = torch.where(seq.desirable, nan, values)
        if seq.kl is not None:
            found["kl"] = seq.kl.detach().float().clamp(min=0)
    elif getattr(loss, "pairwise", logps.shape[0] % 2 == 0):
        found["logps/chosen"], found["logps/rejected"] = logps.chunk(2)
        if rewards is not None:
            chosen, rejected = rewards.chunk(2)
            found["rewards/chosen"], found["rewards/rejected"] = chosen, rejected
            found["rewards/margins"] = chosen - rejected
            found["rewards/accuracies"] = (chosen > rejected).float()
    else:
        found["logps"] = logps
        if rewards is not None:
            found["rewards"] = rewards
    return found
