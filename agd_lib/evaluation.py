"""Measures guidance: Frechet and kernel distance, precision, recall, class accuracy, endpoint error, NFE and seconds.

A Frechet distance is an FID, and a kernel distance a KID, only in Inception's features; in any other network's they are named
after that network and never stand beside published ones. Frechet distances come from clean-fid, kernel distances, precision and
recall from torch-fidelity.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.state import PartialState
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from .attributes import AttributeFeatures
from .base_models import BaseModel, DiTBase, count_forwards
from .errors import AGDError
from .extractor import ShapesExtractor, load_local
from .guidance import AGD, CFG, Guidance, GuidanceInterval, Unguided
from .results import Row, row_from_dict
from .sampling import endpoint, generate, sample
from .shapes import SHAPES
from .storage import key_of, lock_folder, read_json, read_tensors, refuse_link, sha256, write_json, write_tensors


class EvaluationError(AGDError):
    """Reference data are missing, damaged, or made with another extractor than the samples' features."""


class FeatureExtractor(Protocol):
    """Turns images into the features that distributions are compared on.

    Attributes:
        name: stands beside every number.
        feature_dim: D.
    """

    name: str
    feature_dim: int

    def __call__(self, images: Tensor, conditions: Sequence[Any] | None = None) -> tuple[Tensor, Tensor | None]:
        """Look at images (B, 3, H, W) in [0, 1].

        Args:
            conditions: what the images should show, B class labels or prompts.

        Returns:
            ``(features, shown)``: (B, D) float32, and (B,) bool: which images show what they should, all of it. None
            where no conditions are given, or where the extractor cannot tell.
        """
        ...


class ShapesFeatures:
    """The shapes data set's own extractor; see :mod:`agd_lib.extractor`.

    Args:
        folder: a saved :class:`~agd_lib.extractor.ShapesExtractor`, as in ``data/tiny-dit/extractor``.

    Raises:
        ValueError: if no extractor was saved to the folder.
    """

    name = "shapes-extractor"

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.model = load_local(ShapesExtractor, folder, device)
        self.feature_dim = int(self.model.config.feature_dim)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, conditions: Sequence[int | str] | None = None) -> tuple[Tensor, Tensor | None]:
        output = self.model(images.to(self.device) * 2 - 1)
        seen = output.logits.argmax(dim=1).cpu()
        if conditions is None:
            return output.features.cpu(), None
        asked = [SHAPES.index(label) if isinstance(label, str) else int(label) for label in conditions]
        return output.features.cpu(), seen == torch.tensor(asked)


INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""clean-fid's Inception-v3 (96 MB). A TorchScript file can hold any program, so nothing but these bytes is loaded."""


def fetch_inception() -> Path:
    """Where Inception's weights are, in torch's own cache; fetched to it at the first use, whole or not at all.

    Raises:
        EvaluationError: if they cannot be fetched, or are not those that they should be.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # no network, no room; another checksum
        raise EvaluationError(
            f"could not fetch Inception's weights, which the FID is measured with, from {INCEPTION_URL}: {error}. Fetch that "
            f"file to {path} yourself"
        ) from error
    if sha256(path) != INCEPTION_SHA256:
        raise EvaluationError(
            f"{path} is not the file of Inception's weights that clean-fid uses (its SHA-256 is not {INCEPTION_SHA256}): "
            "remove it, so that it is fetched again"
        )
    return path


class InceptionFeatures:
    """clean-fid's Inception-v3 with its ``clean`` resize: the features of the FID. Weights: :func:`fetch_inception`.

    Raises:
        EvaluationError: if they cannot be fetched, or are others.
    """

    name = "inception-v3-clean"
    feature_dim = 2048

    def __init__(self, device: str | torch.device = "cpu") -> None:
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        self.device = torch.device(device)
        self.model = InceptionV3W(str(fetch_inception().parent), download=False, resize_inside=False).to(self.device)
        self.resize = build_resizer("clean")

    @torch.no_grad()
    def __call__(self, images: Tensor, conditions: Sequence[Any] | None = None) -> tuple[Tensor, None]:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack([self.resize(image) for image in pixels])  # (B, 299, 299, 3), 0..255
        features = self.model(torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device))
        return features.float().cpu(), None


MAX_PIXELS = 2**24
"""Of a reference image, 4096 x 4096: a small file can say that it is a thousand times as large."""

KEPT_FEATURES = 10_000
"""Of a folder of reference images, the features of at most so many are kept: a million would fill the memory."""


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        extractor: name of the extractor that made the features.
        mean: (D,). covariance: (D, D). Both float64.
        features: (N, D), for precision and recall; of a folder of images at most :data:`KEPT_FEATURES` of them, evenly
            spread; None where only statistics are known.
    """

    extractor: str
    mean: np.ndarray
    covariance: np.ndarray
    features: Tensor | None = None


