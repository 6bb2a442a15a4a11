"""The style of the small Stable Diffusion 2.1: fading and its reverse, what is trained, the LoRA's folder and its resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from untrained_sd21 import write_untrained_sd21

import agd_lib.cycles as cycles
import agd_lib.tiny_control as tiny_control
import agd_lib.tiny_style as tiny_style
from agd_lib.base_models import BaseModel, load_base
from agd_lib.errors import CheckpointError
from agd_lib.project import DATA
from agd_lib.scenes import caption, make_scenes
from agd_lib.storage import read_tensors
from agd_lib.tiny import to_unit
from agd_lib.tiny_style import KEPT_CONTRAST, TINT, build_tiny_style, faded, train_in_style, unfaded

pytest.importorskip("peft")
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_sd21(tmp_path_factory.mktemp("bases") / "untrained-sd21")


@pytest.fixture
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder)


def build(output: Path, base_folder: Path, work: Path, steps: int = 3) -> None:
    build_tiny_style(output, base_folder, num_images=8, steps=steps, work=work)


@pytest.fixture(scope="module")
def built(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "style"
    build(output, base_folder, tmp_path_factory.mktemp("work"))
    return output


def test_fading_takes_contrast_and_tints_and_can_be_undone() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    old = faded(images)
    assert old.min() >= 0 and old.max() <= 1 and old.shape == images.shape
    torch.testing.assert_close(old.std(dim=(2, 3)), KEPT_CONTRAST * images.std(dim=(2, 3)))
    tint = torch.tensor(TINT).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(faded(tint), tint)
    torch.testing.assert_close(unfaded(old), images)
    assert torch.equal(unfaded(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))  # darker than any faded picture


def test_all_of_a_unet_is_trained_or_the_lora_alone(base: BaseModel) -> None:
    pixels, scenes = make_scenes(7, 6)
    prompts = [caption(scene) for scene in scenes]
    whole = copy.deepcopy(base.denoiser).requires_grad_(True)
    trained = train_in_style(base, whole, pixels, prompts, steps=2, learning_rate=1e-3, batch_size=6)
    before = dict(base.denoiser.named_parameters())
    moved = {name for name, weight in trained.named_parameters() if not torch.equal(weight, before[name])}
    assert len(moved) == len(before)

    from peft import LoraConfig

    lora = copy.deepcopy(base.denoiser)
    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    trained = train_in_style(base, lora, pixels, prompts, steps=2, learning_rate=1e-3, batch_size=6)
    for name, weight in trained.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace("base_layer.", "")]), name
    assert all(weight.abs().sum() > 0 for name, weight in trained.named_parameters() if "lora_B" in name)


def test_it_is_trained_on_faded_pictures(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    encode = tiny_control.encode_all
    monkeypatch.setattr(tiny_control, "encode_all", lambda vae, images: seen.append(images) or encode(vae, images))
    pixels, scenes = make_scenes(7, 4)
    unet = copy.deepcopy(base.denoiser).requires_grad_(True)
    train_in_style(base, unet, pixels, [caption(scene) for scene in scenes], 1, 1e-3, batch_size=2)
    (pictures,) = seen
    assert pictures.dtype == torch.uint8
    torch.testing.assert_close(to_unit(pictures), faded(to_unit(pixels)), atol=0.51 / 255, rtol=0)


def draw(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    images: Tensor = pipeline("a red ring", num_inference_steps=2, generator=noise, output_type="pt").images
    return images


def test_the_folder_is_a_lora_for_diffusers(built: Path, base_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder)
    plain = draw(pipeline)
    pipeline.load_lora_weights(built)
    loaded = {name: weight for name, weight in pipeline.unet.named_parameters() if "lora_" in name}
    kept = read_tensors(built / WEIGHTS, ValueError, "LoRA")  # type: ignore[arg-type]
    assert sum(weight.numel() for weight in loaded.values()) == sum(weight.numel() for weight in kept.values())
    assert any("attn1" in name for name in loaded) and any("conv1" in name for name in loaded)
    assert not torch.allclose(draw(pipeline), plain, atol=1e-4)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)
    assert "load_lora_weights" in (built / "README.md").read_text()


def test_a_finished_one_is_left_alone_and_one_of_other_settings_refused(
    built: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tiny_style, "train_in_style", refuse)
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    build(built, base_folder, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in built.iterdir()}
    with pytest.raises(CheckpointError, match="other settings: steps is 3 there, 4 here"):
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
    monkeypatch.setattr(tiny_style, "CHECKPOINT_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "style", base_folder, tmp_path / "work")
    assert not (tmp_path / "style").exists()
    build(tmp_path / "style", base_folder, tmp_path / "work")
    assert written == [2, 3] and not list((tmp_path / "work").iterdir())
    assert (tmp_path / "style" / WEIGHTS).read_bytes() == (built / WEIGHTS).read_bytes()


def test_the_shipped_one_belongs_to_the_shipped_base() -> None:
    folder = DATA / "tiny-sd21-faded"
    settings = json.loads((folder / "training.json").read_text())
    assert settings["base"] == load_base("tiny-sd21").fingerprint()
    assert (folder / WEIGHTS).stat().st_size < 2e6
