"""Runs the notebooks headless, one after another, and gathers what they measured.

    python -m agd_lib.reproduce                        the main job (``make reproduce``): the small base models
    python -m agd_lib.reproduce --base tiny-dit        one of them
    python -m agd_lib.reproduce --in-place             the committed notebooks again, with their own defaults

A run is a folder, ``runs/<profile>``::

    results.json                      every row that notebook 06 measured, all base models together
    report.html                       one self-contained page: machine, settings, table, figures
    <base>/run.json                   machine, command, parameters, time and memory of each notebook
    <base>/notebooks/<name>.ipynb     the executed notebooks; <name>.failed.ipynb where one stopped
    <base>/...                        what the notebooks wrote: trajectories, adapters, results

A notebook counts as finished when its executed copy is there, whole, and the adapters or results that it made, with a note
of the inputs it was made from: its own cells, its parameters, the files that these name (a folder of images), the library's
source, the shipped data, and the inputs of the notebooks that it needs. Run
again, finished notebooks are skipped while those are unchanged, and an interrupted one goes on from what it had stored
(02 from its shards, 03 from its checkpoints, 06 from its measurements).
"""

from __future__ import annotations

import argparse
import base64
import errno
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256 as digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from .base_models import KNOWN_BASES, short_name
from .budget import environment_report, format_seconds
from .errors import AGDError, WriteError
from .project import DATA, ROOT, display_path, find_folder, repository_path
from .prompts import COCO_MEMBERS
from .report import write_report
from .results import Row, markdown_table, read_results, write_results
from .storage import lock_folder, read_json, remove, sha256, write_json, writing

NOTEBOOKS = ROOT / "notebooks"
NOTE = "agd_lib"
"""Key of our own entry in an executed notebook's metadata."""


class ReproduceError(AGDError):
    """A profile or a notebook is missing or malformed, or the machine lacks the disk that the profile needs."""


class NotebookFailure(AGDError):
    """A notebook stopped with an error; the message names notebook, cell and error."""


# What there is to run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Notebook:
    """A notebook, and how it hangs together with the others of its lane.

    Attributes:
        name: of the file, without ``.ipynb``.
        needs: notebooks whose results it reads.
        makes: entries of the run folder that it writes and resumes from; cleared when its inputs have changed.
    """

    name: str
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()


PRODUCTS = ("adapters", "results.json")
"""What must still be there for a notebook that made it to count as finished. (Stores may be removed to make room.)"""

_MADE_IN_TRAINING = ("trajectories", "held-out-trajectories", "checkpoints", "adapters")


def _evaluation(training: str) -> Notebook:
    return Notebook("06_evaluate_fid", needs=(training,), makes=("results.json", "measurements"))


LANES: dict[str, tuple[Notebook, ...]] = {
    "dit": (
        Notebook("00_start_here"),
        Notebook("01_classifier_free_guidance"),
        Notebook("02_collect_trajectories", makes=("trajectories", "unguided-trajectories", "demo-store")),
        Notebook(
            "03_train_dit_adapters",
            needs=("02_collect_trajectories",),
            makes=("held-out-trajectories", "checkpoints", "adapters", "training.json"),
        ),
        _evaluation("03_train_dit_adapters"),
        Notebook("07_ablations", needs=("03_train_dit_adapters",), makes=("ablations",)),
    ),
    "sd21": (
        Notebook("04_train_sd21_adapters", makes=_MADE_IN_TRAINING),
        _evaluation("04_train_sd21_adapters"),
        Notebook("08_use_and_combine", needs=("04_train_sd21_adapters",), makes=("fused", "derived", "to-share")),
    ),
    "sdxl": (Notebook("05_train_sdxl_adapters", makes=_MADE_IN_TRAINING), _evaluation("05_train_sdxl_adapters")),
}
"""The notebooks that serve each kind of base model, in the order in which they run."""

LANE_OF_BASE: dict[str, str] = {
    "tiny-dit": "dit",
    "dit-xl-2-256": "dit",
    "tiny-sd21": "sd21",
    "sd21": "sd21",
    "tiny-sdxl": "sdxl",
    "sdxl": "sdxl",
}
"""The lane of each base model with a short name; the profile of any other one (a folder, a hub id) has to tell it."""


