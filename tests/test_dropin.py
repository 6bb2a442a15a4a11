"""The drop-in: somebody's own pipeline, their call, one forward pass a step, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from small_models import build_dit_pipeline, randomise
from small_text_models import build_sd_pipeline, build_sdxl_pipeline
from torch import Tensor

from agd_lib import AGD, AdapterSet, GuidanceInterval, attach, base_from_pipeline, load_agd, sample
from agd_lib.base_models import BaseModel
from agd_lib.dropin import PIPELINES
from agd_lib.errors import AdapterError, BaseModelError
from agd_lib.sampling import noise_generators

# diffusers 0.42.1 on NumPy 2, in EulerDiscreteScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

STEPS = 2
PROMPTS = ["red cat", "a hat on"]
PIPELINE_CLASSES = list(PIPELINES)
by_name = pytest.mark.parametrize("kind", PIPELINE_CLASSES, ids=lambda kind: kind.__name__)


def build(kind: Any, folder: Path) -> Any:
    """A small pipeline of any class that takes adapters."""
    if kind is DiTPipeline:  # its null class 1000 is hard-coded
        return build_dit_pipeline(num_classes=1000, out_channels=8, num_layers=2, names=None)
    pipe = (build_sdxl_pipeline if "XL" in kind.__name__ else build_sd_pipeline)(folder)
    more = {}
    if "ControlNet" in kind.__name__:
        more["controlnet"] = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4))
        randomise(more["controlnet"].eval(), 11)
    made = kind.from_pipe(pipe, **more)
    made.set_progress_bar_config(disable=True)
    return made


def denoiser(pipe: Any) -> Any:
    return pipe.transformer if isinstance(pipe, DiTPipeline) else pipe.unet


def base_of(pipe: Any) -> BaseModel:
    """The base model of a pipeline of any class, frozen or not."""
    base_class = next(base_class for kind, base_class in PIPELINES.items() if isinstance(pipe, kind))
    return base_class(pipe, "small")


def trained(pipe: Any, kind: str = "cross-attention", **settings: Any) -> AdapterSet:
    """Adapters with random weights, as if trained on scales from 1 to 8."""
    adapters = AdapterSet.create(base_of(pipe), kind, hidden_size=8, guidance_range=(1.0, 8.0), **settings)
    randomise(adapters, 7)
    return adapters


def run(pipe: Any, scale: Any = None, **changes: Any) -> Tensor:
    """Two images (or latents) from the same noise. Without a scale: the pipeline's own default."""
    call: dict[str, Any] = {"num_inference_steps": STEPS, "generator": noise_generators([5, 6])}
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    if isinstance(pipe, DiTPipeline):
        call |= {"class_labels": [3, 700], "output_type": "pt"}
    else:
        call |= {"prompt": PROMPTS, "output_type": "latent"}
    if "ControlNetImg2Img" in type(pipe).__name__:
        call |= {"image": pictures, "control_image": pictures.flip(-1), "strength": 1.0}
    elif "Img2Img" in type(pipe).__name__:
        call |= {"image": pictures, "strength": 1.0}
    elif "ControlNet" in type(pipe).__name__:
        call |= {"image": pictures}
    if scale is not None:
        call["guidance_scale"] = scale
    images: Tensor = pipe(**call | changes).images
    assert torch.isfinite(images).all() and images.std() > 0.01
    return images


