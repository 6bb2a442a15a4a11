"""Figures draw what they are given, and show once: each is closed before it is returned."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agd_lib import figures


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> None:
    yield  # type: ignore[misc]
    assert plt.get_fignums() == []


def test_a_grid_has_one_axis_per_cell_and_room_for_its_titles() -> None:
    figure = figures.image_grid(torch.rand(5, 3, 8, 8), 3, ["a", "b"], ["1", "2", "3"], "title")
    assert len(figure.axes) == 6 and sum(len(axis.images) for axis in figure.axes) == 5
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    title, column = figure.texts[0], figure.axes[0].title
    assert title.get_window_extent(renderer).y0 >= column.get_window_extent(renderer).y1


def test_time_runs_from_noise_to_image() -> None:
    curves = {"a": (torch.tensor([0, 500, 950]), torch.tensor([1.0, 2.0, 3.0])), "b": ([10, 20], [5.0, 6.0])}
    (axis,) = figures.curves_over_timesteps(curves, "y", colours={"a": "red"}, dashed=["b"]).axes
    left, right = axis.get_xlim()
    assert left > right and axis.get_yscale() == "log"
    first, second = axis.lines
    assert first.get_ydata().tolist() == [1, 2, 3] and first.get_color() == "red"
    assert second.get_linestyle() == "--" and second.get_label() == "b"


def test_the_smoothed_loss_stands_where_its_last_batch_is() -> None:
    losses = {step: float(step) for step in range(1, 11)}
    (axis,) = figures.loss_curves({"offset": losses}, window=4).axes
    _, smooth = axis.lines
    assert smooth.get_xdata().tolist() == list(range(4, 11))
    assert smooth.get_ydata().tolist() == pytest.approx([2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5])
    figures.loss_curves({"offset": {1: 0.5}})  # one step is a curve, too


def test_the_figures_of_trajectories_and_adapters_can_be_drawn() -> None:
    paths = torch.randn(2, 4, 4, 8, 8)
    drawn = [
        figures.trajectory_plane(torch.randn(20, 4, 8, 8), paths, [1.0, 4.0], "t"),
        figures.recorded_states(torch.rand(30) * 5 + 1, (1.0, 6.0), torch.arange(8), torch.rand(8)),
        figures.adapter_sites(6, 160, 32),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
