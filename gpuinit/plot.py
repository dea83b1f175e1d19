"""`gpuinit plot`: histograms of weights over their exact densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import gpuinit
from gpuinit.distributions import Draw, Uniform
from gpuinit.exact import probability_within
from gpuinit.initializers import find_draw

SHAPE = (1024, 512)
BINS = 64
FAR = 4.5  # standard deviations from the mean, where a normal that is not cut leaves the picture
BLUE, ORANGE, GRAY = "#4c78a8", "#d1495b", "#555555"


def draw(initializers: Sequence[str], seed: int, device: str | None, path: Path) -> None:
    """One panel for each initialiser, on one scale, so that they can be compared."""
    figure = Figure(figsize=(5.2 * len(initializers), 5), dpi=120, layout="constrained")
    grid: Any = figure.subplots(1, len(initializers), sharey=True, squeeze=False)
    draws = [find_draw(getattr(gpuinit, name), SHAPE) for name in initializers]
    ends = [end for drawn in draws for end in view(drawn)]
    margin = 0.04 * (max(ends) - min(ends))
    for axes, name, drawn in zip(grid[0], initializers, draws, strict=True):
        weights = getattr(gpuinit, name)(SHAPE, seed=seed, device=device)
        host = weights if isinstance(weights, np.ndarray) else weights.get()
        draw_panel(axes, drawn, host.astype(np.float64).reshape(-1))
        axes.set_title(name, fontsize=24, fontweight="bold", pad=46)
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=16, frameon=False)
    figure.savefig(path)


def draw_panel(axes: Any, drawn: Draw, weights: np.ndarray) -> None:
    left, right = view(drawn)
    mean, std = mean_of(drawn), drawn.std()
    axes.hist(
        weights, np.linspace(left, right, BINS + 1), density=True, color=BLUE, alpha=0.55, label="weights"
    )
    x = np.linspace(left, right, 501)
    axes.plot(x, density(drawn, x), color=ORANGE, linewidth=3.5, label="exact density")
    for place in filter(math.isfinite, bounds(drawn)):
        axes.axvline(place, color=GRAY, linewidth=2.5)
    for place in (mean - std, mean, mean + std):
        axes.axvline(place, color=GRAY, linewidth=1.5, linestyle="--")
    places = (left, mean, right)
    axes.set_xticks(places, [f"{place:.3g}" for place in places])
    axes.set_yticks([])
    axes.tick_params(labelsize=16)
    axes.spines[["top", "left", "right"]].set_visible(False)
    measured = f"mean {weights.mean():+.1e} (exact {mean:.3g})\nstd {weights.std():.5f} (exact {std:.5f})"
    axes.text(0.5, 1.02, measured, transform=axes.transAxes, fontsize=14, ha="center")


def bounds(drawn: Draw) -> tuple[float, float]:
    """The least and the largest weight, infinite where nothing is cut."""
    if isinstance(drawn, Uniform):
        return drawn.low, drawn.high
    return drawn.mean + drawn.lower * drawn.stddev, drawn.mean + drawn.upper * drawn.stddev


def view(drawn: Draw) -> tuple[float, float]:
    """The least and the largest weight that the picture shows."""
    mean, far, (low, high) = mean_of(drawn), FAR * drawn.std(), bounds(drawn)
    return mean - far if math.isinf(low) else low, mean + far if math.isinf(high) else high


def mean_of(drawn: Draw) -> float:
    if isinstance(drawn, Uniform):
        return (drawn.low + drawn.high) / 2
    at_low, at_high = density(drawn, np.array(bounds(drawn)))
    return float(drawn.mean + drawn.stddev**2 * (at_low - at_high))


def density(drawn: Draw, x: np.ndarray) -> np.ndarray:
    """Between the bounds."""
    if isinstance(drawn, Uniform):
        return np.full(x.shape, 1 / (drawn.high - drawn.low))
    z = (x - drawn.mean) / drawn.stddev
    between = float(probability_within(drawn.upper) - probability_within(drawn.lower))
    return np.asarray(math.sqrt(2 / math.pi) / (between * drawn.stddev) * np.exp(-z * z / 2))
