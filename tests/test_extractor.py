"""The feature extractor: its interface, and that the shipped one reads the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agd_lib.extractor import ShapesExtractor
from agd_lib.project import DATA
from agd_lib.shapes import SHAPES, make_images
from agd_lib.tiny import HELD_OUT_SEED, TRAIN_SEED, extractor_accuracy, scene_attributes


@pytest.fixture(scope="module")
def extractor() -> ShapesExtractor:
    torch.manual_seed(0)
    return ShapesExtractor(feature_dim=16, width=8).eval()


@torch.no_grad()
def test_output_shapes_and_normalised_features(extractor: ShapesExtractor) -> None:
    output = extractor(make_images(0, 6)[0])
    assert output.features.shape == (6, 16)
    assert output.logits.shape == (6, len(SHAPES))
    assert output.attributes.shape == (6, 9)
    torch.testing.assert_close(output.features.mean(dim=1), torch.zeros(6), atol=1e-5, rtol=0)  # layer norm


@torch.no_grad()
def test_bytes_and_floats_mean_the_same(extractor: ShapesExtractor) -> None:
    images, _ = make_images(0, 4)
    from_bytes, from_floats = extractor(images), extractor(images.float() / 127.5 - 1)
    for one, other in zip(from_bytes, from_floats):
        assert torch.equal(one, other)
    assert not torch.allclose(from_bytes.features[0], from_bytes.features[1], atol=1e-3)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(extractor: ShapesExtractor) -> None:
    images, _ = make_images(0, 5)
    torch.testing.assert_close(extractor(images).features[3:4], extractor(images[3:4]).features, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_saved_and_loaded(extractor: ShapesExtractor, tmp_path: Path) -> None:
    extractor.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = ShapesExtractor.from_pretrained(tmp_path)
    images, _ = make_images(0, 3)
    assert not loaded.training and torch.equal(loaded(images).features, extractor(images).features)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(extractor: ShapesExtractor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got images of shape .*expected \(batch, 3, 32, 32\)"):
        extractor(torch.zeros(shape))


def test_attributes_follow_the_scenes() -> None:
    attributes = scene_attributes(TRAIN_SEED, 50)
    assert attributes.shape == (50, 9)
    assert attributes[:, :8].abs().max() <= 1 and attributes[:, 8].min() > 0 and attributes[:, 8].max() < 0.5
    assert attributes.std(dim=0).min() > 0.02


@torch.no_grad()
def test_the_shipped_extractor_reads_class_colour_and_place() -> None:
    model = ShapesExtractor.from_pretrained(DATA / "tiny-dit" / "extractor")
    images, labels = make_images(HELD_OUT_SEED, 500)
    assert extractor_accuracy(model, images, labels) >= 0.99
    truth = scene_attributes(HELD_OUT_SEED, 500)
    unexplained = (model(images).attributes - truth).square().mean(dim=0) / truth.var(dim=0)
    assert unexplained[:8].max() < 0.1  # colours and place
    assert unexplained[8] < 0.5  # radius
