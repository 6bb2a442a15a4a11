"""Algorithm 1 and the store: the right states, the same bytes whatever happens, and every damage named."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import agd_lib.trajectories
from agd_lib.attach import AdapterSet
from agd_lib.base_models import DiTBase, count_forwards, load_base
from agd_lib.errors import AGDError, StoreError, WriteError
from agd_lib.guidance import CFG
from agd_lib.storage import sha256
from agd_lib.training import TrainingSettings, train
from agd_lib.trajectories import (
    CollectionPlan,
    TrajectoryStore,
    _manifest_checksum,
    collect,
    collect_batch,
    draw_trajectory,
    mean_over_timesteps,
    noised_data_states,
    predicted_size,
    read_manifest,
    with_other_states,
)

LABELS = (0, 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to a busy disk takes a tenth of a second each time; test_storage.py tests that it is done."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base(dit_folder: Path) -> DiTBase:
    """One base model for the tests that change nothing in it."""
    loaded = load_base(dit_folder)
    assert isinstance(loaded, DiTBase)
    return loaded


def a_plan(**changes: Any) -> CollectionPlan:
    """11 trajectories of 6 steps, 3 of them kept, in shards of 4, 4 and 3."""
    values: dict[str, Any] = {
        "conditions": LABELS,
        "num_trajectories": 11,
        "num_inference_steps": 6,
        "steps_per_trajectory": 3,
        "seed": 5,
        "trajectories_per_shard": 4,
    }
    return CollectionPlan(**(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def collected(base: DiTBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of :func:`a_plan`, collected without a disturbance. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("stores") / "undisturbed"
    collect(base, a_plan(), folder, batch_size=2, progress=False)
    return folder


# Algorithm 1 -------------------------------------------------------------------------------------------------------


def naive_trajectories(base: DiTBase, plan: CollectionPlan) -> dict[str, list[Any]]:
    """Algorithm 1 once more, one trajectory at a time, with two separate passes of the transformer."""
    columns: dict[str, list[Any]] = {}
    transformer, null = base.pipeline.transformer, base.num_classes
    for index in range(plan.num_trajectories):
        seed = int(np.random.SeedSequence((plan.seed, index)).generate_state(1, np.uint64)[0]) // 2
        generator = torch.Generator().manual_seed(seed)
        low, high = plan.guidance_range
        w = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        kept = sorted(torch.randperm(plan.num_inference_steps, generator=generator).tolist()[: plan.kept_steps])
        x = torch.randn(base.latent_shape, generator=generator)[None]
        label = plan.conditions[index % len(plan.conditions)]
        scheduler = DDIMScheduler.from_config(base.scheduler.config)
        scheduler.set_timesteps(plan.num_inference_steps)
        for number, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                cond = transformer(x, timestep=t[None], class_labels=torch.tensor([label])).sample[:, :4]
                uncond = transformer(x, timestep=t[None], class_labels=torch.tensor([null])).sample[:, :4]
            guided = uncond + w * (cond - uncond)
            if number in kept:
                record = {
                    "latents": x[0],
                    "target": guided[0],
                    "timestep": int(t),
                    "guidance_scale": w,
                    "condition": index % len(plan.conditions),
                    "signal": float(((guided - cond) ** 2).mean()),
                }
                for name, value in record.items():
                    columns.setdefault(name, []).append(value)
            x = scheduler.step(guided, t, x).prev_sample
    return columns


@pytest.mark.parametrize("kept", [3, "all"])
def test_algorithm_1_equals_a_naive_implementation(base: DiTBase, kept: int | str) -> None:
    plan = a_plan(steps_per_trajectory=kept, guidance_range=(1.0, 6.0))
    expected, found = naive_trajectories(base, plan), collect_batch(base, plan, range(plan.num_trajectories))
    assert found["timestep"].tolist() == expected["timestep"]
    assert found["condition"].tolist() == expected["condition"]
    assert torch.equal(found["guidance_scale"], torch.tensor(expected["guidance_scale"], dtype=torch.float32))
    for name in ("latents", "target"):
        torch.testing.assert_close(found[name], torch.stack(expected[name]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["signal"], torch.tensor(expected["signal"]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_choices_and_noise_do_not_depend_on_the_batch_size(dit_base: DiTBase, scheduler: Any) -> None:
    dit_base.scheduler = scheduler.from_config(dit_base.scheduler.config)
    plan = a_plan(num_trajectories=8, steps_per_trajectory="all", num_inference_steps=5)
    runs = []
    for size in (1, 3, 8):
        pieces = [collect_batch(dit_base, plan, range(start, min(start + size, 8))) for start in range(0, 8, size)]
        runs.append({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})
    for run in runs[1:]:
        for name in ("guidance_scale", "timestep", "condition"):
            assert torch.equal(run[name], runs[0][name])
        assert torch.equal(run["latents"][::5], runs[0]["latents"][::5])  # x_T: the noise itself
        for name in ("latents", "target"):
            torch.testing.assert_close(run[name], runs[0][name], rtol=1e-3, atol=1e-4)


def test_kept_timesteps_do_not_depend_on_the_batch_size(base: DiTBase) -> None:
    plan = a_plan(num_trajectories=7)
    single = torch.cat([collect_batch(base, plan, [i])["timestep"] for i in range(7)])
    assert torch.equal(collect_batch(base, plan, range(7))["timestep"], single)


def test_kept_steps_are_drawn_uniformly_and_anew_for_each_trajectory() -> None:
    plan = a_plan(num_inference_steps=10, steps_per_trajectory=3)
    draws = [draw_trajectory(plan, index).kept_steps for index in range(600)]
    assert all(len(kept) == 3 and list(kept) == sorted(set(kept)) for kept in draws)
    counts = np.bincount(np.array(draws).ravel(), minlength=10)  # each Binomial(600, 0.3): 180, deviation 11.2
    assert len(counts) == 10 and np.all(np.abs(counts - 180) < 50)
    assert len(set(draws)) > 100  # of 120 possible ones


def test_scales_are_uniform_over_the_range_and_belong_to_the_seed() -> None:
    plan = a_plan(guidance_range=(2.0, 8.0))
    scales = np.sort([draw_trajectory(plan, index).guidance_scale for index in range(600)])
    assert scales[0] >= 2 and scales[-1] <= 8
    uniform = (np.arange(600) + 0.5) / 600
    assert np.abs((scales - 2) / 6 - uniform).max() < 0.066  # Kolmogorov-Smirnov, one in a hundred
    assert draw_trajectory(plan, 0).guidance_scale != draw_trajectory(a_plan(seed=6), 0).guidance_scale


def test_a_range_of_one_scale_is_that_scale(base: DiTBase) -> None:
    found = collect_batch(base, a_plan(guidance_range=(3.0, 3.0)), range(4))
    assert set(found["guidance_scale"].tolist()) == {3.0}


def test_at_scale_1_the_target_is_the_conditional_prediction_from_one_pass_a_step(
    base: DiTBase, tmp_path: Path
) -> None:
    plan = a_plan(guidance_range=(1.0, 1.0), dtype="float32")
    with count_forwards(base) as meter:
        store = collect(base, plan, tmp_path, progress=False)
    assert meter.nfe(plan.num_trajectories) == plan.num_inference_steps
    conditional, _ = recomputed_targets(base, store)
    batch = store.batch(torch.arange(len(store)))
    torch.testing.assert_close(batch.target, conditional, rtol=1e-4, atol=1e-5)
    assert not batch.signal.any()


def recomputed_targets(base: DiTBase, store: TrajectoryStore) -> tuple[torch.Tensor, torch.Tensor]:
    batch = store.batch(torch.arange(len(store)))
    null = {"class_labels": torch.full((len(store),), base.num_classes)}
    with torch.no_grad():
        cond = base.denoise(batch.latents, batch.timestep, batch.condition)
        uncond = base.denoise(batch.latents, batch.timestep, null)
    return cond, uncond + batch.guidance_scale.view(-1, 1, 1, 1) * (cond - uncond)


def test_stored_targets_and_signals_are_those_of_the_stored_latents(base: DiTBase, tmp_path: Path) -> None:
    store = collect(base, a_plan(dtype="float32"), tmp_path, progress=False)
    conditional, guided = recomputed_targets(base, store)
    batch = store.batch(torch.arange(len(store)))
    torch.testing.assert_close(batch.target, guided, rtol=1e-4, atol=1e-5)
    signal = (guided - conditional).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(batch.signal, signal, rtol=1e-3, atol=1e-8)
    assert float(batch.signal.max()) > 1e-3  # there is something to learn


def test_low_precision_storage_rounds_and_does_nothing_else(base: DiTBase, tmp_path: Path) -> None:
    exact = collect(base, a_plan(dtype="float32"), tmp_path / "float32", progress=False)
    everything = torch.arange(len(exact))
    for dtype, bound in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        store = collect(base, a_plan(dtype=dtype), tmp_path / dtype, progress=False)
        for name in ("latents", "target"):
            rounded, whole = getattr(store.batch(everything), name), getattr(exact.batch(everything), name)
            assert rounded.dtype == torch.float32
            assert bool(((rounded - whole).abs() <= bound * whole.abs() + 1e-7).all())
        assert torch.equal(store.column("signal"), exact.column("signal"))


def test_three_guided_channels_are_recorded_and_honoured(base: DiTBase, tmp_path: Path) -> None:
    store = collect(base, a_plan(dtype="float32", guided_channels=3), tmp_path / "three", progress=False)
    conditional, guided = recomputed_targets(base, store)
    target = store.batch(torch.arange(len(store))).target
    torch.testing.assert_close(target[:, :3], guided[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target[:, 3], conditional[:, 3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(target[:, 3], guided[:, 3], atol=1e-3)
    assert store.manifest["guided_channels"] == 3
    with pytest.raises(StoreError, match="guided_channels is 3 there, 4 here"):
        collect(base, a_plan(dtype="float32"), tmp_path / "three", progress=False)


def test_all_channels_are_recorded_as_their_number(collected: Path) -> None:
    assert read_manifest(collected)["guided_channels"] == 4


def test_names_and_labels_are_the_same_conditions(base: DiTBase) -> None:
    by_name = collect_batch(base, a_plan(conditions=("bee", "cat")), range(3))
    by_label = collect_batch(base, a_plan(conditions=(1, 2)), range(3))
    assert torch.equal(by_name["target"], by_label["target"])


def test_conditions_are_encoded_once_for_all_batches(
    dit_base: DiTBase, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], dit_base.encode
    monkeypatch.setattr(dit_base, "encode", lambda conditions: encoded.append(list(conditions)) or encode(conditions))
    collect(dit_base, a_plan(), tmp_path / "store", batch_size=2, progress=False)
    assert encoded == [list(a_plan().conditions)]
    assert contents(tmp_path / "store") == contents(collected)


def test_recorded_latents_are_what_the_denoiser_saw_where_the_scheduler_scales_its_input(dit_base: DiTBase) -> None:
    dit_base.scheduler = EulerDiscreteScheduler.from_config(dit_base.scheduler.config, timestep_spacing="leading")
    seen: dict[int, torch.Tensor] = {}

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        seen[int(kwargs["timestep"][0])] = args[0][:2].clone()  # the conditional half of the doubled batch

    dit_base.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    found = collect_batch(dit_base, a_plan(steps_per_trajectory="all"), range(2))
    for row, timestep in enumerate(found["timestep"].tolist()):
        assert torch.equal(found["latents"][row], seen[timestep][row // 6])


def test_a_scheduler_that_calls_twice_a_step_is_refused(dit_base: DiTBase, tmp_path: Path) -> None:
    dit_base.scheduler = HeunDiscreteScheduler.from_config(dit_base.scheduler.config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler makes 11 calls"):
        collect(dit_base, a_plan(), tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_a_thousand_classes_and_a_learned_variance(dit1000_base: DiTBase, tmp_path: Path) -> None:
    plan = a_plan(conditions=(0, 999), num_trajectories=4)
    store = collect(dit1000_base, plan, tmp_path, progress=False)
    batch = store.batch(torch.arange(len(store)))
    assert batch.target.shape == (12, 4, 8, 8)
    assert batch.condition["class_labels"].tolist() == [0] * 3 + [999] * 3 + [0] * 3 + [999] * 3


# Plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trajectories": 0}, "num_trajectories = 0"),
        ({"num_trajectories": 2.5}, "num_trajectories = 2.5"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"trajectories_per_shard": -1}, "trajectories_per_shard = -1"),
        ({"conditions": ()}, "no conditions"),
        ({"conditions": (np.int64(1),)}, r"condition np.int64\(1\)"),
        ({"steps_per_trajectory": 7}, "steps_per_trajectory = 7"),
        ({"steps_per_trajectory": 0}, "steps_per_trajectory = 0"),
        ({"steps_per_trajectory": "some"}, "steps_per_trajectory = 'some'"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"guidance_range": (6.0, 1.0)}, "guidance range"),
        ({"guidance_range": (-1.0, 1.0)}, "guidance range"),
        ({"guidance_range": (1.0, math.inf)}, "guidance range"),
        ({"guidance_range": (math.nan, 2.0)}, "guidance range"),
        ({"guided_channels": 0}, "guided_channels = 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": (0, 5)}, "class label 5"),
        ({"conditions": ("ant", "fox")}, "class name 'fox'"),
        ({"guided_channels": 5}, "guided_channels = 5"),
        ({"num_inference_steps": 1001, "steps_per_trajectory": 1}, "1001 steps"),
    ],
)
def test_what_the_base_cannot_do_is_found_before_any_work(
    base: DiTBase, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with count_forwards(base) as meter, pytest.raises(ValueError, match=message):
        collect(base, a_plan(**changes), tmp_path / "store", progress=False)
    assert meter.calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_that_rounds_is_refused(dit_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    rough = load_base(dit_folder, dtype=dtype)
    with count_forwards(rough) as meter, pytest.raises(ValueError, match=f"in {dtype}, expected torch.float32"):
        collect(rough, a_plan(), tmp_path / "store", progress=False)
    assert meter.calls == 0 and not (tmp_path / "store").exists()
    assert not (tmp_path / "store").exists()


# Interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 5])
def test_interrupted_between_batches_the_store_becomes_the_same_to_the_bit(
    base: DiTBase, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    calls = 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        if calls == stop_at:
            raise KeyboardInterrupt
        calls += 1
        return collect_batch(*args)

    with monkeypatch.context() as patched:
        patched.setattr(agd_lib.trajectories, "collect_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            collect(base, a_plan(), tmp_path, batch_size=2, progress=False)
    assert len(read_manifest(tmp_path)["shards"]) == stop_at // 2  # two batches a shard
    assert not TrajectoryStore(tmp_path).complete
    with count_forwards(base) as meter:
        collect(base, a_plan(), tmp_path, batch_size=2, progress=False)
    assert meter.calls == 6 * (6 - 2 * (stop_at // 2))  # whole shards are not collected again
    assert contents(tmp_path) == contents(collected)


def test_interrupted_within_a_trajectory_the_store_becomes_the_same_to_the_bit(
    base: DiTBase, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        for step in original(*args, **kwargs):
            steps += 1
            if steps == 15:
                raise KeyboardInterrupt
            yield step

    original = agd_lib.trajectories.sample
    with monkeypatch.context() as patched:
        patched.setattr(agd_lib.trajectories, "sample", stopping)
        with pytest.raises(KeyboardInterrupt):
            collect(base, a_plan(), tmp_path, batch_size=2, progress=False)
    collect(base, a_plan(), tmp_path, batch_size=2, progress=False)
    assert contents(tmp_path) == contents(collected)


def test_refused_by_the_disk_at_every_file_the_store_becomes_the_same_to_the_bit(
    base: DiTBase, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = 2 + 2 * 3  # conditions, manifest; then for each shard itself and the manifest
    for refused in range(files):
        folder, calls, original = tmp_path / str(refused), 0, os.replace

        def replace(source: Any, target: Any, refused: int = refused, original: Any = original) -> None:
            nonlocal calls
            calls += 1
            if calls == refused + 1:
                raise OSError(28, "No space left on device")
            original(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(WriteError, match="No space left"):
                collect(base, a_plan(), folder, batch_size=2, progress=False)
        assert not list(folder.glob(".*")) and not list(folder.glob("*partial*"))
        collect(base, a_plan(), folder, batch_size=2, progress=False)
        assert contents(folder) == contents(collected)


KILLED = """
import sys, time
from pathlib import Path
import agd_lib.storage
from agd_lib.base_models import load_base
from agd_lib.trajectories import CollectionPlan, collect

