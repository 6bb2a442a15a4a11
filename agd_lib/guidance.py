"""Guidance as an argument of sampling: the arithmetic of CFG, scales and schedules of scales, and three kinds of guidance.

    Unguided()              one forward pass a step
    CFG(4.0)                two forward passes a step
    AGD(adapters, 4.0)      one forward pass a step

A *scale* is a number, a tensor with one value per sample, or a schedule over timesteps such as
:class:`GuidanceInterval`. The convention is diffusers': scale 1 is the conditional model, scale 0 the unconditional one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attach import AdapterSet
    from .base_models import BaseModel, Condition

NEGATIVE = "negative_hidden_states"
"""Where a condition has the tokens of negative prompts, (B, L, D). The denoiser itself is not told them."""

Scale: TypeAlias = "float | Tensor | Callable[[int], float | Tensor]"
"""A number, a tensor (B,), or a function of the timestep (an int in 0..num_train_timesteps - 1) that returns either."""


def cfg_combine(unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance: ``uncond + w * (cond - uncond)`` (the paper's eq. for the guided prediction).

    Args:
        unconditional, conditional: (B, C, H, W), the model's two predictions, in any one prediction type.
        scale: w, one value per sample (B,), or a scalar tensor; in float32 also where the predictions are not, since
            bfloat16 rounds 4.01 to 4.

    Returns:
        (B, C, H, W) in the dtype of the predictions, each operation rounded to it, as with a number for w.
    """
    scale = scale.view(
        -1, *([1] * (conditional.ndim - 1))
    )  # a scalar tensor would be rounded to the predictions' dtype
    difference = conditional - unconditional
    return unconditional + (scale * difference).to(difference.dtype)


def check_scale(value: float | Tensor) -> None:
    """Refuse what is no guidance scale: a number, or a tensor of any shape, of which every value has to be one.

    Raises:
        ValueError: if a scale is negative, NaN or infinite.
    """
    if isinstance(value, int | float):  # asking a tensor waits for its device
        valid = 0 <= value < math.inf
    else:
        scales = torch.as_tensor(value)
        valid = bool((scales.isfinite() & (scales >= 0)).all())
    if not valid:
        raise ValueError(
            f"got guidance scale {value}, expected finite numbers >= 0 (1 is the conditional model, usual values are "
            "1 to 12)"
        )


def scale_per_sample(value: float | Tensor, batch_size: int, like: Tensor) -> Tensor:
    """The scale of every sample, as a tensor (B,) on the device of ``like``.

    It is in float32, whatever the latents' dtype (float64 for those in float64): bfloat16 rounds 4.01 to 4.

    Raises:
        ValueError: if a per-sample tensor has another length than the batch.
    """
    tensor = torch.as_tensor(value, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    if tensor.ndim == 0:
        tensor = tensor.expand(batch_size)
    if tensor.shape != (batch_size,):
        raise ValueError(
            f"got a guidance scale of shape {tuple(tensor.shape)} for {batch_size} samples, expected one number or "
            f"a tensor of shape ({batch_size},)"
        )
    return tensor


def scale_at(scale: Scale, timestep: int, batch_size: int, like: Tensor) -> Tensor:
    """The scale of every sample at a timestep, (B,), checked: :func:`check_scale`, :func:`scale_per_sample`."""
    value = scale(timestep) if callable(scale) else scale
    check_scale(value)
    return scale_per_sample(value, batch_size, like)


def warn_if_untrained(scale: float | Tensor, trained: tuple[float, float], given: object, stacklevel: int) -> bool:
    """Warn of scales outside the range (w_min, w_max) that adapters were trained on; returns whether there were any.

    Args:
        given: what the warning quotes.
    """
    low, high = trained
    values = torch.as_tensor(scale)
    usable = (values >= 0) & values.isfinite()  # others are refused when they are used
    if not bool((usable & ((values < low) | (values > high))).any()):
        return False
    warnings.warn(
        f"got guidance_scale {given}: these adapters were trained on scales from {low:g} to {high:g}, beyond which "
        "nobody has taught them anything",
        stacklevel=stacklevel + 1,
    )
    return True


@dataclass(frozen=True)
class GuidanceInterval:
    """A schedule: ``scale`` at timesteps in [low, high], 1 (no guidance) outside (arXiv 2404.07724).

    Timesteps count from 0 (clean image) to ``num_train_timesteps - 1`` (pure noise).

    Raises:
        ValueError: if ``low > high`` or the scale is not a finite number >= 0.
    """

    scale: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"got guidance scale {self.scale}, expected a finite number >= 0")
        if self.low > self.high:
            raise ValueError(f"got the interval [{self.low}, {self.high}], expected low <= high (in timesteps)")

    def __call__(self, timestep: int) -> float:
        return self.scale if self.low <= timestep <= self.high else 1.0


class Guidance(Protocol):
    """What :func:`agd_lib.sampling.sample` asks of a kind of guidance."""

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        """The guided prediction (B, C, H, W), in the base model's own prediction type.

        The timestep is exact: some schedulers (Euler) place theirs between the whole numbers. Schedules see its whole
        part.
        """
        ...


@dataclass(frozen=True)
class Unguided:
    """The conditional model alone: one forward pass a step."""

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        return base.denoise(latents, timestep, condition)


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: conditional and unconditional predictions, batched into one call of twice the size.

    Where the scale is 1 for every sample (outside a guidance interval) the unconditional pass is left out. If the condition
    has negative prompts (:meth:`BaseModel.encode` of pairs), they take the place of the null condition.

    Attributes:
        scale: see :data:`Scale`.
        guided_channels: guide only the first so many latent channels. ``None``: all of them, as diffusers does; the
            original DiT code guides 3 of 4, which is a weaker guidance at the same scale.
    """

    scale: Scale
    guided_channels: int | None = None

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        scale = scale_at(self.scale, int(timestep), len(latents), latents)
        if bool((scale == 1).all()):
            return base.denoise(latents, timestep, condition)
        conditional, unconditional = self.both(base, latents, timestep, condition)
        return self.combine(unconditional, conditional, scale)

    def both(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> tuple[Tensor, Tensor]:
        """``(conditional, unconditional)`` predictions, each (B, C, H, W), from one batched call."""
        null = base.unconditional(condition)
        doubled = {name: torch.cat([condition[name], value]) for name, value in null.items()}
        conditional, unconditional = base.denoise(torch.cat([latents, latents]), timestep, doubled).chunk(2)
        return conditional, unconditional

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """:func:`cfg_combine` of predictions (B, C, H, W) on the guided channels; the others stay conditional."""
        guided = cfg_combine(unconditional, conditional, scale)
        if self.guided_channels is None:
            return guided
        return torch.cat([guided[:, : self.guided_channels], conditional[:, self.guided_channels :]], dim=1)


@dataclass(frozen=True)
class AGD:
    """Adapter guidance: one conditional pass through the base with the adapters told the scale (the paper's method).

    Warns of a scale beyond the range that the adapters were trained on.
    """

    adapters: AdapterSet
    scale: Scale

    def __post_init__(self) -> None:
        scale = self.scale.scale if isinstance(self.scale, GuidanceInterval) else self.scale
        if not callable(scale):
            warn_if_untrained(scale, self.adapters.config.guidance_range, scale, stacklevel=3)

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        self.adapters.check_attached(base)
        with self.adapters.guided_by(self.scale, condition.get(NEGATIVE)):
            return base.denoise(latents, timestep, condition)
