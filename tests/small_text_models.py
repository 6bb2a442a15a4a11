"""Small text-to-image pipelines with random weights: SD 2.1 and SDXL in everything but size and training."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from small_models import randomise
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 12
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def write_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer with letters, a few merges, ``!``, and prompts of at most 12 tokens, read back from the disk.

    Args:
        pad_token: ``"!"`` in SD 2.1 and in SDXL's second tokenizer, the end of the text in SDXL's first.
    """
    letters = ["!", *string.ascii_lowercase]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>"), ("h", "a"), ("ha", "t</w>")]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token=pad_token)


def _text_config(tokenizer: CLIPTokenizer, width: int, **changes: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "gelu",
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**settings | changes)


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _ready(pipeline: Any, seed: int) -> Any:
    for number, (_, part) in enumerate(sorted(pipeline.components.items())):
        if isinstance(part, nn.Module):
            randomise(part.eval(), seed + number)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_sd_pipeline(folder: Path, seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """SD 2.1's parts: v-prediction, linear projections, heads by block, one text encoder, no safety checker.

    Latents are (4, 8, 8), images 64 x 64; 11 cross-attentions, of which the authors' code adapts 9.

    Args:
        folder: where the tokenizer is written to.
    """
    tokenizer = write_tokenizer(folder / "small-tokenizer", "!")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=12,
        use_linear_projection=True,
        upcast_attention=True,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 12)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipeline, seed)


def build_sdxl_pipeline(folder: Path, seed: int = 0, zeros_for_empty: bool = True) -> StableDiffusionXLPipeline:
    """SDXL's parts: two text encoders, added conditions, 1 to 3 transformer layers a block, Euler, a VAE to upcast.

    Latents are (4, 8, 8), images 64 x 64; 28 cross-attentions, of which the authors' code adapts 23.

    Args:
        folder: where the tokenizers are written to.
    """
    first = write_tokenizer(folder / "small-tokenizer", "<|endoftext|>")
    second = write_tokenizer(folder / "small-tokenizer-2", "!")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        norm_num_groups=4,
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=20,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(_text_config(first, 8, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 12, projection_dim=10)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )
    return _ready(pipeline, seed)
