"""Predicted memory against what torch's profiler sees of real training, and the settings that save it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_models import build_dit_pipeline
from small_text_models import build_sd_pipeline, build_sdxl_pipeline
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from agd_lib import memory
from agd_lib.attach import AdapterSet
from agd_lib.base_models import BaseModel, StableDiffusionBase, base_from_pipeline, load_base
from agd_lib.errors import AdapterError
from agd_lib.memory import (
    GIB,
    LiveStorages,
    Memory,
    MemorySettings,
    collection_memory,
    decoding_memory,
    encoding_memory,
    settings_that_fit,
    training_memory,
    training_step,
)
from agd_lib.training import Student, TrainingSettings, train
from agd_lib.trajectories import CollectionPlan, TrajectoryStore, collect, collect_batch

KINDS = ("offset", "cross-attention", "modulated")


def small_base(family: str, folder: Path, **dit: Any) -> BaseModel:
    if family == "dit":
        return base_from_pipeline(build_dit_pipeline(**dit))
    return base_from_pipeline((build_sd_pipeline if family == "sd" else build_sdxl_pipeline)(folder))


def adapters_for(base: BaseModel, kind: str = "offset") -> AdapterSet:
    """Adapters that do something: their zero weights too are random."""
    adapters = AdapterSet.create(base, kind, hidden_size=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapters


def small_store(base: BaseModel, folder: Path, rows: int) -> TrajectoryStore:
    conditions = (0, 1, 2) if "class_labels" in base.blank_condition(1) else ("red cat", "a hat", "on")
    plan = CollectionPlan(conditions=conditions, num_trajectories=rows // 2, num_inference_steps=2)
    return collect(base, plan, folder, progress=False)


@contextmanager
def profiled() -> Iterator[list[int]]:
    """The level of allocated bytes after every allocation and release in the block, from zero, by torch's profiler."""
    levels: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield levels
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        levels.append(level)


def weights(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


# Prediction and measurement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "gradient_checkpointing"),
    [
        ("dit", "offset", torch.float32, False),
        ("dit", "offset", torch.float32, True),
        ("sd", "cross-attention", torch.float32, True),
        ("sdxl", "modulated", torch.float32, False),
        ("dit", "modulated", torch.bfloat16, False),
        ("sd", "cross-attention", torch.bfloat16, False),
        ("sdxl", "cross-attention", torch.bfloat16, True),
        ("tiny-dit", "offset", torch.float32, False),
        ("tiny-sd21", "cross-attention", torch.float32, True),
        ("tiny-sdxl", "modulated", torch.float32, False),
    ],
)
def test_the_peak_of_training_is_what_the_profiler_sees(
    tmp_path: Path, family: str, kind: str, dtype: torch.dtype, gradient_checkpointing: bool
) -> None:
    if family.startswith("tiny"):  # one that is shipped
        base = load_base(family)
    else:
        base = small_base(family, tmp_path, sample_size=16, num_layers=6, attention_head_dim=24)
    adapters, store = AdapterSet.create(base, kind, hidden_size=8), small_store(base, tmp_path / "store", 16)
    base = base.to(dtype=dtype)
    settings = MemorySettings(dtype, gradient_checkpointing=gradient_checkpointing, offload=True)
    predicted = training_memory(base, adapters, 16, settings).memory
    steps = train(
        base,
        adapters,
        store,
        TrainingSettings(num_steps=2, batch_size=16),
        gradient_checkpointing=gradient_checkpointing,
    )
    next(steps)  # the second step is as all that follow: Adam's moments are there
    with profiled() as levels:
        next(steps)
    before = weights(base.denoiser) + weights(adapters) + 2 * sum(p.nbytes for p in adapters.parameters())
    print(
        f"{family} {dtype} {gradient_checkpointing}: {predicted.total / (before + max(levels)):.3f} of the whole peak,"
    )
    print(
        f"{(predicted.total - before) / max(levels):.3f} of what comes and goes ({max(levels) / before:.2f} x weights)"
    )
    assert predicted.total == pytest.approx(before + max(levels), rel=0.15)
    assert predicted.total - before == pytest.approx(max(levels), rel=0.15)


