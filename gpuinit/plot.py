"""`gpuinit plot`: histograms of weights over their exact densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import gpuinit
from gpuinit.fans import TRUNCATED_STD, parent_std, uniform_limit

SHAPE = (1024, 512)
BINS = 64
BLUE, ORANGE, GRAY = "#4c78a8", "#d1495b", "#555555"

# Scale, mode and distribution of those with fans. tests/test_plot.py compares them with the functions.
FAMILY = {
    "he_normal": (2, "fan_in", "truncated_normal"),
    "he_uniform": (2, "fan_in", "uniform"),
    "glorot_normal": (1, "fan_avg", "truncated_normal"),
    "glorot_uniform": (1, "fan_avg", "uniform"),
    "lecun_normal": (1, "fan_in", "truncated_normal"),
    "lecun_uniform": (1, "fan_in", "uniform"),
}


def draw(initializers: Sequence[str], seed: int, device: str | None, path: Path) -> None:
    """One panel for each initialiser, on one scale, so that they can be compared."""
    figure = Figure(figsize=(5.2 * len(initializers), 5), dpi=120, layout="constrained")
    grid: Any = figure.subplots(1, len(initializers), sharey=True, squeeze=False)
    widest = 1.08 * max(theory(name)[0] for name in initializers)
    for axes, name in zip(grid[0], initializers, strict=True):
        weights = getattr(gpuinit, name)(SHAPE, seed=seed, device=device)
        host = weights if isinstance(weights, np.ndarray) else weights.get()
        draw_panel(axes, name, host.astype(np.float64).reshape(-1))
        axes.set_xlim(-widest, widest)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=16, frameon=False)
    figure.savefig(path)


def draw_panel(axes: Any, name: str, weights: np.ndarray) -> None:
    limit, std = theory(name)
    edges = np.linspace(-limit, limit, BINS + 1)
    axes.hist(weights, edges, density=True, color=BLUE, alpha=0.55, label="weights")
    x = np.linspace(-limit, limit, 501)
    axes.plot(x, density(name, x), color=ORANGE, linewidth=3.5, label="exact density")
    for place in (-limit, limit):
        axes.axvline(place, color=GRAY, linewidth=2.5)
    for place in (-std, 0, std):
        axes.axvline(place, color=GRAY, linewidth=1.5, linestyle="--")
    axes.set_xticks([-limit, 0, limit], [f"-{limit:.3g}", "0", f"{limit:.3g}"])
    axes.set_yticks([])
    axes.tick_params(labelsize=16)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.set_title(name, fontsize=24, fontweight="bold", pad=46)
    axes.text(0.5, 1.02, moments(weights, std), transform=axes.transAxes, fontsize=14, ha="center")


def moments(weights: np.ndarray, std: float) -> str:
    """Mean and standard deviation, measured and exact, as in the picture."""
    return f"mean {weights.mean():+.1e} (exact 0)\nstd {weights.std():.5f} (exact {std:.5f})"


def theory(name: str) -> tuple[float, float]:
    """The largest weight and the standard deviation of an initialiser, of SHAPE where it has fans."""
    if name == "truncated_normal":
        return 0.1, 0.05 * TRUNCATED_STD
    if name == "uniform":
        return 0.05, 0.05 / math.sqrt(3)
    scale, mode, distribution = FAMILY[name]
    fan_in, fan_out = SHAPE
    fan = {"fan_in": fan_in, "fan_avg": (fan_in + fan_out) / 2}[mode]
    limit = uniform_limit(scale, fan) if distribution == "uniform" else 2 * parent_std(scale, fan)
    return limit, math.sqrt(scale / fan)


def density(name: str, x: np.ndarray) -> np.ndarray:
    limit, _ = theory(name)
    if name.endswith("uniform"):
        return np.full(x.shape, 1 / (2 * limit))
    z = x / (limit / 2)
    peak = 1 / (limit / 2 * math.sqrt(2 * math.pi) * math.erf(math.sqrt(2)))
    return np.asarray(peak * np.exp(-z * z / 2))
