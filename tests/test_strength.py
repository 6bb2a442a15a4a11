"""What adapters lack of the guidance's strength: against its definition, and against the schedule that it amounts to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomise

from agd_lib import AGD, AdapterSet, CollectionPlan, TrainingSettings, collect, load_base, train
from agd_lib.adapters import ADAPTERS
from agd_lib.attach import CONFIG_NAME
from agd_lib.base_models import DiTBase
from agd_lib.errors import AdapterError
from agd_lib.evaluation import Reference, _inputs
from agd_lib.project import DATA
from agd_lib.sampling import endpoint, sample
from agd_lib.strength import MAX_GAIN, strength_gains
from agd_lib.trajectories import TrajectoryStore

KINDS = list(ADAPTERS)


def trained(base: DiTBase, kind: str) -> AdapterSet:
    """Adapters with random weights, as if trained."""
    adapters = AdapterSet.create(base, kind, hidden_size=8, guidance_range=(1.0, 6.0))
    randomise(adapters, 3)
    return adapters


@pytest.fixture
def store(dit_base: DiTBase, tmp_path: Path) -> TrajectoryStore:
    """Six trajectories of five steps, at timesteps 0, 200, 400, 600 and 800."""
    plan = CollectionPlan((0, 1, 2), 6, (1.0, 6.0), num_inference_steps=5, dtype="float32")
    return collect(dit_base, plan, tmp_path / "store", progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gains_by_their_definition(dit_base: DiTBase, store: TrajectoryStore, kind: str) -> None:
    adapters = trained(dit_base, kind)
    for parameter in adapters.parameters():
        parameter.data.mul_(2.0)
    found = strength_gains(dit_base, adapters, store, 1.0, num_ranges=5, batch_size=7)
    adapters.remove()
    guidance, added = torch.zeros(5), torch.zeros(5)
    for index in range(len(store)):
        state = store.batch(torch.tensor([index]))
        with torch.no_grad():
            conditional = dit_base.denoise(state.latents, state.timestep, state.condition)
            with adapters.attach(dit_base).guided_by(state.guidance_scale):
                prediction = dit_base.denoise(state.latents, state.timestep, state.condition)
            adapters.remove()
        place, weight = int(state.timestep) // 200, 1 / (1 + (float(state.guidance_scale) - 1) ** 2)
        guidance[place] += weight * (state.target - conditional).square().mean()
        added[place] += weight * (prediction - conditional).square().mean()
    expected = (guidance / added).sqrt()
    assert found == pytest.approx(expected.clamp(max=MAX_GAIN).tolist(), rel=1e-3)
    assert min(expected) < MAX_GAIN


def test_where_there_are_no_states_nothing_is_changed_and_the_weak_are_not_asked_for_ever_more(
    dit_base: DiTBase, store: TrajectoryStore
) -> None:
    adapters = trained(dit_base, "modulated")
    for parameter in adapters.parameters():
        parameter.data.mul_(0.05)
    assert strength_gains(dit_base, adapters, store, 1.0) == (2.0, 1.0) * 5
    adapters.remove()
    assert strength_gains(dit_base, adapters, store) == (2.0, 1.0) * 2 + (1.0,) * 6
    with pytest.raises(ValueError, match="below = 40"):
        strength_gains(dit_base, adapters, store, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_taken_for_one_and_the_gain_times_the_rest(dit_base: DiTBase, kind: str) -> None:
    """In a run, and in a batch of states at different noise levels."""
    gains = (1.5, 1.0, 0.5, 1.25)

    def schedule(timestep: int) -> float:
        return 1 + 2.0 * gains[timestep * 4 // 1000]

    adapters = trained(dit_base, kind).attach(dit_base)
    condition, seeds = dit_base.encode([0, 3]), [1, 2]
    expected = endpoint(sample(dit_base, condition, AGD(adapters, schedule), 8, seeds=seeds))
    plain = endpoint(sample(dit_base, condition, AGD(adapters, 3.0), 8, seeds=seeds))
    latents, timesteps = torch.randn(2, *dit_base.latent_shape), torch.tensor([100, 600])
    with torch.no_grad(), adapters.guided_by(torch.tensor([schedule(100), schedule(600)])):
        states = dit_base.denoise(latents, timesteps, condition)
    adapters.config = replace(adapters.config, strength=gains)
    found = endpoint(sample(dit_base, condition, AGD(adapters, 3.0), 8, seeds=seeds))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    with torch.no_grad(), adapters.guided_by(torch.tensor([3.0, 3.0])):
        torch.testing.assert_close(dit_base.denoise(latents, timesteps, condition), states, rtol=1e-5, atol=1e-5)


def test_the_shipped_adapters_have_the_strength_that_they_lacked(tmp_path: Path) -> None:
    """At low noise what they add becomes at least twice as close to what guidance adds."""
    base = load_base("tiny-dit")
    plan = CollectionPlan(tuple(base.all_conditions()), 20, num_inference_steps=10, seed=5)
    store = collect(base, plan, tmp_path / "store", progress=False)
    adapters = AdapterSet.from_pretrained(DATA / "tiny-dit" / "adapters" / "modulated")
    adapters.config = replace(adapters.config, strength=())
    before = strength_gains(base, adapters, store)
    scaled = still_missing(base, adapters, store, before)
    assert min(before[:4]) > 1.15  # at low noise they guide too weakly
    for lacking, left in zip(before[:4], scaled[:4]):
        assert abs(left - 1) < 0.5 * abs(lacking - 1)


def still_missing(base: Any, adapters: AdapterSet, store: TrajectoryStore, gains: tuple[float, ...]) -> list[float]:
    """sqrt(E |g|^2 / E |d|^2) by noise level while the gains are in use, (10,)."""
    adapters.config = replace(adapters.config, strength=gains)
    guidance, added = torch.zeros(10), torch.zeros(10)
    with torch.no_grad():
        batch = store.batch(torch.arange(len(store)))
        with adapters.guided_by(batch.guidance_scale):
            prediction = base.denoise(batch.latents, batch.timestep, batch.condition)
        with adapters.disabled():
            conditional = base.denoise(batch.latents, batch.timestep, batch.condition)
    weights = 1 / (1 + (batch.guidance_scale - 1).square())
    places = batch.timestep // 100
    guidance.index_add_(0, places, weights * (batch.target - conditional).square().flatten(1).mean(dim=1))
    added.index_add_(0, places, weights * (prediction - conditional).square().flatten(1).mean(dim=1))
    return (guidance / added).sqrt().tolist()


def test_it_is_kept_with_the_adapters_and_older_ones_have_none(dit_base: DiTBase, tmp_path: Path) -> None:
    adapters = trained(dit_base, "offset")
    adapters.config = replace(adapters.config, strength=(1.5, 1.0))
    adapters.save_pretrained(tmp_path / "adapters")
    assert AdapterSet.from_pretrained(tmp_path / "adapters").config == adapters.config
    path = tmp_path / "adapters" / CONFIG_NAME
    config = json.loads(path.read_text())
    for wrong in ([-1.0], "strong", [1.0] * 1_001, [None], 2.0):
        path.write_text(json.dumps(config | {"strength": wrong}))
        with pytest.raises(AdapterError, match="is malformed: strength is"):
            AdapterSet.from_pretrained(tmp_path / "adapters")
    del config["strength"]
    path.write_text(json.dumps(config))
    assert AdapterSet.from_pretrained(tmp_path / "adapters").config.strength == ()


def test_restored_adapters_are_neither_trained_nor_restored_again(dit_base: DiTBase, store: TrajectoryStore) -> None:
    adapters = trained(dit_base, "offset")
    adapters.config = replace(adapters.config, strength=(1.5,))
    with pytest.raises(ValueError, match="train first, then restore"):
        next(train(dit_base, adapters, store, TrainingSettings(num_steps=1, batch_size=2)))
    with pytest.raises(ValueError, match="expected ones without"):
        strength_gains(dit_base, adapters, store)


def test_measurements_with_and_without_are_told_apart(dit_base: DiTBase) -> None:
    adapters = trained(dit_base, "offset")
    reference = Reference("four", torch.zeros(4), torch.eye(4), torch.zeros(9, 4))
    inputs = []
    for strength in ((), (1.5,), (1.25,)):
        adapters.config = replace(adapters.config, strength=strength)
        inputs.append(_inputs(dit_base, AGD(adapters, 2.0), reference, (1, 2, 3), 9, (None, None)))
    assert inputs[0] != inputs[1] != inputs[2] and "strength" not in inputs[0]
