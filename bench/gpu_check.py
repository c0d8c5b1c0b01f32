"""All that needs a GPU, in one call of less than ten minutes, the most telling first: `make gpu-check`.

    python -m bench.gpu_check               on a machine with an NVIDIA GPU
    python -m bench.gpu_check --dry         anywhere: the timetable, and every step as far as it goes without a GPU
    python -m bench.gpu_check --prepare     on a machine with a package index: what the other one lacks

It takes a CUDA PyTorch of Python 3.12 or so (torch, triton, transformers, pytest, pybind11, cmake, ninja, rich; nvcc)
and installs nothing into it. Wheels in build/gpu-wheels and a fastpref/_native*.so made there by --prepare (`make
gpu-wheels`) are used where they travel along.

    OUT                 where everything is written, as soon as it is known; default: bench/results
    FASTPREF_REVISION   where there is no .git: what --dry prints

A call goes on where an earlier one of the same revision and device ended, whose files lie in bench/results: cells that
were measured are not measured again, tests that passed are not run again, and the time goes to the benchmark of the
head. A step that is out of time is interrupted (SIGINT, so that it says where it was), then aborted, then killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .revision import ROOT, output_of, revision

TOTAL = 480  # seconds, of the ten minutes that a call may take
MOST_FILES, MOST_CARRIED = 8, 64 * 2**20
RESULTS = ROOT / "bench" / "results"
WHEELS, SITE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-site"
PACKAGES = ("trl", "liger-kernel", "torchao", "datasets", "dill", "multiprocess", "cut-cross-entropy", "unsloth-zoo")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PATIENCE = (4.0, 2.0)  # after SIGINT, after SIGABRT (PYTHONFAULTHANDLER then shows every thread)
SHOWN = 25  # last lines of a step
PYTEST = ("-m", "pytest", "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider")
SANITIZERS = ("memcheck", "racecheck")


class Step(NamedTuple):
    name: str
    cap: int  # seconds
    what: str
    commands: tuple[tuple[str, ...], ...]  # of Python, unless the first word is a path
    writes: str = ""  # beside the log and the list of steps
    dry: tuple[tuple[str, ...], ...] = ()
    again: bool = True  # also if an earlier call has done it


def timetable(out: Path, spare: int = 0) -> list[Step]:
    """In the order of what they tell. spare: seconds of steps that an earlier call has done; the head's."""
    bench = ("--device", "cuda", "--no-plots", "--output", str(out), "--seconds")
    head = 170 + spare
    workers = ("-n", "8") if find_spec("xdist") else ()
    tests = {
        "head": ("tests/test_head_gpu.py", "tests/test_attention.py", "tests/train/test_optim_gpu.py",
                 "tests/train/test_liger_kernels.py"),
        "triton rows": ("tests/rows/test_triton_gpu.py",),
        "cuda rows": ("tests/rows/test_cuda_gpu.py",),
    }

    def test(name: str, cap: int, what: str) -> Step:
        command = (*PYTEST, *workers, *tests[name])
        dry = (*PYTEST, "--collect-only", *tests[name])
        return Step(name, cap, what, (command,), dry=(dry,), again=False)

    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    return [
        Step("probe", 20, "imports, fp32 products of bf16, ceilings of copy and GEMM", (("-m", "bench.gpu_probe"),),
             dry=(("-m", "bench.gpu_probe", "--dry"),)),
        Step("build", 30, "the extension for this GPU, and carried wheels", tuple(build())),
        test("head", 60, "the head, attention and optimisers on the GPU, against fp64"),
        Step("bench head", head, "step, frozen, forward at N 8192 and 16384, H 4096, V 128256, then the rest",
             (("-m", "bench", "head", *bench, str(head - 20)),), "*-head.json",
             (("-m", "bench", "head", "--dry-run"),)),
        test("triton rows", 45, "every sweep of the Triton rows"),
        test("cuda rows", 45, "every sweep of the CUDA rows"),
        Step("bench train", 90, "one 8B training step within 80 GB, beside TRL on the same pairs",
             (("-m", "bench", "train", "--cell", "80gb", "--rounds", "1", *bench, "78"),), "*-train.json",
             (("-m", "bench", "train", "--dry-run", "--cell", "80gb", "--rounds", "1"),)),
        *(Step(tool, 10, "one CUDA kernel of each kind under compute-sanitizer",
               ((sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, "bench/gpu_kernels.py"),),
               dry=(("bench/gpu_kernels.py", "--dry"),), again=False)
          for tool in SANITIZERS),
    ]


# ---- build -----------------------------------------------------------------------------------------------------------