FILES: dict[str, str] = {
    "reference": "real images (a folder), or their statistics (an .npz file)",
    "real_images": "a folder of real images",
    "prompts": "a text file with one prompt a line",
}
"""Parameters of notebooks that name files of the user's."""


SMALL_BASES = ("tiny-dit", "tiny-sd21", "tiny-sdxl")
"""What is run if no base model is named: the small ones that the repository ships."""


def folder_name(base: str) -> str:
    """A base model's name as a file name: ``"me/my-dit"`` and ``"some/folder/my-dit"`` are ``"my-dit"``."""
    return re.sub(r"[^\w.-]+", "-", base.rstrip("/").rsplit("/", 1)[-1]) or "base"


@dataclass(frozen=True)
class Profile:
    """Parameters for the notebooks, and what running them costs on 2 cores (``cpu``) or the GPU (``paper``).

    Attributes:
        name: such as ``"cpu"``. base: name of the base model.
        parameters: papermill parameters; each notebook gets those that it declares.
        minutes, disk_mib, memory_mib: expected cost of the whole run.
        lane: the notebooks that serve the base model, a name in :data:`LANES`.
        exceptions: parameters for one notebook alone, by its number; they go before the others.
    """

    name: str
    base: str
    parameters: dict[str, Any]
    minutes: float
    disk_mib: float
    memory_mib: float
    lane: str = "dit"
    exceptions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def parameters_for(self, notebook: str) -> dict[str, Any]:
        """What a notebook is given, if it declares it."""
        own = [values for number, values in self.exceptions.items() if notebook.startswith(number)]
        return self.parameters | {name: value for values in own for name, value in values.items()}


