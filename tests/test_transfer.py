"""Adapters on other weights than their own: the models, how faded pictures are read, and what is kept of CFG's gain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_study import a_row

from agd_lib.attributes import AttributeFeatures
from agd_lib.guidance import CFG
from agd_lib.project import DATA
from agd_lib.sampling import generate
from agd_lib.scenes import caption, make_scenes
from agd_lib.study import Unit
from agd_lib.tiny import HELD_OUT_SEED, to_unit
from agd_lib.tiny_style import faded
from agd_lib.transfer import MODELS, WITH_LORA, StyleFeatures, gain_kept, load_model, measure_model, weights_moved


@pytest.fixture(scope="module")
def reader() -> AttributeFeatures:
    return AttributeFeatures(DATA / "scenes" / "extractor")


def test_faded_pictures_are_read_as_the_pictures_that_they_were(reader: AttributeFeatures) -> None:
    pixels, scenes = make_scenes(HELD_OUT_SEED, 200)
    pictures, prompts = to_unit(pixels), [caption(scene) for scene in scenes]
    style = StyleFeatures(reader)
    features, shown = style(faded(pictures), prompts)
    assert shown is not None and shown.double().mean() >= 0.99
    assert torch.equal(features, reader(faded(pictures))[0])  # the style is in the features
    assert style.name != reader.name and style.feature_dim == features.shape[1]
    assert reader(faded(pictures), prompts)[1].double().mean() < 0.9  # type: ignore[union-attr]


def test_the_lora_is_in_the_weights_of_its_model(tmp_path: Path) -> None:
    with_lora, plain = load_model(WITH_LORA, tmp_path, 0), load_model(MODELS[0], tmp_path, 0)
    assert with_lora.name == WITH_LORA and with_lora.fingerprint() != plain.fingerprint()
    assert with_lora.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()
    assert 0.01 < weights_moved(tmp_path, WITH_LORA, 0) < 0.5 and weights_moved(tmp_path, MODELS[0], 0) == 0
    plain.pipeline.load_lora_weights(DATA / "tiny-sd21-faded", use_safetensors=True)
    (fused,), (loaded,) = (generate(base, ["a red ring"], CFG(3.0), 4, seed=1) for base in (with_lora, plain))
    torch.testing.assert_close(fused, loaded, rtol=1e-3, atol=1e-3)


def test_what_is_measured_is_the_model_that_is_named(tmp_path: Path, reader: AttributeFeatures) -> None:
    row = measure_model(WITH_LORA, tmp_path, 0, Unit("unguided", 1.0, 3), 70)
    assert (row.base, row.extractor, row.n, row.seed) == (WITH_LORA, f"{reader.name}-faded", 70, 3)
    again = measure_model(WITH_LORA, tmp_path, 0, Unit("unguided", 1.0, 3), 70)
    assert again == row and (tmp_path / "rows" / f"{WITH_LORA}-0" / "unguided-1-seed3.json").is_file()
    assert row.condition_accuracy is not None


def test_what_is_kept_of_the_gain() -> None:
    rows = []
    for seed, shares in ((0, (0.2, 0.6, 0.5)), (1, (0.1, 0.5, 0.5))):
        for (guidance, scale), share in zip((("unguided", 1.0), ("cfg", 4.0), ("agd", 4.0)), shares):
            what = {"base": "m", "guidance": guidance, "adapter": "modulated" if guidance == "agd" else None}
            rows.append(a_row(**what, scale=scale, seed=seed, condition_accuracy=share))
    kept = gain_kept(rows)
    assert kept.keys() == {"m"} and kept["m"][4.0] == pytest.approx((0.75, 1.0))
