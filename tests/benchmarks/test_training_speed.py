"""Training steps with the base in bfloat16, and compiled too, against plain ones in float32: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from in_turn import Rows, compare
from torch.nn.attention import SDPBackend, sdpa_kernel

from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.cycles import has_fast_bfloat16
from agd_lib.study import PLANS, training_conditions
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryBatch, TrajectoryStore, collect

BATCH, STEPS = 64, 5


def steps_of(name: str, store: TrajectoryStore, half: bool, compiled: bool) -> Callable[[], None]:
    """Takes :data:`STEPS` training steps of the modulated adapters whenever it is called.

    Args:
        half: the frozen base in bfloat16; else all in float32.
    """
    base, plan = load_base(name, dtype=torch.bfloat16 if half else torch.float32), PLANS[name]
    recipe = plan.recipes["modulated"]
    adapters = AdapterSet.create(
        base, "modulated", recipe.hidden_size, plan.guidance_range, noise_ranges=recipe.noise_ranges
    )
    if compiled:
        torch.compiler.reset()
        base.denoiser.compile(dynamic=False)
    states = train(base, adapters, store, TrainingSettings(10_000, BATCH), accelerator=Accelerator(cpu=True))

    def steps() -> None:
        attention = sdpa_kernel(SDPBackend.MATH) if half or compiled else nullcontext()
        with attention:
            for _ in range(STEPS):
                next(states)

    return steps


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", list(PLANS))
def test_training(benchmark: Any, store_comparisons: Rows, tmp_path: Path, name: str, compiled: bool) -> None:
    """Against float32 without compiling."""
    half = has_fast_bfloat16()
    if not half and not compiled:
        pytest.skip("this processor has no instructions for bfloat16")
    base, trajectories = load_base(name), 64
    conditions = training_conditions(base, trajectories)
    store = collect(base, CollectionPlan(conditions, trajectories, PLANS[name].guidance_range), tmp_path / "store")
    how = ("bfloat16" if half else "float32") + (", compiled" if compiled else "")
    compare(
        benchmark,
        store_comparisons,
        f"training on {name} in {how}",
        "states/s",
        BATCH * STEPS,
        steps_of(name, store, half, compiled),
        steps_of(name, store, half=False, compiled=False),
    )


class OneBatch(TrajectoryStore):
    """Gives the batch that it gave first to whoever asks for one: the store that training never waits for."""

    def batch(self, indices: torch.Tensor) -> TrajectoryBatch:
        if not hasattr(self, "first"):
            self.first = super().batch(indices)
        return self.first


@pytest.mark.parametrize("name", list(PLANS))
def test_reading_while_training(benchmark: Any, store_comparisons: Rows, tmp_path: Path, name: str) -> None:
    """Training that reads its batches from the store, against steps on one batch in memory: what is lost by waiting."""
    base, trajectories = load_base(name), 640
    conditions = training_conditions(base, trajectories)
    plan = CollectionPlan(conditions, trajectories, PLANS[name].guidance_range, num_inference_steps=5)
    store, half = collect(base, plan, tmp_path / "store"), has_fast_bfloat16()
    compare(
        benchmark,
        store_comparisons,
        f"training on {name}, its batches read (left: kept in memory)",
        "states/s",
        BATCH * STEPS,
        steps_of(name, store, half, compiled=True),
        steps_of(name, OneBatch(store.folder), half, compiled=True),
    )
