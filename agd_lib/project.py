"""Where the repository's folders lie, found from the library itself: the same under JupyterLab, papermill and nbval."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

DATA = ROOT / "data"
"""The small models, their adapters and the measured results that the repository ships."""


def repository_path(path: str | Path) -> Path:
    """A path as given if absolute, else taken from the repository's root, whatever the working directory is."""
    return ROOT / path


def display_path(path: str | Path) -> str:
    """A path for printing: relative to the repository where it lies inside it, so that no output names a machine."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
