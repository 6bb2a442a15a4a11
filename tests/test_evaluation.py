"""The measures against closed forms, definitions and second libraries; the reference files; the row."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cleanfid.fid
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import agd_lib.evaluation
from agd_lib.attach import AdapterSet
from agd_lib.base_models import DiTBase, count_forwards, load_base
from agd_lib.errors import AGDError
from agd_lib.evaluation import (
    EvaluationError,
    InceptionFeatures,
    Reference,
    RunningStatistics,
    ShapesFeatures,
    default_extractor,
    describe,
    endpoint_mse_ratio,
    evaluate,
    frechet_distance,
    kernel_distance,
    load_reference,
    precision_recall,
    reference_from_features,
    save_reference,
    statistics,
    time_side_by_side,
    within_class_distance,
)
from agd_lib.extractor import ShapesExtractor
from agd_lib.guidance import AGD, CFG, GuidanceInterval, Unguided
from agd_lib.project import DATA
from agd_lib.results import row_from_dict
from agd_lib.shapes import SHAPES
from agd_lib.storage import key_of, sha256, write_json


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class MeanColours:
    """Six features of an image: mean and deviation of each channel. Says class 1 of every image."""

    name = "mean-colours"
    feature_dim = 6

    def __call__(self, images: Tensor, conditions: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        assert images.dtype == torch.float32 and images.ndim == 4 and images.shape[1] == 3
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        features = torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)
        return features, None if conditions is None else torch.tensor(conditions) == 1


# Frechet distance --------------------------------------------------------------------------------------------------


def test_equal_gaussians_are_at_distance_zero() -> None:
    mean, covariance = statistics(normal(200, 16) @ normal(16, 16, seed=1))
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-8 * np.trace(covariance))


def test_diagonal_gaussians_have_a_closed_form() -> None:
    random = np.random.default_rng(0)
    mean, other_mean = random.normal(size=(2, 12))
    deviation, other_deviation = random.uniform(0.5, 2, size=(2, 12))
    expected = np.sum((mean - other_mean) ** 2) + np.sum((deviation - other_deviation) ** 2)
    found = frechet_distance(mean, np.diag(deviation**2), other_mean, np.diag(other_deviation**2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_shift_counts_squared_whatever_the_covariance() -> None:
    mean, covariance = statistics(normal(300, 8) @ normal(8, 8, seed=1))
    assert frechet_distance(mean, covariance, mean + 0.5, covariance) == pytest.approx(8 * 0.25, rel=1e-6)


def test_frechet_distance_equals_torch_fidelitys() -> None:
    one = normal(500, 32) @ normal(32, 32, seed=1) / 6
    two = normal(400, 32, seed=2) @ normal(32, 32, seed=3) / 6 + 0.1
    expected = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(two), False)
    found = frechet_distance(*statistics(one), *statistics(two))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found > 1


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd21"])
def test_distances_of_real_features_equal_a_second_librarys(name: str) -> None:
    features = load_file(DATA / name / "reference.safetensors")["features"].double()
    one, two = features[::2][:1000], features[1::2][:1000]
    expected = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(two), False)
    found = frechet_distance(*statistics(one), *statistics(two))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    # of all features of either at once clean-fid's kernel distance depends on no random choice either
    expected = cleanfid.fid.kernel_distance(one.numpy(), two.numpy(), num_subsets=1, max_subset_size=1000)
    assert kernel_distance(one, two, subsets=1) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_follows_its_definition_and_equals_clean_fids() -> None:
    one, two = normal(60, 5), 1.5 * normal(60, 5, seed=1) + 0.3

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 5 + 1) ** 3

    def within(points: Tensor) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in one for y in two]
    expected = within(one) + within(two) - 2 * sum(between) / len(between)
    assert kernel_distance(one, two, subsets=1) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(one, two, subsets=3) == pytest.approx(
        expected, rel=1e-9
    )  # a subset of 60 of 60 is all of them
    theirs = cleanfid.fid.kernel_distance(one.numpy(), two.numpy(), num_subsets=1)
    assert kernel_distance(one, two, subsets=1) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_is_unbiased_deterministic_and_of_any_two_counts() -> None:
    one, two = normal(400, 8), normal(900, 8, seed=1)
    assert abs(kernel_distance(one, two)) < 0.01 < kernel_distance(one + 1, two)
    assert kernel_distance(one, two, subset_size=50) == kernel_distance(one, two, subset_size=50)


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    values = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 4.0], [0.0, 4.0]])
    mean, covariance = statistics(values)
    np.testing.assert_allclose(mean, [1, 2])
    np.testing.assert_allclose(covariance, [[4 / 3, 0], [0, 16 / 3]])
    assert mean.dtype == covariance.dtype == np.float64


def test_running_statistics_equal_those_of_all_features_at_once() -> None:
    features = 1e4 + normal(500, 8) @ normal(8, 8, seed=1)
    running = RunningStatistics()
    for piece in features.split([1, 9, 290, 200]):
        running.add(piece)
    mean, covariance = running.result()
    np.testing.assert_allclose(mean, features.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-9)


def test_too_few_samples_for_a_covariance_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 samples"):
        RunningStatistics().result()
    running = RunningStatistics()
    running.add(normal(8, 8))
    with pytest.raises(ValueError, match="got 8 samples for features of 8 numbers, expected more than 8"):
        running.result()
    with pytest.raises(ValueError, match="got 8 samples for features of 8 numbers, expected more than 8"):
        statistics(normal(8, 8))
    with pytest.raises(ValueError, match="expected more than 8"):
        reference_from_features("any", normal(5, 8))


# Precision and recall ----------------------------------------------------------------------------------------------


def covered(points: Tensor, support: Tensor, neighbours: int) -> float:
    """Share of ``points`` that lie within the k-th-neighbour ball of any point of ``support``, by the definition."""
    radii = []
    for i, centre in enumerate(support):
        distances = sorted(math.dist(centre, other) for j, other in enumerate(support) if j != i)
        radii.append(distances[neighbours - 1])
    inside = [any(math.dist(point, centre) <= r for centre, r in zip(support, radii)) for point in points]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_follow_their_definition(neighbours: int) -> None:
    generated, real = 0.5 * normal(60, 4), normal(80, 4, seed=1)
    precision, recall = precision_recall(generated, real, neighbours)
    assert precision == pytest.approx(covered(generated, real, neighbours), abs=1e-6)
    assert recall == pytest.approx(covered(real, generated, neighbours), abs=1e-6)
    assert precision > recall  # the generated points lie in the middle of the real ones


def test_precision_and_recall_of_the_same_and_of_distant_samples() -> None:
    points = normal(50, 4)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


# Endpoint error ----------------------------------------------------------------------------------------------------


def test_endpoint_ratio_is_zero_for_cfg_one_for_unguided_and_quadratic_between() -> None:
    cfg, unguided = normal(6, 4, 8, 8).float(), normal(6, 4, 8, 8, seed=1).float()
    assert endpoint_mse_ratio(cfg, unguided, cfg) == 0
    assert endpoint_mse_ratio(unguided, unguided, cfg) == 1
    assert endpoint_mse_ratio(cfg + 0.5 * (unguided - cfg), unguided, cfg) == pytest.approx(0.25, rel=1e-5)
    error = float(((2 * cfg - cfg) ** 2 - 0).mean() / ((unguided - cfg) ** 2).mean())
    assert endpoint_mse_ratio(2 * cfg, unguided, cfg) == pytest.approx(error, rel=1e-5)


def test_endpoint_ratio_needs_latents_that_belong_together() -> None:
    cfg, unguided = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    with pytest.raises(ValueError, match="expected three alike"):
        endpoint_mse_ratio(cfg[:5], unguided, cfg)
    with pytest.raises(ValueError, match="equal to those of CFG"):
        endpoint_mse_ratio(cfg, cfg, cfg)


# The row -----------------------------------------------------------------------------------------------------------

N = 12


def the_reference() -> Reference:
    return reference_from_features("mean-colours", torch.rand(40, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def reference() -> Reference:
    return the_reference()


def measure(base: DiTBase, guidance: Any, reference: Reference, **options: Any) -> Any:
    values = {"n": N, "num_inference_steps": 4, "batch_size": 6, "progress": False} | options
    return evaluate(base, guidance, reference, MeanColours(), **values)


def test_a_row_of_each_kind_of_guidance(dit_base: DiTBase, reference: Reference) -> None:
    adapters = AdapterSet.create(dit_base, hidden_size=8).attach(dit_base)
    unguided = measure(dit_base, Unguided(), reference)
    cfg = measure(dit_base, CFG(3.0), reference, unguided_latents=unguided.latents, cfg_latents=None)
    both = {"unguided_latents": unguided.latents, "cfg_latents": cfg.latents}
    agd = measure(dit_base, AGD(adapters, 3), reference, **both)
    rows = [unguided.row, cfg.row, agd.row]
    assert [row.nfe for row in rows] == [4, 8, 4]
    assert [row.guidance for row in rows] == ["unguided", "cfg", "agd"]
    assert [row.adapter for row in rows] == [None, None, "offset"]
    assert [row.scale for row in rows] == [1.0, 3.0, 3.0]
    assert [row.adapter_parameters for row in rows] == [None, None, adapters.num_parameters()]
    assert [row.endpoint_mse_ratio for row in rows] == [None, None, 1.0]  # untrained adapters change nothing
    for row in rows:
        assert (row.base, row.steps, row.n, row.seed, row.extractor) == (dit_base.name, 4, N, 0, "mean-colours")
        assert row.base_parameters == dit_base.num_parameters() and row.seconds_per_image > 0
        assert row.condition_accuracy == pytest.approx(3 / 12)  # labels 0 1 2 3 4 0 1 2 3 4 0 1: three ones
        assert row.fd is not None and row.precision is not None and row.recall is not None
        assert row_from_dict(asdict(row), "here") == row
    assert cfg.row.fd != unguided.row.fd == agd.row.fd
    assert agd.latents.shape == (N, 4, 8, 8) and torch.equal(agd.latents, unguided.latents)


def test_the_row_is_measured_on_the_images_of_the_latents(dit_base: DiTBase, reference: Reference) -> None:
    result = measure(dit_base, CFG(2.0), reference)
    features, _ = MeanColours()(dit_base.decode(result.latents))
    expected = frechet_distance(*statistics(features), reference.mean, reference.covariance)
    assert result.row.fd == pytest.approx(expected, rel=1e-3)
    assert reference.features is not None
    assert (result.row.precision, result.row.recall) == precision_recall(features, reference.features)


WORKER = """
import json, os, sys
import torch
from accelerate.state import PartialState
from test_evaluation import MeanColours, the_reference
from agd_lib.base_models import load_base
from agd_lib.evaluation import evaluate
from agd_lib.guidance import CFG

