"""Ablations: every variant is measured as it says, once, and read back as it was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file

from agd_lib import CFG, GuidanceInterval, load_base
from agd_lib.ablations import (
    ABLATIONS,
    SAMPLERS,
    Variant,
    VariantRow,
    _units,
    interval_table,
    measure,
    read_ablation,
    sampler_table,
    strength_table,
    write_ablation,
)
from agd_lib.errors import AGDError
from agd_lib.project import DATA
from agd_lib.results import ResultsError
from agd_lib.sampling import generate
from agd_lib.storage import read_json, write_json
from agd_lib.study import PLANS

N = 140  # more than the extractor has features


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablations")


def test_every_base_model_of_the_study_has_every_ablation() -> None:
    for variants in ABLATIONS.values():
        assert variants.keys() == PLANS.keys()
        assert all(len(set(each)) == len(each) for each in variants.values())


def test_guidance_within_an_interval(run: Path) -> None:
    inside, everywhere = Variant(2.0, (300, 700), steps=4), Variant(2.0, steps=4)
    rows = {kind: measure("tiny-dit", run, kind, inside, 0, N).row for kind in ("unguided", "cfg", "modulated")}
    timesteps = load_base("tiny-dit").scheduler
    timesteps.set_timesteps(4)
    guided = sum(300 <= t <= 700 for t in timesteps.timesteps.tolist())
    assert 0 < guided < 4
    assert [row.nfe for row in rows.values()] == [4, 4 + guided, 4]  # outside the interval CFG has one pass, too
    assert all(row.scale == 2.0 for name, row in rows.items() if name != "unguided")
    assert rows["modulated"].endpoint_mse_ratio is not None and rows["modulated"].endpoint_mse_ratio < 0.6
    assert measure("tiny-dit", run, "cfg", everywhere, 0, N).row.nfe == 8
    assert measure("tiny-dit", run, "cfg", inside, 0, N).row == rows["cfg"]  # was kept, and not taken for the other


def test_the_samplers_are_diffusers_own(run: Path) -> None:
    variant = Variant(2.0, sampler="DPM-Solver++", steps=3)
    row = measure("tiny-dit", run, "cfg", variant, 5, N).row
    assert (row.nfe, row.steps, row.seed) == (6, 3, 5)
    base = load_base("tiny-dit")
    base.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    expected = torch.cat(list(generate(base, base.all_conditions() * 7, CFG(2.0), 3, 5)))
    kept = load_file(run / "DPM-Solver++-3" / "cfg-2-seed5.safetensors")["latents"]
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-3)


def test_each_sampling_is_asked_once_and_what_others_need_before_them() -> None:
    variants = ABLATIONS["sampler"]["tiny-dit"]
    units = list(_units(variants, ["modulated"], (0, 1)))
    assert len(set(units)) == len(units) == 2 * len(variants) * 3
    kinds = [kind for kind, _, _ in units]
    assert kinds == sorted(kinds, key=["unguided", "cfg", "modulated"].index)
    assert {variant.sampler for _, variant, _ in units} == set(SAMPLERS)


def test_rows_survive_the_disk_and_malformed_ones_are_named(run: Path, tmp_path: Path) -> None:
    variant = Variant(2.0, (300, 700), steps=4)
    rows = [measure("tiny-dit", run, "cfg", variant, 0, N)]
    path = tmp_path / "ablation.json"
    write_ablation(path, rows, "python -m something", 1.0)
    assert read_ablation(path) == rows == [VariantRow(variant, rows[0].row)]
    value: Any = read_json(path, AGDError, "ablation")
    assert value["command"] == "python -m something"
    del value["rows"][0]["variant"]["sampler"]
    write_json(path, value)
    with pytest.raises(AGDError, match="row 0 is not a variant and its row"):
        read_ablation(path)


def test_the_schedule_is_the_scale_inside_and_one_outside() -> None:
    schedule = Variant(3.0, (200, 800)).schedule()
    assert schedule == GuidanceInterval(3.0, 200, 800)
    assert Variant(3.0).schedule() == 3.0


def test_strength_is_restored_once_and_is_not_taken_for_the_plain_adapters(run: Path) -> None:
    plain, more = Variant(2.0, steps=4), Variant(2.0, steps=4, strengthened=0.4)
    rows = [measure("tiny-dit", run, "modulated", variant, 0, N).row for variant in (plain, more)]
    assert rows[0].fd != rows[1].fd and rows[0].method == rows[1].method
    (kept,) = run.glob("strength-*.safetensors")
    gains = load_file(kept)["gains"]
    assert len(gains) == 10 and gains[0] > 1.15
    before = kept.stat().st_mtime_ns
    assert measure("tiny-dit", run, "modulated", more, 0, N).row == rows[1]
    assert kept.stat().st_mtime_ns == before
    asked = [unit[0] for unit in _units((plain, more), ["modulated"], [0])]
    assert asked == ["unguided", "cfg", "modulated", "modulated"]


def test_the_table_of_strength_compares_with_the_best_of_cfg() -> None:
    def row(method: str, scale: float, fd: float, strengthened: float = 0.0, interval: Any = None) -> VariantRow:
        known = read_ablation(DATA / "results" / "tiny-dit-interval.json")[0].row
        kind = "modulated" if method == "agd" else None
        changed = replace(known, guidance=method, adapter=kind, scale=scale, seed=0, fd=fd, nfe=20.0)
        return VariantRow(Variant(scale, interval, strengthened=strengthened), changed)

    rows = [row("cfg", 2.0, 2.0), row("cfg", 3.0, 2.5), row("agd", 2.0, 2.2), row("agd", 2.0, 1.9, 1.0)]
    rows += [row("cfg", 2.0, 1.8, interval=(0, 600)), row("agd", 2.0, 1.7, 0.4, (0, 600))]
    lines = strength_table(rows).splitlines()[2:]
    assert [line.split(" | ")[:7] for line in lines] == [
        ["| cfg", "", "everywhere", "2", "20", "2.000", "+0.0%"],
        ["| cfg", "", "everywhere", "3", "20", "2.500", "+25.0%"],
        ["| agd modulated", "as trained", "everywhere", "2", "20", "2.200", "+10.0%"],
        ["| agd modulated", "restored", "everywhere", "2", "20", "1.900", "-5.0%"],
        ["| cfg", "", "0 to 600", "2", "20", "1.800", "-10.0%"],
        ["| agd modulated", "restored below 0.4", "0 to 600", "2", "20", "1.700", "-15.0%"],
    ]
    with pytest.raises(ResultsError, match="no rows of CFG"):
        strength_table(rows[2:])


def test_the_table_of_samplers_compares_within_each() -> None:
    def row(method: str, sampler: str, steps: int, seed: int, fd: float) -> VariantRow:
        known = read_ablation(DATA / "results" / "tiny-dit-interval.json")[0].row
        scale = 1.0 if method == "unguided" else 2.0
        kind, error = ("modulated", fd / 10) if method == "agd" else (None, None)
        changed = replace(known, guidance=method, adapter=kind, scale=scale, seed=seed, fd=fd, condition_accuracy=0.9)
        return VariantRow(Variant(scale, sampler=sampler, steps=steps), replace(changed, endpoint_mse_ratio=error))

    rows = [row("unguided", "DDIM", 5, seed, 3.0) for seed in (0, 1)] + [row("unguided", "UniPC", 100, 0, 2.5)]
    rows += [row("cfg", "DDIM", 5, 0, 1.9), row("cfg", "DDIM", 5, 1, 2.1), row("cfg", "UniPC", 100, 0, 1.5)]
    rows += [row("agd", "DDIM", 5, seed, 2.2) for seed in (0, 1)] + [row("agd", "UniPC", 100, 0, 1.6)]
    assert [line.split(" | ") for line in sampler_table(rows).splitlines()[2:]] == [
        ["| DDIM", "5", "3.000 ± 0.000", "2.000 ± 0.141", "2.200 ± 0.000", *["0.900 ± 0.000"] * 2, "0.220 ± 0.000 |"],
        ["| UniPC", "100", "2.500", "1.500", "1.600", "0.900", "0.900", "0.160 |"],
    ]
    with pytest.raises(ResultsError, match=r"UniPC with 100 steps has \['unguided', 'agd modulated'\], expected"):
        sampler_table([each for each in rows if each.row.guidance != "cfg" or each.variant.sampler != "UniPC"])


def test_the_table_of_intervals_has_the_best_scale_of_each() -> None:
    def row(method: str, interval: tuple[int, int] | None, scale: float, seed: int, fd: float) -> VariantRow:
        known = read_ablation(DATA / "results" / "tiny-dit-interval.json")[0].row
        kind = "modulated" if method == "agd" else None
        changed = replace(known, guidance=method, adapter=kind, scale=scale, seed=seed, fd=fd, nfe=20.0)
        return VariantRow(Variant(scale, interval), changed)

    rows = [row("cfg", None, 2.0, seed, 2.0) for seed in (0, 1)]
    rows += [row("cfg", None, 3.0, 0, 1.9), row("cfg", None, 3.0, 1, 2.5)]
    rows += [row("agd", (0, 600), 2.0, seed, fd) for seed, fd in ((0, 1.7), (1, 1.9))]
    rows += [row("agd", (0, 600), 4.0, seed, 1.85) for seed in (0, 1)]
    lines = interval_table(rows).splitlines()[2:]
    assert [line.split(" | ")[:6] for line in lines] == [
        ["| agd modulated", "0 to 600", "2", "20", "1.800 ± 0.141", "-10.0%"],
        ["| cfg", "everywhere", "2", "20", "2.000 ± 0.000", "+0.0%"],
    ]
    with pytest.raises(ResultsError, match="no rows of CFG without an interval"):
        interval_table(rows[4:])
