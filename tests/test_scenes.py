"""The captioned scenes: a pure function of (seed, index), drawn as they say, asked for as they are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from agd_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    asked,
    caption,
    draw_scene,
    make_scenes,
    read_caption,
    render,
    vocabulary,
)
from agd_lib.shapes import IMAGE_SIZE

COUNT = 600
EVERYTHING = frozenset({"colour", "size", "layout", "background"})


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(3, index) for index in range(COUNT)]


def thing(shape: str = "disc", **changes: object) -> SceneObject:
    item = SceneObject(shape, "red", "large", 7.0, 16.0, 16.0, 0.0, (215.0, 35.0, 35.0), EVERYTHING)
    return replace(item, **changes)


def scene_of(*objects: SceneObject, layout: str, mentions: frozenset[str] = EVERYTHING) -> Scene:
    return Scene(objects, layout, "dark blue", ((18.0, 28.0, 100.0), (18.0, 28.0, 100.0)), 0.0, mentions)


def covered(scene: Scene, item: SceneObject) -> np.ndarray:
    """Which pixels of the drawn scene are nearer to the object's colour than to any other colour in it."""
    pixels = np.asarray(render(scene), dtype=float)
    others = [other.rgb for other in scene.objects if other is not item]
    others += [tuple(np.mean(scene.background_rgb, axis=0))]
    own = np.linalg.norm(pixels - item.rgb, axis=2)
    return (own < 40) & np.all([own < np.linalg.norm(pixels - other, axis=2) for other in others], axis=0)


def test_images_are_a_function_of_seed_and_index() -> None:
    images, scenes = make_scenes(3, 12)
    np.random.seed(0)
    torch.manual_seed(0)
    again, same = make_scenes(3, 4, start=5)  # also from the middle, whatever was drawn before
    assert torch.equal(again, images[5:9]) and same == scenes[5:9]
    assert images.shape == (12, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.uint8
    other, _ = make_scenes(4, 12)
    assert len({image.numpy().tobytes() for image in torch.cat([images, other])}) == 24


def test_a_full_caption_tells_everything() -> None:
    small = thing("star", colour="orange", size="small")
    assert caption(scene_of(thing("ring"), small, layout="left of")) == (
        "a large red ring left of a small orange star, on a dark blue background"
    )
    assert caption(scene_of(small, layout="top left")) == (
        "a small orange star in the top left corner, on a dark blue background"
    )


def test_a_caption_tells_what_is_mentioned_and_no_more() -> None:
    none = frozenset[str]()
    bare = thing("ring", mentions=none)
    orange = thing("star", colour="orange", mentions=frozenset({"colour"}))
    assert caption(scene_of(bare, layout="top", mentions=none)) == "a ring"
    assert caption(scene_of(orange, layout="top", mentions=frozenset({"layout"}))) == "an orange star at the top"
    assert caption(scene_of(bare, orange, layout="below", mentions=none)) == "a ring and an orange star"
    assert caption(scene_of(bare, orange, layout="below", mentions=frozenset({"background"}))) == (
        "a ring and an orange star, on a dark blue background"
    )
    wanted = asked(scene_of(bare, orange, layout="below", mentions=none))
    assert [(item.shape, item.colour, item.size) for item in wanted.objects] == [
        ("ring", None, None),
        ("star", "orange", None),
    ]
    assert wanted.layout is None and wanted.background is None


def test_captions_and_what_they_ask_for_agree(scenes: list[Scene]) -> None:
    """Every word of what is asked for is in the caption, and no other attribute's word is."""
    for scene in scenes:
        wanted, text = asked(scene), caption(scene)
        words = Counter(text.replace(",", " ,").split())
        expected = Counter(word for item in wanted.objects for word in (item.shape, item.colour, item.size) if word)
        if wanted.background:
            expected.update([*wanted.background.split(), "background"])
        if wanted.layout:
            expected.update((PLACES.get(wanted.layout) or wanted.layout).split())
        glue = words - expected
        assert not expected - words, text
        assert set(glue) <= {"a", "an", "on", "and", ","}, text
        assert ("and" in words) == (len(wanted.objects) == 2 and wanted.layout is None)
        for item, drawn in zip(wanted.objects, scene.objects, strict=True):
            assert item.shape == drawn.shape
            assert item.colour in (None, drawn.colour) and item.size in (None, drawn.size)
        assert wanted.layout in (None, scene.layout) and wanted.background in (None, scene.background)


def test_captions_are_read_as_what_they_ask_for() -> None:
    for index in range(3_000):
        scene = draw_scene(5, index)
        assert read_caption(caption(scene)) == asked(scene)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a red", "a cat", "a red ring ", "red ring", "a large red ring left of", "a ring on a black background"],
)
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one in the captions' grammar"):
        read_caption(text)


