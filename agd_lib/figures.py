"""Every plot and image grid of the notebooks. Each function returns a matplotlib figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from torch import Tensor

from .evaluation import Timing
from .mixture import GaussianMixture, guided_score, sharpened_log_density
from .results import Row, summarise

COLOURS = {
    "unguided": "#7f7f7f",
    "cfg": "#1f4e8c",
    "agd offset": "#e08214",
    "agd cross-attention": "#4d9221",
    "agd modulated": "#b2182b",
}
"""One colour per method, the same in every figure."""

CURVES = ("fd", "precision", "recall", "condition_accuracy")
"""The measures that are drawn over the scale."""

_TITLES = {"fd": "Fréchet distance", "condition_accuracy": "accuracy", "endpoint_mse_ratio": "endpoint error"}
"""As the tables call them; the other measures go by their own names."""


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
    left = 0.2 + 0.07 * max((len(text) for text in row_titles), default=0)  # inches, for the longest label
    size = (cell * columns + left, cell * rows + 0.15 + (0.25 if column_titles else 0) + (0.4 if title else 0))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
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
        figure.suptitle(title, fontsize=11, y=1 - 0.05 / size[1], va="top")
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.3 / size[1] if title else 1))
    plt.close(figure)
    return figure


# Trajectories and training (notebooks 02 and 03) -------------------------------------------------------------------------


def curves_over_timesteps(
    curves: Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]],
    y_label: str,
    title: str = "",
    log: bool = True,
    colours: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
) -> Figure:
    """Curves over the noise level; time runs from left (noise) to right (image), as sampling does.

    Args:
        curves: label -> (timesteps, values).
        log: logarithmic values.
        colours: label -> colour; the others take their turn in matplotlib's cycle. dashed: labels of dashed curves.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for label, (timesteps, values) in curves.items():
        axis.plot(
            np.asarray(timesteps),
            np.asarray(values),
            label=label,
            color=(colours or {}).get(label),
            linestyle="--" if label in dashed else "-",
            marker="o",
            markersize=3,
        )
    axis.invert_xaxis()
    axis.set_xlabel("timestep t (left: noise, right: image)")
    axis.set_ylabel(y_label)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if len(curves) > 1:  # below the axes, where no curve is
        columns = min(len(curves), 3 if max(map(len, curves)) <= 28 else 2)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns)
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)
    return figure


