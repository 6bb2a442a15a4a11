"""Captioned scenes: the offline data set of the text-to-image models.

A scene shows one or two objects, each with a shape, a colour and a size, at a place or in a relation to each other,
on a background. Its caption asks for all of that or for part of it, always for the shapes (:func:`asked`);
:func:`read_caption` finds that out from the words, so that anybody's prompts in the same grammar can be judged. An image
is a pure function of ``(seed, index)``, drawn by the rasteriser of :mod:`agd_lib.shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .shapes import IMAGE_SIZE, coverage, gradient, to_image

RGB = tuple[float, float, float]

SHAPES: tuple[str, ...] = ("disc", "ring", "square", "triangle", "star", "heart", "crescent", "plus")
"""Shapes of :mod:`agd_lib.shapes` that stay apart at a diameter of nine pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 125, 20),
    "yellow": (250, 218, 50),
    "green": (60, 175, 65),
    "cyan": (50, 195, 205),
    "blue": (50, 90, 220),
    "purple": (140, 55, 190),
    "pink": (242, 125, 185),
}
"""Colours of objects, with their central RGB value."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 18),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "brown": (105, 62, 28),
    "dark blue": (18, 28, 100),
    "dark green": (15, 72, 35),
    "light blue": (170, 205, 245),
    "light green": (180, 230, 170),
}
"""Colours of backgrounds, with their central RGB value."""

SIZES: dict[str, tuple[float, float]] = {"small": (4.2, 4.8), "large": (6.6, 7.3)}
"""Size names with the range of an object's circumscribed radius in pixels; the gap between them keeps them apart."""

PLACES: dict[str, str] = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "centre": "in the centre",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}
"""Places of a single object, row by row, with their words in a caption."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""Relations of the first object of a caption to the second."""

MAX_ROTATION = 0.25
"""Objects are turned by at most so much either way, in radians (14 degrees)."""

FULL_CAPTIONS = 0.5
"""Share of the captions that ask for everything; in the others every attribute but the shapes stands with chance 1/2."""