@pytest.mark.parametrize("family", ["dit", "sd", "sdxl"])
def test_the_peak_of_collection_is_what_the_profiler_sees(tmp_path: Path, family: str) -> None:
    conditions: tuple[Any, ...] = (0, 1)
    if family == "dit":
        base = small_base(family, tmp_path, sample_size=16, attention_head_dim=24)
    else:  # so wide that the handful of latents that a sampler holds do not count, as in the real ones
        pipeline = (build_sd_pipeline if family == "sd" else build_sdxl_pipeline)(tmp_path)
        widths = [4 * width for width in pipeline.unet.config.block_out_channels]
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=widths).eval()
        base, conditions = base_from_pipeline(pipeline), ("a red cat", "a hat")
    plan = CollectionPlan(conditions, num_trajectories=16, num_inference_steps=2)
    predicted = collection_memory(base, 16, MemorySettings(offload=True)).memory
    with profiled() as levels:
        collect_batch(base, plan, range(16))
    print(f"collection: {predicted.transient / max(levels):.3f}")
    assert predicted.base == weights(base.denoiser)
    assert predicted.transient == pytest.approx(max(levels), rel=0.15)
    assert predicted.total == predicted.base + predicted.transient
    assert (predicted.adapters, predicted.saved, predicted.moment) == (0, 0, "forward")


@pytest.mark.parametrize("family", ["dit", "sd", "sdxl"])
def test_the_peak_of_decoding_is_what_the_profiler_sees_for_any_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = small_base(family, tmp_path)
    monkeypatch.setattr(type(base), "images_at_once", 4)
    predicted = decoding_memory(base, MemorySettings(offload=True))
    together = decoding_memory(base)
    base.decode(torch.zeros(1, *base.latent_shape))
    with profiled() as levels:
        base.decode(torch.zeros(4, *base.latent_shape))
    with profiled() as of_many:
        images = base.decode(torch.zeros(20, *base.latent_shape))
    assert predicted.transient == pytest.approx(max(levels), rel=0.2)  # a convolution has a workspace of its own
    assert max(of_many) < max(levels) + 2.1 * images.nbytes
    assert (predicted.base, predicted.other_models) == (0, sum(p.nbytes for p in base.vae.parameters()))
    assert together.base == sum(p.nbytes for p in base.denoiser.parameters())
    assert together.total - together.base >= predicted.total  # the text encoders are there, too


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_peak_of_encoding_is_what_the_profiler_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = small_base(family, tmp_path)
    assert isinstance(base, StableDiffusionBase)
    predicted = encoding_memory(base, MemorySettings(offload=True))
    prompts = ["a red cat"] * base.PROMPTS_AT_ONCE
    base.encode(prompts)
    with profiled() as levels:
        base.encode(prompts)
    assert predicted.transient == pytest.approx(max(levels), rel=0.15)
    weights_of_encoders = sum(p.nbytes for encoder in base._text_encoders() for p in encoder.parameters())
    assert (predicted.base, predicted.other_models) == (0, weights_of_encoders)


def test_decoding_in_float16_counts_an_autoencoder_that_would_overflow_in_float32(tmp_path: Path) -> None:
    """SDXL's; Stable Diffusion's pipeline leaves its own in float16, whatever its config says."""
    sd, sdxl = (small_base(family, tmp_path / family) for family in ("sd", "sdxl"))
    assert sd.vae.config.force_upcast and sdxl.vae.config.force_upcast
    halves = [decoding_memory(base, MemorySettings(torch.float16, offload=True)).total for base in (sd, sdxl)]
    whole = [decoding_memory(base, MemorySettings(offload=True)).total for base in (sd, sdxl)]
    assert halves[0] < 0.6 * whole[0] and halves[1] == whole[1]


