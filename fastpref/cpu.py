"""What this CPU is, by /proc/cpuinfo: its name, and in which dtypes it multiplies slower than in fp32."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch


def cpuinfo(text: str | None = None) -> dict[str, str]:
    """Fields of the last processor listed; none where the system has no such file."""
    if text is None:
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def cpu_name(of: Mapping[str, str] | None = None) -> str:
    """As the system calls it; of an x86 whether it has AMX, by which bf16 GEMMs differ six times."""
    of = cpuinfo() if of is None else of
    flags = of.get("flags", "").split()  # a field of x86 alone
    amx = f" ({'AMX' if 'amx_bf16' in flags else 'no AMX'})" if flags else ""
    return (of.get("model name") or platform.processor() or platform.machine()) + amx


def slow_dtypes(of: Mapping[str, str]) -> frozenset[torch.dtype]:
    """Those in which an x86 CPU multiplies slower than in fp32.

    256 x 576 x 8192, oneDNN 3.12, one thread of a Xeon without AMX, held to these instructions: fp32 16 ms; bf16 29
    with AVX512_BF16 (half the rate of a fp32 multiply-add on Intel's), 80 with AVX-512 alone, 190 with AVX2; fp16 16
    with AVX512_FP16, 190 to 750 without. An AMD EPYC with AVX512_BF16 takes a quarter of fp32's time in bf16, a Xeon
    with AMX a sixth.
    """
    flags = set(of.get("flags", "").split())
    bf16 = {"amx_bf16"} | ({"avx512_bf16"} if of.get("vendor_id") != "GenuineIntel" else set())
    fast = {torch.bfloat16: bf16, torch.float16: {"avx512_fp16", "amx_fp16"}}
    return frozenset(dtype for dtype, either in fast.items() if flags and not flags & either)


SLOW_DTYPES = slow_dtypes(cpuinfo())
