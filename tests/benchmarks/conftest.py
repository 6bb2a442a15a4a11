"""Prints what the benchmarks measured as tables: AGD beside CFG with the limit that the FLOPs allow, and the store.

With ``--benchmark-json`` it is kept too, in the form that :mod:`agd_lib.pages` reads.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest
import torch

ROWS = pytest.StashKey[list[dict[str, str]]]()
STORE_ROWS = pytest.StashKey[list[dict[str, str]]]()


@pytest.fixture
def comparisons(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Rows of the table at the end."""
    return request.config.stash.setdefault(ROWS, [])


@pytest.fixture
def store_comparisons(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Rows of the second table, see :func:`in_turn.compare`."""
    return request.config.stash.setdefault(STORE_ROWS, [])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    agd_rows, store_rows = (terminalreporter.config.stash.get(key, []) for key in (ROWS, STORE_ROWS))
    if store_rows:
        terminalreporter.section("collection, reading and training, in turn in one process")
        _print_table(terminalreporter, store_rows, list(store_rows[0]))
        terminalreporter.write_line("medians over rounds")
    if not agd_rows:
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
        "CFG/unguided",
        "limit 2/(1+overhead)",
        "FLOP overhead",
    ]
    _print_table(terminalreporter, agd_rows, columns)
    terminalreporter.write_line(
        "of one sampler step, on average over a run; medians over rounds; ratio = CFG / AGD, median over rounds, and of the fastest rounds"
    )


def _print_table(reporter: pytest.TerminalReporter, rows: list[dict[str, str]], columns: list[str]) -> None:
    table = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        reporter.write_line("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Nobody's machine by name; its PyTorch beside its processor."""
    del machine_info["node"]
    machine_info["torch"] = torch.__version__


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """The command; of the processor its name and cores alone."""
    output_json["command"] = "python -m pytest " + shlex.join(sys.argv[1:])
    cpu = output_json["machine_info"]["cpu"]
    output_json["machine_info"]["cpu"] = {
        "brand_raw": cpu.get("brand_raw", "an unknown processor"),
        "count": cpu["count"],
    }