def recorded_states(
    trajectory_scales: Tensor, guidance_range: tuple[float, float], batch_timesteps: Tensor, batch_scales: Tensor
) -> Figure:
    """What a store holds: the scales of its trajectories, and one training batch in the plane of (t, w).

    Args:
        trajectory_scales: (num_trajectories,). batch_timesteps, batch_scales: (B,).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3))
    low, high = guidance_range
    bins = 20
    left.hist(np.asarray(trajectory_scales), bins=bins, range=(low, high), color=COLOURS["cfg"], alpha=0.8)
    left.axhline(
        len(trajectory_scales) / bins, color="black", linestyle="--", linewidth=1, label="expected, if uniform"
    )
    left.set_xlabel("guidance scale w")
    left.set_ylabel("trajectories")
    left.set_title("one scale for each trajectory", fontsize=10)
    left.legend(fontsize=8)
    right.scatter(np.asarray(batch_timesteps), np.asarray(batch_scales), s=14, color=COLOURS["agd modulated"])
    right.invert_xaxis()
    right.set_xlabel("timestep t (left: noise, right: image)")
    right.set_ylabel("guidance scale w")
    right.set_title(f"one training batch: {len(batch_scales)} recorded states", fontsize=10)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    plt.close(figure)
    return figure


def trajectory_plane(clean_latents: Tensor, paths: Tensor, scales: Sequence[float], title: str = "") -> Figure:
    """Trajectories from the same noise at several scales, seen in the two main directions of real latents.

    Args:
        clean_latents: (N, C, H, W), scaled latents of real images, drawn as a cloud.
        paths: (S, T, C, H, W), one path for each scale. scales: S of them.
    """
    cloud, mean = clean_latents.flatten(1), clean_latents.flatten(1).mean(dim=0)
    directions = torch.linalg.svd(cloud - mean, full_matrices=False).Vh[:2]  # (2, D)
    points = (cloud - mean) @ directions.T
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    axis.scatter(points[:, 0], points[:, 1], s=4, color="#bbbbbb", label="latents of real images", zorder=1)
    colours = plt.colormaps["viridis"](np.linspace(0, 0.9, len(scales)))
    for path, scale, colour in zip(paths, scales, colours):
        line = (path.flatten(1) - mean) @ directions.T
        axis.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.5, label=f"w = {scale:g}", zorder=2)
        axis.scatter(line[-1:, 0], line[-1:, 1], s=45, color=[colour], edgecolor="black", zorder=3)
    start = (paths[0, :1].flatten(1) - mean) @ directions.T
    axis.scatter(start[:, 0], start[:, 1], s=60, marker="*", color="black", label="the noise they share", zorder=4)
    axis.set_xlabel("first principal direction")
    axis.set_ylabel("second")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)
    return figure


def adapter_sites(blocks: int, width: int, hidden_size: int, kind: str = "offset") -> Figure:
    """Where an adapter sits in a DiT block, drawn: beside self-attention (the paper), or beside the MLP ("modulated").

    Args:
        blocks: number of blocks. width: C, of the tokens. hidden_size: d, of the adapter.
        kind: a name in :data:`agd_lib.adapters.ADAPTERS`.
    """
    figure, axis = plt.subplots(figsize=(9.5, 4.0))
    axis.set_xlim(0, 19)
    axis.set_ylim(0, 7.5)
    axis.axis("off")
    frozen, trained, red, grey = "#dde6f2", "#fbdcc4", COLOURS["agd modulated"], "#444444"
    y, low = 4.6, 2.2

    def box(x: float, height: float, text: str, colour: str, w: float) -> tuple[float, float]:
        axis.add_patch(
            FancyBboxPatch((x - w / 2, height - 0.55), w, 1.1, boxstyle="round,pad=0.05", fc=colour, ec=grey)
        )
        axis.text(x, height, text, ha="center", va="center", fontsize=8.5)
        return x - w / 2 - 0.05, x + w / 2 + 0.05

    def plus(x: float, colour: str = grey) -> tuple[float, float]:
        axis.add_patch(Circle((x, y), 0.28, fc="white", ec=colour, linewidth=1.2, zorder=3))
        axis.text(x, y - 0.02, "+", ha="center", va="center", fontsize=12, color=colour, zorder=4)
        return x - 0.28, x + 0.28

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = grey) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2})

    axis.add_patch(
        FancyBboxPatch((1.25, 1.0), 15.9, 6.2, boxstyle="round,pad=0.1", fc="none", ec="#888888", linestyle="--")
    )
    axis.text(1.5, 6.85, f"one of {blocks} DiT blocks (frozen)", fontsize=9, color="#555555")
    if kind == "modulated":
        parts = [box(3.8, y, "adaLN, self-attention,\ngate (t, c)", frozen, 3.2), plus(6.4)]
        parts += [box(8.3, y, "adaLN\n(t, c)", frozen, 1.7), box(10.9, y, "MLP", frozen, 2.3), plus(13.1, red)]
        parts += [box(14.6, y, "gate (t, c)", frozen, 1.6), plus(16.3)]
        branch, adapter, joined, residuals = 9.4, 10.9, 13.1, ((1.65, 6.4), (6.95, 16.3))
        title = "The extension corrects the MLP's output, and shifts the embedding of timestep and class"
        axis.text(4.6, low, "shift of the embedding\nthat every (t, c) stands for", ha="center", va="center", color=red)
        arrow((9.7, low - 0.35), (6.9, low - 0.35), red)
        for x in (3.8, 8.3):
            arrow((4.6, low + 0.55), (x, y - 0.65), red)
    else:
        parts = [box(2.9, y, "adaLN\n(t, c)", frozen, 1.7), box(5.9, y, "self-attention", frozen, 2.3), plus(8.1, red)]
        parts += [box(9.6, y, "gate (t, c)", frozen, 1.6), plus(11.3)]
        parts += [box(13.6, y, "adaLN, MLP, gate\n(t, c)", frozen, 2.7), plus(16.2)]
        branch, adapter, joined, residuals = 4.25, 5.9, 8.1, ((1.65, 11.3), (11.75, 16.2))
        title = "The adapter adds its correction to the attention's output; nothing of the base changes"
    edges = [(0.0, 0.05), *parts, (18.6, 19.0)]
    for (_, right), (left, _) in itertools.pairwise(edges):
        arrow((right, y), (left, y))
    for left, right in residuals:
        axis.plot([left, left, right], [y, 6.2, 6.2], color=grey, linewidth=1.2)
        arrow((right, 6.2), (right, y + 0.28))
    left, right = box(adapter, low, f"adapter\nd = {hidden_size}", trained, 2.3)
    axis.plot([branch, branch], [y, low], color=red, linewidth=1.2)
    arrow((branch, low), (left, low), red)
    axis.plot([right, joined], [low, low], color=red, linewidth=1.2)
    arrow((joined, low), (joined, y - 0.28), red)
    axis.text(adapter, 0.35, "guidance scale w, timestep t, class c", ha="center", va="center", fontsize=9, color=red)
    arrow((adapter, 0.6), (adapter, low - 0.6), red)
    axis.text(joined + 0.2, 2.9, "zero at the start", fontsize=8.5, color=red)
    axis.text(0.05, y + 0.2, f"tokens\n(N, {width})", fontsize=8)
    axis.text(17.5, y + 0.2, "next block", fontsize=8)
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)
    return figure


def unet_sites(num_down: int, num_up: int, sites: Mapping[str, int], passed_over: Sequence[str] = ()) -> Figure:
    """A UNet as a U: how many adapters every block has, and at which width.

    Args:
        num_down, num_up: numbers of its blocks on the way down and up.
        sites: C, the width, by the name of the attention layer (as in ``AdapterConfig.sites``).
        passed_over: sites that the authors' code leaves without an adapter.
    """
    grey, red = "#444444", COLOURS["agd modulated"]
    depth = max(num_down, num_up)
    figure, axis = plt.subplots(figsize=(8.5, 1.0 * depth + 1.4))
    axis.set_xlim(0, 10)
    axis.set_ylim(-depth - 0.75, 0.55)
    axis.axis("off")
    places = {f"down_blocks.{i}": (2.2, -float(i)) for i in range(num_down)}
    places |= {"mid_block": (5.0, -float(depth))}
    places |= {f"up_blocks.{i}": (7.8, -float(num_up - 1 - i)) for i in range(num_up)}
    for block, (x, y) in places.items():
        own = [name for name in sites if name.startswith(f"{block}.")]
        width = f", {sites[own[0]]} channels" if own else ""
        axis.add_patch(
            FancyBboxPatch(
                (x - 1.5, y - 0.3), 3.0, 0.6, boxstyle="round,pad=0.05", fc="#fbdcc4" if own else "#dde6f2", ec=grey
            )
        )
        skipped = sum(name in passed_over for name in own)
        said = f"{len(own)} adapter{'s' * (len(own) != 1)}{width}" if own else "no attention"
        if skipped:
            said += f" ({skipped} not in theirs)"
        axis.text(x, y + 0.11, block, ha="center", va="center", fontsize=8.5)
        axis.text(x, y - 0.15, said, ha="center", va="center", fontsize=7.5, color=red if own else grey)
    order = list(places)
    for one, other in itertools.pairwise(order):
        (x0, y0), (x1, y1) = places[one], places[other]
        start, end = ((x0, y0 - 0.35), (x1, y1 + 0.35)) if x0 == x1 == 2.2 else ((x0, y0 + 0.35), (x1, y1 - 0.35))
        if "mid_block" in (one, other):
            start, end = (
                ((x0, y0 - 0.35), (x1 - 1.55, y1)) if other == "mid_block" else ((x0 + 1.55, y0), (x1, y1 - 0.35))
            )
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": grey, "linewidth": 1.2})
    for i in range(min(num_down, num_up)):
        y = places[f"down_blocks.{i}"][1]
        axis.annotate("", (6.2, y), (3.8, y), arrowprops={"arrowstyle": "-|>", "color": "#999999", "linestyle": "--"})
    axis.text(5.0, 0.18, "skip connections", ha="center", fontsize=7.5, color="#777777")
    figure.tight_layout()
    plt.close(figure)
    return figure


def memory_bars(memories: Mapping[str, Mapping[str, float]], cards: Sequence[float], title: str = "") -> Figure:
    """What a training step takes of a card's memory, a bar for each way to train, and what cards there are.

    Args:
        memories: way -> part -> GiB; the parts are stacked.
        cards: memory of cards in GiB, drawn as lines.
    """
    figure, axis = plt.subplots(figsize=(8.5, 0.5 * len(memories) + 1.6))
    names = list(memories)
    left = np.zeros(len(names))
    for part in dict.fromkeys(itertools.chain(*memories.values())):
        sizes = np.array([memories[name].get(part, 0.0) for name in names])
        axis.barh(names, sizes, left=left, label=part, height=0.6)
        left += sizes
    for end, row in zip(left, range(len(names))):
        axis.text(end + 0.2, row, f"{end:.1f}", va="center", fontsize=8)
    for card in cards:
        axis.axvline(card, color="#444444", linestyle=":", linewidth=1)
        axis.text(card, -0.75, f"{card:g}", ha="center", fontsize=8, color="#444444")
    axis.invert_yaxis()
    axis.set_ylim(len(names) - 0.4, -0.95)
    axis.set_xlabel("GiB (dotted: cards)")
    axis.legend(fontsize=8, loc="lower right")
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    plt.close(figure)
    return figure


def loss_curves(losses: Mapping[str, Mapping[int, float]], window: int = 25) -> Figure:
    """Training losses over steps, on a log axis: every batch faintly, and the mean of the last ``window`` of them.

    Args:
        losses: adapter kind -> (step -> loss).
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for kind, curve in losses.items():
        steps, values = np.array(list(curve)), np.array(list(curve.values()))
        size = min(window, len(values))
        smooth = np.convolve(values, np.ones(size) / size, mode="valid")
        colour = COLOURS[f"agd {kind}"]
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps[size - 1 :], smooth, color=colour, linewidth=2, label=f"{kind} (mean of {size} batches)")
    axis.set_yscale("log")
    axis.set_xlabel("training step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure


# Guidance: the idea and its price (notebooks 00 and 01) ------------------------------------------------------------------


def guidance_diagram() -> Figure:
    """One sampler step, drawn: classifier-free guidance asks the denoiser twice, AGD once."""
    figure, axis = plt.subplots(figsize=(9.5, 3.9))
    axis.set_xlim(0, 19)
    axis.set_ylim(0, 7.8)
    axis.axis("off")
    frozen, trained, ink = "#dde6f2", "#fbdcc4", "#444444"

    def box(x: float, y: float, text: str, colour: str, w: float, size: float = 9.5) -> None:
        axis.add_patch(FancyBboxPatch((x - w / 2, y - 0.525), w, 1.05, boxstyle="round,pad=0.06", fc=colour, ec=ink))
        axis.text(x, y, text, ha="center", va="center", fontsize=size)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 1.2})

    axis.text(0.1, 7.2, "Classifier-free guidance: two passes a step", fontsize=11, color=COLOURS["cfg"], weight="bold")
    axis.text(0.2, 5.35, r"$x_t$", fontsize=14, va="center")
    for y, name, symbol in ((6.1, "asked with c", "c"), (4.6, "asked without c", r"\varnothing")):
        arrow((0.95, 5.35), (2.9, y))
        box(5.3, y, f"frozen denoiser, {name}", frozen, 4.6)
        arrow((7.75, y), (9.2, y))
        axis.text(9.35, y, rf"$\epsilon(x_t, {symbol})$", fontsize=12, va="center")
        arrow((11.2, y), (12.35, 5.35 + (y - 5.35) * 0.35))
    box(14.2, 5.35, r"$\epsilon_\varnothing + w\,(\epsilon_c - \epsilon_\varnothing)$", "white", 3.4, 11.5)
    arrow((16.0, 5.35), (17.2, 5.35))
    axis.text(17.35, 5.35, r"$\hat\epsilon$", fontsize=15, va="center")

    colour = COLOURS["agd modulated"]
    axis.text(0.1, 3.1, "Adapter guidance distillation: one pass a step", fontsize=11, color=colour, weight="bold")
    axis.text(0.2, 1.75, r"$x_t$", fontsize=14, va="center")
    arrow((0.95, 1.75), (2.9, 1.75))
    box(5.3, 1.75, "frozen denoiser, asked with c", frozen, 4.6)
    for x in (3.7, 4.75, 5.85, 6.9):
        axis.add_patch(FancyBboxPatch((x - 0.35, 0.95), 0.7, 0.36, boxstyle="round,pad=0.04", fc=trained, ec=colour))
    axis.text(9.0, 0.55, "small trained adapters, told the scale w", fontsize=9, color=colour, va="center")
    arrow((8.9, 0.6), (7.45, 0.95))
    arrow((7.75, 1.75), (17.2, 1.75))
    axis.text(17.35, 1.75, r"$\approx \hat\epsilon$", fontsize=15, va="center")
    figure.tight_layout(pad=0.3)
    plt.close(figure)
    return figure


