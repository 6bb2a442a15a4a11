"""What adapters can do that they were not trained for: other schedules, scales, samplers. No training, only measuring.

    python -m agd_lib.ablations tiny-dit interval --run runs/ablations/tiny-dit

It measures classifier-free guidance and the shipped adapters in every variant of an ablation, from several seeds of
noise, and writes ``data/results/<base>-<ablation>.json``. What is finished is kept below ``--run``. For parts of the
training see :mod:`agd_lib.recipes`, for other ways to one pass :mod:`agd_lib.rivals`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from . import study
from .attach import WEIGHTS_NAME, AdapterSet
from .base_models import BaseModel, load_base
from .errors import AGDError
from .guidance import AGD, CFG, GuidanceInterval, Unguided
from .project import DATA
from .recipes import held_out_store
from .results import ResultsError, Row, Summary, best_scale, cell, row_from_dict, summarise
from .storage import key_of, lock_folder, read_tensors, sha256, write_json, write_tensors
from .strength import DEFAULT_BELOW, strength_gains
from .study import PLANS, SEEDS, in_parallel, provenance, rows_of

SAMPLERS: dict[str, Any] = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
"""diffusers' schedulers by the names of their methods, each with its own defaults and the base model's noise schedule."""


@dataclass(frozen=True)
class Variant:
    """One way to sample.

    Attributes:
        scale: guidance scale. interval: timesteps from and to which it holds, 1 outside; None: everywhere.
        sampler: a name in :data:`SAMPLERS`. steps: of the sampler.
        strengthened: the share of the noise levels, from the cleanest, at which adapters have their strength restored
            (:mod:`agd_lib.strength`).
    """

    scale: float
    interval: tuple[int, int] | None = None
    sampler: str = "DDIM"
    steps: int = 20
    strengthened: float = 0.0

    def schedule(self) -> float | GuidanceInterval:
        """What CFG and AGD take as their scale."""
        return self.scale if self.interval is None else GuidanceInterval(self.scale, *self.interval)


INTERVALS: tuple[tuple[int, int], ...] = ((0, 600), (200, 800), (200, 600))
"""Timesteps from and to which guidance is tried to hold."""
SEARCHED: tuple[tuple[int, int], ...] = ((0, 600), (0, 700), (0, 800), (0, 900), (100, 1_000))
"""Those in which CFG alone was tried, with seeds that no other table uses (3 to 5): does any interval pay?"""


def _intervals(intervals: Sequence[tuple[int, int]], *scales: float) -> tuple[Variant, ...]:
    return tuple(Variant(scale, interval) for interval in (None, *intervals) for scale in scales)


def _strengths(*scales: float) -> tuple[Variant, ...]:
    """Everywhere, and at two scales in the first interval; as trained, and restored at low noise or at all of it."""
    plain = [*(Variant(scale) for scale in scales), *(Variant(scale, INTERVALS[0]) for scale in (2.0, 3.0))]
    return tuple(replace(variant, strengthened=share) for share in (0.0, DEFAULT_BELOW, 1.0) for variant in plain)


ABLATIONS: dict[str, dict[str, tuple[Variant, ...]]] = {
    "interval": {
        "tiny-dit": _intervals(INTERVALS, 2.0, 3.0, 4.0),
        # the best of four on tiny-sd21 in a trial of CFG with 500 images and one seed
        "tiny-sd21": _intervals(INTERVALS[:1], 2.0, 3.0, 5.0),
        "tiny-sdxl": _intervals(INTERVALS[:1], 2.0, 3.0, 5.0),
    },
    "search": {name: _intervals(SEARCHED, 2.0, 2.5, 3.0) for name in PLANS},
    "strength": {
        "tiny-dit": _strengths(1.5, 2.0, 2.5, 3.0, 4.0, 6.0),
        "tiny-sd21": _strengths(2.0, 3.0, 5.0),
        "tiny-sdxl": _strengths(2.0, 3.0, 5.0),
    },
    "sampler": {
        name: tuple(
            Variant(scale, sampler=sampler, steps=steps) for sampler in SAMPLERS for steps in (5, 10, 20, 50, 100)
        )
        for name, scale in (("tiny-dit", 2.0), ("tiny-sd21", 3.0), ("tiny-sdxl", 3.0))
    },
    "scale": {
        "tiny-dit": tuple(Variant(scale) for scale in (0.5, 1.0, 1.25, 1.75, 2.25, 3.5, 5.0, 8.0, 12.0)),
        "tiny-sd21": tuple(Variant(scale) for scale in (0.5, 1.5, 2.5, 4.0, 6.0, 12.0, 16.0)),
        "tiny-sdxl": tuple(Variant(scale) for scale in (0.5, 1.5, 2.5, 4.0, 6.0, 12.0, 16.0)),
    },
}
"""Ablation -> base model -> what is measured. ``scale``: between and beyond the scales that the adapters were trained on.
``strength``: the adapters as they are, and with what they lack of the guidance's strength made up for."""


