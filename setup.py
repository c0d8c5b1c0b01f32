"""Builds `fastpref._native` with CMake; everything else about the package is in pyproject.toml.

Environment: FASTPREF_CUDA=AUTO|ON|OFF (CUDA row kernels, see CMakeLists.txt), CXX, CUDACXX, CUDAARCHS, CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            raise ExecError(
                f"fastpref needs a C++17 compiler to build its kernels ({', '.join(compilers)} not found): "
                "apt-get install g++"
            )
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not (cmake and ninja):
            raise ExecError("fastpref needs cmake and ninja to build its kernels: pip install cmake ninja")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not self.build_temp, which is another folder for each editable install: what is compiled stays compiled.
        build = ROOT / "build" / f"native-{get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # Given each time: in an isolated build they lie in a folder that is gone when the next one reads the cache.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DFASTPREF_CUDA={os.environ.get('FASTPREF_CUDA') or 'AUTO'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, [cmake, "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise ExecError(f"fastpref: {shlex.join(command[:4])} failed, see above") from error
        if not target.exists():
            raise ExecError(f"fastpref: CMake did not make {target.name}: is {sys.executable} the Python it found?")


setup(ext_modules=[Extension("fastpref._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
