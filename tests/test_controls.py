"""The widgets: moving a slider changes what is shown, and something readable stands where there is no kernel."""

import base64
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from agd_lib.controls import PictureBrowser, PromptBox, figure_png, images_png

AXES = {"scale": ["w = 1", "w = 2", "w = 4"], "step": ["0", "1"]}


def picture(value: int) -> bytes:
    return images_png(torch.full((1, 3, 8, 8), value / 255), columns=1)


@pytest.fixture
def browser() -> PictureBrowser:
    return PictureBrowser(AXES, {(i, j): picture(40 * i + 10 * j) for i in range(3) for j in range(2)}, start=(0, 0))


def shown_value(browser: PictureBrowser) -> int:
    """The grey value of the picture that the widget shows now."""
    return Image.open(io.BytesIO(browser.picture.value)).getpixel((0, 0))[0]


def test_a_slider_changes_the_picture_and_its_label(browser):
    scale, step = browser.sliders
    seen = {}
    for i in range(3):
        for j in range(2):
            scale.value, step.value = i, j
            seen[i, j] = shown_value(browser)
            assert [label.value for label in browser.readouts] == [AXES["scale"][i], AXES["step"][j]]
    assert seen == {(i, j): 40 * i + 10 * j for i in range(3) for j in range(2)}


def test_a_slider_works_as_the_front_end_moves_it(browser):
    """JupyterLab sends the new value as a message to the widget's model."""
    browser.sliders[0].set_state({"value": 2})
    assert shown_value(browser) == 80


def test_sliders_start_where_asked_else_in_the_middle(browser):
    assert [slider.value for slider in browser.sliders] == [0, 0]
    pictures = {(i, j): picture(40 * i + 10 * j) for i in range(3) for j in range(2)}
    assert [slider.value for slider in PictureBrowser(AXES, pictures).sliders] == [1, 1]


def test_sliders_cannot_leave_their_pictures(browser):
    browser.sliders[0].value = 99
    assert browser.sliders[0].value == 2 and shown_value(browser) == 80


def test_without_a_kernel_a_sentence_stands_in(browser):
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "'scale' and 'step'" in bundle["text/plain"] and "run this notebook" in bundle["text/plain"]
    json.dumps(bundle)  # it is stored in a notebook


def test_missing_pictures_are_found_at_once():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        PictureBrowser(AXES, {(i, j): picture(0) for i in range(3) for j in range(2) if (i, j) != (2, 1)})
    with pytest.raises(ValueError, match="sliders"):
        PictureBrowser({}, {})


def test_images_are_enlarged_without_smoothing():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    page = np.asarray(Image.open(io.BytesIO(images_png(images, columns=3, side=32, gap=4))))
    assert page.shape == (2 * 32 + 4, 3 * 32 + 2 * 4, 3)
    expected = (images[4] * 255).round().byte().permute(1, 2, 0).numpy()  # second row, second column
    assert np.array_equal(page[36:68:4, 36:68:4], expected)
    assert np.array_equal(page[39:68:4, 39:68:4], expected)
    assert (page[36:, 72:] == 255).all()  # the empty place of the sixth image


def test_large_images_are_averaged_down():
    stripes = torch.zeros(2, 3, 64, 64)
    stripes[..., ::2] = 1
    page = np.asarray(Image.open(io.BytesIO(images_png(stripes, columns=2, side=16, gap=2))))
    assert page.shape == (16, 2 * 16 + 2, 3)
    assert np.abs(page[:, :16].astype(int) - 128).max() <= 1


def test_figures_keep_their_size_from_picture_to_picture():
    sizes = set()
    for title in ("short", "a much longer title, which a tight bounding box would give more room"):
        figure, axis = plt.subplots(figsize=(3, 2))
        axis.set_title(title)
        plt.close(figure)
        sizes.add(Image.open(io.BytesIO(figure_png(figure, dpi=50))).size)
    assert sizes == {(150, 100)}
    assert base64.b64encode(figure_png(figure))[:4] == b"iVBO"  # a PNG file


def test_a_prompt_and_a_scale_are_drawn_whenever_either_changes():
    asked = []

    def draw(prompt, scale):
        asked.append((prompt, scale))
        return picture(len(asked))

    box = PromptBox(draw, "a red star", 3.0, (1.0, 12.0))
    first = box.picture.value
    box.text.value = "a blue ring"
    box.slider.value = 7.5
    assert asked == [("a red star", 3.0), ("a blue ring", 3.0), ("a blue ring", 7.5)]
    assert box.picture.value != first
    assert "run this notebook" in box._repr_mimebundle_()["text/plain"]
