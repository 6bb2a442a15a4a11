"""Algorithm 2: only the adapters learn, at the right rate, from the right states, and a resumed run is the same run."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agd_lib import storage, training
from agd_lib.attach import AdapterSet
from agd_lib.base_models import DiTBase, count_forwards, load_base
from agd_lib.errors import CheckpointError, StoreError
from agd_lib.influence import INFLUENCE, _checksum, influence_of
from agd_lib.storage import sha256, write_tensors
from agd_lib.training import (
    InfluenceOrder,
    Student,
    TrainingLog,
    TrainingSettings,
    TrainingState,
    batch_indices,
    scale_weights,
    state_errors,
    state_weights,
    timestep_weights,
    train,
)
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect, collect_batch

FILES = ("adapters.safetensors", "optimizer.safetensors", "training.json")
QUICK = TrainingSettings(num_steps=9, batch_size=8, learning_rate=1e-2, seed=3)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to a busy disk takes a tenth of a second each time; test_storage.py tests that it is done."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def a_plan(**changes: Any) -> CollectionPlan:
    values: dict[str, Any] = {
        "conditions": (0, 1, 2, 3, 4),
        "num_trajectories": 40,
        "num_inference_steps": 10,
        "steps_per_trajectory": 5,
        "trajectories_per_shard": 16,
    }
    return CollectionPlan(**(values | changes))


@pytest.fixture(scope="module")
def store(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryStore:
    """200 recorded states in three shards. Read only."""
    return collect(load_base(dit_folder), a_plan(), tmp_path_factory.mktemp("store"), progress=False)


def some_adapters(base: DiTBase, **changes: Any) -> AdapterSet:
    values: dict[str, Any] = {"kind": "offset", "hidden_size": 8}
    return AdapterSet.create(base, **(values | changes))


def run(
    folder: Path, store: TrajectoryStore, settings: TrainingSettings = QUICK, steps: int | None = None, **options: Any
) -> tuple[AdapterSet, list[TrainingState]]:
    """Train in a fresh base model for ``steps`` steps (None: to the end), then close the generator."""
    base = load_base(folder)
    assert isinstance(base, DiTBase)
    adapters = some_adapters(base, **options.pop("adapters", {}))
    training = train(base, adapters, store, settings, **options)
    states = list(itertools.islice(training, steps))
    training.close()
    return adapters, states


# What is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["offset", "cross-attention", "modulated"])
def test_only_the_adapters_are_trained(dit_base: DiTBase, store: TrajectoryStore, kind: str) -> None:
    adapters = some_adapters(dit_base, kind=kind)
    base_before = {name: value.clone() for name, value in dit_base.denoiser.state_dict().items()}
    before = {name: value.clone() for name, value in adapters.named_parameters()}
    list(train(dit_base, adapters, store, QUICK))
    after = dit_base.denoiser.state_dict()
    assert after.keys() == base_before.keys()
    assert all(torch.equal(after[name], base_before[name]) for name in after)
    assert not any(p.requires_grad or p.grad is not None for p in dit_base.denoiser.parameters())
    unchanged = [name for name, value in adapters.named_parameters() if torch.equal(value, before[name])]
    assert not unchanged
    student = Student(dit_base, adapters)
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapters.parameters()}


def whole_error(base: DiTBase, adapters: AdapterSet, store: TrajectoryStore) -> float:
    batch = store.batch(torch.arange(len(store)))
    with torch.no_grad():
        prediction = Student(base, adapters)(batch.latents, batch.timestep, batch.condition, batch.guidance_scale)
    return float((prediction - batch.target).square().mean())


def test_the_error_of_a_few_states_falls_to_less_than_a_tenth(dit_base: DiTBase, tmp_path: Path) -> None:
    store = collect(dit_base, a_plan(num_trajectories=2, steps_per_trajectory=2), tmp_path, progress=False)
    adapters = some_adapters(dit_base, kind="modulated", hidden_size=32)
    before = whole_error(dit_base, adapters, store)
    assert math.isclose(before, float(store.column("signal").mean()), rel_tol=1e-2)  # untrained: the conditional model
    states = list(train(dit_base, adapters, store, TrainingSettings(num_steps=100, batch_size=4, learning_rate=1e-2)))
    assert whole_error(dit_base, adapters, store) < before / 10
    assert states[-1].loss < states[0].loss / 10


def test_the_first_loss_is_that_of_a_hand_computation(dit_base: DiTBase, store: TrajectoryStore) -> None:
    adapters = some_adapters(dit_base)
    with torch.no_grad():  # not the identity any more
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = store.batch(batch_indices(len(store), 8, 0, seed=3))
    adapters.attach(dit_base)
    predictions = []
    for row in range(8):  # one state at a time, by the transformer's own call
        with torch.no_grad(), adapters.guided_by(float(batch.guidance_scale[row])):
            output = dit_base.pipeline.transformer(
                batch.latents[row : row + 1],
                timestep=batch.timestep[row : row + 1],
                class_labels=batch.condition["class_labels"][row : row + 1],
            )
        predictions.append(output.sample[0, :4])
    errors = [float(((p - t) ** 2).mean()) for p, t in zip(predictions, batch.target)]
    first = next(train(dit_base, adapters, store, QUICK))
    assert first.step == 1
    assert math.isclose(first.loss, sum(errors) / 8, rel_tol=1e-4)
    torch.testing.assert_close(first.squared_error, torch.tensor(errors), rtol=1e-4, atol=1e-7)
    assert torch.equal(first.timestep, batch.timestep)


def test_the_weighted_loss_is_the_weighted_mean(dit_base: DiTBase, store: TrajectoryStore) -> None:
    settings = TrainingSettings(num_steps=3, batch_size=16, weighting="timestep")
    weights = timestep_weights(store)
    for state in train(dit_base, some_adapters(dit_base), store, settings):
        assert math.isclose(state.loss, float((weights[state.timestep] * state.squared_error).mean()), rel_tol=1e-5)
        assert not math.isclose(state.loss, float(state.squared_error.mean()), rel_tol=1e-2)


def test_the_endpoint_loss_weighs_by_noise_level_and_scale(dit_base: DiTBase, store: TrajectoryStore) -> None:
    settings = TrainingSettings(num_steps=3, batch_size=16, weighting="endpoint", seed=4)
    order = InfluenceOrder(store, influence_of(dit_base, store))
    for step, state in enumerate(train(dit_base, some_adapters(dit_base), store, settings)):
        rows = order.batch_indices(16, step, 4)
        assert torch.equal(store.column("timestep")[rows], state.timestep)
        weights = timestep_weights(store)[state.timestep] * scale_weights(store)[rows]
        assert math.isclose(state.loss, float((weights * state.squared_error).mean()), rel_tol=1e-5)


def test_scale_weights_ask_for_the_same_relative_accuracy(store: TrajectoryStore) -> None:
    weights, w = scale_weights(store), store.column("guidance_scale")
    assert float(weights.mean()) == pytest.approx(1) and weights.dtype == torch.float32
    torch.testing.assert_close(weights / weights[0], (1 + (w[0] - 1) ** 2) / (1 + (w - 1) ** 2))
    torch.testing.assert_close(state_weights(store, "none"), torch.ones(len(store)))


def test_training_continues_with_the_adapters_attached(dit_base: DiTBase, store: TrajectoryStore) -> None:
    adapters = some_adapters(dit_base)
    list(train(dit_base, adapters, store, QUICK))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = dit_base.denoise(latents, 500, dit_base.encode([1]))
        with adapters.guided_by(4.0):
            guided = dit_base.denoise(latents, 500, dit_base.encode([1]))
    assert not torch.equal(plain, guided)


# Learning rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(5_000, 500), (100, 10), (7, 1), (4, 0)])
def test_learning_rate_is_a_linear_warm_up_and_a_cosine(num_steps: int, warmup_steps: int) -> None:
    settings = TrainingSettings(num_steps=num_steps, learning_rate=1e-4)
    for step in range(num_steps):
        if step < warmup_steps:
            expected = 1e-4 * (step + 1) / warmup_steps
        else:
            expected = 1e-4 * math.cos(math.pi / 2 * (step - warmup_steps) / (num_steps - warmup_steps)) ** 2
        assert math.isclose(settings.learning_rate_at(step), expected, rel_tol=1e-9)
    rates = [settings.learning_rate_at(step) for step in range(num_steps)]
    assert max(rates) == 1e-4 and rates.index(1e-4) == max(0, warmup_steps - 1)
    assert settings.learning_rate_at(num_steps) < 1e-20


def test_warm_up_of_none_and_of_all_steps() -> None:
    assert TrainingSettings(num_steps=10, learning_rate=1.0, warmup=0.0).learning_rate_at(0) == 1.0
    whole = TrainingSettings(num_steps=10, learning_rate=1.0, warmup=1.0)
    assert [whole.learning_rate_at(step) for step in range(10)] == [(step + 1) / 10 for step in range(10)]


def test_the_optimiser_uses_that_rate(dit_base: DiTBase, store: TrajectoryStore) -> None:
    """Adam's first step moves every parameter with a gradient by the learning rate."""
    adapters = some_adapters(dit_base)
    settings = TrainingSettings(num_steps=100, batch_size=8, learning_rate=1e-3)
    before = {name: value.detach().clone() for name, value in adapters.named_parameters()}
    training = train(dit_base, adapters, store, settings)
    first = next(training)
    assert first.learning_rate == settings.learning_rate_at(0) == pytest.approx(1e-4)
    moved = [float((value.detach() - before[name]).abs().max()) for name, value in adapters.named_parameters()]
    assert max(moved) == pytest.approx(1e-4, rel=1e-2)
    assert [state.learning_rate for state in itertools.islice(training, 20)] == [
        settings.learning_rate_at(step) for step in range(1, 21)
    ]