def test_captions_vary(scenes: list[Scene]) -> None:
    full = [s for s in scenes if all(s.mentions | item.mentions == EVERYTHING for item in s.objects)]
    assert 0.45 < len(full) / COUNT < 0.65
    pairs = [scene.objects for scene in scenes if len(scene.objects) == 2 and scene not in full]
    told = Counter((first.mentions, second.mentions) for first, second in pairs)
    assert len(told) == 16  # each object of a pair tells none, one or both of its attributes, whatever the other tells
    assert len({caption(scene) for scene in scenes}) > 0.9 * COUNT
    for names, values in (
        (SHAPES, [item.shape for scene in scenes for item in scene.objects]),
        (COLOURS, [item.colour for scene in scenes for item in scene.objects]),
        (SIZES, [item.size for scene in scenes for item in scene.objects]),
        (BACKGROUNDS, [scene.background for scene in scenes]),
        ([*PLACES, *RELATIONS], [scene.layout for scene in scenes]),
    ):
        counts = Counter(values)
        assert set(counts) == set(names) and max(counts.values()) < 5 * min(counts.values()), counts
    assert 0.4 < sum(len(scene.objects) == 2 for scene in scenes) / COUNT < 0.6
    for name in ("radius", "x", "y", "rotation", "rgb"):
        values = [getattr(item, name) for scene in scenes for item in scene.objects]
        assert len(set(values)) == len(values), name


def test_one_caption_has_many_images() -> None:
    """What the caption leaves open varies, and so does the picture of a caption that leaves nothing open."""
    scenes = [scene for scene in (draw_scene(0, index) for index in range(4000)) if caption(scene) == "a star"]
    assert len(scenes) > 3
    assert len({(scene.layout, scene.background) for scene in scenes}) == len(scenes)


def test_the_vocabulary_is_the_words_of_all_captions(scenes: list[Scene]) -> None:
    used = {word for scene in scenes for word in caption(scene).replace(",", " ,").split()}
    assert used == set(vocabulary())
    assert vocabulary() == sorted(set(vocabulary())) and len(vocabulary()) < 60


def test_objects_keep_to_their_ranges(scenes: list[Scene]) -> None:
    for scene in scenes:
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            for centre in (item.x, item.y):  # the whole object is in the picture
                assert item.radius <= centre <= IMAGE_SIZE - item.radius
            assert math.dist(item.rgb, COLOURS[item.colour]) <= 12 * math.sqrt(3)
            assert min(math.dist(item.rgb, end) for end in scene.background_rgb) >= 75
        if len(scene.objects) == 2:
            one, two = scene.objects
            assert math.dist((one.x, one.y), (two.x, two.y)) > one.radius + two.radius
    radii = {size: [i.radius for s in scenes for i in s.objects if i.size == size] for size in SIZES}
    assert min(radii["large"]) > 1.3 * max(radii["small"])


def test_colours_have_one_name_whatever_the_jitter() -> None:
    for palette in (COLOURS, BACKGROUNDS):
        values = list(palette.values())
        distances = [math.dist(a, b) for i, a in enumerate(values) for b in values[:i]]
        assert min(distances) > 2 * 12 * math.sqrt(3)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_relation_holds_in_the_pixels(relation: str) -> None:
    axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}[relation]
    found = 0
    for index in range(400):
        scene = draw_scene(5, index)
        if scene.layout != relation or scene.objects[0].colour == scene.objects[1].colour:
            continue
        first, second = (np.argwhere(covered(scene, item)) for item in scene.objects)
        edge, other = (first, second) if sign == 1 else (second, first)
        assert edge[:, axis].max() < other[:, axis].min(), caption(scene)  # not an overlap along that axis
        assert scene.in_reading_order == scene.objects[::sign]
        found += 1
    assert found > 20


@pytest.mark.parametrize("place", PLACES)
def test_the_place_holds_in_the_pixels(place: str) -> None:
    found = 0
    for index in range(600):
        scene = draw_scene(6, index)
        if scene.layout != place:
            continue
        rows, columns = np.argwhere(covered(scene, scene.objects[0])).T
        for values, low, high in ((rows, "top", "bottom"), (columns, "left", "right")):
            middle = (values.min() + values.max()) / 2  # a crescent's lies up to 2 pixels beside its circle's
            assert (middle < 12) == (low in place) and (middle > 19) == (high in place), (caption(scene), middle)
        found += 1
    assert found > 15


def test_shapes_and_sizes_can_be_told_apart() -> None:
    """Drawn alone, two objects that differ in shape or size differ in the pixels, whatever their rotation."""

    def mask(shape: str, radius: float, rotation: float) -> np.ndarray:
        item = thing(shape, radius=radius, rotation=rotation, rgb=(255.0, 255.0, 255.0))
        scene = Scene((item,), "centre", "black", ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)), 0.0, EVERYTHING)
        return np.asarray(render(scene), dtype=float)[..., 0] / 255

    for radius in (4.2, 7.0):
        upright = {shape: mask(shape, radius, 0.0) for shape in SHAPES}
        for rotation in (-0.25, 0.0, 0.25):
            for shape in SHAPES:
                turned = mask(shape, radius, rotation)
                for other in SHAPES:
                    if other != shape:
                        assert np.abs(upright[other] - turned).sum() > 0.1 * math.pi * radius**2, (shape, other)
    for shape in SHAPES:
        assert mask(shape, 6.6, 0.0).sum() > 1.6 * mask(shape, 4.8, 0.0).sum()
