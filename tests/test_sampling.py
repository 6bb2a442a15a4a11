"""The sampler: equality with diffusers' own pipeline, the number of forward passes, seeds and batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from small_models import randomise

from agd_lib import AGD, CFG, AdapterSet, GuidanceInterval, Unguided, generate, sample
from agd_lib.base_models import DiTBase, SamplingRun, count_forwards
from agd_lib.guidance import Guidance
from agd_lib.sampling import sample_seed

# diffusers 0.42.1 on NumPy 2, in DPMSolverMultistepScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SCHEDULERS = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler]


def final_latents(base: DiTBase, labels: list[int], guidance: Guidance, steps: int = 5, **kwargs: Any) -> torch.Tensor:
    *_, last = sample(base, base.encode(labels), guidance, steps, **kwargs)
    return last.next_latents


def use_scheduler(base: DiTBase, scheduler: Any) -> None:
    base.scheduler = base.pipeline.scheduler = scheduler.from_config(base.scheduler.config)


def trained_adapters(base: DiTBase, kind: str = "offset") -> AdapterSet:
    """Adapters with random weights, which change the model's predictions."""
    adapters = AdapterSet.create(base, kind, hidden_size=8)
    randomise(adapters, 7)
    return adapters.attach(base)


# Equality with diffusers ------------------------------------------------------------------------------------------------


