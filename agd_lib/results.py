"""Rows of results: their schema, their file (``results.json``), and the tables made of them.

A row is one measurement: (base, guidance, adapter, scale, seed). A table shows mean and spread over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import AGDError
from .storage import write_json


class ResultsError(AGDError):
    """A results file is missing, malformed, or does not keep to the schema."""


@dataclass(frozen=True)
class Row:
    """One measurement; None where a value does not apply.

    Attributes:
        base: name of the base model.
        guidance: ``"unguided"``, ``"cfg"`` or ``"agd"``.
        adapter: kind of the adapters, for ``"agd"``.
        scale: guidance scale.
        steps: steps of the sampler.
        nfe: forward passes of the denoiser per image, counted by a hook.
        n: images measured.
        seed: of the noises; for ``"agd"`` with adapters trained from several seeds, also theirs.
        fd: Frechet distance to the reference in the features of ``extractor`` (an FID only for Inception).
        extractor: what made the features.
        precision, recall: share of generated images within the reference's manifold, and the reverse.
        condition_accuracy: share of images that show the asked class, in the extractor's eyes.
        endpoint_mse_ratio: MSE(this, CFG) / MSE(unguided, CFG) over final latents from the same noise.
        seconds_per_image: wall-clock of sampling, without decoding.
        base_parameters, adapter_parameters: counts.
        kd: kernel distance to the reference in the same features (a KID only for Inception); rows of older versions have
            none.
    """

    base: str
    guidance: str
    adapter: str | None
    scale: float
    steps: int
    nfe: float
    n: int
    seed: int
    fd: float | None
    extractor: str
    precision: float | None
    recall: float | None
    condition_accuracy: float | None
    endpoint_mse_ratio: float | None
    seconds_per_image: float
    base_parameters: int
    adapter_parameters: int | None
    kd: float | None = None

    def __post_init__(self) -> None:
        if self.guidance not in ("unguided", "cfg", "agd"):
            raise ResultsError(f"got guidance {self.guidance!r}, expected 'unguided', 'cfg' or 'agd'")
        if (self.adapter is None) != (self.guidance != "agd"):
            raise ResultsError(f"got guidance {self.guidance!r} with adapter {self.adapter!r}: AGD rows alone name one")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ResultsError(f"got {field.name} = {value}, expected a finite number")
        for name in ("precision", "recall", "condition_accuracy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ResultsError(f"got {name} = {value}, expected a share from 0 to 1")

    @property
    def method(self) -> str:
        """``unguided``, ``cfg`` or ``agd <adapter>``."""
        return f"agd {self.adapter}" if self.adapter else self.guidance


def write_results(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON list, whole or not at all."""
    write_json(Path(path), [asdict(row) for row in rows])


def row_from_dict(value: Any, origin: str) -> Row:
    """Build a row from parsed JSON; raises :class:`ResultsError` naming what is wrong."""
    value = {"kd": None} | value if isinstance(value, dict) else value
    names = {field.name for field in fields(Row)}
    if not isinstance(value, dict) or value.keys() != names:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ResultsError(f"{origin}: got {found}, expected an object with exactly the keys {sorted(names)}")
    for field in fields(Row):
        allowed = {part.strip() for part in str(field.type).split("|")}
        kind = "None" if value[field.name] is None else type(value[field.name]).__name__
        if kind not in allowed and not (kind == "int" and "float" in allowed):
            raise ResultsError(f"{origin}: {field.name} is a {kind}, expected {field.type}")
        if kind == "int" and "float" in allowed:
            try:
                value[field.name] = float(value[field.name])
            except OverflowError as error:
                raise ResultsError(f"{origin}: {field.name} is too large") from error
    return Row(**value)