def load_profile(name: str, base: str, path: Path | None = None) -> Profile:
    """Read ``notebooks/profiles/<base>.<name>.yaml``, or another file of the same form.

    Raises:
        ReproduceError: if it is missing or malformed; the message says what there is.
    """
    path = path or NOTEBOOKS / "profiles" / f"{folder_name(base)}.{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (NOTEBOOKS / "profiles").glob("*.yaml"))) or "none"
        raise ReproduceError(
            f"no profile {name!r} for the base model {base!r}: expected {display_path(path)}. Profiles (base.profile): "
            f"{known}. For a base model of your own copy the nearest one under that name and edit it"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ReproduceError(f"{display_path(path)} is not valid YAML: {error}") from error
    expected = values.pop("expected", None) if isinstance(values, dict) else None
    costs = ("minutes", "disk_mib", "memory_mib")
    if not isinstance(expected, dict) or expected.keys() != set(costs):
        raise ReproduceError(
            f"{display_path(path)} is malformed: expected parameters by name, and under 'expected' the numbers "
            f"{', '.join(costs)}"
        )
    if not all(isinstance(expected[cost], int | float) and expected[cost] >= 0 for cost in costs):
        raise ReproduceError(f"{display_path(path)}: the numbers under 'expected' must not be negative: {expected}")
    lane = values.pop("lane", LANE_OF_BASE.get(base))
    if not isinstance(lane, str) or lane not in LANES:
        raise ReproduceError(
            f"{display_path(path)} gives lane: {lane!r}, expected one of: {', '.join(LANES)} (for a DiTPipeline, a "
            "StableDiffusionPipeline, a StableDiffusionXLPipeline)"
        )
    exceptions = {str(key): values.pop(key) for key, value in list(values.items()) if isinstance(value, dict)}
    minutes, disk_mib, memory_mib = (float(expected[cost]) for cost in costs)
    return Profile(name, base, values, minutes, disk_mib, memory_mib, lane, exceptions)


def declared_parameters(path: Path) -> set[str]:
    """Names in a notebook's ``parameters`` cell."""
    return set(papermill.inspect_notebook(str(path)))


# Inputs, by which a finished notebook is known ----------------------------------------------------------------------------


def notebook_inputs(
    path: Path, parameters: dict[str, Any], base: str, needed: dict[str, dict[str, str]]
) -> dict[str, str]:
    """What an executed notebook depends on, each part as a digest.

    Args:
        path: the notebook. parameters: that it will be given. base: name or folder of the base model.
        needed: inputs of the notebooks that it needs.
    """
    cells = [[cell.cell_type, cell.source] for cell in _read_notebook(path).cells]
    files = [repository_path(str(parameters[name])) for name in FILES if parameters.get(name)]
    return {
        "the notebook's cells": _digest(cells),
        "its parameters": _digest(parameters),
        "the files that it is given": _digest([_manifest(file) for file in files]),
        "the library": _library(),
        "torch or diffusers": _digest([version("torch"), version("diffusers")]),
        "the base model": _digest(_data_manifest(base)),
        "the shipped table": _digest(sha256(table) if (table := DATA / "results" / f"{base}.json").is_file() else None),
        "what it needs": _digest(needed),
    }


def _library() -> str:
    # reproduce.py and report.py only run notebooks and show what came of it, pages.py only writes tables
    others = ("reproduce.py", "report.py", "pages.py")
    files = [p for p in sorted(Path(__file__).parent.glob("*.py")) if p.name not in others]
    return _digest([[p.name, sha256(p)] for p in files])


def _manifest(path: Path) -> list[list[str | int]]:
    """A file, or every file in a folder, by name, size and time; nothing if it is neither (a word such as ``coco``)."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _digest(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _data_manifest(base: str) -> list[list[str | int]]:
    """Every file of a base model that lies on this machine, the model cards aside; empty for one from the hub.

    Those of what is shipped to go with it (``data/tiny-sd21-controlnet``) are among them.
    """
    folder = DATA / base if base in KNOWN_BASES else Path(base)
    folders = [folder, *DATA.glob(f"{base}-*")] if base in KNOWN_BASES else [folder]
    files = sorted(p for one in folders for p in one.rglob("*") if p.is_file() and p.suffix != ".md")
    if folder.is_relative_to(ROOT):
        return [[p.relative_to(folder.parent).as_posix(), sha256(p)] for p in files]
    return [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _read_notebook(path: Path) -> NotebookNode:
    if not path.is_file():
        raise ReproduceError(f"no notebook at {display_path(path)}")
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat and json raise many kinds
        raise ReproduceError(f"{display_path(path)} is not a notebook: {error}") from error


def _write_notebook(path: Path, notebook: NotebookNode) -> None:
    with writing(path) as temporary:
        nbformat.write(notebook, temporary)


def _finished_with(path: Path) -> dict[str, Any] | None:
    """Our note in an executed notebook; None where there is none, or it is damaged."""
    try:
        note = _read_notebook(path).metadata.get(NOTE)
    except ReproduceError:
        return None
    return dict(note) if note and "inputs" in note else None


# Running ------------------------------------------------------------------------------------------------------------------


class _WatchedEngine(NBClientEngine):
    """papermill's own engine with a clock beside it: the bar shows the time as it passes, and memory is watched."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
        stop, peak = threading.Event(), [0]
        interval = 1.0 if sys.stderr.isatty() else 30.0

        def watch() -> None:
            refreshed = time.monotonic()
            while not stop.wait(0.5):
                peak[0] = max(peak[0], _children_memory())
                if nb_man.pbar is not None and time.monotonic() - refreshed >= interval:
                    nb_man.pbar.refresh()
                    refreshed = time.monotonic()

        clock = threading.Thread(target=watch, daemon=True)
        clock.start()
        try:
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        finally:
            stop.set()
            clock.join()
            nb_man.nb.metadata[NOTE] = {"peak_memory_mib": round(peak[0] / 2**20)}


papermill_engines.register(NOTE, _WatchedEngine)


def _children_memory() -> int:
    """Bytes of memory that the processes started from here hold (the notebook's kernel and its workers)."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def execute(path: Path, output: Path, parameters: dict[str, Any], label: str) -> NotebookNode:
    """Execute a notebook in its own folder as working directory; returns it executed, and writes nothing but ``output``.

    Args:
        output: where to follow the execution; an incomplete notebook until this function returns.
        label: of the progress bar.

    Raises:
        NotebookFailure: naming the cell and the error; the notebook up to there is at ``<name>.failed.ipynb``.
        WriteError: if the system refuses a write.
        KeyboardInterrupt: if the run was interrupted, wherever the signal arrived.
    """
    failed = output.with_name(f"{path.stem}.failed.ipynb")
    try:
        failed.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        return papermill.execute_notebook(
            str(path),
            str(output),
            parameters=parameters,
            engine_name=NOTE,
            cwd=str(path.parent),
            start_timeout=300,
            extra_arguments=["--log-level=ERROR"],  # of the kernel: its warnings are not the notebook's
            progress_bar={"desc": label, "dynamic_ncols": True},
        )
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from error
        os.replace(output, failed)
        raise NotebookFailure(_failure_message(path, error, failed)) from error
    except (DeadKernelError, CellTimeoutError) as error:
        os.replace(output, failed)
        raise NotebookFailure(
            f"{path.name} stopped: its Python process died ({error}). Most often the memory was not enough. "
            f"The notebook up to there: {display_path(failed)}"
        ) from error
    except OSError as error:  # papermill writes the notebook as it goes
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise WriteError(
            f"could not write {output}: {error}. Make room or choose another folder, then run the same command again: finished "
            "notebooks are kept"
        ) from error


def _failure_message(path: Path, error: PapermillExecutionError, failed: Path) -> str:
    source = error.source.strip().splitlines()
    shown = "\n".join(f"    {line}" for line in source[:8]) + ("\n    ..." if len(source) > 8 else "")
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip().splitlines()[-12:]
    return (
        f"{path.name} stopped in cell In [{error.exec_count}]:\n{shown}\n"
        f"with {error.ename}: {error.evalue}\n" + "\n".join(f"    {line}" for line in trace) + "\n"
        f"The notebook up to there: {display_path(failed)}. Finished notebooks are kept: run the same command again."
    )


def strip_widgets(notebook: NotebookNode) -> NotebookNode:
    """Remove widgets' states, in place, and progress bars that were drawn as widgets; returns the notebook.

    Any other widget leaves a line that says how to bring it to life, so that the page reads well without a kernel.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_widget, cell.outputs) if output is not None]
    return notebook