def reference_from_features(extractor: str, features: Tensor) -> Reference:
    """Statistics of features (N, D).

    Raises:
        ValueError: if N is not larger than D: the covariance would be singular.
    """
    mean, covariance = statistics(features)
    return Reference(extractor, mean, covariance, features)


def statistics(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D).

    Raises:
        ValueError: if N <= D.
    """
    _check_count(*features.shape)
    values = features.double().numpy()
    return values.mean(axis=0), np.cov(values, rowvar=False)


def _check_count(count: int, size: int) -> None:
    if count <= size:
        raise ValueError(
            f"got {count} samples for features of {size} numbers, expected more than {size}: with fewer the covariance "
            "is singular and a Frechet distance means nothing (50,000 is usual for FID)"
        )


class RunningStatistics:
    """Mean and covariance of features that come in pieces: (D, D) numbers in memory, however many the features are."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: Tensor) -> None:
        """Add features (N, D)."""
        values = features.double()
        if self.count == 0:  # sums are taken from near the mean: those of large, nearly equal numbers lose digits
            self._origin = values.mean(dim=0)
            self._sum = torch.zeros_like(self._origin)
            self._products = torch.zeros(len(self._origin), len(self._origin), dtype=torch.float64)
        values = values - self._origin
        self.count += len(values)
        self._sum += values.sum(dim=0)
        self._products += values.T @ values

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D), float64.

        Raises:
            ValueError: if not more than D features were added.
        """
        _check_count(self.count, len(self._sum) if self.count else 1)
        offset = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(offset, offset)) / (self.count - 1)
        return (self._origin + offset).numpy(), covariance.numpy()


def save_reference(path: Path, features: Tensor, extractor_name: str) -> None:
    """Keep the features (N, D) of reference images in a safetensors file.

    Raises:
        WriteError: if it cannot be written.
    """
    write_tensors(path, {"features": features}, metadata={"extractor": extractor_name})


def load_reference(
    path: str | Path, extractor: FeatureExtractor, num_images: int | None = None, keep: str | Path | None = None
) -> Reference:
    """Load a reference.

    Args:
        path: a safetensors file of features (:func:`save_reference`), an ``.npz`` file with ``mu`` and ``sigma``
            (statistics made by clean-fid with the same extractor), or a folder of real images.
        num_images: use so many images of a folder, evenly spread over its sorted paths (so over its classes too).
        keep: a folder. What is computed of a folder of images is kept there, and read while extractor and files (their names,
            sizes and times) are the same.

    Raises:
        EvaluationError: if it is missing, empty, malformed, of another extractor, or of too few images.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:  # which tells sizes before anything is unpacked
                largest = max((member.file_size for member in archive.infolist()), default=0)
            if largest > 8 * extractor.feature_dim**2 + 4096:
                raise EvaluationError(
                    f"{path} unpacks to {largest:,} bytes, too many for {extractor.feature_dim} features: its statistics are "
                    f"from another extractor than {extractor.name}"
                )
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
        except EvaluationError:
            raise
        except Exception as error:  # numpy raises many kinds for damaged archives
            raise EvaluationError(f"{path} is damaged or has no 'mu' and 'sigma': {error}") from error
        reference = Reference(extractor.name, mean, covariance)
    else:
        try:
            if path.is_dir():
                reference = _reference_of_folder(path, extractor, num_images, None if keep is None else Path(keep))
            else:
                reference = reference_from_features(extractor.name, _read_features(path, extractor))
        except ValueError as error:
            raise EvaluationError(f"the reference {path} is too small: {error}") from error
    if reference.mean.shape != (extractor.feature_dim,) or reference.covariance.shape != (extractor.feature_dim,) * 2:
        raise EvaluationError(
            f"{path} has statistics of shapes {reference.mean.shape} and {reference.covariance.shape}, but "
            f"{extractor.name} makes {extractor.feature_dim} features: they are from another extractor"
        )
    if not (np.isfinite(reference.mean).all() and np.isfinite(reference.covariance).all()):
        raise EvaluationError(f"{path} holds NaN or infinity; make it again")
    return reference


