"""What adapters compute once for all steps of a sampling run: the same guidance as step by step, never stale, cheap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from full_size_models import narrow
from small_models import randomise
from small_text_models import build_sd_pipeline, build_sdxl_pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agd_lib import AGD, AdapterSet, GuidanceInterval, Unguided, attach, base_from_pipeline, load_agd, load_base, sample
from agd_lib.adapters import ADAPTERS, CrossAttentionAdapter
from agd_lib.attach import find_adapters
from agd_lib.base_models import BaseModel, Condition, DiTBase, SamplingRun
from agd_lib.guidance import Guidance, Scale
from agd_lib.project import ROOT

# diffusers 0.42.1 on NumPy 2, in EulerDiscreteScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

KINDS = list(ADAPTERS)
STEPS = 6
PROMPTS = ["red cat", "a hat on", ""]


def trained(base: BaseModel, kind: str, seed: int = 7) -> AdapterSet:
    """Adapters with random weights, as if trained."""
    adapters = AdapterSet.create(base, kind, hidden_size=8, guidance_range=(1.0, 8.0))
    randomise(adapters, seed)
    return adapters


@pytest.fixture(params=["dit", "sd", "sdxl"])
def base(request: pytest.FixtureRequest, dit_folder: Path, tmp_path: Path) -> BaseModel:
    """A small base model of every architecture."""
    if request.param == "dit":
        return load_base(dit_folder)
    return base_from_pipeline({"sd": build_sd_pipeline, "sdxl": build_sdxl_pipeline}[request.param](tmp_path))


def conditions_of(base: BaseModel) -> Condition:
    return base.encode([0, 2, 4] if isinstance(base, DiTBase) else PROMPTS)


@dataclass(frozen=True)
class StepByStep:
    """AGD that computes nothing ahead."""

    adapters: AdapterSet
    scale: Scale

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        run, base.run = base.run, None
        try:
            return AGD(self.adapters, self.scale).predict(base, latents, timestep, condition)
        finally:
            base.run = run


def final(base: BaseModel, guidance: Guidance, steps: int = STEPS) -> Tensor:
    """Three samples, (3, 4, 8, 8)."""
    *_, last = sample(base, conditions_of(base), guidance, steps, seeds=[1, 2, 3])
    return last.next_latents


def count_computations(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows (steps times samples) of every time that the adapters' conditions are computed from now on."""
    rows: list[int] = []
    original = base.adapter_inputs
    monkeypatch.setattr(base, "adapter_inputs", lambda *args: (rows.append(args[2].numel()), original(*args))[1])
    return rows


# The same as step by step -----------------------------------------------------------------------------------------------


