"""Measuring a frontier: the base model, guidance, and agents at several reward scales.

What ``frontier.json`` holds already is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode

from flowgym_gym.agents import imports_of_extra
from flowgym_gym.agents.frontier.report import (
    PICTURE,
    REPORT,
    Report,
    against_best_of_n,
    as_point,
    as_pool,
    cell,
    draw,
    style,
)
from flowgym_gym.agents.frontier.spec import (
    BATCH,
    BEST_OF,
    EPISODES,
    POOL,
    Agent,
    FrontierSpec,
    Plan,
    plan_frontier,
)
from flowgym_gym.agents.kinds import AnyVectorEnv, SomeOptions
from flowgym_gym.agents.runs import contents
from flowgym_gym.agents.runs.bars import Bar
from flowgym_gym.agents.runs.contents import drawn_prompts
from flowgym_gym.agents.runs.drawing import plain_style
from flowgym_gym.agents.runs.environments import make_vector_env, with_devices_for
from flowgym_gym.agents.runs.episodes import held_out_seeds, play
from flowgym_gym.agents.runs.files import locked, versions, write_json
from flowgym_gym.console import say
from flowgym_gym.envs import environment_of
from flowgym_gym.envs.environment import Environment, seeded
from flowgym_gym.errors import CheckpointError, OptionError, reason
from flowgym_gym.optimal_control.best_of_n import (
    BOOTSTRAP_SAMPLES,
    SAMPLES_OF_POOL,
    best_of_n,
    kl_best_of_n,
    pool_notes,
)
from flowgym_gym.optimal_control.guidance import RewardGuidance, no_gradient
from flowgym_gym.statistics import CONFIDENCE, FORMULA, mean_and_interval

if TYPE_CHECKING:
    from flowgym_gym.agents.runs.preparation import PreparedRun


@dataclass(frozen=True)
class Frontier:
    """What :func:`frontier` measured.

    Attributes:
        out: Its folder.
        report: What ``frontier.json`` holds.
        signal: The signal that interrupted a training; None if everything is there.
    """

    out: Path
    report: Report
    signal: int | None = None


def frontier(
    env_id: str,
    *,
    out: str | Path,
    algos: Sequence[str] = ("ppo", "sac"),
    reward_scales: Sequence[float] | None = None,
    strengths: Sequence[float] | None = None,
    gradients: Sequence[str] = ("endpoint",),
    best_of: Sequence[int] = BEST_OF,
    pool: int = POOL,
    episodes: int = EPISODES,
    seed: int = 0,
    timesteps: int | None = None,
    overrides: SomeOptions | None = None,
    batch_size: int = BATCH,
) -> Frontier:
    """Measure the frontier of an environment, or go on with it: what is in ``out`` already is not
    done again.

    Args:
        env_id: The environment, with or without ``flowgym/``.
        out: Folder for ``frontier.json``, ``frontier.png`` and the agents' ``runs``; points of
            earlier calls stay.
        algos: Algorithms of the agents. The preset for the first decides the process, its steps
            say, for all.
        reward_scales: ``reward_scale / control_cost_weight`` of the agents; 0.1 to 10 times the
            environment's own reward scale if None.
        strengths: Strengths of the guidance; 0.03 to 3 times the environment's own reward scale if
            None.
        gradients: How the guidance's gradient goes: ``"endpoint"``, ``"network"``, or both.
        best_of: Numbers of samples that the best is taken of.
        pool: Number of base samples that best of n is estimated from.
        episodes: Of each guidance and each agent, at least 2.
        seed: Of the trainings; held-out episode ``i`` starts from ``2**30 + seed + i``.
        timesteps: Of each training; the preset's if None.
        overrides: Changes to the presets by dotted name, ``{"env.prompts": "a photo of a frog"}``.
        batch_size: Episodes at a time, which bounds the memory that gradients take.

    Returns:
        The measured points. A SIGINT or SIGTERM during a training saves it and returns.

    Raises:
        FlowGymError: If an argument cannot be used, before any long work.
        CheckpointError: If what is in ``out`` is damaged.
    """
    plan = plan_frontier(
        FrontierSpec(
            env_id=env_id,
            out=out,
            algos=algos,
            reward_scales=reward_scales,
            strengths=strengths,
            gradients=gradients,
            best_of=best_of,
            pool=pool,
            episodes=episodes,
            seed=seed,
            timesteps=timesteps,
            overrides=dict(overrides or {}),
            batch_size=batch_size,
        )
    )
    return measure(plan)


def measure(plan: Plan) -> Frontier:
    """Measure what a plan has and the folder does not."""
    # What cannot be done is refused before there is a folder.
    report, runs = _begin_runs(plan)
    for _, prepared in runs:
        settings = with_devices_for(prepared.config.settings, 1)
        make_vector_env(plan.env_id, settings, 1).close()
    env = _make_env(plan)
    prompts = drawn_prompts(env)
    known = contents.contents_of(plan.env_id, plan.process["env"], prompts)
    _check_contents(plan, report, known)
    for note in pool_notes(plan.best_of, plan.spec.pool, len(set(prompts or ()))):
        say(note)
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        # Another process may have gone on in the meantime.
        report, runs = _begin_runs(plan)
        report["contents"] = known
        _measure_base_model(plan, report, env)
        _measure_guidance(plan, report, environment_of(env))
        for agent, prepared in runs:
            say(f"training {agent.algo.upper()} at reward scale {agent.scale:g} in {prepared.out}")
            trained = _trainings().train_agent(plan, prepared)
            if isinstance(trained, int):
                return Frontier(plan.out, report, trained)
            timesteps, measured = trained["timesteps"], trained["agent"]
            _add(plan, report, agent.name, {**agent.asked, "timesteps": timesteps}, measured)
    return Frontier(plan.out, report)


def _trainings() -> ModuleType:
    """The module that trains agents, loaded where there are any: it needs stable-baselines3."""
    with imports_of_extra():
        from flowgym_gym.agents.frontier import trainings
    return trainings


def _begin(plan: Plan) -> Report:
    """The report of earlier calls, or an empty one.

    Raises:
        OptionError: If the folder holds the frontier of another process.
        CheckpointError: If it is damaged.
    """
    path = plan.out / REPORT
    report: Report = {"env_id": plan.env_id, "settings": plan.process, "points": {}}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings = {**found["settings"], "env": contents.resolved(found["settings"]["env"])}
            same = (found["env_id"], settings) == (report["env_id"], report["settings"])
            report["pool"] = as_pool(found["pool"])
            report["points"] = {
                name: as_point(point)
                for name, point in found["points"].items()
                if point["method"] != "best_of_n"
            }
            if "contents" in found:
                report["contents"] = dict(found["contents"])
        except Exception as error:  # Anything may stand in a file that is damaged.
            raise CheckpointError(
                f"{path} is damaged: {type(error).__name__}: {reason(error)}; move it away"
            ) from error
        if not same:
            raise OptionError(
                f"{path} is the frontier of another environment or other settings; choose another "
                "folder"
            )
    return {
        **report,
        "confidence": CONFIDENCE,
        "interval": FORMULA,
        "interval_of_best_of_n": "mean +- 1.96 standard deviations, "
        f"from {BOOTSTRAP_SAMPLES} bootstrap samples",
        "versions": versions(),
        "notes": list(plan.notes),
    }


def _begin_runs(plan: Plan) -> tuple[Report, list[tuple[Agent, PreparedRun]]]:
    """The report of earlier calls, and the trainings whose points it does not have."""
    report = _begin(plan)
    waiting = [agent for agent in plan.agents if not _is_done(report, agent.name, agent.asked)]
    return report, [(agent, _trainings().prepare_agent(plan, agent)) for agent in waiting]


def _check_contents(plan: Plan, report: Report, known: contents.Contents) -> None:
    """Raise an OptionError if a frontier was begun with other prompts or weights under the same
    names.
    """
    was = report.get("contents", known)
    if was != known:
        raise OptionError(
            f"{plan.out / REPORT} was measured with other contents of "
            f"{contents.different(was, known)}; put back what was there, or choose another folder"
        )


def _is_done(report: Report, name: str, asked: SomeOptions) -> bool:
    point = report["points"].get(name, {})
    return all(point.get(key) == value for key, value in asked.items()) and bool(point)


def _measure_base_model(plan: Plan, report: Report, env: AnyVectorEnv) -> None:
    """The pool of base samples, and what follows from it: the base model's own mean and
    best of n.
    """
    asked = {"episodes": plan.spec.pool, "seed": plan.spec.seed}
    if {key: report.get("pool", {}).get(key) for key in asked} != asked:
        seeds = held_out_seeds(plan.spec.pool, plan.spec.seed)
        played = [play(env, batch) for batch in _batches("base model", seeds, env.num_envs)]
        rewards = np.concatenate([episodes.terminal_rewards for episodes in played])
        prompts = [prompt for episodes in played for prompt in episodes.prompts]
        several = len(set(prompts)) > 1
        report["pool"] = {
            **asked, "seeds": [seeds[0], seeds[-1]], "rewards": rewards.tolist(),
            "prompts": prompts if several else [],
        }  # fmt: skip
    rewards, prompts = np.array(report["pool"]["rewards"]), report["pool"]["prompts"]
    fewest = min(np.unique(prompts, return_counts=True)[1]) if prompts else len(rewards)
    possible = [n for n in plan.best_of if n * SAMPLES_OF_POOL <= fewest]
    if len(possible) < len(plan.best_of):
        left_out = ", ".join(str(n) for n in plan.best_of if n not in possible)
        of_which = f"{fewest} samples of one of the prompts" if prompts else f"{fewest} samples"
        report["notes"].append(
            f"best of {left_out} is left out: the pool has {of_which}, and an estimate with an "
            f"interval takes {SAMPLES_OF_POOL} n; take a larger pool"
        )
    best = best_of_n(rewards, max(possible, default=1), prompts, plan.spec.seed)
    report["best_of_n"] = {end: values.tolist() for end, values in best.items()}
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    report["points"]["base"] = {
        "method": "base",
        "setting": 0,
        **asked,
        "reward": mean_and_interval(rewards),
        "kl": nothing,
    }
    for n in possible:
        report["points"][f"best-of-{n}"] = {
            "method": "best_of_n", "setting": n, **asked,
            "reward": {end: float(values[n - 1]) for end, values in best.items()},
            "kl": {"mean": kl_best_of_n(n)},
        }  # fmt: skip
    _save(plan, report)
    base = report["points"]["base"]["reward"]
    say(
        f"base model: reward {cell(base)}"
        + "".join(f", best of {n}: {best['mean'][n - 1]:.4g}" for n in possible)
    )


def _measure_guidance(plan: Plan, report: Report, environment: Environment[Any]) -> None:
    """Guidance at every strength, in batches that are seeded as the first of their episodes."""
    if not environment.reward.differentiable and plan.strengths and plan.gradients:
        report["notes"].append(f"no guidance: {no_gradient(environment.reward)}")
        say(report["notes"][-1])
        return
    for gradient in plan.gradients:
        for strength in plan.strengths:
            name = f"{gradient}-{strength:g}"
            asked = {
                "method": gradient, "setting": strength, "episodes": plan.spec.episodes,
                "seed": plan.spec.seed,
                "batch_size": plan.spec.batch_size,
            }  # fmt: skip
            if _is_done(report, name, asked):
                continue
            policy = RewardGuidance(environment, strength, gradient)
            rewards, costs = [], []
            for seeds in _batches(
                f"guidance {strength:g}",
                held_out_seeds(plan.spec.episodes, plan.spec.seed),
                plan.spec.batch_size,
            ):
                with seeded(seeds[0]):
                    sample = environment.sample(len(seeds), policy)
                rewards.append(sample.rewards.double().cpu().numpy())
                costs.append(sample.control_costs.double().sum(dim=0).cpu().numpy())
            measured = {
                "terminal_reward": mean_and_interval(np.concatenate(rewards)),
                "control_cost": mean_and_interval(np.concatenate(costs)),
            }
            _add(plan, report, name, asked, measured)


def _add(plan: Plan, report: Report, name: str, asked: SomeOptions, measured: SomeOptions) -> None:
    """Put a point into the report and onto the disk."""
    point = {**asked, "reward": measured["terminal_reward"], "kl": measured["control_cost"]}
    report["points"][name] = point
    _save(plan, report)
    title, kind, *_ = style(point["method"])
    measured_text = f"reward {cell(point['reward'])} for {cell(point['kl'])} nats"
    say(
        f"{title}, {kind} = {point['setting']:g}: {measured_text}, against best of n: "
        f"{point['against_best_of_n']}"
    )


def _save(plan: Plan, report: Report) -> None:
    for point in report["points"].values():
        if point["method"] not in ("base", "best_of_n"):
            point["against_best_of_n"] = against_best_of_n(point, report["best_of_n"])
    try:
        write_json(plan.out / REPORT, report)
        with plain_style():
            draw(report).savefig(plan.out / PICTURE, dpi=120)
    except OSError as error:
        raise CheckpointError(f"{plan.out} cannot be written: {error.strerror or error}") from error


def _make_env(plan: Plan) -> AnyVectorEnv:
    """The process that all methods share; its actions are controls in standard deviations of the
    transition.

    Raises:
        OptionError: If no divergence can be measured on it, or no reward compared.
    """
    settings = {
        **plan.process,
        "env": {**plan.process["env"], "action_type": "control", "action_scale": 1.0},
    }
    env = make_vector_env(
        plan.env_id, settings, min(plan.spec.batch_size, plan.spec.pool), AutoresetMode.DISABLED
    )
    reward = environment_of(env).reward
    if reward.stateful:
        raise OptionError(
            f"{type(reward).__name__} remembers what it has scored, and a frontier compares "
            "samples by one measure; take the reward inside it"
        )
    if not bool((environment_of(env).transitions.std > 0).any()):
        raise OptionError(
            "this process draws no noise, so that a steered one has no finite divergence from it; "
            "take a noise_level above 0"
        )
    return env


def _batches(label: str, seeds: list[int], size: int) -> Iterator[list[int]]:
    """Seeds in batches, with a progress bar where standard error is a terminal."""
    with closing(Bar(len(seeds), unit="episode", label=label)) as bar:
        for start in range(0, len(seeds), size):
            batch = seeds[start : start + size]
            yield batch
            bar.update(len(batch))