def cost_bars(nfe: Mapping[str, float], seconds: Mapping[int, Mapping[str, Timing]]) -> Figure:
    """The price of a kind of guidance: forward passes per image, and seconds per image at some batch sizes.

    Args:
        nfe: name in :data:`COLOURS` -> forward passes per image.
        seconds: batch size -> name -> timing; whiskers from the fastest to the slowest round.
    """
    names = list(nfe)
    figure, axes = plt.subplots(
        1, 1 + len(seconds), figsize=(3.4 * (1 + len(seconds)), 0.45 * len(names) + 1.4), sharey=True, squeeze=False
    )
    rows = np.arange(len(names))
    colours = [COLOURS[name] for name in names]
    first = axes[0, 0]
    first.barh(rows, [nfe[name] for name in names], color=colours)
    for row, name in zip(rows, names):
        first.text(nfe[name], row, f" {nfe[name]:g}", va="center", fontsize=9)
    first.set_xlim(0, 1.18 * max(nfe.values()))
    first.set_yticks(rows, names)
    first.invert_yaxis()
    first.set_xlabel("forward passes per image")
    for axis, (batch_size, timings) in zip(axes[0, 1:], seconds.items()):
        milliseconds = [1000 * timings[name].median for name in names]
        below = [1000 * (timings[name].median - timings[name].minimum) for name in names]
        above = [1000 * (timings[name].maximum - timings[name].median) for name in names]
        axis.barh(rows, milliseconds, color=colours, xerr=[below, above], error_kw={"capsize": 3, "elinewidth": 1})
        axis.set_xlabel(f"ms per image, batch of {batch_size}")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    plt.close(figure)
    return figure


