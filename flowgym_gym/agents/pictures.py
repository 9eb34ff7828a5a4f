"""What a run shows: picture grids and the learning curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flowgym_gym.agents.runs import Row

# Column of metrics.csv, and what the axis says.
PANELS = (
    ("terminal_reward", "terminal reward"),
    ("return", "return"),
    ("control_cost", "control cost [nats]"),
)


def picture_grid(path: Path, parts: Sequence[tuple[str, Sequence[np.ndarray], np.ndarray]], columns: int = 8) -> None:
    """Save pictures in rows, each with its reward above it.

    Args:
        path: PNG file to write.
        parts: From top to bottom: a title, pictures uint8 ``(H, W, 3)``, and their rewards.
        columns: Pictures in a row.
    """
    columns = min(columns, max(len(pictures) for _, pictures, _ in parts))
    heights = [math.ceil(len(pictures) / columns) for _, pictures, _ in parts]
    figure = Figure(figsize=(1.3 * columns, 1.5 * sum(heights) + 0.4 * len(parts)), layout="constrained")
    subfigures = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)
    for subfigure, (title, pictures, rewards), rows in zip(subfigures[:, 0], parts, heights, strict=True):
        subfigure.suptitle(title, fontsize=10)
        axes = subfigure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, picture, reward in zip(axes, pictures, rewards, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(f"{reward:.3g}", fontsize=8, pad=2)
    figure.savefig(path, dpi=120)


def learning_curve(path: Path, rows: Sequence[Row], title: str, base: dict[str, Any] | None) -> None:
    """Save reward, return and control cost over the timesteps.

    Args:
        path: PNG file to write.
        rows: Rows of ``metrics.csv``.
        title: Title of the figure.
        base: Means of the base model, drawn as a dashed line, and their number of ``episodes``.
    """
    figure = Figure(figsize=(7, 7), layout="constrained")
    figure.suptitle(title)
    for axis, (column, label) in zip(figure.subplots(len(PANELS), 1, sharex=True), PANELS, strict=True):
        points = [(row["timesteps"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            timesteps, values = np.array(points, dtype=float).T
            window = max(1, len(values) // 20)
            axis.plot(timesteps, values, color="tab:red", alpha=0.35, linewidth=1)
            axis.plot(
                timesteps[window - 1 :], moving_average(values, window), color="tab:red", label="agent, exploring"
            )
        if base is not None:
            label_base = f"base model, mean of {base['episodes']}"
            axis.axhline(base[column], color="black", linestyle="--", linewidth=1, label=label_base)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
    axis.set_xlabel("environment steps")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Means over ``window`` neighbouring values, shape ``(n - window + 1,)``.

    >>> moving_average(np.array([1.0, 2.0, 6.0]), 2)
    array([1.5, 4. ])
    """
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
