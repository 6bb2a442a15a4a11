"""What is said of a cost beforehand: bytes are counted, seconds are measured and scaled."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import agd_lib.budget
from agd_lib.attach import AdapterSet
from agd_lib.base_models import KNOWN_BASES, DiTBase, count_forwards
from agd_lib.budget import (
    JOBS,
    Cost,
    collection_cost,
    environment_report,
    format_seconds,
    sampling_cost,
    seconds_per_forward,
    training_cost,
    version_differences,
    what_runs,
)
from agd_lib.reproduce import load_profile
from agd_lib.training import TrainingSettings
from agd_lib.trajectories import CollectionPlan, predicted_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (40.2, "40 s"), (99, "99 s"), (100, "2 min"), (725, "12 min"), (6000, "1.7 h"), (12_600, "3.5 h")],
)
def test_seconds_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_cost_says_what_it_knows() -> None:
    assert str(Cost(40.0, 3 * 2**20)) == "about 40 s, 3.0 MiB on disk"
    assert str(Cost(disk_bytes=2**19)) == "0.5 MiB on disk"
    assert str(Cost(725.0)) == "about 12 min"
    assert str(Cost()) == "next to nothing"


class Clock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agd_lib.budget, "time", Clock())


def test_one_forward_is_timed_per_sample(dit_base: DiTBase, clock: None) -> None:
    with count_forwards(dit_base) as meter:
        assert seconds_per_forward(dit_base, batch_size=4) == 1 / 4
    assert (meter.calls, meter.samples) == (2, 8)  # one to warm up


def test_sampling_and_collection_scale_with_their_forward_passes(dit_base: DiTBase, clock: None) -> None:
    assert sampling_cost(dit_base, num_images=100, nfe=40, batch_size=10) == Cost(100 * 40 / 10)
    assert sampling_cost(dit_base, num_images=5, nfe=40, batch_size=10) == Cost(5 * 40 / 5)
    plan = CollectionPlan(conditions=(0, 1), num_trajectories=30, num_inference_steps=10, steps_per_trajectory=4)
    expected = Cost(2 * 30 * 10 / 8, predicted_size(dit_base, plan))
    assert collection_cost(dit_base, plan, batch_size=8) == expected
    at_one = collection_cost(dit_base, replace(plan, guidance_range=(1.0, 1.0)), batch_size=8)
    assert at_one == replace(expected, seconds=30 * 10 / 8)  # no second pass
    assert expected.disk_bytes == 30 * 4 * (2 * 4 * 8 * 8 * 2 + 24) + 2 * 8  # states, and class labels


def test_training_cost_scales_with_the_steps_and_changes_no_weights(dit_base: DiTBase, clock: None) -> None:
    adapters = AdapterSet.create(dit_base, hidden_size=8)
    before: dict[str, Any] = {name: value.clone() for name, value in adapters.state_dict().items()}
    base_before = {name: value.clone() for name, value in dit_base.denoiser.state_dict().items()}
    assert training_cost(dit_base, adapters, TrainingSettings(num_steps=70, batch_size=4)) == Cost(70.0)
    assert all(torch.equal(value, before[name]) for name, value in adapters.state_dict().items())
    assert all(torch.equal(value, base_before[name]) for name, value in dit_base.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in adapters.parameters())


def test_the_environment_is_reported(tmp_path: Path) -> None:
    report = environment_report(tmp_path)
    assert report["torch"] == torch.__version__
    assert set(report) >= {"Python", "diffusers", "accelerate", "processor cores", "memory", "free disk"}
    assert ("GPU" in report) != any(name.startswith("GPU ") for name in report)


def test_what_runs_follows_from_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agd_lib.budget.shutil, "disk_usage", lambda folder: SimpleNamespace(free=200 * 2**30))
    monkeypatch.setattr(agd_lib.budget, "_memory_gib", lambda: 31.2)  # sold as 32
    monkeypatch.setattr(agd_lib.budget, "gpu_memory_gib", lambda: 0.0)
    without_gpu = {job: (runs, note) for job, runs, note in what_runs(tmp_path)}
    tiny, *_, paper = without_gpu.values()
    assert tiny == (True, "")
    assert paper == (False, "needs 24 GiB on one GPU, found 0")
    monkeypatch.setattr(agd_lib.budget, "gpu_memory_gib", lambda: 23.6)  # what a card of 24 GB reports
    assert all(runs for _, runs, _ in what_runs(tmp_path))
    monkeypatch.setattr(agd_lib.budget, "_memory_gib", lambda: 1.0)
    assert not any(runs for _, runs, _ in what_runs(tmp_path))


@pytest.mark.parametrize(
    ("base", "profile", "job"),
    [
        ("dit-xl-2-256", "paper", "DiT-XL/2 256: the paper's whole experiment"),
        ("sd21", "paper", "Stable Diffusion 2.1 768: the paper's whole experiment"),
        ("sd21", "small-gpu", "Stable Diffusion 2.1 768: the same in less memory, profile `small-gpu`"),
        ("sdxl", "paper", "SDXL 1024: the paper's whole experiment"),
        ("sdxl", "small-gpu", "SDXL 1024: the same in less memory, profile `small-gpu`"),
    ],
)
def test_the_jobs_ask_for_what_their_profiles_expect(base: str, profile: str, job: str) -> None:
    (needs,), expected = [each for each in JOBS if each.name == job], load_profile(profile, base)
    assert (1_000 * needs.memory, 1_000 * needs.disk) == (expected.memory_mib, expected.disk_mib)
    assert needs.weights is not None and needs.weights[0] == KNOWN_BASES[base].source


def test_libraries_of_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        return ["torch==0.1", "numpy>=1", "no-such-library==2", "pytest==1; extra == 'dev'"]

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    first, second = version_differences()
    assert first == f"torch is {importlib.metadata.version('torch')}, tested with ==0.1"
    assert second == "no-such-library is not installed, tested with ==2"
