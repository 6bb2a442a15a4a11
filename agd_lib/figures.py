"""Every plot and image grid of the notebooks. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = {
    "unguided": "#7f7f7f",
    "cfg": "#1f4e8c",
    "agd offset": "#e08214",
    "agd cross-attention": "#4d9221",
    "agd low-rank": "#b2182b",
}
"""One colour per method, the same in every figure."""


def image_grid(
    images: Tensor,
    columns: int,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
    cell: float = 0.9,
) -> Figure:
    """Images in rows.

    Args:
        images: (N, 3, H, W) in [0, 1], row by row.
        columns: images per row.
        cell: side of an image in inches.
    """
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(cell * columns + 1.2, cell * rows + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    for axis, image in zip(axes.flat, images):
        axis.imshow(np.asarray(image.permute(1, 2, 0).cpu()), interpolation="nearest")
    for row, text in enumerate(row_titles):
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    for column, text in enumerate(column_titles):
        axes[0, column].set_title(text, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout(pad=0.3)
    plt.close(figure)
    return figure
