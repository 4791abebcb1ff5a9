"""A pytest plugin: every test that fails is a line of a file at once, for runs that are ended before they report.

python -m pytest -p pytest_failures --failures=FILE ...       with this folder in PYTHONPATH
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that names the file."""
    parser.addoption("--failures", type=Path, help="file that a JSON line of every failed test is appended to")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that reports writes: with xdist not the workers."""
    path = config.getoption("failures")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Writer(path))


class Writer:
    """Appends to the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for a failure in any phase of a test."""
        if report.failed:
            line = {"test": report.nodeid, "phase": report.when, "message": report.longreprtext[-3000:]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