base, processes = load_base(sys.argv[1]), PartialState(cpu=True)
assert processes.num_processes == 2
options = dict(n=22, seed=5, num_inference_steps=3, batch_size=4, progress=False, keep=sys.argv[2])


class Dying(MeanColours):  # ends the second process at its second batch
    batches = 0

    def __call__(self, images, conditions=None):
        self.batches += 1
        if sys.argv[3] == "die" and processes.process_index == 1 and self.batches == 2:
            os._exit(1)
        return super().__call__(images, conditions)


found = evaluate(base, CFG(2.0), the_reference(), Dying(), **options)
with open(f"{sys.argv[2]}-{processes.process_index}.json", "w") as file:
    json.dump([found.row.fd, found.row.nfe, found.row.condition_accuracy, found.latents.tolist()], file)
for change, message in (({"batch_size": 22}, "expected a batch for each"), ({"keep": None}, "expected keep=one that all see")):
    try:
        evaluate(base, CFG(2.0), the_reference(), MeanColours(), **options | {"seed": 6} | change)
    except ValueError as error:
        assert message in str(error)
    else:
        raise AssertionError("was not refused: " + message)
"""


def measure_together(dit_folder: Path, folder: Path, *how: str) -> subprocess.CompletedProcess[str]:
    """Two processes measure into ``folder / "kept"``."""
    (folder / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    command = [*launcher, str(folder / "worker.py"), str(dit_folder), str(folder / "kept"), *how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_two_processes_measure_what_one_does_also_when_one_of_them_has_died(dit_folder: Path, tmp_path: Path) -> None:
    assert measure_together(dit_folder, tmp_path, "die").returncode != 0
    (batches,) = (path for path in (tmp_path / "kept").iterdir() if path.is_dir())
    first = {path.name: path.stat().st_mtime_ns for path in batches.iterdir()}
    assert "batch-0000004.safetensors" in first  # the dead process's own, of six
    finished = measure_together(dit_folder, tmp_path, "live")
    assert finished.returncode == 0, finished.stderr[-3000:]
    options: dict[str, Any] = {"n": 22, "seed": 5, "num_inference_steps": 3, "progress": False}
    alone = evaluate(load_base(dit_folder), CFG(2.0), the_reference(), MeanColours(), batch_size=4, **options)
    for rank in (0, 1):
        fd, nfe, accuracy, latents = json.loads((tmp_path / f"kept-{rank}.json").read_text())
        assert fd == pytest.approx(alone.row.fd, rel=1e-6)
        assert (nfe, accuracy) == (alone.row.nfe, alone.row.condition_accuracy) and nfe == 6
        torch.testing.assert_close(torch.tensor(latents), alone.latents, rtol=1e-5, atol=1e-5)
    (kept,) = (tmp_path / "kept").glob("*.json")
    assert json.loads(kept.read_text())["row"]["fd"] == pytest.approx(alone.row.fd, rel=1e-6)


def test_the_same_seed_gives_the_same_row_and_another_seed_another(dit_base: DiTBase, reference: Reference) -> None:
    first, second = (measure(dit_base, CFG(2.0), reference, seed=7).row for _ in range(2))
    assert replace(first, seconds_per_image=0.0) == replace(second, seconds_per_image=0.0)
    other = measure(dit_base, CFG(2.0), reference, seed=8).row
    assert other.fd != first.fd and other.seed == 8


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_does_not_matter(dit_base: DiTBase, reference: Reference, batch_size: int) -> None:
    whole, other = (measure(dit_base, CFG(2.0), reference, batch_size=size) for size in (N, batch_size))
    torch.testing.assert_close(other.latents, whole.latents, rtol=1e-3, atol=1e-4)
    assert other.row.fd == pytest.approx(whole.row.fd, rel=1e-2)
    assert other.row.nfe == whole.row.nfe == 8


def test_at_scale_one_the_endpoint_error_does_not_apply(dit_base: DiTBase, reference: Reference) -> None:
    unguided = measure(dit_base, Unguided(), reference)
    cfg = measure(dit_base, CFG(1.0), reference)
    assert cfg.row.nfe == 4  # the unconditional pass is left out
    both = {"unguided_latents": unguided.latents, "cfg_latents": cfg.latents}
    assert measure(dit_base, CFG(1.0), reference, **both).row.endpoint_mse_ratio is None


def test_a_reference_of_statistics_has_no_precision(dit_base: DiTBase, reference: Reference) -> None:
    row = measure(dit_base, Unguided(), replace(reference, features=None)).row
    assert row.precision is None and row.recall is None and row.fd is not None


def test_precision_uses_references_from_everywhere(dit_base: DiTBase) -> None:
    near = MeanColours()(dit_base.decode(measure_latents(dit_base)))[0]
    far = near + 100
    features = torch.cat([far, near])  # sorted by class, say: the first half is far away
    row = measure(dit_base, Unguided(), reference_from_features("mean-colours", features), max_reference=N).row
    assert row.precision is not None and row.precision > 0


def measure_latents(base: DiTBase) -> Tensor:
    any_reference = reference_from_features("mean-colours", torch.rand(40, 6))
    return measure(base, Unguided(), any_reference).latents


def test_without_a_batch_size_a_million_pixels_are_drawn_at_once(
    dit_base: DiTBase, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    whole = dit_base.denoise

    def watched(latents: Tensor, *call: Any) -> Tensor:
        batches.append(len(latents))
        return whole(latents, *call)

    monkeypatch.setattr(dit_base, "denoise", watched)
    monkeypatch.setattr(DiTBase, "images_at_once", 5)
    evaluate(dit_base, Unguided(), reference, MeanColours(), n=12, num_inference_steps=1, progress=False)
    assert batches == [5, 5, 2]


def test_too_few_samples_and_another_extractor_are_refused(dit_base: DiTBase, reference: Reference) -> None:
    with pytest.raises(ValueError, match="got n = 6, expected more than 6 samples for mean-colours"):
        measure(dit_base, Unguided(), reference, n=6)
    with pytest.raises(EvaluationError, match=r"made with inception.* measured with mean-colours"):
        measure(dit_base, Unguided(), replace(reference, extractor="inception-v3-clean"))


def test_what_was_measured_is_kept_and_read_while_nothing_changed(
    dit_base: DiTBase, reference: Reference, tmp_path: Path
) -> None:
    adapters = AdapterSet.create(dit_base, "modulated", hidden_size=8).attach(dit_base)
    both = {"unguided_latents": measure(dit_base, Unguided(), reference).latents}
    both["cfg_latents"] = measure(dit_base, CFG(3.0), reference).latents

    def passes(guidance: Any, **options: Any) -> int:
        with count_forwards(dit_base) as meter:
            result = measure(dit_base, guidance, reference, keep=tmp_path, **options)
        fresh = measure(dit_base, guidance, reference, **options)
        assert replace(result.row, seconds_per_image=0.0) == replace(fresh.row, seconds_per_image=0.0)
        assert torch.equal(result.latents, fresh.latents)
        return meter.samples

    assert [passes(CFG(3.0)), passes(CFG(3.0))] == [8 * N, 0]
    assert [passes(CFG(2.0)), passes(CFG(3.0))] == [8 * N, 0]  # each has a place of its own
    assert [passes(CFG(3.0), n=N + 1), passes(CFG(3.0))] == [8 * (N + 1), 8 * N]
    assert passes(CFG(3.0, guided_channels=3)) == 8 * N
    assert passes(type("Own", (CFG,), {})(3.0, guided_channels=3)) == 8 * N  # which may predict something else
    with torch.no_grad():
        next(dit_base.pipeline.vae.decoder.parameters()).add_(0.01)
    assert passes(CFG(3.0, guided_channels=3)) == 8 * N  # the same latents, decoded to other images
    assert [passes(AGD(adapters, 3.0), **both), passes(AGD(adapters, 3.0), **both)] == [4 * N, 0]
    assert passes(AGD(adapters, 3.0)) == 4 * N  # compared with nothing: another measurement
    with torch.no_grad():
        next(adapters.parameters()).add_(0.01)
    assert passes(AGD(adapters, 3.0)) == 4 * N
    assert passes(AGD(adapters, 3.0), num_inference_steps=3) == 3 * N


def test_a_measurement_that_was_cut_off_is_made_again_and_a_damaged_one_is_named(
    dit_base: DiTBase, reference: Reference, tmp_path: Path
) -> None:
    whole = measure(dit_base, CFG(3.0), reference, keep=tmp_path)
    note, latents = tmp_path / "cfg-3-seed0.json", tmp_path / "cfg-3-seed0.safetensors"
    kept = note.read_text()
    note.unlink()  # the latents are written first
    assert torch.equal(measure(dit_base, CFG(3.0), reference, keep=tmp_path).latents, whole.latents)
    assert {path.name for path in tmp_path.iterdir()} == {note.name, latents.name, f".{note.name}.lock"}
    for damaged in (kept.replace('"row"', '"wor"'), kept.replace('"fd": ', '"fd": 1'), kept[:-20]):
        note.write_text(damaged)
        with pytest.raises(AGDError, match="cfg-3-seed0"):
            measure(dit_base, CFG(3.0), reference, keep=tmp_path)
    without = {name: part for name, part in json.loads(kept).items() if name not in ("row", "checksum")}
    write_json(note, without | {"checksum": key_of(without)})  # by somebody who knows how
    with pytest.raises(AGDError, match="cfg-3-seed0"):
        measure(dit_base, CFG(3.0), reference, keep=tmp_path)
    note.write_text(kept)
    bytes_ = latents.read_bytes()
    for damaged_bytes in (bytes_[:-10], bytes_[:-1] + bytes([bytes_[-1] ^ 1])):
        latents.write_bytes(damaged_bytes)
        with pytest.raises(EvaluationError, match="cfg-3-seed0"):
            measure(dit_base, CFG(3.0), reference, keep=tmp_path)


class Interrupted(Exception):
    pass


class InterruptedColours(MeanColours):
    """Is interrupted at the third batch."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, images: Tensor, conditions: Any = None) -> tuple[Tensor, Tensor | None]:
        self.batches += 1
        if self.batches == 3:
            raise Interrupted
        return super().__call__(images, conditions)


