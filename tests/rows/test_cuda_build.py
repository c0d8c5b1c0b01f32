"""The CUDA rows as far as no GPU is needed: their algorithms run on emulated thread blocks against fp64 mathematics,
and the machine code that nvcc made has no spills and touches memory 16 bytes at a time."""

from __future__ import annotations

import functools
import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import test_rows
import torch
from cuda_checks import *  # noqa: F403
from row_checks import BF16, FP16, FP32, random_case

from fastpref import _native
from fastpref.rows import FoldState, Tile, availability, cuda

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cuda_build = pytest.mark.skipif(not _native.with_cuda, reason="fastpref._native was built without CUDA")


# ---- the algorithms, on emulated thread blocks


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    if NVCC is None:
        pytest.skip("needs nvcc, for the CUDA headers")
    import pybind11

    built = tmp_path_factory.mktemp("emulated") / f"emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # For a .cpp file nvcc only calls the host compiler. Fortified longjmp refuses to change stacks.
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-U_FORTIFY_SOURCE,-Wno-unknown-pragmas"
    flags = ["-std=c++17", "-O1", "-shared", host]
    folders = [pybind11.get_include(), sysconfig.get_path("include")]
    command = [NVCC, *flags, *(f"-I{folder}" for folder in folders), HERE / "emulated_cuda.cpp", "-o", built]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location("emulated_cuda", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(emulator, monkeypatch):
    monkeypatch.setattr(cuda._rows, "kernels", emulator)
    monkeypatch.setattr(cuda._rows, "device", "cpu")
    monkeypatch.setattr(cuda._rows, "where", lambda tensor: (0, 0))
    cuda._cluster_size.cache_clear()
    yield cuda
    emulator.set_ranks(2)
    cuda._cluster_size.cache_clear()


@pytest.fixture(params=["block", "cluster"])
def rows(request, kernels):
    if request.param == "cluster" and re.search("slices|mass", request.node.name):
        pytest.skip("there is one sweep of a slice")
    residual = functools.partial(cuda.residual, cluster=request.param == "cluster")
    slices = {name: getattr(cuda, name) for name in ("fold", "residual_given_lse", "gradient_given_lse")}
    return SimpleNamespace(residual=residual, **slices)


# The whole contract.
globals().update({name: test for name, test in vars(test_rows).items() if name.startswith("test_")})


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_clusters_of_every_size(kernels, emulator, ranks):
    logits, targets, _ = random_case(2, 13001)
    logits[1] = torch.nan
    targets[1] = -100
    outs = [torch.full((2, 13001), 7.0, dtype=FP16) for _ in range(2)]
    emulator.set_ranks(2)
    want = kernels.residual(Tile(logits, targets), outs[0], cluster=True)
    emulator.set_ranks(ranks)
    got = kernels.residual(Tile(logits, targets), outs[1], cluster=True)
    assert torch.equal(got.logp, want.logp) and torch.equal(*outs)
    assert bool((outs[1][1] == 0).all()) and got.logp[1] == got.scale[1] == 0


def test_fp16_takes_the_cluster_where_there_is_one(kernels, emulator):
    logits, targets, _ = random_case(2, 300)

    def scale(dtype):
        return kernels.residual(Tile(logits, targets), torch.empty(2, 300, dtype=dtype)).scale

    assert scale(FP16).tolist() == [-(2.0**-15)] * 2  # normalised
    assert scale(BF16).tolist() == scale(FP32).tolist() != [-1.0] * 2
    emulator.set_ranks(0)
    cuda._cluster_size.cache_clear()
    assert scale(FP16)[0] != -(2.0**-15)


def test_bad_input_is_named(kernels, monkeypatch):
    logits, targets, _ = random_case(4, 64)
    state = FoldState.new(4, dtype=FP32, device=logits.device)

    def residual(logits=logits, targets=targets, out=None, bias=None, extras=()):
        kernels.residual(Tile(logits, targets, bias=bias), out, extras)

    for error, match, call in (
        (ValueError, r"logits is \[64\]", lambda: residual(logits[0])),
        (TypeError, "logits is torch.float64", lambda: residual(logits.double())),
        (ValueError, "contiguous columns", lambda: residual(logits[:, ::2])),
        (ValueError, "logits is on meta", lambda: residual(logits.to("meta"))),
        (ValueError, r"targets is \[3\]", lambda: residual(targets=targets[:3])),
        (TypeError, "targets is torch.int32", lambda: residual(targets=targets.int())),
        (ValueError, r"bias is \[63\]", lambda: residual(bias=logits[0, 1:])),
        (ValueError, r"out is \[4, 32\]", lambda: residual(out=logits[:, :32])),
        (TypeError, "out is torch.int32", lambda: residual(out=logits.int())),
        (ValueError, "out is on meta", lambda: residual(out=torch.empty(4, 64, device="meta"))),
        (ValueError, "out overlaps logits", lambda: residual(logits[:3], targets[:3], logits[1:])),
        (ValueError, "out overlaps logits", lambda: residual(out=logits.view(BF16)[:, 64:])),
        (ValueError, "extras has", lambda: residual(extras=("entropy", "perplexity"))),
        (
            ValueError,
            "state.sum_exp is",
            lambda: kernels.fold(Tile(logits, targets), state._replace(sum_exp=targets[:3].float())),
        ),
    ):
        with pytest.raises(error, match=match):
            call()
    monkeypatch.setattr(cuda._rows, "device", "cuda")
    with pytest.raises(ValueError, match="logits is on cpu; it takes cuda"):
        residual()


# ---- without a GPU


def test_available_says_why_not(monkeypatch):
    monkeypatch.setattr(cuda._rows, "kernels", None)
    monkeypatch.setattr(cuda, "_why_not", "built without CUDA")
    assert availability("cuda").why == "built without CUDA"

    def no_driver():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    monkeypatch.setattr(cuda._rows, "kernels", SimpleNamespace(devices=no_driver))
    assert cuda.available() == (False, "cudaErrorNoDevice: no CUDA-capable device is detected")
    monkeypatch.setattr(cuda._rows, "kernels", SimpleNamespace(devices=lambda: [75, 90]))
    assert cuda.available()[1].endswith("has no CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    works, old, new = (cuda.available(device) for device in (None, *map(torch.device, ("cuda:0", "cuda:1"))))
    assert works == (True, "CUDA C++, compute capability 7.5, 9.0") and new[0]
    assert old == (False, "it needs compute capability 8.0 or newer, and the device has 7.5")


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_a_clean_error():
    logits, targets, _ = random_case(2, 64)
    tile = _native.Tile(logits.data_ptr(), "float32", 64, 2, 64, targets.data_ptr(), -100, 0, 0, 1.0, 0.0, 1.0)
    stats = _native.Stats(*(logits.data_ptr(),) * 2, 0, 0, 0, 0, 0)
    out = _native.Out(logits.data_ptr(), "float32", 64)
    state, given = _native.FoldState(*(logits.data_ptr(),) * 3), _native.Given(*(logits.data_ptr(),) * 4)
    for call in (
        lambda: _native.cuda.cluster_size(tile, 0),
        lambda: _native.cuda.residual(tile, out, stats, False, 0, 0),
        lambda: _native.cuda.residual(tile, out, stats, True, 0, 0),
        lambda: _native.cuda.fold(tile, state, 0, 0),
        lambda: _native.cuda.residual_given_lse(tile, given, out, 0, 0),
        lambda: _native.cuda.gradient_given_lse(tile, given, out, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="fastpref CUDA rows, .*: cudaError"):
            call()
    available, why = cuda.available()
    assert not available and re.search("there is no NVIDIA driver|cudaErrorNoDevice", why)


# ---- the machine code


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    local: int


def cuobjdump() -> str:
    """CUDA's own, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        carried = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    return found or pytest.skip("no cuobjdump: neither CUDA's nor Triton's")


@functools.cache
def dump(what: str, binary: Path) -> str:
    done = subprocess.run([cuobjdump(), what, str(binary)], capture_output=True, text=True, check=True)
    return subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    name = re.sub(r"\(fastpref::cuda::Map\)|fastpref::cuda::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\(.*", "", name).strip().replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def per_kernel(text: str, pattern: str) -> list[tuple[str, str, str]]:
    """(architecture, kernel, what follows up to the next kernel)."""
    arch, found = "", []
    for piece in re.split(r"(?m)^(?=arch = |.*Function\s*:?\s)", text):
        if match := re.match(r"arch = (\S+)", piece):
            arch = match[1]
        elif match := re.match(pattern, piece):
            found.append((arch, short(match[1]), piece))
    return found


def usage_of(binary: Path) -> dict[tuple[str, str], Usage]:
    kernels = {}
    for arch, name, text in per_kernel(dump("-res-usage", binary), r"\s*Function (.*):\n"):
        numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
        kernels[arch, name] = Usage(*(int(numbers[key]) for key in ("REG", "STACK", "SHARED", "LOCAL")))
    return kernels


def accesses_of(binary: Path) -> dict[tuple[str, str], list[str]]:
    return {
        (arch, name): re.findall(r"\b(?:LDG|STG|LDL|STL|LDGSTS|LD|ST)\.[A-Z0-9.]+", text)
        for arch, name, text in per_kernel(dump("-sass", binary), r"\s*Function : (.*)\n")
    }


SWEEPS = [
    *(f"residual_kernel<{t}, {u}, {m}, false>" for m in (0, 1) for t, u in (
        ("float", "None"), ("float", "float"), ("float", "bf16"), ("float", "f16"),
        ("bf16", "None"), ("bf16", "bf16"), ("f16", "None"), ("f16", "f16"),
    )),
    *(f"{kernel.format(t)}" for t in ("float", "bf16", "f16") for kernel in (
        "residual_kernel<{}, Any, 2, true>", "fold_kernel<{}>", "given_lse_kernel<{}, false>",
        "given_lse_kernel<{}, true>",
        "cluster_kernel<{}, false>", "cluster_kernel<{}, true>",
    )),
]


def check_machine_code(binary: Path) -> None:
    usage, accesses = usage_of(binary), accesses_of(binary)
    architectures = {arch for arch, _ in usage}
    assert architectures
    for arch in sorted(architectures):
        for kernel in sorted(name for a, name in usage if a == arch):
            print(arch, kernel, usage[arch, kernel])
        assert {name for a, name in usage if a == arch} >= {*SWEEPS}
        for kernel in SWEEPS:
            if kernel.startswith("cluster") and arch == "sm_80":
                continue  # an empty kernel: clusters begin with sm_90
            used, touched = usage[arch, kernel], accesses[arch, kernel]
            assert used.stack == used.local == 0, f"{arch} {kernel} spills: {used}"
            assert not {"LDL", "STL"} & {access.split(".")[0] for access in touched}, (arch, kernel)
            limit = 64 if re.search(r"None|, 0, false|fold", kernel) else 128 if "Any" in kernel else 80
            assert used.registers <= limit, f"{arch} {kernel}: {used}, for the blocks that share an SM {limit} are left"
            wide = [access for access in touched if access.endswith(".128")]
            copies = [access for access in wide if access.startswith("LDGSTS")]
            loads = [access for access in wide if access.startswith(("LDG.", "LD."))]
            stores = [access for access in wide if access.startswith(("STG.", "ST."))]
            # 64 bytes a thread are asked for before the first are used.
            assert len(copies) >= 1 if kernel.startswith("cluster") else len(loads) >= 4, (arch, kernel, touched)
            assert stores or "None" in kernel or kernel.startswith("fold"), (arch, kernel)
            assert not any(".U8" in access for access in touched), (arch, kernel)


@needs_cuda_build
def test_the_extension_holds_no_spills_and_16_byte_accesses():
    check_machine_code(Path(_native.__file__))


def shortest_turn(sass: str, wanted: dict[str, int]) -> int:
    """Instructions of a loop's shortest way round that holds each pattern as often as wanted: no bias, aligned rows,
    neither the target nor a larger maximum in sight. Branches are followed both ways."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    branch = r"(@!?U?P\d )?BRA (?:U?!?U?P\d, )?(0x[0-9a-f]+)"
    jumps = {at: (int(m[2], 16), m[1] is None) for at, text in code if (m := re.match(branch, text))}
    starts = sorted({0, *(to for to, _ in jumps.values()), *(at + 16 for at in jumps)})
    blocks = {}  # address: (instructions, patterns found, where it goes on)
    for start, end in zip(starts, [*starts[1:], code[-1][0] + 16], strict=True):
        block = [(at, text) for at, text in code if start <= at < end]
        if block:
            last, text = block[-1]
            to, always = jumps.get(last, (None, bool(re.match("EXIT|RET", text))))
            found = tuple(sum(bool(re.search(pattern, text)) for _, text in block) for pattern in wanted)
            after = [place for place, there in ((to, to is not None), (end, not always)) if there]
            blocks[start] = len(block), found, after
    need = tuple(wanted.values())
    best = len(code)
    for head in {to for at, (to, _) in jumps.items() if to < at}:
        heap, seen = [(0, head, (0,) * len(need))], set()
        while heap and heap[0][0] < best:
            cost, at, got = heapq.heappop(heap)
            if cost and at == head:
                best = cost if got == need else best
            elif (at, got) not in seen and at in blocks:
                seen.add((at, got))
                count, found, after = blocks[at]
                more = tuple(min(a + b, limit) for a, b, limit in zip(got, found, need, strict=True))
                for to in after:
                    heapq.heappush(heap, (cost + count, to, more))
    assert best < len(code), "no such loop"
    return best


# kernel: logits that a thread takes a turn, exponentials a logit, and instructions a logit on the day they were
# counted (sm_90a, nvcc 13.0): they can only fall.
COUNTED = {
    "residual_kernel<float, bf16, 0, false>": (16, 1, 15.6),
    "residual_kernel<float, float, 0, false>": (16, 1, 13.2),
    "residual_kernel<bf16, bf16, 0, false>": (32, 1, 13.7),
    "residual_kernel<float, bf16, 1, false>": (16, 2, 35.9),
    "residual_kernel<float, None, 0, false>": (16, 1, 10.5),
    "given_lse_kernel<float, false>": (16, 1, 16.2),
}


@needs_cuda_build
def test_instructions_a_logit_only_fall():
    sass = {(arch, name): text for arch, name, text in per_kernel(
        dump("-sass", Path(_native.__file__)), r"\s*Function : (.*)\n")}
    if ("sm_90a", "fold_kernel<float>") not in sass:
        pytest.skip("built for other architectures")
    found = {}
    for kernel, (logits, exps, _) in COUNTED.items():
        dtypes = [*re.findall(r"float|bf16|None", kernel), "bf16"][:2]
        pieces = [logits * {"float": 4, "bf16": 2, "None": 0}[dtype] // 16 for dtype in dtypes]
        wanted = {"MUFU.EX2": logits * exps, r"\bLDG?\.E\.128": pieces[0], r"\bSTG?\.E\.128": pieces[1]}
        found[kernel] = shortest_turn(sass["sm_90a", kernel], wanted) / logits
    print(found)
    assert all(found[kernel] <= most for kernel, (*_, most) in COUNTED.items()), found


@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(600)
def test_nvcc_compiles_every_kernel_without_spills(tmp_path):
    def compiled(job: tuple[Path, str]) -> str:
        source, arch = job
        generate = f"arch={arch.replace('sm', 'compute')},code={arch}"
        target = tmp_path / f"{source.stem}.{arch}.cubin"
        command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", "-gencode", generate, source, "-o", target]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    jobs = [(source, arch) for source in sorted(CSRC.glob("*.cu")) for arch in ARCHITECTURES]
    assert len(jobs) >= 9
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(compiled, jobs))
    for (source, arch), log in zip(jobs, logs, strict=True):
        print(source.name, arch, log, file=sys.stderr)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert frames, log
        assert set(frames) == {("0", "0", "0")}, log
        assert "warning" not in log.replace("ptxas info", ""), log
