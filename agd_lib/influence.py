"""Where along a trajectory guidance decides the image: how far the endpoint moves when one range of timesteps goes without.

The squared error of Algorithm 2 counts every recorded state alike. But an error at one noise level is forgotten by the
steps that follow, and at another is carried to the end. :func:`endpoint_influence` measures which is which, once for a
store; :class:`agd_lib.training.InfluenceOrder` draws states by it.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor

from .base_models import BaseModel
from .errors import StoreError
from .guidance import CFG
from .sampling import endpoint, sample, sample_seed
from .storage import read_tensors, write_tensors
from .trajectories import TrajectoryStore

INFLUENCE = "influence.safetensors"
"""Name of the file in a store's folder that keeps what was measured for it."""


@torch.no_grad()
def endpoint_influence(
    base: BaseModel,
    store: TrajectoryStore,
    num_bins: int = 10,
    num_samples: int = 40,
    batch_size: int = 20,
    seed: int = 0,
) -> Tensor:
    """For equal ranges of timesteps: the mean squared movement of the final latents when CFG pauses in that range.

    The teacher guides at the middle of the store's guidance range, with as many steps as the store was collected with,
    but at most 50. Costs less than ``2 * (num_bins + 1) * num_samples * steps`` forward passes, as many as collecting
    ``(num_bins + 1) * num_samples`` trajectories of so many steps.

    Args:
        base: without active adapters. store: its conditions are used in turn.
        num_samples: trajectories per range, from the same noises and conditions for all ranges.

    Returns:
        (num_bins,) float32, from the cleanest range of timesteps to the noisiest.
    """
    conditions = store.conditions
    known, total = len(next(iter(conditions.values()))), base.num_train_timesteps
    scale = sum(store.manifest["guidance_range"]) / 2
    num_inference_steps = min(50, store.manifest["num_inference_steps"])

    def endpoints(low: float, high: float) -> Tensor:
        """Final latents (num_samples, C, H, W) with guidance everywhere but in [low, high)."""
        guidance = CFG(lambda timestep: 1.0 if low <= timestep < high else scale, store.manifest["guided_channels"])
        latents = []
        for indices in torch.arange(num_samples).split(min(batch_size, base.images_at_once)):
            condition = {name: value[indices % known].to(base.device) for name, value in conditions.items()}
            seeds = [sample_seed(seed, int(i)) for i in indices]
            latents.append(endpoint(sample(base, condition, guidance, num_inference_steps, seeds=seeds)).float())
        return torch.cat(latents)

    guided = endpoints(0, 0)
    edges = [total * i / num_bins for i in range(num_bins + 1)]
    return torch.stack([(endpoints(*edge) - guided).square().mean() for edge in itertools.pairwise(edges)]).cpu()


def influence_of(base: BaseModel, store: TrajectoryStore) -> Tensor:
    """:func:`endpoint_influence` of a store, (num_bins,), measured at the first call and kept in the store's folder.

    Raises:
        StoreError: if the file that keeps it is damaged. WriteError: if it cannot be written.
        ValueError: if it has yet to be measured and the base model is not in float32, which is what a teacher needs.
    """
    path = store.folder / INFLUENCE
    if not path.is_file():
        if base.dtype != torch.float32:
            raise ValueError(
                f"the influence of the store {store.folder} has yet to be measured, and the base model is in {base.dtype}: "
                "the teacher is measured in float32; call agd_lib.influence.influence_of with a float32 base once"
            )
        measured = endpoint_influence(base, store)
        write_tensors(path, {"influence": measured, "sha256": _checksum(measured)})
    tensors = read_tensors(path, StoreError, "store's influence")
    influence = tensors.get("influence", torch.empty(0))
    if not torch.equal(tensors.get("sha256", torch.empty(0)), _checksum(influence)):
        raise StoreError(
            f"{path} does not hold what was measured (its checksum differs): remove it, it is measured again"
        )
    if influence.ndim != 1 or len(influence) == 0 or not bool((torch.isfinite(influence) & (influence >= 0)).all()):
        raise StoreError(f"{path} does not hold one finite number >= 0 for each range of timesteps: remove it")
    return influence


def _checksum(influence: Tensor) -> Tensor:
    """(32,) uint8."""
    return torch.tensor(list(hashlib.sha256(influence.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)
