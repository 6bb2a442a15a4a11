"""What a student lacks is strength: how much of it, over the noise levels, and how the adapters are asked for as much more.

A squared error is smallest for the mean of what a student cannot tell apart. What it cannot explain is left out of its answer,
so on average it guides too weakly (notebook 03, section 7); trained with ``weighting="endpoint"``, most so at low noise. Adapters
are told a scale at every step, so that can be made up for without training: :func:`strength_gains` measures on recorded states
how much is missing (or, at the highest noise, too much), and adapters whose config has these gains
(:class:`agd_lib.attach.AdapterConfig`) take a scale w at a noise level for ``1 + (w - 1) * gain``. An extension, not in the
paper; what it is worth is measured in notebook 07.
"""

from __future__ import annotations

import torch

from .attach import AdapterSet
from .base_models import BaseModel
from .training import Student, scale_weights
from .trajectories import TrajectoryStore

DEFAULT_BELOW = 0.4
"""Share of the noise levels, from the cleanest, at which strength is restored: chosen on tiny-dit."""

MAX_GAIN = 2.0
"""A student that hardly guides at a noise level is not asked for more than this much more there."""


@torch.no_grad()
def strength_gains(
    base: BaseModel,
    adapters: AdapterSet,
    store: TrajectoryStore,
    below: float = DEFAULT_BELOW,
    num_ranges: int = 10,
    batch_size: int | None = None,
) -> tuple[float, ...]:
    """The factors for w - 1 with which the adapters add as much as guidance does: ``sqrt(E |g|^2 / E |d|^2)``.

    Here g = target - conditional prediction, and d is what the adapters add to the latter. Both averages weigh every scale
    alike, as the loss of ``weighting="endpoint"`` does. Two forward passes for each state.

    Args:
        adapters: trained, without gains of their own; they stay attached. store: of guided states, which need not be those
            of the training.
        below: the share of the noise levels, from the cleanest, at which strength is restored. Above, where the composition
            is decided, more of an answer that is not exact acts like a larger scale instead of sharpening the image.
        num_ranges: equal ranges of noise levels; a range counts as a whole, by its cleanest level.
        batch_size: states at once; None: :attr:`~agd_lib.base_models.BaseModel.images_at_once`, at most 256.

    Returns:
        (num_ranges,) from the cleanest range of timesteps to the noisiest, none above :data:`MAX_GAIN`; 1 where the store
        has no states, and from ``below`` on.

    Raises:
        ValueError: if the adapters have gains already, or ``below`` is not in 0 to 1.
    """
    if not 0 <= below <= 1:
        raise ValueError(f"got below = {below}, expected a share of the noise levels, from 0 to 1")
    if adapters.config.strength:
        raise ValueError("got adapters whose strength has been restored, expected ones without: see config.strength")
    student, weights = Student(base, adapters), scale_weights(store)
    energies = torch.zeros(2, num_ranges, dtype=torch.float64)  # of the guidance, and of what the adapters add
    ranges = store.column("timestep") * num_ranges // base.num_train_timesteps
    for indices in torch.arange(len(store)).split(batch_size or min(256, base.images_at_once)):
        batch = store.batch(indices).to(base.device)
        prediction = student(batch.latents, batch.timestep, batch.condition, batch.guidance_scale)
        with adapters.disabled():
            conditional = base.denoise(batch.latents, batch.timestep, batch.condition).float()
        for row, added in enumerate((batch.target - conditional, prediction - conditional)):
            squares = weights[indices] * added.square().flatten(1).mean(dim=1).cpu()
            energies[row].index_add_(0, ranges[indices], squares.double())
    guidance, student_energy = energies
    gains = (guidance / student_energy).sqrt().clamp(max=MAX_GAIN)
    restored = (guidance > 0) & (torch.arange(num_ranges) < below * num_ranges)
    return tuple(torch.where(restored, gains, 1.0).tolist())