def read_results(path: str | Path) -> list[Row]:
    """Read a results file.

    Raises:
        ResultsError: if it is missing, not JSON, or a row does not keep to the schema.
    """
    import json

    path = Path(path)
    if not path.is_file():
        raise ResultsError(f"no results at {path}: run `make reproduce` first")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers or nesting beyond Python's limits
        raise ResultsError(f"{path} is not valid JSON ({error}); make it again") from error
    if not isinstance(values, list):
        raise ResultsError(f"{path} holds a {type(values).__name__}, expected a list of rows")
    return [row_from_dict(value, f"{path}, row {number}") for number, value in enumerate(values)]


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds of one (base, extractor, steps, n, method, scale)."""

    base: str
    method: str
    scale: float
    seeds: int
    n: int
    nfe: float
    mean: dict[str, float | None]
    deviation: dict[str, float | None]


MEASURES = ("fd", "kd", "precision", "recall", "condition_accuracy", "endpoint_mse_ratio", "seconds_per_image")


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary per (base, extractor, steps, n, method, scale), in order of first appearance.

    The deviation needs at least two seeds.
    """
    groups: dict[tuple[str, str, int, int, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.base, row.extractor, row.steps, row.n, row.method, row.scale), []).append(row)
    summaries = []
    for (base, _, _, n, method, scale), group in groups.items():
        mean: dict[str, float | None] = {}
        deviation: dict[str, float | None] = {}
        for name in MEASURES:
            values = [getattr(row, name) for row in group]
            known = [value for value in values if value is not None]
            mean[name] = statistics.fmean(known) if known else None
            deviation[name] = statistics.stdev(known) if len(known) > 1 else None
        summaries.append(
            Summary(base, method, scale, len({row.seed for row in group}), n, group[0].nfe, mean, deviation)
        )
    return summaries


def best_scale(rows: Sequence[Row], method: str = "cfg") -> float:
    """The scale at which a method's mean Frechet distance is lowest.

    Raises:
        ResultsError: if no row of the method has one, or the rows are of several bases or extractors.
    """
    lanes = {(row.base, row.extractor) for row in rows}
    if len(lanes) > 1:
        raise ResultsError(f"got rows of {len(lanes)} (base, extractor) pairs, {sorted(lanes)}: compare one at a time")
    known = [(s.mean["fd"], s.scale) for s in summarise(rows) if s.method == method and s.mean["fd"] is not None]
    if not known:
        raise ResultsError(f"no row of method {method!r} has a Frechet distance")
    return min(known)[1]  # type: ignore[type-var]


def at_best_scales(rows: Sequence[Row]) -> list[Row]:
    """Of every base model and method the rows at the scale where its own mean Frechet distance is lowest."""
    chosen = []
    for base, method in dict.fromkeys((row.base, row.method) for row in rows):
        mine = [row for row in rows if (row.base, row.method) == (base, method)]
        scale = best_scale(mine, method)
        chosen += [row for row in mine if row.scale == scale]
    return chosen


def cell(mean: float | None, deviation: float | None, digits: int) -> str:
    """``mean ± deviation`` as tables show it; a dash where there is nothing."""
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, mean ± standard deviation over seeds; rows of several bases name theirs, and kernel
    distances have a column if every row has one.

    Seconds are left out: those of separate runs drift with the machine, speed is measured side by side elsewhere.
    """
    several, with_kd = len({row.base for row in rows}) > 1, bool(rows) and all(row.kd is not None for row in rows)
    names = ["method", "scale", "NFE", "FD", *["KD"] * with_kd, "precision", "recall", "accuracy", "endpoint error"]
    lines = ["| " + " | ".join([*names, "n x seeds"]) + " |", "|---" * (len(names) + 1) + "|"]
    for s in summarise(rows):
        values = [
            f"{s.base}: {s.method}" if several else s.method,
            f"{s.scale:g}",
            f"{s.nfe:g}",
            cell(s.mean["fd"], s.deviation["fd"], 3),
            *[cell(s.mean["kd"], s.deviation["kd"], 4)] * with_kd,
            cell(s.mean["precision"], s.deviation["precision"], 3),
            cell(s.mean["recall"], s.deviation["recall"], 3),
            cell(s.mean["condition_accuracy"], s.deviation["condition_accuracy"], 3),
            cell(s.mean["endpoint_mse_ratio"], s.deviation["endpoint_mse_ratio"], 3),
            f"{s.n} x {s.seeds}",
        ]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)
