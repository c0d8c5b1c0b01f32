"""The extension as built: what it links, that it needs no driver, and that every way of installing makes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from fastpref import _native

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd on this system")
def test_it_links_neither_torch_nor_a_driver_nor_an_openmp():
    libraries = run("ldd", _native.__file__)
    assert "libstdc++" in libraries or "libc++" in libraries
    for name in ("torch", "libc10", "libcuda", "libcudart", "libgomp", "libomp", "libiomp", "not found"):
        assert name not in libraries, libraries


def test_importing_it_takes_nothing_with_it():
    program = (
        "import importlib.util as u, sys;"
        f"s = u.spec_from_file_location('_native', {_native.__file__!r}); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); assert m.isas();"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else '';"
        "assert not any(x in maps for x in ('libcuda', 'libtorch', 'libgomp'));"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    run(sys.executable, "-c", program, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def sources(to: Path) -> Path:
    """What a fresh clone has of the build: no build folder, no built extension."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "constraints.txt", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    for name in ("csrc", "fastpref"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path / "l"],
        cwd=sources(tmp_path),
        env={key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "C++17 compiler" in done.stderr.splitlines()[-1] and "apt-get install g++" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "l").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_way_of_installing(tmp_path):
    """Wheel, sdist -> wheel, editable: isolated and not. torch and the rest are taken from this environment."""
    code, builder = tmp_path / "code", tmp_path / "venv"
    code.mkdir()
    sources(code)
    venv.create(builder, with_pip=True)
    python = builder / "bin" / "python"
    environment = os.environ | {"FASTPREF_CUDA": "OFF", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)

    def pip(*words: object) -> str:
        return run(python, "-m", "pip", *words, env=environment, cwd=tmp_path)

    def where() -> str:
        # Importing fastpref imports torch, which the new environment borrows from this one.
        borrow = f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r})"
        program = f"{borrow}; from fastpref import _native; assert _native.isas(); print(_native.__file__)"
        return run(python, "-c", program, env=environment, cwd=tmp_path)

    # isolated: cmake, ninja and pybind11 come as build requirements
    pip("wheel", "--no-deps", "-w", tmp_path / "wheels", code)
    (wheel,) = (tmp_path / "wheels").glob("fastpref-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("fastpref/_native") and name.endswith(".so") for name in names) == 1
    assert "fastpref/rows/native.py" in names
    templates = {f"fastpref/report/templates/{path.name}" for path in (ROOT / "fastpref/report/templates").iterdir()}
    assert len(templates) >= 8 and templates <= set(names)
    assert not any(name.startswith(("csrc", "tests", "build")) for name in names)
    pip("install", "--no-deps", wheel)
    assert str(builder) in where()
    pip("uninstall", "-y", "fastpref")

    pip("install", "--no-deps", "-e", code)  # the build folder of the isolated wheel, whose cmake is gone, lies there
    assert str(code) in where()
    pip("uninstall", "-y", "fastpref")

    pip("install", "setuptools>=77", "pybind11>=2.13", "cmake>=3.25", "ninja", "build", "wheel")
    pip("install", "--no-deps", "--no-build-isolation", "-e", code)
    assert str(code) in where()
    pip("uninstall", "-y", "fastpref")

    run(python, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", code, env=environment)  # sdist -> wheel
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    packed = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {"CMakeLists.txt", "csrc/module.cpp", "csrc/rows.h", "csrc/cpu/rows.cpp", "csrc/cpu/vec.h"} <= packed
    assert templates <= packed
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    pip("install", "--no-deps", wheel)
    assert str(builder) in where()