def test_muon_moves_all_directions_of_a_matrix_alike(dit_base: DiTBase, store: TrajectoryStore) -> None:
    """Its first step is the gradient's orthogonal factor, as long as a step of Adam's; vectors are left to Adam."""
    adapters = some_adapters(dit_base)
    settings = TrainingSettings(num_steps=10, batch_size=8, learning_rate=1e-3, optimizer="muon")
    before = {name: value.detach().clone() for name, value in adapters.named_parameters()}
    next(train(dit_base, adapters, store, settings))
    seen = set()
    for name, value in adapters.named_parameters():
        step = (before[name] - value.detach()) / 1e-3
        if not step.any():  # the last projections are zero: the others have no gradient yet
            continue
        seen.add(value.ndim)
        if value.ndim == 2:
            lengths = torch.linalg.svdvals(step) / (0.2 * math.sqrt(max(step.shape)))
            assert lengths.median() > 0.6 and lengths.max() < 1.3, (
                name
            )  # short only where the gradient has next to nothing
        else:
            assert float(step.abs().max()) == pytest.approx(1, rel=1e-2), name
    assert seen == {1, 2}


def test_long_gradients_are_scaled_down_and_short_ones_left(
    dit_base: DiTBase, store: TrajectoryStore, tmp_path: Path
) -> None:
    gradients = {}
    for max_grad_norm in (None, 1e-6, 1e6):
        adapters = some_adapters(dit_base)
        settings = TrainingSettings(batch_size=8, max_grad_norm=max_grad_norm)
        next(train(dit_base, adapters, store, settings, tmp_path / str(max_grad_norm), checkpoint_every=1))
        moments = load_file(tmp_path / str(max_grad_norm) / "step-0000001" / "optimizer.safetensors")
        first = [10 * moment.flatten() for name, moment in sorted(moments.items()) if name.startswith("exp_avg.")]
        gradients[max_grad_norm] = torch.cat(first)  # Adam's first moment after a step: a tenth of the gradient
        adapters.remove()
    assert float(gradients[None].norm()) > 1e-5
    assert torch.equal(gradients[1e6], gradients[None])
    expected = 1e-6 * gradients[None] / gradients[None].norm()
    torch.testing.assert_close(gradients[1e-6], expected, rtol=0.2, atol=0)  # torch adds 1e-6 to the norm
    assert float(gradients[1e-6].norm()) <= 1e-6


