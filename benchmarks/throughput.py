"""Pictures per second beside diffusers' pipeline: ``python -m benchmarks.throughput --device cuda
--dtype bfloat16``.

The environment's ``sample`` beside the pipeline as diffusers runs it (eager), and what
``channels_last``, ``torch.compile`` and CUDA graphs gain, on the same weights and steps. The
network's share of the processor's peak is in units of what the largest of a few matrix products
reaches in the same number format on the same device.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import FULL_SIZE, RESULTS
from benchmarks.full_size import build
from benchmarks.measure import machine, synchronise
from benchmarks.rows import DECODE_BATCH, PROMPT, Case, pipeline
from flowgym_gym import VelocityEnvironment
from flowgym_gym.models import from_pipeline
from flowgym_gym.rewards.loading import load_reward

EAGER = "diffusers' pipeline, eager"
# How the network and the decoder are prepared, by name: memory format, and torch.compile's mode or
# None.
VARIANTS: dict[str, tuple[torch.memory_format, str | None]] = {
    "sample, eager": (torch.contiguous_format, None),
    "sample, channels_last": (torch.channels_last, None),
    "sample, torch.compile": (torch.contiguous_format, "default"),
    "sample, torch.compile and channels_last": (torch.channels_last, "default"),
    "sample, torch.compile with CUDA graphs and channels_last": (
        torch.channels_last,
        "reduce-overhead",
    ),
}
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}


def main() -> None:
    """Measure every variant at every batch size, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--checkpoint", default=FULL_SIZE, help=f"name, folder, or {FULL_SIZE!r}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--name", help="of the results file; by default the machine's")
    args = parser.parse_args()
    found = machine(args.device)
    name = args.name or re.sub(
        r"[^a-z0-9]+", "-", (found["device"] if args.device != "cpu" else found["cpu"]).lower()
    )
    path = RESULTS / f"throughput-{name.strip('-')}.json"
    peak = matrix_peak(args.device, args.dtype)
    results: dict[str, Any] = {
        "machine": found,
        "dtype": args.dtype,
        "steps": args.steps,
        "peak_tflops": peak,
    }
    results |= {"checkpoint": args.checkpoint, "rounds": args.rounds, "batches": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if checkpoint == FULL_SIZE:
            checkpoint = str(build(Path(folder), getattr(torch, args.dtype)))
        for batch in args.batch:
            case = Case(checkpoint, batch, args.steps, args.device, args.dtype)
            try:
                rows = compare(case, args.variants, args.rounds, peak)
            except torch.OutOfMemoryError as error:
                print(
                    f"{batch} pictures at a time do not fit: {str(error).partition('.')[0]}",
                    file=sys.stderr,
                )
                break
            results["batches"][str(batch)] = rows
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
            print(table(batch, rows), flush=True)
    print(f"results in {path}", file=sys.stderr)


def compare(
    case: Case, variants: list[str], rounds: int, peak: float
) -> dict[str, dict[str, float]]:
    """Time the variants in turns.

    Args:
        case: What all do.
        variants: Names in ``VARIANTS``.
        rounds: How often each is run, after a run that compiles what is to be compiled.
        peak: In TFLOP/s; see :func:`matrix_peak`.

    Returns:
        For diffusers' pipeline and each variant the median pictures per second, the median ratio of
        the rounds to the pipeline's speed, and the network's share of the peak if all time were the
        network's.
    """
    flops = network_flops(case)
    results: dict[str, Any] = {}
    with pipeline(case) as eager:
        for name in variants:
            sample = prepared(case, *VARIANTS[name])
            eager(), sample()
            pairs = [(timed(eager, case.device), timed(sample, case.device)) for _ in range(rounds)]
            ours = statistics.median(mine for _, mine in pairs)
            results.setdefault(
                EAGER, row(case, statistics.median(theirs for theirs, _ in pairs), 1.0, flops, peak)
            )
            results[name] = row(
                case, ours, statistics.median(theirs / mine for theirs, mine in pairs), flops, peak
            )
            del sample
    return results


def row(case: Case, seconds: float, ratio: float, flops: float, peak: float) -> dict[str, float]:
    """The figures of one variant from its seconds for a batch."""
    achieved = flops * case.num_envs * case.steps / seconds / 1e12
    return {
        "pictures_per_second": case.num_envs / seconds,
        "ratio": ratio,
        "share_of_peak": achieved / peak,
    }


def prepared(
    case: Case, memory_format: torch.memory_format, mode: str | None
) -> Callable[[], object]:
    """A function that samples and scores a batch with a network prepared in this way."""
    pipe = copy.deepcopy(case.pipe)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=memory_format)
        if mode is not None:
            part.compile(mode=mode)
    model = from_pipeline(pipe, prompts=PROMPT, decode_batch_size=DECODE_BATCH)
    env = VelocityEnvironment(model, load_reward("images/red"), case.steps)
    return lambda: env.sample(case.num_envs).rewards.cpu()


def timed(episode: Callable[[], object], device: str) -> float:
    """Seconds of a call, whatever it left for the device to do included."""
    synchronise(device)
    start = time.perf_counter()
    episode()
    synchronise(device)
    return time.perf_counter() - start


@torch.inference_mode()
def network_flops(case: Case) -> float:
    """Floating-point operations of the network for one picture and step."""
    unet = case.pipe.unet
    size = unet.config.sample_size
    x = torch.zeros(1, unet.config.in_channels, size, size, dtype=unet.dtype, device=unet.device)
    prompt = torch.zeros(
        1, 77, unet.config.cross_attention_dim, dtype=unet.dtype, device=unet.device
    )
    with FlopCounterMode(display=False) as counter:
        unet(x, 1, prompt)
    return float(counter.get_total_flops())


@torch.inference_mode()
def matrix_peak(device: str, dtype: str, repeats: int = 5) -> float:
    """TFLOP/s of the fastest of a few square matrix products."""
    best = 0.0
    for n in MATRIX_SIZES["cpu" if device == "cpu" else "cuda"]:
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        a @ a
        best = max(
            best,
            *(2 * n**3 / timed(partial(torch.matmul, a, a), device) / 1e12 for _ in range(repeats)),
        )
    return best


def table(batch: int, rows: dict[str, dict[str, float]]) -> str:
    """The rows of one batch size as a Markdown table."""
    lines = [
        f"\n{batch} pictures at a time",
        "",
        "| | pictures / s | speed, eager pipeline = 1 | share of the peak |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, values in rows.items():
        lines.append(
            f"| {name} | {values['pictures_per_second']:.3g} | {values['ratio']:.2f} | "
            f"{values['share_of_peak']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