@contextmanager
def batches(pipe: Any) -> Iterator[list[int]]:
    """The batch size of every forward pass of the denoiser inside the block."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def hooks(pipe: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser(pipe).modules())


def far(one: Tensor, other: Tensor) -> bool:
    """Whether every image differs clearly."""
    return bool((one - other).flatten(1).std(dim=1).min() > 1e-3)


@pytest.fixture
def sd(tmp_path: Path) -> StableDiffusionPipeline:
    return build(StableDiffusionPipeline, tmp_path / "sd")


@pytest.fixture
def xl(tmp_path: Path) -> StableDiffusionXLPipeline:
    return build(StableDiffusionXLPipeline, tmp_path / "xl")


@pytest.fixture
def dit() -> DiTPipeline:
    return build(DiTPipeline, Path())


# One pass, and nothing left behind ----------------------------------------------------------------------------------------


@by_name
def test_guides_in_one_pass_and_comes_off_without_a_trace(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    adapters = trained(pipe)
    flags = [(p.requires_grad, m.training) for m in denoiser(pipe).modules() for p in m.parameters()]
    unguided, cfg, others = run(pipe, 1.0), run(pipe, 4.0), hooks(pipe)
    attributes = set(vars(pipe))

    load_agd(pipe, adapters)
    with batches(pipe) as seen:
        guided = run(pipe, 4.0)
    assert seen == [2] * STEPS  # one pass a step, the batch not doubled
    assert far(guided, unguided) and far(guided, run(pipe, 2.0))
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert inspect.signature(pipe.__call__) == inspect.signature(kind.__call__.__get__(pipe))

    with pipe.agd.disabled(), batches(pipe) as seen:
        assert torch.equal(run(pipe, 4.0), cfg)
    assert seen == [4] * STEPS
    assert torch.equal(run(pipe, 4.0), guided)

    pipe.agd.unload()
    assert type(pipe) is kind and set(vars(pipe)) == attributes
    assert hooks(pipe) == others
    assert torch.equal(run(pipe, 1.0), unguided) and torch.equal(run(pipe, 4.0), cfg)
    assert flags == [(p.requires_grad, m.training) for m in denoiser(pipe).modules() for p in m.parameters()]


@by_name
def test_untrained_adapters_change_nothing(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    unguided = run(pipe, 1.0)
    load_agd(pipe, AdapterSet.create(base_of(pipe), "cross-attention", hidden_size=8))
    assert torch.equal(run(pipe, 4.0), unguided)


@pytest.mark.parametrize("adapter_kind", ["offset", "cross-attention", "modulated"])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline], ids=["sd", "sdxl"])
def test_equals_the_librarys_sampler(kind: Any, adapter_kind: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    adapters = trained(pipe, adapter_kind)
    base = base_from_pipeline(pipe)
    schedule = GuidanceInterval(5.0, 300, 600)
    for scale in (3.0, torch.tensor([2.0, 6.0]), schedule):
        with adapters.attached(base):
            *_, last = sample(base, base.encode(PROMPTS), AGD(adapters, scale), STEPS, seeds=[5, 6])
        load_agd(pipe, adapters)
        assert torch.equal(run(pipe, scale), last.next_latents)
        pipe.agd.unload()


def test_equals_the_librarys_sampler_on_dit(dit: DiTPipeline) -> None:
    adapters, base = trained(dit, "offset"), base_from_pipeline(dit)
    with adapters.attached(base):
        *_, last = sample(base, base.encode([3, 700]), AGD(adapters, 3.0), STEPS, seeds=[5, 6])
    load_agd(dit, adapters)
    assert torch.equal(run(dit, 3.0), base.decode(last.next_latents))


def test_dit_of_any_number_of_classes(dit: DiTPipeline) -> None:
    """One pass has no null class, which the pipeline takes to be 1000."""
    few = build_dit_pipeline(num_classes=5, names=None)
    load_agd(few, trained(few))
    assert run(few, 3.0, class_labels=[1, 4]).shape == (2, 3, 32, 32)


def test_adapters_from_a_folder(sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapters = trained(sd)
    adapters.save_pretrained(tmp_path / "adapters")
    expected = run(load_agd(sd, adapters).pipeline, 3.0)
    handle = load_agd(sd, tmp_path / "adapters")  # in place of the others
    assert handle.adapters is not adapters and sd.agd.adapters is handle.adapters
    assert type(sd).__mro__[1] is StableDiffusionPipeline
    assert torch.equal(run(sd, 3.0), expected)


# The scale of a call ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "default"),
    [(StableDiffusionPipeline, 7.5), (StableDiffusionXLPipeline, 5.0), (DiTPipeline, 4.0)],
    ids=["sd", "sdxl", "dit"],
)
def test_the_default_is_the_pipelines_own(kind: Any, default: float, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    load_agd(pipe, trained(pipe))
    assert torch.equal(run(pipe), run(pipe, default))


def test_the_scale_by_position(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    rest = {"generator": noise_generators([5, 6]), "output_type": "latent"}
    assert torch.equal(sd(PROMPTS, None, None, STEPS, None, None, 3.0, **rest).images, run(sd, 3.0))


@pytest.mark.parametrize("scales", [[2.0, 6.0], (2, 6), torch.tensor([2.0, 6.0])], ids=["list", "tuple", "tensor"])
def test_one_scale_per_prompt(xl: StableDiffusionXLPipeline, scales: Any) -> None:
    load_agd(xl, trained(xl))
    mixed, low, high = run(xl, scales), run(xl, 2.0), run(xl, 6.0)
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1]]), rtol=1e-5, atol=1e-5)
    assert far(low, high)


def test_one_scale_per_prompt_and_many_images_of_each(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    seeds = {"generator": noise_generators([5, 6, 7, 8]), "num_images_per_prompt": 2}
    mixed = run(sd, [2.0, 6.0], **seeds)
    low, high = (run(sd, scale, **seeds | {"generator": noise_generators([5, 6, 7, 8])}) for scale in (2.0, 6.0))
    torch.testing.assert_close(mixed, torch.cat([low[:2], high[2:]]), rtol=1e-5, atol=1e-5)
    assert mixed.shape == (4, 4, 8, 8) and far(low, high)


@pytest.mark.parametrize("scheduled", [False, True], ids=["numbers", "schedule"])
def test_one_scale_per_image(sd: StableDiffusionPipeline, scheduled: bool) -> None:
    load_agd(sd, trained(sd))

    def images(scales: Any) -> Tensor:
        given = (lambda timestep: scales) if scheduled else scales
        return run(sd, given, generator=noise_generators([5, 6, 7, 8]), num_images_per_prompt=2)

    of_each = [images(scale) for scale in (2.0, 3.0, 4.0, 6.0)]
    expected = torch.stack([each[i] for i, each in enumerate(of_each)])
    torch.testing.assert_close(images([2.0, 3.0, 4.0, 6.0]), expected, rtol=1e-5, atol=1e-5)
    per_prompt = torch.cat([of_each[0][:2], of_each[3][2:]])
    torch.testing.assert_close(images([2.0, 6.0]), per_prompt, rtol=1e-5, atol=1e-5)
    assert far(of_each[0], of_each[3])


@pytest.mark.parametrize("given", [0.5, 0, [1.0, 0.0], lambda timestep: 0.5], ids=["half", "zero", "each", "schedule"])
def test_below_one_is_one_as_in_the_pipeline_itself(sd: StableDiffusionPipeline, given: Any) -> None:
    assert torch.equal(run(sd, 0.0), run(sd, 1.0))
    load_agd(sd, trained(sd))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(run(sd, given), run(sd, 1.0))
    assert far(run(sd, 6.0), run(sd, 1.0))


def test_a_schedule_sees_the_timesteps(xl: StableDiffusionXLPipeline) -> None:
    load_agd(xl, trained(xl))
    seen: list[int] = []

    def schedule(timestep: int) -> float:
        seen.append(timestep)
        return {0: 2.0, 1: 6.0}[len(seen) - 1]

    scheduled = run(xl, schedule)
    assert seen == [int(t) for t in xl.scheduler.timesteps] and len(seen) == STEPS
    by_hand = dict(zip(seen, (2.0, 6.0)))
    assert torch.equal(run(xl, by_hand.__getitem__), scheduled)
    assert far(scheduled, run(xl, 2.0))


@pytest.mark.parametrize("given", [12.0, [2.0, 12.0], lambda timestep: 12.0], ids=["high", "one", "schedule"])
def test_a_scale_outside_the_trained_range_warns(sd: StableDiffusionPipeline, given: Any) -> None:
    load_agd(sd, trained(sd))
    with pytest.warns(UserWarning, match=r"got guidance_scale .*trained on scales from 1 to 8") as caught:
        run(sd, given)
    assert len(caught) == 1 and (callable(given) or caught[0].filename == __file__)


def test_a_scale_at_the_end_of_the_trained_range_does_not_warn(sd: StableDiffusionPipeline) -> None:
    adapters = AdapterSet.create(base_of(sd), hidden_size=4, guidance_range=(1.1, 7.7))
    load_agd(sd, adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(sd, [1.1, 7.7])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (float("nan"), "got guidance scale nan, expected finite numbers >= 0"),
        (-1.0, "got guidance scale -1.0, expected finite"),
        ([2.0, float("inf")], "expected finite numbers >= 0"),
        (lambda timestep: -1.0, "got guidance scale -1.0, expected finite"),
        ([2.0, 3.0, 4.0], r"shape \(3,\) for 2 prompts and 2 images, expected one number, or one per prompt or image"),
        ("seven", "got guidance_scale 'seven', expected a number, one number per prompt or image, or a function"),
        (None, "got guidance_scale None, expected a number"),
        (lambda timestep: None, "got guidance_scale None, expected a number"),
        (lambda timestep: [2.0, 3.0, 4.0], r"shape \(3,\) for 2 prompts"),
    ],
    ids=[
        "nan",
        "negative",
        "infinite",
        "schedule",
        "too many",
        "text",
        "none",
        "schedule of none",
        "schedule of too many",
    ],
)
def test_bad_scales_are_refused(sd: StableDiffusionPipeline, given: Any, message: str) -> None:
    load_agd(sd, trained(sd))
    with pytest.raises(ValueError, match=message):
        run(sd, guidance_scale=given)
    assert hooks(sd) == 0


# What takes two passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"negative_prompt": "hat"},
        {"negative_prompt": ["", "hat"]},
        {"negative_prompt_2": "hat"},
        {"negative_prompt_embeds": torch.zeros(2, 12, 20)},
        {"negative_original_size": (32, 32)},
        {"guidance_rescale": 0.7},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_takes_two_passes_is_refused(xl: StableDiffusionXLPipeline, given: dict[str, Any]) -> None:
    load_agd(xl, trained(xl))
    with pytest.raises(ValueError, match=rf"got {next(iter(given))}, expected none: .*one forward pass.*agd.disabled"):
        run(xl, 3.0, **given)


def test_empty_negative_prompts_are_fine(xl: StableDiffusionXLPipeline) -> None:
    load_agd(xl, trained(xl))
    expected = run(xl, 3.0)
    for nothing in (None, "", ["", ""]):
        assert torch.equal(run(xl, 3.0, negative_prompt=nothing, negative_prompt_2=nothing), expected)


def test_disabled_negative_prompts_work_as_before(sd: StableDiffusionPipeline) -> None:
    expected = run(sd, 3.0, negative_prompt=["hat", "cat"])
    handle = load_agd(sd, trained(sd))
    handle.disable()
    assert torch.equal(run(sd, 3.0, negative_prompt=["hat", "cat"]), expected)
    handle.enable()
    with pytest.raises(ValueError, match="negative_prompt"):
        run(sd, 3.0, negative_prompt=["hat", "cat"])


# The rest of the call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline], ids=["sd", "sdxl"])
def test_prompt_embeddings_in_place_of_prompts(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    condition = base_of(pipe).encode(PROMPTS)
    given = {"prompt": None, "prompt_embeds": condition["encoder_hidden_states"]}
    if "text_embeds" in condition:
        given["pooled_prompt_embeds"] = condition["text_embeds"]
    load_agd(pipe, trained(pipe))
    assert torch.equal(run(pipe, [2.0, 6.0], **given), run(pipe, [2.0, 6.0]))


def test_callbacks_are_called_as_ever(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    seen: list[Any] = []

    def look(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipe is sd, index, tensors["latents"].shape, tensors["prompt_embeds"].shape[0]))
        return {"latents": tensors["latents"] + (index == 0)}

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    moved = run(sd, 3.0, callback_on_step_end=look, **inputs)
    assert seen == [(True, i, (2, 4, 8, 8), 2) for i in range(STEPS)]
    assert far(moved, run(sd, 3.0))


def test_an_interrupted_call_leaves_nothing(sd: StableDiffusionPipeline) -> None:
    unguided = run(sd, 1.0)
    load_agd(sd, trained(sd))
    expected = run(sd, 3.0)

    def interrupt(*_: Any) -> None:
        assert hooks(sd) > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sd, 3.0, callback_on_step_end=interrupt)
    assert hooks(sd) == 0
    assert torch.equal(run(sd, 3.0), expected)
    sd.agd.unload()
    assert torch.equal(run(sd, 1.0), unguided)


def test_another_scheduler(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, timestep_spacing="trailing")
    adapters = sd.agd.adapters
    sd.agd.unload()
    base = base_from_pipeline(sd)
    with adapters.attached(base):
        *_, last = sample(base, base.encode(PROMPTS), AGD(adapters, 3.0), STEPS, seeds=[5, 6])
    load_agd(sd, adapters)
    assert torch.equal(run(sd, 3.0), last.next_latents)


def test_a_scheduler_of_another_prediction_type_is_refused(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="epsilon")
    with pytest.raises(AdapterError, match="it predicts epsilon, the adapters were trained for v_prediction"):
        run(sd, 3.0)


# The pipeline stays the user's ------------------------------------------------------------------------------------------------


def test_a_guided_pipeline_is_saved_as_what_it_was(xl: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    unguided = run(xl, 1.0)
    xl.save_pretrained(tmp_path / "before")
    load_agd(xl, trained(xl))
    xl.save_pretrained(tmp_path / "after")
    index = json.loads((tmp_path / "after" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "before" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "after")
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionXLPipeline and torch.equal(run(again, 1.0), unguided)


def test_pipelines_made_from_a_guided_one(sd: StableDiffusionPipeline) -> None:
    adapters = trained(sd)
    load_agd(sd, adapters)
    expected = run(sd, 3.0)
    for other in (AutoPipelineForImage2Image.from_pipe(sd), StableDiffusionImg2ImgPipeline.from_pipe(sd)):
        assert type(other) is StableDiffusionImg2ImgPipeline and other.unet is sd.unet
        other.set_progress_bar_config(disable=True)
        with batches(other) as seen:
            run(other, 3.0)
        assert seen == [4] * STEPS  # not loaded there: the pipeline's own two passes
        load_agd(other, adapters)  # the same adapters, now on two pipelines
        with batches(other) as seen:
            run(other, 3.0)
        assert seen == [2] * STEPS
    other.agd.unload()
    assert torch.equal(run(sd, 3.0), expected)
    new = type(sd).from_pipe(sd)  # of the class that load_agd made, without adapters
    new.set_progress_bar_config(disable=True)
    with batches(new) as seen:
        run(new, 3.0)
    assert seen == [4] * STEPS


def test_a_copy_is_guided_by_adapters_of_its_own(sd: StableDiffusionPipeline) -> None:
    load_agd(sd, trained(sd))
    expected = run(sd, 3.0)
    twin = copy.deepcopy(sd)
    sd.agd.unload()
    assert twin.agd.pipeline is twin and torch.equal(run(twin, 3.0), expected)


def test_another_checkpoint_in_the_same_pipeline(sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapters = trained(sd)
    other = build_sd_pipeline(tmp_path / "other", seed=9)
    load_agd(sd, adapters)
    of_the_first = run(sd, 3.0)
    sd.unet, sd.vae, sd.text_encoder = other.unet, other.vae, other.text_encoder
    guided = run(sd, 3.0)
    load_agd(other, adapters)
    assert torch.equal(run(other, 3.0), guided) and far(guided, of_the_first)


def test_adapters_that_are_on_a_base_model_stay_there(sd: StableDiffusionPipeline) -> None:
    adapters, base = trained(sd), base_of(sd)
    adapters.attach(base)
    count = hooks(sd)
    load_agd(sd, adapters)
    run(sd, 3.0)
    adapters.check_attached(base)
    assert hooks(sd) == count


def test_an_old_handle_does_not_unload_newer_adapters(sd: StableDiffusionPipeline) -> None:
    old = load_agd(sd, trained(sd))
    new = load_agd(sd, trained(sd, "offset"))
    old.unload()
    assert sd.agd.adapters is new.adapters
    new.unload()
    new.unload()
    assert type(sd) is StableDiffusionPipeline


# Dtypes, devices, compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline], ids=["sd", "sdxl"])
def test_a_half_precision_pipeline_with_adapters_in_float32(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    adapters = trained(pipe)
    load_agd(pipe, adapters)
    expected, unguided = run(pipe, 3.0), run(pipe, 1.0)
    pipe.to(dtype)
    guided = run(pipe, 3.0)
    assert guided.dtype == dtype and next(adapters.parameters()).dtype == torch.float32
    error, effect = (guided.float() - expected).std(), (expected - unguided).std()
    assert error < 0.3 * effect


def test_weights_that_are_offloaded_one_by_one(sd: StableDiffusionPipeline) -> None:
    """As ``enable_sequential_cpu_offload`` does, which asks for an accelerator: between calls the weights are nowhere."""
    load_agd(sd, trained(sd))
    expected = run(sd, 3.0)
    accelerate.cpu_offload(sd.unet, execution_device="cpu")
    assert next(sd.unet.parameters()).device.type == "meta"
    assert torch.equal(run(sd, 3.0), expected)


class Elsewhere(ModelHook):
    """A model that is somewhere else between its forward passes, as ``enable_model_cpu_offload`` has it."""

    def init_hook(self, module: Any) -> Any:
        self.kept = {name: p.detach().clone() for name, p in module.named_parameters()}
        return self.post_forward(module, module)

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self.kept[name])
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))
        return output


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, DiTPipeline], ids=["sdxl", "dit"])
def test_a_denoiser_that_is_offloaded_between_its_passes(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    load_agd(pipe, trained(pipe))
    expected = run(pipe, 3.0)
    add_hook_to_module(denoiser(pipe), Elsewhere())
    assert denoiser(pipe).config.in_channels == 4 and all(p.isnan().all() for p in denoiser(pipe).parameters())
    assert torch.equal(run(pipe, 3.0), expected)


def test_adapters_follow_the_call_to_its_device(sd: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one true device here, so they follow to the one that has shapes only, and no values to be checked."""
    monkeypatch.setattr(attach, "scale_at", lambda scale, t, count, like: like.new_full((count,), scale))
    adapters, base = trained(sd), base_of(sd)
    sd.unet.to("meta")
    with adapters.attached(base), adapters.guided_by(3.0):
        assert next(adapters.parameters()).device.type == "cpu"
        tokens = torch.zeros(2, 12, 12, device="meta")
        output = base.denoise(torch.zeros(2, 4, 8, 8, device="meta"), 500, {"encoder_hidden_states": tokens})
        assert output.device.type == "meta" and next(adapters.parameters()).device.type == "meta"


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "wrapped"])
def test_a_compiled_denoiser_runs_uncompiled_while_it_is_guided(in_place: bool) -> None:
    pipe = build_dit_pipeline(num_classes=1000, num_layers=1, names=None)
    adapters, unguided = trained(pipe), run(pipe, 1.0)
    guided = run(load_agd(pipe, adapters).pipeline, 3.0)
    pipe.agd.unload()
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    if in_place:
        pipe.transformer.compile(backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    torch.testing.assert_close(run(pipe, 1.0), unguided)
    count = len(compiled)
    assert count > 0
    load_agd(pipe, adapters)
    assert torch.equal(run(pipe, 3.0), guided)
    pipe.agd.unload()
    torch.testing.assert_close(run(pipe, 1.0), unguided)
    load_agd(pipe, adapters)
    assert torch.equal(run(pipe, 3.0), guided)
    assert len(compiled) == count
    torch._dynamo.reset()


# Together with others ---------------------------------------------------------------------------------------------------------


def check_combines(pipe: Any, adapters: AdapterSet, alone: Tensor, **changes: Any) -> None:
    """With the addition in place: AGD still guides, the addition still acts, and AGD comes off without a trace."""
    unguided, cfg = run(pipe, 1.0, **changes), run(pipe, 3.0, **changes)
    load_agd(pipe, adapters)
    with batches(pipe) as seen:
        both = run(pipe, 3.0, **changes)
    assert seen == [2] * STEPS
    assert far(both, unguided) and far(both, alone)
    with pipe.agd.disabled():
        assert torch.equal(run(pipe, 3.0, **changes), cfg)
    pipe.agd.unload()
    assert torch.equal(run(pipe, 1.0, **changes), unguided)


@pytest.mark.parametrize("when", ["before", "after"])
def test_with_lora(sd: StableDiffusionPipeline, when: str) -> None:
    peft = pytest.importorskip("peft")
    adapters = trained(sd)
    load_agd(sd, adapters)
    alone = run(sd, 3.0)
    if when == "before":
        sd.agd.unload()
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]
    sd.unet.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    with_lora = run(sd, 3.0)
    sd.unet.disable_adapters()
    without = run(sd, 3.0)
    sd.unet.enable_adapters()
    if when == "after":
        torch.testing.assert_close(without, alone, rtol=1e-4, atol=1e-5)  # peft by itself changes the last bits
        assert far(with_lora, alone)
        sd.agd.unload()
    trainable = [p.requires_grad for p in sd.unet.parameters()]
    check_combines(sd, adapters, alone)
    assert trainable == [p.requires_grad for p in sd.unet.parameters()]  # somebody may be training it


