"""The Triton rows on the CPU, under Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated, and an interpreted kernel cannot be compiled, so the checks
run in a process of their own: this file starts pytest on itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
if triton.__version__ < "3.7" and numpy.__version__ >= "2.4":
    pytest.skip("the interpreter of triton 3.6 breaks on run-time loop bounds with numpy 2.4", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_checks import *  # noqa: F403
    from triton_checks import Platform

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the NaN and inf given on purpose

    @pytest.fixture
    def platform() -> Platform:
        return Platform("cpu", bf16_rounding=2.0**-7)  # the interpreter truncates where a GPU rounds

else:

    def test_the_checks_pass_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=280
        )
        print(run.stdout)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