@dataclass(frozen=True)
class VariantRow:
    """One measurement: what :class:`~agd_lib.results.Row` says, and how it was sampled."""

    variant: Variant
    row: Row


def strengthened(base: BaseModel, adapters: AdapterSet, run: Path, below: float) -> AdapterSet:
    """The shipped adapters with their strength restored, by held-out trajectories that are kept in the run's folder."""
    weights = DATA / base.name / "adapters" / adapters.config.kind / WEIGHTS_NAME
    path = run / f"strength-{key_of([sha256(weights), base.fingerprint(), below])}.safetensors"
    if not path.is_file():
        gains = strength_gains(base, adapters, held_out_store(base, run), below)
        write_tensors(path, {"gains": torch.tensor(gains)})
    gains = tuple(read_tensors(path, AGDError, "strength")["gains"].tolist())
    adapters.config = replace(adapters.config, strength=gains)
    return adapters


def measure(base_name: str, run: Path, kind: str, variant: Variant, seed: int, n: int) -> VariantRow:
    """Sample and measure one variant; what was measured before is read.

    Args:
        kind: ``"unguided"``, ``"cfg"``, or the kind of the shipped adapters. The endpoint error of adapters is against CFG
            of the same variant.
    """
    torch.set_num_threads(1)
    base = load_base(base_name)
    base.scheduler = SAMPLERS[variant.sampler].from_config(base.scheduler.config)
    everywhere = run / f"{variant.sampler}-{variant.steps}"
    place = everywhere
    if variant.interval is not None:
        place = everywhere.with_name(f"{everywhere.name}-from{variant.interval[0]}to{variant.interval[1]}")
    how = (n, seed, variant.steps)
    unguided = study.measure(base, Unguided(), *how, everywhere)
    if kind == "unguided":
        return VariantRow(variant, unguided.row)
    cfg = study.measure(base, CFG(variant.schedule()), *how, place)
    if kind == "cfg":
        return VariantRow(variant, cfg.row)
    adapters = AdapterSet.from_pretrained(DATA / base.name / "adapters" / kind).attach(base)
    if variant.strengthened:
        adapters = strengthened(base, adapters, run, variant.strengthened)
        place = place / f"strengthened-{variant.strengthened:g}"
    return VariantRow(variant, study.measure(base, AGD(adapters, variant.schedule()), *how, place, unguided, cfg).row)


def write_ablation(path: Path, rows: Sequence[VariantRow], command: str, seconds: float) -> None:
    """Write the rows with where they come from."""
    values = [{"variant": asdict(row.variant), "row": asdict(row.row)} for row in rows]
    write_json(path, provenance(command, seconds) | {"rows": values})


