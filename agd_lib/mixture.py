"""A toy world in which guidance is exact: Gaussian mixtures in the plane, with classes, noised in closed form.

A Gaussian mixture that is noised is a Gaussian mixture, so densities and scores are known at every noise level, with
and without the class, and nothing has to be learned: what is seen here is guidance itself and no network's error.

Noise levels are times t from 0 (data) to 1 (noise), variance preserving::

    x_t = cos(pi t / 2) x_0 + sin(pi t / 2) noise
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import cfg_combine

MAX_TIME = 0.995
"""Where paths start: so close to pure noise (0.006 % of the signal's power is left) that N(0, I) is the right start."""


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of K Gaussians in D dimensions, each belonging to a class.

    Attributes:
        weights: (K,), positive, sum 1.
        means: (K, D).
        covariances: (K, D, D), symmetric positive definite.
        labels: (K,) int64, the class of each component.

    Raises:
        ValueError: if the shapes do not fit or the weights are no distribution.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count, size = self.means.shape
        shapes = tuple(self.weights.shape), tuple(self.covariances.shape), tuple(self.labels.shape)
        if shapes != ((count,), (count, size, size), (count,)):
            raise ValueError(
                f"got weights, covariances, labels of shapes {shapes}, expected ({count},), ({count}, {size}, {size}), "
                f"({count},) for means {tuple(self.means.shape)}"
            )
        if bool((self.weights <= 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-5:
            raise ValueError(f"got weights {self.weights.tolist()}, expected positive numbers with sum 1")

    @property
    def num_classes(self) -> int:
        """Number of distinct classes."""
        return len(self.labels.unique())

    def given(self, label: int) -> GaussianMixture:
        """The class-conditional distribution p(x | label): the components of one class, weights renormalised.

        Raises:
            ValueError: if no component has this label.
        """
        mine = self.labels == label
        if not bool(mine.any()):
            raise ValueError(f"got class {label}, expected one of: {self.labels.unique().tolist()}")
        weights = self.weights[mine]
        return GaussianMixture(weights / weights.sum(), self.means[mine], self.covariances[mine], self.labels[mine])

    def noised(self, time: float) -> GaussianMixture:
        """The distribution of x_t: each mean shrunk by cos(pi t / 2), sin(pi t / 2)^2 I added to each covariance.

        Raises:
            ValueError: if ``time`` is not in [0, 1].
        """
        if not 0 <= time <= 1:
            raise ValueError(f"got time {time}, expected a number from 0 (data) to 1 (noise)")
        signal, noise = math.cos(math.pi * time / 2), math.sin(math.pi * time / 2)
        identity = torch.eye(self.means.shape[1], dtype=self.means.dtype)
        return GaussianMixture(
            self.weights, signal * self.means, signal**2 * self.covariances + noise**2 * identity, self.labels
        )

    def log_density(self, points: Tensor) -> Tensor:
        """log p(x) at points (..., D) -> (...,)."""
        return torch.logsumexp(self._joint(points)[0], dim=-1)

    def score(self, points: Tensor) -> Tensor:
        """grad log p(x) at points (..., D) -> (..., D).

        The mean of the components' own scores ``-C_k^-1 (x - m_k)``, weighted by how likely x came from each.
        """
        joint, scores = self._joint(points)
        return (torch.softmax(joint, dim=-1)[..., None] * scores).sum(dim=-2)

    def _joint(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """``log(weight_k N(x; m_k, C_k))`` (..., K) and ``grad log N(x; m_k, C_k)`` (..., K, D)."""
        precision = torch.linalg.inv(self.covariances)  # (K, D, D)
        difference = points[..., None, :] - self.means  # (..., K, D)
        scores = -torch.einsum("kij,...kj->...ki", precision, difference)
        log_normaliser = -0.5 * (self.means.shape[1] * math.log(2 * math.pi) + torch.logdet(self.covariances))
        return self.weights.log() + log_normaliser + 0.5 * (difference * scores).sum(dim=-1), scores

    def log_posterior(self, label: int, points: Tensor) -> Tensor:
        """log p(label | x) at points (..., D) -> (...,), by Bayes' rule: what a perfect classifier would say."""
        log_prior = self.weights[self.labels == label].sum().log()
        return log_prior + self.given(label).log_density(points) - self.log_density(points)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Draw points (count, D)."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        root = torch.linalg.cholesky(self.covariances)[component]  # (count, D, D)
        return self.means[component] + torch.einsum("nij,nj->ni", root, noise)

    def mean(self) -> Tensor:
        """E[x], (D,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Cov[x], (D, D): the components' own covariances and the spread of their means."""
        centred = self.means - self.mean()
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + between

    def density_level(self, mass: float = 0.95, count: int = 20_000, seed: int = 0) -> float:
        """The log density whose super-level set holds a share ``mass`` of the distribution, estimated from samples."""
        return float(torch.quantile(self.log_density(self.sample(count, seed)), 1 - mass))


def pinwheel(num_classes: int = 3, num_components: int = 7) -> GaussianMixture:
    """Classes as curved arms around the origin: alike at the hub, where all arms meet, and distinct at the tips.

    Float64, mean zero, about unit variance in every direction.
    """
    along, across = 0.30, 0.13  # standard deviations of a component along and across its arm
    means, covariances, labels = [], [], []
    for label in range(num_classes):
        for component in range(num_components):
            radius = 0.30 + 1.75 * component / max(1, num_components - 1)
            angle = math.pi / 2 + 2 * math.pi * label / num_classes - 0.55 * radius
            means.append([radius * math.cos(angle), radius * math.sin(angle)])
            tangent = angle - math.atan(0.55 * radius)  # the arm turns by 0.55 radians for each unit of radius
            rotation = torch.tensor(
                [[math.cos(tangent), -math.sin(tangent)], [math.sin(tangent), math.cos(tangent)]], dtype=torch.float64
            )
            spread = torch.diag(torch.tensor([along**2, across**2], dtype=torch.float64))
            covariances.append(rotation @ spread @ rotation.T)
            labels.append(label)
    count = len(labels)
    return GaussianMixture(
        torch.full((count,), 1 / count, dtype=torch.float64),
        torch.tensor(means, dtype=torch.float64),
        torch.stack(covariances),
        torch.tensor(labels),
    )


def guided_score(conditional: GaussianMixture, unconditional: GaussianMixture, points: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on exact scores: points (..., D) -> (..., D). Both mixtures at the same noise level."""
    weight = torch.tensor(scale, dtype=points.dtype)
    return cfg_combine(unconditional.score(points), conditional.score(points), weight)


def sharpened_log_density(
    conditional: GaussianMixture, unconditional: GaussianMixture, points: Tensor, scale: float
) -> Tensor:
    """``log p(x) + w (log p(x | c) - log p(x))`` at points (..., D) -> (...,): p(x) p(c | x)^w up to a constant.

    Its gradient is :func:`guided_score`.
    """
    return torch.lerp(
        unconditional.log_density(points), conditional.log_density(points), torch.tensor(scale, dtype=points.dtype)
    )


def guided_paths(
    conditional: GaussianMixture,
    unconditional: GaussianMixture,
    scale: float,
    start: Tensor,
    num_steps: int = 100,
) -> tuple[Tensor, Tensor]:
    """Follow the probability-flow equation from noise to data along the guided score, with fourth-order Runge-Kutta.

    With ``phi = pi t / 2`` the flow is ``dx / dphi = -tan(phi) (x + score)``. At scale 1 it carries N(0, I) to the
    conditional distribution, at scale 0 to the unconditional one.

    Args:
        conditional, unconditional: the clean distributions (they are noised here).
        start: x at time :data:`MAX_TIME`, (N, D), standard normal.

    Returns:
        ``times`` (num_steps + 1,) from ``MAX_TIME`` to 0 and ``paths`` (num_steps + 1, N, D).
    """

    def slope(time: float, points: Tensor) -> Tensor:
        """dx / dt at time t."""
        score = guided_score(conditional.noised(time), unconditional.noised(time), points, scale)
        return -math.pi / 2 * math.tan(math.pi * time / 2) * (points + score)

    times = torch.linspace(MAX_TIME, 0, num_steps + 1, dtype=torch.float64)
    points, paths = start, [start]
    for time, after in zip(times.tolist(), times[1:].tolist()):
        step = after - time
        middle = time + step / 2
        first = slope(time, points)
        second = slope(middle, points + step / 2 * first)
        third = slope(middle, points + step / 2 * second)
        fourth = slope(after, points + step * third)
        points = points + step / 6 * (first + 2 * second + 2 * third + fourth)
        paths.append(points)
    return times, torch.stack(paths)