def strip_execution(notebook: NotebookNode) -> NotebookNode:
    """Remove all that an execution leaves behind besides its outputs, in place: what a committed notebook is."""
    strip_widgets(notebook)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    kept = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags or "papermill-error-cell-tag" in tags:
            continue
        for key in ("papermill", "execution", "widgets"):
            cell.metadata.pop(key, None)
        if not tags:
            cell.metadata.pop("tags", None)
        kept.append(cell)
    notebook.cells = kept
    return notebook


def shrink_pictures(notebook: NotebookNode) -> NotebookNode:
    """Give PNG pictures a palette of 256 colours where that makes them smaller, in place; returns the notebook.

    Plots keep their colours to the eye and need a third of the space in git.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _with_palette(output.data["image/png"])
    return notebook


def _with_palette(picture: str) -> str:
    """A PNG in base64, as a PNG in base64."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        palette = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(buffer, format="png", optimize=True)
    smaller = base64.b64encode(buffer.getvalue()).decode("ascii")
    return min(picture, smaller, key=len)


def _without_widget(output: NotebookNode) -> NotebookNode | None:
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" not in data:
        return output
    text = "".join(data.get("text/plain", ""))
    if re.search(r"\d+%\||\bit/s\]|\?it\b|s/it\]", text):  # a progress bar: its last state says nothing
        return None
    note = "Interactive: run this cell in JupyterLab to use the controls."
    output.data = nbformat.from_dict({"text/html": f"<p><em>{note}</em></p>", "text/plain": note})
    output.metadata = nbformat.from_dict({})
    return output


def execute_in_place(folder: Path = NOTEBOOKS, only: Sequence[str] = ()) -> None:
    """Run the notebooks with the defaults in their own parameters cells, and write them back with the new outputs.

    Each begins with an empty folder for its run, so its outputs do not depend on what was run before. A notebook that
    fails is left as it was.
    """
    paths = [path for path in sorted(folder.glob("[0-9]*.ipynb")) if _wanted(path.stem, only)]
    if not paths:
        raise ReproduceError(f"no notebook in {display_path(folder)} begins with {' or '.join(only) or 'a number'}")
    for number, path in enumerate(paths, 1):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="agd-lib-") as empty, _environment("AGD_LIB_RUNS", empty):
            partial = repository_path(f"runs/in-place/{path.stem}.partial.ipynb")
            executed = execute(path, partial, {}, f"[{number}/{len(paths)}] {path.stem}")
            partial.unlink()
        memory = executed.metadata[NOTE]["peak_memory_mib"]
        _write_notebook(path, shrink_pictures(strip_execution(executed)))
        size = path.stat().st_size / 2**10
        _say(f"{path.name}: {format_seconds(time.monotonic() - start)}, {memory:,} MiB of memory, {size:,.0f} KiB")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(name.startswith(prefix) for prefix in only)


