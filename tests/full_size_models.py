"""The paper's base models at full size, on the meta device (without weights or memory) or with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from agd_lib.base_models import BaseModel, DiTBase, StableDiffusionBase, StableDiffusionXLBase, base_from_pipeline

DIT_XL: dict[str, Any] = {
    # transformer/config.json of facebook/DiT-XL-2-256
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
}
COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "use_linear_projection": True,
}
SD21 = COMMON | {
    # unet/config.json of stable-diffusion-2-1
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "sample_size": 96,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "upcast_attention": True,
}
SDXL = COMMON | {
    # unet/config.json of stable-diffusion-xl-base-1.0
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}


VAE: dict[str, Any] = {
    # vae/config.json of all three
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT: dict[str, tuple[int, int, int]] = {
    # text_encoder/config.json: width, layers, heads
    "sd21": (1024, 23, 16),
    "sdxl": (768, 12, 12),
    "sdxl, second": (1280, 32, 20),
}


def text_encoder(name: str) -> CLIPTextModel | CLIPTextModelWithProjection:
    """One of :data:`TEXT`, on the meta device."""
    width, layers, heads = TEXT[name]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config) if "second" in name else CLIPTextModel(config)


NARROW: dict[str, dict[str, Any]] = {
    "dit-xl-2-256": DIT_XL | {"attention_head_dim": 4, "sample_size": 4},
    "sd21": SD21
    | {
        "attention_head_dim": [1, 2, 4, 4],
        "block_out_channels": [32, 64, 128, 128],
        "cross_attention_dim": 32,
        "sample_size": 8,
    },
    "sdxl": SDXL
    | {
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 4],
        "block_out_channels": [32, 64, 128],
        "cross_attention_dim": 32,
        "projection_class_embeddings_input_dim": 64,
        "sample_size": 8,
    },
}
"""As many blocks and layers as at full size, a tenth as wide: as many tensor operations, in little memory."""


def narrow(name: str) -> BaseModel:
    """One of :data:`NARROW`, with random weights."""
    torch.manual_seed(0)
    scheduler, vae = DDIMScheduler(steps_offset=1, clip_sample=False), AutoencoderKL(block_out_channels=(32,))
    if name == "dit-xl-2-256":
        return base_from_pipeline(DiTPipeline(DiTTransformer2DModel(**NARROW[name]), vae, scheduler), name)
    unet = UNet2DConditionModel(**NARROW[name])
    if name == "sd21":
        pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    else:
        pipeline = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    return base_from_pipeline(pipeline, name)


def dit_xl() -> DiTBase:
    """DiT-XL/2 at 256 x 256, on the meta device."""
    with torch.device("meta"):
        transformer, vae = DiTTransformer2DModel(**DIT_XL), AutoencoderKL(**VAE)
    return DiTBase(DiTPipeline(transformer, vae, DDIMScheduler(beta_schedule="linear")), "dit-xl-2-256")


def sd21() -> StableDiffusionBase:
    """Stable Diffusion 2.1 at 768 x 768, on the meta device, without tokenizer."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD21), AutoencoderKL(**VAE)
    scheduler = DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder("sd21"), None, unet, scheduler, None, None, requires_safety_checker=False
    )
    return StableDiffusionBase(pipeline, "sd21")


def sdxl() -> StableDiffusionXLBase:
    """SDXL at 1024 x 1024, on the meta device, without tokenizers."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SDXL), AutoencoderKL(**VAE)
    encoders = text_encoder("sdxl"), text_encoder("sdxl, second")
    pipeline = StableDiffusionXLPipeline(
        vae, *encoders, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False
    )
    return StableDiffusionXLBase(pipeline, "sdxl")


def with_random_weights(base: BaseModel) -> BaseModel:
    """The denoiser of a base on the meta device brought into memory, with random weights (what it draws is noise)."""
    base.denoiser.to_empty(device="cpu")
    encoders = {name: None for name in ("text_encoder", "text_encoder_2") if name in base.pipeline.components}
    base.pipeline.register_modules(**encoders)  # they have no weights
    generator = torch.Generator().manual_seed(0)
    for tensor in [*base.denoiser.parameters(), *base.denoiser.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)
    random = base_from_pipeline(base.pipeline, f"{base.name}, random weights")
    random.null_condition = random.blank_condition  # type: ignore[method-assign]  # there may be no text encoder
    return random
