"""A frontier's report: ``frontier.json``, the table, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from flowgym_gym.agents.frontier.spec import resolved_changes
from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs.drawing import Figure, plain_style, plain_text, ticker
from flowgym_gym.checks import check_number
from flowgym_gym.optimal_control.best_of_n import best_of_n_curve

REPORT, PICTURE = "frontier.json", "frontier.png"

# Name in the report: name shown, what its labels are, colour, marker, and where labels stand (in
# points).
METHODS: dict[str, tuple[str, str, str, str, tuple[int, int]]] = {
    "base": ("base model", "", "black", "s", (6, -10)),
    "best_of_n": ("best of n", "n", "tab:gray", "o", (-4, 7)),
    "endpoint": (
        "guidance, gradient to the expected sample",
        "strength",
        "tab:olive",
        "v",
        (5, -9),
    ),
    "network": ("guidance, gradient through the network", "strength", "tab:green", "^", (5, -9)),
    "ppo": ("PPO", "scale", "tab:red", "D", (-5, 6)),
    "sac": ("SAC", "scale", "tab:blue", "P", (6, -10)),
}
OTHER_METHOD = ("scale", "tab:purple", "X", (5, 5))

Report = Options
Point = Options


def against_best_of_n(point: Point, best: SomeOptions) -> str:
    """How a point compares with best of n at the same divergence.

    Args:
        point: With ``reward`` and ``kl``.
        best: The report's ``best_of_n``: ``mean``, ``low`` and ``high`` for n = 1, 2, ...

    Returns:
        ``"above"`` or ``"below"`` where the intervals of the rewards do not overlap for any
        divergence in the interval of the point's, else ``"level"``; where that interval goes beyond
        the divergence of the largest n, ``"below"`` if best of n earns more already, else ``"beyond
        n = ..."``.
    """
    curve = best_of_n_curve(best)
    kl, reward = point["kl"], point["reward"]
    # Best of n at the end of the divergence's interval that is in the point's favour, and at the
    # one that is not.
    low, high = (
        float(np.interp(kl.get(end, kl["mean"]), curve["kl"], curve[end]))
        for end in ("low", "high")
    )
    if reward["high"] < low:
        return "below"
    if kl.get("high", kl["mean"]) > curve["kl"][-1]:
        return f"beyond n = {len(best['mean'])}"
    return "above" if reward["low"] > high else "level"


def table(report: Report) -> str:
    """The frontier as a Markdown table."""
    lines = [
        "| method | setting | KL [nats] | reward | against best of n at that KL |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for point in _sorted(report):
        title, kind, *_ = style(point["method"])
        setting = f"{kind} = {point['setting']:g}" if kind else ""
        if "timesteps" in point:
            setting += f", {point['timesteps']:,} steps"
        verdict = point.get("against_best_of_n", "")
        cells = [title, setting, cell(point["kl"]), cell(point["reward"]), verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(f"\n{note}" for note in report["notes"])])


@plain_style()
def draw(report: Report) -> Figure:
    """Reward against divergence; what lies below best of n is hollow."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    curve = best_of_n_curve(report["best_of_n"])
    axis.plot(curve["kl"], curve["mean"], color=style("best_of_n")[2], linewidth=1)
    axis.fill_between(
        curve["kl"],
        curve["low"],
        curve["high"],
        color=style("best_of_n")[2],
        alpha=0.2,
        linewidth=0,
    )
    points = _sorted(report)
    for method in dict.fromkeys(point["method"] for point in points):
        title, kind, color, marker, offset = style(method)
        axis.plot(
            [],
            [],
            color=color,
            marker=marker,
            linestyle="",
            label=f"{title} ({kind} = ...)" if kind else title,
        )
        own = [point for point in points if point["method"] == method]
        if method not in ("base", "best_of_n"):
            axis.plot(
                [p["kl"]["mean"] for p in own],
                [p["reward"]["mean"] for p in own],
                color=color,
                linewidth=0.7,
            )
        for i, point in enumerate(own):
            kl, reward = point["kl"], point["reward"]
            # Where the last two are close, their labels stand on either side.
            close = i == len(own) - 1 > 0 and kl["mean"] < 1.5 * own[i - 1]["kl"]["mean"]
            right = (offset[0] > 0) != close
            below = point.get("against_best_of_n") == "below"
            axis.errorbar(
                kl["mean"], reward["mean"], xerr=_bars(kl), yerr=_bars(reward), color=color,
                marker=marker,
                markerfacecolor="white" if below else color, markersize=7, linestyle="", capsize=2,
                zorder=3,
            )  # fmt: skip
            axis.annotate(
                f"{point['setting']:g}" if kind else "", (kl["mean"], reward["mean"]),
                textcoords="offset points",
                xytext=(abs(offset[0]) * (1 if right else -1), offset[1]), fontsize=8, color=color,
                ha="left" if right else "right",
            )  # fmt: skip
    axis.plot(
        [],
        [],
        color="black",
        marker="o",
        markerfacecolor="white",
        linestyle="",
        label="hollow: below best of n",
    )
    furthest = max(point["kl"].get("high", point["kl"]["mean"]) for point in points)
    axis.set_xscale("symlog", linthresh=1, linscale=1)
    axis.set_xlim(-0.05, 2 * max(furthest, 1.0))
    ticks = [0, 0.2, 0.5, *(d * 10.0**e for e in range(8) for d in (1, 2, 5))]
    axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.FixedLocator([]))
    axis.set_xlabel("divergence from the base model [nats], linear up to 1, then logarithmic")
    axis.set_ylabel("terminal reward, mean with 95 % interval")
    axis.set_title(report["env_id"] + _described(report["settings"]["env"]), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    return figure


def as_pool(pool: SomeOptions) -> Options:
    """The pool of a report, or an error unless it is one."""
    rewards, prompts = np.array(pool["rewards"], dtype=float), pool["prompts"]
    good = rewards.ndim == 1 and len(rewards) == pool["episodes"] and np.isfinite(rewards).all()
    if (
        not good
        or len(prompts) not in (0, len(rewards))
        or not all(isinstance(p, str) for p in prompts)
    ):
        raise ValueError(
            "the pool is not one of a reward, and a prompt where there are several, for each "
            "episode"
        )
    return dict(pool)


def as_point(point: SomeOptions) -> Point:
    """A point of a report, with absolute paths, or an error unless it can be drawn."""
    check_number("setting", point["setting"])
    for name in ("reward", "kl"):
        for end in ("mean", *({"low", "high"} & point[name].keys())):
            check_number(f"{name}.{end}", point[name][end])
    if not isinstance(point["method"], str) or not isinstance(point.get("timesteps", 0), int):
        raise ValueError("a point's method is no text, or its timesteps are no number")
    changes = {"overrides": resolved_changes(point["overrides"])} if "overrides" in point else {}
    return {**point, **changes}


def style(method: str) -> tuple[str, str, str, str, tuple[int, int]]:
    """Title, what labels mean, colour, marker and place of the labels of a method."""
    return METHODS.get(method) or (method.upper(), *OTHER_METHOD)


def _sorted(report: Report) -> list[Point]:
    order = list(METHODS)
    points: Iterable[Point] = report["points"].values()
    return sorted(
        points,
        key=lambda p: (
            order.index(p["method"]) if p["method"] in order else len(order),
            p["setting"],
        ),
    )


def _bars(values: Mapping[str, float]) -> list[list[float]]:
    mean = values["mean"]
    return [[mean - values.get("low", mean)], [values.get("high", mean) - mean]]


def cell(values: Mapping[str, float]) -> str:
    """A mean and half of its interval."""
    half = values.get("high", values["mean"]) - values["mean"]
    return f"{values['mean']:.4g}" + (f" ± {half:.2g}" if half else "")


def _described(env: SomeOptions) -> str:
    """Settings of the environment for the title."""
    text = ", ".join(f"{name}={value}" for name, value in env.items())
    return plain_text(f"\n{text:.100}") if text else ""
