"""Every widget of the notebooks: sliders over pictures that were drawn beforehand, and a box to ask for new ones.

A widget needs a live kernel, so a notebook always shows a static figure as well; what these classes print where there
are no widgets says so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def figure_png(figure: Figure, dpi: int = 80) -> bytes:
    """A figure as a PNG file, its size unchanged from one figure to the next (no tight bounding box)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def images_png(images: Tensor, columns: int, side: int = 96, gap: int = 4) -> bytes:
    """Images in rows as a PNG file: small ones enlarged without smoothing, large ones averaged down.

    Args:
        images: (N, 3, H, W) in [0, 1]. columns: images per row.
        side: width of one image on the page, in pixels, rounded to a multiple of its own. gap: between them.
    """
    if images.shape[-1] > side:
        height = max(1, round(side * images.shape[-2] / images.shape[-1]))
        images = F.interpolate(images.float(), size=(height, side), mode="area")
    factor = max(1, round(side / images.shape[-1]))
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pixels.shape[1:3]
    rows = -(-len(pixels) // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


class PictureBrowser(widgets.VBox):
    """A picture and one slider for each way in which it can change.

    Args:
        axes: slider name -> its positions as text, such as ``{"scale": ["1", "2"], "step": ["0", "1", "2"]}``.
        pictures: PNG files, one for every combination of positions, keyed by their indices in the order of ``axes``.
        start: index of the first position shown, per slider; by default the middle ones.

    Attributes:
        sliders: one per axis; setting a slider's ``value`` changes the picture.
        picture: the ``widgets.Image`` shown.

    Raises:
        ValueError: if a combination has no picture.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[str]],
        pictures: Mapping[tuple[int, ...], bytes],
        start: Sequence[int] | None = None,
    ) -> None:
        missing = [key for key in product(*(range(len(names)) for names in axes.values())) if key not in pictures]
        if missing or not axes:
            raise ValueError(f"got no picture for the positions {missing[:3]} of the sliders {list(axes)}")
        self.axes = {name: list(names) for name, names in axes.items()}
        self.pictures = dict(pictures)
        first = list(start) if start is not None else [len(names) // 2 for names in self.axes.values()]
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.sliders = [
            widgets.IntSlider(
                value=position,
                min=0,
                max=len(names) - 1,
                description=name,
                readout=False,
                style={"description_width": "110px"},
                layout=widgets.Layout(width="480px"),
            )
            for position, (name, names) in zip(first, self.axes.items())
        ]
        self.readouts = [widgets.Label() for _ in self.sliders]
        for slider in self.sliders:
            slider.observe(self._show, names="value")
        rows = [widgets.HBox([slider, readout]) for slider, readout in zip(self.sliders, self.readouts)]
        super().__init__([*rows, self.picture])
        self._show()

    def _show(self, change: Any = None) -> None:
        """Put the picture and the readouts where the sliders stand."""
        for slider, readout, names in zip(self.sliders, self.readouts, self.axes.values()):
            readout.value = names[slider.value]
        self.picture.value = self.pictures[tuple(slider.value for slider in self.sliders)]

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """What is stored in a notebook: the widget, and in its place, where no kernel runs, a sentence."""
        bundle: dict[str, Any] = super()._repr_mimebundle_(**kwargs)
        names = " and ".join(f"{name!r}" for name in self.axes)
        bundle["text/plain"] = (
            f"[sliders {names}: run this notebook to move them; a figure without them is beside this]"
        )
        return bundle


class PromptBox(widgets.VBox):
    """A text box for a prompt and a slider for the guidance scale; what they ask for is drawn anew when either changes.

    Args:
        draw: ``draw(prompt, scale)`` gives a PNG file.
        prompt, scale: drawn at first. scales: the slider's ends.

    Attributes:
        text, slider: setting their ``value`` draws. picture: the ``widgets.Image`` shown.
    """

    def __init__(
        self, draw: Callable[[str, float], bytes], prompt: str, scale: float, scales: tuple[float, float]
    ) -> None:
        self.draw = draw
        style = {"description_width": "110px"}
        self.text = widgets.Text(
            value=prompt,
            description="prompt",
            continuous_update=False,
            style=style,
            layout=widgets.Layout(width="640px"),
        )
        self.slider = widgets.FloatSlider(
            value=scale,
            min=scales[0],
            max=scales[1],
            step=0.5,
            description="guidance scale",
            continuous_update=False,
            style=style,
            layout=widgets.Layout(width="480px"),
        )
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        for control in (self.text, self.slider):
            control.observe(self._show, names="value")
        super().__init__([self.text, self.slider, self.picture])
        self._show()

    def _show(self, change: Any = None) -> None:
        self.picture.value = self.draw(self.text.value, self.slider.value)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """What is stored in a notebook: the widget, and in its place, where no kernel runs, a sentence."""
        bundle: dict[str, Any] = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = "[a text box and a slider: run this notebook to ask for pictures of your own]"
        return bundle
