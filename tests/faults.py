"""Kill -9 at random moments: afterwards everything on disk is whole, and resuming gives what an undisturbed run gives.

    python tests/faults.py --kills 210 --output data/results/faults.json

Collection, training, evaluation and ``reproduce`` are each begun in a process of their own and killed after a random
time, again and again, until they end by themselves. After every kill what lies on disk is opened with its checksums, and no
unit that was finished before (a shard, a checkpoint, a measurement, a notebook) may be gone or written again. At the end
every byte is that of the undisturbed run (but for what tells the time). Then it begins anew, until there were enough kills.
``test_faults.py`` does the same with a few kills.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbformat.v4 import new_code_cell, new_notebook
from small_models import write_dit_folder
from tqdm import tqdm

from agd_lib.attach import AdapterSet
from agd_lib.base_models import BaseModel, load_base
from agd_lib.errors import AGDError
from agd_lib.evaluation import Reference, RunningStatistics, evaluate
from agd_lib.guidance import AGD, CFG, Unguided
from agd_lib.reproduce import Notebook, Profile, reproduce
from agd_lib.storage import read_json, write_json
from agd_lib.study import provenance
from agd_lib.training import TrainingSettings, _identity, _latest, _resume, optimizers, train
from agd_lib.trajectories import MANIFEST, CollectionPlan, TrajectoryStore, collect

PLAN = CollectionPlan(conditions=(0, 1, 2, 3, 4), num_trajectories=48, num_inference_steps=8, trajectories_per_shard=4)
SETTINGS = TrainingSettings(num_steps=60, batch_size=8, learning_rate=1e-3, optimizer="muon")
LANE = (Notebook("01_first", makes=("trajectories",)), Notebook("02_second", needs=("01_first",), makes=("adapters",)))


@dataclass(frozen=True)
class Job:
    """Work that can be killed.

    Attributes:
        run: begins the work in a folder, or goes on with it. kills_per_run: about so many kills fit into one run.
        finished: the units of work that a folder holds whole, each with what identifies its bytes.
        contents: everything that a finished folder must hold.
        keeps_all: whether every finished unit stays; else newer ones, whose names come later, may take their places.
    """

    run: Callable[[Path], None]
    finished: Callable[[Path], dict[str, Any]]
    contents: Callable[[Path], Any]
    kills_per_run: int
    keeps_all: bool = True


def files(folder: Path, *suffixes: str) -> dict[str, bytes]:
    """Every file of a folder but lock files and what is half-written, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in suffixes and not any(part.startswith(".") for part in path.parts[-3:])
    }