# Guidance in the plane (notebook 01) ---------------------------------------------------------------------------------------

_EXTENT = 3.3
_ASKED, _OTHERS = (0.12, 0.31, 0.55), (0.55, 0.55, 0.55)  # colour of the class asked for, and of the others


def scale_colours(scales: Sequence[float]) -> dict[float, Any]:
    """One colour per guidance scale, from light to dark as the scale grows."""
    return dict(zip(scales, plt.colormaps["viridis_r"](np.linspace(0.12, 0.95, len(scales)))))


def _plane(points: int = 240) -> Tensor:
    """A grid of points in the plane, (points, points, 2), rows from bottom to top."""
    line = torch.linspace(-_EXTENT, _EXTENT, points, dtype=torch.float64)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)


def _shade(axis: Axes, values: Tensor, colour: Sequence[float] = _ASKED, strength: float = 0.9) -> None:
    """Show values (n, n) >= 0 on the plane in ten flat steps: transparent at 0, ``colour`` at the largest."""
    picture = np.zeros((*values.shape, 4))
    picture[..., :3] = colour
    picture[..., 3] = strength * np.round(10 * np.clip(np.asarray(values / values.max()), 0, 1) ** 0.7) / 10
    limits = (-_EXTENT, _EXTENT, -_EXTENT, _EXTENT)
    axis.imshow(picture, origin="lower", extent=limits, interpolation="nearest")


