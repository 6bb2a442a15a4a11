"""The ControlNet of the small Stable Diffusion 2.1: silhouettes, what is trained and what is not, the folder and its resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor
from untrained_sd21 import write_untrained_sd21

import agd_lib.cycles as cycles
import agd_lib.tiny_control as tiny_control
from agd_lib.base_models import BaseModel, load_base
from agd_lib.errors import CheckpointError
from agd_lib.extractor import load_local
from agd_lib.project import DATA
from agd_lib.scenes import Scene, caption, make_scenes
from agd_lib.shapes import coverage, gradient
from agd_lib.tiny import to_unit
from agd_lib.tiny_control import (
    build_tiny_control,
    control_images,
    new_controlnet,
    overlap,
    silhouettes,
    train_controlnet,
    train_with_prompts,
)

STEPS = 3


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_sd21(tmp_path_factory.mktemp("bases") / "untrained-sd21")


@pytest.fixture
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder)


def build(output: Path, base_folder: Path, work: Path, steps: int = STEPS) -> None:
    build_tiny_control(output, base_folder, num_images=8, steps=steps, num_samples=2, work=work)


@pytest.fixture(scope="module")
def built(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "controlnet"
    build(output, base_folder, tmp_path_factory.mktemp("work"))
    return output


# Silhouettes --------------------------------------------------------------------------------------------------------------


def covered(scene: Scene) -> Tensor:
    """The share of every pixel that any object covers, (1, 32, 32)."""
    masks = [coverage(item.shape, item.x, item.y, item.radius, item.rotation)[..., 0] for item in scene.objects]
    return torch.from_numpy(np.maximum.reduce(masks))[None]


def test_silhouettes_are_what_the_objects_cover() -> None:
    pixels, scenes = make_scenes(7, 300)
    found = silhouettes(to_unit(pixels))
    assert found.shape == (300, 1, 32, 32) and set(found.unique().tolist()) == {0.0, 1.0}
    shares = torch.stack([covered(scene) for scene in scenes])
    whole, free = shares == 1, shares == 0
    assert found[whole].mean() > 0.99 and found[free].mean() < 0.002
    agreement = overlap(found, (shares > 0.25).to(found.dtype))
    assert agreement.mean() > 0.95 and agreement.min() > 0.7


def test_a_background_alone_has_no_silhouette() -> None:
    ends = [((20.0, 40.0, 90.0), (40.0, 60.0, 120.0)), ((240.0, 240.0, 240.0), (200.0, 220.0, 240.0))]
    pixels = np.stack([gradient(pair, angle) for pair, angle in zip(ends, (0.3, 4.0))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert not silhouettes(images).any()
    images[0, 0, 10:14, 20:25] += 0.3
    images[1, :, 30:, 12] -= 0.3  # up to the border
    expected = torch.zeros(2, 1, 32, 32)
    expected[0, 0, 10:14, 20:25] = 1
    expected[1, 0, 30:, 12] = 1
    assert torch.equal(silhouettes(images), expected)


def test_overlap_is_intersection_over_union() -> None:
    masks = torch.zeros(4, 1, 4, 4)
    masks[0, 0, :2], masks[1, 0, 2:], masks[2, 0, 1:3] = 1, 1, 1
    one, other = masks[[0, 0, 0, 3, 3]], masks[[0, 1, 2, 3, 0]]
    torch.testing.assert_close(overlap(one, other), torch.tensor([1.0, 0.0, 1 / 3, 1.0, 0.0]))
    assert torch.equal(overlap(one, other), overlap(other, one))


def test_the_control_is_white_on_black() -> None:
    images = to_unit(make_scenes(7, 3)[0])
    control = control_images(images)
    assert control.shape == (3, 3, 32, 32)
    assert all(torch.equal(control[:, [channel]], silhouettes(images)) for channel in range(3))


# Training -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_untrained_controlnet_changes_nothing(base: BaseModel) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 64, generator=generator)
    timesteps, control = torch.tensor([10, 700]), torch.ones(2, 3, 32, 32)
    down, middle = new_controlnet(base)(noisy, timesteps, context, control, return_dict=False)
    expected = base.denoiser(noisy, timesteps, context).sample
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    assert torch.equal(base.denoiser(noisy, timesteps, context, **residuals).sample, expected)


def test_only_the_controlnet_is_trained_and_it_hears_its_control(base: BaseModel) -> None:
    before = copy.deepcopy(
        {name: part.state_dict() for name, part in base.pipeline.components.items() if name in MODELS}
    )
    pixels, scenes = make_scenes(7, 6)
    trained = train_controlnet(base, pixels, [caption(scene) for scene in scenes], steps=3, batch_size=6)
    for name, state in before.items():
        assert all(torch.equal(value, base.pipeline.components[name].state_dict()[key]) for key, value in state.items())
    untrained = new_controlnet(base).state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, untrained[name])}
    assert {"controlnet_mid_block.weight", "conv_in.weight"} <= changed
    with torch.no_grad():
        noisy, context = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 64)
        heard = [trained(noisy, 500, context, torch.full((1, 3, 32, 32), fill))[0][0] for fill in (0.0, 1.0)]
    assert not torch.allclose(*heard)


MODELS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropped_captions_become_the_empty_prompt(base: BaseModel, dropout: float) -> None:
    pixels, scenes = make_scenes(7, 5)
    prompts = [caption(scene) for scene in scenes]
    seen: list[tuple[Tensor, Tensor]] = []
    layer = torch.nn.Conv2d(4, 4, 1)

    def predict(noisy: Tensor, timesteps: Tensor, context: Tensor, indices: Tensor) -> Tensor:
        seen.append((context, indices))
        prediction: Tensor = layer(noisy)
        return prediction

    train_with_prompts(
        base, layer, predict, pixels, prompts, steps=4, learning_rate=1e-3, batch_size=3, dropout=dropout
    )
    asked = base.encode([""] * 5 if dropout else prompts)["encoder_hidden_states"]
    assert len(seen) == 4
    for context, indices in seen:
        torch.testing.assert_close(context, asked[indices], atol=1e-5, rtol=1e-5)


# The folder ---------------------------------------------------------------------------------------------------------------


def test_the_folder_is_a_controlnet_with_its_settings_and_a_card(built: Path, base: BaseModel) -> None:
    network = ControlNetModel.from_pretrained(built, torch_dtype=torch.float32, use_safetensors=True)
    pipeline = StableDiffusionControlNetPipeline(**base.pipeline.components, controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red ring", image=torch.ones(1, 3, 32, 32), num_inference_steps=2, guidance_scale=3.0, output_type="np"
    ).images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
    settings = json.loads((built / "training.json").read_text())
    assert settings == {"base": base.fingerprint(), "num_images": 8, "steps": STEPS}
    card = (built / "README.md").read_text()
    assert "| scale 1 | " in card and "| scale 3 | " in card and f"{STEPS} steps" in card
    assert "_name_or_path" not in (built / "config.json").read_text()


def test_a_finished_one_is_left_alone_and_one_of_other_settings_refused(
    built: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tiny_control, "train_controlnet", refuse)
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    build(built, base_folder, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in built.iterdir()}
    with pytest.raises(CheckpointError, match=f"other settings: steps is {STEPS} there, 4 here"):
        build(built, base_folder, tmp_path, steps=4)


def test_an_interrupted_build_resumes_to_the_same_result(
    built: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = cycles.Checkpoint.write, []

    def interrupted(self: Any, tensors: Any) -> None:
        write(self, tensors)
        written.append(int(tensors["step"]))
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cycles.Checkpoint, "write", interrupted)
    monkeypatch.setattr(tiny_control, "CHECKPOINT_EVERY", 2)
    output = tmp_path / "controlnet"
    with pytest.raises(KeyboardInterrupt):
        build(output, base_folder, tmp_path / "work")
    assert not output.exists()
    build(output, base_folder, tmp_path / "work")
    assert written == [2, 3] and not list((tmp_path / "work").iterdir())
    for path in built.glob("*.safetensors"):
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_the_shipped_one_belongs_to_the_shipped_base() -> None:
    folder = DATA / "tiny-sd21-controlnet"
    settings = json.loads((folder / "training.json").read_text())
    assert settings["base"] == load_base("tiny-sd21").fingerprint()
    assert load_local(ControlNetModel, folder).config.conditioning_embedding_out_channels == [16, 32, 64]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
