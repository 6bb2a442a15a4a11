"""CFG arithmetic against its closed form, scales, schedules."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch

from agd_lib import AGD, CFG, AdapterSet, GuidanceInterval, Unguided
from agd_lib.base_models import DiTBase, count_forwards
from agd_lib.guidance import cfg_combine, scale_at


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def state(dit_base: DiTBase) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Latents and condition of three samples."""
    return noise(3, *dit_base.latent_shape), dit_base.encode([0, 3, 4])


# The arithmetic ---------------------------------------------------------------------------------------------------------


def test_cfg_combine_follows_the_formula_for_every_single_value() -> None:
    unconditional, conditional, scales = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1), torch.tensor([0.0, 1.0, 3.5])
    combined = cfg_combine(unconditional, conditional, scales)
    for place in itertools.product(range(3), range(4), range(2), range(2)):
        u, c, w = unconditional[place].item(), conditional[place].item(), scales[place[0]].item()
        assert combined[place].item() == pytest.approx((1 - w) * u + w * c, abs=1e-5)
    assert torch.equal(combined[0], unconditional[0])  # scale 0: the unconditional model
    one_for_all = cfg_combine(unconditional, conditional, torch.tensor(2.0))
    torch.testing.assert_close(one_for_all, 2 * conditional - unconditional)


def test_guidance_of_gaussians_has_the_known_score() -> None:
    """With p(x|c) = N(m, 1) and p(x) = N(0, 1), the score is -(x - m) and -x: guided, that of N(w m, 1)."""
    x, mean, scale = noise(50), 0.7, 2.5
    guided = cfg_combine(-x, -(x - mean), torch.tensor(scale))
    torch.testing.assert_close(guided, -(x - scale * mean))


def test_cfg_prediction_is_made_of_two_separate_passes(dit_base: DiTBase, state: tuple) -> None:
    latents, condition = state
    scales = torch.tensor([1.0, 2.0, 6.0])
    null = {"class_labels": torch.full((3,), 5)}
    conditional, unconditional = dit_base.denoise(latents, 400, condition), dit_base.denoise(latents, 400, null)
    expected = torch.stack([(1 - w) * u + w * c for u, c, w in zip(unconditional, conditional, scales)])
    assert (conditional - unconditional).abs().max() > 0.1  # the model listens to its condition
    torch.testing.assert_close(CFG(scales).predict(dit_base, latents, 400, condition), expected, rtol=1e-4, atol=1e-4)


def test_each_sample_has_its_own_scale(dit_base: DiTBase, state: tuple) -> None:
    latents, condition = state
    together = CFG(torch.tensor([0.5, 2.0, 6.0])).predict(dit_base, latents, 400, condition)
    for row, scale in enumerate([0.5, 2.0, 6.0]):
        alone = CFG(scale).predict(dit_base, latents, 400, condition)
        assert torch.equal(together[row], alone[row])
        assert not torch.allclose(together[(row + 1) % 3], alone[(row + 1) % 3])


def test_guided_channels_leave_the_others_conditional(dit_base: DiTBase, state: tuple) -> None:
    latents, condition = state
    conditional = dit_base.denoise(latents, 400, condition)
    everything = CFG(4.0).predict(dit_base, latents, 400, condition)
    three = CFG(4.0, guided_channels=3).predict(dit_base, latents, 400, condition)
    assert torch.equal(three[:, :3], everything[:, :3])
    torch.testing.assert_close(three[:, 3:], conditional[:, 3:])
    assert not torch.allclose(everything[:, 3:], conditional[:, 3:], atol=1e-2)


# Forward passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "passes"),
    [(4.0, 2), (0.0, 2), (1.0, 1), (torch.ones(3), 1), (torch.tensor([1.0, 1.0, 1.5]), 2), (lambda timestep: 1.0, 1)],
)
def test_scale_one_leaves_out_the_unconditional_pass(
    dit_base: DiTBase, state: tuple, scale: object, passes: int
) -> None:
    latents, condition = state
    with count_forwards(dit_base) as meter:
        prediction = CFG(scale).predict(dit_base, latents, 400, condition)  # type: ignore[arg-type]
    assert meter.nfe(3) == passes
    if passes == 1:
        assert torch.equal(prediction, Unguided().predict(dit_base, latents, 400, condition))


