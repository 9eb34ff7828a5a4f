"""Agents that learn, against the known optimum: ``python -m studies.optimality``.

Trains the presets of the Gaussian mixtures on several seeds and says how much of the way they come
from the return of the base model to the optimum of dynamic programming, beside the free energy,
which no policy passes. Returns are expectations, worked out on the cells of the optimum for the
deterministic policy: nothing is sampled.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from gymnasium.vector import AutoresetMode

from benchmarks.measure import machine
from flowgym_gym.agents import load_agent, train
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.evaluation import deterministic
from flowgym_gym.agents.runs.files import CONFIG, write_json
from flowgym_gym.agents.runs.presets import ALGORITHMS, complete, full_id, load_preset
from flowgym_gym.agents.runs.settings import override, parse_assignments
from flowgym_gym.optimal_control import (
    Policy,
    free_energy,
    optimal_value,
    policy_value,
    uncontrolled_value,
)
from flowgym_gym.statistics import mean_and_interval

RESULTS = Path(__file__).parent / "results" / "optimality.json"
RUNS = Path("runs/optimality")
IDS = [f"flowgym/GaussianMixture-{reward}-v0" for reward in ("Gaussian", "Binary", "Gaussian2D")]
DRAWN = IDS[0]
TRAJECTORIES = 2000
# Sub-environment i of a training starts from seed + i, so the seeds lie further apart than there
# are sub-environments.
SEED_STEP = 10_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.optimality", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--ids", nargs="+", default=IDS, help="environments with states of one or two dimensions"
    )
    parser.add_argument("--algos", nargs="+", choices=sorted(ALGORITHMS), default=["ppo", "sac"])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="results; what is there is not trained again"
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="where the run folders go, in place of older ones"
    )
    parser.add_argument(
        "--draw", type=Path, help=f"draw the action fields of the first seed on {DRAWN}, a png"
    )
    args = parser.parse_args(arguments)
    ids = [full_id(id) for id in args.ids]
    if args.draw is not None and DRAWN not in ids:
        parser.error(f"--draw shows agents on {DRAWN}, which is not among --ids")
    changes = parse_assignments(args.set)
    seeds = range(0, args.seeds * SEED_STEP, SEED_STEP)
    cases = [(id, algo, seed) for id in ids for algo in args.algos for seed in seeds]
    results = json.loads(args.out.read_text()) if args.out.is_file() else {"trainings": []}
    for algo in args.algos if args.draw is not None else ():
        # What has a result is not trained again, and only its run folder has the agent.
        folder = folder_of(args.runs, DRAWN, algo, 0)
        settings = override(load_preset(DRAWN, algo), changes, DRAWN, algo)
        if (
            recorded(results, DRAWN, algo, 0, settings) is not None
            and not (folder / CONFIG).is_file()
        ):
            parser.error(
                f"--draw needs the agent of {folder}, which is not there, and {args.out} has its "
                "result already; take a new file for --out to train it again"
            )
    chosen = []
    for number, (id, algo, seed) in enumerate(cases, start=1):
        settings = override(load_preset(id, algo), changes, id, algo)
        # Before the training: not every environment has a known optimum.
        known = reference(id, settings)
        training = recorded(results, id, algo, seed, settings)
        if training is None:
            print(f"[{number}/{len(cases)}] {id}, {algo}, seed {seed}", file=sys.stderr, flush=True)
            training = {
                "id": id, "algo": algo, "seed": seed, "settings": dict(settings),
                **learn(id, algo, seed, changes, folder_of(args.runs, id, algo, seed)),
            }  # fmt: skip
            others = [
                old
                for old in results["trainings"]
                if (old["id"], old["algo"], old["seed"]) != (id, algo, seed)
            ]
            results["trainings"] = [*others, training]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, results)
            print(
                f"return {training['value']:.3f} in {training['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        chosen.append({**training, "reference": known})
    print(table(chosen))
    if args.draw is not None:
        agents = {algo: load_agent(folder_of(args.runs, DRAWN, algo, 0)) for algo in args.algos}
        settings = override(load_preset(DRAWN, args.algos[0]), changes, DRAWN, args.algos[0])
        draw(
            {algo.upper(): deterministic(agent) for algo, agent in agents.items()},
            settings,
            args.draw,
        )


def folder_of(runs: Path, id: str, algo: str, seed: int) -> Path:
    """The run folder of a training."""
    return runs / f"{id.rpartition('/')[2]}-{algo}-{seed}"


def recorded(
    results: dict[str, Any], id: str, algo: str, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The result of this training with these settings, if there is one."""
    for old in results["trainings"]:
        # A setting that did not exist when a result was made is at its default.
        if complete(old["settings"]) == settings and (old["id"], old["algo"], old["seed"]) == (
            id,
            algo,
            seed,
        ):
            return old  # type: ignore[no-any-return]
    return None


