"""Every implementation that is measured, at its best documented use, behind one call: batch and loss name -> Result.

Peers that only make token log-probs are completed with the loss maths of problem.py. All of them are handed hidden,
weight and targets and do forward; the harness calls backward. None is charged a reference forward: log-probs of the
reference are given.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref as fp
from fastpref import arguments, rows
from fastpref.plan import DEFAULT_BUDGET

from .problem import BETA, ETA, IGNORE, LOSSES, Batch, Shape

MIB = 2**20
OPS = ("step", "frozen", "forward")  # gradients of hidden and weight; of hidden; none
ONE_BF16 = 2.0**-8  # the most that one rounding to bf16 changes a number by
QUACK_CHUNK = 4096  # rows: its own default


class Result(NamedTuple):
    loss: Tensor
    logps: Tensor | None = None  # [S] sequence log-probs; None: it only has the loss
    token_logps: Tensor | None = None  # [N], where the implementation shows them
    active: float | None = None  # tail="rank1": share of the columns that were multiplied


@dataclass(frozen=True)
class Implementation:
    name: str
    version: str
    run: Callable[[Batch, str], Result]
    gemms: Callable[[Shape, str], float]  # GEMMs over the N scored rows that it does, by shape and op; for context
    losses: tuple[str, ...] = tuple(LOSSES)
    references: bool = True  # False: its loss takes none; it is checked against the truth without them
    tokens: Callable[[Batch], Tensor] | None = None  # token log-probs [N], where the Result has none
    plan: Callable[[Shape, str, str, torch.dtype, str], fp.Plan] | None = None  # (shape, op, loss, dtype, device type)
    logits_dtype: Callable[[torch.dtype, str], str] | None = None  # (dtype, device type); None: the inputs' own
    backend: str | None = None
    budget: int | None = None  # bytes
    grad_tolerance: float = 0.0  # what its gradients may be off by in any dtype

    @property
    def label(self) -> str:
        parts = [self.name, self.backend or "", f"{self.budget / MIB:.4g} MiB" if self.budget else ""]
        return " ".join(part for part in parts if part)


class Missing(NamedTuple):
    """A peer that cannot run here, and why: a named gap in the table."""

    name: str
    why: str


# ---------------------------------------------------------------------------------------------------------------------
# fastpref
# ---------------------------------------------------------------------------------------------------------------------


def fastpref_loss(name: str) -> fp.losses.Loss:
    options = {"rpo": {"beta": BETA, "eta": ETA}, "sft": {}}
    return fp.get_loss(name, **options.get(name, {"beta": BETA}))


def fastpref(
    backend: str | None = None, budget: int | None = None, logits: str | None = None, tail: str = "exact"
) -> Implementation:
    """logits: "bf16" for tiles of logits in bf16 where fp32 is the default (CUDA)."""
    def inputs(batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        given = dict(softcap=batch.shape.softcap, memory_budget=budget, backend=backend, logits_dtype=logits, tail=tail)
        if batch.shape.prompt_share:
            return batch.hidden, batch.targets, given
        return batch.rows(), batch.scored_targets, given

    def run(batch: Batch, loss: str) -> Result:
        hidden, targets, given = inputs(batch)
        if not batch.shape.prompt_share:
            given["cu_seqlens"] = list(range(0, batch.shape.rows + 1, batch.shape.scored_length))
        if loss == "kto":
            given |= dict(desirable=batch.desirable, kl_logps=batch.kl_logps, ref_kl_logps=batch.ref_kl_logps)
        if loss != "sft":
            given |= dict(ref_logps=batch.ref_logps)
        out = fp.linear_preference_loss(hidden, batch.weight, targets, loss=fastpref_loss(loss), **given)
        active = out.metrics.get("tail/active")
        return Result(out.loss, out.logps, active=None if active is None else float(active))

    def tokens(batch: Batch) -> Tensor:
        hidden, targets, given = inputs(batch)
        return fp.linear_logps(hidden, batch.weight, targets, **given)[targets != IGNORE]

    def logits_dtype(dtype: torch.dtype, device: str) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        return logits or ("fp32" if device == "cuda" or dtype in arguments.SLOW_DTYPES else name)

    def schedule(shape: Shape, op: str, loss: str, dtype: torch.dtype, device: str) -> fp.Plan:
        kind, written = fastpref_loss(loss), 4 if logits_dtype(dtype, device) == "fp32" else 2
        compute = dtype.itemsize if device == "cuda" else written
        problem = fp.Problem(
            (shape.scored_length,) * shape.sequences, shape.hidden, shape.vocab, compute, written, dtype.itemsize,
            needs_hidden_grad=op != "forward", needs_weight_grad=op == "step", coupling=kind.coupling,
            scratches=kind.scratches, cast_weight=compute != dtype.itemsize,
            gathered=shape.prompt_share > 0 or compute != dtype.itemsize, tail=tail == "rank1", device=device,
        )
        return fp.plan(problem, budget)

    def gemms(shape: Shape, op: str) -> float:
        return {"forward": 1.0, "frozen": 2.0, "step": 3.0}[op]

    name, off = ("fastpref", 0.0) if tail == "exact" else ("fastpref-rank1", ONE_BF16)
    return Implementation(
        name, fp.__version__, run, gemms, tokens=tokens, plan=schedule, logits_dtype=logits_dtype, backend=backend,
        budget=budget, grad_tolerance=off,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    """None: not installed."""
    try:
        return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _from_tokens(name: str, version: str, token_logps: Callable[[Batch], Tensor], gemms: int) -> Implementation:
    """An implementation of token log-probs over the scored rows. gemms: of its step."""

    def run(batch: Batch, loss: str) -> Result:
        tokens = token_logps(batch)
        logps = batch.sequence_logps(tokens.float())
        return Result(LOSSES[loss](logps, batch), logps, tokens)

    def passes(shape: Shape, op: str) -> float:
        return {"forward": 1.0, "frozen": gemms - 1.0, "step": float(gemms)}[op]

    return Implementation(name, version, run, passes)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _full_logits_logps(rows_NH: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Logits in the inputs' dtype, everything after them in fp32: what trainers without a fused head do."""
    logits = _capped((rows_NH @ weight.t()).float(), cap)
    return -F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