def _arms(axis: Axes, mixture: GaussianMixture, label: int, time: float = 0.0, strength: float = 0.55) -> None:
    """The class asked for in blue, the other classes in grey, at a noise level."""
    grid = _plane()
    for other in mixture.labels.unique().tolist():
        if other != label:
            density = mixture.given(other).noised(time).log_density(grid).exp()
            _shade(axis, density, _OTHERS, 0.4 * strength)
    _shade(axis, mixture.given(label).noised(time).log_density(grid).exp(), _ASKED, strength)


def _panels(rows: int, columns: int, side: float = 2.45, headroom: float = 0.35) -> tuple[Figure, Any]:
    """A figure of square panels of the plane, without ticks."""
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows + headroom), dpi=80, squeeze=False)
    for axis in axes.flat:
        axis.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), xticks=[], yticks=[], aspect="equal")
        axis.spines[:].set_color("#bbbbbb")
    return figure, axes


def _finish(figure: Figure) -> Figure:
    figure.tight_layout(pad=0.6)
    plt.close(figure)
    return figure


def sharpened_densities(mixture: GaussianMixture, label: int, scales: Sequence[float]) -> Figure:
    """All classes, what a perfect classifier says of one, and the densities p(x) p(c | x)^w for some scales w."""
    figure, axes = _panels(1, 2 + len(scales))
    grid = _plane()
    _arms(axes[0, 0], mixture, label, strength=0.9)
    axes[0, 0].set_title(r"$p(x)$; class $c$ in blue", fontsize=10)
    _shade(axes[0, 1], mixture.log_posterior(label, grid).exp(), (0.75, 0.35, 0.05), 0.8)
    axes[0, 1].set_title(r"$p(c \mid x)$", fontsize=10)
    for axis, scale in zip(axes[0, 2:], scales):
        log_density = sharpened_log_density(mixture.given(label), mixture, grid, scale)
        _shade(axis, (log_density - log_density.max()).exp())
        exponent = "" if scale == 1 else f"^{{\\,{scale:g}}}"
        axis.set_title(rf"$p(x)\,p(c \mid x){exponent}$", fontsize=10)
    return _finish(figure)


