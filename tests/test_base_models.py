"""One door to base models: what comes in, what is refused and how, and what a base model says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from small_models import CLASS_NAMES, build_dit_pipeline, write_dit_folder

from agd_lib import CFG, Unguided, base_from_pipeline, load_base, project, sample
from agd_lib.base_models import KNOWN_BASES, DiTBase, count_flops, count_forwards
from agd_lib.errors import AGDError, BaseModelError


def noise(base: DiTBase, count: int) -> torch.Tensor:
    return torch.randn(count, *base.latent_shape, generator=torch.Generator().manual_seed(0))


def run(base: DiTBase, labels: list[int]) -> torch.Tensor:
    *_, last = sample(base, base.encode(labels), CFG(2.0), 3, latents=noise(base, len(labels)))
    return last.next_latents


# Loading ----------------------------------------------------------------------------------------------------------------


def test_a_loaded_base_is_frozen_and_quiet(dit_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = load_base(dit_folder)
    for module in (base.denoiser, base.vae):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert base.name == str(dit_folder) and base.revision is None


def test_a_base_that_lacks_weights_is_refused(dit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dit_folder, tmp_path / "base")
    file = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "transformer_blocks.1" in name))
    save_file(weights, file)
    with pytest.raises(BaseModelError, match=r"is incomplete: its transformer lacks weights"):
        load_base(tmp_path / "base")


def test_known_names_are_pinned_where_the_default_would_be_pickled() -> None:
    assert KNOWN_BASES["dit-xl-2-256"].source == "facebook/DiT-XL-2-256"
    assert KNOWN_BASES["dit-xl-2-256"].revision == "refs/pr/1"
    assert Path(KNOWN_BASES["tiny-dit"].source).is_absolute()


def test_a_shipped_model_has_its_short_name_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shipped with it (adapters, extractor, reference) is found by that name."""
    monkeypatch.chdir(project.DATA)
    names = ["tiny-dit", "./tiny-dit", "data/tiny-dit", project.DATA / "tiny-dit", str(project.DATA / "tiny-dit")]
    assert [load_base(name).name for name in names] == ["tiny-dit"] * 5


@pytest.mark.parametrize("name", ["dit-xl-3-256", "", "./nowhere", "/no/such", "~/model", "a/b/c"])
def test_unknown_names_are_refused_without_a_network(name: str) -> None:
    with pytest.raises(
        BaseModelError,
        match=r"no such folder, and not a hub id .*Known short names: tiny-dit, tiny-sd21, tiny-sdxl, dit-xl",
    ):
        load_base(name)


