"""What RLlib learns with the presets: ``python -m studies.rllib GaussianMixture-Gaussian-v0``.

The steps are the preset's. On the Gaussian mixtures the return of an agent, acting
deterministically, is worked out on the cells of the optimum; elsewhere it is the mean of episodes
on held-out seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from gymnasium.vector import AutoresetMode

from benchmarks.measure import machine
from flowgym_gym.agents import evaluate
from flowgym_gym.agents.rllib import as_policy, config
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.evaluation import deterministic
from flowgym_gym.agents.runs.files import write_json
from flowgym_gym.agents.runs.presets import full_id, load_preset
from flowgym_gym.optimal_control import optimal_value, policy_value, uncontrolled_value
from flowgym_gym.statistics import mean_and_interval

RESULTS = Path(__file__).parent / "results" / "rllib.json"
EPISODES = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what has no result yet, and print a line for each environment and algorithm."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.rllib", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("env", help="environment id")
    parser.add_argument("--algos", nargs="+", choices=["ppo", "sac"], default=["ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runners", type=int, default=0, help="(default: the driver samples)")
    parser.add_argument("--timesteps", type=int, help="(default: the preset's)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    env_id = full_id(args.env)
    results: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.is_file() else []
    ray.init(
        num_cpus=max(1, args.runners),
        include_dashboard=False,
        object_store_memory=200_000_000,
        _node_ip_address="127.0.0.1",
        logging_level="warning",
    )
    try:
        for algo in args.algos:
            for seed in args.seeds:
                key = {"id": env_id, "algo": algo, "seed": seed, "runners": args.runners}
                if any(old.items() >= key.items() for old in results):
                    continue
                results.append({**key, **learn(env_id, algo, seed, args.runners, args.timesteps)})
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, results)
    finally:
        ray.shutdown()
    for algo in args.algos:
        own = [old for old in results if (old["id"], old["algo"]) == (env_id, algo)]
        print(line(env_id, algo, own))


def learn(env_id: str, algo: str, seed: int, runners: int, timesteps: int | None) -> dict[str, Any]:
    """Train an agent with its preset, and evaluate it."""
    settings = load_preset(env_id, algo)
    target = settings.timesteps if timesteps is None else timesteps
    algorithm = config(env_id, algo, runners=runners).debugging(seed=seed).build_algo()
    started, done = time.perf_counter(), 0
    while done < target:
        result = algorithm.train()
        done = int(result["num_env_steps_sampled_lifetime"])
        mean = result["env_runners"].get("episode_return_mean", float("nan"))
        print(f"{env_id} {algo} {seed}: {done} steps, {mean:.2f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    policy = as_policy(algorithm)
    algorithm.stop()
    found = {"timesteps": done, "seconds": round(seconds, 1), "machine": machine("cpu")}
    if "GaussianMixture" in env_id:
        env = make_vector_env(env_id, settings, 1)
        base, optimum = uncontrolled_value(env), optimal_value(env).value
        return {
            **found,
            "value": policy_value(env, deterministic(policy)),
            "base": base,
            "optimum": optimum,
        }
    env = make_vector_env(env_id, settings, 32, AutoresetMode.DISABLED)
    report = evaluate(policy, EPISODES, vector_env=env)
    return {
        **found,
        "value": report["agent"]["return"]["mean"],
        "base": report["base"]["return"]["mean"],
    }


def line(env_id: str, algo: str, trainings: list[dict[str, Any]]) -> str:
    """A row of a Markdown table."""
    seconds = sum(training["seconds"] for training in trainings) / len(trainings)
    cells = [f"`{env_id}`", algo.upper(), f"{trainings[0]['timesteps']:,}", f"{seconds:.0f}"]
    cells += [f"{trainings[0]['base']:.3f}", _cell([training["value"] for training in trainings])]
    if "optimum" in trainings[0]:
        ways = [(t["value"] - t["base"]) / (t["optimum"] - t["base"]) for t in trainings]
        cells += [_cell([100 * way for way in ways])]
    return f"| {' | '.join(cells)} |"


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    found = mean_and_interval(np.array(values))
    return f"{found['mean']:.3f} ± {found['high'] - found['mean']:.3f}"


if __name__ == "__main__":
    main()