# Scales and schedules ---------------------------------------------------------------------------------------------------


def test_scale_at_gives_one_value_per_sample_like_the_latents() -> None:
    like = torch.zeros(1, dtype=torch.float16)
    assert scale_at(4, 0, 3, like).tolist() == [4.0, 4.0, 4.0]
    assert scale_at(torch.tensor([1.0, 2.0]), 0, 2, like).tolist() == [1.0, 2.0]
    assert scale_at(lambda timestep: timestep / 100, 250, 2, like).tolist() == [2.5, 2.5]
    assert scale_at(4.01, 0, 3, like).tolist() == torch.tensor([4.01] * 3).tolist()  # in float32, whatever the latents
    assert scale_at(4, 0, 3, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_not_rounded_to_the_predictions(dtype: torch.dtype) -> None:
    """A tensor of scales gives to the bit what a Python number gives."""
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = unconditional + 4.01 * (conditional - unconditional)
    for scale in (torch.tensor(4.01), torch.full((3,), 4.01)):
        combined = cfg_combine(unconditional, conditional, scale)
        assert combined.dtype == dtype and torch.equal(combined, expected)
    if dtype == torch.bfloat16:
        assert not torch.equal(unconditional + 4.0 * (conditional - unconditional), expected)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (float("nan"), "got guidance scale nan, expected finite numbers"),
        (float("inf"), "got guidance scale inf, expected finite numbers"),
        (-0.5, "got guidance scale -0.5, expected finite numbers >= 0"),
        (torch.tensor([1.0, float("nan"), 2.0]), "expected finite numbers"),
        (torch.tensor([1.0, -1.0, 2.0]), "expected finite numbers"),
        (torch.tensor([1.0, 2.0]), r"shape \(2,\) for 3 samples, expected one number or a tensor of shape \(3,\)"),
        (torch.ones(3, 1), r"shape \(3, 1\) for 3 samples"),
        (lambda timestep: math.nan, "expected finite numbers"),
    ],
    ids=["nan", "inf", "negative", "one nan", "one negative", "too short", "two-dimensional", "schedule of nan"],
)
@pytest.mark.parametrize("kind", ["cfg", "agd"])
def test_bad_scales_are_refused(dit_base: DiTBase, state: tuple, kind: str, scale: object, message: str) -> None:
    latents, condition = state
    adapters = AdapterSet.create(dit_base, hidden_size=4).attach(dit_base)
    guidance = CFG(scale) if kind == "cfg" else AGD(adapters, scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        guidance.predict(dit_base, latents, 400, condition)
    with count_forwards(dit_base) as meter:  # the refused call leaves no guidance behind
        assert torch.equal(dit_base.denoise(latents, 400, condition), dit_base.denoise(latents, 400, condition))
    assert meter.calls == 2


def test_interval_is_closed_at_both_ends() -> None:
    interval = GuidanceInterval(3.0, 200, 600)
    assert [interval(t) for t in (0, 199, 200, 400, 600, 601, 999)] == [1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    assert GuidanceInterval(3.0, 5, 5)(5) == 3.0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_interval_refuses_bad_scales(scale: float) -> None:
    with pytest.raises(ValueError, match="got guidance scale"):
        GuidanceInterval(scale, 0, 10)


def test_interval_refuses_a_reversed_range() -> None:
    with pytest.raises(ValueError, match=r"got the interval \[600, 200\], expected low <= high"):
        GuidanceInterval(3.0, 600, 200)


# Beyond what was trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "outside"),
    [
        (6.0, False),
        (6.5, True),
        (0.5, True),
        (torch.tensor([1.0, 6.0]), False),
        (torch.tensor([1.0, 7.0]), True),
        (GuidanceInterval(5.0, 100, 200), False),
        (GuidanceInterval(9.0, 100, 200), True),
        (lambda timestep: 9.0, False),  # who knows when: the schedule is asked while it samples
        (math.nan, False),
    ],
)
def test_scales_beyond_the_training_are_warned_of(dit_base: DiTBase, scale: Any, outside: bool) -> None:
    adapters = AdapterSet.create(dit_base, guidance_range=(1.0, 6.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AGD(adapters, scale)
    assert len(caught) == outside
    assert all("trained on scales from 1 to 6" in str(w.message) and w.filename == __file__ for w in caught)