@dataclass(frozen=True)
class Outcome:
    """One notebook of a run: how long it took (also when that was earlier), and whether it ran this time."""

    name: str
    seconds: float
    peak_memory_mib: int
    ran: bool


def reproduce(
    profile: Profile,
    lane: Sequence[Notebook],
    root: Path,
    notebooks: Path = NOTEBOOKS,
    only: Sequence[str] = (),
    force: bool = False,
    command: str = "",
) -> list[Outcome]:
    """Run a lane's notebooks with a profile, skipping those that are finished.

    Args:
        root: folder of the profile's run, such as ``runs/cpu``; this base model's part is a folder in it.
        notebooks: where the notebooks lie.
        only: numbers (or beginnings of names); those notebooks run, and before them any that they need.
        force: repeat them even where they are finished.
        command: for the report.

    Raises:
        ReproduceError: if a notebook is missing, the profile sets what none declares or names files that are not there,
            or the disk is not enough.
        NotebookFailure: if a notebook stops with an error. What is finished stays finished.
        FolderInUseError: if another process runs notebooks into this folder.
    """
    run = root / folder_name(profile.base)
    chosen = _with_needed(lane, only)
    declared = {notebook.name: declared_parameters(_existing(notebooks, notebook)) for notebook in lane}
    _check_names(profile, declared)
    _check_files(profile)
    _announce(profile, run, len(chosen))
    _lock = lock_folder(run)  # held until this function ends
    folder = None if profile.base in KNOWN_BASES else find_folder(profile.base)
    base = str(folder.resolve()) if folder else profile.base
    given = {"base_name": base, "run_dir": display_path(run)}
    inputs: dict[str, dict[str, str]] = {}
    outcomes: list[Outcome] = []
    for number, notebook in enumerate(chosen, 1):
        everything = profile.parameters_for(notebook.name) | given
        parameters = {name: value for name, value in everything.items() if name in declared[notebook.name]}
        needed = {name: inputs[name] for name in notebook.needs}
        path = notebooks / f"{notebook.name}.ipynb"
        inputs[notebook.name] = notebook_inputs(path, parameters, base, needed)
        label = f"[{number}/{len(chosen)}] {notebook.name}"
        again = force and _wanted(notebook.name, only)
        outcomes.append(_run_or_skip(notebook, lane, path, run, parameters, inputs[notebook.name], label, again))
        _write_run(run, profile, lane, given, command)
    return outcomes


def _check_names(profile: Profile, declared: dict[str, set[str]]) -> None:
    """Refuse a parameter that no notebook would receive."""
    unknown = profile.parameters.keys() - set().union(*declared.values())
    for number, values in profile.exceptions.items():
        unknown |= values.keys() - set().union(*(names for name, names in declared.items() if name.startswith(number)))
    if unknown:
        raise ReproduceError(
            f"the profile {profile.name} for {profile.base} sets {', '.join(sorted(unknown))}, which no notebook "
            "declares in its parameters cell: a misspelt name would change nothing, silently"
        )


def _check_files(profile: Profile) -> None:
    """Refuse a profile that names images which are not there: the notebook that needs them would find out in the end."""
    given = [profile.parameters, *profile.exceptions.values()]
    for name, what in FILES.items():
        for path in {
            str(values[name])
            for values in given
            if values.get(name) not in (None, "", "shapes", "scenes", *COCO_MEMBERS)
        }:
            if not repository_path(path).exists():
                raise ReproduceError(
                    f"the profile {profile.name} for {profile.base} names {path} as {name}, and there is no such file or "
                    f"folder: expected {what}. Edit the profile, or give a copy with --parameters"
                )


def _with_needed(lane: Sequence[Notebook], only: Sequence[str]) -> list[Notebook]:
    """The chosen notebooks and, before them, those that they need."""
    by_name = {notebook.name: notebook for notebook in lane}
    names = [name for name in by_name if _wanted(name, only)]
    if not names:
        raise ReproduceError(f"got {' and '.join(only)}, expected the beginning of one of: {', '.join(by_name)}")
    for name in names:  # grows while it is read
        names += [needed for needed in by_name[name].needs if needed not in names]
    return [notebook for notebook in lane if notebook.name in names]


