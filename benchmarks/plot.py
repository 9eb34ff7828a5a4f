"""Draws a results file: ``python -m benchmarks.plot benchmarks/results/<machine>.json
docs/images/scaling.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, StrMethodFormatter

from benchmarks.rows import ROWS


def main() -> None:
    """Read a results file and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--checkpoint", default="tiny")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.checkpoint, args.picture)


def draw(results: dict[str, Any], checkpoint: str, path: Path) -> None:
    """Steps per second against the number of sub-environments, and each row's time beside the bare
    loop's.
    """
    comparisons = [entry for entry in results["comparisons"] if entry["checkpoint"] == checkpoint]
    if not comparisons:
        raise SystemExit(f"there is no comparison on {checkpoint!r} in these results")
    figure, (speed, ratio) = plt.subplots(1, 2, figsize=(11, 5.5), constrained_layout=True)
    for row in ROWS:
        found = [
            (entry["num_envs"], entry["rows"][row.key])
            for entry in comparisons
            if row.key in entry["rows"]
        ]
        if not found:
            continue
        sizes = [size for size, _ in found]
        speed.loglog(
            sizes, [entry["steps_per_second"] for _, entry in found], "o-", label=row.title
        )
        ratio.loglog(sizes, [entry["ratio"] for _, entry in found], "o-", label=row.title)
    for axes, ticks in (
        (speed, (10, 20, 50, 100, 200, 500, 1000)),
        (ratio, (0.5, 0.7, 1, 1.5, 2, 3, 5)),
    ):
        axes.set_xlabel("sub-environments")
        axes.set_xticks(
            [entry["num_envs"] for entry in comparisons], [str(e["num_envs"]) for e in comparisons]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    speed.set_ylabel("environment steps per second")
    ratio.set_ylabel("time per step, bare loop = 1")
    figure.legend(
        *speed.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small"
    )
    where = comparisons[0]["machine"]
    plt.suptitle(f"{checkpoint}, {where['device'] if where['device'] != 'cpu' else where['cpu']}")
    plt.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
