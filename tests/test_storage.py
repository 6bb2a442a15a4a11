"""Files and folders are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import another_process_holds
from safetensors.torch import load_file, save_file

import agd_lib.storage
from agd_lib.errors import AdapterError, AGDError, FolderInUseError, StoreError, WriteError
from agd_lib.storage import lock_folder, read_json, read_tensors, sha256, write_json, write_tensors, writing

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def write_file(path: Path, number: int) -> None:
    write_tensors(path, {"number": torch.full((64,), number)})


def read_file(path: Path) -> int:
    return int(load_file(path)["number"][0])


def write_folder(path: Path, number: int) -> None:
    """A folder of two files that must agree, one of them in a folder of its own."""
    with writing(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        write_tensors(temporary / "inner" / "tensors.safetensors", {"number": torch.full((64,), number)})
        write_json(temporary / "number.json", {"number": number})


def read_folder(path: Path) -> int:
    assert sorted(item.name for item in path.rglob("*")) == ["inner", "number.json", "tensors.safetensors"]
    number = json.loads((path / "number.json").read_text())["number"]
    assert read_file(path / "inner" / "tensors.safetensors") == number
    return number


KINDS = pytest.mark.parametrize(
    ("write", "read"), [(write_file, read_file), (write_folder, read_folder)], ids=["file", "folder"]
)


class Saboteur:
    """Lets the n-th of the calls that touch the disk fail, before it does its work or after.

    ``fsync`` itself does nothing here: on a busy disk it takes a tenth of a second.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.fail_at: int | None = None
        self.after = False
        self.fail: Callable[[], None] = lambda: None
        self.names: list[str] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        for module, name in ((os, "replace"), (os, "fsync"), (agd_lib.storage, "save_file")):
            monkeypatch.setattr(module, name, self._wrap(name, getattr(module, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            self.names.append(name)
            if number == self.fail_at and not self.after:
                self.fail()
            result = function(*args, **kwargs)
            if number == self.fail_at and self.after:
                self.fail()
            return result

        return call

    def plan(self, fail_at: int | None, after: bool, fail: Callable[[], None]) -> None:
        self.calls, self.fail_at, self.after, self.fail = 0, fail_at, after, fail


def test_what_is_written_is_flushed_before_it_gets_its_name_and_the_name_after(
    monkeypatch: Any, tmp_path: Path
) -> None:
    saboteur = Saboteur(monkeypatch)
    write_file(tmp_path / "thing", 1)
    assert saboteur.names == ["save_file", "fsync", "replace", "fsync"]


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@KINDS
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("after", [False, True], ids=["before-call", "after-call"])
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["no-space", "interrupt"])
def test_failure_at_every_point_leaves_old_or_new_and_no_temporary_file(
    write: Any, read: Any, existing: bool, after: bool, error: BaseException, tmp_path: Path, monkeypatch: Any
) -> None:
    saboteur = Saboteur(monkeypatch)
    write(tmp_path / "count", 0)
    points = saboteur.calls
    for point in range(points + int(existing)):
        path = tmp_path / f"{point}" / "thing"
        if existing:
            saboteur.plan(None, after, lambda: None)
            write(path, 1)
        saboteur.plan(point, after, raiser(error))
        try:
            write(path, 2)
        except BaseException as caught:
            assert isinstance(caught, WriteError if error is NO_SPACE else KeyboardInterrupt)
        left = [item.name for item in path.parent.iterdir()] if path.parent.exists() else []
        assert left in ([], ["thing"]), f"point {point} of {points}"
        assert (read(path) in (1, 2)) if left else not existing, f"point {point} of {points}"
        saboteur.plan(None, after, lambda: None)
        write(path, 3)
        assert read(path) == 3


@KINDS
def test_kill_at_every_point_leaves_something_whole_and_the_next_write_tidies_up(
    write: Any, read: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    saboteur = Saboteur(monkeypatch)
    write(tmp_path / "count", 0)
    points = saboteur.calls + 1  # replacing a folder takes one rename more
    for point in range(points):
        path = tmp_path / f"{point}" / "thing"
        saboteur.plan(None, False, lambda: None)
        write(path, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child only writes files
            child = os.fork()
        if child == 0:
            saboteur.plan(point, False, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                write(path, 2)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if path.exists():
            assert read(path) in (1, 2), f"point {point} of {points}"
        saboteur.plan(None, False, lambda: None)
        write(path, 3)
        assert read(path) == 3
        assert [item.name for item in path.parent.iterdir()] == ["thing"]


def test_an_interrupted_replacement_gives_the_old_folder_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "thing", 1)
    (tmp_path / "thing").rename(tmp_path / ".thing.old")  # as a kill between the two renames leaves it
    with pytest.raises(RuntimeError, match="stop"), writing(tmp_path / "thing") as temporary:
        temporary.mkdir()
        raise RuntimeError("stop")
    assert read_folder(tmp_path / "thing") == 1


def test_an_exception_of_the_caller_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_write_error_says_where_why_and_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise NO_SPACE

    monkeypatch.setattr(agd_lib.storage, "save_file", full)
    with pytest.raises(WriteError, match=r"weights\.safetensors.*No space left.*MiB free.*make room"):
        write_file(tmp_path / "weights.safetensors", 1)


def test_a_file_in_the_way_of_a_folder_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(WriteError, match="could not write"):
        write_json(tmp_path / "taken" / "value.json", {})
    assert (tmp_path / "taken").read_text() == "a file"


# JSON --------------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"text": "ü", "number": 0.1, "nothing": None, "list": [1, {"a": True}]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", StoreError, "value") == value


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_writing_json_refuses_what_is_not_json(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "value.json", {"number": number})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"a": 1',
        b"{'a': 1}",
        b"[1, 2]",
        b'"text"',
        b"null",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe{}",
        b'{"a": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
    ],
    ids=["empty", "cut", "quotes", "list", "text", "null", "nan", "infinity", "not-utf8", "huge-number", "nested"],
)
def test_reading_json_refuses_anything_but_an_object(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "value.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"the manifest .*value\.json"):
        read_json(tmp_path / "value.json", StoreError, "manifest")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest at .*gone\.json"):
        read_json(tmp_path / "gone.json", StoreError, "manifest")
    with pytest.raises(AdapterError, match=r"no weights at .*gone\.safetensors"):
        read_tensors(tmp_path / "gone.safetensors", AdapterError, "weights")


# Tensors -----------------------------------------------------------------------------------------------------------


def test_tensors_round_trip_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).half(),
        "whole": torch.arange(5),
        "strided": torch.randn(4, 6).t(),
        "scalar": torch.tensor(0.1),
        "gradient": torch.ones(2, requires_grad=True),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    read = read_tensors(tmp_path / "t.safetensors", StoreError, "tensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["w.pt", "w.pth", "w.pkl", "w.ckpt", "w.bin", "w.pickle", "w.PT", "w.safetensors", "weights"]
)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path, name: str, writer: str) -> None:
    fuse = tmp_path / "exploded"
    if writer == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(fuse)))
    else:
        torch.save(Bomb(fuse), tmp_path / name)
    with pytest.raises(AdapterError, match=name):
        read_tensors(tmp_path / name, AdapterError, "weights")
    assert not fuse.exists()