def check_equal_to_step_by_step(base: BaseModel, adapters: AdapterSet, scale: Scale, steps: int = STEPS) -> None:
    ahead = final(base, AGD(adapters, scale), steps)
    expected = final(base, StepByStep(adapters, scale), steps)
    torch.testing.assert_close(ahead, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert torch.equal(final(base, AGD(adapters, scale), steps), ahead)
    assert (expected - final(base, Unguided(), steps)).std() > 0.01 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_base(base: BaseModel, kind: str) -> None:
    check_equal_to_step_by_step(base, trained(base, kind).attach(base), 3.0)


SCALES: dict[str, Scale] = {
    "per sample": torch.tensor([1.5, 3.0, 6.0]),
    "interval": GuidanceInterval(4.0, 300, 700),
    "schedule": lambda timestep: 1 + timestep / 250,
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_scale(dit_base: DiTBase, kind: str, scale: Scale) -> None:
    check_equal_to_step_by_step(dit_base, trained(dit_base, kind).attach(dit_base), scale)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_every_scheduler(dit_base: DiTBase, monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> None:
    """Euler's timesteps have fractions, Heun's come twice, DPM-Solver's steps are of second order."""
    dit_base.scheduler = scheduler.from_config(dit_base.scheduler.config)
    for kind in ("offset", "cross-attention"):
        adapters = trained(dit_base, kind).attach(dit_base)
        check_equal_to_step_by_step(dit_base, adapters, lambda timestep: 1 + timestep / 250)
        rows = count_computations(dit_base, monkeypatch)
        final(dit_base, AGD(adapters, 3.0))
        assert rows == [STEPS * 3]
        adapters.remove()


@pytest.mark.parametrize(("limit", "rows"), [(256, [18]), (17, [15, 3]), (7, [6, 6, 6]), (1, [3] * 6)])
def test_few_rows_at_a_time(dit_base: DiTBase, monkeypatch: pytest.MonkeyPatch, limit: int, rows: list[int]) -> None:
    adapters = trained(dit_base, "cross-attention").attach(dit_base)
    expected = final(dit_base, AGD(adapters, 3.0))
    monkeypatch.setattr(attach, "ROWS_AHEAD", limit)
    computed = count_computations(dit_base, monkeypatch)
    torch.testing.assert_close(final(dit_base, AGD(adapters, 3.0)), expected, rtol=1e-4, atol=1e-4)
    assert computed == rows


@pytest.mark.parametrize("limit", [256, 7, 1])
def test_keys_and_values_of_the_prompts_are_computed_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    base = base_from_pipeline(build_sd_pipeline(tmp_path))
    adapters = trained(base, "cross-attention").attach(base)
    expected = final(base, AGD(adapters, 3.0))
    monkeypatch.setattr(attach, "ROWS_AHEAD", limit)
    computed: list[int] = []
    for adapter in adapters.adapters.values():
        assert isinstance(adapter, CrossAttentionAdapter) and adapter.prompt_proj is not None
        adapter.prompt_proj.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    found = final(base, AGD(adapters, 3.0))
    assert computed == [len(PROMPTS)] * len(adapters.adapters)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    final(base, AGD(adapters, lambda timestep: 1 + timestep / 250))  # another run
    assert computed == [len(PROMPTS)] * 2 * len(adapters.adapters)


def test_untrained_adapters_change_nothing_to_the_bit(base: BaseModel) -> None:
    unguided = final(base, Unguided())
    for kind in KINDS:
        adapters = AdapterSet.create(base, kind, hidden_size=8).attach(base)
        assert torch.equal(final(base, AGD(adapters, 4.0)), unguided)
        adapters.remove()
        assert torch.equal(final(base, Unguided()), unguided)


def test_lower_precision(base: BaseModel) -> None:
    """The prompt's tokens are rounded anew for every step: equal tokens are known as such."""
    base.to(dtype=torch.bfloat16)
    for kind in KINDS:
        adapters = trained(base, kind).attach(base)
        ahead, expected = (
            final(base, guidance).float() for guidance in (AGD(adapters, 3.0), StepByStep(adapters, 3.0))
        )
        assert (ahead - expected).std() < 0.1 * expected.std()
        adapters.remove()


def test_in_inference_mode(dit_base: DiTBase) -> None:
    with torch.inference_mode():
        check_equal_to_step_by_step(dit_base, trained(dit_base, "modulated").attach(dit_base), 3.0)


def test_a_pipeline_that_starts_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image to image: the last timesteps of the scheduler alone."""
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(build_sd_pipeline(tmp_path))
    base = base_from_pipeline(build_sd_pipeline(tmp_path / "same"))
    adapters = trained(base, "cross-attention")
    rows: list[int] = []
    original = type(base).adapter_inputs
    monkeypatch.setattr(type(base), "adapter_inputs", lambda *args: (rows.append(args[3].numel()), original(*args))[1])
    call = {"image": torch.full((1, 3, 64, 64), 0.5), "num_inference_steps": 10, "output_type": "latent"}

    def run() -> Tensor:
        images: Tensor = pipe("red cat", **call, strength=0.4, generator=torch.Generator().manual_seed(1)).images
        return images

    load_agd(pipe, adapters)
    ahead = run()
    assert rows == [4]
    assert torch.equal(run(), ahead)
    monkeypatch.setattr(
        attach.AdapterSet,
        "_look_up",
        lambda self, t, c, run: {
            site: tuple(part[0] for part in parts)
            for site, parts in self._compute(torch.tensor([[t]]), c, self._scales([t], 1)).items()
        },
    )
    torch.testing.assert_close(run(), ahead, rtol=1e-4, atol=1e-4)


# Never stale --------------------------------------------------------------------------------------------------------------


def train_a_step(adapters: AdapterSet) -> None:
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.1)
    for parameter in adapters.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def other_weights(adapters: AdapterSet) -> dict[str, Tensor]:
    other = copy.deepcopy(adapters)
    randomise(other, 8)
    return other.state_dict()


CHANGES: dict[str, Callable[[AdapterSet], Any]] = {
    "trained": train_a_step,
    "loaded": lambda adapters: adapters.load_state_dict(other_weights(adapters)),
    "assigned": lambda adapters: adapters.load_state_dict(other_weights(adapters), assign=True),
    "rounded": lambda adapters: adapters.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_adapters_between_and_within_runs(
    dit_base: DiTBase, kind: str, change: Callable[[AdapterSet], Any]
) -> None:
    adapters = trained(dit_base, kind)
    changed = copy.deepcopy(adapters)
    change(changed)
    condition, guidance = conditions_of(dit_base), AGD(adapters.attach(dit_base), 3.0)
    before = final(dit_base, guidance)
    steps = sample(dit_base, condition, guidance, STEPS, seeds=[1, 2, 3])
    next(steps)
    change(adapters)
    second = next(steps)
    after = final(dit_base, guidance)
    adapters.remove()
    expected = final(dit_base, AGD(changed.attach(dit_base), 3.0))
    assert torch.equal(after, expected) and not torch.allclose(after, before, atol=1e-3)
    prediction = AGD(changed, 3.0).predict(dit_base, second.latents, second.timestep, condition)
    torch.testing.assert_close(second.prediction, prediction.detach(), rtol=1e-3, atol=1e-3)


def test_changed_base_between_runs(dit_base: DiTBase) -> None:
    """The adapters see the base's own embeddings."""
    adapters = trained(dit_base, "offset").attach(dit_base)
    before = final(dit_base, AGD(adapters, 3.0))
    with torch.no_grad():
        for block in dit_base.denoiser.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_2.bias.add_(0.5)
    after = final(dit_base, AGD(adapters, 3.0))
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, final(dit_base, StepByStep(adapters, 3.0)), rtol=1e-3, atol=1e-3)


def test_changed_scale_and_condition_within_a_run(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, condition = trained(base, "cross-attention").attach(base), conditions_of(base)
    name = next(iter(condition))
    latents = torch.randn(3, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    scale, run, rows = torch.tensor([2.0, 3.0, 4.0]), SamplingRun(base.scheduler), count_computations(base, monkeypatch)

    @torch.no_grad()
    def check(guidance: AGD, condition: Condition, computed: bool) -> None:
        rows.clear()
        with base.running(run):
            prediction = guidance.predict(base, latents, 500, condition)
        assert bool(rows) == computed
        torch.testing.assert_close(prediction, guidance.predict(base, latents, 500, condition), rtol=1e-3, atol=1e-3)

    check(AGD(adapters, scale), condition, computed=True)
    check(AGD(adapters, scale), condition, computed=False)
    check(AGD(adapters, scale.clone()), {key: value.clone() for key, value in condition.items()}, computed=False)
    scale[1] = 6.0
    check(AGD(adapters, scale), condition, computed=True)
    condition[name][0] = condition[name][1]
    check(AGD(adapters, scale), condition, computed=True)
    check(AGD(adapters, 6.0), condition, computed=True)
    check(AGD(adapters, 6.0), condition, computed=False)
    check(AGD(adapters, lambda timestep: 2.0), condition, computed=True)


def test_timesteps_that_the_scheduler_does_not_have(dit_base: DiTBase) -> None:
    adapters, condition = trained(dit_base, "modulated").attach(dit_base), conditions_of(dit_base)
    scheduler = copy.deepcopy(dit_base.scheduler)
    scheduler.set_timesteps(4)
    latents = torch.randn(3, *dit_base.latent_shape, generator=torch.Generator().manual_seed(0))
    for timestep in (3.5, 123, torch.tensor([10, 400, 999])):  # the last: one for each sample
        with torch.no_grad(), adapters.guided_by(3.0):
            expected = dit_base.denoise(latents, timestep, condition)
            with dit_base.running(SamplingRun(scheduler)):
                torch.testing.assert_close(
                    dit_base.denoise(latents, timestep, condition), expected, rtol=1e-4, atol=1e-4
                )


def test_gradients_flow_within_a_run_too(dit_base: DiTBase) -> None:
    adapters, condition = trained(dit_base, "cross-attention").attach(dit_base), conditions_of(dit_base)
    latents, run = torch.zeros(3, *dit_base.latent_shape), SamplingRun(dit_base.scheduler)
    gradients = []
    for _ in range(2):
        with adapters.guided_by(3.0):
            if gradients:
                with dit_base.running(run):
                    with torch.no_grad():
                        dit_base.denoise(latents, 500, condition)
                    loss = dit_base.denoise(latents, 500, condition).square().mean()
            else:
                loss = dit_base.denoise(latents, 500, condition).square().mean()
        gradients.append(torch.autograd.grad(loss, list(adapters.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_nothing_is_kept_after_a_run(dit_base: DiTBase) -> None:
    adapters = trained(dit_base, "offset").attach(dit_base)
    final(dit_base, AGD(adapters, 3.0))
    assert dit_base.run is None and adapters._conditions is None and adapters._call is None


# What it costs ----------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts tensor operations. Views, which compute nothing, do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (operation.is_view or operation is torch.ops.aten._unsafe_view.default)
        return operation(*args, **kwargs or {})


def added_operations(base: BaseModel, adapters: AdapterSet, condition: Condition, steps: int) -> float:
    """Share of the operations of a whole unguided run that the adapters add."""
    counts = []
    seeds = range(len(next(iter(condition.values()))))
    for guidance in (Unguided(), AGD(adapters, 3.0)):
        with Operations() as operations:
            *_, last = sample(base, condition, guidance, steps, seeds=seeds)
        counts.append(operations.count)
    assert torch.isfinite(last.next_latents).all()
    return counts[1] / counts[0] - 1


@pytest.mark.parametrize(("kind", "limit"), [("offset", 0.10), ("cross-attention", 0.25), ("modulated", 0.20)])
def test_operations_on_tiny_dit(tmp_path: Path, kind: str, limit: float) -> None:
    base = load_base("tiny-dit")
    adapters = AdapterSet.from_pretrained(find_adapters(base, tmp_path, kind)).attach(base)
    assert added_operations(base, adapters, base.encode([0] * 8), steps=20) <= limit


@pytest.mark.parametrize(("kind", "limit"), [("offset", 0.10), ("cross-attention", 0.25), ("modulated", 0.25)])
def test_operations_on_small_models(base: BaseModel, kind: str, limit: float) -> None:
    """Of the small models SDXL's has the most adapters for its operations, as the true one has."""
    assert added_operations(base, trained(base, kind).attach(base), conditions_of(base), steps=20) <= limit


@pytest.mark.parametrize(("name", "model"), [("dit-xl-2-256", "DiT-XL/2"), ("sd21", "SD 2.1"), ("sdxl", "SDXL")])
def test_operations_in_as_many_blocks_as_the_papers_models_have(name: str, model: str) -> None:
    """Twenty steps with adapters that see everything; the width of a layer does not change how many operations it takes."""
    base = narrow(name)
    base.null_condition = base.blank_condition  # type: ignore[method-assign]  # there is no text encoder
    shares = []
    for kind, limit in (("offset", 0.10), ("cross-attention", 0.25), ("modulated", 0.25)):
        adapters = AdapterSet.create(base, kind, 8).attach(base)
        shares.append(added_operations(base, adapters, base.blank_condition(2), steps=20))
        adapters.remove()
        assert shares[-1] <= limit, kind
    row = f"| {model} | " + " | ".join(f"+{share:.1%}" for share in shares) + " |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8"), row