def load_random_ip_adapter(pipe: Any, generator: torch.Generator) -> None:
    """An IP-Adapter of four image tokens, for image embeddings of six numbers."""
    tokens, width = 4, pipe.unet.config.cross_attention_dim
    shapes = {"proj.weight": (tokens * width, 6), "proj.bias": (tokens * width,)}
    image_proj = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    image_proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    ip = {}
    for i, name in enumerate(cross):
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for layer in ("to_k_ip", "to_v_ip"):
            ip[f"{2 * i + 1}.{layer}.weight"] = torch.randn(inner, width, generator=generator)
    pipe.load_ip_adapter({"image_proj": image_proj, "ip_adapter": ip}, "", "", image_encoder_folder=None)


@pytest.mark.parametrize("adapter_kind", ["offset", "cross-attention", "modulated"])
@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline], ids=["sd", "sdxl"])
def test_with_ip_adapter(kind: Any, adapter_kind: str, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    adapters = trained(pipe, adapter_kind)
    untouched = run(pipe, 1.0)
    load_agd(pipe, adapters)
    alone = run(pipe, 3.0)
    pipe.agd.unload()
    generator = torch.Generator().manual_seed(1)
    load_random_ip_adapter(pipe, generator)
    pictures = torch.randn(1, 1, 6, generator=generator)  # one, for every prompt
    unguided, guided = ({"ip_adapter_image_embeds": [p]} for p in (pictures, torch.cat([0 * pictures, pictures])))
    cfg = run(pipe, 3.0, **guided)
    without_agd = run(pipe, 1.0, **unguided)
    load_agd(pipe, adapters)
    with batches(pipe) as seen:
        both = run(pipe, 3.0, **unguided)
    assert seen == [2] * STEPS
    assert far(both, without_agd) and far(both, alone)
    assert far(both, run(pipe, 3.0, ip_adapter_image_embeds=[-pictures]))
    assert far(both, run(pipe, 6.0, **unguided))
    with pytest.raises(ValueError, match=r"image_embeds of \[2\] pictures for 1 prompts.* no negative half.*chunk"):
        run(pipe, 3.0, prompt=PROMPTS[:1], generator=noise_generators([5]), **guided)
    pipe.set_ip_adapter_scale(0.0)  # the picture is not heard: AGD alone
    torch.testing.assert_close(run(pipe, 3.0, **unguided), alone, rtol=1e-4, atol=1e-5)
    pipe.set_ip_adapter_scale(1.0)
    assert torch.equal(run(pipe, 3.0, **unguided), both)
    with pipe.agd.disabled():
        assert torch.equal(run(pipe, 3.0, **guided), cfg)
    pipe.agd.unload()
    assert torch.equal(run(pipe, 1.0, **unguided), without_agd)
    load_agd(pipe, adapters)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe, 3.0), alone)
    pipe.agd.unload()
    assert torch.equal(run(pipe, 1.0), untouched)


