"""What an expensive cell will cost, said before it starts: seconds measured on this machine, bytes counted."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .attach import AdapterSet
from .base_models import KNOWN_BASES, BaseModel
from .training import Student, TrainingSettings
from .trajectories import CollectionPlan, predicted_size


@dataclass(frozen=True)
class Cost:
    """A predicted cost.

    Attributes:
        seconds: wall-clock on this machine, extrapolated from a short measurement; None if not measured.
        disk_bytes: that will be written.
    """

    seconds: float | None = None
    disk_bytes: int = 0

    def __str__(self) -> str:
        parts = []
        if self.seconds is not None:
            parts.append(f"about {format_seconds(self.seconds)}")
        if self.disk_bytes:
            parts.append(f"{self.disk_bytes / 2**20:.1f} MiB on disk")
        return ", ".join(parts) or "next to nothing"


def format_seconds(seconds: float) -> str:
    """``"40 s"``, ``"12 min"`` or ``"3.5 h"``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@torch.no_grad()
def seconds_per_forward(base: BaseModel, batch_size: int = 128) -> float:
    """Seconds that one sample takes in one forward pass, measured now (the second of two calls)."""
    latents = torch.zeros(batch_size, *base.latent_shape, device=base.device, dtype=base.dtype)
    condition = base.null_condition(batch_size)
    for _ in range(2):
        start = time.perf_counter()
        float(base.denoise(latents, 0, condition).sum())  # waits for the device
        seconds = time.perf_counter() - start
    return seconds / batch_size


def sampling_cost(base: BaseModel, num_images: int, nfe: int, batch_size: int | None = None) -> Cost:
    """Cost of sampling ``num_images`` at ``nfe`` forward passes each.

    Args:
        batch_size: images at once; None: as :func:`~agd_lib.sampling.generate` takes them.
    """
    at_once = min(batch_size or min(128, base.images_at_once), num_images)
    return Cost(num_images * nfe * seconds_per_forward(base, at_once))


def collection_cost(base: BaseModel, plan: CollectionPlan, batch_size: int = 128) -> Cost:
    """Cost of Algorithm 1: two forward passes per trajectory and step (one at scale 1), and the states on disk."""
    passes = 1 if plan.guidance_range == (1, 1) else 2
    forwards = passes * plan.num_trajectories * plan.num_inference_steps
    return Cost(forwards * seconds_per_forward(base, batch_size), predicted_size(base, plan))


def training_cost(
    base: BaseModel, adapters: AdapterSet, settings: TrainingSettings, gradient_checkpointing: bool = False
) -> Cost:
    """Cost of Algorithm 2, from two forward and backward passes measured now, without the optimiser's share.

    The adapters' weights are left as they were; like :func:`~agd_lib.training.train`, this attaches them to ``base``.
    """
    batch_size = settings.batch_size
    latents = torch.randn(batch_size, *base.latent_shape, device=base.device)
    timestep = torch.zeros(batch_size, dtype=torch.int64, device=base.device)
    scale = torch.ones(batch_size, device=base.device)
    student, condition = Student(base, adapters, gradient_checkpointing), base.null_condition(batch_size)
    for _ in range(2):
        start = time.perf_counter()
        student(latents, timestep, condition, scale).square().mean().backward()
        adapters.zero_grad()
        if base.device.type == "cuda":  # which is only told what to do so far
            torch.cuda.synchronize(base.device)
        seconds = time.perf_counter() - start
    return Cost(seconds * settings.num_steps)


@dataclass(frozen=True)
class Job:
    """Something that this repository can do, and what a machine needs for it, in GiB.

    Attributes:
        name: in words.
        memory: of the computer. gpu_memory: of one GPU; 0 if the processor alone will do. disk: free space.
        weights: hub id and revision of weights that must be fetched if they are not on the disk yet; None for none.
    """

    name: str
    memory: float
    gpu_memory: float
    disk: float
    weights: tuple[str, str] | None = None


_DIT_XL, _SD21, _SDXL = (
    (KNOWN_BASES[name].source, KNOWN_BASES[name].revision or "main") for name in ("dit-xl-2-256", "sd21", "sdxl")
)

JOBS = (
    Job("the notebooks on the small models, with their defaults", 3, 0, 0.5),
    Job("`make reproduce`: the whole experiment on the small models", 3, 0, 1.5),
    Job("a few images by DiT-XL/2 256 on the processor: minutes each", 8, 0, 4, _DIT_XL),
    Job("images by DiT-XL/2 256 on a GPU", 8, 6, 4, _DIT_XL),
    Job("DiT-XL/2 256: the paper's whole experiment", 16, 24, 12, _DIT_XL),
    Job("Stable Diffusion 2.1 768: the same in less memory, profile `small-gpu`", 16, 8, 12, _SD21),
    Job("Stable Diffusion 2.1 768: the paper's whole experiment", 24, 24, 12, _SD21),
    Job("SDXL 1024: the same in less memory, profile `small-gpu`", 24, 12, 20, _SDXL),
    Job("SDXL 1024: the paper's whole experiment", 24, 24, 20, _SDXL),
)
"""The paper used one GPU of 24 GB for everything. Its authors keep every step of its trajectories, 74 to 131 GB; the ``paper``
profiles keep as many as training reads."""


def what_runs(folder: str | Path = ".") -> list[tuple[str, bool, str]]:
    """What this machine can do, decided from what is found: (job, whether it runs, what is missing or must be fetched).

    Args:
        folder: on the disk that would be written to.
    """
    from huggingface_hub import try_to_load_from_cache

    memory, gpu_memory = _memory_gib(), gpu_memory_gib()
    free = shutil.disk_usage(folder).free / 2**30
    verdicts = []
    for job in JOBS:
        needs = (
            (job.memory, memory, "memory"),
            (job.gpu_memory, gpu_memory, "on one GPU"),
            (job.disk, free, "free disk"),
        )
        # Machines report a little less than the round number that they are sold by.
        missing = [
            f"needs {need:g} GiB {what}, found {found:.0f}" for need, found, what in needs if found < 0.95 * need
        ]
        note = "; ".join(missing)
        if not missing and job.weights:
            repository, revision = job.weights
            cached = try_to_load_from_cache(repository, "model_index.json", revision=revision)
            note = "" if isinstance(cached, str) else "weights are not on this disk: the first use fetches them"
        verdicts.append((job.name, not missing, note))
    return verdicts


def version_differences() -> list[str]:
    """Libraries whose installed version is not the one that this repository was tested with, one sentence each."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    differences = []
    for line in requires("agd-lib") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "not installed"
        if not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            differences.append(f"{requirement.name} is {installed}, tested with {requirement.specifier}")
    return differences


def _memory_gib() -> float:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def gpu_memory_gib() -> float:
    """Memory of the largest GPU; 0 without one."""
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return max(sizes, default=0) / 2**30


def environment_report(folder: str | Path = ".") -> dict[str, str]:
    """What this machine has: Python and library versions, device, memory, free disk."""
    import os
    import platform

    import accelerate
    import diffusers

    report = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "processor cores": str(os.cpu_count()),
        "memory": f"{_memory_gib():.0f} GiB",
        "free disk": f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        report[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        report["GPU"] = "none: computing on the processor"
    return report