def test_an_interrupted_measurement_goes_on_with_its_next_batch(
    dit_base: DiTBase, reference: Reference, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"n": N, "num_inference_steps": 4, "batch_size": 3, "progress": False}
    undisturbed = evaluate(dit_base, CFG(3.0), reference, MeanColours(), **options)
    with pytest.raises(Interrupted):
        evaluate(dit_base, CFG(3.0), reference, InterruptedColours(), keep=tmp_path, **options)
    (batches,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [path.name for path in sorted(batches.iterdir())] == [
        "batch-0000000.safetensors",
        "batch-0000003.safetensors",
    ]
    with count_forwards(dit_base) as meter:
        resumed = evaluate(dit_base, CFG(3.0), reference, MeanColours(), keep=tmp_path, **options)
    assert meter.samples == 8 * 6  # of the six images that were missing
    assert torch.equal(resumed.latents, undisturbed.latents) and not batches.exists()
    assert replace(resumed.row, seconds_per_image=0.0) == replace(undisturbed.row, seconds_per_image=0.0)


@pytest.mark.parametrize("harm", ["truncated", "linked", "another shape", "another name"])
def test_kept_batches_that_are_not_whole_are_made_again(
    dit_base: DiTBase, reference: Reference, tmp_path: Path, harm: str
) -> None:
    options: dict[str, Any] = {"n": N, "num_inference_steps": 4, "batch_size": 3, "progress": False}
    undisturbed = evaluate(dit_base, CFG(3.0), reference, MeanColours(), **options)
    with pytest.raises(Interrupted):
        evaluate(dit_base, CFG(3.0), reference, InterruptedColours(), keep=tmp_path / "kept", **options)
    (first, _) = sorted((tmp_path / "kept").glob("*/batch-*"))
    if harm == "truncated":
        first.write_bytes(first.read_bytes()[:-10])
    elif harm == "linked":
        first.rename(tmp_path / "elsewhere")
        first.symlink_to(tmp_path / "elsewhere")
    else:
        tensors = load_file(first)
        latents = tensors.pop("latents")
        save_file(tensors | ({"latents": latents[:2].clone()} if harm == "another shape" else {"x": latents}), first)
    resumed = evaluate(dit_base, CFG(3.0), reference, MeanColours(), keep=tmp_path / "kept", **options)
    assert torch.equal(resumed.latents, undisturbed.latents) and resumed.row.fd == undisturbed.row.fd


def test_batches_of_another_measurement_are_not_taken(dit_base: DiTBase, reference: Reference, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n": N, "num_inference_steps": 4, "batch_size": 3, "progress": False, "keep": tmp_path}
    with pytest.raises(Interrupted):
        evaluate(dit_base, CFG(3.0, guided_channels=3), reference, InterruptedColours(), **options)
    with count_forwards(dit_base) as meter:
        evaluate(dit_base, CFG(3.0), reference, MeanColours(), **options)
    assert meter.samples == 8 * N


def test_guidances_without_one_scale_have_no_row(dit_base: DiTBase) -> None:
    assert describe(CFG(2)) == describe(CFG(GuidanceInterval(2.0, 0, 500))) == ("cfg", None, 2.0, None)
    for guidance in (CFG(torch.tensor([1.0, 2.0])), CFG(lambda timestep: 2.0), object()):
        with pytest.raises(ValueError, match="one number or a GuidanceInterval as scale"):
            describe(guidance)  # type: ignore[arg-type]


def test_timing_counts_every_round_but_the_first(dit_base: DiTBase) -> None:
    timings = time_side_by_side(
        dit_base, {"a": Unguided(), "b": CFG(2.0)}, batch_size=1, num_inference_steps=1, rounds=3
    )
    assert list(timings) == ["a", "b"]
    assert all(0 < timing.minimum <= timing.median <= timing.maximum for timing in timings.values())


# References --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten PNGs of two sizes in two folders."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (12 + number % 2, 16, 3), dtype=np.uint8)
        (folder / f"class{number // 5}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class{number // 5}" / f"{number}.png")
    return folder


def direct_features(folder: Path) -> Tensor:
    features = []
    for path in sorted(folder.rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
        features.append(MeanColours()(pixels[None])[0])
    return torch.cat(features)


def test_a_folder_of_images_equals_direct_statistics(images: Path) -> None:
    (images / "notes.txt").write_text("not an image")
    reference, features = load_reference(images, MeanColours()), direct_features(images)
    torch.testing.assert_close(reference.features, features)
    np.testing.assert_allclose(reference.mean, features.double().numpy().mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(reference.covariance, np.cov(features.double().numpy().T), rtol=1e-4)
    assert reference.extractor == "mean-colours"


def test_features_of_a_large_folder_are_thinned_but_its_statistics_are_whole(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_reference(images, MeanColours())
    monkeypatch.setattr("agd_lib.evaluation.KEPT_FEATURES", 5)
    thinned = load_reference(images, MeanColours())
    torch.testing.assert_close(thinned.features, direct_features(images)[::2])
    np.testing.assert_array_equal(thinned.covariance, whole.covariance)


def test_some_images_of_a_folder_are_spread_over_it(images: Path) -> None:
    reference = load_reference(images, MeanColours(), num_images=8)
    torch.testing.assert_close(reference.features, direct_features(images)[[0, 1, 2, 3, 5, 6, 7, 8]])
    everything = load_reference(images, MeanColours(), num_images=99).features
    assert everything is not None and len(everything) == 10


def test_images_of_one_size_are_looked_at_together(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(MeanColours):
        def __call__(self, images: Tensor, conditions: Any = None) -> tuple[Tensor, Tensor | None]:
            seen.append(tuple(images.shape))
            return super().__call__(images, conditions)

    sizes = [8] * 40 + [9] * 3 + [8]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    found = load_reference(tmp_path, Watched()).features
    assert [(shape[0], shape[-1]) for shape in seen] == [(32, 8), (8, 8), (3, 9), (1, 8)]
    torch.testing.assert_close(found, direct_features(tmp_path))


def test_statistics_of_a_folder_are_kept_until_an_image_changes(images: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    class Watched(MeanColours):
        def __call__(self, images: Tensor, conditions: Any = None) -> tuple[Tensor, Tensor | None]:
            calls.append(len(images))
            return super().__call__(images, conditions)

    class Another(Watched):
        name = "another"

    folder, kept = tmp_path / "images", tmp_path / "kept"
    shutil.copytree(images, folder)
    first = load_reference(folder, Watched(), keep=kept)
    looked_at = len(calls)
    again = load_reference(folder, Watched(), keep=kept)
    assert len(calls) == looked_at > 0
    assert again.features is not None and first.features is not None and torch.equal(again.features, first.features)
    np.testing.assert_array_equal(again.covariance, first.covariance)
    np.testing.assert_array_equal(again.mean, first.mean)
    for change in (
        lambda: load_reference(folder, Watched(), num_images=8, keep=kept),
        lambda: load_reference(folder, Another(), keep=kept),
        lambda: (os.utime(next(folder.rglob("*.png")), (1, 1)), load_reference(folder, Watched(), keep=kept)),
    ):
        before = len(calls)
        change()
        assert len(calls) > before
    for path in kept.iterdir():
        save_file({"mean": torch.zeros(6)}, path)
    with pytest.raises(EvaluationError, match="damaged: remove it"):
        load_reference(folder, Watched(), keep=kept)


def test_statistics_in_an_npz_equal_the_folder(images: Path, tmp_path: Path) -> None:
    whole = load_reference(images, MeanColours())
    np.savez(tmp_path / "stats.npz", mu=whole.mean, sigma=whole.covariance)
    loaded = load_reference(tmp_path / "stats.npz", MeanColours())
    np.testing.assert_array_equal(loaded.mean, whole.mean)
    np.testing.assert_array_equal(loaded.covariance, whole.covariance)
    assert loaded.features is None


def test_saved_features_equal_the_folder(images: Path, tmp_path: Path) -> None:
    features = direct_features(images)
    save_reference(tmp_path / "reference.safetensors", features, "mean-colours")
    loaded = load_reference(tmp_path / "reference.safetensors", MeanColours())
    assert loaded.features is not None and torch.equal(loaded.features, features)
    np.testing.assert_array_equal(loaded.mean, features.double().numpy().mean(axis=0))


def npz(**arrays: Any) -> Any:
    return lambda path: np.savez(path, **arrays)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "npz without mu": ("r.npz", npz(sigma=np.eye(6)), "has no 'mu' and 'sigma'"),
    "npz of pickled objects": ("r.npz", npz(mu=np.array([object()]), sigma=np.eye(6)), "allow_pickle"),
    "npz of text": ("r.npz", npz(mu=np.array(["a"]), sigma=np.eye(6)), "damaged"),
    "npz of other size": ("r.npz", npz(mu=np.zeros(7), sigma=np.eye(7)), r"shapes \(7,\).*from another extractor"),
    "npz of odd covariance": ("r.npz", npz(mu=np.zeros(6), sigma=np.zeros(6)), "from another extractor"),
    "npz of much more": (
        "r.npz",
        lambda path: np.savez_compressed(path, mu=np.zeros(10**6)),
        "unpacks to 8,000,128 bytes",
    ),
    "npz with nan": ("r.npz", npz(mu=np.full(6, np.nan), sigma=np.eye(6)), "holds NaN"),
    "broken npz": ("r.npz", lambda path: path.write_bytes(b"PK\x03\x04 not a zip"), "damaged"),
    "missing file": ("r.npz", lambda path: None, "does not exist"),
    "missing folder": ("nowhere", lambda path: None, "does not exist"),
    "empty folder": ("folder", Path.mkdir, "holds no images"),
    "pickle": ("r.pt", lambda path: torch.save(torch.zeros(9, 6), path), "pickles can run any code"),
    "torch file of another name": ("r.safetensors", lambda path: torch.save(torch.zeros(9, 6), path), "damaged"),
    "other extractor": (
        "r.safetensors",
        lambda path: save_reference(path, torch.rand(9, 6), "inception-v3-clean"),
        "with the extractor inception-v3-clean, the samples would be measured with mean-colours",
    ),
    "features of nobody": ("r.safetensors", lambda path: save_file({"features": torch.rand(9, 6)}, path), "None"),
    "other tensors": (
        "r.safetensors",
        lambda path: save_file({"mu": torch.zeros(6)}, path),
        r"holds \['mu'\], expected one tensor 'features'",
    ),
    "features of other size": (
        "r.safetensors",
        lambda path: save_reference(path, torch.rand(9, 5), "mean-colours"),
        "from another extractor",
    ),
    "features without rows": (
        "r.safetensors",
        lambda path: save_reference(path, torch.rand(6), "mean-colours"),
        "expected one tensor 'features'",
    ),
    "too few features": (
        "r.safetensors",
        lambda path: save_reference(path, torch.rand(6, 6), "mean-colours"),
        "too small: got 6 samples",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_references_that_do_not_serve_are_refused(tmp_path: Path, case: str) -> None:
    name, make, message = REFUSED[case]
    make(tmp_path / name)
    with pytest.raises(EvaluationError, match=message) as caught:
        load_reference(tmp_path / name, MeanColours())
    assert name in str(caught.value)


def test_a_folder_of_few_or_damaged_images_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="too small: got 6 samples"):
        load_reference(images, MeanColours(), num_images=6)
    shutil.copytree(images, tmp_path / "copy")
    whole = (tmp_path / "copy" / "class1" / "7.png").read_bytes()
    (tmp_path / "copy" / "class1" / "7.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match=r"7\.png is damaged"):
        load_reference(tmp_path / "copy", MeanColours())
    for side, message in (
        (5_000, r"7\.png has 5000 x 5000 pixels, expected at most 16,777,216"),
        (20_000, "7.png is damaged"),
    ):
        Image.new("1", (side, side)).save(tmp_path / "copy" / "class1" / "7.png")
        with pytest.raises(EvaluationError, match=message):
            load_reference(tmp_path / "copy", MeanColours())


# Extractors --------------------------------------------------------------------------------------------------------


class PooledPixels(nn.Module):
    """Stands in for Inception behind clean-fid's own resize: 12 numbers of a (B, 3, 299, 299) image in 0..255."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 299, 299) and images.dtype == torch.float32
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> InceptionFeatures:
    def load(folder: str, download: bool, resize_inside: bool) -> nn.Module:
        assert not download and not resize_inside
        return PooledPixels()

    monkeypatch.setattr("cleanfid.inception_torchscript.InceptionV3W", load)
    monkeypatch.setattr(agd_lib.evaluation, "fetch_inception", lambda: Path("weights.pt"))
    monkeypatch.setattr(InceptionFeatures, "feature_dim", 12)
    return InceptionFeatures("cpu")


def write_images(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pixels[:, : 4 + number % 13] //= 1 + seed
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


class Layers(nn.Module):
    """2,048 numbers of an image, so that clean-fid takes it for Inception's layers."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, (32, 64)).mean(dim=1).flatten(1)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TorchScript file where Inception's weights are fetched from, and an empty cache."""
    path = tmp_path / "server" / "weights.pt"
    path.parent.mkdir()
    torch.jit.save(torch.jit.script(Weights()), path)
    monkeypatch.setattr(agd_lib.evaluation, "INCEPTION_URL", path.with_name("inception-2015-12-05.pt").as_uri())
    monkeypatch.setattr(agd_lib.evaluation, "INCEPTION_SHA256", sha256(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return path.rename(path.with_name("inception-2015-12-05.pt"))


def test_inception_is_fetched_once_and_sees_pixels_as_clean_fid_scales_them(served: Path) -> None:
    images = torch.full((2, 3, 8, 8), 192 / 255)
    features, _ = InceptionFeatures("cpu")(images)
    torch.testing.assert_close(features, torch.full((2, 2048), (192 - 128) / 128))
    served.unlink()
    again, _ = InceptionFeatures("cpu")(images)
    assert torch.equal(again, features)


def test_inception_without_the_network_says_what_is_missing(served: Path, tmp_path: Path) -> None:
    served.unlink()
    with pytest.raises(EvaluationError, match=r"could not fetch Inception's weights, .*No such file.*checkpoints"):
        InceptionFeatures("cpu")
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_other_bytes_than_inceptions_are_neither_kept_nor_loaded(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that was cut off, an edited file in the cache: nothing of them reaches torch.jit.load."""
    whole = served.read_bytes()
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: pytest.fail("it was loaded"))
    served.write_bytes(whole[:-1])
    with pytest.raises(EvaluationError, match=r"could not fetch Inception's weights, .*hash"):
        InceptionFeatures("cpu")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())
    (tmp_path / "cache" / "checkpoints" / served.name).write_bytes(whole[:-1] + b"!")
    with pytest.raises(EvaluationError, match=r"is not the file of Inception's weights .* remove it"):
        InceptionFeatures("cpu")


def test_images_reach_inception_as_clean_fid_itself_gives_them(pooled: InceptionFeatures, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 3, seed=1)
    expected = cleanfid.fid.get_folder_features(
        str(folder), PooledPixels(), num_workers=0, device=torch.device("cpu"), verbose=False
    )
    pixels = np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])
    features, labels = pooled(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    assert labels is None and features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-6)


def test_images_are_rounded_to_whole_colours_as_a_png_would_round_them(pooled: InceptionFeatures) -> None:
    images = torch.tensor([99.4, 99.6, 255.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8) / 255
    features, _ = pooled(images)
    torch.testing.assert_close(features, torch.tensor([[99.0], [100.0], [255.0]]).expand(3, 12))


def test_the_distance_between_two_folders_is_clean_fids(pooled: InceptionFeatures, tmp_path: Path) -> None:
    one, two = write_images(tmp_path / "one", 16, seed=1), write_images(tmp_path / "two", 18, seed=2)
    expected = cleanfid.fid.compute_fid(
        str(one), str(two), num_workers=0, device="cpu", verbose=False, custom_feat_extractor=PooledPixels()
    )
    first, second = load_reference(one, pooled), load_reference(two, pooled)
    found = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(expected, rel=1e-4) and found > 1
    assert first.extractor == "inception-v3-clean"


def test_the_shapes_extractor_sees_images_in_minus_one_to_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ShapesExtractor(num_classes=7, feature_dim=16, width=8).eval()
    model.save_pretrained(tmp_path / "extractor")
    extractor = ShapesFeatures(tmp_path / "extractor")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        output = model(pixels)
    seen = output.logits.argmax(dim=1)
    features, shown = extractor(pixels.float() / 255, (seen + torch.tensor([0, 1, 0])).tolist())
    torch.testing.assert_close(features, output.features, rtol=1e-3, atol=1e-4)
    assert shown is not None and shown.tolist() == [True, False, True]
    assert extractor(pixels.float() / 255)[1] is None
    named = [SHAPES[label] for label in seen]
    assert extractor(pixels.float() / 255, named)[1].tolist() == [True, True, True]  # type: ignore[union-attr]
    assert (extractor.name, extractor.feature_dim) == ("shapes-extractor", 16)


def test_a_base_with_an_extractor_of_its_own_uses_it(
    dit_base: DiTBase, pooled: InceptionFeatures, tmp_path: Path
) -> None:
    dit_base.name = "small"
    assert isinstance(default_extractor(dit_base, tmp_path)[0], InceptionFeatures)
    assert default_extractor(dit_base, tmp_path)[1] is None
    ShapesExtractor(num_classes=5, feature_dim=16, width=8).save_pretrained(tmp_path / "small" / "extractor")
    extractor, reference = default_extractor(dit_base, tmp_path)
    assert isinstance(extractor, ShapesFeatures) and extractor.feature_dim == 16
    assert reference == tmp_path / "small" / "reference.safetensors"


def test_evaluation_errors_are_agd_errors() -> None:
    assert issubclass(EvaluationError, AGDError)


def test_distance_within_classes_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [100.0, 2.0]])
    # class 7: one pair at distance 5; class 2: distances 1, 1, 2. Every class has the same weight; classes do not mix.
    assert within_class_distance(features, [7, 7, 2, 2, 2]) == pytest.approx((5 + 4 / 3) / 2)
    assert within_class_distance(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])) == 0
    with pytest.raises(ValueError, match=r"\{0: 1, 1: 4\}, expected at least 2 per class"):
        within_class_distance(features, [0, 1, 1, 1, 1])