def read_ablation(path: Path) -> list[VariantRow]:
    """The rows of a file that :func:`write_ablation` wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    found = []
    names = {field.name for field in fields(Variant)}
    for number, value in enumerate(rows_of(path)):
        if (
            value.keys() != {"variant", "row"}
            or not isinstance(value["variant"], dict)
            or not names - {"strengthened"} <= value["variant"].keys() <= names  # older files do not have it
        ):
            raise AGDError(f"{path}, row {number} is not a variant and its row: measure it again")
        interval = value["variant"]["interval"]
        variant = Variant(**(value["variant"] | {"interval": None if interval is None else tuple(interval)}))
        found.append(VariantRow(variant, row_from_dict(value["row"], f"{path}, row {number}")))
    return found


def interval_table(rows: Sequence[VariantRow]) -> str:
    """For every method and interval the scale with the lowest mean distance, as a Markdown table, the lowest first.

    Mean ± standard deviation over seeds; "FD against CFG" is the difference to the best of CFG everywhere.

    Raises:
        ResultsError: if there is no CFG without an interval among the rows.
    """
    best: dict[tuple[str, tuple[int, int] | None], Summary] = {}
    for interval in dict.fromkeys(row.variant.interval for row in rows):
        of_interval = [row.row for row in rows if row.variant.interval == interval]
        for method in dict.fromkeys(row.method for row in of_interval):
            mine = [row for row in of_interval if row.method == method]
            scale = best_scale(mine, method)
            (best[method, interval],) = summarise([row for row in mine if row.scale == scale])
    if ("cfg", None) not in best:
        raise ResultsError("got no rows of CFG without an interval, expected what the others are compared with")

    def distance(summary: Summary) -> float:
        assert summary.mean["fd"] is not None
        return summary.mean["fd"]

    lines = [
        "| method | guided at t | best w | NFE | FD | FD against CFG | recall | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, interval), summary in sorted(best.items(), key=lambda item: distance(item[1])):
        fd, recall, accuracy = (
            cell(summary.mean[name], summary.deviation[name], 3) for name in ("fd", "recall", "condition_accuracy")
        )
        change = distance(summary) / distance(best["cfg", None]) - 1
        lines.append(
            f"| {method} | {_where(method, interval)} | {summary.scale:g} | {summary.nfe:g} | {fd} | {change:+.1%} | {recall} | {accuracy} |"
        )
    return "\n".join(lines)


def strength_table(rows: Sequence[VariantRow]) -> str:
    """CFG and the adapters, as they are and with their strength restored, at every scale, as a Markdown table.

    Mean ± standard deviation over seeds; "FD against CFG" is the difference to the lowest mean of CFG
    without an interval.

    Raises:
        ResultsError: if there is no CFG among the rows.
    """
    cfg = [row.row for row in rows if row.row.method == "cfg" and row.variant.interval is None]
    if not cfg:
        raise ResultsError("got no rows of CFG without an interval, expected what the others are compared with")
    lowest = min(summary.mean["fd"] or math.inf for summary in summarise(cfg))
    columns = ("fd", "precision", "recall", "condition_accuracy", "endpoint_mse_ratio")
    lines = [
        "| method | strength | guided at t | w | NFE | FD | FD against CFG | precision | recall | accuracy | endpoint error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for more, interval in dict.fromkeys((row.variant.strengthened, row.variant.interval) for row in rows):
        mine = [row.row for row in rows if (row.variant.strengthened, row.variant.interval) == (more, interval)]
        for each in summarise(mine):
            strength = {0.0: "as trained", 1.0: "restored"}.get(more, f"restored below {more:g}")
            strength = strength if each.method.startswith("agd") else ""
            fd, *others = (cell(each.mean[name], each.deviation[name], 3) for name in columns)
            change = (each.mean["fd"] or math.inf) / lowest - 1
            lines.append(
                f"| {each.method} | {strength} | {_where(each.method, interval)} | {each.scale:g} | {each.nfe:g} | {fd} "
                f"| {change:+.1%} | {' | '.join(others)} |"
            )
    return "\n".join(lines)


def sampler_table(rows: Sequence[VariantRow]) -> str:
    """Adapters beside CFG and unguided sampling under every sampler and number of steps, as a Markdown table.

    Mean ± standard deviation over seeds; the endpoint error is against CFG with the same sampler and steps.

    Raises:
        ResultsError: if a sampling lacks CFG or unguided sampling, or has more than one scale or kind of adapters.
    """
    lines = [
        "| sampler | steps | FD unguided | FD of CFG | FD of AGD | accuracy of CFG | accuracy of AGD | endpoint error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sampler, steps in dict.fromkeys((row.variant.sampler, row.variant.steps) for row in rows):
        mine = [row.row for row in rows if (row.variant.sampler, row.variant.steps) == (sampler, steps)]
        summaries = summarise(mine)
        found = {summary.method.split()[0]: summary for summary in summaries}
        if len(summaries) != 3 or found.keys() != {"unguided", "cfg", "agd"}:
            raise ResultsError(
                f"{sampler} with {steps} steps has {[each.method for each in summaries]}, expected unguided sampling, CFG "
                "and one kind of adapters, each at one scale"
            )
        cells = [
            cell(found[method].mean[name], found[method].deviation[name], 3)
            for name, methods in (("fd", ("unguided", "cfg", "agd")), ("condition_accuracy", ("cfg", "agd")))
            for method in methods
        ]
        error = cell(found["agd"].mean["endpoint_mse_ratio"], found["agd"].deviation["endpoint_mse_ratio"], 3)
        lines.append(f"| {sampler} | {steps} | {' | '.join(cells)} | {error} |")
    return "\n".join(lines)


def _where(method: str, interval: tuple[int, int] | None) -> str:
    """The timesteps at which a method guides, as tables say it."""
    if method == "unguided":
        return "nowhere"
    return "everywhere" if interval is None else f"{interval[0]} to {interval[1]}"


def _units(
    variants: Sequence[Variant], kinds: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, Variant, int]]:
    """What is to be measured, each sampling once, and what others are compared with before them."""
    samplings = dict.fromkeys((variant.sampler, variant.steps) for variant in variants)
    plain = [Variant(1.0, sampler=sampler, steps=steps) for sampler, steps in samplings]
    yield from itertools.product(["unguided"], plain, seeds)
    yield from itertools.product(["cfg"], [variant for variant in variants if variant.strengthened == 0], seeds)
    for kind in kinds:
        yield from itertools.product([kind], variants, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(PLANS))
    parser.add_argument("ablation", choices=list(ABLATIONS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None, help="by default data/results/<base>-<ablation>.json")
    parser.add_argument(
        "--kinds", nargs="*", default=["modulated"], help="kinds of the shipped adapters; none: CFG alone"
    )
    parser.add_argument("--scales", nargs="+", type=float, default=None, help="of the ablation's scales these alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--n", type=int, default=None, help="images for each; by default as many as in the study")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, n = time.perf_counter(), arguments.n or PLANS[arguments.base].n
    variants = [
        variant
        for variant in ABLATIONS[arguments.ablation][arguments.base]
        if arguments.scales is None or variant.scale in arguments.scales
    ]
    if not variants:
        parser.error(f"{arguments.ablation} has no variants of the scales {arguments.scales}")
    rows: list[VariantRow] = []
    with lock_folder(arguments.run):
        shares = sorted({variant.strengthened for variant in variants} - {0.0})
        for kind, below in itertools.product(arguments.kinds, shares):  # before two workers want it
            base = load_base(arguments.base)
            adapters = AdapterSet.from_pretrained(DATA / base.name / "adapters" / kind).attach(base)
            gains = strengthened(base, adapters, arguments.run, below).config.strength
            print(f"{kind}: w - 1 times {', '.join(f'{gain:.2f}' for gain in gains)}")
        for kind, units in itertools.groupby(_units(variants, arguments.kinds, arguments.seeds), lambda unit: unit[0]):
            calls = [(arguments.base, arguments.run, *unit, n) for unit in units]
            rows += in_parallel(arguments.workers, kind, measure, calls)
    command = "python -m agd_lib.ablations " + shlex.join(sys.argv[1:])
    path = arguments.results or DATA / "results" / f"{arguments.base}-{arguments.ablation}.json"
    write_ablation(path, rows, command, time.perf_counter() - start)


if __name__ == "__main__":
    main()