def naive() -> Implementation:
    def tokens(batch: Batch) -> Tensor:
        return _full_logits_logps(batch.rows(), batch.weight, batch.scored_targets, batch.shape.softcap)

    return _from_tokens("naive", torch.__version__, tokens, 3)


def naive_all() -> Implementation:
    """As `naive`, over every row of the padded input: what most trainers do."""

    def run(batch: Batch, loss: str) -> Result:
        hidden, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
        tokens = _full_logits_logps(hidden, batch.weight, targets, batch.shape.softcap)
        logps = tokens.view(batch.targets.shape).sum(1)
        return Result(LOSSES[loss](logps, batch), logps, tokens[batch.index])

    def gemms(shape: Shape, op: str) -> float:
        return {"forward": 1, "frozen": 2, "step": 3}[op] * shape.padded_length / shape.scored_length

    return Implementation("naive_all", torch.__version__, run, gemms)


def naive_compiled() -> Implementation:
    torch.compiler.reset()  # after eight shapes of one function it would quietly run uncompiled
    compiled = torch.compile(_full_logits_logps, dynamic=False)

    def tokens(batch: Batch) -> Tensor:
        return compiled(batch.rows(), batch.weight, batch.scored_targets, batch.shape.softcap)

    return _from_tokens("naive_compiled", torch.__version__, tokens, 3)


