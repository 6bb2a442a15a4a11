"""Negative prompts: CFG with them is diffusers' own; adapters that see them; what the study counts."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from small_models import randomise
from small_text_models import build_sd_pipeline, build_sdxl_pipeline
from test_dropin import build, run, trained
from torch import Tensor

from agd_lib import AGD, CFG, AdapterSet, CollectionPlan, TrainingSettings, Unguided, collect, load_agd, sample, train
from agd_lib.adapters import ADAPTERS
from agd_lib.attributes import Reading
from agd_lib.base_models import (
    StableDiffusionBase,
    StableDiffusionXLBase,
    base_from_pipeline,
    count_flops,
    count_forwards,
)
from agd_lib.dropin import PIPELINES
from agd_lib.errors import AdapterError, AGDError, BaseModelError, StoreError
from agd_lib.guidance import NEGATIVE
from agd_lib.influence import influence_of
from agd_lib.negatives import NegativeRow, left_open, negatives_table, read_negatives, shows, training_pairs
from agd_lib.sampling import SamplingRun, endpoint, noise_generators
from agd_lib.scenes import Asked, AskedObject, asked, draw_scene, in_words, read_caption, shown
from agd_lib.trajectories import predicted_size

# diffusers 0.42.1 on NumPy 2, in EulerDiscreteScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PROMPTS, NEGATIVES = ["red cat", "a hat on"], ["hat", "a red"]
PAIRS = list(zip(PROMPTS, NEGATIVES))


@pytest.fixture(params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> StableDiffusionBase:
    build: Any = build_sd_pipeline if request.param == "sd" else build_sdxl_pipeline
    made = base_from_pipeline(build(tmp_path))
    assert isinstance(made, StableDiffusionBase)
    return made


def final(base: StableDiffusionBase, guidance: Any, conditions: list[Any], steps: int = 4) -> Tensor:
    return endpoint(sample(base, base.encode(conditions), guidance, steps, seeds=range(len(conditions))))


def new(base: StableDiffusionBase, kind: str = "modulated", use_negative: bool = True) -> AdapterSet:
    """Adapters with random weights."""
    adapters = AdapterSet.create(base, kind, 8, (1.0, 8.0), use_negative=use_negative)
    randomise(adapters, 7)
    return adapters


# The teacher ------------------------------------------------------------------------------------------------------------


def test_cfg_with_negative_prompts_equals_diffusers_to_the_bit(base: StableDiffusionBase) -> None:
    expected = base.pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        guidance_scale=5.0,
        num_inference_steps=4,
        generator=noise_generators([0, 1]),
        output_type="latent",
    ).images
    assert torch.equal(final(base, CFG(5.0), PAIRS), expected)
    assert not torch.allclose(final(base, CFG(5.0), PROMPTS), expected, atol=1e-2)


def test_an_empty_negative_prompt_is_none(base: StableDiffusionBase) -> None:
    """Also beside prompts that have one, and where the pipeline puts zeros in the place of the empty prompt."""
    alone = final(base, CFG(5.0), PROMPTS)
    mixed = final(base, CFG(5.0), [PROMPTS[0], PAIRS[1]])
    assert torch.equal(final(base, CFG(5.0), [(prompt, "") for prompt in PROMPTS]), alone)
    torch.testing.assert_close(mixed[0], alone[0])
    torch.testing.assert_close(mixed[1], final(base, CFG(5.0), PAIRS)[1])
    assert torch.equal(final(base, Unguided(), PAIRS), final(base, Unguided(), PROMPTS))


def test_the_second_pass_is_told_the_sizes_of_the_first(tmp_path: Path) -> None:
    """As by diffusers, where no others are asked for."""
    base = base_from_pipeline(build_sdxl_pipeline(tmp_path))
    assert isinstance(base, StableDiffusionXLBase)
    condition = base.encode(PROMPTS)
    condition["time_ids"] = torch.tensor([[32.0, 48.0, 8.0, 4.0, 64.0, 64.0]]).expand(2, -1)
    ours = endpoint(sample(base, condition, CFG(5.0), 4, seeds=[0, 1]))
    call = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    sizes = {"original_size": (32, 48), "crops_coords_top_left": (8, 4), "target_size": (64, 64)}
    assert torch.equal(ours, base.pipeline(PROMPTS, **call, **sizes, generator=noise_generators([0, 1])).images)
    assert not torch.equal(ours, final(base, CFG(5.0), PROMPTS))


@pytest.mark.parametrize("strange", [("red", "hat", "cat"), ("red", 3), ("red",), ["red", "hat"]], ids=str)
def test_what_is_no_pair_is_refused(base: StableDiffusionBase, strange: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a text.* or a pair of texts"):
        base.encode([strange])


# The student ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_adapters_see_negative_prompts(base: StableDiffusionBase, kind: str) -> None:
    adapters = new(base, kind).attach(base)
    with count_forwards(base) as meter:
        with_them = final(base, AGD(adapters, 4.0), PAIRS)
    assert meter.nfe(2) == 4  # one a step
    without = final(base, AGD(adapters, 4.0), PROMPTS)
    assert (with_them - without).flatten(1).std(dim=1).min() > 1e-3
    assert torch.equal(final(base, AGD(adapters, 4.0), [(prompt, "") for prompt in PROMPTS]), without)


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_they_start_as_the_identity(base: StableDiffusionBase, kind: str) -> None:
    expected = final(base, Unguided(), PROMPTS)
    adapters = AdapterSet.create(base, kind, 8, use_negative=True).attach(base)
    assert torch.equal(final(base, AGD(adapters, 4.0), PAIRS), expected)


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_what_a_run_computes_ahead_is_what_single_passes_compute(base: StableDiffusionBase, kind: str) -> None:
    """And another negative prompt within a run is noticed."""
    adapters = new(base, kind).attach(base)
    base.scheduler.set_timesteps(4)
    timestep, latents = float(base.scheduler.timesteps[1]), torch.randn(2, *base.latent_shape)
    run = SamplingRun(base.scheduler)
    for pairs in (PAIRS, [(prompt, "on") for prompt in PROMPTS]):
        condition = base.encode(pairs)
        with torch.no_grad():
            single = AGD(adapters, 4.0).predict(base, latents, timestep, condition)
            with base.running(run):
                ahead = AGD(adapters, 4.0).predict(base, latents, timestep, condition)
        torch.testing.assert_close(ahead, single, rtol=1e-4, atol=1e-5)


def test_adapters_that_do_not_see_them_refuse_them(base: StableDiffusionBase) -> None:
    adapters = new(base, use_negative=False).attach(base)
    with pytest.raises(AdapterError, match=r"got negative prompts, and these adapters do not see them.*use_negative"):
        final(base, AGD(adapters, 4.0), PAIRS)


def test_one_negative_prompt_for_each_sample(base: StableDiffusionBase) -> None:
    adapters, condition = new(base).attach(base), base.encode(PROMPTS)
    tokens = base.encode(PAIRS[:1])[NEGATIVE]
    with pytest.raises(ValueError, match="got 1 negative prompts for 2 samples"), adapters.guided_by(4.0, tokens):
        base.denoise(torch.randn(2, *base.latent_shape), 10, condition)


def test_they_survive_the_disk(base: StableDiffusionBase, tmp_path: Path) -> None:
    adapters = new(base)
    adapters.save_pretrained(tmp_path / "saved")
    expected = final(base, AGD(adapters.attach(base), 4.0), PAIRS)
    adapters.remove()
    read = AdapterSet.from_pretrained(tmp_path / "saved").attach(base)
    assert torch.equal(final(base, AGD(read, 4.0), PAIRS), expected)


def test_training_reads_negative_prompts_from_the_store(base: StableDiffusionBase, tmp_path: Path) -> None:
    """And the store holds what CFG with them predicted."""
    plan = CollectionPlan(tuple(PAIRS), 4, (4.0, 4.0), num_inference_steps=4, steps_per_trajectory=1, dtype="float32")
    store = collect(base, plan, tmp_path / "store")
    tensors = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert 0 <= tensors - predicted_size(base, plan) <= (plan.num_shards + 1) * 1024
    batch = store.batch(torch.arange(len(store)))
    for row in range(len(store)):
        condition = {name: value[row : row + 1] for name, value in batch.condition.items()}
        timestep = float(batch.timestep[row])
        expected = CFG(4.0).predict(base, batch.latents[row : row + 1], timestep, condition)
        torch.testing.assert_close(batch.target[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["conditions"] == [list(p) for p in PAIRS]
    assert collect(base, plan, tmp_path / "store").complete  # the same plan, read back
    adapters = AdapterSet.create(base, "modulated", 8, (4.0, 4.0), use_negative=True)
    settings = TrainingSettings(num_steps=30, batch_size=4, learning_rate=1e-2)
    losses = [state.loss for state in train(base, adapters, store, settings)]
    assert losses[-1] < 0.7 * losses[0]
    assert influence_of(base, store).isfinite().all()


@pytest.mark.parametrize("use_negative", [True, False])
def test_stores_and_adapters_must_agree(base: StableDiffusionBase, tmp_path: Path, use_negative: bool) -> None:
    conditions = tuple(PROMPTS if use_negative else PAIRS)
    store = collect(base, CollectionPlan(conditions, 2, (1.0, 8.0), num_inference_steps=2), tmp_path / "store")
    with pytest.raises(StoreError, match="negative prompts, and the adapters"):
        next(train(base, new(base, use_negative=use_negative), store, TrainingSettings(num_steps=1, batch_size=2)))


# The drop-in ------------------------------------------------------------------------------------------------------------


def test_a_pipelines_negative_prompt_reaches_the_adapters(base: StableDiffusionBase) -> None:
    adapters = new(base)
    expected = final(base, AGD(adapters.attach(base), 4.0), PAIRS)
    one_for_all = final(base, AGD(adapters, 4.0), [(prompt, "on") for prompt in PROMPTS])
    adapters.remove()
    pipe = base.pipeline
    load_agd(pipe, adapters)
    call = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}

    def drawn(**changes: Any) -> Tensor:
        images: Tensor = pipe(PROMPTS, generator=noise_generators([0, 1]), **call | changes).images
        return images

    assert torch.equal(drawn(negative_prompt=NEGATIVES), expected)
    assert torch.equal(drawn(negative_prompt="on"), one_for_all)
    four = pipe(
        PROMPTS,
        negative_prompt=NEGATIVES,
        num_images_per_prompt=2,
        generator=noise_generators([0, 5, 1, 6]),
        **call,
    ).images
    torch.testing.assert_close(four[[0, 2]], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got 1 negative prompts for 2 prompts"):
        drawn(negative_prompt=["on"])
    tokens = base.encode(PAIRS)[NEGATIVE]
    assert torch.equal(drawn(negative_prompt_embeds=tokens), expected)
    with pytest.raises(ValueError, match="got negative_prompt_embeds of 1 prompts, expected 2"):
        drawn(negative_prompt_embeds=tokens[:1])
    with pytest.raises(ValueError, match="expected one of them"):
        drawn(negative_prompt="on", negative_prompt_embeds=tokens)
    with pytest.raises(ValueError, match="guidance_rescale, expected none"):
        drawn(negative_prompt="on", guidance_rescale=0.5)
    with pipe.agd.disabled(), count_forwards(base) as meter:
        drawn(negative_prompt=NEGATIVES)
    assert meter.nfe(2) == 8  # the pipeline's own two passes


@pytest.mark.parametrize("kind", [k for k in PIPELINES if k is not DiTPipeline], ids=lambda kind: kind.__name__)
def test_every_pipeline_takes_negative_prompts(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    plain = run(pipe, 1.0)
    load_agd(pipe, trained(pipe, "modulated", use_negative=True))
    nothing, something = run(pipe, 4.0), run(pipe, 4.0, negative_prompt=["hat", "a red"])
    assert not torch.equal(nothing, plain)
    assert torch.equal(run(pipe, 4.0, negative_prompt=["", ""]), nothing)
    assert (something - nothing).flatten(1).std(dim=1).min() > 1e-4
    pipe.agd.unload()
    assert torch.equal(run(pipe, 1.0), plain)


@pytest.mark.parametrize("what", ["the denoiser", "everything"])
def test_offloaded_pipelines_take_negative_prompts(what: str, tmp_path: Path) -> None:
    """accelerate keeps the weights elsewhere and brings them in for each call; the text encoder comes to no harm."""
    pipe = build_sd_pipeline(tmp_path)
    adapters = AdapterSet.create(base_from_pipeline(pipe), "modulated", 8, (1.0, 8.0), use_negative=True)
    randomise(adapters, 7)
    load_agd(pipe, adapters)
    call: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "latent"}

    def drawn(**changes: Any) -> Tensor:
        images: Tensor = pipe(PROMPTS, generator=noise_generators([0, 1]), **call | changes).images
        return images

    expected = [drawn(), drawn(negative_prompt=NEGATIVES)]
    for part in [pipe.unet] if what == "the denoiser" else [pipe.unet, pipe.text_encoder, pipe.vae]:
        accelerate.cpu_offload(part, torch.device("cpu"))
    torch.testing.assert_close([drawn(), drawn(negative_prompt=NEGATIVES)], expected)
    if what == "the denoiser":
        assert pipe.text_encoder.device.type == "cpu"
        with pytest.raises(BaseModelError, match="is offloaded"):
            base_from_pipeline(pipe).encode(PROMPTS)


def test_the_empty_negative_prompt_is_encoded_once_for_a_block(base: StableDiffusionBase) -> None:
    """At most once, not at every pass, where it would also be counted among the adapters' operations."""
    adapters, condition = new(base).attach(base), base.encode(PROMPTS)
    calls = []
    handle = base.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with adapters.guided_by(4.0), torch.no_grad():
        for timestep in (10, 500, 900):
            base.denoise(torch.randn(2, *base.latent_shape), timestep, condition)
    assert len(calls) == (0 if isinstance(base, StableDiffusionXLBase) else 1)  # SDXL's are zeros
    handle.remove()
    adapters.remove()
    plain = count_flops(base)
    with adapters.attach(base).guided_by(4.0):
        assert 1 < count_flops(base) / plain < 1.6