def _stamp(path: Path) -> tuple[int, int]:
    """Changes whenever a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


# The jobs ----------------------------------------------------------------------------------------------------------


def collection(base_folder: Path) -> Job:
    """Algorithm 1 into twelve shards."""

    def finished(folder: Path) -> dict[str, Any]:
        if not (folder / "store" / MANIFEST).is_file():
            return {}
        store = TrajectoryStore(folder / "store")  # checks every checksum
        names = [shard["file"] for shard in store.manifest["shards"]]
        return {name: _stamp(folder / "store" / name) for name in names}

    def run(folder: Path) -> None:
        collect(load_base(base_folder), PLAN, folder / "store", batch_size=4, progress=False)

    return Job(run, finished, lambda folder: files(folder, ".json", ".safetensors"), kills_per_run=4)


def training(base_folder: Path, store: Path) -> Job:
    """Algorithm 2 with a checkpoint every five steps; the newest two are kept."""

    def adapters(base: BaseModel) -> AdapterSet:
        return AdapterSet.create(base, "modulated", 4, PLAN.guidance_range)

    def finished(folder: Path) -> dict[str, Any]:
        latest = _latest(folder / "checkpoints")
        if latest is None:
            return {}
        base, opened = load_base(base_folder), TrajectoryStore(store)
        student = adapters(base)
        identity = _identity(SETTINGS, opened, student, None, ["torch.float32", "no"])
        _resume(folder / "checkpoints", student, optimizers(student, SETTINGS), identity)  # raises if it is damaged
        return {latest.name: _stamp(latest / "training.json")}

    def run(folder: Path) -> None:
        base = load_base(base_folder)
        student = adapters(base)
        for _ in train(base, student, TrajectoryStore(store), SETTINGS, folder / "checkpoints", checkpoint_every=5):
            time.sleep(0.002)
        student.save_pretrained(folder / "adapters")

    def contents(folder: Path) -> Any:
        return files(folder, ".json", ".safetensors")

    return Job(run, finished, contents, kills_per_run=4, keeps_all=False)


class Pixels:
    """Features that need no network: the mean of every quarter of the image, by channel."""

    name = "quarters"
    feature_dim = 12

    def __call__(self, images: torch.Tensor, conditions: Any = None) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), None


def evaluation(base_folder: Path, adapters: Path) -> Job:
    """Unguided sampling, CFG and AGD, measured at three scales, two seeds."""
    statistics = RunningStatistics()
    statistics.add(torch.rand(50, 12, generator=torch.Generator().manual_seed(0)))
    reference = Reference("quarters", *statistics.result())

    def run(folder: Path) -> None:
        base = load_base(base_folder)
        student = AdapterSet.from_pretrained(adapters)
        options: dict[str, Any] = {"n": 16, "num_inference_steps": 4, "progress": False, "keep": folder / "rows"}
        options["batch_size"] = 4
        for seed in (0, 1):
            unguided = evaluate(base, Unguided(), reference, Pixels(), seed=seed, **options)
            for scale in (1.5, 3.0, 5.0):
                cfg = evaluate(base, CFG(scale), reference, Pixels(), seed=seed, **options)
                ends = {"unguided_latents": unguided.latents, "cfg_latents": cfg.latents}
                student.attach(base)
                evaluate(base, AGD(student, scale), reference, Pixels(), seed=seed, **options, **ends)
                student.remove()

    def finished(folder: Path) -> dict[str, Any]:
        found = {}
        for path in sorted((folder / "rows").glob("[a-z]*.json")):
            read_json(path, AGDError, "measurement")
            found[path.name] = _stamp(path)
        return found

    def contents(folder: Path) -> Any:
        rows = {path.name: json.loads(path.read_text()) for path in (folder / "rows").glob("[a-z]*.json")}
        for row in rows.values():
            del row["row"]["seconds_per_image"], row["checksum"]
        return rows, files(folder, ".safetensors")

    return Job(run, finished, contents, kills_per_run=4)


def reproduction(notebooks: Path) -> Job:
    """Two notebooks by papermill: the first collects trajectories, the second trains on them."""
    profile = Profile("faults", "toy", {}, minutes=1, disk_mib=0, memory_mib=1)

    def run(folder: Path) -> None:
        reproduce(profile, LANE, folder / "runs", notebooks)

    def finished(folder: Path) -> dict[str, Any]:
        found = sorted((folder / "runs" / "toy" / "notebooks").glob("0?_[a-z]*[a-z].ipynb"))
        whole = [path for path in found if "partial" not in path.name and "failed" not in path.name]
        return {path.name: (nbformat.read(path, 4).cells[-1].source, _stamp(path))[1] for path in whole}

    def contents(folder: Path) -> Any:
        made = [folder / "runs" / "toy" / name for name in ("trajectories", "checkpoints", "adapters")]
        return [files(each, ".json", ".safetensors") for each in made]

    return Job(run, finished, contents, kills_per_run=3)


COLLECTING = """
from pathlib import Path
from agd_lib import CollectionPlan, collect, load_base
plan = CollectionPlan((0, 1, 2, 3, 4), num_trajectories=48, num_inference_steps=8, trajectories_per_shard=4)
collect(load_base(base_folder), plan, Path(run_dir) / "trajectories", batch_size=4, progress=False)
"""
TRAINING = """
from pathlib import Path
from agd_lib import AdapterSet, TrainingSettings, load_base, train
from agd_lib.trajectories import TrajectoryStore
base, settings = load_base(base_folder), TrainingSettings(num_steps=60, batch_size=8, learning_rate=1e-3)
adapters = AdapterSet.create(base, "modulated", 4)
for _ in train(base, adapters, TrajectoryStore(Path(run_dir) / "trajectories"), settings, Path(run_dir) / "checkpoints", 5):
    pass
