"""A few kills at random moments; ``python tests/faults.py`` does hundreds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faults import Job, Violation, another_process_holds, jobs, torment

from agd_lib.errors import FolderInUseError


@pytest.fixture(scope="module")
def all_jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return jobs(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("name", "kills"), [("collection", 5), ("training", 5), ("evaluation", 5), ("reproduce", 1)])
def test_killed_again_and_again_it_loses_nothing_and_ends_the_same(
    all_jobs: dict[str, Job], name: str, kills: int
) -> None:
    assert torment(all_jobs[name], kills)["kills"] >= kills


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("collection", "store"),
        ("training", "checkpoints"),
        ("evaluation", "rows/unguided-1-seed0.json"),
        ("reproduce", "runs/toy"),
    ],
)
def test_a_second_run_on_the_same_folder_is_refused(
    all_jobs: dict[str, Job], tmp_path: Path, name: str, folder: str
) -> None:
    with (
        another_process_holds(tmp_path / folder),
        pytest.raises(FolderInUseError, match="another process is writing to"),
    ):
        all_jobs[name].run(tmp_path)
    assert not all_jobs[name].finished(tmp_path)


def _write_twice(folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.json").write_text(str(number))
        time.sleep(0.02)


def test_work_that_is_done_twice_is_noticed() -> None:
    def finished(folder: Path) -> dict[str, object]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}

    careless = Job(_write_twice, finished, lambda folder: len(finished(folder)), kills_per_run=2)
    with pytest.raises(Violation, match="written again"):
        torment(careless, 3)


def _count_from_one(folder: Path) -> None:
    for number in range(1, 40):
        for old in folder.glob("step-*"):
            old.unlink()
        (folder / f"step-{number:02d}").touch()
        time.sleep(0.02)


def test_a_checkpoint_that_goes_backward_is_noticed() -> None:
    def finished(folder: Path) -> dict[str, object]:
        return {path.name: None for path in folder.glob("step-*")}

    forgetful = Job(_count_from_one, finished, lambda folder: list(finished(folder)), kills_per_run=2, keeps_all=False)
    with pytest.raises(Violation, match="finished before the kill"):
        torment(forgetful, 6)


def test_another_end_is_noticed() -> None:
    def run(folder: Path) -> None:
        with open(folder / "log.json", "a") as file:
            for _ in range(40):
                file.write("x")
                file.flush()
                time.sleep(0.02)

    job = Job(run, lambda folder: {}, lambda folder: (folder / "log.json").read_text(), kills_per_run=2)
    with pytest.raises(Violation, match="differs from the undisturbed"):
        torment(job, 3)
