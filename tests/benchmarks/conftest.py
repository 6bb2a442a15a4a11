"""Prints what the benchmarks measured as one table: AGD beside CFG, and the limit that the FLOPs allow."""

from __future__ import annotations

import pytest

ROWS = pytest.StashKey[list[dict[str, str]]]()


@pytest.fixture
def comparisons(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Rows of the table at the end."""
    return request.config.stash.setdefault(ROWS, [])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("AGD against CFG, in turn in one process")
    columns = [
        "model",
        "adapter",
        "batch",
        "CFG ms/image",
        "AGD ms/image",
        "ratio",
        "of fastest",
        "limit 2/(1+overhead)",
        "FLOP overhead",
    ]
    table = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        terminalreporter.write_line("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    terminalreporter.write_line(
        "of one sampler step, on average over a run; medians over rounds; ratio = CFG / AGD, of the medians and of the fastest rounds"
    )
