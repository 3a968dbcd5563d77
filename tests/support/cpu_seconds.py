"""A pytest plugin that reports the CPU-seconds of each test file.

Processes that the tests started count as well. `outside` lists functions that return the
CPU-seconds of other processes that work for the tests, such as the fork server.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

import pytest

outside: list[Callable[[], float]] = []
STARTED = pytest.StashKey[float]()


def used() -> float:
    """Return the CPU-seconds of this process, of its children that have ended, and of `outside`."""
    return sum(os.times()[:4]) + sum(cpu_seconds() for cpu_seconds in outside)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[STARTED] = used()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    now = used()
    report.user_properties = [*report.user_properties, ("cpu_seconds", now - item.stash[STARTED])]
    item.stash[STARTED] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each file, the most expensive first."""
    cpu: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)
    tests: dict[str, int] = defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0]
                cpu[file] += float(dict(report.user_properties).get("cpu_seconds", 0))
                wall[file] += report.duration
                tests[file] += report.when == "call"
    terminalreporter.section(f"{sum(cpu.values()):.0f} CPU-seconds")
    for file, seconds in sorted(cpu.items(), key=lambda row: -row[1]):
        if seconds >= 1:
            terminalreporter.write_line(
                f"{seconds:8.1f} CPU-s {wall[file]:8.1f} s {tests[file]:4d} tests  {file}"
            )