original, calls = agd_lib.storage.save_file, 0

def save_half(tensors, path, metadata=None):
    global calls
    calls += 1
    original(tensors, path, metadata)
    if calls == 3:  # conditions, the first shard, then the second
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        print("half written", flush=True)
        time.sleep(600)

agd_lib.storage.save_file = save_half
plan = CollectionPlan(conditions=(0, 1, 2, 3, 4), num_trajectories=11, num_inference_steps=6, steps_per_trajectory=3,
                      seed=5, trajectories_per_shard=4)
collect(load_base(sys.argv[1]), plan, sys.argv[2], batch_size=2, progress=False)
"""


def test_killed_while_it_writes_a_shard_the_store_becomes_the_same_to_the_bit(
    base: DiTBase, dit_folder: Path, collected: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", KILLED, str(dit_folder), str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "half written\n"
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    store = TrajectoryStore(tmp_path / "store")
    assert len(store.manifest["shards"]) == 1 and len(store) == 12
    assert (tmp_path / "store" / ".shard-00001.safetensors.partial").exists()
    collect(base, a_plan(), tmp_path / "store", batch_size=2, progress=False)
    assert contents(tmp_path / "store") == contents(collected)


def test_a_complete_store_is_left_alone(base: DiTBase, collected: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in collected.iterdir()}
    with count_forwards(base) as meter:
        store = collect(base, a_plan(), collected, progress=False)
    assert meter.calls == 0 and store.complete
    assert {path.name: path.stat().st_mtime_ns for path in collected.iterdir()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"num_trajectories": 12},
        {"conditions": (0, 1, 2, 3)},
        {"guidance_range": (1.0, 5.0)},
        {"num_inference_steps": 7},
        {"steps_per_trajectory": 2},
        {"seed": 6},
        {"dtype": "float32"},
        {"trajectories_per_shard": 5},
        {"guided_channels": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_plan_is_refused_and_the_difference_named(
    base: DiTBase, collected: Path, changes: dict[str, Any]
) -> None:
    before, (name,) = contents(collected), changes
    with pytest.raises(StoreError, match=rf"differs in {name}: {name} is .* there, .* here"):
        collect(base, a_plan(**changes), collected, progress=False)
    assert contents(collected) == before


def test_another_base_model_is_refused(dit_base: DiTBase, collected: Path) -> None:
    with torch.no_grad():
        next(dit_base.denoiser.parameters()).mul_(1.01)
    with pytest.raises(StoreError, match="differs in base_fingerprint"):
        collect(dit_base, a_plan(), collected, progress=False)
    with pytest.raises(StoreError, match="undisturbed was collected with five-classes"):
        TrajectoryStore(collected).check_base(dit_base)


def test_another_sampler_is_refused(dit_base: DiTBase, collected: Path) -> None:
    dit_base.scheduler = DDPMScheduler.from_config(dit_base.scheduler.config)
    with pytest.raises(StoreError, match=r"differs in scheduler: scheduler is \{'class': 'DDIMScheduler'"):
        collect(dit_base, a_plan(), collected, progress=False)


def test_the_same_base_model_under_another_name_is_the_same(
    dit_folder: Path, base: DiTBase, collected: Path, tmp_path: Path
) -> None:
    shutil.copytree(dit_folder, tmp_path / "a-copy")
    copied = load_base(tmp_path / "a-copy")
    assert collect(copied, a_plan(), collected, progress=False).complete
    TrajectoryStore(collected).check_base(copied)


def test_no_path_of_this_machine_is_in_a_store(collected: Path) -> None:
    manifest = (collected / "manifest.json").read_text()
    assert json.loads(manifest)["base_name"] == "five-classes"
    assert str(collected.parent) not in manifest and "/" not in manifest


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing_but_the_order_of_sums(
    base: DiTBase, collected: Path, tmp_path: Path, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        other = collect(base, a_plan(), tmp_path / "other", batch_size=2, progress=False)
    finally:
        torch.set_num_threads(before)
    store = TrajectoryStore(collected)
    for name in ("timestep", "guidance_scale", "condition"):
        assert torch.equal(other.column(name), store.column(name))
    one, two = (each.batch(torch.arange(len(store))) for each in (store, other))
    torch.testing.assert_close(two.latents, one.latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(two.target, one.target, rtol=2e-3, atol=2e-3)


# Damage ------------------------------------------------------------------------------------------------------------

SHARD = "shard-00001.safetensors"


def truncate(folder: Path) -> None:
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[: len(whole) // 2])


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = bytearray((folder / name).read_bytes())
        values[-1] ^= 1
        (folder / name).write_bytes(values)

    return change


def link(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edited manifest with the right checksum of its own: what is in it must be found wrong."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        manifest["manifest_sha256"] = _manifest_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def edit_by_hand(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(re.sub(r'"seed": (\d+)', r'"seed": 1\1', text))


def fill(folder: Path) -> None:
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(2**26 + 1)  # takes no room on the disk


def set_shard(number: int, **values: Any) -> Callable[[Path], None]:
    return edited(lambda manifest: manifest["shards"][number].update(values))


def other_conditions(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        save_file(tensors, folder / "conditions.safetensors")
        edited(lambda manifest: manifest.update(conditions_sha256=sha256(folder / "conditions.safetensors")))(folder)

    return replace


def other_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A shard with other tensors in it and the right checksum in the manifest."""

    def replace(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD)
        set_shard(1, sha256=sha256(folder / SHARD))(folder)

    return replace


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (truncate, SHARD),
    "flipped byte": (flip(SHARD), SHARD),
    "flipped byte in the conditions": (flip("conditions.safetensors"), "conditions.safetensors"),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "missing conditions": (
        lambda folder: (folder / "conditions.safetensors").unlink(),
        "conditions.safetensors is missing",
    ),
    "linked shard": (link(SHARD), f"{SHARD} is a link"),
    "linked conditions": (link("conditions.safetensors"), "conditions.safetensors is a link"),
    "linked manifest": (link("manifest.json"), "manifest.json is a link"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json is not valid JSON"),
    "other version": (edited(lambda m: m.update(format_version=1)), "store format version 1, this library reads 2"),
    "edited by hand": (edit_by_hand, "is not what was written"),
    "huge manifest": (fill, "has 67,108,865 bytes, expected at most"),
    "unknown condition": (
        other_tensors(lambda t: t["condition"][3:4].fill_(5)),
        f"{SHARD} holds a condition that is not in 0 to 4",
    ),
    "negative timestep": (
        other_tensors(lambda t: t["timestep"][3:4].fill_(-1)),
        f"{SHARD} holds a timestep that is not in 0 to 999",
    ),
    "no scale": (
        other_tensors(lambda t: t["guidance_scale"][3:4].fill_(math.nan)),
        f"{SHARD} holds a guidance_scale of nan in row 3",
    ),
    "negative signal": (
        other_tensors(lambda t: t["signal"][3:4].fill_(-0.5)),
        f"{SHARD} holds a signal of -0.5 in row 3",
    ),
    "a number for the conditions": (
        other_conditions({"class_labels": torch.tensor(3)}),
        f"{SHARD.replace('1', '0')} holds a condition that is not in 0 to -1",
    ),
    "more rows": (set_shard(1, rows=13), SHARD),
    "rows of text": (set_shard(1, rows="12"), "malformed entry for shard 1"),
    "file outside": (set_shard(1, file=f"../{SHARD}"), r"malformed entry for shard 1: .*\.\./shard"),
    "absolute file": (set_shard(1, file="/etc/passwd"), "malformed entry for shard 1: .*/etc/passwd"),
    "listed twice": (edited(lambda m: m["shards"].append(m["shards"][0])), "lists 4 shards, its plan has 3"),
    "one in place of another": (
        edited(lambda m: m["shards"].insert(1, m["shards"].pop(0))),
        "malformed entry for shard 0",
    ),
    "no shards": (edited(lambda m: m.pop("shards")), "shards = None, expected a list"),
    "no checksum": (edited(lambda m: m["shards"][1].pop("sha256")), "malformed entry for shard 1"),
    "other latent shape": (edited(lambda m: m.update(latent_shape=[4, 4, 8])), "shard-00000.safetensors holds"),
    "no sampler steps": (
        edited(lambda m: m.update(num_inference_steps=0)),
        "num_inference_steps = 0, expected a whole",
    ),
    "guided channels of text": (
        edited(lambda m: m.update(guided_channels="3")),
        "guided_channels = '3', expected a whole",
    ),
    "no latent shape": (edited(lambda m: m.update(latent_shape=[4, 8])), r"latent_shape = \[4, 8\]"),
    "no range": (edited(lambda m: m.update(guidance_range=None)), "guidance_range = None"),
    "no steps": (edited(lambda m: m.update(num_train_timesteps=0)), "num_train_timesteps = 0"),
    "too many steps": (
        edited(lambda m: m.update(num_train_timesteps=10**12)),
        "num_train_timesteps = 1000000000000, expected a whole number from 1 to 100,000",
    ),
    "other dtype": (edited(lambda m: m.update(dtype="float32")), "shard-00000.safetensors holds"),
    "missing tensor": (other_tensors(lambda t: t.pop("signal")), f"{SHARD} holds"),
    "wrong shape": (other_tensors(lambda t: t.update(target=t["target"][:, :3].contiguous())), f"{SHARD} holds"),
    "wrong dtype": (other_tensors(lambda t: t.update(timestep=t["timestep"].float())), f"{SHARD} holds"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(collected: Path, tmp_path: Path, damage: str) -> None:
    folder, (harm, message) = tmp_path / "store", DAMAGES[damage]
    shutil.copytree(collected, folder)
    harm(folder)
    with pytest.raises(StoreError, match=message) as caught:
        TrajectoryStore(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [SHARD, "conditions.safetensors", "manifest.json"])
def test_links_are_refused_without_checksums_too(collected: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(collected, tmp_path / "store")
    link(name)(tmp_path / "store")
    with pytest.raises(StoreError, match=f"{name} is a link"):
        TrajectoryStore(tmp_path / "store", check=False)


MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "more timesteps": (
        edited(lambda m: m.update(num_train_timesteps=2_000)),
        "num_train_timesteps = 2000, .* has 1000",
    ),
    "another prediction": (
        edited(lambda m: m.update(prediction_type="sample")),
        "prediction_type = 'sample', .* has 'epsilon'",
    ),
    "a class that is not there": (
        other_conditions({"class_labels": torch.tensor([0, 1, 2, 3, 999])}),
        r"conditions.safetensors holds {'class_labels': \(5,\)}, which are no conditions of",
    ),
    "classes as fractions": (other_conditions({"class_labels": torch.zeros(5)}), "no conditions of"),
    "conditions of another name": (other_conditions({"labels": torch.arange(5)}), "no conditions of"),
    "one condition more": (
        other_conditions({"class_labels": torch.arange(5), "text_embeds": torch.zeros(5, 3)}),
        "no conditions of",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_the_base_model_cannot_take_is_never_trained_on(
    base: DiTBase, collected: Path, tmp_path: Path, misfit: str
) -> None:
    harm, message = MISFITS[misfit]
    shutil.copytree(collected, tmp_path / "store")
    harm(tmp_path / "store")
    adapters = AdapterSet.create(base, hidden_size=8)
    with pytest.raises(StoreError, match=message):
        list(train(base, adapters, TrajectoryStore(tmp_path / "store"), TrainingSettings(num_steps=1, batch_size=2)))


def test_damage_is_found_before_collection_goes_on(base: DiTBase, collected: Path, tmp_path: Path) -> None:
    shutil.copytree(collected, tmp_path / "store")
    edited(lambda manifest: manifest["shards"].pop())(tmp_path / "store")  # so that there is work left
    flip("shard-00000.safetensors")(tmp_path / "store")
    with count_forwards(base) as meter, pytest.raises(StoreError, match=r"shard-00000\.safetensors"):
        collect(base, a_plan(), tmp_path / "store", progress=False)
    assert meter.calls == 0


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no store manifest at .*manifest\.json"):
        TrajectoryStore(tmp_path)


def break_at(base: DiTBase, label: int, call: int, factor: float) -> None:
    """From its ``call``-th forward pass on, the denoiser multiplies what it says of ``label`` by ``factor``."""
    calls = 0

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            output.sample[kwargs["class_labels"] == label] *= factor
        return output

    base.denoiser.register_forward_hook(spoil, with_kwargs=True)


def test_nan_is_found_with_its_trajectory_and_timestep_and_nothing_is_listed(dit_base: DiTBase, tmp_path: Path) -> None:
    plan = a_plan(steps_per_trajectory="all")
    timesteps = collect_batch(dit_base, plan, [0])["timestep"].tolist()
    break_at(dit_base, label=2, call=3, factor=math.nan)
    with pytest.raises(StoreError, match=f"the target of trajectory 2 at timestep {timesteps[3]} is NaN"):
        collect(dit_base, plan, tmp_path, progress=False)
    assert read_manifest(tmp_path)["shards"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditions.safetensors", "manifest.json"]


def test_a_target_too_large_for_the_stored_dtype_is_found(dit_base: DiTBase, tmp_path: Path) -> None:
    break_at(dit_base, label=3, call=5, factor=1e7)
    plan = a_plan(steps_per_trajectory="all", num_trajectories=4)
    with pytest.raises(StoreError, match=r"the target of trajectory 3 at timestep \d+ is NaN or infinite as float16"):
        collect(dit_base, plan, tmp_path, progress=False)
    assert read_manifest(tmp_path)["shards"] == []


def test_the_same_targets_fit_into_float32(dit_base: DiTBase, tmp_path: Path) -> None:
    break_at(dit_base, label=3, call=5, factor=1e7)
    plan = a_plan(steps_per_trajectory="all", num_trajectories=4, dtype="float32")
    assert collect(dit_base, plan, tmp_path, progress=False).complete


# Reading -----------------------------------------------------------------------------------------------------------


def test_columns_and_batches_give_the_shards_rows_in_the_order_asked(collected: Path) -> None:
    store = TrajectoryStore(collected)
    shards = [load_file(collected / f"shard-0000{number}.safetensors") for number in range(3)]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert len(store) == 33 and [len(shard["timestep"]) for shard in shards] == [12, 12, 9]
    for name in ("timestep", "guidance_scale", "condition", "signal"):
        assert torch.equal(store.column(name), whole[name])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).repeat(2)
    batch = store.batch(order)
    for name in ("latents", "target", "timestep", "guidance_scale", "signal"):
        assert torch.equal(getattr(batch, name), whole[name][order].to(getattr(batch, name).dtype))
    assert torch.equal(batch.condition["class_labels"], torch.tensor(LABELS)[whole["condition"][order]])
    with pytest.raises(IndexError):
        store.batch(torch.tensor([33]))


def test_a_batch_moves_whole(collected: Path) -> None:
    moved = TrajectoryStore(collected).batch(torch.arange(2)).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.is_meta for tensor in [*tensors, *moved.condition.values()])


@pytest.mark.parametrize("changes", [{}, {"steps_per_trajectory": "all"}, {"dtype": "float32"}], ids=str)
def test_predicted_size_is_the_size_on_disk_but_for_headers(
    base: DiTBase, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = a_plan(**changes)
    store = collect(base, plan, tmp_path, progress=False)
    tensors = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 0 <= tensors - predicted_size(base, plan) <= (plan.num_shards + 1) * 1024
    assert store.size_on_disk() == sum(len(data) for data in contents(tmp_path).values())


def test_noised_data_have_the_variance_of_their_timesteps(base: DiTBase, collected: Path) -> None:
    store = TrajectoryStore(collected)
    alphas = base.scheduler.alphas_cumprod[store.column("timestep")]
    states = noised_data_states(store, torch.full((1, 4, 8, 8), 2.0), base, seed=1)
    assert states.shape == (33, 4, 8, 8)
    noise = (states - 2 * alphas.sqrt().view(-1, 1, 1, 1)) / (1 - alphas).sqrt().view(-1, 1, 1, 1)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(states, noised_data_states(store, torch.full((1, 4, 8, 8), 2.0), base, seed=1))


def test_noised_data_of_each_states_own_condition(base: DiTBase, collected: Path) -> None:
    store = TrajectoryStore(collected)
    clean = torch.tensor([0.0, 100.0, 200.0, 300.0, 400.0, 400.0])[:, None, None, None].expand(6, 4, 8, 8)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    states = noised_data_states(store, clean, base, clean_conditions=labels)
    alphas = base.scheduler.alphas_cumprod[store.column("timestep")]
    means = states.mean(dim=(1, 2, 3)) / alphas.sqrt()
    torch.testing.assert_close(means, 100.0 * store.column("condition"), rtol=0.05, atol=5)
    with pytest.raises(ValueError, match="got no clean latents of condition 4"):
        noised_data_states(store, clean[:4], base, clean_conditions=labels[:4])


def test_a_store_with_the_same_states_has_the_same_targets(base: DiTBase, collected: Path, tmp_path: Path) -> None:
    store = TrajectoryStore(collected)
    everything = store.batch(torch.arange(len(store)))
    again = with_other_states(store, base, everything.latents, tmp_path / "again", batch_size=2)
    assert again.complete and TrajectoryStore(tmp_path / "again").manifest["base_fingerprint"] == base.fingerprint()
    batch = again.batch(torch.arange(len(store)))
    for name in ("latents", "timestep", "guidance_scale"):
        assert torch.equal(getattr(batch, name), getattr(everything, name)), name
    torch.testing.assert_close(batch.target, everything.target, rtol=5e-3, atol=5e-3)  # states were rounded to float16
    torch.testing.assert_close(batch.signal, everything.signal, rtol=5e-2, atol=1e-3)


def test_a_store_with_other_states_has_the_teachers_answers_there(
    base: DiTBase, collected: Path, tmp_path: Path
) -> None:
    store = TrajectoryStore(collected)
    states = noised_data_states(store, torch.zeros(1, 4, 8, 8), base, seed=2)
    other = with_other_states(store, base, states, tmp_path / "other")
    for index in (0, 17, 32):
        batch = other.batch(torch.tensor([index]))
        scale = float(batch.guidance_scale)
        expected = CFG(scale).predict(base, states[index : index + 1], float(batch.timestep), batch.condition)
        torch.testing.assert_close(batch.target, expected.detach(), rtol=1e-2, atol=1e-2)
    assert other.manifest["shards"][0]["sha256"] != store.manifest["shards"][0]["sha256"]
    with pytest.raises(ValueError, match="got 5 latents, expected one for each of the 33 states"):
        with_other_states(store, base, states[:5], tmp_path / "other")
    with_other_states(store, base, states, tmp_path / "other")  # replaces it
    with pytest.raises(StoreError, match="differs in states_of"):  # never taken for guided trajectories
        collect(base, a_plan(), tmp_path / "other", progress=False)


def test_shards_that_are_whole_but_not_listed_are_taken_and_damaged_ones_are_made_again(
    base: DiTBase, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process leaves them: the second and the third shard with notes, the third one damaged."""
    shutil.copytree(collected, tmp_path / "store")
    manifest = json.loads((collected / "manifest.json").read_text())
    for number in (1, 2):
        (tmp_path / "store" / f"shard-0000{number}.json").write_text(json.dumps(manifest["shards"][number]))
    edited(lambda manifest: manifest["shards"].__delitem__(slice(1, None)))(tmp_path / "store")
    flip("shard-00002.safetensors")(tmp_path / "store")
    begun, one_shard = [], agd_lib.trajectories._collect_shard
    monkeypatch.setattr(agd_lib.trajectories, "_collect_shard", lambda *args: begun.append(args[4]) or one_shard(*args))
    collect(base, a_plan(), tmp_path / "store", batch_size=2, progress=False)
    assert begun == [2]
    assert contents(tmp_path / "store") == contents(collected)


def test_shards_of_another_run_do_not_enter_where_the_manifest_is_lost(
    base: DiTBase, collected: Path, tmp_path: Path
) -> None:
    other = collect(base, a_plan(seed=7), tmp_path / "store", progress=False).manifest["shards"]
    for number, entry in enumerate(other):
        (tmp_path / "store" / f"shard-0000{number}.json").write_text(json.dumps(entry))
    (tmp_path / "store" / "manifest.json").unlink()
    collect(base, a_plan(), tmp_path / "store", batch_size=2, progress=False)
    assert contents(tmp_path / "store") == contents(collected)


def test_a_note_that_a_killed_run_left_beside_its_finished_store_is_removed(
    base: DiTBase, collected: Path, tmp_path: Path
) -> None:
    """Killed after the manifest listed the last shard, before its note was gone."""
    shutil.copytree(collected, tmp_path / "store")
    last = json.loads((collected / "manifest.json").read_text())["shards"][-1]
    (tmp_path / "store" / "shard-00002.json").write_text(json.dumps(last))
    collect(base, a_plan(), tmp_path / "store", progress=False)
    assert contents(tmp_path / "store") == contents(collected)


def test_a_shard_beyond_the_plan_is_not_listed(base: DiTBase, collected: Path, tmp_path: Path) -> None:
    shutil.copytree(collected, tmp_path / "store")
    stray = json.loads((collected / "manifest.json").read_text())["shards"][-1] | {"file": "shard-00003.safetensors"}
    shutil.copy(tmp_path / "store" / "shard-00002.safetensors", tmp_path / "store" / stray["file"])
    (tmp_path / "store" / "shard-00003.json").write_text(json.dumps(stray))
    store = collect(base, a_plan(), tmp_path / "store", progress=False)
    assert [shard["file"] for shard in store.manifest["shards"]] == [
        f"shard-0000{number}.safetensors" for number in range(3)
    ]


# Several processes -------------------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys
from agd_lib import trajectories
from agd_lib.base_models import load_base
from agd_lib.trajectories import CollectionPlan, collect

base, plan, dies_at = load_base(sys.argv[1]), CollectionPlan(**json.loads(sys.argv[3])), int(sys.argv[4])
one_shard = trajectories._collect_shard

def counted(base, plan, conditions, folder, shard, *arguments):
    if shard == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"{sys.argv[2]}-collected-{os.environ['RANK']}", "a") as file:
        file.write(f"{shard} ")
    return one_shard(base, plan, conditions, folder, shard, *arguments)

trajectories._collect_shard = counted
store = collect(base, plan, sys.argv[2], batch_size=2, progress=False)
assert store.complete
"""
SHARED = {"conditions": [0, 1, 2, 3, 4], "num_trajectories": 15, "num_inference_steps": 4, "trajectories_per_shard": 2}


def collect_together(dit_folder: Path, folder: Path, dies_at: int = -1) -> tuple[int, list[list[int]]]:
    """Two processes collect; returns the launcher's exit code, and the shards that each has begun, in all so far."""
    (folder.parent / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [folder.parent / "worker.py", dit_folder, folder, json.dumps(SHARED), dies_at]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    finished = subprocess.run(
        [*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    if dies_at < 0:
        assert finished.returncode == 0, finished.stderr[-3000:]
    logs = [folder.with_name(f"{folder.name}-collected-{rank}") for rank in (0, 1)]
    return finished.returncode, [[int(n) for n in log.read_text().split()] if log.exists() else [] for log in logs]


def test_two_processes_make_the_store_of_one(dit_folder: Path, tmp_path: Path) -> None:
    _, shards = collect_together(dit_folder, tmp_path / "together")
    assert shards == [[0, 2, 4, 6], [1, 3, 5, 7]]
    plan = CollectionPlan(**SHARED | {"conditions": (0, 1, 2, 3, 4)})  # type: ignore[arg-type]
    alone = collect(load_base(dit_folder), plan, tmp_path / "alone", progress=False)  # 2 trajectories at once, or all
    together = TrajectoryStore(tmp_path / "together")
    names = sorted(path.name for path in together.folder.iterdir())
    assert names == sorted(path.name for path in alone.folder.iterdir())
    for name in ("timestep", "guidance_scale", "condition"):
        assert torch.equal(together.column(name), alone.column(name))
    everything = torch.arange(len(alone))
    one, two = alone.batch(everything), together.batch(everything)
    first = one.timestep == one.timestep.max()
    assert int(first.sum()) == 15 and torch.equal(two.latents[first], one.latents[first])  # the noise
    torch.testing.assert_close(two.latents, one.latents, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(two.target, one.target, rtol=2e-3, atol=2e-3)


def test_what_one_process_has_finished_stays_when_the_other_dies(dit_folder: Path, tmp_path: Path) -> None:
    code, begun = collect_together(dit_folder, tmp_path / "store", dies_at=3)
    assert code != 0 and begun[1] == [1]
    finished = {path.name for path in (tmp_path / "store").glob("shard-*.safetensors")}
    assert "shard-00001.safetensors" in finished
    stamps = {name: (tmp_path / "store" / name).stat().st_mtime_ns for name in finished}
    _, begun = collect_together(dit_folder, tmp_path / "store")
    assert TrajectoryStore(tmp_path / "store").complete
    assert not list((tmp_path / "store").glob("shard-*.json"))
    kept = [name for name in finished if (tmp_path / "store" / name).stat().st_mtime_ns == stamps[name]]
    assert len(kept) >= len(finished) - 1  # the launcher may have killed one between its bytes and its note


# Arbitrary manifests -----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_edited_manifest_gives_a_store_or_a_store_error(
    collected: Path, tmp_path: Path, data: st.DataObject
) -> None:
    manifest = json.loads((collected / "manifest.json").read_text())
    target: Any = data.draw(st.sampled_from([manifest, manifest["shards"][0]]))
    for name in data.draw(st.lists(st.sampled_from(sorted(target)), min_size=1, max_size=3, unique=True)):
        target[name] = data.draw(JSON)
    manifest["manifest_sha256"] = _manifest_checksum(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    try:
        read = read_manifest(tmp_path)
    except AGDError:
        return
    assert all(read[name] == manifest[name] for name in manifest)
    shutil.copytree(collected, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    try:
        store = TrajectoryStore(tmp_path)
    except AGDError:
        return
    assert len(store) == (33 if manifest["shards"] else 0)  # without shards: a collection that has yet to begin


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_any_json_at_all_gives_a_store_error(tmp_path: Path, value: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(AGDError):
        read_manifest(tmp_path)


def test_means_over_ranges_of_timesteps_skip_empty_ranges() -> None:
    timesteps = torch.tensor([999, 0, 49, 500, 510])
    times, means = mean_over_timesteps(timesteps, torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0]), 1000, num_ranges=20)
    assert times.tolist() == [24.5, 505.0, 999.0]
    assert means.tolist() == [3.0, 15.0, 1.0]
