"""The small text-to-image models: tokenizer, dropped captions, loss weights, the folder and its resume."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

import agd_lib.cycles as cycles
import agd_lib.tiny_text as tiny_text
from agd_lib.attributes import AttributeFeatures
from agd_lib.errors import CheckpointError
from agd_lib.evaluation import load_reference
from agd_lib.scenes import caption, draw_scene, make_scenes, vocabulary
from agd_lib.tiny import new_vae, train_vae
from agd_lib.tiny_text import (
    MAX_TOKENS,
    Denoiser,
    SD21Denoiser,
    SDXLDenoiser,
    build_tiny_text,
    new_scheduler,
    new_tokenizer,
    size_conditioning,
    tokenize,
    with_wrong_captions,
    word_merges,
)

CYCLES = ((2, 1e-3, 0.0), (1, 1e-3, 0.25))
PIPELINES = {"sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def build(model: Any, output: Path, work: Path) -> None:
    build_tiny_text(model, output, 64, 2, 2, CYCLES, num_reference=70, work=work, num_samples=4, compiled=False)


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
    assert 2e6 < sum(p.numel() for p in denoiser.unet.parameters()) < 5e6
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
    assert (time_ids[cropped, 2] != time_ids[cropped, 3]).any()
    for i in cropped.nonzero().flatten().tolist():
        top, left = time_ids[i, 2:4].int().tolist()
        larger = torch.nn.functional.interpolate(images[i][None].float(), (36, 36), mode="bilinear", antialias=True)
        expected = larger[0, :, top : top + 32, left : left + 32].round().clamp(0, 255).to(torch.uint8)
        assert torch.equal(changed[i], expected), (top, left)


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


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("done again")


STAGES = ("train_denoiser", "train_vae", "train_reader", "measure_denoiser", "measure_autoencoder")


def test_a_finished_output_is_left_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing of its work is left."""
    for name in STAGES:
        monkeypatch.setattr(tiny_text, name, refuse)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
    build(folder.name, folder, tmp_path / "no-work")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
    assert not (tmp_path / "no-work").exists()
    with pytest.raises(CheckpointError, match="other settings: vae_steps is 2 there, 3 here"):
        build_tiny_text(folder.name, folder, 64, 2, 3, CYCLES, num_reference=70, compiled=False)  # type: ignore[arg-type]