def _read_features(path: Path, extractor: FeatureExtractor) -> Tensor:
    tensors = read_tensors(path, EvaluationError, "reference")
    if set(tensors) != {"features"} or tensors["features"].ndim != 2:
        raise EvaluationError(f"{path} holds {sorted(tensors)}, expected one tensor 'features' of shape (N, D)")
    with safe_open(path, framework="pt") as file:
        made_with = (file.metadata() or {}).get("extractor")
    if made_with != extractor.name:
        raise EvaluationError(
            f"{path} was made with the extractor {made_with}, the samples would be measured with {extractor.name}"
        )
    return tensors["features"].float()


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices (at most ``count``), evenly spread over ``range(count)``."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


def _reference_of_folder(
    folder: Path, extractor: FeatureExtractor, num_images: int | None, keep: Path | None
) -> Reference:
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise EvaluationError(
            f"{folder} holds no images ({', '.join(sorted(suffixes))}); expected a folder of real images"
        )
    paths = [paths[i] for i in _spread(len(paths), num_images or len(paths))]
    files = [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    file = (
        keep and keep / f"reference-{key_of([extractor.name, extractor.feature_dim, KEPT_FEATURES, files])}.safetensors"
    )
    if file is not None and file.is_file():
        found = read_tensors(file, EvaluationError, "reference's statistics")
        if found.keys() != {"mean", "covariance", "features"}:
            raise EvaluationError(f"the reference's statistics {file} are damaged: remove it")
        return Reference(extractor.name, found["mean"].numpy(), found["covariance"].numpy(), found["features"])
    kept_numbers = set(_spread(len(paths), KEPT_FEATURES))
    running, kept = RunningStatistics(), []
    for images in _images(tqdm(paths, desc="reference")):
        features = extractor(images)[0]
        # copies: a view would keep all of its batch
        kept += [one.clone() for number, one in enumerate(features, running.count) if number in kept_numbers]
        running.add(features)
    reference = Reference(extractor.name, *running.result(), torch.stack(kept))
    if file is not None and reference.features is not None:
        moments = {"mean": torch.from_numpy(reference.mean), "covariance": torch.from_numpy(reference.covariance)}
        write_tensors(file, moments | {"features": reference.features})
    return reference


def _images(paths: Iterable[Path], at_once: int = 32) -> Iterator[Tensor]:
    """Images (B, 3, H, W) in [0, 1], in order: as many at once as follow each other in one size."""
    from PIL import Image

    pending: list[Tensor] = []
    for path in paths:
        try:
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise EvaluationError(
                        f"the image {path} has {file.width} x {file.height} pixels, expected at most {MAX_PIXELS:,}: scale it"
                    )
                pixels = np.asarray(file.convert("RGB"), dtype=np.float32) / 255
        except EvaluationError:
            raise
        except Exception as error:  # PIL raises many kinds for damaged images
            raise EvaluationError(f"the image {path} is damaged: {error}") from error
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if pending and (len(pending) == at_once or image.shape != pending[0].shape):
            yield torch.stack(pending)
            pending = []
        pending.append(image)
    yield torch.stack(pending)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, reference_mean: np.ndarray, reference_covariance: np.ndarray
) -> float:
    """Squared Frechet distance between two Gaussians: ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (clean-fid's)."""
    from cleanfid.fid import frechet_distance as distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid calls scipy's sqrtm(disp=...)
        return float(distance(mean, covariance, reference_mean, reference_covariance))


def precision_recall(features: Tensor, reference_features: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019), by torch-fidelity.

    Args:
        features: generated, (N, D). reference_features: real, (M, D). neighbours: k of the k-nearest-neighbour balls.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    metrics = prc_features_to_metric(
        features,
        reference_features,
        prc_neighborhood=neighbours,
        prc_batch_size=10_000,
        save_cpu_ram=True,
        verbose=False,
    )
    return metrics["precision"], metrics["recall"]


def _in_turn(base: BaseModel, conditions: Sequence[Any] | None, count: int) -> list[Any]:
    """``count`` of the conditions, or of every condition that the model knows, in turn."""
    known = base.all_conditions() if conditions is None else conditions
    if not known:
        raise ValueError("got no conditions, expected at least one class label or prompt")
    return [known[i % len(known)] for i in range(count)]


