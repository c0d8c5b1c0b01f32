"""docs/migrating.md lists what the drop-ins refuse as the code says it; no refusal in the code is without a line."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from fastpref.integrations import liger, liger_grpo  # noqa: E402
from fastpref.integrations.trl import options  # noqa: E402

spec = importlib.util.spec_from_file_location("refusals", Path(__file__).parents[2] / "docs" / "refusals.py")
refusals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refusals)


def refusing(module):
    """Where a module raises, or calls what does, as (file, first line, last line)."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_refuse"
        if calls or (isinstance(node, ast.Raise) and "AttributeError" not in ast.unparse(node)):
            yield module.__file__, node.lineno, node.end_lineno


def test_the_page_has_every_refusal():
    seen = set()

    def note(error):
        trace = error.__traceback__
        while trace is not None:
            seen.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next

    for line in refusals.TRL + refusals.LIGER + refusals.CALLS:
        refusals.answer(line, refusals.names(), note)
    missing = [(file, first) for module in (options, liger, liger_grpo) for file, first, last in refusing(module)
               if not any((file, line) in seen for line in range(first, last + 1))]
    assert not missing
    page = refusals.PAGE.read_text(encoding="utf-8")
    assert page == refusals.written(page), "run: python docs/refusals.py"