def test_a_relative_folder_is_found_from_the_repository_too(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebooks run in notebooks/, and whoever types the name stands in the repository."""
    shutil.copytree(dit_folder, tmp_path / "models" / "my-dit")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(BaseModelError):
        load_base("models/my-dit")
    monkeypatch.setattr(project, "ROOT", tmp_path)
    assert load_base("models/my-dit").fingerprint() == load_base(dit_folder).fingerprint()


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BaseModelError, match=r"holds no model_index\.json: expected a folder that a diffusers pipeline"
    ):
        load_base(tmp_path)


def test_pickled_weights_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(dit_folder, folder)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"could not load the base model .*pickled weights are refused"):
        load_base(folder)


def test_damaged_weights_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dit_folder, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="could not load the base model"):
        load_base(folder)


def test_another_kind_of_pipeline_is_named(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(BaseModelError, match="mine is a DDPMPipeline; this library distils DiTPipeline"):
        base_from_pipeline(pipeline, "mine")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="is a DDPMPipeline"):
        load_base(tmp_path)
    assert issubclass(BaseModelError, AGDError)


def test_the_hub_repositorys_older_class_name_loads_as_well(dit1000_folder: Path, tmp_path: Path) -> None:
    """``facebook/DiT-XL-2-256`` was saved when a DiT was still a ``Transformer2DModel``, in the index and the config."""
    folder = tmp_path / "older"
    shutil.copytree(dit1000_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / "transformer" / "config.json").read_text())
    index["transformer"][1] = config["_class_name"] = "Transformer2DModel"
    config |= {"cross_attention_dim": None, "use_linear_projection": False}
    del config["norm_eps"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    older, newer = load_base(folder), load_base(dit1000_folder)
    assert isinstance(older, DiTBase) and isinstance(newer, DiTBase)
    assert torch.equal(run(older, [0, 999]), run(newer, [0, 999]))
    assert list(older.attention_sites()) == list(newer.attention_sites())


class Hub:
    """Stands in for ``DiffusionPipeline.from_pretrained``: remembers what it was asked for."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: tuple[str, dict[str, Any]] | None = None

    def __call__(self, source: str, **settings: Any) -> Any:
        self.asked = (source, settings)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_dit_xl_is_asked_for_at_its_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(build_dit_pipeline())
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", hub)
    base = load_base("dit-xl-2-256", dtype=torch.float16)
    settings = {"revision": "refs/pr/1", "dtype": torch.float16, "use_safetensors": True}
    assert hub.asked == ("facebook/DiT-XL-2-256", settings)
    assert (base.name, base.revision) == ("dit-xl-2-256", "refs/pr/1")
    load_base("somebody/their-dit", revision="abc")
    assert hub.asked == ("somebody/their-dit", settings | {"revision": "abc", "dtype": torch.float32})


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", Hub(OSError("no route to host")))
    with pytest.raises(
        BaseModelError, match=r"'facebook/DiT-XL-2-256' \(revision refs/pr/1\): no route to host.*network"
    ):
        load_base("dit-xl-2-256")


# Conditions -------------------------------------------------------------------------------------------------------------


def test_classes_by_label_and_by_name(dit_base: DiTBase) -> None:
    assert dit_base.encode([0, "elk", 4, "bee"])["class_labels"].tolist() == [0, 4, 4, 1]
    assert dit_base.all_conditions() == [0, 1, 2, 3, 4]
    assert [dit_base.class_name(label) for label in range(5)] == list(CLASS_NAMES)
    assert dit_base.null_condition(2)["class_labels"].tolist() == [5, 5]


def test_a_pipeline_without_names_goes_by_labels(dit1000_base: DiTBase) -> None:
    assert dit1000_base.class_name(7) == "7"
    assert dit1000_base.null_condition(1)["class_labels"].tolist() == [1000]
    with pytest.raises(ValueError, match="this pipeline has no class names"):
        dit1000_base.encode(["elk"])


@pytest.mark.parametrize("label", [5, -1, 1000, 1.5, float("nan"), float("inf"), None, [1]])
def test_labels_out_of_range_are_refused(dit_base: DiTBase, label: object) -> None:
    with pytest.raises(ValueError, match=r"expected an integer from 0 to 4 .*5 is the null class"):
        dit_base.encode([0, label])


def test_an_unknown_class_name_lists_the_known_ones(dit_base: DiTBase) -> None:
    with pytest.raises(ValueError, match="got the class name 'eel', expected one of: ant, bee, cat, dog, elk"):
        dit_base.encode(["eel"])


def test_the_prediction_depends_on_class_and_timestep(dit_base: DiTBase) -> None:
    """What every other test of guidance rests on."""
    latents = noise(dit_base, 1).expand(6, -1, -1, -1)
    labels = {"class_labels": torch.arange(6)}
    at = {timestep: dit_base.denoise(latents, timestep, labels) for timestep in (0, 500, 999)}
    assert (at[500][:, None] - at[500][None]).flatten(2).std(dim=2)[~torch.eye(6, dtype=torch.bool)].min() > 0.05
    assert (at[0] - at[500]).std() > 0.05 and (at[500] - at[999]).std() > 0.05


# Other sizes and types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 3, "names": None},
        {"sample_size": 16},
        {"out_channels": 8},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"num_train_timesteps": 100},
    ],
    ids=lambda changes: next(iter(changes)) + "=" + str(next(iter(changes.values()))),
)
def test_a_users_own_pipeline_folder_works(tmp_path: Path, changes: dict) -> None:
    base = load_base(write_dit_folder(tmp_path / "own", **changes))
    assert isinstance(base, DiTBase)
    size = changes.get("sample_size", 8)
    assert base.latent_shape == (4, size, size)
    assert base.num_classes == changes.get("num_classes", 5)
    assert base.prediction_type == changes.get("prediction_type", "epsilon")
    assert base.num_train_timesteps == changes.get("num_train_timesteps", 1000)
    latents = run(base, [0, base.num_classes - 1])
    assert latents.shape == (2, *base.latent_shape) and torch.isfinite(latents).all()
    images = base.decode(latents)
    assert images.shape == (2, 3, 4 * size, 4 * size) and images.min() >= 0 and images.max() <= 1
    with pytest.raises(ValueError, match=f"from 0 to {base.num_classes - 1}"):
        base.encode([base.num_classes])


