"""Figures draw what they are given, and show once: each is closed before it is returned."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agd_lib import figures
from agd_lib.evaluation import Timing
from agd_lib.mixture import guided_paths, pinwheel


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
        figures.adapter_sites(6, 160, 32, "modulated"),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)


def test_cost_bars_show_what_was_counted_and_timed() -> None:
    timings = {"cfg": Timing(0.04, 0.03, 0.06), "agd offset": Timing(0.02, 0.02, 0.03)}
    counted, timed = figures.cost_bars({"cfg": 40, "agd offset": 20}, {8: timings}).axes
    assert [bar.get_width() for bar in counted.patches] == [40, 20]
    assert [bar.get_width() for bar in timed.patches] == pytest.approx([40, 20])  # milliseconds
    assert [label.get_text() for label in counted.get_yticklabels()] == ["cfg", "agd offset"]
    assert timed.get_xlabel() == "ms per image, batch of 8"


def test_figures_of_the_plane_have_a_panel_for_each_scale_and_level() -> None:
    world = pinwheel(num_components=3)
    arm, start = world.given(0), torch.randn(40, 2, dtype=torch.float64)
    paths = {}
    for scale in (1.0, 3.0):
        times, paths[scale] = guided_paths(arm, world, scale, start, num_steps=8)
    drawn = {
        figures.sharpened_densities(world, 0, [1, 2]): 4,
        figures.guidance_field(world, 0, 0.3, 3.0): 4,
        figures.guided_path_panels(world, 0, paths, show=10): 2,
        figures.guided_levels(world, 0, times, paths, [0.8, 0.4, 0.0], show=20): 6,
        figures.guided_state(world, 0, float(times[4]), paths[3.0][4], paths[3.0][:5, :6], 3.0): 1,
        figures.promised_and_reached(world, 0, {scale: path[-1] for scale, path in paths.items()}): 4,
        figures.leaving_the_diffusion([0.9, 0.0], {1.0: [0.1, 0.1]}, {1.0: [1.0, 0.9]}): 2,
        figures.accuracy_and_diversity([1, 2], [0.5, 0.9], [1.0, 0.8]): 3,
        figures.accuracy_and_diversity([1, 2], None, [1.0, 0.8]): 1,  # an extractor that knows no classes
        figures.guidance_diagram(): 1,
    }
    for figure, panels in drawn.items():
        assert len(figure.axes) == panels
    ends = figures.guided_path_panels(world, 0, paths, show=10).axes[1].collections[-1].get_offsets()
    assert torch.equal(torch.as_tensor(ends.data), paths[3.0][-1, :10])


def test_a_unet_shows_how_many_adapters_every_block_has() -> None:
    sites = {"down_blocks.0.a.attn2": 32, "mid_block.a.attn2": 64, "up_blocks.1.a.attn2": 32, "up_blocks.1.b.attn2": 32}
    (axis,) = figures.unet_sites(2, 2, sites, passed_over=["up_blocks.1.b.attn2"]).axes
    said = [text.get_text() for text in axis.texts]
    by_block = {said[i]: said[i + 1] for i in range(len(said) - 1) if "block" in said[i]}
    assert by_block == {
        "down_blocks.0": "1 adapter, 32 channels",
        "down_blocks.1": "no attention",
        "mid_block": "1 adapter, 64 channels",
        "up_blocks.0": "no attention",
        "up_blocks.1": "2 adapters, 32 channels (1 not in theirs)",
    }


def test_bars_of_memory_are_as_long_as_their_parts_together() -> None:
    memories = {"float32": {"weights": 10.0, "adapters": 2.0}, "bfloat16": {"weights": 5.0, "adapters": 2.0}}
    (axis,) = figures.memory_bars(memories, (8, 24), "title").axes
    ends = [max(patch.get_x() + patch.get_width() for patch in axis.patches if patch.get_y() < row < patch.get_y() + 0.6) for row in (0, 1)]  # fmt: skip
    assert ends == [12.0, 7.0]
    assert [line.get_xdata()[0] for line in axis.lines] == [8, 24]


def test_lines_go_through_their_points_and_every_point_has_a_tick() -> None:
    curves = {"a": ([1.0, 2.0, 12.0], [0.1, 0.2, 0.3]), "b": ([2.0, 8.0], [0.4, 0.5])}
    (axis,) = figures.lines(curves, "w", "error", colours={"a": "red"}, shaded=(1, 6), x_log=True).axes
    assert [list(line.get_xdata()) for line in axis.lines] == [[1.0, 2.0, 12.0], [2.0, 8.0]]
    assert axis.lines[0].get_color() == "red"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "8", "12"]
    (ground,) = axis.patches
    assert ground.get_x() == 1 and ground.get_width() == 5


def test_a_schedule_is_one_outside_its_interval() -> None:
    first, second = figures.schedules({"everywhere": None, "middle": (200, 800)}, 3.0, 1000).axes
    assert set(first.lines[0].get_ydata()) == {3.0}
    values = second.lines[0].get_ydata()
    assert [values[t] for t in (0, 199, 200, 800, 801, 999)] == [1, 1, 3, 3, 1, 1]
    left, right = first.get_xlim()
    assert left > right