def guidance_field(mixture: GaussianMixture, label: int, time: float, scale: float) -> Figure:
    """The fields that guidance is made of, as arrows at one noise level.

    Arrows are scores times the noise variance, the way towards the denoised point; one length unit in all panels.
    """
    unconditional, conditional = mixture.noised(time), mixture.given(label).noised(time)
    grid = _plane(11)[1:-1, 1:-1].reshape(-1, 2)
    without, given = unconditional.score(grid), conditional.score(grid)
    fields = {
        "without the class\n" + r"$s_\varnothing$": (without, "#555555"),
        "with the class\n" + r"$s_c$": (given, COLOURS["cfg"]),
        "what the class adds\n" + r"$s_c - s_\varnothing$": (given - without, "#bf5b0b"),
        f"guided, $w = {scale:g}$\n" + r"$s_\varnothing + w\,(s_c - s_\varnothing)$": (
            guided_score(conditional, unconditional, grid, scale),
            COLOURS["agd modulated"],
        ),
    }
    figure, axes = _panels(1, len(fields), headroom=0.6)
    variance = np.sin(np.pi * time / 2) ** 2
    for axis, (title, (field, colour)) in zip(axes.flat, fields.items()):
        _arms(axis, mixture, label, time, 0.45)
        arrows = np.asarray(variance * field)
        axis.quiver(
            *grid.T.numpy(), *arrows.T, color=colour, angles="xy", scale_units="xy", scale=4, width=0.008, zorder=3
        )
        axis.set_title(title, fontsize=10)
    return _finish(figure)


def guided_path_panels(mixture: GaussianMixture, label: int, paths: Mapping[float, Tensor], show: int = 40) -> Figure:
    """Probability-flow paths from the same noise, one panel per scale.

    Args:
        paths: scale -> (T, N, 2), from noise to data; the first ``show`` are drawn.
    """
    figure, axes = _panels(1, len(paths))
    for axis, (scale, path) in zip(axes.flat, paths.items()):
        _arms(axis, mixture, label)
        axis.plot(*path[:, :show].permute(2, 0, 1).numpy(), color="#333333", linewidth=0.6, alpha=0.75)
        axis.scatter(*path[0, :show].T, s=5, color="#999999", zorder=3)
        axis.scatter(*path[-1, :show].T, s=14, color="#d6451b", edgecolor="white", linewidth=0.4, zorder=4)
        axis.set_title(f"w = {scale:g}", fontsize=10)
    return _finish(figure)


def guided_levels(
    mixture: GaussianMixture,
    label: int,
    times: Tensor,
    paths: Mapping[float, Tensor],
    levels: Sequence[float],
    show: int = 250,
) -> Figure:
    """Guided states (dots) on the class's own noised density (blue; the line encloses 95 % of it), noise to data.

    Args:
        times: (T,). paths: scale -> (T, N, 2). levels: times to show, one per column; one row per scale.
    """
    figure, axes = _panels(len(paths), len(levels), 2.1)
    grid = _plane()
    line = grid[0, :, 0].numpy()
    for column, level in enumerate(levels):
        index = int((times - level).abs().argmin())
        density = mixture.given(label).noised(float(times[index]))
        log_density = density.log_density(grid)
        for row, (scale, path) in enumerate(paths.items()):
            axis = axes[row, column]
            _shade(axis, log_density.exp(), strength=0.5)
            axis.contour(
                line, line, log_density, [density.density_level()], colors=[_ASKED], linewidths=1, linestyles="-"
            )
            axis.scatter(*path[index, :show].T, s=2.5, color="#d6451b", alpha=0.6, linewidth=0, zorder=3)
            if row == 0:
                axis.set_title(f"t = {float(times[index]):.2f}", fontsize=10)
            if column == 0:
                axis.set_ylabel(f"w = {scale:g}", fontsize=10)
    return _finish(figure)


def guided_state(
    mixture: GaussianMixture, label: int, time: float, states: Tensor, before: Tensor, scale: float
) -> Figure:
    """One moment of guided sampling: states on the class's noised density, with the way that some of them came.

    Args:
        states: (N, 2) at this time. before: (T, M, 2), paths from noise up to this time.
    """
    figure, axes = _panels(1, 1, 4.6)
    axis, grid = axes[0, 0], _plane()
    density = mixture.given(label).noised(time)
    log_density = density.log_density(grid)
    _shade(axis, log_density.exp(), strength=0.5)
    line = grid[0, :, 0].numpy()
    axis.contour(line, line, log_density, [density.density_level(count=4_000)], colors=[_ASKED], linestyles="-")
    axis.plot(*before.permute(2, 0, 1).numpy(), color="#333333", linewidth=0.5, alpha=0.6)
    axis.scatter(*states.T, s=6, color="#d6451b", alpha=0.75, linewidth=0, zorder=3)
    axis.set_title(f"w = {scale:g}, t = {time:.2f}", fontsize=10)
    return _finish(figure)


