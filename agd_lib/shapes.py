"""The offline data set: procedurally drawn, captioned shapes.

Every image shows one shape of one of 20 classes. Within a class the colour, the size, the place, the rotation
and the background vary, so a generator that has only learned class averages does not pass for a good one.
An image is a pure function of ``(seed, index)``: no files, no download, the same pixels on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

IMAGE_SIZE = 32
"""Side of the square images, in pixels."""

SHAPES: tuple[str, ...] = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "plus",
    "star",
    "crescent",
    "heart",
    "arrow",
    "corner",
    "tee",
    "half disc",
    "ellipse",
    "bar",
    "equals sign",
    "zigzag",
    "arch",
    "three dots",
    "pie",
)
"""The class names, in the order of the class labels 0 to 19."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 210, 40),
    "green": (60, 170, 70),
    "cyan": (50, 190, 200),
    "blue": (50, 90, 215),
    "purple": (140, 60, 185),
    "pink": (240, 120, 180),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
"""Colour names with their central RGB value; every drawn colour is jittered around it."""

SIZES: dict[str, tuple[float, float]] = {"small": (8.0, 9.5), "medium": (9.5, 11.5), "large": (11.5, 13.5)}
"""Size names with the range of the shape's circumscribed radius in pixels of a 32-pixel image."""

MAX_ROTATION = 0.35
"""Shapes are turned by at most so much either way, in radians (20 degrees)."""

_WIDE_SIZES: dict[str, tuple[float, float]] = {"small": (6.5, 8.0), "medium": (8.0, 10.0), "large": (10.0, 12.5)}
_SUPERSAMPLING = 4
_MIN_CONTRAST = 120.0  # Euclidean RGB distance between the shape and the nearer end of the background

