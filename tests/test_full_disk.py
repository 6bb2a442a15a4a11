"""On a disk that is really full: the right error, nothing half-written, and the same bytes once there is room.

The disk is a file system of a few hundred kilobytes in memory; mounting one takes root's rights on Linux.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Pixels, reproduction, small_notebooks

from agd_lib import trajectories
from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.errors import AGDError, WriteError
from agd_lib.evaluation import Evaluation, Reference, RunningStatistics, evaluate
from agd_lib.guidance import CFG
from agd_lib.storage import write_json
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect, predicted_size

PLAN = CollectionPlan(
    conditions=(0, 1, 2), num_trajectories=12, num_inference_steps=6, trajectories_per_shard=4, dtype="float32"
)
"""Three shards of about 49 KiB."""


class SmallDisk:
    """A mounted file system with a ballast file that decides how much room is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ballast = path / "ballast"

    def leave(self, kibibytes: int) -> None:
        """Leave so much room."""
        self.make_room()
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        self.ballast.write_bytes(bytes(free - kibibytes * 1024))

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """4 MiB, or the test is skipped."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root's rights")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_small_file(small_disk: SmallDisk) -> None:
    write_json(small_disk.path / "value.json", {"number": 1})
    small_disk.leave(0)
    with pytest.raises(WriteError, match=r"value\.json.*No space left on device.*\(0 MiB free there\)"):
        write_json(small_disk.path / "value.json", {"text": "x" * 10_000})
    assert (small_disk.path / "value.json").read_text() == '{\n  "number": 1\n}\n'
    assert {path.name for path in small_disk.path.iterdir()} == {"value.json", "ballast"}


@pytest.mark.parametrize(("room", "shards"), [(0, None), (8, 0), (80, 1), (130, 2)])
def test_collection(
    dit_folder: Path,
    tmp_path: Path,
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    shards: int | None,
) -> None:
    """There was room when it began, and then another program took it."""
    monkeypatch.setattr(trajectories, "_check_room", lambda *args: None)
    base = load_base(dit_folder)
    assert 45 * 1024 < predicted_size(base, PLAN) / 3 < 50 * 1024
    undisturbed = tmp_path / "undisturbed"
    collect(base, PLAN, undisturbed, progress=False)
    folder = small_disk.path / "store"
    small_disk.leave(room)
    with pytest.raises(WriteError, match=r"No space left on device.*make room.*it resumes"):
        collect(base, PLAN, folder, progress=False)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if shards is None:
        assert names == []
    else:
        kept = [f"shard-{number:05d}.safetensors" for number in range(shards)]
        assert names == ["conditions.safetensors", "manifest.json", *kept]
        assert len(TrajectoryStore(folder).manifest["shards"]) == shards
    small_disk.make_room()
    collect(base, PLAN, folder, progress=False)
    assert everything(folder) == everything(undisturbed)


def test_a_store_that_will_not_fit_is_not_begun(dit_folder: Path, tmp_path: Path, small_disk: SmallDisk) -> None:
    base = load_base(dit_folder)
    folder = small_disk.path / "store"
    small_disk.leave(130)
    with pytest.raises(WriteError, match=r"will take 0\.14 MiB more, 0\.1. are free there: make room"):
        collect(base, PLAN, folder, progress=False)
    assert not folder.exists()  # so that another plan may take its place
    small_disk.make_room()
    collect(base, PLAN, folder, progress=False)
    small_disk.leave(0)
    assert len(collect(base, PLAN, folder, progress=False)) == 72  # it is there: nothing more is needed


def test_evaluation(dit_folder: Path, tmp_path: Path, small_disk: SmallDisk) -> None:
    statistics = RunningStatistics()
    statistics.add(torch.rand(50, 12, generator=torch.Generator().manual_seed(0)))
    reference = Reference("quarters", *statistics.result())

    def measured(folder: Path) -> Evaluation:
        options: dict[str, Any] = {
            "n": 48,
            "num_inference_steps": 3,
            "batch_size": 16,
            "progress": False,
            "keep": folder,
        }
        return evaluate(load_base(dit_folder), CFG(2.0), reference, Pixels(), **options)

    undisturbed, folder = measured(tmp_path / "undisturbed"), small_disk.path / "rows"
    small_disk.leave(45)  # of two batches, which have 17 KiB each, not of the third
    with pytest.raises(WriteError, match=r"No space left on device.*make room.*it resumes"):
        measured(folder)
    (batches,) = (path for path in folder.iterdir() if path.is_dir())
    assert len(list(batches.iterdir())) == 2 and not list(folder.glob("*.json"))
    small_disk.make_room()
    resumed = measured(folder)
    assert torch.equal(resumed.latents, undisturbed.latents)
    assert replace(resumed.row, seconds_per_image=0.0) == replace(undisturbed.row, seconds_per_image=0.0)


def test_training(dit_folder: Path, tmp_path: Path, small_disk: SmallDisk) -> None:
    settings = TrainingSettings(num_steps=8, batch_size=4, learning_rate=1e-2)
    store = collect(load_base(dit_folder), PLAN, tmp_path / "store", progress=False)

    def run(folder: Path) -> list[int]:
        base = load_base(dit_folder)
        adapters = AdapterSet.create(base, hidden_size=8)
        training = train(base, adapters, store, settings, checkpoints=folder, checkpoint_every=2)
        return [state.step for state in training]

    undisturbed, folder = tmp_path / "undisturbed", small_disk.path / "run"
    assert run(undisturbed) == [1, 2, 3, 4, 5, 6, 7, 8]
    one = sum(path.stat().st_size for path in (undisturbed / "step-0000008").iterdir())
    small_disk.leave(one // 1024 + 40)  # of the first checkpoint, not of the second
    assert one > 60 * 1024
    with pytest.raises(WriteError, match=r"No space left on device.*make room"):
        run(folder)
    assert [path.name for path in folder.iterdir()] == ["step-0000002"]
    small_disk.make_room()
    assert run(folder) == [3, 4, 5, 6, 7, 8]
    assert everything(folder) == everything(undisturbed)


@pytest.mark.parametrize("room", [0, 12])
def test_reproduce(dit_folder: Path, tmp_path: Path, small_disk: SmallDisk, room: int) -> None:
    job = reproduction(small_notebooks(tmp_path / "notebooks", dit_folder))
    small_disk.leave(room)
    with pytest.raises(AGDError, match=r"No space left on device"):
        job.run(small_disk.path)
    assert not job.finished(small_disk.path)
    if room:
        small_disk.make_room()
        job.run(small_disk.path)
        assert len(job.finished(small_disk.path)) == 2