_JITTER = 12.0
_MARGIN = 0.3  # pixels between an object and the border of the image or of its half
_MIN_CONTRAST = 75.0  # Euclidean RGB distance between an object and the nearer end of the background
_GLUE = ("a", "an", "on", "and", "background", ",")


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, colour, size: names in :data:`SHAPES`, :data:`COLOURS` and :data:`SIZES`.
        radius: circumscribed radius in pixels. x, y: centre in pixels. rotation: in radians.
        rgb: the jittered colour.
        mentions: which of ``"colour"`` and ``"size"`` the caption tells.
    """

    shape: str
    colour: str
    size: str
    radius: float
    x: float
    y: float
    rotation: float
    rgb: RGB
    mentions: frozenset[str]


@dataclass(frozen=True)
class Scene:
    """Everything that is needed to draw one image and to write its caption.

    Attributes:
        objects: one or two, in the order of the caption.
        layout: a place in :data:`PLACES` for one object, a relation in :data:`RELATIONS` for two.
        background: name in :data:`BACKGROUNDS`.
        background_rgb: jittered; the background is a linear gradient between its two ends.
        gradient_angle: direction of the gradient, in radians.
        mentions: which of ``"layout"`` and ``"background"`` the caption tells.
    """

    objects: tuple[SceneObject, ...]
    layout: str
    background: str
    background_rgb: tuple[RGB, RGB]
    gradient_angle: float
    mentions: frozenset[str]

    @property
    def in_reading_order(self) -> tuple[SceneObject, ...]:
        """The objects from left to right or from top to bottom."""
        return self.objects[::-1] if self.layout in ("right of", "below") else self.objects


@dataclass(frozen=True)
class AskedObject:
    """What a caption asks of one object; None where it leaves that open."""

    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Asked:
    """What a caption asks for.

    Attributes:
        objects: one or two, in the order of the caption; exactly so many are asked for.
        layout: place of the one, or relation of the first to the second; None if left open.
        background: None if left open.
    """

    objects: tuple[AskedObject, ...]
    layout: str | None
    background: str | None


def asked(scene: Scene) -> Asked:
    """What the caption of this scene asks for: the part of the scene that the caption tells."""
    return Asked(
        objects=tuple(
            AskedObject(
                shape=item.shape,
                colour=item.colour if "colour" in item.mentions else None,
                size=item.size if "size" in item.mentions else None,
            )
            for item in scene.objects
        ),
        layout=scene.layout if "layout" in scene.mentions else None,
        background=scene.background if "background" in scene.mentions else None,
    )


def shown(scene: Scene) -> Asked:
    """Everything that this scene shows, as if its caption asked for all of it."""
    objects = tuple(AskedObject(item.shape, item.colour, item.size) for item in scene.objects)
    return Asked(objects, scene.layout, scene.background)


def _noun(item: AskedObject) -> str:
    words = [word for word in (item.size, item.colour, item.shape) if word is not None]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def caption(scene: Scene) -> str:
    """The scene in words, such as ``"a large red ring left of a small star, on a dark blue background"``."""
    return in_words(asked(scene))


def in_words(wanted: Asked) -> str:
    """The caption that asks for this; :func:`read_caption` reads it back."""
    text = f" {wanted.layout or 'and'} ".join(_noun(item) for item in wanted.objects)
    if len(wanted.objects) == 1 and wanted.layout is not None:
        text = f"{text} {PLACES[wanted.layout]}"
    if wanted.background is not None:
        text = f"{text}, on a {wanted.background} background"
    return text


def _any_of(names: Iterable[str]) -> str:
    return f"({'|'.join(names)})"


_NOUN = rf"an? (?:{_any_of(SIZES)} )?(?:{_any_of(COLOURS)} )?{_any_of(SHAPES)}"
_CAPTION = re.compile(
    rf"{_NOUN}(?: {_any_of(PLACES.values())}| {_any_of((*RELATIONS, 'and'))} {_NOUN})?"
    rf"(?:, on an? {_any_of(BACKGROUNDS)} background)?"
)


def read_caption(text: str) -> Asked:
    """What a text asks for, if it is in the grammar of :func:`caption`.

    Raises:
        ValueError: if it is not.
    """
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"got the prompt {text!r}, expected one in the captions' grammar, such as 'a large red ring left of a small "
            "star, on a dark blue background': colours, sizes, places and background may be left out"
        )
    size, colour, shape, place, relation, size_2, colour_2, shape_2, background = match.groups()
    if relation is None:
        layout = next((name for name, words in PLACES.items() if words == place), None)
        return Asked((AskedObject(shape, colour, size),), layout, background)
    objects = (AskedObject(shape, colour, size), AskedObject(shape_2, colour_2, size_2))
    return Asked(objects, None if relation == "and" else relation, background)


def vocabulary() -> list[str]:
    """Every word of every caption, the comma included, in alphabetical order."""
    phrases = [*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *PLACES.values(), *RELATIONS, *_GLUE]
    return sorted({word for phrase in phrases for word in phrase.split()})


def draw_scene(seed: int, index: int) -> Scene:
    """Draw the ``index``-th scene of the data set with this ``seed``."""
    rng = np.random.default_rng((seed, index))
    count = int(rng.integers(1, 3))
    full = rng.random() < FULL_CAPTIONS
    while True:
        background = _choice(rng, BACKGROUNDS)
        ends = (_jitter(BACKGROUNDS[background], rng), _jitter(BACKGROUNDS[background], rng))
        colours = [_choice(rng, COLOURS) for _ in range(count)]
        rgbs = [_jitter(COLOURS[colour], rng) for colour in colours]
        if min(math.dist(rgb, end) for rgb in rgbs for end in ends) >= _MIN_CONTRAST:
            break
    layout = _choice(rng, PLACES if count == 1 else RELATIONS)
    objects = []
    for position, (colour, rgb) in enumerate(zip(colours, rgbs)):
        size = _choice(rng, SIZES)
        radius = float(rng.uniform(*SIZES[size]))
        if count == 1:
            x, y = _in_place(layout, radius, rng)
        else:
            x, y = _in_half(layout, position, radius, rng)
        objects.append(
            SceneObject(
                shape=_choice(rng, SHAPES),
                colour=colour,
                size=size,
                radius=radius,
                x=x,
                y=y,
                rotation=float(rng.uniform(-MAX_ROTATION, MAX_ROTATION)),
                rgb=rgb,
                mentions=_mentions(rng, ("colour", "size"), full),
            )
        )
    return Scene(
        objects=tuple(objects),
        layout=layout,
        background=background,
        background_rgb=ends,
        gradient_angle=float(rng.uniform(0, 2 * math.pi)),
        mentions=_mentions(rng, ("layout", "background"), full),
    )


def _choice(rng: np.random.Generator, names: Iterable[str]) -> str:
    options = list(names)
    return options[rng.integers(len(options))]


def _jitter(rgb: tuple[int, int, int], rng: np.random.Generator) -> RGB:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-_JITTER, _JITTER, size=3), 0, 255)
    return float(r), float(g), float(b)


def _mentions(rng: np.random.Generator, names: tuple[str, ...], full: bool) -> frozenset[str]:
    told = rng.random(len(names)) < 0.5
    return frozenset(name for name, is_told in zip(names, told) if full or is_told)


def _in_place(place: str, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """Centre of a single object: in the outer three tenths or in the middle of each axis, with gaps between them."""
    zones = ((radius + _MARGIN, 9.4), (14.8, 17.2), (22.6, IMAGE_SIZE - radius - _MARGIN))
    row, column = divmod(list(PLACES).index(place), 3)
    return float(rng.uniform(*zones[column])), float(rng.uniform(*zones[row]))


def _in_half(relation: str, position: int, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """Centre of one of two objects: within its own half of the image, near the middle of the other axis."""
    half = IMAGE_SIZE / 2
    along = float(rng.uniform(radius + _MARGIN, half - radius - _MARGIN))
    across = float(rng.uniform(half - 2.5, half + 2.5))
    if position == (0 if relation in ("right of", "below") else 1):
        along += half
    return (along, across) if relation in ("left of", "right of") else (across, along)


def render(scene: Scene) -> Image.Image:
    """Draw a scene, anti-aliased, as a 32 x 32 RGB image."""
    pixels = gradient(scene.background_rgb, scene.gradient_angle)
    for item in scene.objects:
        covered = coverage(item.shape, item.x, item.y, item.radius, item.rotation)
        pixels = covered * np.asarray(item.rgb) + (1 - covered) * pixels
    return to_image(pixels)


def make_scenes(seed: int, count: int, start: int = 0) -> tuple[Tensor, list[Scene]]:
    """Scenes ``start`` to ``start + count`` of the data set with this seed.

    Returns:
        ``(images, scenes)``: uint8 tensor (count, 3, 32, 32) and what is in them.
    """
    scenes = [draw_scene(seed, start + i) for i in range(count)]
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes
