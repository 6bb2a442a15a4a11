"""The procedural data set: a pure function of (seed, index), balanced, varied, truly captioned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agd_lib.shapes import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    iter_images,
    make_images,
    render,
)

COUNT = 200


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(3, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return make_images(3, COUNT)


def test_images_are_a_function_of_seed_and_index(images: tuple) -> None:
    pixels, labels = images
    again, same_labels = make_images(3, 5, start=100)  # also from the middle, whatever was drawn before
    assert torch.equal(again, pixels[100:105]) and torch.equal(same_labels, labels[100:105])
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(np.asarray(render(draw_scene(3, 7))), pixels[7].permute(1, 2, 0).numpy())


def test_images_are_all_different_between_indices_and_seeds(images: tuple) -> None:
    pixels, _ = images
    other, _ = make_images(4, COUNT)
    assert len({image.numpy().tobytes() for image in torch.cat([pixels, other])}) == 2 * COUNT


def test_pixels(images: tuple) -> None:
    pixels, labels = images
    assert pixels.shape == (COUNT, 3, IMAGE_SIZE, IMAGE_SIZE) and pixels.dtype == torch.uint8
    assert labels.shape == (COUNT,) and labels.dtype == torch.int64
    assert pixels.min() < 30 and pixels.max() > 225  # the whole range is in use
    contrast = pixels.float().flatten(2).std(dim=2).amax(dim=1)
    assert contrast.min() > 5  # no empty image


def test_classes_are_balanced(images: tuple) -> None:
    _, labels = images
    assert len(SHAPES) >= 16
    assert torch.equal(torch.bincount(labels, minlength=len(SHAPES)), torch.full((len(SHAPES),), COUNT // len(SHAPES)))


def test_iterating_gives_the_same_images_in_pieces(images: tuple) -> None:
    pieces = list(iter_images(3, 50, batch_size=20))
    assert [len(piece) for piece, _ in pieces] == [20, 20, 10]
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), images[0][:50])
    assert torch.equal(torch.cat([labels for _, labels in pieces]), images[1][:50])


def test_a_label_can_be_asked_for() -> None:
    pixels, labels = make_images(3, 4, labels=[5, 5, 0, 19])
    assert labels.tolist() == [5, 5, 0, 19]
    assert not torch.equal(pixels[0], pixels[1])
    scene, asked = draw_scene(3, 8), draw_scene(3, 8, label=2)
    assert asked.shape == SHAPES[2] and (asked.colour, asked.x, asked.radius) == (scene.colour, scene.x, scene.radius)


@pytest.mark.parametrize("label", [-1, len(SHAPES), 1000])
def test_a_bad_label_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"got class label {label}, expected 0 to {len(SHAPES) - 1}"):
        draw_scene(0, 0, label=label)
    with pytest.raises(ValueError, match="got class label"):
        make_images(0, 1, labels=[label])


def test_scenes_vary_in_everything(scenes: list[Scene]) -> None:
    for name, least in (("colour", 10), ("background", 10), ("size", 3), ("place", 9)):
        values = [getattr(scene, name) for scene in scenes]
        assert len(set(values)) == least, name
        assert max(values.count(value) for value in set(values)) < 0.6 * COUNT, name
    for name in ("radius", "x", "y", "rotation", "gradient_angle"):
        values = [getattr(scene, name) for scene in scenes]
        assert len({round(value, 6) for value in values}) == COUNT, name


def test_scenes_keep_to_their_ranges(scenes: list[Scene]) -> None:
    for scene in scenes:
        low, high = SIZES[scene.size]
        assert low <= scene.radius <= high
        for centre in (scene.x, scene.y):  # the whole shape is in the picture
            assert scene.radius - 1e-9 <= centre <= IMAGE_SIZE - scene.radius + 1e-9
        assert scene.colour in COLOURS and scene.background in COLOURS
        assert math.dist(scene.foreground_rgb, COLOURS[scene.colour]) <= 22 * math.sqrt(3)
        assert min(math.dist(scene.foreground_rgb, end) for end in scene.background_rgb) >= 120


def test_the_caption_tells_the_scene(scenes: list[Scene]) -> None:
    for scene in scenes:
        article = "an " if scene.size[0] in "aeiou" else "a "
        assert scene.caption.startswith(f"{article}{scene.size} {scene.colour} {scene.shape}, {scene.place}, on a ")
        assert scene.caption.endswith(f"{scene.background} background")
        words = scene.place.split()
        assert ("top" in words) == (scene.y < 14.5) and ("bottom" in words) == (scene.y > 17.5)
        assert ("left" in words) == (scene.x < 14.5) and ("right" in words) == (scene.x > 17.5)
        assert words == ["centre"] or not {"centre"} & set(words)


@pytest.mark.parametrize("label", range(len(SHAPES)), ids=SHAPES)
def test_every_shape_is_drawn_where_and_as_the_scene_says(label: int) -> None:
    """The foreground colour covers part of the circle around the centre and nothing outside of it."""
    scene = Scene(
        label=label,
        colour="red",
        background="black",
        size="large",
        radius=10.0,
        x=14.0,
        y=18.0,
        rotation=0.5,
        foreground_rgb=(255.0, 255.0, 255.0),
        background_rgb=((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        gradient_angle=0.0,
    )
    coverage = np.asarray(render(scene), dtype=float)[..., 0] / 255
    grid = np.arange(IMAGE_SIZE) + 0.5
    distance = np.hypot(grid[None, :] - scene.x, grid[:, None] - scene.y)
    assert coverage[distance > 1.15 * scene.radius + 1].max() == 0
    assert coverage.max() == 1
    assert 0.1 < coverage.sum() / (math.pi * scene.radius**2) < 1.02


def test_no_two_shapes_look_alike() -> None:
    """Drawn at the same place, any two classes differ in at least a tenth of their circle's area, in any rotation."""

    def mask(label: int, rotation: float) -> np.ndarray:
        scene = Scene(
            label, "red", "black", "large", 12.0, 16.0, 16.0, rotation, (255, 255, 255), ((0, 0, 0), (0, 0, 0)), 0.0
        )
        return np.asarray(render(scene), dtype=float)[..., 0].ravel() / 255

    upright = np.stack([mask(label, 0.0) for label in range(len(SHAPES))])
    for rotation in np.linspace(-0.35, 0.35, 5):
        turned = np.stack([mask(label, float(rotation)) for label in range(len(SHAPES))])
        difference = np.abs(upright[:, None] - turned[None]).sum(axis=2) / (math.pi * 12.0**2)
        difference[np.eye(len(SHAPES), dtype=bool)] = 1
        assert difference.min() > 0.05, divmod(int(difference.argmin()), len(SHAPES))


def test_the_background_is_a_gradient_between_its_ends() -> None:
    scene = Scene(0, "red", "black", "small", 3.0, 16.0, 16.0, 0.0, (0, 0, 0), ((0, 50, 100), (200, 150, 100)), 0.0)
    row = np.asarray(render(scene), dtype=float)[2]  # above the shape; the gradient runs along x
    assert (np.diff(row[:, 0]) > 0).all() and (np.diff(row[:, 1]) > 0).all() and (row[:, 2] == 100).all()
    assert row[:, 0].min() > 0 and row[:, 0].max() < 200