Polygon = list[tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    """Everything that :func:`render` needs to draw one image.

    Attributes:
        label: class label, an index into :data:`SHAPES`.
        colour, background: names in :data:`COLOURS`.
        size: name in :data:`SIZES`.
        radius: circumscribed radius in pixels (32-pixel image).
        x, y: centre in pixels.
        rotation: in radians.
        foreground_rgb, background_rgb: jittered colours; the background is a linear gradient between its two ends.
        gradient_angle: direction of the gradient, in radians.
    """

    label: int
    colour: str
    background: str
    size: str
    radius: float
    x: float
    y: float
    rotation: float
    foreground_rgb: tuple[float, float, float]
    background_rgb: tuple[tuple[float, float, float], tuple[float, float, float]]
    gradient_angle: float

    @property
    def shape(self) -> str:
        """Name of the shape."""
        return SHAPES[self.label]

    @property
    def place(self) -> str:
        """One of nine places, such as ``"top left"`` or ``"centre"``."""
        row = "top" if self.y < 14.5 else "bottom" if self.y > 17.5 else ""
        column = "left" if self.x < 14.5 else "right" if self.x > 17.5 else ""
        return f"{row} {column}".strip() or "centre"

    @property
    def caption(self) -> str:
        """The scene in words, such as ``"a large red ring, top left, on a blue background"``."""
        article = "an" if self.size[0] in "aeiou" else "a"
        return f"{article} {self.size} {self.colour} {self.shape}, {self.place}, on a {self.background} background"


def _arc(radius: float, start: float, stop: float, count: int = 48, x: float = 0.0, y: float = 0.0) -> Polygon:
    angles = np.linspace(start, stop, count)
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _regular(points: int, radius: float = 1.0) -> Polygon:
    return _arc(radius, -math.pi / 2, 1.5 * math.pi, points + 1)[:-1]


@cache
def _outline(shape: str) -> tuple[tuple[Polygon, bool], ...]:
    """The shape as polygons within the unit circle; ``False`` marks a polygon that is cut out again."""
    tau = 2 * math.pi
    disc = _arc(1, 0, tau)
    square = [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    outlines: dict[str, list[tuple[Polygon, bool]]] = {
        "disc": [(disc, True)],
        "ring": [(disc, True), (_arc(0.55, 0, tau), False)],
        "square": [(square, True)],
        "frame": [(square, True), ([(0.55 * x, 0.55 * y) for x, y in square], False)],
        "triangle": [(_regular(3), True)],
        "plus": [
            ([(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)], True),
            ([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)], True),
        ],
        "star": [([p for pair in zip(_regular(5), _turn(_regular(5, 0.42), math.pi / 5)) for p in pair], True)],
        "crescent": [(disc, True), (_arc(0.82, 0, tau, x=0.5), False)],
        "heart": [
            (
                [
                    (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) / 16)
                    for a in np.linspace(0, tau, 60)
                ],
                True,
            )
        ],
        "arrow": [
            ([(0, -1), (0.8, -0.1), (0.27, -0.1), (0.27, 1), (-0.27, 1), (-0.27, -0.1), (-0.8, -0.1)], True),
        ],
        "corner": [([(-0.75, -0.85), (-0.2, -0.85), (-0.2, 0.3), (0.75, 0.3), (0.75, 0.85), (-0.75, 0.85)], True)],
        "tee": [
            ([(-0.9, -0.8), (0.9, -0.8), (0.9, -0.25), (-0.9, -0.25)], True),
            ([(-0.28, -0.3), (0.28, -0.3), (0.28, 0.95), (-0.28, 0.95)], True),
        ],
        "half disc": [(_arc(1, 0, math.pi, y=-0.45), True)],
        "ellipse": [([(x, 0.55 * y) for x, y in disc], True)],
        "bar": [([(-0.97, -0.25), (0.97, -0.25), (0.97, 0.25), (-0.97, 0.25)], True)],
        "equals sign": [
            ([(-0.85, -0.65), (0.85, -0.65), (0.85, -0.2), (-0.85, -0.2)], True),
            ([(-0.85, 0.2), (0.85, 0.2), (0.85, 0.65), (-0.85, 0.65)], True),
        ],
        "zigzag": [
            (
                [
                    (-0.8, -0.8),
                    (0.3, -0.8),
                    (0.3, 0.3),
                    (0.8, 0.3),
                    (0.8, 0.8),
                    (-0.3, 0.8),
                    (-0.3, -0.3),
                    (-0.8, -0.3),
                ],
                True,
            )
        ],
        "arch": [
            (
                [
                    (-0.8, 0.8),
                    (-0.8, -0.8),
                    (0.8, -0.8),
                    (0.8, 0.8),
                    (0.32, 0.8),
                    (0.32, -0.3),
                    (-0.32, -0.3),
                    (-0.32, 0.8),
                ],
                True,
            )
        ],
        "three dots": [(_arc(0.38, 0, tau, x=x, y=y), True) for x, y in _regular(3, 0.62)],
        "pie": [([(0.0, 0.0), *_arc(1, math.pi / 4, tau - math.pi / 4)], True)],
    }
    return tuple(outlines[shape])


def _turn(polygon: Polygon, angle: float) -> Polygon:
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in polygon]


