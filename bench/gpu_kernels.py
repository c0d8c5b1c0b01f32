"""CUDA row kernels under compute-sanitizer: each sweep once, on a tile whose rows and tails are not aligned.

    compute-sanitizer --tool memcheck python bench/gpu_kernels.py
    compute-sanitizer --tool racecheck python bench/gpu_kernels.py

Without torch, whose thousands of kernels take the sanitizer longer to load than ours take to run: memory comes from
the driver itself, log-probs are compared with NumPy in fp64. Exit code 1 where one is wrong.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLS, IGNORE = 5, 12_345, -100


class Driver:
    """Memory of the first device, through libcuda; the kernels' runtime shares its primary context."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed: CUresult {code}")

    def to_device(self, array: np.ndarray) -> int:
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        self("cuMemcpyHtoD_v2", address, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        return address.value

    def to_host(self, address: int, array: np.ndarray) -> np.ndarray:
        self("cuCtxSynchronize")
        self("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address),
             ctypes.c_size_t(array.nbytes))
        return array


def native() -> Any:
    """fastpref._native without fastpref, which imports torch."""
    folder = Path(__file__).resolve().parent.parent / "fastpref"
    for path in folder.glob(f"_native*{sys.implementation.cache_tag}*.so"):
        spec = importlib.util.spec_from_file_location("fastpref._native", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    tag = sys.implementation.cache_tag
    raise FileNotFoundError(f"{folder} has no _native for {tag}: python setup.py build_ext --inplace")


def sweeps(native: Any, kernels: Any, driver: Any, names: Iterable[str] = ("block", "cluster", "fold")) -> list[str]:
    """Runs each and returns those whose log-probs are off."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (ROWS, COLS)).astype(np.float32)
    targets = rng.integers(0, COLS, ROWS)
    targets[1] = IGNORE
    wide = logits.astype(np.float64)
    lse = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    scored = targets != IGNORE
    expected = np.where(scored, wide[np.arange(ROWS), np.where(scored, targets, 0)] - lse, 0.0)
    wrong = []
    for name in names:
        at = driver.to_device(logits.copy())
        tile = native.Tile(at, "float32", COLS, ROWS, COLS, driver.to_device(targets), IGNORE, 0, 0, 1.0, 0.0, 1.0)
        vectors = [driver.to_device(np.full(ROWS, start, np.float32)) for start in (-np.inf, 0.0, np.nan)]
        if name == "fold":
            kernels.fold(tile, native.FoldState(*vectors), 0, 0)
            top, total, target = (driver.to_host(address, np.empty(ROWS, np.float32)) for address in vectors)
            with np.errstate(divide="ignore"):  # an ignored row has none
                found = np.where(scored, target - top - np.log(total), 0.0)
        else:  # bf16 residuals over the rows of their own fp32 logits
            stats = native.Stats(*vectors, 0, 0, 0, 0)
            kernels.residual(tile, native.Out(at, "bfloat16", 2 * COLS), stats, name == "cluster", 0, 0)
            found = driver.to_host(vectors[0], np.empty(ROWS, np.float32))
        if not np.abs(found - expected).max() < 1e-4:
            wrong.append(f"{name}: log-probs {found.tolist()}, in fp64 {expected.tolist()}")
    return wrong


def main(dry: bool) -> int:
    try:
        module = native()
    except FileNotFoundError as error:
        print(error)
        return int(not dry)  # on a GPU machine the step before this one builds it
    if not module.with_cuda:
        print("fastpref._native was built without CUDA")
        return int(not dry)
    if dry:
        print("the CUDA rows are built; they are not launched")
        return 0
    wrong = sweeps(module, module.cuda, Driver())
    print("\n".join(wrong) or "block, cluster and fold sweeps: log-probs within 1e-4 of fp64")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main("--dry" in sys.argv[1:]))
