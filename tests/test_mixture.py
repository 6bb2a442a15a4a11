"""The 2-D toy world: its closed forms against automatic differentiation, quadrature, statistics and solved equations."""

import math

import pytest
import torch
from torch import Tensor

from agd_lib.mixture import (
    MAX_TIME,
    GaussianMixture,
    guided_paths,
    guided_score,
    pinwheel,
    sharpened_log_density,
)

TIMES = [0.0, 0.3, 0.7, 1.0]


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    """Unequal weights and anisotropic, correlated covariances, so that no term can be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(5, 2, 2, generator=generator, dtype=torch.float64) * 0.5
    return GaussianMixture(
        weights=torch.tensor([0.1, 0.3, 0.25, 0.15, 0.2], dtype=torch.float64),
        means=torch.randn(5, 2, generator=generator, dtype=torch.float64) * 1.5,
        covariances=roots @ roots.mT + 0.05 * torch.eye(2, dtype=torch.float64),
        labels=torch.tensor([0, 0, 1, 1, 2]),
    )


@pytest.fixture(scope="module")
def points() -> Tensor:
    return 2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient(function, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(points).sum(), points)
    return result


def isotropic(variance: float) -> GaussianMixture:
    eye = torch.eye(2, dtype=torch.float64)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    return GaussianMixture(one, zero, variance * eye[None], torch.tensor([0]))


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("label", [None, 0, 1, 2])
def test_score_is_the_gradient_of_the_log_density(mixture, points, time, label):
    density = (mixture if label is None else mixture.given(label)).noised(time)
    torch.testing.assert_close(density.score(points), gradient(density.log_density, points), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 7.5])
def test_guided_score_is_the_gradient_of_the_sharpened_density(mixture, points, time, scale):
    unconditional, conditional = mixture.noised(time), mixture.given(1).noised(time)
    score = guided_score(conditional, unconditional, points, scale)
    expected = gradient(lambda x: sharpened_log_density(conditional, unconditional, x, scale), points)
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)
    # Bayes' rule, the other way to write it: the unconditional score and w times the classifier's gradient.
    noised = mixture.noised(time)
    bayes = noised.score(points) + scale * gradient(lambda x: noised.log_posterior(1, x), points)
    torch.testing.assert_close(score, bayes, rtol=1e-8, atol=1e-8)


def test_guided_score_against_a_closed_form(points):
    """Two zero-mean Gaussians of variance 1 and 1/4: the guided score is -(1 - w + 4 w) x."""
    for scale in (0.0, 1.0, 2.5, 6.0):
        score = guided_score(isotropic(0.25), isotropic(1.0), points, scale)
        torch.testing.assert_close(score, -(1 + 3 * scale) * points)


@pytest.mark.parametrize("time", TIMES)
def test_scale_one_is_the_conditional_field_and_zero_the_unconditional(mixture, points, time):
    unconditional, conditional = mixture.noised(time), mixture.given(2).noised(time)
    one, zero = (guided_score(conditional, unconditional, points, scale) for scale in (1.0, 0.0))
    torch.testing.assert_close(one, conditional.score(points), rtol=1e-12, atol=1e-12)
    assert torch.equal(zero, unconditional.score(points))
    assert (one - zero).abs().max() > (1e-4 if time < 1 else -1)  # the two fields differ, so the test can fail


def test_densities_integrate_to_one_and_posteriors_sum_to_one(mixture, points):
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    cell = float(axis[1] - axis[0]) ** 2
    for density in (mixture, mixture.given(0), mixture.noised(0.4)):
        assert float(density.log_density(grid).exp().sum() * cell) == pytest.approx(1, abs=1e-4)
    posteriors = torch.stack([mixture.log_posterior(label, points).exp() for label in range(3)])
    torch.testing.assert_close(posteriors.sum(dim=0), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("label", [None, 0])
def test_samples_have_the_mean_and_covariance_of_the_mixture(mixture, label):
    density = mixture if label is None else mixture.given(label)
    samples = density.sample(50_000, seed=3)
    error = 5 * float(density.covariance().diagonal().max() / 50_000) ** 0.5  # five standard errors of the mean
    assert (samples.mean(dim=0) - density.mean()).abs().max() < error
    assert (torch.cov(samples.T) - density.covariance()).abs().max() < 0.02 * float(density.covariance().norm())
    # The tolerance would catch the usual mistakes: equal weights, or the means' spread forgotten.
    assert (density.means.mean(dim=0) - density.mean()).abs().max() > 3 * error
    within = torch.einsum("k,kij->ij", density.weights, density.covariances)
    assert (within - density.covariance()).abs().max() > 0.1 * float(density.covariance().norm())


def test_noised_mixture_describes_noised_samples(mixture):
    clean, time = mixture.sample(50_000, seed=4), 0.4
    noise = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noised = math.cos(math.pi * time / 2) * clean + math.sin(math.pi * time / 2) * noise
    density = mixture.noised(time)
    assert (noised.mean(dim=0) - density.mean()).abs().max() < 0.02
    assert (torch.cov(noised.T) - density.covariance()).abs().max() < 0.02 * float(density.covariance().norm())
    assert mixture.noised(1.0).score(clean) == pytest.approx(-clean)  # pure noise: N(0, I)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guided_paths_solve_the_flow(scale):
    """For two zero-mean isotropic Gaussians the guided flow has a solution in closed form.

    With y = x / cos(phi) and s = tan(phi): y is proportional to (v_u + s^2)^((1 - w) / 2) (v_c + s^2)^(w / 2).
    """
    conditional, unconditional = isotropic(0.04), isotropic(0.8)
    start = torch.randn(8, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    times, paths = guided_paths(conditional, unconditional, scale, start)

    def solution(time: Tensor) -> Tensor:
        s2 = torch.tan(math.pi * time / 2) ** 2
        return torch.cos(math.pi * time / 2) * (0.8 + s2) ** ((1 - scale) / 2) * (0.04 + s2) ** (scale / 2)

    expected = start * (solution(times) / solution(times[0]))[:, None, None]
    assert times[0] == MAX_TIME and times[-1] == 0
    torch.testing.assert_close(paths, expected, rtol=1e-3, atol=1e-3)


def test_scale_one_flows_to_the_class_and_a_larger_scale_leaves_it():
    mixture = pinwheel()
    arm = mixture.given(0)
    start = torch.randn(1_500, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    outside = {}
    for scale in (1.0, 7.0):
        _, paths = guided_paths(arm, mixture, scale, start, num_steps=40)
        outside[scale] = (arm.log_density(paths[-1]) < arm.density_level(0.95)).double().mean().item()
        if scale == 1.0:
            assert (paths[-1].mean(dim=0) - arm.mean()).abs().max() < 0.08
            assert (torch.cov(paths[-1].T) - arm.covariance()).abs().max() < 0.06
    assert outside[1.0] == pytest.approx(0.05, abs=0.025)  # what the region of 95 % leaves out, and no more
    assert outside[7.0] > 0.4


def test_pinwheel_classes_are_alike_but_for_a_rotation():
    mixture = pinwheel(num_classes=4, num_components=5)
    assert mixture.num_classes == 4 and len(mixture.weights) == 20
    turned = mixture.given(0).means @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(turned, mixture.given(1).means)


def test_bad_input_is_refused(mixture):
    with pytest.raises(ValueError, match=r"class 7, expected one of: \[0, 1, 2\]"):
        mixture.given(7)
    for time in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"from 0 \(data\) to 1"):
            mixture.noised(time)
    with pytest.raises(ValueError, match="sum 1"):
        GaussianMixture(mixture.weights * 2, mixture.means, mixture.covariances, mixture.labels)
    with pytest.raises(ValueError, match=r"expected \(5,\)"):
        GaussianMixture(mixture.weights[:4], mixture.means, mixture.covariances, mixture.labels)