def test_fake_tensors_live_as_long_as_real_ones(tmp_path: Path) -> None:
    base = small_base("sd", tmp_path)
    adapters = AdapterSet.create(base, "modulated", hidden_size=8)
    predicted = training_memory(base, adapters, 4, MemorySettings(gradient_checkpointing=True))
    student = Student(base, adapters, gradient_checkpointing=True)
    with LiveStorages() as tracker:
        saved = training_step(student, 4, tracker)
    sizes, moment = tracker.peak()
    assert sum(sizes.values()) == pytest.approx(predicted.memory.total - predicted.memory.other_models, rel=0.01)
    assert (saved, moment) == (pytest.approx(predicted.memory.saved, rel=0.01), predicted.memory.moment)


def test_the_parts_are_named(tmp_path: Path) -> None:
    base = small_base("dit", tmp_path)
    adapters = AdapterSet.create(base, "offset", hidden_size=8)
    small, large = (training_memory(base, adapters, size).memory for size in (1, 64))
    parameters = sum(p.nbytes for p in adapters.parameters())
    assert small.base == large.base == weights(base.denoiser)
    assert small.adapters == large.adapters == weights(adapters)
    assert small.optimizer == large.optimizer == pytest.approx(2 * parameters, rel=0.01)  # and step counts
    heavy = training_memory(base, AdapterSet.create(base, "offset", hidden_size=128), 1).memory
    assert heavy.gradients > 0.9 * heavy.adapters > heavy.saved  # when there are most, all gradients are there
    assert large.moment == "backward" and large.activations > 0.9 * large.saved > 30 * small.saved
    assert large.other_models == sum(p.nbytes for p in base.vae.parameters())
    halved = training_memory(base, adapters, 64, MemorySettings(torch.bfloat16, offload=True)).memory
    assert halved.base == pytest.approx(large.base / 2, rel=0.05) and halved.other_models == 0
    assert halved.optimizer == large.optimizer
    assert 0.4 * large.saved < halved.saved < 0.7 * large.saved


def test_attention_makes_no_matrix_of_scores(tmp_path: Path) -> None:
    """Four times the tokens take four times the memory, where a matrix of scores would take sixteen."""
    small, large = (small_base("dit", tmp_path, sample_size=size) for size in (32, 64))
    saved = [training_memory(base, adapters_for(base), 1).memory.saved for base in (small, large)]
    assert saved[1] < 4.2 * saved[0]


def test_prediction_leaves_the_base_and_its_adapters_alone(tmp_path: Path) -> None:
    base = small_base("sd", tmp_path)
    adapters = adapters_for(base, "cross-attention").attach(base)
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    training_memory(base, adapters, 2)
    collection_memory(base, 2)
    adapters.check_attached(base)
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in adapters.parameters())
    with pytest.raises(ValueError, match="batch size 0"):
        training_memory(base, adapters, 0)


@pytest.mark.parametrize("family", ["dit", "sd", "sdxl"])
def test_a_blank_condition_has_the_shapes_of_a_real_one(tmp_path: Path, family: str) -> None:
    base = small_base(family, tmp_path)
    real, blank = base.null_condition(3), base.blank_condition(3)
    described = [{name: (value.shape, value.dtype) for name, value in condition.items()} for condition in (real, blank)]
    assert described[0] == described[1]


# Which settings fit ---------------------------------------------------------------------------------------------------


