"""How it is timed: rows take turns, so that what slows the machine slows them all, and ratios are
taken round by round.

Besides the whole time, the time inside the network and the decoder is taken, by timing their calls;
what is left is overhead, a figure that a noisy machine disturbs much less than the ratio of two
times.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import BARE, Case, Row

LIBRARIES = (
    "flowgym_gym",
    "gymnasium",
    "torch",
    "diffusers",
    "transformers",
    "stable_baselines3",
    "numpy",
)


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on: processor, threads, device and versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }


def synchronise(device: str) -> None:
    """Wait for what the device still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def inside_the_network(case: Case) -> Iterator[list[float]]:
    """Adds up the seconds spent in the network and the decoder, in the list's only entry."""
    pipe, seconds = case.pipe, [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronise(case.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(case.device)
            seconds[0] += time.perf_counter() - start
            return result

        return call

    owners = [(pipe.unet, "forward"), (pipe.vae, "decode"), (pipe.text_encoder, "forward")]
    originals = [getattr(owner, name) for owner, name in owners]
    for (owner, name), original in zip(owners, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield seconds
    finally:
        for owner, name in owners:
            delattr(owner, name)


def compare(
    rows: Sequence[Row], case: Case, rounds: int, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Time rows against each other.

    Args:
        rows: The bare loop among them.
        case: What they all do.
        rounds: How often each is run, after two runs that are not counted.
        seed: Of the order in which they take turns.

    Returns:
        For each row the median environment steps per second, the median of the rounds' ratios of
        time per step to the bare loop's with its quartiles, the same ratio of the time inside
        network and decoder alone (1 but for the machine's noise, as the calls are the same), the
        share of its time outside them, and the peak of its memory above what it started with, in
        MB; the last three are None where the network runs elsewhere.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {row.key: [] for row in rows}
    inside: dict[str, list[float]] = {row.key: [] for row in rows}
    outside: dict[str, list[float]] = {row.key: [] for row in rows}
    memory: dict[str, float | None] = {}
    with ExitStack() as stack:
        episodes: dict[str, Any] = {row.key: stack.enter_context(row.open(case)) for row in rows}  # type: ignore[arg-type]
        for row in rows:
            episodes[row.key]()  # What is kept from the first call on counts for no row.
        for row in rows:
            memory[row.key] = _peak(episodes[row.key], case.device)
        for number in range(rounds):
            for row in order.sample(list(rows), len(rows)):
                with inside_the_network(case) as network:
                    steps, whole = _timed(episodes[row.key], case.device)
                if case.device == "cpu":
                    seconds[row.key].append(whole / steps)
                else:  # Timing the calls of the network keeps a device from working ahead.
                    steps, alone = _timed(episodes[row.key], case.device)
                    seconds[row.key].append(alone / steps)
                outside[row.key].append(1 - network[0] / whole)
                inside[row.key].append(network[0] / steps)
            print(f"  round {number + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    results = {}
    for row in rows:
        ratios = sorted(
            mine / bare for mine, bare in zip(seconds[row.key], seconds[BARE], strict=True)
        )
        results[row.key] = {
            "steps_per_second": 1 / statistics.median(seconds[row.key]),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 4],
            "ratio_high": ratios[-1 - len(ratios) // 4],
            "network_ratio": _median_ratio(inside[row.key], inside[BARE])
            if row.here and all(inside[BARE])
            else None,
            "outside_network": statistics.median(outside[row.key]) if row.here else None,
            "peak_memory_mb": memory[row.key] if row.here else None,
        }
    return results


def _median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _timed(episode: Any, device: str) -> tuple[int, float]:
    """Steps of an episode and the seconds that it took."""
    synchronise(device)
    start = time.perf_counter()
    steps = episode()
    synchronise(device)
    return steps, time.perf_counter() - start


def _peak(episode: Any, device: str) -> float | None:
    """Peak memory of an episode above what was in use before, in MB; None where this cannot be
    told.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        episode()
        return (torch.cuda.max_memory_allocated() - allocated) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        episode()
        return None
    before = _status("VmRSS")
    episode()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> float:
    """A line of ``/proc/self/status`` in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1])
    return float("nan")
