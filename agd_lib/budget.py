"""What an expensive cell will cost, said before it starts: seconds measured on this machine, bytes counted."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .attach import AdapterSet
from .base_models import BaseModel
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


def sampling_cost(base: BaseModel, num_images: int, nfe: int, batch_size: int = 128) -> Cost:
    """Cost of sampling ``num_images`` at ``nfe`` forward passes each."""
    return Cost(num_images * nfe * seconds_per_forward(base, min(batch_size, num_images)))


def collection_cost(base: BaseModel, plan: CollectionPlan, batch_size: int = 128) -> Cost:
    """Cost of Algorithm 1: two forward passes per trajectory and step, and the recorded states on disk."""
    forwards = 2 * plan.num_trajectories * plan.num_inference_steps
    return Cost(forwards * seconds_per_forward(base, batch_size), predicted_size(base, plan))


def training_cost(base: BaseModel, adapters: AdapterSet, settings: TrainingSettings) -> Cost:
    """Cost of Algorithm 2, from two forward and backward passes measured now. Adapters and base are left as they were."""
    batch_size = settings.batch_size
    latents = torch.randn(batch_size, *base.latent_shape, device=base.device)
    timestep = torch.zeros(batch_size, dtype=torch.int64, device=base.device)
    scale = torch.ones(batch_size, device=base.device)
    student = Student(base, adapters)
    for _ in range(2):
        start = time.perf_counter()
        student(latents, timestep, base.null_condition(batch_size), scale).square().mean().backward()
        adapters.zero_grad()
        seconds = time.perf_counter() - start
    return Cost(seconds * settings.num_steps)


def environment_report(folder: str | Path = ".") -> dict[str, str]:
    """What this machine has: Python and library versions, device, memory, free disk."""
    import os
    import platform

    import accelerate
    import diffusers

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "processor cores": str(os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "free disk": f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        report[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        report["GPU"] = "none: the small models run, DiT-XL/2 does not"
    return report
