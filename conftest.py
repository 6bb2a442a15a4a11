"""Notebooks that are tested by several workers of pytest-xdist: each worker has a folder of its own for their runs."""

from __future__ import annotations

import os


def pytest_configure() -> None:
    """Two notebooks at a time would want to collect into one store, which is locked."""
    runs, worker = os.environ.get("AGD_LIB_RUNS"), os.environ.get("PYTEST_XDIST_WORKER")
    if runs and worker and not runs.endswith(worker):
        os.environ["AGD_LIB_RUNS"] = os.path.join(runs, worker)
