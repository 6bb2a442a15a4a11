"""Files from strangers: whatever is in them, only the library's own errors come out, and no memory goes.

Two thousand generated files: bytes changed, cut or put in at random, and values of any kind, also absurdly large ones, in
every field of every JSON or YAML file that is read.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from growth import forget_peak, peak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_convert import their_adapters, write_checkpoint

from agd_lib.attach import AdapterSet
from agd_lib.base_models import BaseModel, load_base
from agd_lib.convert import convert_authors_checkpoint
from agd_lib.errors import AGDError
from agd_lib.evaluation import ShapesFeatures, _read_kept, load_reference, save_reference
from agd_lib.extractor import ShapesExtractor
from agd_lib.influence import influence_of
from agd_lib.reproduce import load_profile
from agd_lib.results import Row
from agd_lib.storage import MAX_JSON_BYTES, MAX_JSON_VALUES, key_of, sha256, write_json, write_tensors
from agd_lib.training import TrainingLog, TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, _manifest_checksum, _noted, collect

PLAN = CollectionPlan(conditions=(0, 1), num_trajectories=4, num_inference_steps=4, trajectories_per_shard=2)
SETTINGS = TrainingSettings(num_steps=2, batch_size=4)
MANY = settings(max_examples=100, deadline=5_000, suppress_health_check=[HealthCheck.function_scoped_fixture])

ABSURD = st.sampled_from(
    [-1, 0, 2**31, 2**63, 10**30, 1e308, "", "../../etc/passwd", "\x00", True, None, [], {}, [[]] * 9]
)
JSON = ABSURD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """At no moment more than 200 MB over what the process held at the beginning."""
    before = forget_peak()
    yield
    assert peak() - before < 200  # MiB


@pytest.fixture(scope="module")
def base(dit_folder: Path) -> BaseModel:
    return load_base(dit_folder)


@pytest.fixture(scope="module")
def originals(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_originals(base, tmp_path_factory.mktemp("originals"))


def write_originals(base: BaseModel, folder: Path) -> Path:
    """One of everything that the library reads. Read only."""
    store = collect(base, PLAN, folder / "store", progress=False)
    adapters = AdapterSet.create(base, "offset", 4, PLAN.guidance_range)
    adapters.save_pretrained(folder / "adapters")
    for _ in train(base, adapters, store, SETTINGS, folder / "checkpoints"):
        pass
    adapters.remove()
    (folder / "checkpoint").mkdir()
    shutil.move(folder / "checkpoints" / "step-0000002", folder / "checkpoint" / "step-0000002")
    log = TrainingLog(folder / "log.safetensors")
    log.losses, log.snapshots = {1: 0.5, 2: 0.25}, {2: torch.zeros(2, 3)}
    log.save()
    influence_of(base, store)
    write_json(folder / "store" / "shard-00001.json", store.manifest["shards"][1])
    theirs = their_adapters(base, "attention", True, True, 1)
    write_checkpoint(folder / "authors", theirs, {"arch": "attention", "use_timestep": True, "use_class_label": True})
    save_reference(folder / "reference.safetensors", torch.rand(9, 4), "four")
    write_tensors(folder / "row.safetensors", {"latents": torch.zeros(2, 4, 8, 8)})
    row = Row("five-classes", "cfg", None, 2.0, 5, 10.0, 2, 0, 1.5, "four", None, None, None, None, 0.1, 1_000, None)
    measured = {"inputs": {}, "row": asdict(row), "latents_sha256": sha256(folder / "row.safetensors")}
    write_json(folder / "row.json", measured | {"checksum": key_of(measured)})
    np.savez(folder / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    (folder / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (5, 4), (40 * number, 9, 200)).save(folder / "images" / f"{number}.png")
    shutil.copy(Path(__file__).parent.parent / "notebooks" / "profiles" / "tiny-dit.cpu.yaml", folder / "profile.yaml")
    return folder


class Four:
    name = "four"
    feature_dim = 4

    def __call__(self, images: torch.Tensor, conditions: Any = None) -> tuple[torch.Tensor, None]:
        return images.flatten(1)[:, :4], None


def resume(folder: Path, base: BaseModel) -> None:
    store = TrajectoryStore(folder.parent / "originals" / "store", check=False)
    adapters = AdapterSet.create(base, "offset", 4, PLAN.guidance_range)
    try:
        list(train(base, adapters, store, SETTINGS, folder))
    finally:
        adapters.remove()


def convert(folder: Path, base: BaseModel) -> AdapterSet:
    return convert_authors_checkpoint(folder / "checkpoints" / "0005000.pt", base)


READ_JSON = """
import resource, sys
from pathlib import Path
from agd_lib.errors import AGDError
from agd_lib.storage import read_json

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
for name in sys.argv[1:]:
    try:
        read_json(Path(name), AGDError, "file")
        print("read")
    except AGDError as error:
        print(error)
