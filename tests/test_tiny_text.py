"""The small text-to-image models: tokenizer, dropped captions, loss weights, the folder and its resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

import agd_lib.tiny_text as tiny_text
from agd_lib.attributes import AttributeFeatures
from agd_lib.evaluation import load_reference
from agd_lib.scenes import caption, draw_scene, make_scenes, vocabulary
from agd_lib.tiny_text import (
    MAX_TOKENS,
    Denoiser,
    SD21Denoiser,
    SDXLDenoiser,
    build_tiny_text,
    min_snr_weights,
    new_scheduler,
    new_tokenizer,
    size_conditioning,
    tokenize,
    word_merges,
)

CYCLES = ((2, 1e-3), (1, 1e-3))
PIPELINES = {"sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def build(model: Any, output: Path, work: Path) -> None:
    build_tiny_text(model, output, 64, 2, 2, CYCLES, num_reference=70, work=work)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return new_tokenizer()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", params=["sd21", "sdxl"])
def folder(request: pytest.FixtureRequest, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / request.param
    build(request.param, output, work)
    return output


def test_every_caption_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in vocabulary():
        start, token, end = tokenizer(word).input_ids
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode([token]) == word
    assert len({tokenizer(word).input_ids[1] for word in vocabulary()}) == len(vocabulary())


def test_captions_fit_and_come_back(tokenizer: CLIPTokenizer) -> None:
    captions = [caption(draw_scene(0, index)) for index in range(500)]
    ids = tokenize(tokenizer, captions)
    assert ids.shape == (500, MAX_TOKENS) and tokenizer.model_max_length == MAX_TOKENS
    for row, text in zip(ids.tolist(), captions):
        words = text.replace(",", " ,").split()
        assert len(words) + 2 <= 18
        assert row[0] == tokenizer.bos_token_id and row[len(words) + 1] == tokenizer.eos_token_id
        assert row[len(words) + 2 :] == [tokenizer.pad_token_id] * (MAX_TOKENS - len(words) - 2)
        assert tokenizer.decode(row, skip_special_tokens=True) == " ".join(words)


def test_no_word_is_unknown(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a turquoise Ñandú").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1  # the end alone; unknown words would give the same token
    assert len(ids) > 10
    assert tokenizer("Red RING").input_ids == tokenizer("red ring").input_ids
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1


def test_merges_make_words_whole_in_their_order() -> None:
    words = ["star", "start", "tar", "banana", "a"]
    merges = word_merges(words)
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            parts = tiny_text._join(parts, pair)
        assert parts == [f"{word}</w>"]


@pytest.mark.parametrize("kind", [SD21Denoiser, SDXLDenoiser])
@torch.no_grad()
def test_dropped_captions_become_the_empty_prompt(kind: type[Denoiser], tokenizer: CLIPTokenizer) -> None:
    """What the denoiser predicts for a dropped caption is what the pipeline asks it for the unconditional branch."""
    torch.manual_seed(0)
    denoiser = kind(tokenizer).eval()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    ids = tokenize(tokenizer, ["a red ring", "a small green star"])
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    pipeline = denoiser.pipeline(tiny_text.AutoencoderKL(), tokenizer)
    encoded = pipeline.encode_prompt(
        ["a red ring", "a small green star"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    for dropped, branch in ((torch.tensor([False, False]), 0), (torch.tensor([True, True]), 1)):
        added = {"text_embeds": encoded[2 + branch], "time_ids": time_ids} if len(encoded) == 4 else None
        expected = denoiser.unet(noisy, timesteps, encoded[branch], added_cond_kwargs=added).sample
        prediction = denoiser(noisy, timesteps, ids, dropped, time_ids)
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-4)
    mixed = denoiser(noisy, timesteps, ids, torch.tensor([False, True]), time_ids)
    kept = denoiser(noisy, timesteps, ids, torch.tensor([False, False]), time_ids)
    torch.testing.assert_close(mixed[0], kept[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], kept[1], atol=1e-4)


@pytest.mark.parametrize("kind", [SD21Denoiser, SDXLDenoiser])
def test_text_and_unet_learn_together(kind: type[Denoiser], tokenizer: CLIPTokenizer) -> None:
    denoiser = kind(tokenizer)
    assert 2e6 < sum(p.numel() for p in denoiser.unet.parameters()) < 8e6
    ids = tokenize(tokenizer, ["a red ring"])
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    prediction = denoiser(torch.randn(1, 4, 8, 8), torch.tensor([500]), ids, torch.tensor([False]), time_ids)
    prediction.square().mean().backward()
    for name, part in denoiser.named_children():
        table = next(p for n, p in part.named_parameters() if name == "unet" or "token_embedding" in n)
        assert table.grad is not None and table.grad.abs().sum() > 0, name


def test_the_block_types_are_those_of_the_large_models(tokenizer: CLIPTokenizer) -> None:
    sd21, sdxl = SD21Denoiser(tokenizer).unet.config, SDXLDenoiser(tokenizer).unet.config
    assert set(sd21.down_block_types[:-1]) == {"CrossAttnDownBlock2D"} and sd21.down_block_types[-1] == "DownBlock2D"
    assert set(sd21.up_block_types[1:]) == {"CrossAttnUpBlock2D"} and sd21.up_block_types[0] == "UpBlock2D"
    assert sd21.use_linear_projection and sdxl.use_linear_projection
    assert sdxl.down_block_types[0] == "DownBlock2D" and sdxl.up_block_types[-1] == "UpBlock2D"
    assert sdxl.transformer_layers_per_block[1] == 2 and sdxl.addition_embed_type == "text_time"
    assert new_scheduler(SD21Denoiser.prediction_type).config.prediction_type == "v_prediction"
    assert new_scheduler(SDXLDenoiser.prediction_type).config.prediction_type == "epsilon"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_min_snr_in_terms_of_the_clean_latents(prediction_type: str) -> None:
    """The same error of the clean latents costs min(SNR, 5) times its square in either prediction type."""
    scheduler = new_scheduler(prediction_type)
    weights = min_snr_weights(scheduler.alphas_cumprod, prediction_type)
    clean, noise, error = torch.randn(3, 1, 4, 8, 8).double()
    for t in (5, 300, 950):
        a, s = scheduler.alphas_cumprod[t].double().sqrt(), (1 - scheduler.alphas_cumprod[t].double()).sqrt()
        noisy, wrong = a * clean + s * noise, clean + error
        wrong_noise = (noisy - a * wrong) / s
        if prediction_type == "epsilon":
            squared = (wrong_noise - noise).square().mean()
        else:
            squared = ((a * wrong_noise - s * wrong) - (a * noise - s * clean)).square().mean()
        expected = min(float(a**2 / s**2), 5.0) * error.square().mean()
        assert weights[t] * squared == pytest.approx(float(expected), rel=1e-3)


def test_size_conditioning_says_what_was_done() -> None:
    images, _ = make_scenes(0, 200)
    changed, time_ids = size_conditioning(images, seed=1)
    again, _ = size_conditioning(images, seed=1)
    assert torch.equal(changed, again) and changed.dtype == torch.uint8 and time_ids.shape == (200, 6)
    plain = (time_ids == torch.tensor([32.0, 32, 0, 0, 32, 32])).all(dim=1)
    assert 0.55 < plain.float().mean() < 0.85
    assert torch.equal(changed[plain], images[plain])
    assert all(not torch.equal(changed[i], images[i]) for i in (~plain).nonzero().flatten().tolist())
    small, cropped = time_ids[:, 0] < 32, time_ids[:, 2] > 0
    assert small.sum() > 10 and cropped.sum() > 10 and not (small & cropped).any()
    sharpness = [(x.float().diff(dim=-1).abs().mean(dim=(1, 2, 3))) for x in (changed, images)]
    assert (sharpness[0][small] < sharpness[1][small]).all()


def test_the_folder_is_a_diffusers_pipeline(folder: Path) -> None:
    pipeline = PIPELINES[folder.name].from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red ring", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
    for name in ("tokenizer", "tokenizer_2"):
        if name in pipeline.components:
            loaded = CLIPTokenizer.from_pretrained(folder / name)
            assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / name).iterdir()}
            text = ["a small orange crescent below a pink plus, on a grey background", ""]
            assert torch.equal(tokenize(loaded, text), tokenize(new_tokenizer(), text))
            assert loaded.model_max_length == MAX_TOKENS and loaded.pad_token == "<|pad|>"
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob(".*"))
    extractor = AttributeFeatures(folder / "extractor")
    assert load_reference(folder / "reference.safetensors", extractor).features.shape == (70, 64)


def test_a_finished_build_is_not_repeated(folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    for name in ("train_denoiser", "train_vae", "train_reader"):
        monkeypatch.setattr(tiny_text, name, refuse)
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    build(folder.name, folder, work)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_an_interrupted_build_resumes_to_the_same_result(
    work: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vae", "extractor"):
        tiny_text._copy(work / name, tmp_path / "work" / name)
    train = tiny_text.train_denoiser
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["seed"])
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(tiny_text, "train_denoiser", interrupted)
    output = tmp_path / folder.name
    with pytest.raises(KeyboardInterrupt):
        build(folder.name, output, tmp_path / "work")
    assert not (output / "model_index.json").exists()
    build(folder.name, output, tmp_path / "work")
    assert calls == [0, 1, 1]
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (output / path.relative_to(folder)).read_bytes(), path