@pytest.mark.parametrize(
    "kind", [StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline], ids=["sd", "sdxl"]
)
def test_with_controlnet(kind: Any, tmp_path: Path) -> None:
    pipe = build(kind, tmp_path)
    adapters = trained(pipe)
    load_agd(pipe, adapters)
    without_control = run(pipe, 3.0, controlnet_conditioning_scale=0.0)
    other_control = run(pipe, 3.0, image=torch.zeros(2, 3, 64, 64))
    assert far(run(pipe, 3.0), other_control)
    pipe.agd.unload()
    check_combines(pipe, adapters, without_control)


# What does not fit --------------------------------------------------------------------------------------------------------------


def test_adapters_of_another_model_are_refused(sd: StableDiffusionPipeline, xl: StableDiffusionXLPipeline) -> None:
    adapters = trained(xl)
    with pytest.raises(AdapterError, match=r"do not fit this StableDiffusionPipeline: .*is missing"):
        load_agd(sd, adapters)
    assert type(sd) is StableDiffusionPipeline and not hasattr(sd, "agd")


def test_bad_paths_are_refused(sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder, and not a hub id"):
        load_agd(sd, str(tmp_path / "nothing"))
    with pytest.raises(TypeError, match="got adapters of type NoneType, expected a folder, a hub id, or an AdapterSet"):
        load_agd(sd, None)  # type: ignore[arg-type]
    load_agd(sd, trained(sd))
    expected = run(sd, 3.0)
    with pytest.raises(AdapterError, match="no adapter config"):
        load_agd(sd, tmp_path)
    assert torch.equal(run(sd, 3.0), expected)  # what was loaded before is loaded still


@pytest.mark.parametrize("thing", ["pipe", torch.nn.Identity(), StableDiffusionLatentUpscalePipeline])
def test_other_things_are_refused(thing: Any) -> None:
    with pytest.raises(BaseModelError, match="expected one of: DiTPipeline, StableDiffusionPipeline"):
        load_agd(thing, "somewhere/else")


def test_every_pipeline_class_is_covered_here() -> None:
    assert set(PIPELINE_CLASSES) == {
        DiTPipeline,
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
    }
