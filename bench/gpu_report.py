"""pytest plugin of gpu_check.py: a failure's traceback is written when it happens. pytest keeps them for the end, which
a run that is out of time may not reach: xdist waits for its workers first."""

from __future__ import annotations

import os
from typing import Any

import pytest


class Writer:
    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid} failed\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # the terminal is configured before
def pytest_configure(config: Any) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers send their reports to the process that writes them
        config.pluginmanager.register(Writer(config.pluginmanager.get_plugin("terminalreporter")))