adapters.save_pretrained(Path(run_dir) / "adapters")
"""


def small_notebooks(folder: Path, base_folder: Path) -> Path:
    """The notebooks of :func:`reproduction`."""
    folder.mkdir()
    for name, body in (("01_first", COLLECTING), ("02_second", TRAINING)):
        parameters = new_code_cell('base_name: str = "toy"\nrun_dir: str = "unused"')
        parameters.metadata["tags"] = ["parameters"]
        settings = new_code_cell(f"import torch\ntorch.set_num_threads(1)\nbase_folder = {str(base_folder)!r}")
        notebook = new_notebook(cells=[parameters, settings, new_code_cell(body.strip())])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


# Killing -----------------------------------------------------------------------------------------------------------


def _quietly(run: Callable[[Path], None], folder: Path) -> None:
    os.setsid()  # so that a kernel that it starts can be killed with it
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own: a sibling that was killed took the one that they share with it
    with open(folder / ".log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        run(folder)


def _begin(job: Job, folder: Path) -> Any:
    """The job in a process that needs no start-up: a copy of this one."""
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(job.run, folder))
    process.start()
    return process


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to setsid, or has ended
        process.kill()
    process.join()


_empty_folder = partial(tempfile.TemporaryDirectory, prefix="agd-faults-", ignore_cleanup_errors=True)


class Violation(Exception):
    """Something was lost, damaged, or done twice."""


def torment(job: Job, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill the job so many times; returns what was counted.

    Raises:
        Violation: if a unit that was finished is gone, was written again, or is damaged, or the end is another.
    """
    clock = random.Random(seed)
    with _empty_folder() as name:
        folder = Path(name)
        start = time.monotonic()
        process = _begin(job, folder)
        process.join()
        if process.exitcode != 0:
            raise Violation(f"the undisturbed run failed: {(folder / '.log').read_text()[-2000:]}")
        duration, expected = time.monotonic() - start, job.contents(folder)
    killed = runs = 0
    while killed < kills:
        with _empty_folder() as name:
            folder = Path(name)
            before: dict[str, Any] = {}
            while True:
                process = _begin(job, folder)
                # the last kills of a run may come after its end; then it has ended by itself
                process.join(clock.uniform(0, 2 * duration / job.kills_per_run) if killed < kills else None)
                ended = process.exitcode is not None
                if ended and process.exitcode != 0:
                    raise Violation(f"it does not resume: {(folder / '.log').read_text()[-2000:]}")
                if not ended:
                    _kill(process)
                    killed += 1
                after = job.finished(folder)
                again = [unit for unit, stamp in before.items() if job.keeps_all and after.get(unit) != stamp]
                if again or max(after, default="") < max(before, default=""):
                    raise Violation(f"finished before the kill, and gone or written again: {again or list(before)}")
                before = after
                if ended:
                    break
            if job.contents(folder) != expected:
                raise Violation("what came of the interrupted run differs from the undisturbed one")
            runs += 1
    return {"kills": killed, "interrupted_runs": runs, "seconds_undisturbed": round(duration, 2)}


@contextmanager
def another_process_holds(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Inside the block another process, which is given, has the folder locked."""
    code = "import sys, agd_lib.storage as s, pathlib; lock = s.lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def jobs(folder: Path) -> dict[str, Job]:
    """The four jobs, with what they need made in ``folder``."""
    torch.set_num_threads(1)
    base_folder = write_dit_folder(folder / "five-classes")
    base = load_base(base_folder)
    store = collect(base, PLAN, folder / "store", progress=False).folder
    adapters = folder / "adapters"
    AdapterSet.create(base, "modulated", 4, PLAN.guidance_range).save_pretrained(adapters)
    return {
        "collection": collection(base_folder),
        "training": training(base_folder, store),
        "evaluation": evaluation(base_folder, adapters),
        "reproduce": reproduction(small_notebooks(folder / "notebooks", base_folder)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=210, help="in all; a tenth of them at reproduce, which is slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start, counts = time.monotonic(), {}
    with _empty_folder() as folder:
        for number, (name, job) in enumerate(jobs(Path(folder)).items()):
            share = arguments.kills // 10 if name == "reproduce" else -(-arguments.kills * 3 // 10)
            counts[name] = torment(job, share, arguments.seed + number)
            print(name, counts[name], flush=True)
    if arguments.output:
        command = f"python tests/faults.py --kills {arguments.kills} --seed {arguments.seed}"
        about = provenance(command, time.monotonic() - start)
        write_json(arguments.output, about | {"jobs": counts, "violations": 0})


if __name__ == "__main__":
    sys.exit(main())
