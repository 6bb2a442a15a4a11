"""What ``data/`` ships belongs together: base models, their adapters, and the tables measured on them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from agd_lib import AdapterSet, load_base
from agd_lib.adapters import ADAPTERS
from agd_lib.attributes import AttributeFeatures
from agd_lib.base_models import BaseModel
from agd_lib.extractor import load_local, weights_hash
from agd_lib.negatives import negatives_table, read_negatives
from agd_lib.project import DATA
from agd_lib.results import best_scale, summarise
from agd_lib.study import read_study
from agd_lib.tiny_text import build_tiny_text, measure_autoencoder

BASES = sorted(path.parent.name for path in DATA.glob("*/model_index.json"))
ADAPTER_FOLDERS = sorted(path.parent for path in DATA.glob("*/adapters/*/config.json"))


ADAPTED = {folder.parent.parent.name for folder in ADAPTER_FOLDERS}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base(request.param)


def test_the_small_dit_ships_with_every_kind_of_adapters() -> None:
    assert "tiny-dit" in BASES
    assert {folder.name for folder in ADAPTER_FOLDERS if folder.parent.parent.name == "tiny-dit"} == set(ADAPTERS)


def test_adapters_were_trained_on_the_base_beside_them_and_are_small(base: BaseModel) -> None:
    for folder in (DATA / base.name / "adapters").glob("*"):
        adapters = AdapterSet.from_pretrained(folder)
        assert adapters.config.base_fingerprint == base.fingerprint(), folder.name
        sees_negative = adapters.config.negative_dim is not None
        assert adapters.config.kind + ("-negative" if sees_negative else "") == folder.name
        assert 0.01 <= adapters.num_parameters() / base.num_parameters() <= 0.05


def test_every_base_model_gains_from_guidance(base: BaseModel) -> None:
    """Measured before anything was built on it: ``python -m agd_lib.study BASE --gate``."""
    rows = read_study(DATA / "results" / f"{base.name}-gate.json")
    assert {row.base_parameters for row in rows} == {base.num_parameters()}
    means = {summary.scale: summary for summary in summarise(rows)}
    unguided, best = means[1.0], means[best_scale(rows)]
    assert unguided.n * unguided.seeds >= (5_000 if base.name == "tiny-dit" else 3_000) and unguided.seeds >= 3
    accuracies = [means[scale].mean["condition_accuracy"] for scale in sorted(means)]
    distances = [means[scale].mean["fd"] for scale in sorted(means)]
    turn = distances.index(min(distances))
    assert 0 < turn < len(distances) - 1  # a valley: too little guidance, then too much
    assert distances[: turn + 1] == sorted(distances[: turn + 1], reverse=True)
    assert distances[turn:] == sorted(distances[turn:])
    if base.name == "tiny-dit":
        assert accuracies[0] >= 0.6 and accuracies[turn] >= 0.95
        assert distances[turn] <= 0.75 * distances[0] and 1.25 <= best.scale <= 4
    else:
        assert max(accuracies) >= 0.7
        assert max(accuracies) >= 1.5 * accuracies[0]


@pytest.mark.parametrize("name", sorted(ADAPTED))
def test_tables_are_of_these_models(name: str) -> None:
    base = load_base(name)
    rows = read_study(DATA / "results" / f"{base.name}.json")
    assert {row.base_parameters for row in rows} == {base.num_parameters()}
    for kind in ADAPTERS:
        shipped = AdapterSet.from_pretrained(DATA / base.name / "adapters" / kind)
        assert {row.adapter_parameters for row in rows if row.adapter == kind} == {shipped.num_parameters()}
        card = (DATA / base.name / "adapters" / kind / "README.md").read_text(encoding="utf-8")
        assert all(f"in the features of {row.extractor}, not an FID" in card for row in rows)


def test_the_table_of_negative_prompts_is_of_the_shipped_adapters() -> None:
    for path in DATA.glob("*/adapters/*-negative"):
        rows = read_negatives(DATA / "results" / f"{path.parents[1].name}-negatives.json")
        shipped = AdapterSet.from_pretrained(path)
        mine = [row for row in rows if row.adapter in (None, shipped.config.kind)]
        assert {row.adapter_parameters for row in mine} == {None, shipped.num_parameters()}
        assert negatives_table(mine) in (path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.json")), ids=lambda path: path.relative_to(DATA).as_posix())
def test_no_configuration_names_a_folder_of_the_machine_it_was_made_on(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "_name_or_path" not in json.loads(text)
    assert not re.search(r'"(/\w+/|[A-Z]:\\\\|~/\w)[^"]*"', text)


def test_the_small_text_models_are_built_on_the_shared_autoencoder_and_reader() -> None:
    defaults = {name: value.default for name, value in inspect.signature(build_tiny_text).parameters.items()}
    assert defaults["shared"] == DATA / "scenes"
    for name, steps in (("vae", "vae_steps"), ("extractor", "reader_steps")):
        settings = json.loads((DATA / "scenes" / name / "training.json").read_text())
        assert (settings["num_images"], settings["steps"]) == (defaults["num_images"], defaults[steps])
    assert json.loads((DATA / "scenes" / "vae" / "training.json").read_text())["start"] == weights_hash(
        DATA / "tiny-dit" / "vae"
    )
    vae = load_local(AutoencoderKL, DATA / "scenes" / "vae")
    shares = measure_autoencoder(vae, AttributeFeatures(DATA / "scenes" / "extractor").model, 300)
    assert min(shares["real images"].values()) >= 0.99 and min(shares["reconstructions"].values()) >= 0.94


def test_the_data_fit_into_git() -> None:
    sizes = {name: sum(path.stat().st_size for path in (DATA / name).rglob("*") if path.is_file()) for name in BASES}
    assert max(sizes.values()) < 30e6
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 100e6


# What the adapters that were trained as the shipped ones reach: three trainings, each measured from noise of its own --------

BARS = {  # how far above CFG's distance at its best scale, how many points behind it, with what endpoint error
    "tiny-dit": (0.05, 0.02, 0.15),
    "tiny-sd21": (0.05, 0.03, 0.2),
    "tiny-sdxl": (0.05, 0.03, 0.2),
}
MISSED = {  # README.md and docs/results.md say so
    "tiny-dit": {("distance", 2.0), ("endpoint", 2.0)},
    "tiny-sd21": {("accuracy", 3.0), ("accuracy", 5.0), ("endpoint", 5.0), ("endpoint", 8.0), ("endpoint", 12.0)},
    "tiny-sdxl": {("accuracy", 3.0), ("endpoint", 8.0)},
}


@pytest.mark.parametrize("name", BARS)
def test_which_bars_the_modulated_adapters_keep_is_said(name: str) -> None:
    rows = read_study(DATA / "results" / f"{name}.json")
    of = {(row.method, row.scale): row.mean for row in summarise(rows)}
    best = best_scale(rows)
    distance, behind, endpoint = BARS[name]

    def measured(scale: float, what: str, method: str = "agd modulated") -> float:
        value = of[method, scale][what]
        assert value is not None
        return value

    missed = {("distance", best)} if measured(best, "fd") > (1 + distance) * measured(best, "fd", "cfg") else set()
    for scale in [best] if name == "tiny-dit" else [scale for method, scale in of if method == "agd modulated"]:
        points = measured(scale, "condition_accuracy", "cfg") - measured(scale, "condition_accuracy")
        missed |= {("accuracy", scale)} if points > behind else set()
        missed |= {("endpoint", scale)} if measured(scale, "endpoint_mse_ratio") > endpoint else set()
    assert missed == MISSED[name]
    for row in rows:
        if row.adapter == "modulated":
            assert row.nfe == row.steps and row.adapter_parameters is not None
            assert row.adapter_parameters <= 0.05 * row.base_parameters
        elif row.guidance == "cfg":
            assert row.nfe == 2 * row.steps
