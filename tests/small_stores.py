"""Stores of random states, in the format of :mod:`agd_lib.trajectories`, without a model that was asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from agd_lib.storage import sha256, write_tensors
from agd_lib.trajectories import CONDITIONS, FORMAT_VERSION, _write_manifest


def random_states(rows: int, shape: tuple[int, int, int], conditions: int, seed: int = 0) -> dict[str, Tensor]:
    """The columns of a shard: latents and targets (rows, C, H, W) in float16, and the rest (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, *shape, generator=generator).half(),
        "target": torch.randn(rows, *shape, generator=generator).half(),
        "timestep": torch.randint(1000, (rows,), generator=generator),
        "guidance_scale": 1 + 11 * torch.rand(rows, generator=generator),
        "condition": torch.randint(conditions, (rows,), generator=generator),
        "signal": torch.rand(rows, generator=generator),
    }


def write_store(folder: Path, shards: Iterable[dict[str, Tensor]], conditions: dict[str, Tensor]) -> None:
    """A finished store of these shards, which have as many rows each; one state a trajectory."""
    entries, rows, shape = [], 0, (0, 0, 0)
    for number, columns in enumerate(shards):
        path = folder / f"shard-{number:05d}.safetensors"
        write_tensors(path, columns)
        rows, shape = len(columns["timestep"]), tuple(columns["latents"].shape[1:])
        entries.append({"file": path.name, "rows": rows, "sha256": sha256(path)})
    write_tensors(folder / CONDITIONS, conditions)
    manifest = {
        "format_version": FORMAT_VERSION,
        "latent_shape": list(shape),
        "num_trajectories": rows * len(entries),
        "trajectories_per_shard": rows,
        "num_train_timesteps": 1000,
        "num_inference_steps": 1,
        "guided_channels": shape[0],
        "guidance_range": [1.0, 12.0],
        "dtype": "float16",
        "base_name": "nobody",
        "base_fingerprint": "",
        "shards": entries,
        "conditions_sha256": sha256(folder / CONDITIONS),
    }
    _write_manifest(folder, manifest)