def test_the_papers_settings_are_the_defaults() -> None:
    settings = TrainingSettings()
    assert settings.max_grad_norm is None
    assert (settings.num_steps, settings.batch_size, settings.learning_rate) == (5_000, 64, 1e-4)
    assert (settings.warmup, settings.weighting, settings.optimizer) == (0.1, "none", "adam")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"warmup": 1.5},
        {"warmup": math.nan},
        {"weighting": "snr"},
        {"optimizer": "sgd"},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.nan},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TrainingSettings(**changes)


# Which states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_states", "batch_size"), [(30, 6), (30, 7), (30, 30), (5, 64), (1, 3)])
def test_every_state_is_read_once_an_epoch(num_states: int, batch_size: int) -> None:
    steps = math.ceil(3 * num_states / batch_size)
    batches = [batch_indices(num_states, batch_size, step, seed=1) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    sequence = torch.cat(batches).tolist()
    for epoch in range(3):
        assert sorted(sequence[epoch * num_states : (epoch + 1) * num_states]) == list(range(num_states))


def test_epochs_and_seeds_are_shuffled_differently_and_steps_do_not_depend_on_each_other() -> None:
    first, second = batch_indices(30, 30, 0, 1).tolist(), batch_indices(30, 30, 1, 1).tolist()
    assert first != second != sorted(second) and first != batch_indices(30, 30, 0, 2).tolist()
    torch.manual_seed(123)
    assert batch_indices(30, 30, 1, 1).tolist() == second
    in_sixes = torch.cat([batch_indices(30, 6, step, 1) for step in range(10)]).tolist()
    in_fours = torch.cat([batch_indices(30, 4, step, 1) for step in range(15)]).tolist()
    assert in_sixes == in_fours == first + second  # one endless sequence, cut into batches


class FakeStore:
    """A store's columns alone."""

    def __init__(self, timestep: torch.Tensor, signal: torch.Tensor, total: int = 1000) -> None:
        self.columns = {"timestep": timestep, "signal": signal}
        self.manifest = {"num_train_timesteps": total}

    def column(self, name: str) -> torch.Tensor:
        return self.columns[name]


def weights_of(timestep: torch.Tensor, signal: torch.Tensor, num_bins: int = 20, total: int = 1000) -> torch.Tensor:
    return timestep_weights(FakeStore(timestep, signal, total), num_bins)  # type: ignore[arg-type]


def test_equal_signals_have_weight_one() -> None:
    timestep = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights_of(timestep, torch.full((300,), 0.02)), torch.ones(1000))


