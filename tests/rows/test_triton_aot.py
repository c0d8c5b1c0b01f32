"""Every Triton kernel in every configuration the launcher can launch, compiled for sm_90 (sm_80 and sm_100 in the slow
tests): no register spills, and 16-byte accesses wherever a loop touches global memory. No GPU is needed."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from fastpref.rows import EXTRAS, FoldState, Tile, Transform, triton_rows

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HOPPER = ("sm_90",)
OTHERS = pytest.param(("sm_80", "sm_100"), marks=pytest.mark.slow)
VOCAB = 128256


class Launch(NamedTuple):
    kernel: Any
    args: tuple
    config: triton_rows.Config
    constants: dict[str, int]


def recorded(call: Callable[[], object]) -> Launch:
    """What a public function hands to Triton, instead of launching it."""
    launches: list[Launch] = []

    def record(kernel, programs, device, args, config, **constants):
        launches.append(Launch(kernel, args, config, constants))

    with mock.patch.object(triton_rows, "_launch", record):
        call()
    (launch,) = launches
    return launch


def matrix(width: int, dtype: torch.dtype, stride: int | None = None) -> torch.Tensor:
    return torch.empty(2, stride or width, dtype=dtype)[:, :width]


def tile(logits: torch.Tensor, bias: bool, col_offset: int = 0, **transform) -> Tile:
    values = torch.empty(logits.shape[1], dtype=BF16) if bias else None
    return Tile(logits, torch.empty(2, dtype=torch.int64), Transform(**transform), values, col_offset=col_offset)


def residual(
    width=VOCAB, dtype=FP32, out=BF16, stride=None, bias=False, extras=(), **transform
) -> Callable[[], object]:
    def call():
        logits = matrix(width, dtype, stride)
        to = None if out is None else logits if out == "in place" else matrix(width, out, stride)
        triton_rows.residual(tile(logits, bias, **transform), to, extras=extras)

    return call


def fold(width=VOCAB, dtype=FP32, stride=None, bias=False, **transform) -> Callable[[], object]:
    return lambda: triton_rows.fold(
        tile(matrix(width, dtype, stride), bias, 8192, **transform),
        FoldState.new(2, dtype=FP32, device=torch.device("cpu")),
    )


def given_lse(width=VOCAB, dtype=FP32, out=BF16, stride=None, bias=False, **transform) -> Callable[[], object]:
    return lambda: triton_rows.residual_given_lse(
        tile(matrix(width, dtype, stride), bias, 8192, **transform), torch.empty(2), matrix(width, out, stride)
    )


def gradient(width=VOCAB, dtype=FP32, out=BF16, stride=None, bias=False, **transform) -> Callable[[], object]:
    return lambda: triton_rows.gradient_given_lse(
        tile(matrix(width, dtype, stride), bias, 8192, **transform),
        *(torch.empty(2) for _ in range(4)), matrix(width, out, stride),
    )


def scale_rows(width, dtype, out) -> Callable[[], object]:
    return lambda: triton_rows.scale_rows_(matrix(width, dtype), torch.empty(2), matrix(width, out))


def scale_unless_one(size, dtype) -> Callable[[], object]:
    # On the meta device, as the largest takes 4 GiB.
    return lambda: triton_rows.scale_unless_one_(
        torch.empty(size, dtype=dtype, device="meta"), torch.empty((), device="meta")
    )


def peaks(dtype, width=VOCAB, stride=None) -> Callable[[], object]:
    return lambda: triton_rows.peaks(matrix(width, dtype, stride), torch.empty(2), *torch.empty(3, width))


def split(dtype, width=VOCAB, stride=None) -> Callable[[], object]:
    columns = torch.arange(8192, dtype=torch.int32)
    return lambda: triton_rows.split(matrix(width, dtype, stride), columns, matrix(8192, dtype), torch.empty(2))


def add_rows(dtype) -> Callable[[], object]:
    columns = torch.arange(2, dtype=torch.int32)
    return lambda: triton_rows.add_rows(torch.empty(4, 4096), matrix(4096, dtype), columns)


FULL = dict(bias=True, softcap=30.0, logit_scale=0.5)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def name(dtype) -> str:
        return str(dtype).removeprefix("torch.")

    # Layouts follow element sizes alone: fp16 need not repeat every pairing of bf16.
    for dtype, outs in ((FP32, (None, FP32, BF16, FP16)), (BF16, (None, FP32, BF16)), (FP16, (FP16,))):
        for out in outs:
            yield f"residual {name(dtype)} to {name(out)}", residual(dtype=dtype, out=out)
            if out is not None:
                yield f"given_lse {name(dtype)} to {name(out)}", given_lse(dtype=dtype, out=out)
                yield f"gradient {name(dtype)} to {name(out)}", gradient(dtype=dtype, out=out)
                yield f"scale_rows {name(dtype)} to {name(out)}", scale_rows(4096, dtype, out)
        yield f"fold {name(dtype)}", fold(dtype=dtype)
        yield f"scale_unless_one {name(dtype)}", scale_unless_one(VOCAB * 4096, dtype)
    for dtype in (FP32, BF16):
        yield f"residual {name(dtype)}, everything", residual(dtype=dtype, out="in place", extras=EXTRAS, **FULL)
        yield f"given_lse {name(dtype)}, everything", given_lse(dtype=dtype, out=dtype, **FULL)
        yield f"gradient {name(dtype)}, everything", gradient(dtype=dtype, out=dtype, **FULL)
        yield f"fold {name(dtype)}, everything", fold(dtype=dtype, **FULL)
    yield "residual, forward only, everything", residual(out=None, extras=EXTRAS, **FULL)
    yield "residual, bias", residual(bias=True)
    yield "residual, scaled", residual(temperature=0.7)
    yield "residual, softcap", residual(softcap=30.0)
    for extra in EXTRAS:
        yield f"residual, {extra}", residual(extras=(extra,))
    yield "residual, all extras", residual(extras=EXTRAS)
    for dtype, out in ((FP32, BF16), (FP32, "in place"), (BF16, "in place")):
        case = f"{name(dtype)} to {name(out)}"
        yield f"residual {case}, odd width", residual(width=VOCAB + 1, stride=VOCAB + 8, dtype=dtype, out=out)
        yield f"residual {case}, unaligned", residual(width=VOCAB, stride=VOCAB + 1, dtype=dtype, out=out)
    yield "residual, odd width, unaligned", residual(width=VOCAB + 1)
    yield "residual, odd width, unaligned, everything", residual(width=VOCAB + 1, extras=EXTRAS, **FULL)
    yield "residual, width 1", residual(width=1)
    yield "fold, odd width", fold(width=8193, stride=8200)
    yield "fold, unaligned", fold(width=8193)
    yield "given_lse, odd width", given_lse(width=8193, stride=8200)
    yield "given_lse, unaligned", given_lse(width=8193)
    yield "gradient, odd width", gradient(width=8193, stride=8200, **FULL)
    yield "gradient, unaligned", gradient(width=8193)
    for dtype in (FP32, BF16):
        for call in (peaks, split, add_rows):
            yield f"{call.__name__} {name(dtype)}", call(dtype)
    yield "peaks, unaligned", peaks(BF16, stride=VOCAB + 1)
    yield "split, unaligned", split(BF16, stride=VOCAB + 1)
    yield "scale_rows, unaligned", scale_rows(4099, BF16, BF16)
    yield "scale_unless_one, 2^31 elements", scale_unless_one(2**31 + 5, BF16)


VARIANTS = dict(variants())


def source(launch: Launch) -> Any:
    """Specialised as Triton does it at run time: None and 1 are constants, multiples of 16 are known to be such."""
    pointers = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16"}
    pointers |= {torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8"}
    constants = launch.constants | {"BLOCK": launch.config.block}
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[i] if i < len(launch.args) else constants[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(launch.kernel, signature, constexprs, attributes)


def loop_access_bits(ptx: str) -> list[int]:
    """The width of every global access that can run more than once: those in a block of code that can reach itself."""
    labels = re.split(r"^(\$L__BB\w+):", ptx[ptx.index(".entry") :], flags=re.M)
    blocks: list[tuple[str, list[str], bool]] = []  # instructions, branch targets, whether it falls through
    names: dict[str, int] = {}
    for label, body in zip(["entry", *labels[1::2]], labels[0::2], strict=True):
        names[label] = len(blocks)
        rest = body
        while match := re.search(r"^\s*(@!?%p\d+ )?(bra(?:\.uni)?\s+(\$L__BB\w+)|ret);", rest, flags=re.M):
            blocks.append((rest[: match.start()], [match[3]] if match[3] else [], match[1] is not None))
            rest = rest[match.end() :]
        blocks.append((rest, [], True))
    after = [
        [names[label] for label in to] + ([i + 1] if falls and i + 1 < len(blocks) else [])
        for i, (_, to, falls) in enumerate(blocks)
    ]

    def repeats(start: int) -> bool:
        seen, todo = set(), list(after[start])
        while todo:
            block = todo.pop()
            if block == start:
                return True
            if block not in seen:
                seen.add(block)
                todo += after[block]
        return False

    access = re.compile(r"\b(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
    return [
        int(match[1] or 1) * int(match[2])
        for i, (instructions, _, _) in enumerate(blocks)
        if repeats(i)
        for match in access.finditer(instructions)
    ]


def instructions_a_logit(sass: str, logits: int) -> float:
    """Of the loop with an exponential for each of the `logits` that a thread takes a turn, without inner loops."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    loops = {(first, last) for first, last in jumps if first < last}
    bodies = []
    for first, last in loops:
        inner = [(a, b) for a, b in loops if (a, b) != (first, last) and first <= a and b <= last]
        body = [text for at, text in code if first <= at <= last and not any(a <= at <= b for a, b in inner)]
        if sum("MUFU.EX2" in text for text in body) >= logits:
            bodies.append(len(body))
    return min(bodies) / logits