def test_settings_that_fit_are_the_fastest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_base("dit", tmp_path, sample_size=16)
    adapters = adapters_for(base)
    monkeypatch.setattr(memory, "RESERVED", 0.0)
    everything = list(settings_that_fit(base, adapters, 16, gpu_memory=1))
    assert everything == sorted(everything, key=lambda prediction: prediction.flops)
    assert len(everything) == 8 and everything[0].settings == MemorySettings()
    assert [p.settings.gradient_checkpointing for p in everything] == [False] * 4 + [True] * 4
    plain, checkpointed = everything[0], everything[4]
    assert 1.2 * plain.flops < checkpointed.flops < 1.55 * plain.flops
    least = min(prediction.memory.total for prediction in everything)
    (only,) = settings_that_fit(base, adapters, 16, gpu_memory=least / GIB)
    assert only.settings == MemorySettings(torch.bfloat16, gradient_checkpointing=True, offload=True)
    assert next(settings_that_fit(base, adapters, 16, gpu_memory=0.99 * least / GIB), None) is None
    monkeypatch.setattr(memory, "gpu_memory_gib", lambda: 0.0)
    with pytest.raises(ValueError, match="pass gpu_memory"):
        settings_that_fit(base, adapters, 16)


def test_some_of_a_card_is_left_free() -> None:
    peak = Memory(5 * GIB, 0, GIB, GIB // 2, GIB // 2, 0, 0, saved=GIB, moment="optimizer step")
    assert peak.fits(8) and not peak.fits(7.9)
    assert str(peak) == ("7.00 GiB in the optimizer step: base 5.00, adapters 1.00, optimizer 0.50, gradients 0.50")


# The settings themselves ----------------------------------------------------------------------------------------------


def gradients(student: Student, interrupt: bool = False) -> list[Tensor]:
    """Of a loss over two forward passes at different scales; ``interrupt``: sampling goes on before backward."""
    base = student.base
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *base.latent_shape, generator=generator)
    timestep, condition = torch.tensor([10, 500]), base.null_condition(2)
    scales = (torch.tensor([1.5, 6.0]), torch.tensor([3.0, 2.0]))
    loss = sum((student(latents, timestep, condition, scale).square().mean() for scale in scales), torch.zeros(()))
    if interrupt:
        with torch.no_grad(), student.adapters.disabled():
            base.denoise(latents[:1], 0, base.null_condition(1))
    loss.backward()
    found = [parameter.grad for parameter in student.adapters.parameters() if parameter.grad is not None]
    student.adapters.zero_grad()
    return found


@pytest.mark.parametrize(("family", "kind"), [*(("dit", kind) for kind in KINDS), ("sdxl", KINDS[1]), ("sd", KINDS[2])])
def test_checkpointing_changes_no_gradient(tmp_path: Path, family: str, kind: str) -> None:
    """Each block is computed again with the conditions of its own forward pass, not of the last one."""
    base = small_base(family, tmp_path)
    adapters = adapters_for(base, kind)
    plain = gradients(Student(base, adapters))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    block = next(iter(base.attention_sites().values())).feed_forward
    handle = block.register_forward_pre_hook(count)
    checkpointed = gradients(Student(base, adapters, gradient_checkpointing=True), interrupt=True)
    handle.remove()
    assert calls > 3  # two forward passes, the one between, and again in backward
    assert len(plain) == len(checkpointed) > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in plain)
    for expected, found in zip(plain, checkpointed):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_checkpointing_ends_with_the_adapters(tmp_path: Path) -> None:
    base = small_base("dit", tmp_path)
    adapters = adapters_for(base)
    with pytest.raises(AdapterError, match="attach"):
        adapters.set_gradient_checkpointing(True)
    Student(base, adapters, gradient_checkpointing=True)
    assert base.denoiser.is_gradient_checkpointing
    adapters.remove()
    assert not base.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize(("family", "kind"), [("dit", "modulated"), ("sdxl", "cross-attention")])
def test_training_on_a_bfloat16_base_equals_float32(tmp_path: Path, family: str, kind: str) -> None:
    """Of the same store, collected in float32: the losses agree to bfloat16's rounding, and the adapters stay float32."""
    base = small_base(family, tmp_path)
    store = small_store(base, tmp_path / "store", 16)
    settings = TrainingSettings(num_steps=10, batch_size=16, learning_rate=1e-2)  # every step sees the whole store
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        adapters = AdapterSet.create(base.to(dtype=dtype), kind, hidden_size=8)
        losses.append([state.loss for state in train(base, adapters, store, settings)])
        assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
        assert base.dtype == dtype
        adapters.remove()
    assert losses[1] == pytest.approx(losses[0], rel=0.005)
    assert losses[0][0] - losses[0][-1] > 0.05 * losses[0][0]  # more than the tolerance: training went the same way


