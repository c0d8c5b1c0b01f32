"""`make gpu-check`: its timetable, what it leaves when it is cut short, and how far it goes where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import gpu_check, gpu_kernels, revision
from bench.gpu_check import Step

ABSENT = ("trl", "liger_kernel", "datasets", "torchao", "bitsandbytes", "flash_attn", "matplotlib", "tensorboard")
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in {absent} else find(name, *rest)
)
"""


def test_the_timetable(tmp_path):
    steps = gpu_check.timetable(tmp_path)
    assert [step.name for step in steps] == [
        "probe", "build", "head", "bench head", "triton rows", "cuda rows", "bench train", "memcheck", "racecheck",
    ]
    assert [step.cap for step in steps] == [20, 30, 60, 170, 45, 45, 90, 10, 10]
    assert sum(step.cap for step in steps) == gpu_check.TOTAL == 480
    for step in steps:
        for words in step.commands:
            if "--seconds" in words:  # it ends by itself, and has its results, before it is interrupted
                assert float(words[words.index("--seconds") + 1]) <= step.cap - sum(gpu_check.PATIENCE) - 5
                assert "--no-plots" in words and words[words.index("--output") + 1] == str(tmp_path)
            if "pytest" in words:
                assert "gpu and not slow" in words
    # In a second call the tests' time is the benchmark's.
    assert sum(step.cap for step in gpu_check.timetable(tmp_path, 150) if step.again) == 480 - 170 + 150


def test_dry_run_without_what_is_absent_there(tmp_path):
    """As a machine without a GPU sees it, and without the packages that the GPU's lacks: nothing imports them bare."""
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(absent=ABSENT))
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu-check", "DRY=1", f"PYTHON={sys.executable}"],
        capture_output=True, text=True, cwd=revision.ROOT,
        env=gpu_check.os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out")},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    out = done.stdout
    assert " 480 s  in all, of 480" in out and "4 files come back, of at most 8 and two folders deep" in out
    assert f"FASTPREF_REVISION={revision.revision()} make gpu-check" in out
    assert '"trl": null' in out and '"name": "fastpref.train.loop", "version"' in out and '"error"' not in out
    assert "tests/test_head_gpu.py: " in out and "tests/rows/test_cuda_gpu.py: " in out
    assert "1. dpo step, bf16, N 8192, H 4096, V 128256: fastpref triton" in out
    assert "checkpointing on: fastpref, " in out and "MISSING: torchao not installed" in out
    assert "gpu-check: as far as a machine without a GPU goes" in out
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "output_of", lambda *command: None)
    assert gpu_check.main([]) == 2
    assert "nvidia-smi names no GPU here; make gpu-check DRY=1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- a call


def python(code: str) -> tuple[str, ...]:
    return "-c", code


@pytest.fixture
def call(monkeypatch, tmp_path):
    """A call with other steps; what it leaves becomes what the next one finds."""
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "PATIENCE", (0.7, 0.7))
    monkeypatch.setenv("FASTPREF_REVISION", "abc")
    numbers = iter(range(9))

    def run(*steps, seconds=480.0, device="NVIDIA H100"):
        monkeypatch.setattr(gpu_check, "timetable", lambda out, spare=0: list(steps))
        out = tmp_path / f"out{next(numbers)}"
        code = gpu_check.check(device, seconds, out)
        (report,) = (out / "gpu-check").glob("*.json")
        return code, json.loads(report.read_text()), report.with_suffix(".log").read_text(), out

    return run


def test_a_step_out_of_time_says_where_it_was(call):
    sleeping = "def deep():\n    import time; time.sleep(60)\nprint('begun'); deep()"
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + sleeping
    code, said, log, _ = call(
        Step("good", 9, "", (python("print('fine')"),)),
        Step("sleeps", 3, "", (python(sleeping),)),
        Step("deaf", 3, "", (python(deaf), python("print('never')"))),
        Step("bad", 9, "", (python("raise SystemExit(3)"),)),
    )
    assert code == 1
    assert [step["status"] for step in said["steps"]] == [
        "ok", "out of time after 3 s", "out of time after 3 s", "failed: exit code 3",
    ]
    assert all(step["seconds"] < 4 for step in said["steps"])
    assert "fine" in log and "never" not in log
    assert "KeyboardInterrupt" in log and log.count("in deep") == 2  # the second from faulthandler
    assert "Fatal Python error: Aborted" in log


def test_results_are_there_after_every_step(call, capsys):
    seen = "import pathlib, sys; print(*(p.read_text() for p in pathlib.Path({!r}).glob('out*/gpu-check/*.json')))"
    folder = str(gpu_check.RESULTS.parent)
    _, said, log, _ = call(Step("one", 9, "", ()), Step("two", 9, "", (python(seen.format(folder)),)))
    assert '"name": "one",' in log and said["revision"] == "abc" and said["device"] == "NVIDIA H100"
    assert "two: ok, " in capsys.readouterr().out
    _, said, _, _ = call(Step("one", 9, "", ()), seconds=5)
    assert said["steps"][0]["status"] == "skipped: no time is left"


