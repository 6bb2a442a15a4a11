"""Training steps, compiled as :mod:`agd_lib.study` takes them, against the same ones that are not: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from in_turn import Rows, compare
from torch.nn.attention import SDPBackend, sdpa_kernel

from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.cycles import has_fast_bfloat16
from agd_lib.project import DATA
from agd_lib.study import PLANS, training_conditions
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect

BATCH, STEPS = 64, 10


def steps_of(name: str, store: TrajectoryStore, compiled: bool) -> Callable[[], None]:
    """Takes :data:`STEPS` training steps of the modulated adapters whenever it is called."""
    base, plan = load_base(name), PLANS[name]
    recipe = plan.recipes["modulated"]
    adapters = AdapterSet.create(
        base, "modulated", recipe.hidden_size, plan.guidance_range, noise_ranges=recipe.noise_ranges
    )
    if compiled:
        base.denoiser.compile(dynamic=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if has_fast_bfloat16() else "no")
    states = train(base, adapters, store, TrainingSettings(10_000, BATCH, optimizer="muon"), accelerator=accelerator)

    def steps() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(STEPS):
                next(states)

    return steps


@pytest.mark.parametrize("name", list(PLANS))
def test_training(benchmark: Any, store_comparisons: Rows, tmp_path: Path, name: str) -> None:
    if not (DATA / name / "model_index.json").is_file():
        pytest.skip(f"data/{name} is not there")
    base, trajectories = load_base(name), 64
    conditions = training_conditions(base, trajectories)
    store = collect(base, CollectionPlan(conditions, trajectories, PLANS[name].guidance_range), tmp_path / "store")
    precision = "bfloat16" if has_fast_bfloat16() else "float32"
    compare(
        benchmark,
        store_comparisons,
        f"training on {name}, compiled ({precision})",
        "states/s",
        BATCH * STEPS,
        steps_of(name, store, compiled=True),
        steps_of(name, store, compiled=False),
    )