def torch_lce(device: str) -> Implementation | Missing:
    """`F.linear_cross_entropy`, chunked, no reduction. Its default chunks are 32 to 128 rows at the shapes of these
    benchmarks and several times slower: it gets as many rows, a power of two, as fp32 logits fit fastpref's budget.
    """
    if not hasattr(F, "linear_cross_entropy"):
        return Missing("torch_lce", f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")

    def tokens(batch: Batch) -> Tensor:
        if batch.shape.softcap is not None:
            raise NotImplementedError("F.linear_cross_entropy has no softcap")
        rows = DEFAULT_BUDGET[device] // (4 * batch.shape.vocab)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1 << (max(1, rows).bit_length() - 1))
        return -F.linear_cross_entropy(
            batch.rows(), batch.weight, batch.scored_targets, reduction="none", options=options
        )

    return _from_tokens("torch_lce", torch.__version__, tokens, 4)


def trl() -> Implementation | Missing:
    """The kernel of TRL's DPO trainer, with its tile width, asked for log-probs only (the trainer asks for more)."""
    version = _version("trl")
    if version is None:
        return Missing("trl", "not installed")
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        return Missing("trl", f"{version}: {error}")

    def tokens(batch: Batch) -> Tensor:
        return ChunkedLogProbFunction.apply(
            batch.rows(), batch.weight, None, batch.scored_targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
            batch.shape.softcap, 1.0, ("log_probs",),
        )[0]

    return _from_tokens("trl", version, tokens, 4)


def liger(device: str) -> Implementation | Missing:
    """Its chunked DPO loss without a reference model, which takes no reference log-probs: they are 0 in its formula."""
    version = _version("liger_kernel")
    if version is None:
        return Missing("liger", "not installed")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        return Missing("liger", f"{version}: {error}")
    # Its default, compiled, on a GPU; on a CPU it is run as its own tests do.
    module = LigerFusedLinearDPOLoss(
        ignore_index=IGNORE, beta=BETA, compiled=device == "cuda", use_ref_model=False, average_log_prob=False
    )

    def run(batch: Batch, loss: str) -> Result:
        if batch.shape.softcap is not None:
            raise NotImplementedError("Liger's chunked losses have no softcap")
        value, (chosen, rejected, *_) = module(batch.weight, batch.hidden, batch.targets)
        return Result(value, torch.cat((chosen, rejected)))

    def gemms(shape: Shape, op: str) -> float:
        return {"forward": 1, "frozen": 2, "step": 3}[op] * shape.padded_length / shape.scored_length

    return Implementation("liger", version, run, gemms, losses=("dpo",), references=False)


def cce(device: str) -> Implementation | Missing:
    """Cut Cross-Entropy with its default gradient filter."""
    version = _version("cut_cross_entropy")
    if version is None:
        return Missing("cce", "not installed")
    if device != "cuda":
        return Missing("cce", f"{version} runs on CUDA only")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return Missing("cce", f"{version}: {error}")

    def tokens(batch: Batch) -> Tensor:
        return -linear_cross_entropy(
            batch.rows(), batch.weight, batch.scored_targets, softcap=batch.shape.softcap, reduction="none"
        )

    return _from_tokens("cce", version, tokens, 4)


def quack(device: str) -> Implementation | Missing:
    """Its fused `scaled_exp_linear_cross_entropy` (three GEMMs, no logits), which has only sums and means: the loss is
    the mean over tokens, and no log-prob is seen."""
    if device != "cuda":
        return Missing("quack", "runs on CUDA only")
    try:
        version = importlib.metadata.version("quack-kernels")
        from quack import linear_cross_entropy as theirs

        fused, supported = theirs.scaled_exp_linear_cross_entropy, theirs.scaled_exp_lce_supported
    except (ImportError, AttributeError, RuntimeError) as error:  # PackageNotFoundError is an ImportError
        missing = isinstance(error, importlib.metadata.PackageNotFoundError)
        return Missing("quack", "not installed" if missing else str(error))

    def run(batch: Batch, loss: str) -> Result:
        x, weight = batch.rows(), batch.weight
        if batch.shape.softcap is not None or not supported(x, weight, QUACK_CHUNK, "mean"):
            raise NotImplementedError("quack's scaled-exp takes bf16 on SM90, V a multiple of 128, no softcap")
        return Result(fused(x, weight, batch.scored_targets, chunk_size=QUACK_CHUNK, reduction="mean"))

    def gemms(shape: Shape, op: str) -> float:
        return {"forward": 1.0, "frozen": 2.0, "step": 3.0}[op]

    return Implementation("quack", version, run, gemms, losses=("sft",))


def unsloth() -> Implementation | Missing:
    """unsloth-zoo's `fused_linear_logprobs`, run from where it is installed: frozen head in two GEMMs, trainable in
    four with an fp32 dW. Its file is loaded alone: the package's own import patches torch and transformers for
    everybody who is measured beside it."""
    name = "unsloth-zoo"
    spec = importlib.util.find_spec("unsloth_zoo")
    if spec is None or not spec.submodule_search_locations:
        return Missing(name, "not installed")
    version = importlib.metadata.version("unsloth_zoo")
    try:
        path = Path(spec.submodule_search_locations[0], "fused_losses", "fused_linear.py")
        logprobs = _module_at(path, "unsloth_zoo_fused_linear").fused_linear_logprobs
    except (OSError, ImportError, AttributeError) as error:
        return Missing(name, f"{version}: {error}")

    def tokens(batch: Batch) -> Tensor:
        cap = batch.shape.softcap or 0.0
        return logprobs(batch.rows(), batch.weight, batch.scored_targets, logit_softcapping=cap)

    def gemms(shape: Shape, op: str) -> float:
        return {"forward": 1.0, "frozen": 2.0, "step": 4.0}[op]

    return replace(_from_tokens(name, version, tokens, 4), gemms=gemms)


def _module_at(path: Path, name: str) -> Any:
    """Once a process: it registers its ops with torch."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def peer(name: str, device: str) -> Implementation | Missing:
    """The peer called `name` (see `PEERS`)."""
    if name not in PEERS:
        raise ValueError(f"implementation is {name!r}; it takes {', '.join(PEERS)}")
    return PEERS[name](device)


PEERS: dict[str, Callable[[str], Implementation | Missing]] = {
    "naive": lambda device: naive(),
    "naive_all": lambda device: naive_all(),
    "naive_compiled": lambda device: naive_compiled(),
    "torch_lce": torch_lce,
    "trl": lambda device: trl(),
    "liger": liger,
    "cce": cce,
    "quack": quack,
    "unsloth-zoo": lambda device: unsloth(),
    "fastpref-rank1": lambda device: fastpref(tail="rank1"),
}
BY_DEFAULT = tuple(name for name in PEERS if name not in ("naive_compiled", "fastpref-rank1"))


def fastpref_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The row kernels that work here: the one that is used by default first, then other compiled ones."""
    default = rows.choose(None, device, dtype).__name__.rpartition(".")[2].removesuffix("_rows")
    others = ("triton", "cuda") if device.type == "cuda" else ("native",)
    return [default, *(name for name in others if name != default and rows.availability(name).available)]
