"""A pytest plugin: what became of each test, in a JSON file that grows while the tests run (python -m bench gpu)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.machine import describe, write

SECONDS_BETWEEN = 2  # two writings of the file


class Results:
    """Counts of outcomes, the failures with their last lines, and the longest tests."""

    def __init__(self, path: Path):
        self.path, self.machine = path, describe()
        self.counts: dict[str, int] = {}
        self.failures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.started = self.written = time.monotonic()
        self.finished = False

    def pytest_runtest_logreport(self, report) -> None:
        """Count a test by its call, or by the part of it that did not pass."""
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext.splitlines()[-12:]
        if report.when == "call":
            self.seconds[report.nodeid] = round(report.duration, 1)
        if time.monotonic() - self.written > SECONDS_BETWEEN:
            self.write()

    def pytest_sessionfinish(self) -> None:
        """All tests have run."""
        self.finished = True
        self.write()

    def write(self) -> None:
        """The file as far as the tests have come."""
        self.written = time.monotonic()
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:10]
        write(self.path, {
            "machine": self.machine, "finished": self.finished, "seconds": round(self.written - self.started, 1),
            "counts": self.counts, "failures": self.failures, "longest": dict(longest),
        })  # fmt: skip


def pytest_addoption(parser) -> None:
    """--results FILE."""
    parser.addoption("--results", type=Path, required=True)


def pytest_configure(config) -> None:
    """Under pytest-xdist the processes report to the first one, which alone writes."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Results(config.getoption("--results")))
