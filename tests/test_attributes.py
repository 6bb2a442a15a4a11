"""The attribute reader: its interface, its truth, and when a prompt counts as fulfilled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agd_lib.attributes import (
    LAYOUTS,
    QUESTIONS,
    AttributeFeatures,
    AttributeReader,
    Reading,
    fulfilled,
    fulfils,
    readings,
    targets,
)
from agd_lib.evaluation import EvaluationError, ShapesFeatures, load_reference, save_reference
from agd_lib.extractor import ShapesExtractor
from agd_lib.scenes import Asked, AskedObject, Scene, asked, caption, draw_scene, make_scenes
from agd_lib.tiny_text import reader_loss, train_reader

RING = AskedObject("ring", "red", "large")
STAR = AskedObject("star", "green", "small")


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    torch.manual_seed(0)
    return AttributeReader(feature_dim=16, width=8).eval()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(2, index) for index in range(300)]


def perfect_logits(scenes: list[Scene]) -> list[torch.Tensor]:
    """Scores of a reader that knows the truth; of a missing second object it says whatever comes first."""
    answers = targets(scenes).answers.clamp(min=0)
    return [torch.nn.functional.one_hot(a, len(q)).float() for q, a in zip(QUESTIONS, answers.unbind(dim=1))]


@torch.no_grad()
def test_outputs(reader: AttributeReader) -> None:
    images, _ = make_scenes(0, 6)
    output = reader(images)
    assert output.features.shape == (6, 16) and output.measures.shape == (6, 15)
    assert [scores.shape for scores in output.logits] == [(6, len(answers)) for answers in QUESTIONS]
    for one, other in zip(output.logits, reader(images.float() / 127.5 - 1).logits):
        assert torch.equal(one, other)
    torch.testing.assert_close(reader(images[3:4]).features, output.features[3:4], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"got images of shape .*expected \(batch, 3, 32, 32\)"):
        reader(torch.zeros(2, 3, 64, 64))


def test_the_full_size_reader_is_small() -> None:
    model = AttributeReader()
    assert model.config.feature_dim == 64
    assert 4 * model.num_parameters() < 3e6


def test_targets_tell_the_scene(scenes: list[Scene]) -> None:
    truth = targets(scenes)
    for scene, answers, measures in zip(scenes, truth.answers.tolist(), truth.measures):
        assert (LAYOUTS[answers[0]] == scene.layout) == (len(scene.objects) == 1)
        assert QUESTIONS[1][answers[1]] == scene.background
        first, *others = scene.in_reading_order
        assert (QUESTIONS[2][answers[2]], QUESTIONS[3][answers[3]]) == (first.shape, first.colour)
        assert (answers[5:] == [-100] * 3) == (not others)
        assert bool(measures[9:].isnan().all()) == (not others) and not measures[:9].isnan().any()
        if others:  # the second slot lies right of or below the first
            axis = 0 if LAYOUTS[answers[0]] == "side by side" else 1
            assert measures[12 + axis] - measures[6 + axis] > 0.5
        assert measures[8] * 32 == pytest.approx(first.radius)
    known = truth.measures[~truth.measures.isnan()]
    assert known.abs().max() <= 1


def test_the_truth_fulfils_every_prompt_and_another_scene_hardly_any(scenes: list[Scene]) -> None:
    seen = readings(perfect_logits(scenes))
    assert all(fulfils(reading, asked(scene)) for reading, scene in zip(seen, scenes))
    others = seen[1:] + seen[:1]
    assert sum(fulfils(reading, asked(scene)) for reading, scene in zip(others, scenes)) < 0.05 * len(scenes)


@pytest.mark.parametrize(
    ("objects", "layout", "expected"),
    [
        ((RING, STAR), "left of", True),
        ((STAR, RING), "left of", False),
        ((STAR, RING), "right of", True),
        ((RING, STAR), "right of", False),
        ((RING, STAR), "above", False),
        ((STAR, RING), None, True),
        ((RING, STAR), None, True),
        ((RING, RING), None, False),
        ((RING,), None, False),
        ((replace(RING, colour=None, size=None), STAR), "left of", True),
        ((replace(RING, colour="blue"), STAR), "left of", False),
        ((RING, replace(STAR, size="large")), "left of", False),
        # the attributes are there, but on the wrong objects
        ((replace(RING, colour="green"), replace(STAR, colour="red")), "left of", False),
        ((replace(RING, colour="green", size=None), AskedObject("star", None, None)), None, False),
    ],
)
def test_two_objects(objects: tuple[AskedObject, ...], layout: str | None, expected: bool) -> None:
    reading = Reading((RING, STAR), "side by side", "grey")
    assert fulfils(reading, Asked(objects, layout, None)) is expected
    assert fulfils(reading, Asked(objects, layout, "grey")) is expected
    assert not fulfils(reading, Asked(objects, layout, "black"))


def test_above_and_below_follow_the_slots() -> None:
    reading = Reading((RING, STAR), "one above the other", "grey")
    assert fulfils(reading, Asked((RING, STAR), "above", None))
    assert fulfils(reading, Asked((STAR, RING), "below", None))
    assert not fulfils(reading, Asked((RING, STAR), "below", None))
    assert not fulfils(reading, Asked((RING, STAR), "left of", None))


def test_one_object() -> None:
    reading = Reading((RING,), "top left", "grey")
    assert fulfils(reading, Asked((RING,), "top left", "grey"))
    assert fulfils(reading, Asked((AskedObject("ring", None, None),), None, None))
    assert not fulfils(reading, Asked((RING,), "top", None))
    assert not fulfils(reading, Asked((STAR,), None, None))
    assert not fulfils(reading, Asked((RING, RING), None, None))


def test_a_layout_of_one_object_reads_one_object(scenes: list[Scene]) -> None:
    for reading, scene in zip(readings(perfect_logits(scenes)), scenes):
        assert len(reading.objects) == len(scene.objects)


@torch.no_grad()
def test_saved_and_loaded_as_features(reader: AttributeReader, tmp_path: Path) -> None:
    reader.save_pretrained(tmp_path / "reader")
    assert {path.suffix for path in (tmp_path / "reader").iterdir()} == {".json", ".safetensors"}
    extractor = AttributeFeatures(tmp_path / "reader")
    images, scenes = make_scenes(0, 20)
    features, shown = extractor(images.float() / 255)
    assert shown is None and features.shape == (20, extractor.feature_dim) and features.dtype == torch.float32
    torch.testing.assert_close(features, reader(images).features, atol=1e-5, rtol=1e-4)
    save_reference(tmp_path / "reference.safetensors", features, extractor.name)
    reference = load_reference(tmp_path / "reference.safetensors", extractor)
    assert reference.features is not None and torch.equal(reference.features, features)
    unit, prompts = images.float() / 255, [caption(scene) for scene in scenes]
    assert torch.equal(extractor(unit, prompts)[1], fulfilled(reader, images, scenes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shorter than"):
        extractor(unit, prompts[:3])
    with pytest.raises(ValueError, match=r"got the prompt 'a cat', expected one in the captions' grammar"):
        extractor(unit, ["a cat"] * 20)


def test_the_name_tells_readers_apart(reader: AttributeReader, tmp_path: Path) -> None:
    """Features of one reader are refused as the reference for another's."""
    for name, model in (("one", reader), ("other", AttributeReader(feature_dim=16, width=8))):
        model.save_pretrained(tmp_path / name)
    one, other = AttributeFeatures(tmp_path / "one"), AttributeFeatures(tmp_path / "other")
    assert one.name.startswith("scenes-reader-") and one.name != other.name
    assert one.name == AttributeFeatures(tmp_path / "one").name
    save_reference(tmp_path / "reference.safetensors", one(make_scenes(0, 20)[0] / 255)[0], one.name)
    with pytest.raises(EvaluationError, match="was made with the extractor scenes-reader-"):
        load_reference(tmp_path / "reference.safetensors", other)