def test_gradients_are_gone_before_the_next_forward_pass(tmp_path: Path) -> None:
    base = small_base("dit", tmp_path)
    adapters, store = AdapterSet.create(base, "offset", hidden_size=8), small_store(base, tmp_path / "store", 8)
    for _ in train(base, adapters, store, TrainingSettings(num_steps=2, batch_size=4)):
        assert all(parameter.grad is None for parameter in adapters.parameters())


def test_offloaded_models_come_to_the_device_for_a_call_and_the_denoiser_makes_room(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(dit_folder, device="meta", offload=True)
    assert base.device.type == "meta" and base.vae.device.type == "cpu"
    moves: list[str] = []
    monkeypatch.setattr(base.vae, "to", lambda place: moves.append(f"autoencoder to {place}"))
    monkeypatch.setattr(base.denoiser, "to", lambda place: moves.append(f"denoiser to {place}"))
    expected = ["denoiser to cpu", "autoencoder to meta", "autoencoder to cpu", "denoiser to meta"]
    base.decode(torch.zeros(1, *base.latent_shape))
    assert moves == expected
    with pytest.raises(RuntimeError):
        base.decode(torch.zeros(1, 7, 8, 8))
    assert moves == expected * 2  # also when the call fails
    denoiser = base.denoiser
    with base._on_device(base.vae):
        base.denoiser = torch.nn.Linear(1, 1)  # as if it had really gone to the computer's memory
        assert base.device.type == "meta"  # where the work is done, wherever the denoiser waits
        base.denoiser = denoiser
        base.decode(torch.zeros(1, *base.latent_shape))
    assert base._home is None
    nested = ["denoiser to cpu", "autoencoder to meta", "autoencoder to meta", "autoencoder to cpu"]
    assert moves[8:] == [*nested, "autoencoder to cpu", "denoiser to meta"]  # the patched moves move nothing

    text = small_base("sdxl", tmp_path)
    encoders = [text.pipeline.text_encoder, text.pipeline.text_encoder_2]
    seen: list[int] = []
    monkeypatch.setattr(text, "_on_device", lambda *models: _noted(seen, len(models), encoders == list(models)))
    text.encode(["a hat"])
    text.decode(torch.zeros(1, *text.latent_shape))
    assert seen == [2, 1]


def test_without_offload_the_denoiser_stays(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(dit_folder, device="meta", offload=True)
    base.offload = False  # as somebody has it who moves the models by hand
    moves: list[str] = []
    monkeypatch.setattr(base.vae, "to", lambda place: moves.append(f"autoencoder to {place}"))
    monkeypatch.setattr(base.denoiser, "to", lambda place: moves.append(f"denoiser to {place}"))
    base.decode(torch.zeros(1, *base.latent_shape))
    assert moves == ["autoencoder to meta", "autoencoder to cpu"]


def test_images_are_decoded_a_million_pixels_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_base("sd", tmp_path)
    latents = torch.randn((7, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    whole = base.decode(latents)
    pixels = whole.shape[-1] * whole.shape[-2]
    assert base.images_at_once == 2**20 // pixels
    monkeypatch.setattr(type(base), "images_at_once", 3)
    chunks: list[int] = []
    handle = base.vae.decoder.register_forward_pre_hook(lambda module, args: chunks.append(len(args[0])))
    torch.testing.assert_close(base.decode(latents), whole, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert chunks == [3, 3, 1]


@contextmanager
def _noted(seen: list[int], count: int, are_encoders: bool) -> Iterator[None]:
    assert are_encoders == (count == 2)
    seen.append(count)
    yield