def kernel_distance(features: Tensor, reference_features: Tensor, subsets: int = 20, subset_size: int = 1_000) -> float:
    """Kernel distance (Binkowski et al., ICLR 2018), by torch-fidelity: a KID in Inception's features.

    The unbiased estimate of the squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``, the mean over random
    subsets. Unlike a Frechet distance it does not fall with the number of images, and may come out slightly negative.

    Args:
        features: generated, (N, D). reference_features: real, (M, D).
        subsets: how many random ones, always the same. subset_size: images of either set in each; at most N and M are taken.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(subset_size, len(features), len(reference_features))
    metrics = kid_features_to_metric(
        features.double(),
        reference_features.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=0,
        verbose=False,
    )
    return float(metrics["kernel_inception_distance_mean"])


@dataclass(frozen=True)
class Evaluation:
    """A row of results, and the final latents (n, C, H, W) that it was measured on."""

    row: Row
    latents: Tensor


def evaluate(
    base: BaseModel,
    guidance: Guidance,
    reference: Reference,
    extractor: FeatureExtractor,
    n: int,
    seed: int = 0,
    num_inference_steps: int = 20,
    batch_size: int | None = None,
    unguided_latents: Tensor | None = None,
    cfg_latents: Tensor | None = None,
    max_reference: int = 5_000,
    progress: bool = True,
    keep: str | Path | None = None,
    conditions: Sequence[Any] | None = None,
) -> Evaluation:
    """Sample ``n`` images, conditions in turn, and measure them. Images are not kept in memory, features are.

    With ``accelerate launch`` (``torchrun`` on CPUs) the processes share out the batches and pass them on in ``keep``, a folder
    that all of them see: the main process measures, and each gets the whole result. There must be at least as many batches as
    processes. Seconds are the processes' own, for encoding and sampling their own images.

    Args:
        reference: made with the same extractor.
        n: more than ``extractor.feature_dim``.
        batch_size: images at once; None: as many as have a million pixels, but at most 250.
        unguided_latents, cfg_latents: final latents of those guidances from the same seed; with both, the row has an
            endpoint error ratio (None where the two agree, as at scale 1).
        max_reference: reference images used for precision, recall and kernel distance, evenly spread (their cost grows
            with n times this).
        keep: a folder. What is measured is kept there, and read instead of measured again while everything that it
            depends on (weights, samples, reference, library arguments) is the same. So is every batch until the measurement
            is whole: one that was interrupted goes on with its next batch.
        conditions: class labels or prompts, taken in turn; by default every class that the model knows. The share of
            the images that show theirs is the row's accuracy, where the extractor can tell.

    Raises:
        ValueError: if n is too small, also for the number of processes, or a text-to-image model gets no prompts; for a scale
            that a row cannot name (a number or a :class:`GuidanceInterval` is one), or a guidance of another class.
        EvaluationError: if reference and extractor do not match, or what was kept is damaged.
        FolderInUseError: if another process makes the same measurement into the same folder.
    """
    if reference.extractor != extractor.name:
        raise EvaluationError(
            f"the reference was made with {reference.extractor}, the samples would be measured with {extractor.name}"
        )
    if n <= extractor.feature_dim:
        raise ValueError(
            f"got n = {n}, expected more than {extractor.feature_dim} samples for {extractor.name}'s features"
        )
    batch_size = batch_size or min(250, base.images_at_once)
    own_conditions = conditions is not None
    conditions = _in_turn(base, conditions, n)
    kind, adapter, scale, adapter_parameters = describe(guidance)
    inputs: dict[str, Any] = {}
    file, batches = Path(), None
    if keep is not None:
        latents_given = (unguided_latents, cfg_latents)
        inputs = _inputs(base, guidance, reference, (n, seed, num_inference_steps), max_reference, latents_given)
        if own_conditions:
            inputs["conditions"] = _digest([json.dumps(conditions, default=str)])
        file = Path(keep) / f"{adapter or kind}-{scale:g}-seed{seed}.json"
        batches = file.with_name(f"{file.stem}-{key_of([inputs, batch_size])}")
        kept = _read_kept(file, inputs)
        if kept is not None:
            shutil.rmtree(batches, ignore_errors=True)  # a run that was killed while it did so leaves some
            return kept
    label = f"{kind} {scale:g}" if adapter is None else f"{kind} {adapter} {scale:g}"
    processes = PartialState(cpu=base.device.type == "cpu")
    starts = range(0, n, batch_size)
    if batches is None and processes.num_processes > 1:
        raise ValueError(
            f"got no folder to keep measurements in for {processes.num_processes} processes, expected keep=one that all see: "
            "they pass on their images in it"
        )
    if len(starts) < processes.num_processes:
        raise ValueError(
            f"got {n} images in batches of {batch_size} for {processes.num_processes} processes, expected a batch for each"
        )
    mine: dict[int, dict[str, Tensor]] = {}  # by the batch's first image
    with (
        nullcontext() if keep is None or not processes.is_main_process else lock_folder(file),
        tqdm(total=n, desc=label, disable=not progress) as bar,
    ):
        for start in starts[processes.process_index :: processes.num_processes]:
            asked = conditions[start : start + batch_size]
            path = batches and batches / f"batch-{start:07d}.safetensors"
            batch = None if path is None else _kept_batch(path, (len(asked), *base.latent_shape), extractor)
            if batch is None:
                batch = _sample_batch(base, asked, guidance, extractor, num_inference_steps, seed, start)
                if path is not None:
                    write_tensors(path, batch | {"checksum": _checksum(batch)})
            mine[start] = batch
            bar.update(len(asked))
        processes.wait_for_everyone()
        if not processes.is_main_process:
            processes.wait_for_everyone()  # until the main process has measured
            kept = _read_kept(file, inputs)
            if kept is None:
                raise EvaluationError(
                    f"the main process kept nothing at {file}: expected a folder that all processes see"
                )
            return kept
        for start in (start for start in starts if start not in mine):  # other processes' batches
            shape = (min(batch_size, n - start), *base.latent_shape)
            path = batches and batches / f"batch-{start:07d}.safetensors"
            batch = None if path is None else _kept_batch(path, shape, extractor)
            if batch is None:
                raise EvaluationError(
                    f"images from {start} on are missing in {batches}: expected a folder that all processes see"
                )
            mine[start] = batch
        parts = [mine[start] for start in starts]
        final, all_features = (torch.cat([part[name] for part in parts]) for name in ("latents", "features"))
        shown = [part["shown"] for part in parts if "shown" in part]
        passes, seconds = (sum(float(part[name]) for part in parts) for name in ("passes", "seconds"))
        precision = recall = accuracy = ratio = kd = None
        if reference.features is not None:
            real = reference.features[_spread(len(reference.features), max_reference)]
            precision, recall = precision_recall(all_features, real)
            kd = kernel_distance(all_features, real)
        if shown:
            accuracy = torch.cat(shown).double().mean().item()
        if (
            unguided_latents is not None
            and cfg_latents is not None
            and not torch.allclose(unguided_latents, cfg_latents, atol=1e-4)
        ):
            ratio = endpoint_mse_ratio(final, unguided_latents, cfg_latents)
        row = Row(
            base=base.name,
            guidance=kind,
            adapter=adapter,
            scale=scale,
            steps=num_inference_steps,
            nfe=passes / n,
            n=n,
            seed=seed,
            fd=frechet_distance(*statistics(all_features), reference.mean, reference.covariance),
            extractor=extractor.name,
            precision=precision,
            recall=recall,
            condition_accuracy=accuracy,
            endpoint_mse_ratio=ratio,
            seconds_per_image=seconds / n,
            base_parameters=base.num_parameters(),
            adapter_parameters=adapter_parameters,
            kd=kd,
        )
        if batches is not None:
            file.unlink(missing_ok=True)  # first, so that it never stands beside latents of another measurement
            kept_latents = file.with_suffix(".safetensors")
            write_tensors(kept_latents, {"latents": final})
            measured = {"inputs": inputs, "row": asdict(row), "latents_sha256": sha256(kept_latents)}
            write_json(file, measured | {"checksum": key_of(measured)})
            shutil.rmtree(batches, ignore_errors=True)
        processes.wait_for_everyone()
    return Evaluation(row, final)


def _sample_batch(
    base: BaseModel,
    conditions: Sequence[Any],
    guidance: Guidance,
    extractor: FeatureExtractor,
    num_inference_steps: int,
    seed: int,
    first: int,
) -> dict[str, Tensor]:
    """Sample a batch of images, of which the first is number ``first``, and look at them.

    Returns:
        ``latents`` (B, C, H, W) and ``features`` (B, D); ``shown`` (B,), whether an image shows what was asked for, where the
        extractor can tell; forward ``passes`` and ``seconds`` of the sampling, in all.
    """
    before = time.perf_counter()
    with count_forwards(base) as meter:
        (latents,) = generate(base, conditions, guidance, num_inference_steps, seed, len(conditions), first=first)
    _synchronize(base)
    seconds = time.perf_counter() - before
    features, shown = extractor(base.decode(latents), conditions)
    tensors = {"latents": latents.float().cpu(), "features": features}
    tensors |= {"passes": torch.tensor(meter.samples), "seconds": torch.tensor(seconds, dtype=torch.float64)}
    return tensors if shown is None else tensors | {"shown": shown}


def _kept_batch(path: Path, shape: tuple[int, ...], extractor: FeatureExtractor) -> dict[str, Tensor] | None:
    """What :func:`_sample_batch` gave to a run that was interrupted; None if it is not there, or not whole.

    Args:
        shape: of its latents, (B, C, H, W).
    """
    if path.is_symlink() or not path.is_file():
        return None
    try:
        batch = read_tensors(path, EvaluationError, "measurement's batch")
    except EvaluationError:
        return None
    checksum = batch.pop("checksum", None)
    if checksum is None or not torch.equal(checksum, _checksum(batch)):
        return None
    expected = {"latents": shape, "features": (shape[0], extractor.feature_dim), "passes": (), "seconds": ()}
    found = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    return batch if found in (expected, expected | {"shown": (shape[0],)}) else None


def _inputs(
    base: BaseModel,
    guidance: Guidance,
    reference: Reference,
    samples: tuple[int, int, int],
    max_reference: int,
    latents: tuple[Tensor | None, Tensor | None],
) -> dict[str, Any]:
    """Everything that a measurement depends on, as JSON would give it back."""
    kind, _, scale, _ = describe(guidance)
    schedule = getattr(guidance, "scale", None)
    special: dict[str, Any] = {}  # what only some measurements have, so that those of others keep their inputs
    if isinstance(schedule, GuidanceInterval):
        special["interval"] = [schedule.low, schedule.high]
    if isinstance(guidance, AGD) and guidance.adapters.config.strength:
        special["strength"] = list(guidance.adapters.config.strength)
    if type(guidance) not in (Unguided, CFG, AGD):  # somebody's own
        special["class"] = f"{type(guidance).__module__}.{type(guidance).__qualname__}"
    return special | {
        "base": base.fingerprint(),
        "decoder": base.decoder_fingerprint(),
        "scheduler": _digest(sorted(f"{k}={v}" for k, v in base.scheduler.config.items() if not k.startswith("_"))),
        "guidance": [kind, scale, getattr(guidance, "guided_channels", None)],
        "adapters": _digest(guidance.adapters.state_dict().values()) if isinstance(guidance, AGD) else None,
        "samples": list(samples),
        "reference": [reference.extractor, max_reference, _digest([reference.mean, reference.covariance])],
        "latents": [None if given is None else _digest([given]) for given in latents],
    }


def _digest(parts: Iterable[Any]) -> str:
    """Hex digest of texts and tensors, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else torch.as_tensor(part).cpu().float().numpy().tobytes())
    return digest.hexdigest()[:32]


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Of the bytes of tensors and of their names, (32,) bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _read_kept(file: Path, inputs: dict[str, Any]) -> Evaluation | None:
    """What :func:`evaluate` kept, if it was made from the same inputs."""
    if not file.is_file():
        return None
    for path in (file, file.with_suffix(".safetensors")):
        refuse_link(path, EvaluationError)
    value = read_json(file, EvaluationError, "measurement")
    if value.get("inputs") != inputs or "checksum" not in value:  # which older versions did not write
        return None
    latents = read_tensors(path, EvaluationError, "measurement's latents").get("latents")
    checksum = value.pop("checksum")
    whole = checksum == key_of(value) and value.get("latents_sha256") == sha256(path)
    if not whole or latents is None:
        raise EvaluationError(f"the measurement {file} is damaged: remove it")
    return Evaluation(row_from_dict(value.get("row"), str(file)), latents)


