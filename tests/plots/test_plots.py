"""Pictures: what they show of synthetic data, that they can be saved, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from smoothcache import plots
from smoothcache.calibration.curves import Calibration
from smoothcache.errors import InvalidArgumentError
from smoothcache.layers.layer import CacheLayer, ModelIdentity
from smoothcache.plots.schedule import COMPUTED
from smoothcache.plots.style import PINK, kind_colour
from smoothcache.schedule.row import Row
from smoothcache.schedule.schedule import Schedule

STEPS, GAPS, BLOCKS = 12, 3, 4


def calibration(*kinds: str, samples: int = 4) -> Calibration:
    rng = np.random.default_rng(0)
    layers = tuple(
        CacheLayer(f"blocks.{block}.{kind}", kind, f"blocks.{block}", macs=10 * (i + 1))
        for block in range(BLOCKS)
        for i, kind in enumerate(kinds)
    )
    errors = rng.uniform(0.05, 0.2, (samples, len(layers), GAPS, STEPS))
    for gap in range(1, GAPS + 1):
        errors[:, :, gap - 1, :gap] = np.nan
    return Calibration(
        layers,
        errors,
        total_macs=max(100 * BLOCKS, sum(layer.macs or 0 for layer in layers)),
        timesteps=tuple(map(float, range(STEPS, 0, -1))),
        model=ModelIdentity("ToyTransformer", "0" * 16),
    )


def schedule(*kinds: str) -> Schedule:
    layers = calibration(*kinds).layers
    rows = {layer.path: Row((True, False, True, False), "hold") for layer in layers}
    return Schedule(num_steps=4, rows=rows, layers=layers, compute=0.625)


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    legends = [text for legend in figure.legends for text in [legend.get_title(), *legend.texts]]
    found = [text.get_text() for text in legends]
    for panel in figure.axes:
        labels = [*panel.get_yticklabels(), *panel.texts, panel.xaxis.label, panel.yaxis.label]
        found += [text.get_text() for text in labels] + [panel.get_title(loc="left")]
    return "\n".join(found)


def test_error_curves_are_those_of_the_calibration() -> None:
    measured = calibration("self_attn", "ffn")
    figure = plots.plot_error_curves(measured, gaps=(1, 3), alphas=(0.1, 0.18))
    assert len(figure.axes) == 2
    for panel, kind in zip(figure.axes, measured.kinds, strict=True):
        curves = [line for line in panel.lines if len(line.get_xdata()) == STEPS]
        for gap, line in zip((1, 3), curves, strict=True):
            np.testing.assert_array_equal(line.get_ydata(), measured.curve(gap=gap, kind=kind).mean)
        assert len(panel.collections) == 2, "one band a curve"
    for expected in ("1 step old", "3 steps old", "α = 0.1\n", "α = 0.18", "feed-forward  (4 lay"):
        assert expected in texts(figure)


def test_one_sample_has_no_band() -> None:
    figure = plots.plot_error_curves(calibration("joint_attn", samples=1))
    assert not figure.axes[0].collections
    assert "confidence" not in texts(figure) and "1 sample" in texts(figure)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7])
def test_every_kind_has_a_panel(count: int) -> None:
    kinds = ("self_attn", "cross_attn", "ffn", "block", "model", "spatial_ffn", "temporal_ffn")
    figure = plots.plot_error_curves(calibration(*kinds[:count]))
    assert sum(panel.get_visible() for panel in figure.axes) == count


@pytest.mark.parametrize("kind", ["refiner_ffn", "refiner_joint_attn", "refiner_spatial_ffn"])
def test_kinds_of_refiners_have_names_and_colours(kind: str) -> None:
    plain = kind.removeprefix("refiner_")
    figure = plots.plot_error_curves(calibration(plain, kind))
    assert "refiner " in texts(figure) and kind not in texts(figure)
    colours = {x: kind_colour(x) for x in (plain, kind, f"temporal_{plain}")}
    assert len(set(colours.values())) == 3 and PINK not in colours.values()


def test_a_gap_that_was_not_measured_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="gap 4"):
        plots.plot_error_curves(calibration("ffn"), gaps=(4,))


def test_composition_adds_up() -> None:
    measured = calibration("self_attn", "ffn")
    assert plots.composition(measured) == pytest.approx(
        {"self_attn": 0.1, "ffn": 0.2, "other": 0.7}
    )
    figure = plots.plot_composition(measured)
    assert sum(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(100)
    assert "ToyTransformer" in texts(figure) and "70.0" in texts(figure)


def test_composition_draws_kinds_in_one_order() -> None:
    shares = [("a", {"ffn": 0.5, "self_attn": 0.5}), ("b", {"other": 0.1, "cross_attn": 0.9})]
    legend = plots.plot_composition(shares).legends[0]
    assert [text.get_text() for text in legend.texts] == [
        "self-attention",
        "cross-attention",
        "feed-forward",
        "other",
    ]


def test_composition_needs_costs() -> None:
    measured = calibration("ffn")
    free = tuple(replace(layer, macs=None) for layer in measured.layers)
    with pytest.raises(InvalidArgumentError, match="no MACs"):
        plots.plot_composition(replace(measured, layers=free))
    with pytest.raises(InvalidArgumentError, match="at least one"):
        plots.plot_composition([])


def test_schedule_map_shows_what_is_computed() -> None:
    planned = schedule("self_attn", "ffn")
    figure = plots.plot_schedule(planned, title="toy")
    pixels = np.concatenate([np.asarray(image.get_array()) for image in figure.axes[0].images])
    assert pixels.shape[:2] == (2 * BLOCKS, 4)
    computed = (pixels == to_rgba(COMPUTED)).all(axis=-1)
    assert computed.tolist() == [[True, False, True, False]] * 2 * BLOCKS
    for expected in ("toy: 4 steps, 62.5%", "self-attention\n× 4", "reused (hold)"):
        assert expected in texts(figure)


def test_schedule_map_tells_predictors_apart() -> None:
    planned = schedule("self_attn", "ffn")
    rows = {
        path: replace(row, predictor="taylor") if "ffn" in path else row
        for path, row in planned.rows.items()
    }
    figure = plots.plot_schedule(replace(planned, rows=rows))
    reused = {tuple(np.asarray(image.get_array())[0, 1]) for image in figure.axes[0].images}
    assert len(reused) == 2
    assert "reused (taylor)" in texts(figure)


def test_schedule_map_of_names_not_yet_bound() -> None:
    rows = {"attn": Row((True, False)), "mlp": Row((True, True))}
    figure = plots.plot_schedule(Schedule(num_steps=2, rows=rows, layers=None))
    assert "75.0% of the layers" in texts(figure)
    assert "attn" in texts(figure) and "×" not in texts(figure)


def images(seed: int, channels: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(5, channels, 8, 8, generator=rng)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_has_a_strip_each_and_its_difference(channels: int) -> None:
    reference = images(0, channels)
    near = (reference + 0.009).clamp(0, 1)
    figure = plots.plot_image_grid([("near", near), ("same", reference)], reference)
    titles = [panel.get_ylabel() for panel in figure.axes]
    assert titles[0] == "uncached"
    assert titles[1].startswith("near\nPSNR 4")
    assert titles[2] == titles[4] == "difference\n× 100"
    assert titles[3] == "same\nidentical"


def test_image_grid_has_square_pixels() -> None:
    figure = plots.plot_image_grid([("a", images(1))], images(0))
    for panel in figure.axes:
        height, width = np.asarray(panel.images[0].get_array()).shape[:2]
        place = panel.get_position()
        ratio = place.height * figure.get_figheight() / (place.width * figure.get_figwidth())
        assert ratio == pytest.approx(height / width)


def test_clips_are_animated_beside_their_differences(tmp_path: Path) -> None:
    reference = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plots.animate_clip_grid([("cached", 0.9 * reference)], reference, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as moving:
        assert moving.n_frames == 3 and moving.info["loop"] == 0
        shots = [np.array(moving.convert("RGB")) for _ in map(moving.seek, range(3))]
    assert not np.array_equal(shots[0], shots[1])
    with pytest.raises(InvalidArgumentError, match="at least one row of clips"):
        plots.animate_clip_grid([], reference, tmp_path / "b.gif")


def test_images_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one row"):
        plots.plot_image_grid([], images(0))
    with pytest.raises(InvalidArgumentError, match="its place"):
        plots.plot_image_grid([("a", images(1)[:2])], images(0))
    with pytest.raises(InvalidArgumentError, match="1 or 3 channels, got 2"):
        plots.plot_image_grid([("a", images(1, 2))], images(0, 2))


def test_spectrograms_have_a_strip_each_and_its_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    sounds = 0.1 * torch.randn(3, 1, 4096, generator=generator)
    rows = [("same", sounds), ("softer", 0.1 * sounds)]
    figure = plots.plot_spectrograms(rows, sounds, 16_000)
    assert len(figure.axes) == 5
    written = texts(figure)
    assert "same\n0.0 dB off" in written and "softer\n20.0 dB off" in written
    uncached, same, no_change, _, change = (axes.images[0].get_array() for axes in figure.axes)
    assert uncached.shape[0] == 64
    np.testing.assert_array_equal(uncached, same)
    assert no_change.max() == 0
    assert np.median(change.compressed()) == pytest.approx(20 / 30, abs=0.01)
    with pytest.raises(InvalidArgumentError, match="at least one row of sounds"):
        plots.plot_spectrograms([], sounds, 16_000)


def test_pictures_are_saved_where_they_should_be(tmp_path: Path) -> None:
    measured, planned = calibration("self_attn", "ffn"), schedule("self_attn")
    plots.plot_error_curves(measured, tmp_path / "curves.png")
    plots.plot_composition(measured, tmp_path / "composition.png")
    plots.plot_schedule(planned, str(tmp_path / "schedule.png"))
    plots.plot_image_grid([("a", images(1))], images(0), tmp_path / "grid.png")
    for name in ("curves", "composition", "schedule", "grid"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
            extrema = picture.convert("L").getextrema()
            assert extrema[0] != extrema[1], "not blank"


def test_pyplot_is_left_alone() -> None:
    code = (
        "import sys, torch; from smoothcache import plots; "
        "plots.plot_image_grid([('a', torch.rand(1, 3, 8, 8))], torch.rand(1, 3, 8, 8)); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
