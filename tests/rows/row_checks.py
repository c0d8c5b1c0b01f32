"""What the tests of the row kernels share: the fp64 truth, inputs, and how close is close."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.rows import RowStats, Transform

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
ROUNDING = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}  # relative error of one store
IGNORE = -100
TRANSFORMS = {
    "plain": (Transform(), False),
    "bias": (Transform(), True),
    "scaled": (Transform(logit_scale=0.7, temperature=1.3), False),
    "softcap": (Transform(softcap=5.0), False),
    "all": (Transform(logit_scale=1.5, softcap=8.0, temperature=0.6), True),
}


def oracle(logits: Tensor, targets: Tensor, transform: Transform, bias: Tensor | None = None) -> dict:
    """fp64; every target must be valid. grad = d logp / d logits, with 1 - p_y summed from the other probabilities."""
    u = logits.double() + (0.0 if bias is None else bias.double())
    z = u * transform.logit_scale
    slope = torch.ones_like(z)
    if transform.softcap is not None:
        slope = torch.cosh(z / transform.softcap) ** -2
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature
    top = z.max(1, keepdim=True).values
    e = torch.exp(z - top)
    lse = top + e.sum(1, keepdim=True).log()
    p = torch.exp(z - lse)
    here = torch.zeros_like(z).scatter_(1, targets[:, None], 1.0).bool()
    grad = torch.where(here, p.masked_fill(here, 0.0).sum(1, keepdim=True), -p)
    z_y = z.masked_fill(~here, 0.0).sum(1)
    return {
        "logp": z_y - lse[:, 0],
        "lse": lse[:, 0],
        "grad": grad * slope * transform.logit_scale / transform.temperature,
        "entropy": -(p * (z - lse).masked_fill(p == 0, 0.0)).sum(1),
        "top1": (z.argmax(1) == targets).double(),
        "mean_logit": z.mean(1),
        "log_sum_p2": 2 * (top - lse)[:, 0] + (e * e).sum(1).log(),
        "factor": transform.logit_scale / transform.temperature,
        "error": z.abs().max() * 2.0**-23,  # a rounding of z to fp32, nats
    }


def gradient_oracle(
    logits: Tensor, targets: Tensor, transform: Transform, bias: Tensor | None, gl: Tensor, gh: Tensor
) -> tuple[Tensor, Tensor]:
    """d (gl logp + gh entropy) / d logits by fp64 autograd, and the size of what is rounded on the way there: every
    target valid, every logit finite."""
    x = logits.double().requires_grad_()
    z = (x + (0.0 if bias is None else bias.double())) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_p = torch.log_softmax(z / transform.temperature, 1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    total = gl.double() * log_p.gather(1, targets[:, None])[:, 0] + gh.double() * entropy
    (grad,) = torch.autograd.grad(total.sum(), x)
    with torch.no_grad():
        size = p * (gl.double().abs()[:, None] + gh.double().abs()[:, None] * (log_p.abs() + entropy[:, None]))
        size.scatter_add_(1, targets[:, None], gl.double().abs()[:, None])
    return grad, size * transform.logit_scale / transform.temperature


def random_case(rows: int, vocab: int, dtype: torch.dtype = FP32, std: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(1000 * rows + vocab + seed)
    logits = (std * torch.randn(rows, vocab, generator=generator)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[:1], targets[-1:] = 0, vocab - 1
    return logits, targets, torch.randn(vocab, generator=generator)


def check_stats(stats: RowStats, want: dict, names=("logp", "lse"), atol: float = 4e-6) -> None:
    for name in names:
        got = getattr(stats, name)
        assert got.dtype == FP32
        torch.testing.assert_close(
            got.double(), want[name], rtol=2e-6, atol=atol + 3 * float(want["error"]), msg=lambda m, n=name: f"{n}: {m}"
        )


def check_grad(scale: Tensor, out: Tensor, want: dict, stores: int = 1) -> None:
    """Every element to its own rounding, plus 4e-7 of the largest there can be: 1 - p is not known better in fp32."""
    grad = scale.double()[:, None] * out.double()
    error = (grad - want["grad"]).abs()
    relative = stores * 1.01 * ROUNDING[out.dtype] + 4e-6 + 3 * float(want["error"])
    limit = relative * want["grad"].abs() + 4e-7 * want["factor"]
    assert bool((error <= limit).all()), f"{float((error / limit).max()):.3g} times the limit"


def spikes(logits: Tensor, first: int, every: int, height: float) -> Tensor:
    """The maximum rises by `height` again and again."""
    for i, column in enumerate(range(first, logits.shape[1], every)):
        logits[:, column] = (i + 1) * height
    return logits


KINDS = {
    "near uniform": lambda z, y: 1e-3 * z,
    "peaked": lambda z, y: 12 * z,
    "confidently right": lambda z, y: z.scatter(1, y[:, None], 45.0),
    "confidently wrong": lambda z, y: z.scatter(1, (y[:, None] + 1) % z.shape[1], 45.0),
    "all negative": lambda z, y: -80 - 10 * z.abs(),
    "all near -1e4": lambda z, y: z - 1e4,
    "+-1e4": lambda z, y: (1e4 * z / z.abs().max()),
    "maximum in the last block": lambda z, y: spikes(z, z.shape[1] - 2, 1, 70.0),
    "rising by 40 in each block": lambda z, y: spikes(z, 2050, 2000, 40.0),
    "rising by 9 in each block": lambda z, y: spikes(z, 100, 2048, 9.0),
    "all equal": lambda z, y: torch.full_like(z, 11.5),
}