def test_disabled_adapters_refuse_nothing(base: StableDiffusionBase) -> None:
    adapters = new(base, use_negative=False).attach(base)
    expected = final(base, Unguided(), PROMPTS)
    with adapters.disabled():
        assert torch.equal(final(base, AGD(adapters, 4.0), PAIRS), expected)


def test_a_pipeline_without_text_encoder_takes_adapters(tmp_path: Path) -> None:
    """Prompts may be encoded elsewhere."""
    whole = build_sd_pipeline(tmp_path)
    adapters = AdapterSet.create(base_from_pipeline(whole, "small"), "modulated", 8, (1.0, 8.0))
    randomise(adapters, 7)
    tokens, _ = whole.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    call = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}
    load_agd(whole, adapters)
    expected = whole(prompt_embeds=tokens, generator=noise_generators([0, 1]), **call).images
    parts = whole.components | {"text_encoder": None, "tokenizer": None}
    bare = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    load_agd(bare, adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that they were trained on other weights
        assert torch.equal(bare(prompt_embeds=tokens, generator=noise_generators([0, 1]), **call).images, expected)
        adapters.attach(base_from_pipeline(bare, "small")).remove()
    seeing = AdapterSet.create(base_from_pipeline(whole, "small"), "modulated", 8, (1.0, 8.0), use_negative=True)
    load_agd(bare, seeing)
    with pytest.raises(BaseModelError, match=r"has no text encoder.*negative_prompt_embeds"):
        bare(prompt_embeds=tokens, **call)
    told = bare(prompt_embeds=tokens, negative_prompt_embeds=tokens.flip(0), generator=noise_generators([0, 1]), **call)
    assert torch.isfinite(told.images).all()


def test_a_class_conditional_model_has_no_negative_prompts(dit_base: Any) -> None:
    with pytest.raises(ValueError, match=r"use_negative.*expected a text-to-image model"):
        AdapterSet.create(dit_base, "offset", 4, use_negative=True)


# The study --------------------------------------------------------------------------------------------------------------

RING = Reading((AskedObject("ring", "red", "large"),), "top", "blue")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a ring", {"a red ring", "a large ring", "a ring, on a dark blue background"}),
        ("a red ring, on a white background", {"a large ring"}),
        ("a large red ring, on a white background", set()),
        ("a star", set()),  # not in the picture
    ],
)
def test_what_a_prompt_leaves_open(prompt: str, expected: set[str]) -> None:
    seen = replace(RING, background="dark blue")
    rng = np.random.default_rng(0)
    found = {left_open(read_caption(prompt), seen, rng) for _ in range(60)}
    assert found == (expected or {None})


