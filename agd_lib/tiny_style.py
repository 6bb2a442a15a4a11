"""Trains a style for the small Stable Diffusion 2.1, as a LoRA: ``python -m agd_lib.tiny_style --output data/tiny-sd21-faded``.

The style is that of a faded photograph: contrast is lost, and what is left has a warm tint (:func:`faded`). It is seen at
once, leaves the scene as it is, and can be undone (:func:`unfaded`), so what a picture in it shows can still be read.

The LoRA is written whole or not at all, in the form that diffusers' ``load_lora_weights`` reads, and its training keeps
checkpoints, so an interrupted build resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from .base_models import BaseModel, load_base
from .cycles import SETTINGS, Checkpoint, check_settings
from .project import ROOT
from .scenes import caption, make_scenes
from .storage import write_json, writing
from .tiny import TRAIN_SEED, to_unit
from .tiny_control import train_with_prompts

KEPT_CONTRAST = 0.65
"""Share of the contrast that a faded picture keeps."""

TINT = (1.0, 0.8, 0.4)
"""The colour, RGB in [0, 1], that it fades to."""

LORA_RANK = 8
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv_in", "conv_out")
"""Layers of the UNet that the LoRA changes."""

CHECKPOINT_EVERY = 100
"""Steps from one checkpoint of the training to the next."""


def _tint(like: Tensor) -> Tensor:
    return torch.tensor(TINT).to(like).view(3, 1, 1)


def faded(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] in the style of a faded photograph."""
    return KEPT_CONTRAST * images + (1 - KEPT_CONTRAST) * _tint(images)


def unfaded(images: Tensor) -> Tensor:
    """The reverse of :func:`faded`, (B, 3, H, W) in [0, 1]; what no faded picture could show is clamped to [0, 1]."""
    return ((images - (1 - KEPT_CONTRAST) * _tint(images)) / KEPT_CONTRAST).clamp(0, 1)


def train_in_style(
    base: BaseModel,
    unet: UNet2DConditionModel,
    images: Tensor,
    captions: Sequence[str],
    steps: int,
    learning_rate: float,
    batch_size: int = 32,
    checkpoint: Checkpoint | None = None,
) -> UNet2DConditionModel:
    """Train a UNet on faded pictures; returns the moving average of it.

    Args:
        base: gives autoencoder, text encoder and noise schedule.
        unet: its parameters that require gradients are trained: those of a LoRA, or all. Is changed.
        images: (N, 3, H, W) uint8, not faded yet. captions: N of them.
    """
    pictures = (faded(to_unit(images)) * 255).round().to(torch.uint8)

    def predict(noisy: Tensor, timesteps: Tensor, context: Tensor, indices: Tensor) -> Tensor:
        prediction: Tensor = unet(noisy, timesteps, context).sample
        return prediction

    trained: Any = train_with_prompts(
        base, unet, predict, pictures, captions, steps, learning_rate, batch_size, dropout=0.1, checkpoint=checkpoint
    )
    return trained


def build_tiny_style(
    output: Path,
    base_name: str | Path = "tiny-sd21",
    num_images: int = 2_000,
    steps: int = 400,
    work: Path = ROOT / "runs" / "build" / "tiny-style",
) -> None:
    """Train the style as a LoRA and save it as ``output``; a finished ``output`` is left as it is.

    Args:
        base_name: the base model. work: where unfinished work is kept.

    Raises:
        CheckpointError: if ``output`` or the checkpoint was trained with other settings. WriteError: if the disk is full.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = load_base(base_name)
    settings = {"base": base.fingerprint(), "num_images": num_images, "steps": steps, "rank": LORA_RANK}
    if output.exists():
        check_settings(output, settings)
        print(f"{output} is finished: nothing to do", flush=True)
        return
    images, scenes = make_scenes(TRAIN_SEED, num_images)
    torch.manual_seed(0)
    base.denoiser.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(LORA_LAYERS)))
    checkpoint = Checkpoint(work / "unfinished", settings, CHECKPOINT_EVERY)
    captions = [caption(scene) for scene in scenes]
    unet = train_in_style(base, base.denoiser, images, captions, steps, learning_rate=2e-3, checkpoint=checkpoint)
    layers = get_peft_model_state_dict(unet)
    with writing(output) as temporary:
        StableDiffusionPipeline.save_lora_weights(temporary, unet_lora_layers=layers)
        write_json(temporary / SETTINGS, settings)
        (temporary / "README.md").write_text(_model_card(settings), encoding="utf-8")
    checkpoint.remove()


def _model_card(settings: Mapping[str, Any]) -> str:
    return f"""---
library_name: diffusers
license: mit
tags: [lora, text-to-image]
---
# A LoRA for tiny-sd21: faded photographs

It makes the small Stable Diffusion 2.1 of this repository (`data/tiny-sd21`) draw faded pictures: contrast is reduced to
{KEPT_CONTRAST:.0%}, and what is left has a warm tint (`agd_lib.tiny_style.faded`).

```python
pipe.load_lora_weights("data/tiny-sd21-faded")
```

Made by `python -m agd_lib.tiny_style --output data/tiny-sd21-faded`: rank {settings["rank"]}, {settings["num_images"]:,} images,
{settings["steps"]:,} steps.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    build_tiny_style(arguments.output, num_images=arguments.num_images, steps=arguments.steps)


if __name__ == "__main__":
    main()