class Report(NamedTuple):
    registers: int
    stack: int  # bytes a thread: where ptxas spills to
    shared: int
    loop_bits: list[int]
    a_logit: float  # instructions, where COUNTED


# At most as many as there were on the day they were counted, sm_90: they can only fall.
COUNTED = {
    "residual float32 to bfloat16": 12.4,  # 17.7 with exp and comparisons of 64 bits
    "residual bfloat16 to bfloat16": 14.0,  # 19.5
    "residual, softcap": 27.5,  # 39.8
    "given_lse float32 to bfloat16": 7.8,  # 12.9
}


def compiled(variant: str, target: str) -> Report:
    launch = recorded(VARIANTS[variant])
    gpu = triton.backends.compiler.GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel = triton.compile(source(launch), target=gpu, options={"num_warps": launch.config.num_warps})
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([cuobjdump, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, a_logit = dump("-res-usage"), instructions_a_logit(dump("-sass"), 16) if variant in COUNTED else 0.0
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Report(registers, stack + local, kernel.metadata.shared, loop_access_bits(kernel.asm["ptx"]), a_logit)


@pytest.fixture(scope="module", params=[HOPPER, OTHERS], ids="+".join)
def reports(request) -> dict[tuple[str, str], Report]:
    jobs = [(variant, target) for variant in VARIANTS for target in request.param]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(compiled, *zip(*jobs, strict=True), chunksize=12), strict=True))