def test_of_two_objects_of_one_shape_nothing_is_said() -> None:
    seen = Asked((AskedObject("ring", "red", "large"), AskedObject("ring", "blue", "small")), "above", "white")
    assert left_open(read_caption("a ring above a ring"), seen, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("negative", "there"),
    [
        ("a red ring", True),
        ("a blue ring", False),
        ("a large ring", True),
        ("a small ring", False),
        ("a ring, on a light blue background", True),
        ("a ring, on a white background", False),
        ("a star, on a light blue background", False),
    ],
)
def test_whether_it_is_gone(negative: str, there: bool) -> None:
    assert shows(replace(RING, background="light blue"), read_caption(negative)) is there


def test_training_pairs() -> None:
    pairs = training_pairs(300)
    assert pairs == training_pairs(300) and len(pairs) == 300
    scenes = [draw_scene(10, index) for index in range(300)]
    assert [prompt for prompt, _ in pairs] == [in_words(asked(scene)) for scene in scenes]
    assert {negative for _, negative in pairs[::3]} == {""}
    assert all(read_caption(negative) for _, negative in pairs if negative)
    of_the_scene = 0
    for (prompt, negative), scene in zip(pairs[2::3], scenes[2::3]):
        wanted, said, whole = read_caption(prompt), read_caption(negative), shown(scene)
        of_the_scene += len(said.objects) == 1 and said.objects[0].shape in {item.shape for item in whole.objects}
        assert negative != prompt or wanted == said
    assert of_the_scene > 35