def test_v_prediction_step_by_its_formula(tmp_path: Path) -> None:
    """x0 = sqrt(a) x - sqrt(1 - a) v, and eps = sqrt(a) v + sqrt(1 - a) x."""
    base = base_from_pipeline(build_dit_pipeline(prediction_type="v_prediction"))
    first, second, *_ = sample(base, base.encode([1]), CFG(3.0), 5, seeds=[4])
    now, then = (base.scheduler.alphas_cumprod[step.timestep] for step in (first, second))
    clean = now.sqrt() * first.latents - (1 - now).sqrt() * first.prediction
    epsilon = now.sqrt() * first.prediction + (1 - now).sqrt() * first.latents
    expected = then.sqrt() * clean + (1 - then).sqrt() * epsilon
    torch.testing.assert_close(first.next_latents, expected, rtol=1e-5, atol=1e-5)


def test_decode_by_its_formula(dit_base: DiTBase) -> None:
    latents = noise(dit_base, 2)
    with torch.no_grad():
        expected = (dit_base.vae.decode(latents / 0.75).sample + 1) / 2
    torch.testing.assert_close(dit_base.decode(latents), expected.clamp(0, 1))


def test_denoise_drops_the_learned_variance(dit1000_base: DiTBase) -> None:
    latents = noise(dit1000_base, 2)
    with torch.no_grad():
        both = dit1000_base.denoiser(latents, torch.tensor([5, 5]), torch.tensor([0, 1])).sample
    assert both.shape[1] == 8
    assert torch.equal(dit1000_base.denoise(latents, 5, dit1000_base.encode([0, 1])), both[:, :4])


def test_bfloat16_runs_end_to_end(dit_folder: Path) -> None:
    base = load_base(dit_folder, dtype=torch.bfloat16)
    assert base.dtype == torch.bfloat16
    assert isinstance(base, DiTBase)
    exact, rough = run(load_base(dit_folder), [0, 1]), run(base, [0, 1])  # type: ignore[arg-type]
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).square().mean() < 0.05 * exact.square().mean()
    assert base.decode(rough).dtype == torch.float32


# Fingerprint ------------------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_copies_in_any_precision(dit_folder: Path, tmp_path: Path) -> None:
    base, copy = load_base(dit_folder), tmp_path / "copy"
    base.pipeline.save_pretrained(copy)
    assert load_base(copy).fingerprint() == base.fingerprint()
    assert load_base(dit_folder, dtype=torch.bfloat16).fingerprint() == base.fingerprint()
    assert base.to(dtype=torch.bfloat16).fingerprint() == load_base(dit_folder).fingerprint()


@pytest.mark.parametrize("name", ["transformer_blocks.1.attn1.to_q.weight", "proj_out_2.bias", "pos_embed.proj.weight"])
def test_fingerprint_tells_fine_tuned_weights_apart(dit_base: DiTBase, name: str) -> None:
    before = dit_base.fingerprint()
    parameter = dict(dit_base.denoiser.named_parameters())[name]
    with torch.no_grad():
        parameter.mul_(1.02)
    assert dit_base.fingerprint() != before


def test_fingerprint_tells_configurations_apart() -> None:
    prints = {
        base_from_pipeline(build_dit_pipeline(**changes)).fingerprint()
        for changes in ({}, {"seed": 1}, {"prediction_type": "v_prediction"}, {"num_classes": 6, "names": None})
    }
    assert len(prints) == 4
    assert all(len(value) == 32 and set(value) <= set("0123456789abcdef") for value in prints)


