"""Small ``DiTPipeline`` folders with random weights: true pipelines in everything but size and training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

CLASS_NAMES = ("ant", "bee", "cat", "dog", "elk")


def randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter a random value, the zero-initialised ones too (adaLN-Zero, the last layer)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif "embedding_table" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def build_dit_pipeline(
    num_classes: int = 5,
    out_channels: int = 4,
    sample_size: int = 8,
    num_layers: int = 3,
    attention_head_dim: int = 8,
    names: Sequence[str] | None = CLASS_NAMES,
    seed: int = 0,
    **scheduler: Any,
) -> DiTPipeline:
    """A ``DiTPipeline`` in memory: latents (4, 8, 8), images 32 x 32, width 16, 3 blocks, unless told otherwise.

    Args:
        num_classes: without the null class, whose label is ``num_classes``.
        out_channels: 4 (epsilon) or 8 (epsilon and variance, as DiT-XL/2).
        names: of the classes; None for a pipeline without class names.
        scheduler: changes to the ``DDIMScheduler``, such as ``prediction_type="v_prediction"``.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=attention_head_dim,
        in_channels=4,
        out_channels=out_channels,
        num_layers=num_layers,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=num_classes,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=4 * sample_size,
        mid_block_add_attention=False,
        scaling_factor=0.75,
    )
    randomise(transformer, seed)
    randomise(vae, seed + 1)
    first, *others = transformer.transformer_blocks
    for block in others:  # copies of one embedder, as in every checkpoint of a DiT
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    # an ending of 0.004 instead of 0.02 keeps the samples of an untrained model of order one
    settings = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_end": 0.004, "clip_sample": False}
    pipeline = DiTPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=DDIMScheduler(**(settings | scheduler)),
        id2label=dict(enumerate(names)) if names else None,
    )
    if names:
        pipeline.register_to_config(id2label=dict(enumerate(names)))  # diffusers itself forgets them when it saves
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_dit_folder(folder: Path, **settings: Any) -> Path:
    """Save :func:`build_dit_pipeline` to a folder, with its class names, as a hub repository would hold it."""
    build_dit_pipeline(**settings).save_pretrained(folder)
    return folder
