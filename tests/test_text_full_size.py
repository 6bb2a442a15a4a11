"""SD 2.1 and SDXL at full size on the meta device: adapter sites, parameters and operations, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from agd_lib import AdapterSet
from agd_lib.base_models import StableDiffusionBase, StableDiffusionXLBase, count_flops
from agd_lib.memory import GIB, MemorySettings, training_memory

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


@pytest.fixture(scope="module")
def sd21() -> StableDiffusionBase:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD21), AutoencoderKL()
    scheduler = DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    return StableDiffusionBase(pipeline, "sd21")


@pytest.fixture(scope="module")
def sdxl() -> StableDiffusionXLBase:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SDXL), AutoencoderKL()
    pipeline = StableDiffusionXLPipeline(
        vae, None, None, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False
    )
    return StableDiffusionXLBase(pipeline, "sdxl")


@pytest.mark.parametrize(
    ("name", "parameters", "latent_shape", "sites", "authors_sites"),
    [("sd21", 865_910_724, (4, 96, 96), 16, 13), ("sdxl", 2_567_463_684, (4, 128, 128), 70, 58)],
)
def test_parameters_and_sites(
    request: pytest.FixtureRequest,
    name: str,
    parameters: int,
    latent_shape: tuple[int, ...],
    sites: int,
    authors_sites: int,
) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    assert base.num_parameters() == parameters
    assert base.latent_shape == latent_shape
    assert base.fingerprint() == "meta"
    assert len(base.attention_sites()) == sites
    assert len(base.attention_sites(all_sites=False)) == authors_sites


@pytest.mark.parametrize(
    ("name", "inputs", "parameters", "share"),
    [
        ("sd21", False, 19_904_960, "2.30 %"),  # the authors' default flags: the adapters see the scale alone
        ("sd21", True, 29_497_920, "3.41 %"),  # they see timestep and prompt as well
        ("sdxl", False, 103_827_840, "4.04 %"),
        ("sdxl", True, 165_632_640, "6.45 %"),
    ],
)
def test_the_papers_adapters(
    request: pytest.FixtureRequest, name: str, inputs: bool, parameters: int, share: str
) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    with torch.device("meta"):
        adapters = AdapterSet.create(
            base,
            "cross-attention",
            hidden_size=320,
            guidance_range=(1.0, 12.0),
            use_timestep=inputs,
            use_condition=inputs,
            all_sites=False,
        )
    assert adapters.num_parameters() == parameters
    assert f"{parameters:,} parameters, {share} of the base model's" in adapters.summary(base)
    adapters.attach(base)
    adapters.remove()


@pytest.mark.parametrize(("name", "operations"), [("sd21", 2_149e9), ("sdxl", 6_761e9)])
def test_operations_of_one_forward_pass(request: pytest.FixtureRequest, name: str, operations: float) -> None:
    base: StableDiffusionBase = request.getfixturevalue(name)
    assert count_flops(base) == pytest.approx(operations, rel=1e-3)


def test_every_kind_stays_within_the_papers_share(sd21: StableDiffusionBase) -> None:
    """1 to 5 % of the base model, at a width that each kind would be given."""
    for kind, hidden_size in (("offset", 256), ("cross-attention", 256), ("modulated", 256)):
        with torch.device("meta"):
            adapters = AdapterSet.create(sd21, kind, hidden_size=hidden_size)
        assert 0.01 < adapters.num_parameters() / sd21.num_parameters() < 0.05, kind


@pytest.mark.parametrize(("name", "batch_size", "gib", "limit"), [("sd21", 8, 5.42, 6), ("sdxl", 4, 9.16, 10)])
def test_training_fits_small_cards(
    request: pytest.FixtureRequest, name: str, batch_size: int, gib: float, limit: float
) -> None:
    """Adapters at all sites with all inputs; bfloat16 base and gradient checkpointing."""
    base: StableDiffusionBase = request.getfixturevalue(name)
    with torch.device("meta"):
        adapters = AdapterSet.create(base, "cross-attention", hidden_size=320)
    memory = training_memory(base, adapters, batch_size, MemorySettings(torch.bfloat16, True, offload=True)).memory
    assert memory.total == pytest.approx(gib * GIB, rel=0.01)
    assert memory.total < limit * GIB