print(peak() - before)
"""

FILLINGS = ("{},", "[],", '{"a":1.5},', '"abcd",', "1.5,", "text", "wide \U0001f7e5")


def test_the_memory_that_json_can_take_is_bounded(tmp_path: Path) -> None:
    """The fullest files that are still read, and ones of more values or bytes."""
    files = []
    for number, filling in enumerate(FILLINGS):
        marks = sum(filling.count(mark) for mark in ",[{")
        times = MAX_JSON_VALUES // marks - 10 if marks else (MAX_JSON_BYTES - 20) // len(filling.encode())
        for repeated in (times, times + 20):
            body = filling * repeated
            files.append(tmp_path / f"{number}-{repeated}.json")
            files[-1].write_text('{"a":[' + body.removesuffix(",") + "]}" if marks else '{"a":"' + body + '"}')
    run = subprocess.run([sys.executable, "-c", READ_JSON, *files], capture_output=True, text=True, check=True)
    *said, taken = run.stdout.splitlines()
    assert said[::2] == ["read"] * len(FILLINGS)
    assert all("expected at most" in line for line in said[1::2])
    assert int(taken) < 200_000  # KiB


READERS: dict[str, tuple[str, Callable[[Path, BaseModel], Any]]] = {
    "store/shard-00001.safetensors": ("store", lambda folder, base: TrajectoryStore(folder, check=False)),
    "store/conditions.safetensors": ("store", lambda folder, base: TrajectoryStore(folder, check=False)),
    "store/manifest.json": ("store", lambda folder, base: TrajectoryStore(folder)),
    "store/influence.safetensors": (
        "store",
        lambda folder, base: influence_of(base, TrajectoryStore(folder, check=False)),
    ),
    "store/shard-00001.json": ("store", lambda folder, base: _noted(folder, 1)),
    "authors/checkpoints/0005000.pt": ("authors", lambda folder, base: convert(folder, base)),
    "authors/config.yaml": ("authors", lambda folder, base: convert(folder, base)),
    "adapters/adapter_model.safetensors": ("adapters", lambda folder, base: AdapterSet.from_pretrained(folder)),
    "adapters/config.json": ("adapters", lambda folder, base: AdapterSet.from_pretrained(folder)),
    "checkpoint/step-0000002/training.json": ("checkpoint", resume),
    "checkpoint/step-0000002/optimizer.safetensors": ("checkpoint", resume),
    "log.safetensors": ("log.safetensors", lambda file, base: TrainingLog(file)),
    "reference.safetensors": ("reference.safetensors", lambda file, base: load_reference(file, Four())),
    "row.json": ("row.json", lambda file, base: _read_kept(file, {})),
    "statistics.npz": ("statistics.npz", lambda file, base: load_reference(file, Four())),
    "images/3.png": ("images", lambda folder, base: load_reference(folder, Four())),
    "profile.yaml": ("profile.yaml", lambda file, base: load_profile("cpu", "tiny-dit", file)),
}
"""File -> what of :func:`originals` is copied, and how the library reads it."""


def repair(file: Path) -> None:
    """Renew the checksum that stands in a changed file, or beside it, as somebody would who knows how."""
    note = file.with_name("training.json") if file.name == "optimizer.safetensors" else file
    try:
        value = json.loads(note.read_text())
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict):
        return
    if file.name == "optimizer.safetensors":
        value["sha256"][file.name] = sha256(file)
    elif file.name == "manifest.json":
        value["manifest_sha256"] = _manifest_checksum(value)
    elif file.name == "row.json":
        value.pop("checksum", None)
        value["checksum"] = key_of(value)
    else:
        return
    note.write_text(json.dumps(value))


def read_changed(
    originals: Path,
    tmp_path: Path,
    base: BaseModel,
    name: str,
    change: Callable[[bytes], bytes],
    repaired: bool = False,
) -> None:
    """Change one file in a copy and read it: an error of the library's own, or nothing."""
    what, reader = READERS[name]
    if not (tmp_path / "originals").exists():
        (tmp_path / "originals").symlink_to(originals)
    copy = tmp_path / what
    if copy.is_dir():
        shutil.rmtree(copy)
    if (originals / what).is_dir():
        shutil.copytree(originals / what, copy)
    else:
        shutil.copy(originals / what, copy)
        if name == "row.json":
            shutil.copy(originals / "row.safetensors", tmp_path)
    (tmp_path / name).write_bytes(change((originals / name).read_bytes()))
    if repaired:
        repair(tmp_path / name)
    try:
        reader(copy, base)
    except AGDError as error:
        assert len(str(error)) < 3_000


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> Any:
        return Path.touch, (self.fuse,)