def reference(id: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns to measure an agent against: the base model's, the optimum, the bound."""
    return _reference(id, json.dumps({name: settings[name] for name in ("env", "wrappers")}))


@functools.cache
def _reference(id: str, process: str) -> dict[str, Any]:
    env = make_vector_env(id, json.loads(process), 1)
    return {
        "uncontrolled": uncontrolled_value(env),
        "optimum": optimal_value(env).value,
        "bound": free_energy(env),
    }


def learn(id: str, algo: str, seed: int, changes: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train into a new run folder; the expected return of the agent, and the time it took."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    result = train(id, algo, out=out, seed=seed, overrides=changes)
    seconds = time.perf_counter() - started
    if result.signal is not None:
        raise KeyboardInterrupt
    agent = load_agent(out)
    return {
        "timesteps": result.timesteps,
        "seconds": round(seconds, 1),
        "value": policy_value(
            make_vector_env(id, read_config(out)["settings"], 1), deterministic(agent)
        ),
        "machine": machine("cpu"),
    }


def way(training: dict[str, Any]) -> float:
    """How much of the way from the base model's return to the optimum an agent has come."""
    base, optimum = training["reference"]["uncontrolled"], training["reference"]["optimum"]
    return float((training["value"] - base) / (optimum - base))


def table(trainings: list[dict[str, Any]]) -> str:
    """Trainings as a Markdown table, one line for each environment and algorithm."""
    lines = [
        "| environment | algorithm | steps | seconds | base model | agent | optimum | bound | of "
        "the way, % | worst |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for id, algo in dict.fromkeys((training["id"], training["algo"]) for training in trainings):
        rows = [
            training for training in trainings if (training["id"], training["algo"]) == (id, algo)
        ]
        reference = rows[0]["reference"]
        values = [row["value"] for row in rows]
        shares = [100 * way(row) for row in rows]
        lines.append(
            f"| `{id}` | {algo.upper()} | {rows[0]['timesteps']:,} | "
            f"{statistics.mean(row['seconds'] for row in rows):.0f} | "
            f"{reference['uncontrolled']:.3f} | {mean_cell(values, 3)} | "
            f"{reference['optimum']:.3f} | {reference['bound']:.3f} | {mean_cell(shares, 1)} | "
            f"{min(shares):.1f} |"
        )
    return "\n".join(lines)


def mean_cell(values: list[float], digits: int) -> str:
    """Mean with its 95 % confidence interval over seeds (Student's t)."""
    found = mean_and_interval(np.array(values))
    mean = f"{found['mean']:.{digits}f}"
    return f"{mean} ± {found['high'] - found['mean']:.{digits}f}" if "high" in found else mean


def draw(agents: dict[str, Policy], settings: Mapping[str, Any], path: Path) -> None:
    """The actions of the optimum and of agents over state and time, and where their episodes go."""
    env = make_vector_env(DRAWN, settings, TRAJECTORIES, AutoresetMode.DISABLED)
    optimum = optimal_value(env)
    policies: dict[str, Policy] = {"optimum": optimum.policy, **agents}
    states = np.linspace(-5, 5, 401, dtype=np.float32)[:, None]
    _, panels = plt.subplots(
        1, len(policies), figsize=(4 * len(policies), 3.6), sharey=True, constrained_layout=True
    )
    for panel, (name, policy) in zip(panels, policies.items(), strict=True):
        times = optimum.times[:-1]
        field = [policy({"latent": states, "time": np.full_like(states, t)})[:, 0] for t in times]
        image = panel.pcolormesh(
            times, states[:, 0], np.transpose(field), cmap="RdBu", vmin=-1, vmax=1
        )
        visited = episodes(env, policy)
        quantiles = np.quantile(visited, [0.05, 0.5, 0.95], axis=1)
        panel.plot(optimum.times, quantiles.T, color="black", linewidth=1)
        panel.set(
            title=f"{name}: return {policy_value(env, policy):.2f}", xlabel="time", xlim=(0, 1)
        )
        panel.set_xticks([0, 0.2, 0.4, 0.6, 0.8])
    panels[0].set_ylabel("state")
    panels[0].figure.suptitle(DRAWN)
    plt.colorbar(image, ax=panels, label="action")
    plt.savefig(path, dpi=120)
    plt.close()


def episodes(env: Any, policy: Policy) -> np.ndarray:
    """States at every visited time, shape ``(steps + 1, n)``."""
    observation, _ = env.reset(seed=0)
    visited, done = [observation["latent"][:, 0]], False
    while not done:
        observation, _, terminations, _, _ = env.step(policy(observation))
        visited.append(observation["latent"][:, 0])
        done = bool(terminations.all())
    return np.array(visited)


if __name__ == "__main__":
    main()