def _existing(folder: Path, notebook: Notebook) -> Path:
    path = folder / f"{notebook.name}.ipynb"
    if not path.is_file():
        raise ReproduceError(f"no notebook at {display_path(path)}")
    return path


def _announce_all(profiles: Sequence[Profile]) -> None:
    """Say what several base models will cost together."""
    if len(profiles) > 1:
        minutes, disk = (sum(getattr(profile, cost) for profile in profiles) for cost in ("minutes", "disk_mib"))
        _say(
            f"{len(profiles)} base models one after another ({', '.join(profile.base for profile in profiles)}): about "
            f"{format_seconds(60 * minutes)} and {disk:,.0f} MiB in all\n"
        )


def _announce(profile: Profile, run: Path, count: int) -> None:
    """Say what the run will cost; refuse if the disk cannot hold it."""
    parent = next(p for p in [run, *run.parents] if p.exists())
    free = shutil.disk_usage(parent).free / 2**20
    there = sum(p.stat().st_size for p in run.rglob("*") if p.is_file()) / 2**20
    memory = psutil.virtual_memory().total / 2**20
    _say(
        f"{profile.base}, profile {profile.name}: {count} notebook{'s' * (count != 1)} into {display_path(run)}\n"
        f"  time    about {format_seconds(60 * profile.minutes)} for the whole profile from the beginning\n"
        f"  disk    {profile.disk_mib:,.0f} MiB ({free:,.0f} MiB free)\n"
        f"  memory  {profile.memory_mib:,.0f} MiB ({memory:,.0f} MiB here)"
    )
    if free + there < profile.disk_mib:
        raise ReproduceError(
            f"the disk has {free:,.0f} MiB free at {parent}, this run needs {profile.disk_mib:,.0f} MiB: make room, or "
            "choose another disk with --run-dir"
        )
    if memory < profile.memory_mib:
        _say(
            f"  Note: this machine has less memory than the {profile.memory_mib:,.0f} MiB that the run was seen to take."
        )


def _run_or_skip(
    notebook: Notebook,
    lane: Sequence[Notebook],
    path: Path,
    run: Path,
    parameters: dict[str, Any],
    inputs: dict[str, str],
    label: str,
    force: bool,
) -> Outcome:
    finished = run / "notebooks" / f"{notebook.name}.ipynb"
    started = run / "notebooks" / f"{notebook.name}.started.json"
    note = _finished_with(finished)
    lost = [name for name in (note or {}).get("products", []) if not (run / name).exists()]
    if lost:
        _say(f"{label}: again, because what it had made is not there any more: {', '.join(lost)}")
    if note and note["inputs"] == inputs and not force and not lost:
        _say(f"{label}: finished before, nothing changed since")
        return Outcome(notebook.name, note["seconds"], note["peak_memory_mib"], ran=False)
    before = read_json(started, ReproduceError, "note of what a run began with") if started.is_file() else None
    if before is not None and (before != inputs or force):
        changed = [part for part in inputs if before.get(part) != inputs[part]]
        _say(f"{label}: from the beginning" + (f", because this changed: {', '.join(changed)}" if changed else ""))
        for name in notebook.makes:
            remove(run / name)
        _forget_what_needs(notebook.name, lane, run)
    elif before is not None and note is None:
        _say(f"{label}: was interrupted, goes on from what it had stored")
    finished.unlink(missing_ok=True)
    write_json(started, inputs)
    partial = finished.with_name(f"{notebook.name}.partial.ipynb")
    start = time.monotonic()
    executed = execute(path, partial, parameters, label)
    seconds = time.monotonic() - start
    memory = int(executed.metadata[NOTE]["peak_memory_mib"])
    strip_widgets(executed)
    products = [name for name in PRODUCTS if name in notebook.makes and (run / name).exists()]
    executed.metadata[NOTE] = {
        "inputs": inputs,
        "seconds": seconds,
        "peak_memory_mib": memory,
        "products": products,
    }
    _write_notebook(finished, executed)
    partial.unlink()
    _say(f"{label}: done in {format_seconds(seconds)}")
    return Outcome(notebook.name, seconds, memory, ran=True)


