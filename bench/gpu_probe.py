"""First step of `make gpu-check`: what is installed, whether torch has the products that the head asks for, and the
ceilings of copying and multiplying here. A line of JSON on stdout for each thing as soon as it is known.

    python -m bench.gpu_probe          --dry: all but what takes a GPU
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

NEEDED = ("triton", "transformers", "numpy", "yaml", "rich", "safetensors", "pytest", "pybind11")  # imported
OPTIONAL = ("accelerate", "peft", "xdist", "pytest_timeout", "hypothesis", "torchao", "trl", "datasets", "liger_kernel",
            "cut_cross_entropy", "quack", "unsloth_zoo", "flash_attn")  # found, and imported where they are used
PACKAGES = {"yaml": "PyYAML", "xdist": "pytest-xdist", "quack": "quack-kernels"}  # where the name is another
OWN = ("fastpref.head", "fastpref.train.loop", "bench.head", "bench.train_cell", "bench.rows")


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def imports() -> list[str]:
    """What is needed and cannot be imported."""
    failed = []
    for name in (*NEEDED, *OWN):
        started = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(name)
            tell(what="import", name=name, error=f"{type(error).__name__}: {error}")
            continue
        tell(what="import", name=name, version=version(name), seconds=round(time.perf_counter() - started, 2))
    tell(what="optional", **{name: version(name) if importlib.util.find_spec(name) else None for name in OPTIONAL})
    return failed


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return None


def milliseconds(call: Callable[[], object], rounds: int = 10) -> float:
    """Median, after three to warm up."""
    times = []
    for number in range(3 + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def products() -> bool:
    """bf16 x bf16 to fp32, and the same added to fp32 in place, as engine.py asks for them; against fp64."""
    a, b = (torch.randn(512, 512, device="cuda").bfloat16() for _ in range(2))
    start, right = torch.randn(512, 512, device="cuda"), a.double() @ b.double()
    calls = {
        "mm": (lambda: torch.mm(a, b, out_dtype=torch.float32), right),
        "addmm": (lambda: torch.addmm(start, a, b, out_dtype=torch.float32), right + start),
        "addmm out=self": (lambda: _added(start.clone(), a, b), right + start),
    }
    good = True
    for name, (call, expected) in calls.items():
        try:
            error = float((call().double() - expected).norm() / expected.norm())
            good &= error < 1e-5
            tell(what="product", name=name, error=error)
        except Exception as error:
            good = False
            tell(what="product", name=name, error=f"{type(error).__name__}: {error}"[:300])
    return good


def _added(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def ceilings() -> None:
    x = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    y = torch.empty_like(x)
    tell(what="copy", tb_per_s=2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9)
    for m, k, n in ((8192, 8192, 8192), (8192, 4096, 128256)):  # the second is the head's
        a, b = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        taken = milliseconds(partial(torch.mm, a, b.t(), out=out))
        tell(what="gemm", shape=[m, k, n], tflop_per_s=2 * m * k * n / taken / 1e9)


def main(dry: bool) -> int:
    tell(what="torch", version=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0],
         devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
    good = True
    if not dry:
        found = torch.cuda.get_device_properties(0)
        tell(what="device", capability=f"{found.major}.{found.minor}", bytes=found.total_memory,
             multiprocessors=found.multi_processor_count, l2=getattr(found, "L2_cache_size", None))
        good = products()
        ceilings()
    return int(bool(imports()) or not good)


if __name__ == "__main__":
    sys.exit(main("--dry" in sys.argv[1:]))