def sources() -> str:
    """A hash of what the extension is made of."""
    files = sorted((*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def carried() -> bool:
    """Whether an extension for this Python travelled along, of these sources."""
    stamp = WHEELS / f"{sys.implementation.cache_tag}.sources"
    there = list((ROOT / "fastpref").glob(f"_native*{sys.implementation.cache_tag}*.so"))
    return bool(there) and stamp.exists() and stamp.read_text() == sources()


def build() -> Iterator[tuple[str, ...]]:
    if wheels := sorted(map(str, WHEELS.glob("*.whl"))):
        yield ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir",
               "--upgrade", "--target", str(SITE), *wheels)
    if not carried():
        yield ("setup.py", "--quiet", "build_ext", "--inplace")
    yield ("-c", "import sys; from fastpref.rows import availability as a; found = [a(name) for name in "
           "('triton', 'cuda')]; print(*found, sep='\\n'); sys.exit(not all(one.available for one in found))")


def prepare() -> int:
    """Wheels for the Python that runs this, and the extension for Hopper, to travel in ignored folders."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation",
           "cp", "--python-version", python, *platforms, "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--dest", str(WHEELS), *PACKAGES], check=True)
    tools = WHEELS.parent / "gpu-tools"  # not in the way of what is installed
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(tools)]
    subprocess.run([*install, "setuptools", "wheel", "pybind11", "cmake", "ninja"], check=True)
    environment = os.environ | {
        "FASTPREF_CUDA": "ON", "CUDAARCHS": "90a-real", "PYTHONPATH": str(tools),
        "PATH": os.pathsep.join((str(tools / "bin"), os.environ["PATH"])),
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode == 0:
        (WHEELS / f"{sys.implementation.cache_tag}.sources").write_text(sources())
    else:
        print("the extension was not built (nvcc?): it will be there, in half a minute")
    carry = [WHEELS, *(ROOT / "fastpref").glob(f"_native*{sys.implementation.cache_tag}*.so")]
    size = sum(path.stat().st_size for one in carry for path in (one.glob("*") if one.is_dir() else [one]))
    listed = (output_of("git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard") or "").splitlines()
    tree = sum((ROOT / name).stat().st_size for name in listed if (ROOT / name).is_file())
    print(f"carry {' '.join(str(path.relative_to(ROOT)) for path in carry)}: {size / 2**20:.1f} MiB, with the tree "
          f"{(size + tree) / 2**20:.1f} of at most {MOST_CARRIED >> 20}")
    return int(size + tree > MOST_CARRIED)


# ---- running ---------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Exit code; None: out of time. Its output goes to the end of `log`."""
    words = command if os.path.isabs(command[0]) or command[0] == "compute-sanitizer" else (sys.executable, *command)
    with log.open("ab") as file:
        try:
            child = subprocess.Popen(
                words, stdout=file, stderr=file, cwd=ROOT, env=environment, preexec_fn=os.setpgrp
            )
        except OSError as error:
            file.write(f"{words[0]}: {error.strerror}\n".encode())
            return 127
        try:
            return child.wait(max(1.0, seconds - sum(PATIENCE)))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for ending, patience in zip((signal.SIGINT, signal.SIGABRT, signal.SIGKILL), (*PATIENCE, None)):
                if child.poll() is not None:
                    break
                os.killpg(child.pid, ending)
                try:
                    child.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
    return None


def surroundings() -> dict[str, str]:
    """Of every step. Its processes find carried wheels, say where they are when they die, and hold nothing back."""
    capability = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or "9.0"
    major, minor = capability.splitlines()[0].split(".")
    path = os.pathsep.join(filter(None, (str(SITE), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        "FASTPREF_CUDA": "ON", "CUDAARCHS": f"{major}{minor}{'a' if int(major) >= 9 else ''}-real", **os.environ,
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "FASTPREF_REVISION": revision(),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }


def done_before(device: str, code: str) -> set[str]:
    """Steps that an earlier call has done on such a device with this code."""
    found = set[str]()
    for path in (RESULTS / "gpu-check").glob("*.json"):
        said = json.loads(path.read_text())
        if (said["device"], said["revision"]) == (device, code):
            found |= {step["name"] for step in said["steps"] if step["status"] == "ok"}
    return found


def bring_along(out: Path, device: str, code: str) -> None:
    """Rows of this device and revision go on in `out`."""
    for path in [] if out.resolve() == RESULTS else RESULTS.glob("*.json"):
        rows = json.loads(path.read_text())
        if any((row["device"], row["revision"]) == (device, code) for row in rows):
            shutil.copy(path, out)


def check(device: str, seconds: float, out: Path) -> int:
    started, code = time.monotonic(), revision()
    (out / "gpu-check").mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}-{'-'.join(re.findall('[a-z0-9]+', device.lower()))}"
    log, report = (out / "gpu-check" / f"{name}.{kind}" for kind in ("log", "json"))
    log.touch()
    bring_along(out, device, code)
    before, environment = done_before(device, code), surroundings()
    spare = sum(step.cap for step in timetable(out) if not step.again and step.name in before)
    said: dict[str, Any] = {"device": device, "revision": code, "date": name[:10], "steps": []}
    for step in timetable(out, spare):
        left, begun, status = seconds - (time.monotonic() - started), time.monotonic(), "ok"
        if not step.again and step.name in before:
            status = "ok before"
        elif left < 10:
            status = "skipped: no time is left"
        else:
            with log.open("a") as file:
                print(f"== {step.name}: {step.what}", file=file)
            start = log.stat().st_size
            for command in step.commands:
                ended = run(command, min(step.cap, left) - (time.monotonic() - begun), log, environment)
                if ended != 0:
                    status = f"out of time after {step.cap} s" if ended is None else f"failed: exit code {ended}"
                    break
            with log.open("rb") as file:
                file.seek(start)
                lines = file.read().decode(errors="replace").splitlines()
            print(f"== {step.name}", *lines[-SHOWN // (3 if status == "ok" else 1) :], sep="\n")
        said["steps"].append({"name": step.name, "status": status, "seconds": round(time.monotonic() - begun, 1)})
        print(f"== {step.name}: {status}, {time.monotonic() - begun:.0f} of {step.cap} s", flush=True)
        report.write_text(json.dumps(said, indent=1) + "\n")
    for one in said["steps"]:
        print(f"{one['name']:12} {one['seconds']:6.1f} s  {one['status']}")
    print(f"gpu-check: {time.monotonic() - started:.0f} s; {log}")
    return int(any(one["status"].startswith("failed") for one in said["steps"]))


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def dry_run(out: Path, names: Sequence[str]) -> int:
    """Prints the timetable and walks the steps; 1 if one of them cannot work anywhere."""
    steps = timetable(out)
    written = {f"gpu-check/<date>-<device>.{kind}" for kind in ("log", "json")} | {step.writes for step in steps} - {""}
    for step in steps:
        print(f"{step.cap:4} s  {step.name:12} {step.what}{f'; writes {step.writes}' if step.writes else ''}")
    print(f"{sum(step.cap for step in steps):4} s  in all, of {TOTAL}; log and list of steps written after every step")
    print(f"{len(written)} files come back, of at most {MOST_FILES} and two folders deep: {', '.join(sorted(written))}")
    print(f"FASTPREF_REVISION={revision()} make gpu-check   # where there is no .git")
    print(f"the extension: {'carried' if carried() else 'built there'}; wheels: "
          f"{', '.join(sorted(path.name.split('-')[0] for path in WHEELS.glob('*.whl'))) or 'none (make gpu-wheels)'}")
    tools = {name: shutil.which(name) or "not here" for name in ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer")}
    print("tools: " + ", ".join(f"{name} {where}" for name, where in tools.items()))
    failed = []
    environment = surroundings()
    walks = _walks(steps, names)

    def walked(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)

    with ThreadPoolExecutor(2) as pool:
        for (words, using), found in zip(walks.items(), pool.map(walked, walks)):
            print(f"== {', '.join(using)}: python {' '.join(words)}", found.stdout.rstrip(), sep="\n")
            if found.returncode:
                print(*found.stderr.splitlines()[-SHOWN:], sep="\n", flush=True)
                failed += using
    print(f"gpu-check: failed: {', '.join(failed)}" if failed else "gpu-check: as far as a machine without a GPU goes")
    return int(bool(failed))


def _walks(steps: Sequence[Step], names: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """Commands, each with the steps that it is of: tests are collected at once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for step in steps:
        for words in step.dry if not names or step.name in names else ():
            found.setdefault(words, []).append(step.name)
    tests = {words: found.pop(words) for words in [*found] if "--collect-only" in words}
    files = [word for words in tests for word in words if word.startswith("tests/")]
    if tests:
        found[(*PYTEST, "--collect-only", "-qq", *files)] = [name for using in tests.values() for name in using]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="the timetable, and each step as far as it goes here")
    parser.add_argument("--prepare", action="store_true", help="wheels and an extension that travel to the GPU")
    parser.add_argument("--step", nargs="+", default=[], metavar="NAME", help="with --dry: walk only these")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"in all; default: {TOTAL}")
    options = parser.parse_args(arguments)
    out = Path(os.environ.get("OUT") or RESULTS)
    if options.prepare:
        return prepare()
    if options.dry:
        return dry_run(out, options.step)
    device = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if not device:
        print("gpu-check: nvidia-smi names no GPU here; make gpu-check DRY=1 goes as far as that", file=sys.stderr)
        return 2
    return check(device.splitlines()[0], options.seconds, out)


if __name__ == "__main__":
    sys.exit(main())
