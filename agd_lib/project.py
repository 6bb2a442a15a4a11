"""Where the repository's folders lie, found from the library itself: the same under JupyterLab, papermill and nbval."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

DATA = ROOT / "data"
"""The small models, their adapters and the measured results that the repository ships."""


RUNS = Path(os.environ.get("AGD_LIB_RUNS") or ROOT / "runs")
"""Where runs are kept: ``runs`` in the repository, or the folder that the environment variable AGD_LIB_RUNS names."""


def repository_path(path: str | Path) -> Path:
    """A path as given if absolute, else taken from the repository's root, whatever the working directory is.

    What begins with ``runs/`` lies in :data:`RUNS`.
    """
    path = Path(path)
    return RUNS / path.relative_to("runs") if path.is_relative_to("runs") else ROOT / path


def display_path(path: str | Path) -> str:
    """A path for printing: relative to the repository where it lies inside it, so that no output names a machine.

    The reverse of :func:`repository_path`.
    """
    path = Path(path)
    if path.is_relative_to(RUNS):
        return (Path("runs") / path.relative_to(RUNS)).as_posix()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def find_folder(name: str | Path) -> Path | None:
    """A folder that is named from the working directory, else from the repository; None if there is none."""
    return next((path for path in (Path(name), ROOT / name) if str(name) and path.is_dir()), None)