def test_a_pickle_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(AGDError, match="pickles can run any code"):
        read_tensors(tmp_path / "w.pt", AdapterError, "weights")


def test_every_truncation_of_a_tensor_file_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.arange(10.0)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"cut\.safetensors is damaged"):
            read_tensors(tmp_path / "cut.safetensors", StoreError, "shard")


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Locks -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_holds_is_refused_until_that_process_dies(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    with another_process_holds(folder) as holder:
        with pytest.raises(FolderInUseError, match=r"another process is writing to .*store"):
            lock_folder(folder)
        with lock_folder(tmp_path / "new" / "other"):
            pass  # another folder is free
        holder.kill()
        holder.wait()
        assert (tmp_path / "new" / ".store.lock").exists()  # stale
        with lock_folder(folder):
            pass


def test_a_process_may_hold_a_folder_twice_and_lets_go_when_both_are_gone(tmp_path: Path) -> None:
    first, second = lock_folder(tmp_path / "store"), lock_folder(tmp_path / "store")
    assert first.lock is second.lock
    del first
    with pytest.raises(FolderInUseError):
        _lock_elsewhere(tmp_path / "store")
    del second
    _lock_elsewhere(tmp_path / "store")


def test_a_folder_is_locked_by_whatever_name_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "store")
    with lock_folder(tmp_path / "store"), pytest.raises(FolderInUseError):
        _lock_elsewhere(tmp_path / "alias")


def _lock_elsewhere(folder: Path) -> None:
    """Raises what locking raises in another process."""
    code = "import sys, agd_lib.storage as s, pathlib; s.lock_folder(pathlib.Path(sys.argv[1]))"
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if "FolderInUseError" in found.stderr:
        raise FolderInUseError
    assert found.returncode == 0, found.stderr


def test_a_lock_that_cannot_be_written_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(WriteError, match="could not write to"):
        lock_folder(tmp_path / "file" / "store")