def test_no_signal_at_all_has_weight_one() -> None:
    assert torch.equal(weights_of(torch.arange(1000), torch.zeros(1000)), torch.ones(1000))


def test_weights_are_inverse_to_the_mean_signal_of_their_bin() -> None:
    timestep = torch.tensor([0, 10, 49, 60, 70, 990])  # bins 0, 0, 0, 1, 1, 19 of 50 timesteps each
    weights = weights_of(timestep, torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 0.5]))
    mean = torch.tensor([2.0, 2.0, 2.0, 4.0, 4.0, 0.5])
    expected = (1 / mean) / (1 / mean).mean()
    torch.testing.assert_close(weights[timestep], expected)
    assert weights.shape == (1000,) and weights.dtype == torch.float32
    assert bool((weights[:50] == weights[0]).all()) and bool((weights[50:100] == weights[50]).all())
    assert weights[0] != weights[50]


def test_weights_have_mean_one_over_the_store_and_make_noise_levels_count_alike(store: TrajectoryStore) -> None:
    weights, timestep, signal = timestep_weights(store), store.column("timestep"), store.column("signal")
    assert float(weights[timestep].double().mean()) == pytest.approx(1, rel=1e-5)
    sums = {t: float((weights[t] * signal[timestep == t]).mean()) for t in timestep.unique().tolist()}
    assert max(sums.values()) == pytest.approx(min(sums.values()), rel=1e-3)
    plain = [float(signal[timestep == t].mean()) for t in sums]
    assert max(plain) > 1.5 * min(plain)


def test_half_of_the_states_are_drawn_as_often_as_their_range_moves_the_endpoint() -> None:
    timestep = torch.randint(0, 750, (400,), generator=torch.Generator().manual_seed(1))  # none in the last range
    store = FakeStore(timestep, torch.ones(400))
    order = InfluenceOrder(store, torch.tensor([0.0, 1.0, 3.0, 9.0]))  # type: ignore[arg-type]
    drawn = torch.cat([order.batch_indices(100, step, seed=4) for step in range(200)])
    counts = torch.bincount(timestep[drawn] // 250, minlength=4).double()
    expected = torch.tensor([0 / 4, 1 / 4, 3 / 4, 0]) / 2 + torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]) / 2
    torch.testing.assert_close(counts / len(drawn), expected.double(), rtol=0.05, atol=0)
    torch.testing.assert_close(order.odds, expected.double())
    per_state = torch.bincount(drawn[timestep[drawn] >= 500], minlength=400)[timestep >= 500].double()
    assert per_state.min() > 0.5 * per_state.mean() and per_state.max() < 1.5 * per_state.mean()
    assert torch.equal(order.batch_indices(100, 7, 4), order.batch_indices(100, 7, 4))
    assert not torch.equal(order.batch_indices(100, 7, 4), order.batch_indices(100, 8, 4))
    assert not torch.equal(order.batch_indices(100, 7, 4), order.batch_indices(100, 7, 5))
    with pytest.raises(ValueError, match="moves the endpoint nowhere"):
        InfluenceOrder(store, torch.tensor([0.0, 0.0, 0.0, 1.0]))  # type: ignore[arg-type]


def test_endpoint_weighting_measures_the_influence_once_and_keeps_it(dit_base: DiTBase, tmp_path: Path) -> None:
    store = collect(dit_base, a_plan(), tmp_path / "store", progress=False)
    settings = TrainingSettings(num_steps=2, batch_size=16, weighting="endpoint")
    adapters = some_adapters(dit_base)
    with count_forwards(dit_base) as first:
        states = list(train(dit_base, adapters, store, settings))
    adapters.remove()
    with count_forwards(dit_base) as second:
        again = list(train(dit_base, some_adapters(dit_base), TrajectoryStore(store.folder), settings))
    assert second.samples == 2 * 16 < first.samples
    assert [state.loss for state in states] == [state.loss for state in again]


def test_a_run_does_not_go_on_with_another_influence(dit_base: DiTBase, tmp_path: Path) -> None:
    store = collect(dit_base, a_plan(), tmp_path / "store", progress=False)
    settings = TrainingSettings(num_steps=4, batch_size=16, weighting="endpoint")
    adapters = some_adapters(dit_base)
    list(itertools.islice(train(dit_base, adapters, store, settings, tmp_path / "run", checkpoint_every=2), 2))
    adapters.remove()
    other = influence_of(dit_base, store) * 2
    write_tensors(store.folder / INFLUENCE, {"influence": other, "sha256": _checksum(other)})
    with pytest.raises(CheckpointError, match="another influence"):
        list(train(dit_base, some_adapters(dit_base), store, settings, tmp_path / "run"))


