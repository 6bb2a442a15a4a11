"""Crash-safe files: a file or folder is there whole under its name, or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import AGDError, FolderInUseError, WriteError

PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".ckpt", ".bin", ".pickle"}

MAX_JSON_BYTES, MAX_JSON_VALUES = 2**24, 2**20
"""Larger JSON files are refused, before any of it becomes objects, each of which takes up to a hundred times as much memory
as its text: reading takes less than 200 MB. The manifest of a million trajectories of a thousand classes has a megabyte."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on success flush it to disk and rename it to ``path``.

    Works for a file and for a folder (make the folder inside the block; an older folder is replaced). Whatever is
    raised on the way, ``path`` is whole afterwards: as it was before, or new.

    Raises:
        WriteError: if the system refuses a write (disk full, no permission); the temporary file is removed.
    """
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(old, path)  # of a run that was killed between the two renames below
        remove(temporary)
        yield temporary
        if temporary.is_dir():
            for item in temporary.rglob("*"):
                _sync(item)
        _sync(temporary)
        if temporary.is_dir() and path.exists():  # a full folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        remove(old)
    except (OSError, SafetensorError) as error:
        _clean_up(temporary, old, path)
        free = shutil.disk_usage(next(p for p in [path.parent, *path.parents] if p.exists())).free
        raise WriteError(
            f"could not write {path}: {error} ({free / 2**20:.0f} MiB free there). Nothing half-written was left; "
            "make room or choose another folder, then run the same command again: it resumes."
        ) from error
    except BaseException:
        _clean_up(temporary, old, path)
        raise


def _clean_up(temporary: Path, old: Path, path: Path) -> None:
    for action in (lambda: remove(temporary), lambda: _restore(old, path)):
        with suppress(OSError):  # the error that led here says more
            action()


def _restore(old: Path, path: Path) -> None:
    """Put the folder that was set aside back, or remove it where its successor is in place."""
    if path.exists():
        remove(old)
    elif old.exists():
        old.rename(path)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> AcquireReturnProxy:
    """Keep other processes from writing to ``folder``, which need not exist yet, while what is returned is alive.

    As a context manager it lets go at the block's end. The lock is the operating system's: it ends with the process that
    holds it, however that ends, so a lock file (``.<folder>.lock``, beside the folder) that was left behind is no obstacle.
    A process may hold it more than once: an interrupted notebook cell can be run again.

    Raises:
        FolderInUseError: if another process holds it. WriteError: if the lock file cannot be written.
    """
    folder = folder.resolve()  # the lock is the folder's, by whatever name it is called
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0, is_singleton=True).acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"another process is writing to {folder}: wait until it has finished, or choose another folder"
        ) from error
    except OSError as error:
        raise WriteError(f"could not write to {folder.parent}: {error}; choose another folder") from error


def key_of(inputs: Any) -> str:
    """16 hex digits that change whenever what is given does: a name for what was made from it.

    Args:
        inputs: whatever JSON can say.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, error: type[AGDError], what: str) -> dict[str, Any]:
    """Read a JSON object. NaN and infinity are refused.

    Args:
        error: exception class to raise. what: name of the file in the message, such as ``"adapter config"``.
    """
    if not path.is_file():
        raise error(f"no {what} at {path}: the file does not exist")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise error(
            f"the {what} {path} has {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}: it is not ours"
        )
    text = path.read_bytes()
    marks = sum(text.count(mark) for mark in (b",", b"[", b"{"))  # at least as many as there are values
    if marks > MAX_JSON_VALUES:
        raise error(
            f"the {what} {path} holds {marks:,} commas and brackets, expected at most {MAX_JSON_VALUES:,}: it is not ours"
        )
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as cause:  # not UTF-8, not JSON, numbers or nesting beyond Python's limits
        raise error(f"the {what} {path} is not valid JSON ({cause}); restore it or make it again") from cause
    if not isinstance(value, dict):
        raise error(f"the {what} {path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        raise ValueError(f"{number[:20]} is larger than any number that a computer keeps")
    return float(number)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    with writing(path) as temporary:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata or {})
        )


def read_tensors(path: Path, error: type[AGDError], what: str) -> dict[str, Tensor]:
    """Read a safetensors file; the tensors are memory-mapped.

    Raises:
        error: if the file is missing, a pickle, truncated or malformed.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise error(
            f"{path} is a pickled file and pickles can run any code: this library loads safetensors only. "
            "An adapter checkpoint of the paper's authors is converted by agd_lib.convert.convert_authors_checkpoint"
        )
    if not path.is_file():
        raise error(f"no {what} at {path}: the file does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(f"the {what} {path} is damaged ({cause}): it was truncated or edited; make it again") from cause


def refuse_link(path: Path, error: type[AGDError]) -> None:
    """Raise ``error`` if a file is a link: what this library writes for itself it reads nowhere else."""
    if path.is_symlink():
        raise error(f"{path} is a link, expected a file: nothing outside its own folder is read")


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
