"""Reads captioned scenes back: is everything that the prompt asked for in the picture?

A small convolutional network reads a 32 x 32 scene (:mod:`agd_lib.scenes`): how many objects, where, on which
background, and of each its shape, colour and size. Objects are told apart by where they are: the first slot holds the
left, upper or only one, the second slot the other. The network's features are what the Frechet distance is computed
on; they also have to tell exact colours, places and sizes, so that they notice a generator that has lost that variety.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .extractor import checked_pixels, conv_stages, load_local, weights_hash
from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Asked, AskedObject, Scene, asked, read_caption
from .shapes import IMAGE_SIZE

ARRANGEMENTS: dict[str, str] = {
    "left of": "side by side",
    "right of": "side by side",
    "above": "one above the other",
    "below": "one above the other",
}
"""How two objects in a relation are arranged; which of them comes first is told by the slots."""

LAYOUTS: tuple[str, ...] = (*PLACES, "side by side", "one above the other")
"""The layouts that are read: a place for one object, an arrangement for two."""

_SLOT: tuple[tuple[str, ...], ...] = (SHAPES, tuple(COLOURS), tuple(SIZES))
QUESTIONS: tuple[tuple[str, ...], ...] = (LAYOUTS, tuple(BACKGROUNDS), *_SLOT, *_SLOT)
"""What is read, as the possible answers: layout, background, then shape, colour and size of the first and second slot."""

NUM_MEASURES = 15
"""Exact values that are read too: background RGB, then RGB, x, y and radius of the first and of the second slot."""


class ReaderOutput(NamedTuple):
    """What :class:`AttributeReader` says of a batch of B images."""

    features: Tensor
    """(B, feature_dim): the features that the Frechet distance, precision and recall are computed on."""
    logits: tuple[Tensor, ...]
    """For each of :data:`QUESTIONS` a score for each answer, (B, number of answers)."""
    measures: Tensor
    """(B, 15): colours in [-1, 1], places in [-1, 1], radii as shares of the side."""


class AttributeReader(ModelMixin, ConfigMixin):
    """A convolutional network with one feature vector, from which every attribute is read.

    Args:
        feature_dim: length of the feature vector.
        width: channels of the first stage; doubled twice.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, feature_dim: int = 64, width: int = 32) -> None:
        super().__init__()
        self.stages = conv_stages(width)
        self.to_features = nn.Linear(4 * width * (IMAGE_SIZE // 8) ** 2, feature_dim)
        self.norm = nn.LayerNorm(feature_dim)
        self.hidden = nn.Linear(feature_dim, 4 * feature_dim)
        self.answers = nn.Linear(4 * feature_dim, sum(len(answers) for answers in QUESTIONS))
        self.measures = nn.Linear(4 * feature_dim, NUM_MEASURES)

    def forward(self, images: Tensor) -> ReaderOutput:
        """
        Args:
            images: (B, 3, 32, 32), float in [-1, 1] or uint8 in 0..255.
        """
        x = checked_pixels(images)
        for stage in self.stages:
            x = stage(x)
        features = self.norm(self.to_features(x.flatten(1)))
        hidden = F.silu(self.hidden(F.silu(features)))
        logits = self.answers(hidden).split([len(answers) for answers in QUESTIONS], dim=1)
        return ReaderOutput(features, logits, self.measures(hidden))


class Targets(NamedTuple):
    """What the reader has to say of N scenes."""

    answers: Tensor
    """(N, 8) int64, one column for each of :data:`QUESTIONS`; -100 where there is no second object."""
    measures: Tensor
    """(N, 15); NaN where there is no second object."""


def targets(scenes: Sequence[Scene]) -> Targets:
    """The truth about scenes."""
    answers, measures = [], []
    for scene in scenes:
        layout = ARRANGEMENTS.get(scene.layout, scene.layout)
        told = [LAYOUTS.index(layout), QUESTIONS[1].index(scene.background)]
        values = list(np.mean(scene.background_rgb, axis=0) / 127.5 - 1)
        for item in scene.in_reading_order:
            told += [names.index(name) for names, name in zip(_SLOT, (item.shape, item.colour, item.size))]
            values += [v / 127.5 - 1 for v in item.rgb] + [2 * v / IMAGE_SIZE - 1 for v in (item.x, item.y)]
            values += [item.radius / IMAGE_SIZE]
        answers.append(told + [-100] * (len(QUESTIONS) - len(told)))
        measures.append(values + [float("nan")] * (NUM_MEASURES - len(values)))
    return Targets(torch.tensor(answers), torch.tensor(measures, dtype=torch.float32))


@dataclass(frozen=True)
class Reading:
    """What was read from one image.

    Attributes:
        objects: one or two, from left to right or from top to bottom, every attribute given.
        layout: one of :data:`LAYOUTS`.
        background: one of :data:`~agd_lib.scenes.BACKGROUNDS`.
    """

    objects: tuple[AskedObject, ...]
    layout: str
    background: str


def readings(logits: Sequence[Tensor]) -> list[Reading]:
    """The likeliest answers in words.

    Args:
        logits: as in :class:`ReaderOutput`.
    """
    result = []
    for best in torch.stack([scores.argmax(dim=1) for scores in logits], dim=1).tolist():
        layout, background, *slots = (answers[i] for answers, i in zip(QUESTIONS, best))
        first, second = AskedObject(*slots[:3]), AskedObject(*slots[3:])
        result.append(Reading((first,) if layout in PLACES else (first, second), layout, background))
    return result


def fulfils(reading: Reading, wanted: Asked) -> bool:
    """Whether an image holds everything that was asked for, in the right number and order."""
    if len(reading.objects) != len(wanted.objects) or wanted.background not in (None, reading.background):
        return False
    if wanted.layout is None:  # a single object anywhere, two objects in any order
        return any(all(map(_fits, order, wanted.objects)) for order in permutations(reading.objects))
    in_order = wanted.objects[::-1] if wanted.layout in ("right of", "below") else wanted.objects
    return reading.layout == ARRANGEMENTS.get(wanted.layout, wanted.layout) and all(
        map(_fits, reading.objects, in_order)
    )


def _fits(seen: AskedObject, wanted: AskedObject) -> bool:
    return wanted.shape == seen.shape and wanted.colour in (None, seen.colour) and wanted.size in (None, seen.size)


@torch.no_grad()
def fulfilled(model: AttributeReader, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """For each image whether everything that the scene's caption asks for is in it, (N,) bool, on the CPU.

    Args:
        images: (N, 3, 32, 32), float in [-1, 1] or uint8; read 500 at a time.

    Raises:
        ValueError: if there are not as many scenes as images.
    """
    if len(images) != len(scenes):
        raise ValueError(f"got {len(images)} images and {len(scenes)} scenes, expected one scene for each image")
    seen = [reading for chunk in images.split(500) for reading in readings(model(chunk).logits)]
    return torch.tensor([fulfils(reading, asked(scene)) for reading, scene in zip(seen, scenes)])


class AttributeFeatures:
    """A saved reader as a feature extractor for evaluation, and as the judge of prompts.

    Args:
        folder: a saved :class:`AttributeReader`.

    Attributes:
        name: with a hash of the weights, so that features of two readers are never compared.
        feature_dim: D.

    Raises:
        ValueError: if no reader was saved to the folder.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.model = load_local(AttributeReader, folder, device)
        self.name = f"scenes-reader-{weights_hash(folder)}"
        self.feature_dim = int(self.model.config.feature_dim)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, conditions: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) of images (B, 3, 32, 32) in [0, 1], and which of them show everything that their prompt asks for.

        Raises:
            ValueError: if a prompt is not in the captions' grammar (:func:`~agd_lib.scenes.read_caption`).
        """
        output = self.model(images.to(self.device) * 2 - 1)
        if conditions is None:
            return output.features.cpu(), None
        pairs = zip(readings(output.logits), map(read_caption, conditions), strict=True)
        return output.features.cpu(), torch.tensor([fulfils(seen, wanted) for seen, wanted in pairs])
