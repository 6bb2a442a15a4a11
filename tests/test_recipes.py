"""Ablations of the training: every variant is what it says, is trained once, and is read back as it was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agd_lib import recipes, study
from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.errors import AGDError
from agd_lib.evaluation import default_extractor
from agd_lib.project import DATA
from agd_lib.recipes import (
    ABLATIONS,
    TrainingRow,
    TrainingVariant,
    adapters_of,
    clean_latents,
    collect_for,
    held_out_store,
    largest_size,
    measure_variant,
    read_variants,
    train_variant,
    variant_table,
    write_variants,
)
from agd_lib.results import Row
from agd_lib.storage import read_json, write_json
from agd_lib.training import state_errors

SMALL = TrainingVariant(kind="offset", trajectories=40, collection_steps=4, weighting="timestep", num_steps=3)
N = 140  # more than the extractor has features


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # takes longer than all the rest
    monkeypatch.setattr(study, "has_fast_bfloat16", lambda: False)  # a process has one precision, and others set it
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    base = load_base("tiny-dit")
    held_out_store(base, folder)
    collect_for(base, SMALL, folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd21"])
def test_every_variant_can_be_made_and_keeps_within_its_share(name: str) -> None:
    base = load_base(name)
    different = {}  # in what the adapters are; many variants differ in their training alone
    for variants in ABLATIONS.values():
        assert len(set(variants)) == len(variants)
        for v in variants:
            different[v.kind, v.share, v.use_timestep, v.use_condition, v.all_sites] = v
    for variant in different.values():
        adapters = adapters_of(base, variant)
        share = adapters.num_parameters() / base.num_parameters()
        assert 0.75 * variant.share < share <= variant.share, variant
        assert (adapters.config.timestep_dim is not None) == variant.use_timestep
        sees_condition = (adapters.config.class_dim or adapters.config.prompt_dim) is not None
        assert sees_condition == variant.use_condition
        assert adapters.config.sites.keys() == base.attention_sites(variant.all_sites).keys()


def test_a_share_that_no_adapters_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.01%.*offset"):
        largest_size(load_base("tiny-dit"), SMALL.kind, 1e-4, (1.0, 6.0))


def test_the_states_are_those_of_the_variant(run: Path) -> None:
    base = load_base("tiny-dit")
    stores = {kind: collect_for(base, replace(SMALL, states=kind), run) for kind in ("guided", "noised", "half")}
    guided, noised, half = ([store.batch(torch.arange(160)).latents for store in stores.values()][i] for i in range(3))
    own, other = ((half == states).flatten(1).all(dim=1) for states in (guided, noised))
    assert bool((own ^ other).all()) and 0.35 < own.double().mean() < 0.65
    timesteps = stores["half"].column("timestep")
    assert all(0 < own[timesteps == t].double().mean() < 1 for t in timesteps.unique())
    for name in ("timestep", "guidance_scale", "condition"):
        assert all(torch.equal(store.column(name), stores["guided"].column(name)) for store in stores.values())


def test_clean_latents_are_of_the_asked_prompts() -> None:
    base = load_base("tiny-sd21")
    latents, conditions = clean_latents(base, 30)
    reader, _ = default_extractor(base, DATA)
    prompts = recipes.training_conditions(base, 30)
    _, shown = reader(base.decode(latents), [prompts[i] for i in conditions.tolist()])
    assert shown is not None and shown.float().mean() > 0.9


def test_states_that_were_made_of_another_store_are_made_again(run: Path) -> None:
    base, variant = load_base("tiny-dit"), replace(SMALL, states="noised")
    folder = collect_for(base, variant, run).folder
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert (collect_for(base, variant, run).folder / "manifest.json").stat().st_mtime_ns == before
    write_json(folder.with_suffix(".json"), {"guided": [], "base": "another"})
    assert (collect_for(base, variant, run).folder / "manifest.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("name", ["tiny-sd21", "tiny-sdxl"])
def test_held_out_prompts_are_drawn_apart(name: str) -> None:
    base = load_base(name)
    seeds = (
        study.TRAINING_PROMPTS,
        *(study.MEASURING_PROMPTS + seed for seed in study.SEEDS),
        recipes.HELD_OUT_PROMPTS,
    )
    assert len({study.training_conditions(base, 400, seed) for seed in seeds}) == len(seeds)


def test_a_variant_is_trained_once_and_measured_against_cfg(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train_variant("tiny-dit", run, SMALL, 1)
    monkeypatch.setattr(recipes, "train_compiled", lambda *arguments, **options: pytest.fail("trained again"))
    assert train_variant("tiny-dit", run, SMALL, 1) == folder
    mine = measure_variant("tiny-dit", run, SMALL, 3.0, 1, N)
    assert (mine.row.method, mine.row.nfe, mine.row.scale, mine.row.seed) == ("agd offset", 20, 3.0, 1)
    assert mine.row.endpoint_mse_ratio is not None and 0.5 < mine.row.endpoint_mse_ratio < 1.2
    assert abs(mine.row.endpoint_mse_ratio - 1) > 1e-6  # three steps have hardly begun, but they have
    low_noise_only = measure_variant("tiny-dit", run, replace(SMALL, guided_to=-1), 3.0, 1, N).row
    assert abs(low_noise_only.endpoint_mse_ratio - 1) < abs(mine.row.endpoint_mse_ratio - 1)  # told w = 1 everywhere
    base, held_out = load_base("tiny-dit"), held_out_store(load_base("tiny-dit"), run)
    adapters = AdapterSet.from_pretrained(folder)
    errors, low = state_errors(base, adapters, held_out), held_out.column("timestep") < 100
    assert mine.error_left[0] == pytest.approx(
        float(errors[low].mean() / held_out.column("signal")[low].mean()), rel=1e-4
    )
    untrained = AdapterSet.create(load_base("tiny-dit"), "offset", 4)
    assert recipes.error_left(load_base("tiny-dit"), untrained, held_out) == pytest.approx([1.0] * 10, rel=1e-2)


def test_another_seed_or_variant_is_not_taken_for_the_first(run: Path) -> None:
    folders = {
        train_variant("tiny-dit", run, variant, seed)
        for variant, seed in ((SMALL, 1), (SMALL, 2), (replace(SMALL, num_steps=2), 1))
    }
    assert len(folders) == 3


def test_rows_are_read_back_and_malformed_ones_named(tmp_path: Path) -> None:
    row = Row("tiny-dit", "agd", "offset", 2.0, 20, 20.0, 9, 0, 1.5, "x", None, None, 0.5, 0.25, 0.1, 100, 5)
    rows = [TrainingRow(SMALL, row, tuple(0.1 * i for i in range(10)), 12.5)]
    cfg = [replace(row, guidance="cfg", adapter=None, adapter_parameters=None, endpoint_mse_ratio=None)]
    path = tmp_path / "rows.json"
    write_variants(path, rows, cfg, "a command", 3.0)
    assert read_variants(path) == (rows, cfg)
    value = read_json(path, AGDError, "ablation")
    del value["rows"][0]["variant"]["all_sites"]  # as a file that is older than this part
    write_json(path, value)
    assert read_variants(path) == (rows, cfg)
    value["rows"][0]["variant"]["colour"] = "red"
    for broken, complaint in (
        (value, "row 0 is not a variant"),
        (value | {"rows": [3]}, "no list of rows"),
        ({"rows": []}, "no list of cfg"),
        ({}, "no list of rows"),
    ):
        write_json(path, broken)
        with pytest.raises(AGDError, match=complaint):
            read_variants(path)


def test_the_table_shows_what_differs_and_the_mean_over_seeds() -> None:
    row = Row("tiny-dit", "agd", "offset", 2.0, 20, 20.0, 9, 0, 1.5, "x", None, None, 0.5, 0.25, 0.1, 100, 5)
    cfg = [replace(row, guidance="cfg", adapter=None, adapter_parameters=None, endpoint_mse_ratio=None, fd=1.0)]
    rows = [
        TrainingRow(variant, replace(row, seed=seed, fd=fd), (), 1.0)
        for variant in (SMALL, replace(SMALL, states="noised"))
        for seed, fd in ((0, 1.0), (1, 2.0))
    ]
    header, _, *lines = variant_table(rows, cfg).splitlines()
    assert header == "| method | states | w | endpoint error | FD | accuracy |"
    assert lines == [
        "| cfg |  | 2 | - | 1.000 | 0.500 |",
        "| agd offset | guided | 2 | 0.250 ± 0.000 | 1.500 ± 0.707 | 0.500 ± 0.000 |",
        "| agd offset | noised | 2 | 0.250 ± 0.000 | 1.500 ± 0.707 | 0.500 ± 0.000 |",
    ]
