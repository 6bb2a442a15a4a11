"""Collection side by side against one trajectory at a time, and reading against one file per item: ``make bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_turn import Rows, compare
from small_stores import random_states, write_store

from agd_lib.base_models import load_base
from agd_lib.project import DATA
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect_batch


def test_collection(benchmark: Any, store_comparisons: Rows) -> None:
    """32 trajectories of tiny-dit side by side, against the same ones one after another."""
    if not (DATA / "tiny-dit" / "model_index.json").is_file():
        pytest.skip("data/tiny-dit is not there")
    base = load_base("tiny-dit")
    plan = CollectionPlan(tuple(base.all_conditions()), 32, num_inference_steps=10)
    compare(
        benchmark,
        store_comparisons,
        "collection on tiny-dit",
        "recorded states/s",
        320,
        lambda: collect_batch(base, plan, range(32)),
        lambda: [collect_batch(base, plan, [index]) for index in range(32)],
    )


@pytest.fixture(scope="module")
def sd21_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 states shaped as SD 2.1's at 768 x 768 with 50 prompts: as a store, and as one pickled file per item."""
    folder = tmp_path_factory.mktemp("sd21")
    rows, prompts = 400, 50
    columns = random_states(rows, (4, 96, 96), prompts)
    tokens = torch.randn(prompts, 77, 1024, generator=torch.Generator().manual_seed(1))
    write_store(folder, [columns], {"encoder_hidden_states": tokens})
    for index in range(rows):
        torch.save({name: column[index].clone() for name, column in columns.items()}, folder / f"item-{index}.pt")
    for index in range(prompts):
        torch.save(tokens[index].clone(), folder / f"prompt-{index}.pt")
    return folder


def test_reading(benchmark: Any, store_comparisons: Rows, sd21_shaped: Path) -> None:
    """Random batches of 8, against a loader that opens one file per item and reads its prompt's file again."""
    store = TrajectoryStore(sd21_shaped)
    batches = torch.randperm(len(store), generator=torch.Generator().manual_seed(1))[:160].split(8)

    def file_per_item(indices: torch.Tensor) -> dict[str, torch.Tensor]:
        items = []
        for index in indices.tolist():
            item = torch.load(sd21_shaped / f"item-{index}.pt", weights_only=True)
            prompt = torch.load(sd21_shaped / f"prompt-{int(item['condition'])}.pt", weights_only=True)
            items.append(item | {"encoder_hidden_states": prompt})
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return stacked | {name: stacked[name].float() for name in ("latents", "target")}

    theirs, ours = file_per_item(batches[0]), store.batch(batches[0])
    assert torch.equal(theirs["latents"], ours.latents)
    assert torch.equal(theirs["encoder_hidden_states"], ours.condition["encoder_hidden_states"])
    compare(
        benchmark,
        store_comparisons,
        "reading, shaped as SD 2.1",
        "states/s",
        160,
        lambda: [store.batch(indices) for indices in batches],
        lambda: [file_per_item(indices) for indices in batches],
    )