def run_pipeline(base: DiTBase, labels: list[int], scale: float, steps: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Images and latents (as they reach the decoder) of diffusers' own call."""
    decoded: list[torch.Tensor] = []
    original = base.vae.decode
    base.vae.decode = lambda latents: (decoded.append(latents), original(latents))[1]
    try:
        images = base.pipeline(
            labels,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
    finally:
        del base.vae.decode
    return images, decoded[0]


def steps_with_same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give stochastic schedulers the same noise whoever calls them: call k of ``step`` draws from a generator seeded k.

    ``DiTPipeline`` steps on a batch that holds each sample twice under guidance, and goes on with the first half, so
    the noise is drawn for the true batch (4 samples) and repeated. Returns the function that starts the count again.
    """
    calls = [0]

    def randn_tensor(shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        noise = torch.randn((4, *shape[1:]), generator=torch.Generator().manual_seed(calls[0]))
        return noise.repeat(shape[0] // 4, 1, 1, 1)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", randn_tensor)
    return lambda: calls.__setitem__(0, 0)


@pytest.mark.parametrize("scale", [1.0, 3.7], ids=["unguided", "cfg"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_diffusers_pipeline_to_the_bit(
    dit1000_base: DiTBase, monkeypatch: pytest.MonkeyPatch, scheduler: Any, scale: float
) -> None:
    base, labels = dit1000_base, [3, 999, 0, 417]
    use_scheduler(base, scheduler)
    restart = steps_with_same_noise(monkeypatch)
    restart()
    expected_images, expected_latents = run_pipeline(base, labels, scale, steps=6, seed=11)
    noise = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(11))
    restart()
    guidance = Unguided() if scale == 1 else CFG(scale)
    latents = final_latents(base, labels, guidance, steps=6, latents=noise)
    assert torch.equal(base.decode(latents), expected_images)
    # the pipeline divides by the scaling factor before it decodes
    assert torch.equal(latents * (1 / base.vae.config.scaling_factor), expected_latents)
    assert expected_images.std() > 0.05


def test_equals_diffusers_ddpm_without_touching_its_noise(dit1000_base: DiTBase) -> None:
    """Unguided, the pipeline's steps draw from torch's global generator, and so do ours when no seeds are given."""
    use_scheduler(dit1000_base, DDPMScheduler)
    torch.manual_seed(5)
    expected, _ = run_pipeline(dit1000_base, [3, 9], 1.0, steps=6, seed=11)
    noise = torch.randn((2, *dit1000_base.latent_shape), generator=torch.Generator().manual_seed(11))
    torch.manual_seed(5)
    latents = final_latents(dit1000_base, [3, 9], Unguided(), steps=6, latents=noise)
    assert torch.equal(dit1000_base.decode(latents), expected)


def test_pipeline_inside_guided_by_gives_agd_samples(dit1000_base: DiTBase) -> None:
    """Attached adapters also guide diffusers' own call of the base model, whether or not it is known as one run."""
    adapters = trained_adapters(dit1000_base)
    noise = torch.randn((2, *dit1000_base.latent_shape), generator=torch.Generator().manual_seed(11))
    with adapters.guided_by(4.0), dit1000_base.running(SamplingRun(dit1000_base.scheduler)):
        expected, _ = run_pipeline(dit1000_base, [3, 9], 1.0, steps=5, seed=11)
    latents = final_latents(dit1000_base, [3, 9], AGD(adapters, 4.0), latents=noise)
    assert torch.equal(dit1000_base.decode(latents), expected)
    with adapters.guided_by(4.0):
        step_by_step, _ = run_pipeline(dit1000_base, [3, 9], 1.0, steps=5, seed=11)
    torch.testing.assert_close(step_by_step, expected, rtol=1e-4, atol=1e-4)
    unguided, _ = run_pipeline(dit1000_base, [3, 9], 1.0, steps=5, seed=11)
    assert not torch.allclose(unguided, expected, atol=1e-2)


# Cost -------------------------------------------------------------------------------------------------------------------


def nfe(base: DiTBase, guidance: Guidance, steps: int = 10, seeds: tuple[int, ...] = (0, 1, 2)) -> float:
    with count_forwards(base) as meter:
        final_latents(base, [0] * len(seeds), guidance, steps, seeds=seeds)
    return meter.nfe(len(seeds))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_forward_passes_per_image(dit_base: DiTBase, scheduler: Any) -> None:
    use_scheduler(dit_base, scheduler)
    adapters = trained_adapters(dit_base)
    assert nfe(dit_base, Unguided()) == 10
    assert nfe(dit_base, CFG(4.0)) == 20
    assert nfe(dit_base, CFG(1.0)) == 10
    assert nfe(dit_base, AGD(adapters, 4.0)) == 10
    assert nfe(dit_base, AGD(adapters, torch.tensor([1.0, 2.0, 6.0]))) == 10


def test_forward_passes_inside_an_interval(dit_base: DiTBase) -> None:
    timesteps = [step.timestep for step in sample(dit_base, dit_base.encode([0]), Unguided(), 10, seeds=[0])]
    inside = sum(200 <= t <= 600 for t in timesteps)
    assert 0 < inside < 10
    assert nfe(dit_base, CFG(GuidanceInterval(4.0, 200, 600))) == 10 + inside
    adapters = trained_adapters(dit_base)
    assert nfe(dit_base, AGD(adapters, GuidanceInterval(4.0, 200, 600))) == 10


def test_interval_over_everything_is_constant_guidance(dit_base: DiTBase) -> None:
    constant = final_latents(dit_base, [0, 1], CFG(4.0), seeds=[0, 1])
    assert torch.equal(final_latents(dit_base, [0, 1], CFG(GuidanceInterval(4.0, 0, 999)), seeds=[0, 1]), constant)
    partly = final_latents(dit_base, [0, 1], CFG(GuidanceInterval(4.0, 200, 600)), seeds=[0, 1])
    assert not torch.allclose(partly, constant, atol=1e-2)


def test_agd_follows_a_schedule(dit_base: DiTBase) -> None:
    adapters = trained_adapters(dit_base)
    condition = dit_base.encode([0, 1])
    steps = list(sample(dit_base, condition, AGD(adapters, lambda timestep: 1 + timestep / 500), 4, seeds=[0, 1]))
    for step in steps:
        expected = AGD(adapters, 1 + step.timestep / 500).predict(dit_base, step.latents, step.timestep, condition)
        torch.testing.assert_close(step.prediction, expected, rtol=1e-4, atol=1e-4)


# What the generator yields ----------------------------------------------------------------------------------------------


def test_steps_form_a_chain_from_noise_to_sample(dit_base: DiTBase) -> None:
    noise = torch.randn(2, *dit_base.latent_shape, generator=torch.Generator().manual_seed(0))
    steps = list(sample(dit_base, dit_base.encode([0, 1]), CFG(2.0), 7, latents=noise))
    assert [step.index for step in steps] == list(range(7))
    assert torch.equal(steps[0].latents, noise)
    for before, after in pairwise(steps):
        assert torch.equal(before.next_latents, after.latents)
        assert before.timestep > after.timestep
    assert 0 <= steps[-1].timestep <= steps[0].timestep <= 999
    assert steps[0].prediction.shape == (2, 4, 8, 8)
    assert not steps[-1].next_latents.requires_grad


def test_ddim_step_by_its_formula(dit_base: DiTBase) -> None:
    """x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps, with x0 from x_t and eps."""
    first, second, *_ = sample(dit_base, dit_base.encode([1]), CFG(3.0), 5, seeds=[4])
    alphas = dit_base.scheduler.alphas_cumprod
    now, then = alphas[first.timestep], alphas[second.timestep]
    clean = (first.latents - (1 - now).sqrt() * first.prediction) / now.sqrt()
    expected = then.sqrt() * clean + (1 - then).sqrt() * first.prediction
    torch.testing.assert_close(first.next_latents, expected, rtol=1e-5, atol=1e-5)


def test_two_runs_side_by_side_do_not_disturb_each_other(dit_base: DiTBase) -> None:
    """Multistep schedulers keep a history; every run has a scheduler of its own."""
    use_scheduler(dit_base, DPMSolverMultistepScheduler)
    alone = final_latents(dit_base, [0], Unguided(), seeds=[0])
    one = sample(dit_base, dit_base.encode([0]), Unguided(), 5, seeds=[0])
    other = sample(dit_base, dit_base.encode([1]), Unguided(), 5, seeds=[1])
    *_, (last, _) = zip(one, other)
    assert torch.equal(last.next_latents, alone)


# Seeds and batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["unguided", "cfg", "agd"])
def test_a_sample_does_not_depend_on_its_batch(dit_base: DiTBase, scheduler: Any, kind: str) -> None:
    use_scheduler(dit_base, scheduler)
    adapters = trained_adapters(dit_base, "cross-attention")
    labels, seeds, scales = [0, 3, 3, 4], [10, 11, 12, 13], torch.tensor([1.5, 2.0, 4.0, 6.0])

    def run(rows: list[int]) -> torch.Tensor:
        guidance = {"unguided": Unguided(), "cfg": CFG(scales[rows]), "agd": AGD(adapters, scales[rows])}[kind]
        return final_latents(dit_base, [labels[i] for i in rows], guidance, seeds=[seeds[i] for i in rows])

    together = run([0, 1, 2, 3])
    assert not torch.allclose(together[1], together[2], atol=1e-2)  # same class, other noise
    for rows in ([2], [3, 1]):
        torch.testing.assert_close(run(rows), together[rows], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_seeds_reproduce_a_run_whatever_the_global_generator(dit_base: DiTBase, scheduler: Any) -> None:
    use_scheduler(dit_base, scheduler)
    torch.manual_seed(0)
    first = final_latents(dit_base, [0, 1], CFG(2.0), seeds=[5, 6])
    torch.manual_seed(1)
    assert torch.equal(final_latents(dit_base, [0, 1], CFG(2.0), seeds=[5, 6]), first)
    other = final_latents(dit_base, [0, 1], CFG(2.0), seeds=[5, 7])
    assert torch.equal(other[0], first[0]) and not torch.allclose(other[1], first[1], atol=1e-2)


def test_ddpm_noise_of_the_steps_follows_the_seed(dit_base: DiTBase) -> None:
    """From the same x_T, other generators for the steps give other samples."""
    use_scheduler(dit_base, DDPMScheduler)
    noise = torch.randn(1, *dit_base.latent_shape, generator=torch.Generator().manual_seed(0))

    def run(seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed)]
        return final_latents(dit_base, [0], Unguided(), latents=noise, generators=generators)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-2)


def test_sample_seeds_do_not_collide() -> None:
    seeds = {sample_seed(run, index) for run in range(30) for index in range(300)}
    assert len(seeds) == 30 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generate_gives_the_same_samples_in_any_batch_size(dit_base: DiTBase) -> None:
    conditions = [0, 1, 2, 3, 4, "bee", 2]
    batches = {size: list(generate(dit_base, conditions, CFG(2.0), 3, seed=9, batch_size=size)) for size in (2, 3, 100)}
    assert [len(batch) for batch in batches[3]] == [3, 3, 1]
    for size in (2, 3):
        torch.testing.assert_close(torch.cat(batches[size]), batches[100][0], rtol=1e-3, atol=1e-3)
    seeds = [sample_seed(9, i) for i in range(7)]
    expected = final_latents(dit_base, [0, 1, 2, 3, 4, 1, 2], CFG(2.0), 3, seeds=seeds)
    assert torch.equal(batches[100][0], expected)


def test_generate_refuses_one_scale_for_each_sample_of_several_batches(dit_base: DiTBase) -> None:
    scales = torch.tensor([2.0, 3.0])
    (latents,) = generate(dit_base, [0, 1], CFG(scales), 2, batch_size=2)
    assert torch.equal(
        latents, final_latents(dit_base, [0, 1], CFG(scales), 2, seeds=[sample_seed(0, i) for i in (0, 1)])
    )
    with pytest.raises(
        ValueError, match=r"shape \(2,\) for 4 samples in batches of 2: every batch would be given the same"
    ):
        next(generate(dit_base, [0, 1, 2, 3], CFG(scales), 2, batch_size=2))


# Bad arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0, "seeds": [0, 1]}, "got 0 steps, expected 1 to 1000"),
        ({"num_inference_steps": 1001, "seeds": [0, 1]}, "got 1001 steps, expected 1 to 1000"),
        ({}, "give either seeds .* or latents"),
        ({"seeds": [0, 1], "latents": torch.zeros(2, 4, 8, 8)}, "not both or neither"),
        ({"seeds": [0, 1, 2]}, "got 3 seeds for 2 conditions"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"got latents of shape \(1, 4, 8, 8\), expected \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"expected \(2, 4, 8, 8\)"),
    ],
)
def test_bad_arguments_are_refused(dit_base: DiTBase, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(sample(dit_base, dit_base.encode([0, 1]), Unguided(), **arguments))