def draw_scene(seed: int, index: int, label: int | None = None, wide: bool = False) -> Scene:
    """Draw the ``index``-th scene of the data set with this ``seed``.

    Args:
        seed: names the data set; training and held-out images differ in it.
        index: number of the image, >= 0.
        label: class label to fix; by default ``index % 20``, which gives every class the same share.
        wide: draw from a wider distribution: any rotation, and sizes down to a radius of 6.5 pixels. The autoencoder
            is trained on it, so that it knows more than the generator has to draw.

    Raises:
        ValueError: if ``label`` is not a class label.
    """
    if label is None:
        label = index % len(SHAPES)
    if not 0 <= label < len(SHAPES):
        raise ValueError(f"got class label {label}, expected 0 to {len(SHAPES) - 1} ({SHAPES[0]} to {SHAPES[-1]})")
    rng = np.random.default_rng((seed, index))
    names = list(COLOURS)
    while True:
        colour, background, second = (names[i] for i in rng.integers(len(names), size=3))
        foreground, start, stop = (_jitter(COLOURS[name], rng) for name in (colour, background, second))
        # a gentle gradient keeps its colour's name
        stop = (0.6 * start[0] + 0.4 * stop[0], 0.6 * start[1] + 0.4 * stop[1], 0.6 * start[2] + 0.4 * stop[2])
        if min(math.dist(foreground, start), math.dist(foreground, stop)) >= _MIN_CONTRAST:
            break
    size = str(rng.choice(list(SIZES)))
    radius = float(rng.uniform(*(_WIDE_SIZES if wide else SIZES)[size]))
    slack = IMAGE_SIZE / 2 - radius
    x, y = (float(IMAGE_SIZE / 2 + rng.uniform(-slack, slack)) for _ in range(2))
    rotation, gradient_angle = (float(a) for a in rng.uniform(0, 2 * math.pi, size=2))
    if not wide:
        rotation = MAX_ROTATION * (rotation / math.pi - 1)
    return Scene(
        label=label,
        colour=colour,
        background=background,
        size=size,
        radius=radius,
        x=x,
        y=y,
        rotation=rotation,
        foreground_rgb=foreground,
        background_rgb=(start, stop),
        gradient_angle=gradient_angle,
    )


def _jitter(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[float, float, float]:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-22, 22, size=3), 0, 255)
    return float(r), float(g), float(b)


def coverage(shape: str, x: float, y: float, radius: float, rotation: float) -> np.ndarray:
    """The share of every pixel that a shape covers, (32, 32, 1): the anti-aliased mask of one shape.

    Args:
        shape: name in :data:`SHAPES`. x, y: centre in pixels. radius: circumscribed, in pixels. rotation: in radians.
    """
    big = IMAGE_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    for polygon, filled in _outline(shape):
        points = [
            ((x + radius * px) * _SUPERSAMPLING, (y + radius * py) * _SUPERSAMPLING)
            for px, py in _turn(polygon, rotation)
        ]
        draw.polygon(points, fill=255 if filled else 0)
    return np.asarray(mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float64)[..., None] / 255


def gradient(ends: Sequence[tuple[float, float, float]], angle: float) -> np.ndarray:
    """A linear gradient between two colours, (32, 32, 3), in the direction ``angle`` (radians)."""
    grid = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE - 0.5
    ramp = grid[None, :] * math.cos(angle) + grid[:, None] * math.sin(angle)
    start, stop = (np.asarray(rgb) for rgb in ends)
    return start + (ramp / math.sqrt(2) + 0.5)[..., None] * (stop - start)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Pixels (32, 32, 3), floats in 0..255, as an image."""
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8), mode="RGB")


def render(scene: Scene) -> Image.Image:
    """Draw a scene, anti-aliased, as a 32 x 32 RGB image."""
    covered = coverage(scene.shape, scene.x, scene.y, scene.radius, scene.rotation)
    background = gradient(scene.background_rgb, scene.gradient_angle)
    return to_image(covered * np.asarray(scene.foreground_rgb) + (1 - covered) * background)


def make_images(
    seed: int, count: int, start: int = 0, labels: Sequence[int] | None = None, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Images ``start`` to ``start + count`` of the data set with this seed; see :func:`draw_scene`.

    Returns:
        ``(images, labels)``: uint8 tensor (count, 3, 32, 32) and int64 tensor (count,).
    """
    scenes = [draw_scene(seed, start + i, None if labels is None else int(labels[i]), wide) for i in range(count)]
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return (
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([scene.label for scene in scenes], dtype=torch.int64),
    )


def iter_images(seed: int, count: int, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (B, 3, 32, 32) and labels (B,) of :func:`make_images`, in batches: memory does not grow with ``count``."""
    for start in range(0, count, batch_size):
        yield make_images(seed, min(batch_size, count - start), start)