def leaving_the_diffusion(
    times: Sequence[float], outside: Mapping[float, Sequence[float]], spread: Mapping[float, Sequence[float]]
) -> Figure:
    """How far guided states are from the class's own noised density, over noise levels, one curve per scale.

    Args:
        times: from noise to data. outside: scale -> share of states outside the region that holds 95 %.
        spread: scale -> area that the states cover, as a share of the density's own.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), dpi=80)
    colours = scale_colours(list(outside))
    panels = (
        (outside, 0.05, "share outside the 95 % region", "expected of true samples"),
        (spread, 1.0, "area covered / the class's own", "the class's own"),
    )
    for axis, (curves, expected, label, note) in zip(axes, panels):
        axis.axhline(expected, color="black", linewidth=1, linestyle="--", label=note)
        for scale, values in curves.items():
            axis.plot(times, values, color=colours[scale], linewidth=2, label=f"w = {scale:g}")
        axis.set_xlabel("noise level t (left: noise, right: data)")
        axis.set_ylabel(label)
        axis.set_xlim(max(times), min(times))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return _finish(figure)


def promised_and_reached(mixture: GaussianMixture, label: int, ends: Mapping[float, Tensor]) -> Figure:
    """Above: the sharpened density p(x) p(c | x)^w. Below: where the guided paths really end, as a density.

    Args:
        ends: scale -> (N, 2).
    """
    from scipy.ndimage import gaussian_filter

    figure, axes = _panels(2, len(ends), 2.3)
    grid = _plane()
    bins = np.linspace(-_EXTENT, _EXTENT, 81)
    for column, (scale, points) in enumerate(ends.items()):
        log_density = sharpened_log_density(mixture.given(label), mixture, grid, scale)
        _shade(axes[0, column], (log_density - log_density.max()).exp())
        axes[0, column].set_title(f"w = {scale:g}", fontsize=10)
        counts, _, _ = np.histogram2d(points[:, 1].numpy(), points[:, 0].numpy(), bins=[bins, bins])
        _shade(axes[1, column], torch.from_numpy(gaussian_filter(counts, 1.1)), (0.75, 0.24, 0.08))
    axes[0, 0].set_ylabel(r"the formula: $p(x)\,p(c \mid x)^w$", fontsize=9)
    axes[1, 0].set_ylabel("the sampler: guided paths end", fontsize=9)
    return _finish(figure)


def accuracy_and_diversity(
    scales: Sequence[float], accuracy: Sequence[float] | None, diversity: Sequence[float]
) -> Figure:
    """What guidance buys and what it costs, over the scale, and the one against the other.

    Args:
        accuracy: share of images that show the asked class; None without a classifier.
        diversity: mean feature distance between images of one class, as a share of that without guidance.
    """
    columns = 3 if accuracy is not None else 1
    figure, axes = plt.subplots(1, columns, figsize=(3.5 * columns, 3.1), dpi=80, squeeze=False)
    curves = [(diversity, "diversity within a class", "#4d9221")]
    if accuracy is not None:
        curves.insert(0, (accuracy, "class accuracy", COLOURS["cfg"]))
    for axis, (values, label, colour) in zip(axes[0], curves):
        axis.plot(scales, values, marker="o", color=colour)
        axis.set_xlabel("guidance scale w")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if accuracy is not None:
        axis = axes[0, 2]
        axis.plot(diversity, accuracy, color="#bbbbbb", zorder=1)
        axis.scatter(diversity, accuracy, color=list(scale_colours(scales).values()), s=45, zorder=2)
        for x, y, scale in zip(diversity, accuracy, scales):
            axis.annotate(f"{scale:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8)
        axis.set_xlabel("diversity within a class")
        axis.set_ylabel("class accuracy")
        axis.set_title("numbers at the points: w", fontsize=9)
        axis.margins(0.1)
        axis.grid(alpha=0.3)
    return _finish(figure)


def curves_over_scale(rows: Sequence[Row], measures: Sequence[str] = CURVES) -> Figure:
    """One panel per measure, one line per method over the guidance scale; bars are standard deviations over seeds.

    Unguided sampling, which has no scale, is a dotted horizontal line.
    """
    summaries = summarise(rows)
    figure, axes = plt.subplots(1, len(measures), figsize=(3.3 * len(measures), 3.3), squeeze=False)
    for axis, measure in zip(axes[0], measures):
        for method in dict.fromkeys(s.method for s in summaries):
            points = sorted(
                (s.scale, s.mean[measure], s.deviation[measure] or 0.0)
                for s in summaries
                if s.method == method and s.mean[measure] is not None
            )
            if not points:
                continue
            scale, mean, deviation = (np.asarray(values, dtype=float) for values in zip(*points))
            colour = COLOURS.get(method, "black")
            if method == "unguided":
                axis.axhline(mean[0], color=colour, linestyle=":", label=method)
            else:
                axis.errorbar(scale, mean, deviation, color=colour, marker="o", markersize=3, capsize=2, label=method)
        axis.set_title(_TITLES.get(measure, measure), fontsize=10)
        axis.set_xlabel("guidance scale w")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    colours: Mapping[str, str] | None = None,
    shaded: tuple[float, float] | None = None,
    x_log: bool = False,
) -> Figure:
    """One line through the points of each curve.

    Args:
        curves: label -> (x, y). colours: label -> colour; the others take their turn in matplotlib's cycle.
        shaded: a range of x with a grey ground. x_log: logarithmic x, with a tick at every point.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for label, (x, y) in curves.items():
        axis.plot(x, y, label=label, color=(colours or {}).get(label), marker="o", markersize=4)
    if shaded is not None:
        axis.axvspan(*shaded, color="#eeeeee", zorder=0)
    if x_log:
        axis.set_xscale("log")
        ticks = sorted({value for x, _ in curves.values() for value in x})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    if len(curves) > 1:
        axis.legend(fontsize=8)
    return _finish(figure)