BASE_FILES = ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


@pytest.mark.parametrize("writer", [pickle.dumps, "torch"])
@pytest.mark.parametrize("name", [*READERS, *BASE_FILES, "extractor", "base.ckpt", "base.safetensors"])
def test_no_loader_runs_what_a_pickle_says(
    originals: Path, dit_folder: Path, tmp_path: Path, base: BaseModel, name: str, writer: Any
) -> None:
    """Every loader of the library, given a pickle in place of its file: bytes of pickle's, and torch's archive of them."""
    fuse, bomb = tmp_path / "exploded", tmp_path / "bomb"
    if writer == "torch":
        torch.save({"model": Bomb(fuse)}, bomb)
    else:
        bomb.write_bytes(writer({"model": Bomb(fuse)}))
    data = bomb.read_bytes()
    torch.load(bomb, weights_only=False) if writer == "torch" else pickle.loads(data)
    assert fuse.exists()  # it would go off
    fuse.unlink()
    if name in READERS:
        read_changed(originals, tmp_path, base, name, lambda _: data)
    elif name in BASE_FILES:
        for suffixes in ([".safetensors"], [".bin"]):
            folder = tmp_path / f"base{suffixes[0]}"
            shutil.copytree(dit_folder, folder)
            (folder / f"{name}.safetensors").unlink()
            (folder / name).with_suffix(suffixes[0]).write_bytes(data)
            with pytest.raises(AGDError):
                load_base(folder)
    elif name == "extractor":
        ShapesExtractor(num_classes=3, feature_dim=8, width=8).save_pretrained(tmp_path / name)
        weights = tmp_path / name / "diffusion_pytorch_model.safetensors"
        for path in (weights, weights.with_suffix(".bin")):
            weights.unlink(missing_ok=True)
            path.write_bytes(data)
            with pytest.raises((AGDError, ValueError)):
                ShapesFeatures(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AGDError):
            load_base(tmp_path / name)
    assert not fuse.exists()


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut, overwrite or insert bytes; the beginning, where headers are, more often than the rest."""
    kind, place = (
        draw(st.sampled_from(["cut", "write", "insert"])),
        draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 4])),
    )
    new = draw(st.binary(min_size=1, max_size=12))

    def change(old: bytes) -> bytes:
        at = int(place * len(old))
        if kind == "cut":
            return old[:at]
        return old[:at] + new + old[at + (len(new) if kind == "write" else 0) :]

    return change


@pytest.mark.parametrize("name", READERS)
@MANY
@given(change=changes(), repaired=st.booleans())
def test_changed_bytes(
    originals: Path, tmp_path: Path, base: BaseModel, name: str, change: Callable[[bytes], bytes], repaired: bool
) -> None:
    read_changed(originals, tmp_path, base, name, change, repaired)


@pytest.mark.parametrize("name", [name for name in READERS if Path(name).suffix in (".json", ".yaml")])
@MANY
@given(data=st.data())
def test_changed_values(originals: Path, tmp_path: Path, base: BaseModel, name: str, data: st.DataObject) -> None:
    def change(old: bytes) -> bytes:
        whole: Any = yaml.safe_load(old)
        value = whole
        while (isinstance(value, dict | list) and value and data.draw(st.booleans())) or value is whole:
            keys = sorted(value) if isinstance(value, dict) else range(len(value))
            key = data.draw(st.sampled_from(list(keys)))
            inner = value[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                value[key] = data.draw(JSON)
                break
            value = inner
        return (yaml.safe_dump(whole) if name.endswith("yaml") else json.dumps(whole)).encode()

    read_changed(originals, tmp_path, base, name, change, repaired=data.draw(st.booleans()))
