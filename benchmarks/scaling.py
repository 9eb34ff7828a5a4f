"""How sampling scales with RLlib's runners, and what travels: ``python -m benchmarks.scaling``.

Each runner has one thread and sub-environments of its own, so that the work grows with their
number. What travels from a runner is measured as Ray sends it, pickled: observations, actions and
rewards of an episode. What travels to it is the actor. The base model's weights never travel.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from flowgym_gym.agents.rllib import config
from flowgym_gym.agents.runs.presets import full_id

MEMORY = 300_000_000


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table, a row for each number of runners."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--env", default="StableDiffusion-Red-v0", help="(default: %(default)s)")
    parser.add_argument("--runners", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num-envs", type=int, default=16, help="of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    env_id = full_id(args.env)
    ray.init(
        num_cpus=max(args.runners),
        object_store_memory=MEMORY,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    try:
        rows = [measure(env_id, runners, args.num_envs, args.rounds) for runners in args.runners]
    finally:
        ray.shutdown()
    print(table(rows))
    return rows


def measure(env_id: str, runners: int, num_envs: int, rounds: int) -> dict[str, Any]:
    """Sample whole episodes on a number of runners, in rounds."""
    made = config(env_id, runners=runners).debugging(seed=0, log_level="ERROR")
    made.env_runners(num_envs_per_env_runner=num_envs)
    algorithm = made.build_algo()
    group = algorithm.env_runner_group
    rates = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        sampled = group.foreach_env_runner(
            lambda runner: runner.sample(num_episodes=runner.num_envs), local_env_runner=False
        )
        seconds = time.perf_counter() - started
        episodes = [episode for own in sampled for episode in own]
        if number:  # the first round is to warm up
            rates.append(sum(len(episode) for episode in episodes) / seconds)
    steps = sum(len(episode) for episode in episodes)
    policy = algorithm.get_module().get_state(inference_only=True)
    algorithm.stop()
    return {
        "runners": runners,
        "steps_per_second": float(np.median(rates)),
        "quartiles": [float(q) for q in np.quantile(rates, (0.25, 0.75))],
        "bytes_per_step": len(pickle.dumps(episodes)) / steps,
        "bytes_of_policy": len(pickle.dumps(policy)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| runners | env steps / s (quartiles) | of the first row | bytes from a runner, each step "
        "| bytes of the policy |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['runners']} | {row['steps_per_second']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['steps_per_second'] / rows[0]['steps_per_second']:.2f} "
            f"| {row['bytes_per_step']:,.0f} | {row['bytes_of_policy']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
