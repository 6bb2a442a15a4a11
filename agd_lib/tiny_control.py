"""Trains a ControlNet for the small Stable Diffusion 2.1: ``python -m agd_lib.tiny_control --output data/tiny-sd21-controlnet``.

It is told the silhouettes of a scene: where something stands before the background. What stands there, in which colours
and before which background, is left to the prompt. :func:`silhouettes` finds them in any picture of a scene, so how well
a picture follows them can be counted (:func:`overlap`).

The ControlNet is written whole or not at all, and its training keeps checkpoints, so an interrupted build resumes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attributes import AttributeFeatures
from .base_models import BaseModel, load_base
from .cycles import SETTINGS, Checkpoint, check_settings, forget_paths, train_cycle
from .project import DATA, ROOT
from .sampling import noise_generators, sample_seed
from .scenes import caption, make_scenes
from .storage import write_json, writing
from .tiny import HELD_OUT_SEED, TRAIN_SEED, encode_all, to_unit

MEASURED_SCALES = (1.0, 3.0)
"""Guidance scales that the ControlNet is measured at."""

CHECKPOINT_EVERY = 100
"""Steps from one checkpoint of the training to the next."""

_STANDS_OUT = (
    0.16  # Euclidean RGB distance from the background, of colours in [0, 1]: half of the scenes' least contrast
)
_CORNER = 2  # side in pixels of the corners, which no object reaches


def silhouettes(images: Tensor) -> Tensor:
    """Where something stands before the background of a scene, (N, 1, H, W), ones there and zeros elsewhere.

    The background of a scene is a linear gradient. It is fitted to the four corners, which objects leave free.

    Args:
        images: (N, 3, H, W) in [0, 1].
    """
    height, width = images.shape[-2:]
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    planes = torch.stack([torch.ones(height, width), *torch.meshgrid(rows, columns, indexing="ij")], dim=-1)
    free = torch.zeros(height, width, dtype=torch.bool)
    for row in (slice(_CORNER), slice(-_CORNER, None)):
        for column in (slice(_CORNER), slice(-_CORNER, None)):
            free[row, column] = True
    fit = torch.linalg.pinv(planes[free]).to(images)  # (3, free pixels)
    background = images[:, :, free] @ fit.T @ planes.flatten(0, 1).to(images).T  # (N, 3, H * W)
    distance = (images.flatten(2) - background).norm(dim=1)
    return (distance > _STANDS_OUT).to(images.dtype).view(-1, 1, height, width)


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of silhouettes, (N,): 1 where two are equal, also where both are empty.

    Args:
        found, wanted: (N, 1, H, W) of zeros and ones.
    """
    both, either = torch.minimum(found, wanted).sum(dim=(1, 2, 3)), torch.maximum(found, wanted).sum(dim=(1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def control_images(images: Tensor) -> Tensor:
    """The silhouettes as the ControlNet takes them, (N, 3, H, W): white on black.

    Args:
        images: (N, 3, H, W) in [0, 1].
    """
    return silhouettes(images).expand(-1, 3, -1, -1)


def train_with_prompts(
    base: BaseModel,
    model: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    images: Tensor,
    captions: Sequence[str],
    steps: int,
    learning_rate: float,
    batch_size: int,
    dropout: float,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Train something that goes with a text-to-image model, by the loss of the model itself; returns its moving average.

    Args:
        base: gives autoencoder, text encoder and noise schedule, all frozen.
        model: what is trained: its parameters that require gradients. It is changed.
        predict: ``predict(noisy, timesteps, context, indices)``: what the denoiser makes, with ``model``, of noisy latents
            (B, 4, h, w) at timesteps (B,) for prompts encoded as ``context`` (B, L, D), of the images ``indices`` (B,).
        images: (N, 3, H, W) uint8. captions: N of them. dropout: share of the captions to drop in a step.
        checkpoint: with one there, training goes on from it exactly.

    Raises:
        CheckpointError: if the checkpoint is damaged or of other settings. WriteError: if it cannot be written.
    """
    mean, std = encode_all(base.vae, images)
    chunks = [captions[start : start + 500] for start in range(0, len(captions), 500)]
    contexts = torch.cat([base.encode(chunk)["encoder_hidden_states"] for chunk in tqdm(chunks, desc="captions")])
    nothing = base.null_condition(1)["encoder_hidden_states"]

    def predict_with_context(noisy: Tensor, timesteps: Tensor, indices: Tensor, dropped: Tensor) -> Tensor:
        context = torch.where(dropped[:, None, None], nothing, contexts[indices])
        return predict(noisy, timesteps, context, indices)

    return train_cycle(
        model,
        predict_with_context,
        base.scheduler,
        mean,
        std,
        base.vae.config.scaling_factor,
        steps,
        batch_size,
        learning_rate,
        dropout,
        ema_decay=0.999,
        ema_lag=6,
        seed=seed,
        checkpoint=checkpoint,
    )


def new_controlnet(base: BaseModel) -> ControlNetModel:
    """An untrained ControlNet for a model with an autoencoder that makes images four times smaller: it changes nothing yet."""
    torch.manual_seed(0)
    return ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=(16, 32, 64))


def train_controlnet(
    base: BaseModel,
    images: Tensor,
    captions: Sequence[str],
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 48,
    dropout: float = 0.5,
    checkpoint: Checkpoint | None = None,
) -> ControlNetModel:
    """Train a ControlNet on the silhouettes of the images themselves; the base model stays frozen.

    Args:
        images: (N, 3, H, W) uint8. captions: N of them. dropout: of captions; the half is ControlNet's authors' choice.
    """
    controls = silhouettes(to_unit(images)).bool()  # a quarter of the memory
    controlnet: Any = new_controlnet(base)

    def predict(noisy: Tensor, timesteps: Tensor, context: Tensor, indices: Tensor) -> Tensor:
        control = controls[indices].float().expand(-1, 3, -1, -1)
        down, middle = controlnet(noisy, timesteps, context, control, return_dict=False)
        prediction: Tensor = base.denoiser(
            noisy,
            timesteps,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return prediction

    trained: Any = train_with_prompts(
        base, controlnet, predict, images, captions, steps, learning_rate, batch_size, dropout, checkpoint=checkpoint
    )
    return trained


@torch.no_grad()
def measure_controlnet(
    base: BaseModel, controlnet: ControlNetModel, reader: AttributeFeatures, num_samples: int
) -> dict[str, dict[str, float]]:
    """How well samples (20 steps) follow the silhouettes of held-out scenes, and how many prompts they fulfil.

    Returns:
        for each of :data:`MEASURED_SCALES`, such as ``"scale 3"``: ``{"overlap": mean, "fulfilled": share}``.
    """
    pixels, scenes = make_scenes(HELD_OUT_SEED, num_samples)
    controls, prompts = control_images(to_unit(pixels)), [caption(scene) for scene in scenes]
    pipeline = StableDiffusionControlNetPipeline(**base.pipeline.components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    measured = {}
    for scale in MEASURED_SCALES:
        parts = []
        for rows in tqdm(torch.arange(num_samples).split(50), desc=f"scale {scale:g}"):
            call = {
                "prompt": [prompts[row] for row in rows],
                "image": controls[rows],
                "generator": noise_generators([sample_seed(0, row) for row in rows.tolist()]),
            }
            parts.append(pipeline(**call, guidance_scale=scale, num_inference_steps=20, output_type="pt").images)
        images = torch.cat(parts)
        shown = reader(images, prompts)[1]
        assert shown is not None
        measured[f"scale {scale:g}"] = {
            "overlap": overlap(silhouettes(images), controls[:, :1]).mean().item(),
            "fulfilled": shown.double().mean().item(),
        }
    return measured


def build_tiny_control(
    output: Path,
    base_name: str | Path = "tiny-sd21",
    num_images: int = 8_000,
    steps: int = 1_000,
    num_samples: int = 300,
    work: Path = ROOT / "runs" / "build" / "tiny-control",
) -> None:
    """Train and measure a ControlNet and save it as ``output``, in half precision; a finished ``output`` is left as it is.

    Args:
        base_name: the base model. work: where unfinished work is kept.

    Raises:
        CheckpointError: if ``output`` or the checkpoint was trained with other settings. WriteError: if the disk is full.
    """
    base = load_base(base_name)
    settings = {"base": base.fingerprint(), "num_images": num_images, "steps": steps}
    if output.exists():
        check_settings(output, settings)
        print(f"{output} is finished: nothing to do", flush=True)
        return
    checkpoint = Checkpoint(work / "unfinished", settings, CHECKPOINT_EVERY)
    images, scenes = make_scenes(TRAIN_SEED, num_images)
    controlnet = train_controlnet(
        base, images, [caption(scene) for scene in scenes], steps, checkpoint=checkpoint
    ).half()
    reader = AttributeFeatures(DATA / "scenes" / "extractor")
    measured = measure_controlnet(base, copy.deepcopy(controlnet).float(), reader, num_samples)
    with writing(output) as temporary:
        controlnet.save_pretrained(temporary)
        write_json(temporary / SETTINGS, settings)
        (temporary / "README.md").write_text(_model_card(settings, measured, num_samples), encoding="utf-8")
        forget_paths(temporary)
    checkpoint.remove()


def _model_card(settings: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]], num_samples: int) -> str:
    rows = "\n".join(f"| {name} | {row['overlap']:.2f} | {row['fulfilled']:.1%} |" for name, row in measured.items())
    return f"""---
library_name: diffusers
license: mit
tags: [controlnet]
---
# A ControlNet for tiny-sd21: silhouettes

It tells the small Stable Diffusion 2.1 of this repository (`data/tiny-sd21`) where objects are to stand: white on black, 32 x 32
pixels. The prompt tells the rest. `agd_lib.tiny_control.silhouettes` finds the silhouettes in a picture.

Samples for {num_samples} held-out scenes (DDIM, 20 steps): intersection over union of their silhouettes with those that were asked for,
and the share of prompts that are fulfilled, by guidance scale (1: unguided):

| | overlap | prompts fulfilled |
|---|---|---|
{rows}

Made by `python -m agd_lib.tiny_control --output data/tiny-sd21-controlnet`: {settings["num_images"]:,} images, {settings["steps"]:,} steps
with the base model frozen, half of the captions dropped. Stored in half precision.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=1_000)
    arguments = parser.parse_args()
    build_tiny_control(arguments.output, num_images=arguments.num_images, steps=arguments.steps)


if __name__ == "__main__":
    main()