def _forget_what_needs(name: str, lane: Sequence[Notebook], run: Path) -> None:
    """Remove the results of notebooks that were made from older results of this one: they would stand beside newer ones."""
    for notebook in lane:
        if name in notebook.needs:
            for made in notebook.makes:
                remove(run / made)
            (run / "notebooks" / f"{notebook.name}.ipynb").unlink(missing_ok=True)
            _forget_what_needs(notebook.name, lane, run)


def _write_run(run: Path, profile: Profile, lane: Sequence[Notebook], parameters: dict[str, Any], command: str) -> None:
    notes = {notebook.name: _finished_with(run / "notebooks" / f"{notebook.name}.ipynb") for notebook in lane}
    write_json(
        run / "run.json",
        {
            "base": profile.base,
            "profile": profile.name,
            "command": command,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": environment_report(run),
            "parameters": profile.parameters | profile.exceptions | parameters,
            "notebooks": [
                {"name": name, "seconds": note["seconds"], "peak_memory_mib": note["peak_memory_mib"]}
                for name, note in notes.items()
                if note
            ],
        },
    )


def merge_results(root: Path) -> list[Row]:
    """Put the rows of every base model under ``root`` into ``root/results.json``; returns them.

    Raises:
        ResultsError: if a base model's results do not keep to the schema.
    """
    rows = [row for path in sorted(root.glob("*/results.json")) for row in read_results(path)]
    if rows:
        write_results(root / "results.json", rows)
    return rows


def outdated(root: Path) -> list[str]:
    """Names of the base models whose rows in ``root`` were measured by another version of the library."""
    notes = {
        path.parent: _finished_with(path.parent / "notebooks" / "06_evaluate_fid.ipynb")
        for path in root.glob("*/results.json")
    }
    return sorted(run.name for run, note in notes.items() if note and note["inputs"].get("the library") != _library())


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m agd_lib.reproduce", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", default="cpu", help="smoke (seconds), cpu (the whole experiment) or paper (a GPU)")
    parser.add_argument("--base", nargs="+", default=list(SMALL_BASES), help="short names, folders, or hub ids")
    parser.add_argument(
        "--parameters", type=Path, help="another profile file than notebooks/profiles/<base>.<profile>.yaml"
    )
    parser.add_argument("--run-dir", type=Path, help="default: runs/<profile>")
    parser.add_argument("--only", action="append", default=[], metavar="03", help="this notebook, and those it needs")
    parser.add_argument("--force", action="store_true", help="also notebooks that are finished")
    parser.add_argument("--in-place", action="store_true", help="run the committed notebooks with their own defaults")
    options = parser.parse_args(arguments)
    command = "python -m agd_lib.reproduce " + shlex.join(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.in_place:
            execute_in_place(only=options.only)
            return 0
        root = options.run_dir.resolve() if options.run_dir else repository_path(f"runs/{options.profile}")
        if options.parameters and len(options.base) > 1:
            raise ReproduceError(f"got --parameters for {len(options.base)} base models, expected one: give its --base")
        bases = [short_name(base) for base in options.base]
        profiles = [load_profile(options.profile, base, options.parameters) for base in bases]
        with_one = [profile for profile in profiles if any(_wanted(n.name, options.only) for n in LANES[profile.lane])]
        _announce_all(with_one)
        outcomes = []
        for profile in with_one or profiles[:1]:
            outcomes += reproduce(
                profile, LANES[profile.lane], root, only=options.only, force=options.force, command=command.strip()
            )
        rows = merge_results(root)
        report = write_report(root, rows)
    except AGDError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr, flush=True)
        return 130
    _say("")
    for outcome in outcomes:
        _say(f"{outcome.name:32} {format_seconds(outcome.seconds):>8} {outcome.peak_memory_mib:>7,} MiB of memory")
    _say("\n" + (markdown_table(rows) if rows else "No results yet: notebook 06 measures them."))
    for name in outdated(root):
        _say(
            f"\nNote: the rows of {name} were measured by another version of this library; its own command measures them again."
        )
    if rows:
        _say(f"\nresults  {display_path(root / 'results.json')}")
    _say(f"report   {display_path(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
