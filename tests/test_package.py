"""What is handed out: the source distribution is whole, and the wheel works where there is nothing else of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import fastpref

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "MANIFEST.in",
    "Makefile", "README.md", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py",
)
FOLDERS_IN_SDIST = ("bench", "csrc", "docs", "examples", "fastpref", "tests")
NOT_CODE = {".pyc", ".pyo", ".so"}


def run(*command: object, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def files() -> set[str]:
    """Of the tree, what a source distribution has to hold."""
    found = set(IN_SDIST)
    for folder in FOLDERS_IN_SDIST:
        for path in (ROOT / folder).rglob("*"):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
            if path.is_file() and not hidden and path.suffix not in NOT_CODE:
                found.add(str(path.relative_to(ROOT)))
    return found


def tree(to: Path) -> Path:
    """A copy of the tree as it is handed out, without a build folder or a built extension."""
    for name in files():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def test_the_sdist_holds_what_is_needed_to_build_test_measure_and_read(tmp_path):
    code = tree(tmp_path / "code")
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=code)
    (archive,) = tmp_path.glob("fastpref-*.tar.gz")
    packed = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert not files() - packed
    assert not [name for name in packed if Path(name).suffix in NOT_CODE or "__pycache__" in name]


def test_versions_and_licences_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == fastpref.__version__
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Version 2.0" in (ROOT / "LICENSE").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{fastpref.__version__}]" in changelog


WORKFLOWS = ROOT / ".github" / "workflows"  # not in a source distribution


def test_extras_that_are_named_exist():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    places = [ROOT / name for name in ("README.md", "Dockerfile", "Makefile", "examples/colab.ipynb")]
    text = "".join(path.read_text(encoding="utf-8") for path in [*places, *WORKFLOWS.glob("*.yml")])
    named = re.findall(r"(?:fastpref|whl\)|'\.)\[([\w,]+)\]", text)
    assert len(named) >= 6 and {extra for extras in named for extra in extras.split(",")} <= known


def test_workflows_wheels_and_image_are_of_the_supported_versions():
    """They cannot run here: their Pythons are those of pyproject.toml, their torch that of constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c) for c in project["project"]["classifiers"])
    pythons = [match[1] for match in found if match]
    assert project["tool"]["cibuildwheel"]["build"].split() == [f"cp{python.replace('.', '')}-*" for python in pythons]
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f"ARG TORCH={pinned}-" in (ROOT / "Dockerfile").read_text()
    if not WORKFLOWS.exists():
        pytest.skip("a source distribution")
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS.glob("*.yml")}
    assert workflows["tests"]["jobs"]["pinned"]["strategy"]["matrix"]["python"] == pythons
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    steps = [step for workflow in workflows.values() for job in workflow["jobs"].values() for step in job["steps"]]
    assert {name for step in steps for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))} <= targets
    for script in re.findall(r"\{project\}/(\S+\.py)", project["tool"]["cibuildwheel"]["test-command"]):
        assert (ROOT / script).exists()


SMOKE = """
import torch
import fastpref as fp
from fastpref import rows

assert fp.__file__.startswith({site!r}), fp.__file__
state = rows.availability("native")
assert state.available, state.why
torch.manual_seed(0)
x = torch.randn(4, 6, 16, requires_grad=True)
w = torch.randn(50, 16, requires_grad=True)
y = torch.randint(0, 50, (4, 6))
y[:, :2] = -100
out = fp.linear_preference_loss(x, w, y, loss=fp.DPO(beta=0.5), ref_logps=torch.zeros(4), backend="native")
out.loss.backward()
logits = x.detach() @ w.detach().T
logps = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0].where(y >= 0, 0).sum(1)
torch.testing.assert_close(out.logps, logps)
expected = -torch.nn.functional.logsigmoid(0.5 * (logps[:2] - logps[2:])).mean()
torch.testing.assert_close(out.loss.detach(), expected)
assert x.grad.abs().sum() > 0 and w.grad.abs().sum() > 0
"""

@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path):
    """Built without CUDA, installed into an empty folder; torch and the rest are borrowed from this environment."""
    site, third_party = tmp_path / "site", Path(torch.__file__).parents[1]
    environment = os.environ | {"FASTPREF_CUDA": "OFF", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip"]
    code = tree(tmp_path / "code")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, code, env=environment, cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastpref-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in files() if name.startswith("fastpref/") and name.endswith((".py", ".pyi", "py.typed"))}
    assert not package - set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("fastpref/", "fastpref-"))]
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, env=environment, cwd=tmp_path)

    # -S: the environment's own .pth files would bring the editable install back
    start = f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({str(third_party)!r})"
    alone = [sys.executable, "-S", "-c"]
    run(*alone, f"{start}\n{SMOKE.format(site=str(site))}", env=environment, cwd=tmp_path)
    command = f"{start}; from fastpref.cli import main; sys.exit(main(sys.argv[1:]))"
    assert fastpref.__version__ in run(*alone, command, "--version", env=environment, cwd=tmp_path)
    options = ["--length", 64, "--hidden", 128, "--vocab", 1000]
    assert "GEMMs" in run(*alone, command, "plan", *options, env=environment, cwd=tmp_path)