def endpoint_mse_ratio(latents: Tensor, unguided_latents: Tensor, cfg_latents: Tensor) -> float:
    """MSE(latents, CFG) / MSE(unguided, CFG): 0 is CFG itself, 1 no better than no guidance.

    Args:
        latents, unguided_latents, cfg_latents: final latents (n, C, H, W) from the same noise and conditions.

    Raises:
        ValueError: if the shapes differ, or the unguided latents are CFG's to the bit.
    """
    if not latents.shape == unguided_latents.shape == cfg_latents.shape:
        raise ValueError(
            f"got latents of shapes {tuple(latents.shape)}, {tuple(unguided_latents.shape)}, {tuple(cfg_latents.shape)}, "
            "expected three alike, from the same noise"
        )
    if torch.equal(unguided_latents, cfg_latents):
        raise ValueError("got unguided latents equal to those of CFG (scale 1?), expected two different ones")
    error = (latents - cfg_latents).double().square().mean()
    return float(error / (unguided_latents - cfg_latents).double().square().mean())


def within_class_distance(features: Tensor, labels: Sequence[int] | Tensor) -> float:
    """How different images of one class are: the mean feature distance over all pairs of the same class.

    Args:
        features: (N, D). labels: N class labels; every class has the same weight.

    Raises:
        ValueError: if a class has fewer than two images.
    """
    labels = torch.as_tensor(labels)
    counts = {int(label): int((labels == label).sum()) for label in labels.unique()}
    if len(labels) != len(features) or min(counts.values(), default=0) < 2:
        raise ValueError(f"got {len(features)} features and images per class {counts}, expected at least 2 per class")
    return float(torch.stack([torch.pdist(features[labels == label]).mean() for label in counts]).mean())


