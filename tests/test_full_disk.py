"""On a disk that is really full: the right error, nothing half-written, and the same bytes once there is room.

The disk is a file system of a few hundred kilobytes in memory; mounting one takes root's rights on Linux.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.errors import WriteError
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
    """512 KiB, or the test is skipped."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True)
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
def test_collection(dit_folder: Path, tmp_path: Path, small_disk: SmallDisk, room: int, shards: int | None) -> None:
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