def test_the_variants_cover_every_kernel_and_configuration():
    seen = {(launch.kernel.__name__, launch.config) for launch in map(recorded, VARIANTS.values())}
    assert seen == {(kernel, config) for kernel, found in triton_rows.configs().items() for config in found}


def test_every_column_belongs_to_one_thread():
    # A smaller block would be held twice, and a second thread might read what the first one has stored in place.
    columns_a_lane = {triton_rows.ALIGNED: 8, triton_rows.UNALIGNED: 1}
    for found in triton_rows.configs().values():
        assert all(config.block >= columns_a_lane[config] * 64 * config.num_warps for config in found)


def test_nothing_spills(reports):
    targets = list(dict.fromkeys(target for _, target in reports))
    print(f"\n{'registers/stack bytes/shared bytes on':40} " + " ".join(f"{target:>12}" for target in targets))
    for variant in VARIANTS:
        found = [reports[variant, target] for target in targets]
        print(f"{variant:40} " + " ".join(f"{f'{r.registers}/{r.stack}/{r.shared}':>12}" for r in found))
    spilled = {job: report.stack for job, report in reports.items() if report.stack}
    assert not spilled


def test_loops_move_16_bytes_at_a_time(reports):
    for (variant, target), report in reports.items():
        if variant.startswith(("peaks", "split")):  # and scales, masks, and columns that lie apart
            assert 128 in report.loop_bits or "unaligned" in variant, (variant, target)
        elif recorded(VARIANTS[variant]).config == triton_rows.ALIGNED:
            assert report.loop_bits, (variant, target)
            assert set(report.loop_bits) == {128}, (variant, target)


@pytest.mark.parametrize("reports", [HOPPER], indirect=True, ids="+".join)
def test_eight_programs_of_the_main_sweep_share_a_hopper_multiprocessor(reports):
    # 64 registers x 128 threads x 8 = 65536: the arithmetic at the top of triton_rows.py.
    for variant in ("float32 to None", "float32 to float32", "float32 to bfloat16", "bfloat16 to bfloat16"):
        assert reports[f"residual {variant}", "sm_90"].registers <= 64, variant


@pytest.mark.parametrize("reports", [HOPPER], indirect=True, ids="+".join)
def test_instructions_a_logit_only_fall(reports):
    found = {variant: reports[variant, "sm_90"].a_logit for variant in COUNTED}
    print(found)
    assert all(0 < found[variant] <= COUNTED[variant] for variant in COUNTED), found


@pytest.mark.parametrize("target", ["gfx90a", "gfx942"])
def test_the_main_sweep_compiles_for_rocm(target):
    launch = recorded(VARIANTS["residual float32 to bfloat16"])
    gpu = triton.backends.compiler.GPUTarget("hip", target, 64)
    kernel = triton.compile(source(launch), target=gpu, options={"num_warps": launch.config.num_warps})
    assert re.findall(r"gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]) == ["0", "0"]


def test_the_module_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("fastpref.rows.without_triton", triton_rows.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    works, why = module.available()
    assert not works and "triton does not import" in why
    assert not module.supports(torch.device("cpu"), FP32)


def test_an_old_card_is_of_no_concern_to_another(monkeypatch):
    capability = {"cuda:0": (7, 5), "cuda:1": (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d: capability[f"cuda:{d}" if isinstance(d, int) else str(d)]
    )
    assert triton_rows.available()[0] and triton_rows.available(torch.device("cuda:1"))[0]
    works, why = triton_rows.available(torch.device("cuda:0"))
    assert not works and why == "it needs compute capability 8.0, and the device has 7.5"


def test_it_says_what_it_runs_on():
    works, why = triton_rows.available()
    assert works == torch.cuda.is_available()
    assert works or why == "there is no CUDA device"
    assert triton_rows.supports(torch.device("cuda"), BF16)
    assert not triton_rows.supports(torch.device("cuda"), torch.float64)
    assert not triton_rows.supports(torch.device("cpu"), FP32)