def schedules(intervals: Mapping[str, tuple[int, int] | None], scale: float, num_train_timesteps: int) -> Figure:
    """Guidance intervals: the scale over the timestep, one panel each; time runs from left (noise) to right (image).

    Args:
        intervals: label -> timesteps from and to which guidance holds, None: everywhere.
    """
    figure, axes = plt.subplots(1, len(intervals), figsize=(2.4 * len(intervals), 1.9), sharey=True, squeeze=False)
    timesteps = np.arange(num_train_timesteps)
    for axis, (label, interval) in zip(axes[0], intervals.items()):
        low, high = interval or (0, num_train_timesteps)
        values = np.where((timesteps >= low) & (timesteps <= high), scale, 1.0)
        axis.fill_between(timesteps, 1.0, values, step="mid", color=COLOURS["cfg"], alpha=0.25)
        axis.plot(timesteps, values, color=COLOURS["cfg"])
        axis.set_xlim(num_train_timesteps, 0)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("timestep t", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("w(t)", fontsize=9)
    return _finish(figure)


def frechet_illustration(shifts: Sequence[float] = (0.0, 1.5), spreads: Sequence[float] = (1.0, 0.4)) -> Figure:
    """One-dimensional Gaussians that differ in mean, in spread, or in both, each with its Fréchet distance."""
    x = np.linspace(-4, 5, 400)
    cases = [(shift, spread) for shift in shifts for spread in spreads]
    figure, axes = plt.subplots(1, len(cases), figsize=(2.6 * len(cases), 2.2), sharey=True)
    for axis, (shift, spread) in zip(axes, cases):
        for mean, deviation, label, colour in ((0.0, 1.0, "real", "#1f4e8c"), (shift, spread, "generated", "#e08214")):
            density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
            axis.fill_between(x, density, alpha=0.4, color=colour, label=label)
        axis.set_title(f"distance {shift**2 + (1 - spread) ** 2:.2f}", fontsize=10)
        axis.set_yticks([])
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    plt.close(figure)
    return figure


def distance_against_count(counts: Sequence[int], distances: Sequence[Sequence[float]], label: str) -> Figure:
    """A distance measured on fewer and more samples.

    Args:
        counts: sample counts. distances: for each count, repeated measurements.
    """
    figure, axis = plt.subplots(figsize=(5, 3))
    mean = [float(np.mean(values)) for values in distances]
    axis.errorbar(counts, mean, [float(np.std(values)) for values in distances], marker="o", capsize=3, color="#1f4e8c")
    axis.set_xscale("log")
    axis.set_xlabel("samples")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    plt.close(figure)
    return figure


def damage_bars(names: Sequence[str], measures: dict[str, Sequence[float]]) -> Figure:
    """What each kind of damage to a set of images does to each measure: one panel per measure, one bar per damage."""
    figure, axes = plt.subplots(1, len(measures), figsize=(3.4 * len(measures), 0.4 * len(names) + 1), sharey=True)
    for axis, (measure, values) in zip(np.atleast_1d(axes), measures.items()):
        axis.barh(range(len(names)), values, color="#1f4e8c")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    np.atleast_1d(axes)[0].invert_yaxis()  # shared by all panels
    figure.tight_layout()
    plt.close(figure)
    return figure
