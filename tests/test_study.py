"""The full measurement of a small base model: what it is asked, what it may take from an earlier one, and what it ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_dit_folder

from agd_lib import study
from agd_lib.attach import AdapterSet
from agd_lib.base_models import KNOWN_BASES, load_base
from agd_lib.results import ResultsError, Row
from agd_lib.storage import write_json
from agd_lib.study import PLANS, Recipe, StudyError, StudyPlan, read_study, write_study
from agd_lib.training import TrainingSettings
from agd_lib.trajectories import CollectionPlan, collect


class TextBase(study.StableDiffusionBase):
    """Only what tells text-to-image models apart."""

    def __init__(self) -> None:
        self.name = "text"


def test_prompts_are_others_for_training_and_for_every_seed_of_the_measurement() -> None:
    base = TextBase()
    trained = study.training_conditions(base, 200)
    asked = [study.measuring_conditions(base, 200, seed) for seed in study.SEEDS]
    assert len(trained) == 200 and all(len(prompts) == 200 for prompts in asked)
    assert all(prompts != list(trained) for prompts in asked)
    assert len({tuple(prompts) for prompts in asked}) == len(study.SEEDS)
    assert asked[0] == study.measuring_conditions(base, 300, 0)[:200]


def test_classes_are_asked_in_turn(dit_folder: Path) -> None:
    base = load_base(dit_folder)
    assert study.training_conditions(base, 200) == tuple(base.all_conditions())
    assert study.measuring_conditions(base, 200, 1) == base.all_conditions()


@pytest.mark.parametrize("name", PLANS)
def test_every_recipe_makes_one_to_five_percent(name: str) -> None:
    assert name in KNOWN_BASES
    base, plan = load_base(name), PLANS[name]
    for kind, recipe in plan.recipes.items():
        adapters = AdapterSet.create(base, kind, recipe.hidden_size, noise_ranges=recipe.noise_ranges)
        assert 0.01 < adapters.num_parameters() / base.num_parameters() <= 0.05, kind


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A base model's folder with a plan of its own, and a run in which its trajectories are collected."""
    folder = str(write_dit_folder(tmp_path / "five-classes"))
    recipes = {"offset": Recipe(4, TrainingSettings(2, 4, 1e-3))}
    monkeypatch.setitem(PLANS, folder, StudyPlan(recipes, (2.0,), (1.0, 4.0), trajectories=6, n=80))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # takes longer than all the rest
    monkeypatch.setattr(study, "has_fast_bfloat16", lambda: False)  # a process has one precision, and others set it
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    plan = CollectionPlan((0, 1, 2), 6, (1.0, 4.0), num_inference_steps=2)
    collect(load_base(folder), plan, tmp_path / "run" / "trajectories", progress=False)
    return folder, tmp_path / "run"


def test_adapters_are_trained_once_and_those_of_another_recipe_refused(
    run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = run
    study.train_unit(name, folder, "offset", 0)
    trained = (folder / "adapters" / "offset-seed0" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(study, "train", lambda *args, **options: pytest.fail("trained again"))
    study.train_unit(name, folder, "offset", 0)
    assert (folder / "adapters" / "offset-seed0" / "adapter_model.safetensors").read_bytes() == trained
    other = StudyPlan({"offset": Recipe(5, TrainingSettings(2, 4, 1e-3))}, (2.0,), (1.0, 4.0), 6, 80)
    monkeypatch.setitem(PLANS, name, other)
    with pytest.raises(StudyError, match="trained from another base model, store or recipe"):
        study.train_unit(name, folder, "offset", 0)


def a_row(**values: Any) -> Row:
    defaults: dict[str, Any] = {
        "base": "tiny-dit",
        "guidance": "cfg",
        "adapter": None,
        "scale": 2.0,
        "steps": 20,
        "nfe": 40.0,
        "n": 80,
        "seed": 0,
        "fd": 1.0,
        "extractor": "quarters",
        "precision": None,
        "recall": None,
        "condition_accuracy": None,
        "endpoint_mse_ratio": None,
        "seconds_per_image": 0.1,
        "base_parameters": 1000,
        "adapter_parameters": None,
    }
    return Row(**defaults | values)


def test_a_study_is_read_as_it_was_written_and_a_row_that_is_not_one_is_named(tmp_path: Path) -> None:
    rows = [a_row(), a_row(scale=3.0, seed=1)]
    write_study(tmp_path / "study.json", rows, "the command", 12.3)
    assert read_study(tmp_path / "study.json") == rows
    write_json(tmp_path / "other.json", {"rows": [{"base": "tiny-dit"}]})
    with pytest.raises(ResultsError, match=r"other\.json, row 0"):
        read_study(tmp_path / "other.json")
