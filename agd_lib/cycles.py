"""Trains a denoiser on latents, one cycle of the learning rate at a time: the one loop that every small model goes through.

A cycle is resumed exactly: its checkpoint holds the weights, their moving average, the optimiser, the order of the
images that are still to come in this epoch, and the random generator.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import CheckpointError
from .storage import read_json, read_tensors, write_json, write_tensors, writing

SETTINGS = "training.json"
"""In every folder that a training wrote: what it was trained with."""


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16; without them it is many times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def next_batch(order: Tensor, count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(batch, order)``: the next indices (batch_size,) of shuffled epochs, and what is left of them after it.

    Args:
        order: what the call before left; empty for the first. count: length of an epoch.
    """
    if len(order) < batch_size:
        order = torch.cat([order, torch.randperm(count, generator=generator)])
    return order[:batch_size], order[batch_size:]


def batches(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` batches of indices: shuffled epochs, one after another."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        batch, order = next_batch(order, count, batch_size, generator)
        yield batch


def one_cycle(
    optimizer: torch.optim.Optimizer, learning_rate: float, steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Warm-up over the first twentieth of ``steps``, then cosine annealing to nearly zero."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Weight of each timestep's squared error, (T,): min-SNR weighting (arXiv 2303.09556).

    An error of the noise is SNR times, and an error of the velocity SNR + 1 times that of the clean latents. In terms
    of these the weight is min(SNR, gamma) for the noise. For the velocity it is min(SNR + 1, gamma): with min(SNR,
    gamma) its errors would weigh next to nothing at the noisiest timesteps, where the composition is decided.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "v_prediction":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / snr


def save_model(model: Any, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Save a model of diffusers or transformers: the folder is whole or absent.

    Args:
        settings: of its training, to be kept beside it: see :func:`check_settings`.
    """
    with writing(folder) as temporary:
        model.save_pretrained(temporary)
        forget_paths(temporary)
        if settings is not None:
            write_json(temporary / SETTINGS, dict(settings))


def forget_paths(folder: Path) -> None:
    """Take out of the configurations in a folder where diffusers loaded their models from."""
    for path in folder.rglob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """See that what lies in a folder was trained with these settings.

    Raises:
        CheckpointError: if it was trained with others, or does not tell.
    """
    kept = read_json(folder / SETTINGS, CheckpointError, "record of a training's settings")
    different = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
    if different:
        raise CheckpointError(
            f"{folder} was trained with other settings: "
            + "; ".join(f"{name} is {kept.get(name)!r} there, {settings.get(name)!r} here" for name in different)
            + ". Give the settings of that training, choose another folder, or remove that one"
        )


@dataclass(frozen=True)
class Checkpoint:
    """Where an unfinished cycle is kept.

    Attributes:
        folder: of the newest checkpoint; removed by whoever has kept the finished cycle.
        settings: what the cycle is trained with, as JSON gives it back; a checkpoint with others is refused.
        every: steps from one checkpoint to the next.
    """

    folder: Path
    settings: Mapping[str, Any]
    every: int = 1_000

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint, whole or not at all."""
        with writing(self.folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / "state.safetensors", tensors)
            write_json(temporary / SETTINGS, dict(self.settings))

    def read(self) -> dict[str, Tensor] | None:
        """What was written last; None if there is nothing.

        Raises:
            CheckpointError: if the checkpoint is damaged or of other settings.
        """
        if not self.folder.exists():
            return None
        check_settings(self.folder, self.settings)
        return read_tensors(self.folder / "state.safetensors", CheckpointError, "checkpoint")

    def remove(self) -> None:
        """Remove it, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def train_cycle(
    model: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    scheduler: DDIMScheduler,
    mean: Tensor,
    std: Tensor,
    scaling_factor: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    ema_decay: float,
    ema_lag: int,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Train a denoiser for one cycle; returns the exponential moving average of its weights, in eval mode.

    The loss is the squared error weighted by :func:`min_snr_weights`; AdamW, gradients clipped at norm 1.

    Args:
        model: where to start; is changed.
        predict: ``predict(noisy, timesteps, indices, dropped)``: what ``model`` makes of noisy latents (B, C, H, W) at
            timesteps (B,), for the images with these indices (B,), of which those that are ``dropped`` (B,) bool lose
            their condition.
        scheduler: gives the noise and tells the prediction type.
        mean, std: (N, C, H, W), the autoencoder's posteriors; a latent is drawn anew at every use.
        dropout: share of the conditions to drop.
        ema_decay, ema_lag: the decay after step i is (1 + i) / (ema_lag + i), at most ``ema_decay``.
        seed: of order, noise, timesteps and drops.
        checkpoint: with one there, training goes on from it exactly.

    Raises:
        CheckpointError: if the checkpoint is damaged or of other settings. WriteError: if it cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = min_snr_weights(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    schedule = one_cycle(optimizer, learning_rate, steps)
    order = torch.empty(0, dtype=torch.int64)
    done = 0
    kept = checkpoint.read() if checkpoint else None
    if checkpoint and kept is not None:
        try:
            done, order = _restore(kept, model, ema, optimizer, schedule, generator)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint {checkpoint.folder} does not fit the model ({error}): remove it"
            ) from error
    progress = tqdm(range(done + 1, steps + 1), total=steps, initial=done, desc="denoiser", mininterval=10)
    for step in progress:
        batch, order = next_batch(order, len(mean), batch_size, generator)
        posterior_noise, noise = (torch.randn(mean[batch].shape, generator=generator) for _ in range(2))
        latents: Any = (mean[batch] + std[batch] * posterior_noise) * scaling_factor
        timesteps: Any = torch.randint(len(weights), (len(batch),), generator=generator)
        dropped = torch.rand(len(batch), generator=generator) < dropout
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        errors = (predict(noisy, timesteps, batch, dropped) - target).square().mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * errors).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(ema_decay, (1 + step) / (ema_lag + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if checkpoint and (step % checkpoint.every == 0 or step == steps):
            checkpoint.write(_state(step, order, model, ema, optimizer, generator))
    return ema


def _state(
    step: int,
    order: Tensor,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    state = {
        "step": torch.tensor(step),
        "order": order,
        "learning_rate": torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64),
        "generator": generator.get_state(),
    }
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter
        state |= {f"optimizer.{key}.{name}": torch.as_tensor(v) for key, v in optimizer.state[parameter].items()}
    return state | {f"ema.{name}": parameter for name, parameter in ema.named_parameters()}


@torch.no_grad()
def _restore(
    state: Mapping[str, Tensor],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
    generator: torch.Generator,
) -> tuple[int, Tensor]:
    """Put a checkpoint back; returns the steps done, and the order of the images still to come."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[f"model.{name}"])
        moments = {key: state.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        # a parameter that the loss does not reach has none
        optimizer.state[parameter] = {key: value.clone() for key, value in moments.items() if value is not None}
    for name, parameter in ema.named_parameters():
        parameter.copy_(state[f"ema.{name}"])
    schedule.last_epoch = int(state["step"])
    for group in optimizer.param_groups:
        group["lr"] = state["learning_rate"].item()
    generator.set_state(state["generator"])
    return int(state["step"]), state["order"].clone()