def row(**changes: Any) -> NegativeRow:
    values: dict[str, Any] = {
        "base": "tiny-sd21",
        "guidance": "agd",
        "adapter": "modulated",
        "told": True,
        "scale": 3.0,
        "steps": 20,
        "nfe": 20.0,
        "n": 500,
        "seed": 0,
        "fulfilled": 0.5,
        "avoided": 0.8,
        "both": 0.4,
        "endpoint_error": 0.1,
        "base_parameters": 100,
        "adapter_parameters": 5,
    }
    return NegativeRow(**values | changes)


def test_the_table_gives_mean_and_spread() -> None:
    table = negatives_table([row(both=0.4), row(both=0.6, seed=1), row(guidance="cfg", adapter=None, nfe=40.0)])
    lines = table.splitlines()
    assert (
        lines[2] == "| AGD modulated | told | 3 | 20 | 0.500 ± 0.000 | 0.800 ± 0.000 | 0.500 ± 0.141 | 0.100 ± 0.000 |"
    )
    assert lines[3] == "| CFG | told | 3 | 40 | 0.500 | 0.800 | 0.400 | 0.100 |"


@pytest.mark.parametrize("damage", [{"told": None}, {"both": "half"}, {"more": 1}], ids=["missing", "text", "unknown"])
def test_damaged_results_are_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    good = vars(row())
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [good]}))
    assert read_negatives(path) == [row()]
    bad = {name: value for name, value in (good | damage).items() if value is not None}
    path.write_text(json.dumps({"rows": [good, bad]}))
    with pytest.raises(AGDError, match="row 1 is not a measurement of negative prompts"):
        read_negatives(path)