def test_finished_stages_are_not_repeated(
    folder: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in STAGES:
        monkeypatch.setattr(tiny_text, name, refuse)
    (tmp_path / folder.name / "adapters").mkdir(parents=True)
    (tmp_path / folder.name / "adapters" / "note").write_text("mine")
    build(folder.name, tmp_path / folder.name, work)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / folder.name / path.relative_to(folder)).read_bytes(), path
    assert (tmp_path / folder.name / "adapters" / "note").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vae_steps": 3}, "vae was trained with other settings: steps is 2 there, 3 here"),
        ({"reader_steps": 3}, "extractor was trained with other settings: steps is 2 there, 3 here"),
        (
            {"cycles": ((2, 1e-3, 0.0), (1, 2e-3, 0.25))},
            r"cycle-2 was trained with other settings: cycles is \[\[2, 0.001, 0.0\], \[1, 0",
        ),
        ({"num_images": 65}, "vae was trained with other settings: num_images is 64 there, 65 here"),
    ],
)
def test_a_stage_of_other_settings_is_refused(
    folder: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    for name in STAGES:
        monkeypatch.setattr(tiny_text, name, refuse)
    asked = {"num_images": 64, "reader_steps": 2, "vae_steps": 2, "cycles": CYCLES} | changes
    with pytest.raises(CheckpointError, match=said):
        build_tiny_text(
            folder.name, tmp_path / "new", **asked, num_reference=70, work=work, num_samples=4, compiled=False
        )
    assert not (tmp_path / "new").exists()


def test_stages_that_the_output_holds_are_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output without its pipeline, and no work folder: autoencoder and reader are those of the output."""
    for name in ("train_vae", "train_reader", "measure_autoencoder"):
        monkeypatch.setattr(tiny_text, name, refuse)
    for name in ("vae", "extractor"):
        shutil.copytree(folder / name, tmp_path / folder.name / name)
    build(folder.name, tmp_path / folder.name, tmp_path / "work")
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / folder.name / path.relative_to(folder)).read_bytes(), path


def test_shared_stages_are_used_if_their_settings_are_the_ones_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vae", "extractor"):
        shutil.copytree(folder / name, tmp_path / "shared" / name)
    places = {"work": tmp_path / "work", "shared": tmp_path / "shared"}
    options: dict[str, Any] = {"num_reference": 70, "num_samples": 4, "compiled": False} | places
    for name in ("train_vae", "train_reader", "measure_autoencoder"):
        monkeypatch.setattr(tiny_text, name, refuse)
    build_tiny_text(folder.name, tmp_path / "new", 64, 2, 2, CYCLES, **options)  # type: ignore[arg-type]
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "new" / path.relative_to(folder)).read_bytes(), path
    with pytest.raises(AssertionError, match="done again"):
        build_tiny_text(folder.name, tmp_path / "other", 64, 2, 3, CYCLES, **options)  # type: ignore[arg-type]


def test_the_autoencoder_goes_on_from_another() -> None:
    images = make_scenes(1, 64)[0]
    start = train_vae(images, 2)
    weights = copy.deepcopy(start.state_dict())
    further = train_vae(images, 1, start=start, learning_rate=1e-9)
    assert all(torch.allclose(further.state_dict()[name], value, atol=1e-6) for name, value in weights.items())
    assert not any(
        torch.equal(new, old)
        for new, old in zip(train_vae(images, 2, seed=1).parameters(), weights.values())
        if old.ndim > 1
    )


def test_the_product_is_measured(folder: Path, work: Path) -> None:
    measured = json.loads((folder / "measured.json").read_text())
    expected = ["real images", "reconstructions"]
    expected += [f"samples after cycle {cycle}, scale {scale}" for cycle in (1, 2) for scale in (1, 3)]
    assert list(measured) == expected
    assert all(0 <= share <= 1 for shares in measured.values() for share in shares.values())
    assert set(measured["real images"]) == {"one object", "two objects"}
    assert (work / folder.name / "cycle-2" / "measured.json").is_file()
    card = (folder / "README.md").read_text()
    assert f"# tiny-{folder.name}" in card and all(f"| {name} |" in card for name in expected)
    assert f"agd_lib.tiny_text {folder.name} --output data/tiny-{folder.name}" in card


def test_shares_are_told_apart_by_the_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    images, scenes = make_scenes(0, 40)
    pairs = torch.tensor([len(scene.objects) == 2 for scene in scenes])
    monkeypatch.setattr(tiny_text, "fulfilled", lambda *_: pairs)
    shares = tiny_text.shares_fulfilled(None, images, scenes)  # type: ignore[arg-type]
    assert shares == {"one object": 0.0, "two objects": 1.0}
    monkeypatch.setattr(tiny_text, "fulfilled", lambda *_: pairs[pairs])
    alone = [scene for scene in scenes if len(scene.objects) == 2]
    assert tiny_text.shares_fulfilled(None, images, alone) == {"two objects": 1.0}  # type: ignore[arg-type]


def test_samples_are_measured_at_each_scale_from_their_captions(
    tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spy(base: Any, conditions: Any, guidance: Any, steps: int, **_: Any) -> Any:
        asked.append((list(conditions), guidance.scale, steps))
        return iter([torch.zeros(len(conditions), 4, 8, 8)])

    monkeypatch.setattr(tiny_text, "generate", spy)
    reader = tiny_text.AttributeReader(feature_dim=16, width=8).eval()
    shares = tiny_text.measure_denoiser(SD21Denoiser(tokenizer), new_vae(), tokenizer, reader, 3)
    captions = [caption(draw_scene(tiny_text.HELD_OUT_SEED, index)) for index in range(3)]
    assert asked == [(captions, 1.0, 20), (captions, 3.0, 20)] and list(shares) == ["scale 1", "scale 3"]


def test_no_configuration_tells_where_it_was_made(folder: Path, work: Path) -> None:
    assert not [path for path in folder.rglob("*.json") if str(work.parent) in path.read_text()]


def test_a_build_that_is_interrupted_within_a_cycle_resumes_to_the_same_result(
    work: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vae", "extractor"):
        shutil.copytree(work / name, tmp_path / "work" / name)
    write = cycles.Checkpoint.write
    checkpoints = []

    def interrupted(self: Any, tensors: Any) -> None:
        write(self, tensors)
        checkpoints.append(self.folder.name)
        if len(checkpoints) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cycles.Checkpoint, "write", interrupted)
    monkeypatch.setattr(cycles.Checkpoint.__init__, "__defaults__", (1,))
    output = tmp_path / folder.name
    with pytest.raises(KeyboardInterrupt):
        build(folder.name, output, tmp_path / "work")
    assert not output.exists()
    assert (tmp_path / "work" / folder.name / "cycle-1-unfinished").exists()
    build(folder.name, output, tmp_path / "work")
    assert checkpoints == ["cycle-1-unfinished"] * 2 + ["cycle-2-unfinished"]
    assert not list((tmp_path / "work" / folder.name).glob("*unfinished"))
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (output / path.relative_to(folder)).read_bytes(), path


def test_wrong_captions_are_those_of_other_images() -> None:
    ids = torch.arange(40)[:, None].expand(40, 3).contiguous()
    noisy = with_wrong_captions(ids, 0.25, seed=0)
    changed = (noisy != ids).any(dim=1)
    assert changed.sum() == 10 and sorted(noisy[changed][:, 0].tolist()) == sorted(ids[changed][:, 0].tolist())
    assert torch.equal(noisy, with_wrong_captions(ids, 0.25, seed=0))
    assert not torch.equal(noisy, with_wrong_captions(ids, 0.25, seed=1))
    assert torch.equal(with_wrong_captions(ids, 0.0, seed=0), ids)
