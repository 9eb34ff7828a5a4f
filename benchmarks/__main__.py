"""Environment steps per second, side by side: ``python -m benchmarks``.

Every row denoises the same batches with the same network: diffusers alone, diffusers' pipeline,
this package's environments through each of their interfaces, and a PPO training run. See
``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import build
from benchmarks.measure import compare, machine
from benchmarks.rows import BARE, ROWS, Case, available

RESULTS = Path(__file__).parent / "results"
FULL_SIZE = "full-size"


def main() -> None:
    """Run the comparison and write its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        default="tiny",
        help=f"name, folder, or {FULL_SIZE!r}: SD 1.5, random weights",
    )
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of an episode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--rows", nargs="+", choices=[row.key for row in ROWS], default=[row.key for row in ROWS]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", help="of the results file; by default the machine's")
    args = parser.parse_args()
    rows = [row for row in ROWS if (row.key in args.rows or row.key == BARE) and available(row)]
    found = machine(args.device)
    name = args.name or re.sub(
        r"[^a-z0-9]+", "-", (found["device"] if args.device != "cpu" else found["cpu"]).lower()
    )
    path = RESULTS / f"{name.strip('-')}.json"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if checkpoint == FULL_SIZE:
            print(
                "building Stable Diffusion 1.5 with random weights ...", file=sys.stderr, flush=True
            )
            checkpoint = str(build(Path(folder), getattr(torch, args.dtype)))
        for num_envs in args.num_envs:
            case = Case(checkpoint, num_envs, args.steps, args.device, args.dtype)
            chosen = [row for row in rows if num_envs <= row.largest]
            results = compare(chosen, case, args.rounds)
            entry = {
                "checkpoint": args.checkpoint,
                "num_envs": num_envs,
                "steps": args.steps,
                "rounds": args.rounds,
                "dtype": args.dtype,
                "machine": found,
                "rows": results,
            }
            save(path, entry)
            print(table(entry))
    print(f"results in {path}; draw them with python -m benchmarks.plot", file=sys.stderr)


def save(path: Path, entry: dict[str, Any]) -> None:
    """Add a comparison to the results of a machine, in place of an older one of the same case."""
    same = ("checkpoint", "num_envs", "steps", "dtype")
    old = json.loads(path.read_text()) if path.is_file() else {"comparisons": []}
    kept = [other for other in old["comparisons"] if any(other[key] != entry[key] for key in same)]
    comparisons = sorted(
        [*kept, entry], key=lambda e: (e["checkpoint"] != "tiny", e["checkpoint"], e["num_envs"])
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"comparisons": comparisons}, indent=2, allow_nan=False) + "\n")


def table(entry: dict[str, Any]) -> str:
    """A comparison as a Markdown table."""
    titles = {row.key: row.title for row in ROWS}
    lines = [
        f"\n{entry['checkpoint']}, {entry['num_envs']} sub-environments, {entry['steps']} steps, "
        f"{entry['dtype']}, "
        f"median of {entry['rounds']} rounds",
        "",
        "| | env steps / s | time, bare loop = 1 (quartiles) | outside the network | peak memory, "
        "MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for key, row in entry["rows"].items():
        outside, memory = row["outside_network"], row["peak_memory_mb"]
        lines.append(
            f"| {titles[key]} | {row['steps_per_second']:.3g} | {row['ratio']:.3f} "
            f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f}) | "
            f"{'-' if outside is None else f'{100 * outside:.1f} %'} | "
            f"{'-' if memory is None else f'{memory:.0f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
