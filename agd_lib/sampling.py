"""The sampler: a generator over steps, the only loop over timesteps in this library.

    for step in sample(base, base.encode([3, 7]), CFG(4.0), num_inference_steps=20, seeds=[0, 1]):
        ...                                   # watch step.latents, step.prediction
    images = base.decode(step.next_latents)   # or endpoint(sample(...)), to see the end alone

What differs between unguided sampling, classifier-free guidance and AGD is the ``guidance`` argument alone.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .base_models import BaseModel, Condition, SamplingRun
from .guidance import Guidance


@dataclass(frozen=True)
class SamplerStep:
    """One step of the sampler.

    Attributes:
        index: 0 for the first (noisiest) step.
        timestep: t, from ``num_train_timesteps - 1`` down to 0; without its fraction, where the scheduler's has one.
        latents: x_t, (B, C, H, W), before the step.
        model_input: x_t as the denoiser saw it, (B, C, H, W): after the scheduler's input scaling if it has one.
        prediction: the guided prediction at x_t, (B, C, H, W).
        next_latents: after the step; of the last step: the sample.
    """

    index: int
    timestep: int
    latents: Tensor
    model_input: Tensor
    prediction: Tensor
    next_latents: Tensor


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` in the run ``seed``: neither neighbours nor runs share noise."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, so that a sample does not depend on the batch that it is drawn in."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_latents(base: BaseModel, generators: Sequence[torch.Generator]) -> Tensor:
    """x_T, (B, C, H, W): standard normal noise, drawn on the CPU in float32, then moved to the model."""
    noise = torch.stack([torch.randn(base.latent_shape, generator=generator) for generator in generators])
    return noise.to(base.device, base.dtype)


@torch.no_grad()
def sample(
    base: BaseModel,
    condition: Condition,
    guidance: Guidance,
    num_inference_steps: int = 20,
    seeds: Sequence[int] | None = None,
    latents: Tensor | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[SamplerStep]:
    """Run the base model's own scheduler from noise to a sample, one step at a time.

    Args:
        condition: from ``base.encode``, batch size B.
        guidance: ``Unguided()``, ``CFG(scale)`` or ``AGD(adapters, scale)``.
        num_inference_steps: steps of the sampler.
        seeds: one per sample, for the initial noise and for stochastic schedulers. Or, instead:
        latents: the initial noise x_T itself, (B, C, H, W), and ``generators`` (one per sample) for stochastic
            schedulers.

    Raises:
        ValueError: if both or neither of seeds and latents are given, their number is not B, or the number of steps is out of
            range.
    """
    batch_size = len(next(iter(condition.values())))
    if not 1 <= num_inference_steps <= base.num_train_timesteps:
        raise ValueError(f"got {num_inference_steps} steps, expected 1 to {base.num_train_timesteps}")
    if (seeds is None) == (latents is None):
        raise ValueError("give either seeds (one per sample) or latents (the initial noise), not both or neither")
    if seeds is not None:
        generators = noise_generators(seeds)
        if len(seeds) != batch_size:
            raise ValueError(f"got {len(seeds)} seeds for {batch_size} conditions, expected one per sample")
        latents = initial_latents(base, generators)
    assert latents is not None
    if latents.shape != (batch_size, *base.latent_shape):
        raise ValueError(f"got latents of shape {tuple(latents.shape)}, expected {(batch_size, *base.latent_shape)}")

    scheduler = copy.deepcopy(base.scheduler)  # multistep schedulers keep a history
    scheduler.set_timesteps(num_inference_steps, device=base.device)
    latents = latents.to(base.device, base.dtype) * scheduler.init_noise_sigma
    step_arguments = {}
    if generators is not None and "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments["generator"] = list(generators)
    run = SamplingRun(scheduler)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep)
        with base.running(run):
            prediction = guidance.predict(base, model_input, timestep.item(), condition)
        next_latents = scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample
        yield SamplerStep(index, int(timestep), latents, model_input, prediction, next_latents)
        latents = next_latents


def endpoint(steps: Iterator[SamplerStep]) -> Tensor:
    """The final latents of :func:`sample`, (B, C, H, W), without keeping the steps before."""
    (last,) = deque(steps, maxlen=1)
    return last.next_latents


def generate(
    base: BaseModel,
    conditions: Sequence[object],
    guidance: Guidance,
    num_inference_steps: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    progress: str | None = None,
    first: int = 0,
) -> Iterator[Tensor]:
    """Sample many conditions, a batch at a time: the final latents (B, C, H, W).

    Sample i starts from the noise ``sample_seed(seed, first + i)``, whatever the batch size.

    Args:
        conditions: one per sample, as ``base.encode`` takes them.
        guidance: its scale must serve any batch: a number or a schedule. One number for each sample is for one batch alone.
        batch_size: images at once; None: :attr:`~agd_lib.base_models.BaseModel.images_at_once`, at most 128.
        progress: label of a progress bar; None for none.
        first: number of the first sample, where these are a part of more.

    Raises:
        ValueError: if the guidance has a scale for each sample, and there are several batches.
    """
    batch_size = batch_size or min(128, base.images_at_once)
    scale = getattr(guidance, "scale", None)
    if isinstance(scale, Tensor) and scale.ndim > 0 and len(conditions) > batch_size:
        raise ValueError(
            f"got a guidance scale of shape {tuple(scale.shape)} for {len(conditions)} samples in batches of {batch_size}: every batch "
            "would be given the same scales. Call generate for each batch, with its own scales and `first`"
        )
    starts = range(0, len(conditions), batch_size)
    for start in tqdm(starts, desc=progress, disable=progress is None):
        chunk = conditions[start : start + batch_size]
        condition = base.encode(chunk)
        seeds = [sample_seed(seed, first + start + i) for i in range(len(chunk))]
        yield endpoint(sample(base, condition, guidance, num_inference_steps, seeds=seeds))