def test_fingerprint_does_not_notice_adapters_or_the_vae(dit_base: DiTBase) -> None:
    from agd_lib import AdapterSet

    before = dit_base.fingerprint()
    AdapterSet.create(dit_base, hidden_size=4).attach(dit_base)
    assert dit_base.fingerprint() == before


def test_edited_weights_on_disk_change_the_fingerprint(dit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(dit_folder, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out_1.bias"] = tensors["proj_out_1.bias"] + 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert load_base(folder).fingerprint() != load_base(dit_folder).fingerprint()


# Counting ---------------------------------------------------------------------------------------------------------------


def test_parameters_count_the_repeated_embedders_once(dit_base: DiTBase) -> None:
    embedder = dit_base.denoiser.transformer_blocks[0].norm1.emb
    repeated = sum(p.numel() for p in embedder.parameters())
    total = sum(p.numel() for p in dit_base.denoiser.parameters())
    assert repeated > 0
    assert dit_base.num_parameters() == total - 2 * repeated  # three blocks


def test_the_meter_counts_calls_of_any_form_and_stops(dit_base: DiTBase) -> None:
    latents, labels = noise(dit_base, 3), torch.tensor([0, 1, 2])
    with count_forwards(dit_base) as meter:
        dit_base.denoise(latents, 5, {"class_labels": labels})
        dit_base.denoiser(latents, torch.tensor([5, 5, 5]), labels)
        dit_base.denoiser(hidden_states=latents, timestep=torch.tensor([5, 5, 5]), class_labels=labels)
    dit_base.denoise(latents, 5, {"class_labels": labels})
    assert (meter.calls, meter.samples, meter.nfe(3)) == (3, 9, 3.0)


def test_flops_of_the_matrix_products_by_hand(dit_base: DiTBase) -> None:
    """Two operations for each weight and token, and the attention's two products; the embedders run once a sample."""
    width, tokens, blocks = 16, 16, 3
    per_block = 2 * tokens * (4 * width * width + 2 * 4 * width * width)  # q, k, v, out; the feed-forward's two
    per_block += 2 * 2 * tokens * tokens * width  # queries x keys, weights x values
    embedder = 2 * (256 * width + width * width)
    per_block += embedder + 2 * width * 6 * width  # adaLN
    patches = 2 * tokens * (4 * 2 * 2) * width
    output = embedder + 2 * width * 2 * width + 2 * tokens * width * (2 * 2 * 4)
    assert count_flops(dit_base) == blocks * per_block + patches + output


def test_unguided_costs_half_of_cfg_in_operations(dit_base: DiTBase) -> None:
    with count_forwards(dit_base) as meter:
        Unguided().predict(dit_base, noise(dit_base, 2), 5, dit_base.encode([0, 1]))
        once = meter.samples
        CFG(2.0).predict(dit_base, noise(dit_base, 2), 5, dit_base.encode([0, 1]))
    assert meter.samples - once == 2 * once


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_estimate_of_a_perfect_prediction_is_the_clean_latent(prediction_type: str) -> None:
    base = base_from_pipeline(build_dit_pipeline(prediction_type=prediction_type))
    generator = torch.Generator().manual_seed(0)
    clean, added = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.full((3,), 700)
    noised = base.scheduler.add_noise(clean, added, timesteps)
    perfect = {
        "epsilon": added,
        "v_prediction": base.scheduler.get_velocity(clean, added, timesteps),
        "sample": clean,
    }[prediction_type]
    assert torch.allclose(base.clean_estimate(noised, perfect, 700), clean, atol=1e-4)


def test_images_are_encoded_to_scaled_latents_by_a_generator(dit_base: DiTBase) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = dit_base.encode_images(images, torch.Generator().manual_seed(1))
    assert latents.shape == (3, *dit_base.latent_shape)
    assert torch.equal(latents, dit_base.encode_images(images, torch.Generator().manual_seed(1)))
    posterior = dit_base.vae.encode(images * 2 - 1).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(1)) * dit_base.vae.config.scaling_factor
    assert torch.equal(latents, expected)