@pytest.mark.parametrize("load", [AttributeFeatures, ShapesFeatures])
def test_extractors_are_local_safetensors(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder is not looked for on the hub, and pickled weights are not loaded."""
    with pytest.raises(ValueError, match=r"no config.json and no diffusion_pytorch_model.safetensors"):
        load("someone/a-reader")
    kind = AttributeReader if load is AttributeFeatures else ShapesExtractor
    kind(feature_dim=16, width=8).save_pretrained(tmp_path, safe_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors: expected one"):
        load(tmp_path)


def test_the_loss_is_finite_without_any_second_object(reader: AttributeReader) -> None:
    images, scenes = make_scenes(0, 16)
    alone = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
    output = reader(images[alone])
    loss = reader_loss(output.logits, output.measures, targets([scenes[i] for i in alone]))
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in reader.parameters())
    reader.zero_grad()


def test_the_loss_ignores_the_second_object_where_there_is_none(reader: AttributeReader) -> None:
    images, scenes = make_scenes(0, 16)
    truth = targets(scenes)
    output = reader(images)
    loss = reader_loss(output.logits, output.measures, truth)
    absent = truth.answers[:, 5] < 0
    assert absent.any() and loss.isfinite()
    measures = output.measures.clone()
    measures[absent, 9:] += 100
    assert torch.equal(reader_loss(output.logits, measures, truth), loss)
    measures[~absent, 9:] += 1
    assert reader_loss(output.logits, measures, truth) > loss


def test_training_teaches_to_read() -> None:
    images, scenes = make_scenes(1, 256)
    truth = targets(scenes)
    model = train_reader(images, truth, steps=40, batch_size=64)
    with torch.no_grad():
        backgrounds = model(images).logits[1].argmax(dim=1)
    assert (backgrounds == truth.answers[:, 1]).float().mean() > 0.4  # one in eight by chance
    assert fulfilled(model, images, scenes).shape == (256,)