def describe(guidance: Guidance) -> tuple[str, str | None, float, int | None]:
    """``(kind, adapter kind, scale, adapter parameters)`` of a guidance, for a row of results; an interval's scale is the
    one inside.

    Raises:
        ValueError: for a scale that is neither a number nor a :class:`GuidanceInterval`, or a guidance of another class.
    """
    if isinstance(guidance, Unguided):
        return "unguided", None, 1.0, None
    if isinstance(guidance, CFG | AGD) and isinstance(guidance.scale, int | float | GuidanceInterval):
        scale = guidance.scale.scale if isinstance(guidance.scale, GuidanceInterval) else guidance.scale
        if isinstance(guidance, CFG):
            return "cfg", None, float(scale), None
        return "agd", guidance.adapters.config.kind, float(scale), guidance.adapters.num_parameters()
    raise ValueError(
        f"got {guidance!r}, expected Unguided(), or CFG or AGD with one number or a GuidanceInterval as scale"
    )


@dataclass(frozen=True)
class Timing:
    """Seconds per image of one guidance: median, minimum and maximum over rounds."""

    median: float
    minimum: float
    maximum: float


def time_side_by_side(
    base: BaseModel,
    guidances: dict[str, Guidance],
    batch_size: int = 8,
    num_inference_steps: int = 10,
    rounds: int = 5,
    conditions: Sequence[Any] | None = None,
) -> dict[str, Timing]:
    """Time several guidances in turn, round by round, so that a change of the machine's speed hits all alike.

    Conditions are encoded before, and images are not decoded.

    Args:
        conditions: as for :func:`evaluate`.
    """
    condition = base.encode(_in_turn(base, conditions, batch_size))
    seconds: dict[str, list[float]] = {name: [] for name in guidances}
    for round_number in range(rounds + 1):
        for name, guidance in guidances.items():
            start = time.perf_counter()
            endpoint(sample(base, condition, guidance, num_inference_steps, seeds=range(batch_size)))
            _synchronize(base)
            if round_number > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / batch_size)
    return {name: Timing(float(np.median(values)), min(values), max(values)) for name, values in seconds.items()}


def _synchronize(base: BaseModel) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


def default_extractor(base: BaseModel, data: Path) -> tuple[FeatureExtractor, Path | None]:
    """The extractor for a base model and its shipped reference: the small one for ``tiny-`` models, else Inception.

    Raises:
        EvaluationError: if Inception's weights cannot be fetched. AGDError: if the small one is damaged.
    """
    folder = data / base.name
    if (folder / "extractor").is_dir():
        small = ShapesFeatures if isinstance(base, DiTBase) else AttributeFeatures
        return small(folder / "extractor", base.device), folder / "reference.safetensors"
    return InceptionFeatures(base.device), None
