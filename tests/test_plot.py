"""gpuinit plot: the picture shows the weights and the exact density."""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np
import pytest

import gpuinit
from gpuinit import initializers
from gpuinit.__main__ import main
from gpuinit.initializers import find_draw

pytest.importorskip("click", reason='click is not installed: pip install "gpuinit[cli]"')
matplotlib = pytest.importorskip(
    "matplotlib", reason='matplotlib is not installed: pip install "gpuinit[plot]"'
)

from gpuinit import plot  # noqa: E402, which imports matplotlib
from gpuinit.cli import PLOTTED  # noqa: E402

DRAWS = {name: find_draw(getattr(gpuinit, name), plot.SHAPE) for name in PLOTTED}
DRAWS |= {
    "a tail": find_draw(gpuinit.truncated_normal, plot.SHAPE, stddev=2, mean=3, lower=1, upper=1.5),
    "one bound": find_draw(
        gpuinit.truncated_normal, plot.SHAPE, stddev=2, mean=-3, lower=-0.5, upper=math.inf
    ),
    "a range": find_draw(gpuinit.uniform, plot.SHAPE, low=-1, high=3),
}


@pytest.mark.parametrize("drawn", DRAWS.values(), ids=DRAWS)
def test_the_density_is_that_of_the_weights(drawn):
    """Integral 1, moments those that are told; and the weights have these moments and reach the bounds."""
    low, high = plot.bounds(drawn)
    mean, std = plot.mean_of(drawn), drawn.std()
    least, most = max(low, mean - 12 * std), min(high, mean + 12 * std)
    width = (most - least) / 100000
    x = least + (np.arange(100000) + 0.5) * width
    curve = plot.density(drawn, x) * width
    assert curve.sum() == pytest.approx(1, abs=1e-8)
    assert (curve * x).sum() == pytest.approx(mean, abs=1e-8 * std)
    assert math.sqrt((curve * (x - mean) ** 2).sum()) == pytest.approx(std, rel=1e-8)
    weights = initializers.make(plot.SHAPE, drawn, seed=0, device="cpu").astype(np.float64)
    n = weights.size
    assert abs(weights.mean() - mean) < 6 * std / math.sqrt(n)
    assert abs(weights.std() / std - 1) < 6 * math.sqrt(0.6 / n)  # the kurtosis is below 3.4
    # Chance that none of n lies in the last part of the distribution: exp(-n * part) < 1e-9.
    for bound, farthest in ((low, weights.min()), (high, weights.max())):
        if math.isfinite(bound):
            assert abs(farthest - bound) < 2e-3 * std
    assert low - 1e-6 * abs(low) <= weights.min()
    assert weights.max() <= high + 1e-6 * abs(high)


def test_a_side_that_is_not_cut_is_shown_to_where_next_to_nothing_is_left():
    assert plot.view(DRAWS["he_uniform"]) == plot.bounds(DRAWS["he_uniform"])
    assert plot.view(DRAWS["normal"]) == pytest.approx((-0.225, 0.225))
    low, high = plot.view(DRAWS["one bound"])
    beyond = plot.density(DRAWS["one bound"], np.linspace(high, high + 20, 10000)).sum() * 20 / 10000
    assert (low, beyond) == (-4, pytest.approx(2e-4, abs=2e-4))


def test_a_panel_shows_histogram_density_bounds_and_moments(device, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, path: drawn.append(figure))
    plot.draw(("he_normal", "he_uniform"), 3, device.name, tmp_path / "a.png")
    widest = 1.08 * plot.bounds(DRAWS["he_normal"])[1]
    assert {axes.get_xlim() for axes in drawn[0].axes} == {(-widest, widest)}
    assert len({axes.get_ylim() for axes in drawn[0].axes}) == 1
    for axes, name in zip(drawn[0].axes, ("he_normal", "he_uniform"), strict=True):
        (_, limit), std = plot.bounds(DRAWS[name]), DRAWS[name].std()
        weights = getattr(gpuinit, name)(plot.SHAPE, seed=3, device="cpu").astype(np.float64)
        heights, _ = np.histogram(weights, plot.BINS, (-limit, limit), density=True)
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(heights, rel=1e-3)
        curve, *lines = axes.lines
        assert curve.get_ydata() == pytest.approx(plot.density(DRAWS[name], curve.get_xdata()))
        assert sorted(line.get_xdata()[0] for line in lines) == [-limit, -std, 0, std, limit]
        assert axes.get_title() == name
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"-{limit:.3g}", "0", f"{limit:.3g}"]
        assert list(axes.get_xticks()) == [-limit, 0, limit]
        (text,) = axes.texts
        assert f"std {weights.std():.5f} (exact {std:.5f})" in text.get_text()
        assert f"mean {weights.mean():+.1e} (exact 0)" in text.get_text()


def test_a_panel_has_no_line_where_nothing_is_cut_and_is_as_wide_as_its_ends_are_apart(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, path: drawn.append(figure))
    ranged = partial(gpuinit.uniform, low=-0.1, high=0.5)
    monkeypatch.setattr(gpuinit, "uniform", ranged)
    plot.draw(("normal", "uniform"), 3, "cpu", tmp_path / "a.png")
    normal, uniform = drawn[0].axes
    _, *lines = normal.lines
    assert [line.get_xdata()[0] for line in lines] == [-0.05, 0, 0.05]
    assert [tick.get_text() for tick in normal.get_xticklabels()] == ["-0.225", "0", "0.225"]
    _, *lines = uniform.lines
    std = 0.6 / math.sqrt(12)
    assert [line.get_xdata()[0] for line in lines] == pytest.approx([-0.1, 0.5, 0.2 - std, 0.2, 0.2 + std])
    assert "(exact 0.2)" in uniform.texts[0].get_text()
    assert normal.get_xlim() == uniform.get_xlim() == pytest.approx((-0.225 - 0.029, 0.5 + 0.029))


def test_the_command_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "a.png"
    with pytest.raises(SystemExit) as stopped:
        main(["plot", "he_normal", "glorot_uniform", "-o", str(out), "--device", "cpu"])
    assert stopped.value.code == 0
    picture = matplotlib.image.imread(out)
    assert picture.shape[:2] == (600, 1248)
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "he", "-o", "a.png"], "'he' is not one of 'glorot_normal'"),
        (["plot", "-o", "no/such/folder.png"], "no/such/folder.png: No such file or directory"),
        (["plot", "-o", "a"], "the output must be named *.png, *.svg or *.pdf, got a"),
        (["plot", "-o", "a.xyz"], "Format 'xyz' is not supported"),
    ],
)
def test_what_cannot_be_drawn_is_named(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gpuinit.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["plot", "-o", "a.png"])
    assert 'To install it: pip install "gpuinit[plot]"' in capsys.readouterr().err