def test_a_bin_almost_without_signal_does_not_take_over() -> None:
    weights = weights_of(torch.tensor([10, 510]), torch.tensor([1.0, 1e-12]), num_bins=2)
    assert float(weights[510] / weights[10]) == pytest.approx(2000, rel=1e-3)  # bounded at a thousandth of the mean


# Resuming ----------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> dict[str, bytes]:
    return {name: (folder / f"step-{step:07d}" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def uninterrupted(dit_folder: Path, store: TrajectoryStore, tmp_path_factory: Any) -> tuple[Path, list[TrainingState]]:
    """Nine steps, checkpoints at 4, 8 and 9."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    _, states = run(dit_folder, store, checkpoints=folder, checkpoint_every=4)
    return folder, states


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6, 8, 9])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, tmp_path: Path, stop_after: int
) -> None:
    folder, states = uninterrupted
    run(dit_folder, store, steps=stop_after, checkpoints=tmp_path, checkpoint_every=4)
    # other initial weights: everything must come from the checkpoint
    changes = {"seed": 99} if stop_after >= 4 else {}
    adapters, resumed = run(dit_folder, store, checkpoints=tmp_path, checkpoint_every=4, adapters=changes)
    begun = 9 if stop_after == 9 else 4 * (stop_after // 4)
    assert [state.step for state in resumed] == list(range(begun + 1, 10))
    assert [state.loss for state in resumed] == [state.loss for state in states[begun:]]
    assert checkpoint(tmp_path, 9) == checkpoint(folder, 9)
    final = load_file(tmp_path / "step-0000009" / "adapters.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in adapters.state_dict().items())


@pytest.mark.parametrize("kind", ["offset", "modulated"])
def test_a_resumed_run_with_muon_is_the_uninterrupted_run_to_the_bit(
    dit_folder: Path, store: TrajectoryStore, tmp_path: Path, kind: str
) -> None:
    settings = replace(QUICK, optimizer="muon")
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", {"kind": kind}
    _, states = run(dit_folder, store, settings, checkpoints=whole, checkpoint_every=4, adapters=options)
    run(dit_folder, store, settings, steps=6, checkpoints=parts, checkpoint_every=4, adapters=options)
    _, resumed = run(
        dit_folder, store, settings, checkpoints=parts, checkpoint_every=4, adapters=options | {"seed": 99}
    )
    assert [state.loss for state in resumed] == [state.loss for state in states[4:]]
    assert checkpoint(parts, 9) == checkpoint(whole, 9)
    moments = load_file(whole / "step-0000009" / "optimizer.safetensors")
    weights = dict(some_adapters(load_base(dit_folder), **options).named_parameters())  # type: ignore[arg-type]
    for key, dimensions in (("momentum_buffer", {2}), ("exp_avg", {0, 1, 3})):
        kept = {name.removeprefix(f"{key}.") for name in moments if name.startswith(f"{key}.")}
        assert kept == {name for name, weight in weights.items() if weight.ndim in dimensions}


def test_checkpoints_do_not_change_training(dit_folder: Path, store: TrajectoryStore, uninterrupted: Any) -> None:
    _, states = run(dit_folder, store)
    assert [state.loss for state in states] == [state.loss for state in uninterrupted[1]]


def test_the_newest_two_checkpoints_are_kept(dit_folder: Path, store: TrajectoryStore, tmp_path: Path) -> None:
    run(dit_folder, store, checkpoints=tmp_path, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000008", "step-0000009"]
    assert sorted(path.name for path in (tmp_path / "step-0000009").iterdir()) == sorted(FILES)


def test_an_old_checkpoint_that_a_killed_run_was_about_to_remove_is_removed(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_removed(path: Path) -> None:
        if path.name == "step-0000004":
            (path / "adapters.safetensors").unlink()
            raise KeyboardInterrupt
        storage.remove(path)

    monkeypatch.setattr(training, "remove", half_removed)
    with pytest.raises(KeyboardInterrupt):
        run(dit_folder, store, checkpoints=tmp_path, checkpoint_every=4)
    assert (tmp_path / "step-0000004").exists()
    monkeypatch.undo()
    run(dit_folder, store, checkpoints=tmp_path, checkpoint_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000008", "step-0000009"]
    assert checkpoint(tmp_path, 9) == checkpoint(uninterrupted[0], 9)


def test_the_optimiser_has_its_moments_in_the_checkpoint(uninterrupted: Any) -> None:
    moments = load_file(uninterrupted[0] / "step-0000009" / "optimizer.safetensors")
    weights = load_file(uninterrupted[0] / "step-0000009" / "adapters.safetensors")
    trained = {name.removeprefix("exp_avg.") for name in moments if name.startswith("exp_avg.")}
    assert trained and trained <= weights.keys()
    assert all(float(moments[f"step.{name}"]) == 9 for name in trained)
    assert all(moments[f"exp_avg_sq.{name}"].shape == weights[name].shape for name in trained)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    values = bytearray(path.read_bytes())
    values[-1] ^= 1
    path.write_bytes(values)


def edit(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated adapters": ("adapters.safetensors", cut),
    "flipped adapters": ("adapters.safetensors", flip),
    "flipped optimiser": ("optimizer.safetensors", flip),
    "missing optimiser": ("optimizer.safetensors", Path.unlink),
    "missing record": ("training.json", Path.unlink),
    "truncated record": ("training.json", cut),
    "edited step": ("training.json", edit(step=7)),
    "edited step to text": ("training.json", edit(step="8")),
    "no checksums": ("adapters.safetensors", lambda path: edit(sha256={})(path.with_name("training.json"))),
    "checksums of text": ("adapters.safetensors", lambda path: edit(sha256="none")(path.with_name("training.json"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    name, harm = DAMAGES[damage]
    newest = tmp_path / "run" / "step-0000009"
    harm(newest / name)
    with pytest.raises(CheckpointError, match=f"step-0000009/{name}"):
        run(dit_folder, store, checkpoints=tmp_path / "run")
    if damage == "flipped adapters":  # the way out that the message names
        shutil.rmtree(newest)
        run(dit_folder, store, checkpoints=tmp_path / "run", checkpoint_every=4)
        assert checkpoint(tmp_path / "run", 9) == checkpoint(uninterrupted[0], 9)


def rename_first(tensors: dict[str, torch.Tensor]) -> None:
    tensors["nobody"] = tensors.pop(next(iter(tensors)))


def cut_first(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, value in tensors.items() if value.ndim)
    tensors[name] = tensors[name][:1].clone()


def halve_all(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: value.double() for name, value in tensors.items()}


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("adapters.safetensors", rename_first),
        ("adapters.safetensors", cut_first),
        ("optimizer.safetensors", rename_first),
        ("optimizer.safetensors", cut_first),
        ("optimizer.safetensors", halve_all),
        ("optimizer.safetensors", drop_one),
        ("optimizer.safetensors", dict.clear),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_whatever_its_checksums_say(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, tmp_path: Path, name: str, harm: Any
) -> None:
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    newest = tmp_path / "run" / "step-0000009"
    tensors = load_file(newest / name)
    harm(tensors)
    save_file(tensors, newest / name)
    checksums = json.loads((newest / "training.json").read_text())["sha256"]
    edit(sha256=checksums | {name: sha256(newest / name)})(newest / "training.json")
    with pytest.raises(CheckpointError, match=r"step-0000009 holds .* of other adapters: remove it"):
        run(dit_folder, store, checkpoints=tmp_path / "run")


def test_a_checkpoint_that_is_a_link_is_refused(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-0000009").symlink_to(uninterrupted[0] / "step-0000009")
    with pytest.raises(CheckpointError, match="step-0000009 is a link"):
        run(dit_folder, store, checkpoints=tmp_path / "run")


def test_a_run_in_another_precision_is_not_continued(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(dit_folder, dtype=torch.bfloat16)
    monkeypatch.setitem(store.manifest, "base_fingerprint", base.fingerprint())
    with pytest.raises(CheckpointError, match=r"is of a run with another .*precision; continue"):
        next(train(base, some_adapters(base), store, QUICK, uninterrupted[0]))


@pytest.mark.parametrize(
    ("settings", "adapters", "message"),
    [
        ({"num_steps": 10}, {}, "settings.num_steps"),
        ({"batch_size": 4}, {}, "settings.batch_size"),
        ({"learning_rate": 1e-3}, {}, "settings.learning_rate"),
        ({"warmup": 0.2}, {}, "settings.warmup"),
        ({"weighting": "timestep"}, {}, "settings.weighting"),
        ({"optimizer": "muon"}, {}, "settings.optimizer"),
        ({"seed": 4}, {}, "settings.seed"),
        ({}, {"kind": "modulated"}, "adapters.kind"),
        ({}, {"hidden_size": 16}, "adapters.hidden_size"),
        ({}, {"use_timestep": False}, "adapters.timestep_dim"),
        ({}, {"use_condition": False}, "adapters.class_dim"),
        ({}, {"scale_multiplier": 1000.0}, "adapters.scale_multiplier"),
    ],
)
def test_another_run_is_not_continued(
    dit_folder: Path, store: TrajectoryStore, uninterrupted: Any, settings: Any, adapters: Any, message: str
) -> None:
    values = {"num_steps": 9, "batch_size": 8, "learning_rate": 1e-2, "seed": 3} | settings
    before = checkpoint(uninterrupted[0], 9)
    with pytest.raises(CheckpointError, match=rf"is of a run with another {message}; continue"):
        run(dit_folder, store, TrainingSettings(**values), checkpoints=uninterrupted[0], adapters=adapters)
    assert checkpoint(uninterrupted[0], 9) == before


def test_a_run_on_another_store_is_not_continued(dit_folder: Path, uninterrupted: Any, tmp_path: Path) -> None:
    other = collect(load_base(dit_folder), a_plan(seed=1), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="is of a run with another store"):
        run(dit_folder, other, checkpoints=uninterrupted[0])


# What is refused ---------------------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused(dit_base: DiTBase, tmp_path: Path, monkeypatch: Any) -> None:
    calls = 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return collect_batch(*args)

    monkeypatch.setattr("agd_lib.trajectories.collect_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        collect(dit_base, a_plan(), tmp_path, progress=False)
    with pytest.raises(StoreError, match=r"is unfinished: run collect\(\) on it again"):
        next(train(dit_base, some_adapters(dit_base), TrajectoryStore(tmp_path), QUICK))


def test_another_base_model_is_refused(dit_base: DiTBase, store: TrajectoryStore) -> None:
    with torch.no_grad():
        next(dit_base.denoiser.parameters()).mul_(1.01)
    with pytest.raises(StoreError, match="was collected with five-classes"):
        next(train(dit_base, some_adapters(dit_base), store, QUICK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_range": (1.0, 5.0)}, r"guidance range \[1.0, 6.0\], the adapters are made for \(1.0, 5.0\)"),
        ({"guided_channels": 3}, "with 4 guided channels, the adapters are made for 3"),
    ],
)
def test_adapters_for_another_teacher_are_refused(
    dit_base: DiTBase, store: TrajectoryStore, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        next(train(dit_base, some_adapters(dit_base, **changes), store, QUICK))


def test_no_checkpoint_every_zero_steps(dit_base: DiTBase, store: TrajectoryStore) -> None:
    with pytest.raises(ValueError, match="checkpoint every 0 steps"):
        next(train(dit_base, some_adapters(dit_base), store, QUICK, checkpoint_every=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_names_step_and_checkpoint(
    dit_base: DiTBase, store: TrajectoryStore, tmp_path: Path, bad: float
) -> None:
    adapters = some_adapters(dit_base)
    training = train(dit_base, adapters, store, QUICK, checkpoints=tmp_path, checkpoint_every=2)
    states = list(itertools.islice(training, 2))
    with torch.no_grad():
        next(adapters.parameters()).fill_(bad)
    with pytest.raises(CheckpointError, match=r"the loss at step 3 is (nan|inf).*step-0000002"):
        next(training)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002"]
    good = load_file(tmp_path / "step-0000002" / "adapters.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in good.values())
    assert len(states) == 2 and math.isfinite(states[-1].loss)


def test_a_bad_loss_without_checkpoints_says_that_none_was_kept(dit_base: DiTBase, store: TrajectoryStore) -> None:
    adapters = some_adapters(dit_base)
    with torch.no_grad():
        next(adapters.parameters()).fill_(math.nan)
    with pytest.raises(CheckpointError, match=r"the loss at step 1 is nan.*none was kept"):
        next(train(dit_base, adapters, store, QUICK))


def test_weights_that_are_no_numbers_are_not_kept(dit_base: DiTBase, store: TrajectoryStore, tmp_path: Path) -> None:
    adapters = some_adapters(dit_base)
    training = train(dit_base, adapters, store, QUICK, checkpoints=tmp_path, checkpoint_every=1)
    next(training)
    next(adapters.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(CheckpointError, match=r"after step 2 the adapters hold NaN.*step-0000001"):
        next(training)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_the_last_step_is_looked_at_without_checkpoints_too(dit_base: DiTBase, store: TrajectoryStore) -> None:
    adapters = some_adapters(dit_base)
    training = train(dit_base, adapters, store, replace(QUICK, num_steps=1))
    next(adapters.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(CheckpointError, match=r"after step 1 the adapters hold NaN.*none was kept"):
        next(training)


def test_the_states_of_a_bad_loss_are_named(dit_base: DiTBase, store: TrajectoryStore, monkeypatch: Any) -> None:
    one, *_ = batch_indices(len(store), QUICK.batch_size, 0, QUICK.seed).tolist()
    whole = TrajectoryStore.batch

    def spoilt(self: TrajectoryStore, indices: torch.Tensor) -> Any:
        batch = whole(self, indices)
        batch.target[indices == one] = math.nan
        return batch

    monkeypatch.setattr(TrajectoryStore, "batch", spoilt)
    with pytest.raises(CheckpointError, match=rf"the store's states \[{one}\]"):
        next(train(dit_base, some_adapters(dit_base), store, QUICK))


def test_a_store_smaller_than_a_batch_trains(dit_base: DiTBase, tmp_path: Path) -> None:
    plan = a_plan(num_trajectories=1, num_inference_steps=3, steps_per_trajectory="all")
    small = collect(dit_base, plan, tmp_path, batch_size=64, progress=False)
    settings = TrainingSettings(num_steps=2, batch_size=8)
    states = list(train(dit_base, some_adapters(dit_base), small, settings))
    counts = sorted(Counter(states[0].timestep.tolist()).values())
    assert counts == [2, 3, 3]


# Several processes -------------------------------------------------------------------------------------------------

WORKER = """
import json, sys
from accelerate.state import PartialState
from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import TrajectoryStore

base, processes = load_base(sys.argv[1]), PartialState(cpu=True)
adapters = AdapterSet.create(base, kind="offset", hidden_size=8)
settings = TrainingSettings(num_steps=50, batch_size=64, learning_rate=1e-3)
states = list(train(base, adapters, TrajectoryStore(sys.argv[2]), settings, checkpoints=sys.argv[3],
                    checkpoint_every=50))
assert processes.num_processes == 2
with open(f"{sys.argv[4]}-{processes.process_index}.json", "w") as file:
    json.dump({"loss": [state.loss for state in states], "rows": [len(state.timestep) for state in states]}, file)
try:
    next(train(base, adapters, TrajectoryStore(sys.argv[2]), TrainingSettings(batch_size=63)))
except ValueError as error:
    assert "63 for 2 processes" in str(error)
else:
    raise AssertionError("an odd batch was shared out between two processes")
"""


def test_two_processes_of_half_the_batch_equal_one_of_the_whole(
    dit_folder: Path, store: TrajectoryStore, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [tmp_path / "worker.py", dit_folder, store.folder, tmp_path / "checkpoints", tmp_path / "log"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    base = load_base(dit_folder)
    assert isinstance(base, DiTBase)
    adapters = some_adapters(base)
    start = {name: value.clone() for name, value in adapters.state_dict().items()}
    settings = TrainingSettings(num_steps=50, batch_size=64, learning_rate=1e-3)
    losses = [state.loss for state in train(base, adapters, store, settings)]
    logs = [json.loads((tmp_path / f"log-{rank}.json").read_text()) for rank in (0, 1)]
    assert logs[0]["rows"] == logs[1]["rows"] == [32] * 50
    for one, both in zip(losses, zip(logs[0]["loss"], logs[1]["loss"])):
        assert both[0] != both[1] and sum(both) / 2 == pytest.approx(one, rel=1e-4)
    together = load_file(tmp_path / "checkpoints" / "step-0000050" / "adapters.safetensors")
    for name, value in adapters.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)
    assert max(float((together[name] - start[name]).abs().max()) for name in start) > 2e-3  # it did learn


# What a notebook watches -------------------------------------------------------------------------------------------------


def test_doing_nothing_has_the_error_that_the_store_calls_signal(dit_base: DiTBase, store: TrajectoryStore) -> None:
    errors = state_errors(dit_base, some_adapters(dit_base), store, batch_size=37)
    signal = store.column("signal")
    assert errors.shape == signal.shape == (len(store),)
    assert torch.allclose(errors, signal, rtol=2e-2, atol=1e-5)  # targets are stored in float16


def test_training_lowers_the_error_on_the_recorded_states(dit_folder: Path, store: TrajectoryStore) -> None:
    adapters, _ = run(dit_folder, store, TrainingSettings(num_steps=40, batch_size=32, learning_rate=1e-2))
    adapters.remove()
    assert state_errors(load_base(dit_folder), adapters, store).mean() < 0.9 * store.column("signal").mean()


def test_a_training_log_is_read_back_whole(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.safetensors")
    assert log.losses == {} and log.snapshots == {}
    log.losses |= {1: 0.1, 2: 1 / 3, 10: 1e-9}
    log.snapshots |= {0: torch.zeros(2, 3), 10: torch.arange(4.0)}
    log.save()
    again = TrainingLog(tmp_path / "log.safetensors")
    assert again.losses == log.losses
    assert again.snapshots.keys() == {0, 10} and torch.equal(again.snapshots[10], torch.arange(4.0))
    (tmp_path / "log.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="training log"):
        TrainingLog(tmp_path / "log.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"loss": torch.zeros(3)}, "has no steps and losses"),
        ({"loss": torch.zeros(3), "step": torch.tensor(3)}, "has no steps and losses"),
        ({"loss": torch.zeros(3), "step": torch.arange(2)}, "has no steps and losses"),
        ({"loss": torch.zeros(3), "step": torch.arange(3), "snapshot.x": torch.zeros(1)}, "holds 'snapshot.x'"),
        ({"loss": torch.zeros(3), "step": torch.arange(3), "weights": torch.zeros(1)}, "holds 'weights'"),
    ],
)
def test_a_training_log_of_other_tensors_is_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    save_file(tensors, tmp_path / "log.safetensors")
    with pytest.raises(CheckpointError, match=message):
        TrainingLog(tmp_path / "log.safetensors")
