"""Where guidance decides the image: against unguided and guided sampling themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agd_lib import CFG, Unguided
from agd_lib.base_models import DiTBase
from agd_lib.errors import StoreError
from agd_lib.influence import INFLUENCE, _checksum, endpoint_influence, influence_of
from agd_lib.sampling import sample, sample_seed
from agd_lib.storage import write_tensors
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect


@pytest.fixture
def store(dit_base: DiTBase, tmp_path: Path) -> TrajectoryStore:
    plan = CollectionPlan((3, 1), 4, guidance_range=(2.0, 6.0), num_inference_steps=5, steps_per_trajectory=2)
    return collect(dit_base, plan, tmp_path / "store", progress=False)


def endpoints(base: DiTBase, guidance: CFG | Unguided) -> torch.Tensor:
    seeds = [sample_seed(7, i) for i in range(4)]
    *_, last = sample(base, base.encode([3, 1, 3, 1]), guidance, 5, seeds=seeds)
    return last.next_latents


def test_one_range_is_the_distance_between_unguided_and_guided(dit_base: DiTBase, store: TrajectoryStore) -> None:
    measured = endpoint_influence(dit_base, store, num_bins=1, num_samples=4, seed=7)
    distance = (endpoints(dit_base, Unguided()) - endpoints(dit_base, CFG(4.0))).square().mean()
    torch.testing.assert_close(measured, distance[None], rtol=1e-4, atol=0)
    assert distance > 0


def test_ranges_that_the_sampler_never_visits_have_none(dit_base: DiTBase, store: TrajectoryStore) -> None:
    """Five steps visit timesteps 0, 200, 400, 600 and 800."""
    influence = endpoint_influence(dit_base, store, num_bins=10, num_samples=4)
    assert (influence > 0).tolist() == [True, False] * 5


def test_batches_do_not_matter(dit_base: DiTBase, store: TrajectoryStore) -> None:
    together, apart = (
        endpoint_influence(dit_base, store, num_bins=5, num_samples=3, batch_size=size) for size in (3, 1)
    )
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=0)


def test_it_is_kept_with_the_store_and_a_damaged_file_is_named(dit_base: DiTBase, store: TrajectoryStore) -> None:
    first = influence_of(dit_base, store)
    assert (store.folder / INFLUENCE).is_file()
    assert torch.equal(influence_of(dit_base, TrajectoryStore(store.folder)), first)
    for wrong in (-first, first * float("nan"), torch.empty(0)):
        write_tensors(store.folder / INFLUENCE, {"influence": wrong, "sha256": _checksum(wrong)})
        with pytest.raises(StoreError, match="does not hold one finite number"):
            influence_of(dit_base, store)
    for other in ({"influence": first}, {"influence": first * 1.001, "sha256": _checksum(first)}, {"other": first}):
        write_tensors(store.folder / INFLUENCE, other)
        with pytest.raises(StoreError, match="its checksum differs"):
            influence_of(dit_base, store)
    (store.folder / INFLUENCE).write_bytes(b"\x00" * 20)
    with pytest.raises(StoreError, match="influence"):
        influence_of(dit_base, store)