def test_a_second_call_goes_on(call, tmp_path):
    """Files of the first lie in bench/results: its rows go on in OUT, and its tests are not run again."""
    tests = Step("tests", 9, "", (python("print('tested')"),), again=False)
    fails = Step("fails", 9, "", (python("raise SystemExit(1)"),), again=False)
    bench = Step("bench", 20, "", (python("print('measured')"),))
    _, _, _, out = call(tests, fails, bench)
    out.rename(gpu_check.RESULTS)
    mine = [{"impl": "fastpref", "device": "NVIDIA H100", "cpu": "x", "revision": "abc"}]
    for name, rows in (("mine", mine), ("old", [{**mine[0], "revision": "b"}]), ("cpu", [{**mine[0], "device": "x"}])):
        (gpu_check.RESULTS / f"{name}.json").write_text(json.dumps(rows))
    _, said, log, out = call(tests, fails, bench)
    assert [step["status"] for step in said["steps"]] == ["ok before", "failed: exit code 1", "ok"]
    assert "tested" not in log and sorted(path.name for path in out.glob("*.json")) == ["mine.json"]
    _, said, _, _ = call(tests, device="NVIDIA H200")
    assert said["steps"][0]["status"] == "ok"


def test_spare_time_is_the_heads(monkeypatch, tmp_path):
    head = {spare: gpu_check.timetable(tmp_path, spare)[3] for spare in (0, 45)}
    assert head[45].cap == head[0].cap + 45 == 215
    assert head[45].commands[0][-1] == "195"


# ---------------------------------------------------------------------------------------------- what travels


def test_a_carried_extension_is_that_of_the_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path)
    assert not gpu_check.carried() and ("setup.py", "--quiet", "build_ext", "--inplace") in gpu_check.build()
    (tmp_path / f"{sys.implementation.cache_tag}.sources").write_text(gpu_check.sources())
    (tmp_path / "a-1-py3-none-any.whl").touch()
    assert gpu_check.carried()
    install, check = gpu_check.build()
    assert install[:3] == ("-m", "pip", "install") and install[-1].endswith("a-1-py3-none-any.whl")
    assert "availability" in check[1]
    monkeypatch.setattr(gpu_check, "sources", lambda: "changed")
    assert not gpu_check.carried()


def test_revision(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.delenv("FASTPREF_REVISION", raising=False)
    (tmp_path / "fastpref").mkdir()
    code = tmp_path / "fastpref" / "a.py"
    code.write_text("1")
    plain = revision.revision()
    assert plain.startswith("sources-") and len(plain) == 20
    code.write_text("2")
    assert revision.revision() != plain
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "code")
    first = revision.revision()
    assert len(first) == 12
    (tmp_path / "results.json").write_text("[]")
    git("add", ".")
    git("commit", "--quiet", "-m", "results")
    assert revision.revision() == first  # the code is what is measured
    code.write_text("3")
    assert revision.revision().startswith(first + "+")
    monkeypatch.setenv("FASTPREF_REVISION", "given")
    assert revision.revision() == "given"


# ---------------------------------------------------------------------------------------------- the sanitizer's kernels


class Host:
    """A driver whose device is the host."""

    def __init__(self):
        self.arrays = {}

    def to_device(self, array):
        self.arrays[array.ctypes.data] = array
        return array.ctypes.data

    def to_host(self, address, array):
        return self.arrays[address]


@pytest.mark.parametrize("wrong", [False, True])
def test_what_runs_under_the_sanitizer(monkeypatch, wrong):
    """The CPU's kernels in place of the GPU's: the same sweeps of the same tile against NumPy."""
    from fastpref import _native

    monkeypatch.setattr(gpu_kernels, "COLS", 301)
    clusters = []
    kernels = SimpleNamespace(
        residual=lambda tile, out, stats, cluster, device, stream: (
            clusters.append(cluster), _native.residual(tile, out, stats, 1)
        ),
        fold=lambda tile, state, device, stream: None if wrong else _native.fold(tile, state, 1),
    )
    found = gpu_kernels.sweeps(_native, kernels, Host())
    assert clusters == [False, True]
    assert [line.split(":")[0] for line in found] == (["fold"] if wrong else [])
    monkeypatch.setattr(Host, "to_host", lambda self, address, array: self.arrays[address] * 1.001)
    assert [line.split(":")[0] for line in gpu_kernels.sweeps(_native, kernels, Host())] == ["block", "cluster", "fold"]


def test_a_checkout_that_was_never_built_dries_through(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_kernels, "__file__", str(tmp_path / "bench" / "gpu_kernels.py"))
    assert gpu_kernels.main(dry=True) == 0 and gpu_kernels.main(dry=False) == 1
    assert "setup.py build_ext --inplace" in capsys.readouterr().out


def test_the_extension_is_found_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from bench import gpu_kernels as g; m = g.native(); print(m.isas()); "
         "sys.exit('torch' in sys.modules)"], capture_output=True, text=True, cwd=revision.ROOT,
    )
    assert done.returncode == 0 and "portable" in done.stdout, done.stderr[-2000:]
