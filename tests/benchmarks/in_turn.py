"""Two ways to do the same work, timed in turn, so that a change of the machine's speed hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Rows = list[dict[str, str]]


def compare(
    benchmark: Any, rows: Rows, what: str, unit: str, count: int, ours: Callable[[], Any], other: Callable[[], Any]
) -> None:
    """Benchmark ``ours``, with ``other`` timed before each round; both do ``count`` units."""
    seconds: dict[str, list[float]] = {"ours": [], "other": []}

    def timed(name: str, function: Callable[[], Any]) -> None:
        start = time.perf_counter()
        function()
        seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(lambda: timed("ours", ours), setup=lambda: timed("other", other), rounds=5, warmup_rounds=1)
    mine, theirs = (count / statistics.median(seconds[name][1:]) for name in ("ours", "other"))
    benchmark.extra_info.update(what=what, unit=unit, per_second=mine, other_per_second=theirs, ratio=mine / theirs)
    rows.append(
        {
            "what": what,
            "unit": unit,
            "the plain way": f"{theirs:,.0f}",
            "ours": f"{mine:,.0f}",
            "ratio": f"{mine / theirs:.1f}",
        }
    )
