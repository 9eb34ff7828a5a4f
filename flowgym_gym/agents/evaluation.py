r"""Evaluation: an agent and the base model on the same held-out seeds, and the agent at intervals of its training.

The interval of a mean is Student's

.. math:: \bar x \pm t \, s / \sqrt{n},

with :math:`s` the sample standard deviation (denominator :math:`n - 1`) and :math:`t` the 0.975 quantile of Student's
distribution with :math:`n - 1` degrees of freedom, 1.97 for 256 episodes. The difference between agent and base model
is paired: it is the mean of the differences of episodes with the same seed, that is, the same initial noise.

Seeds lie apart: training takes those below ``2**30``, :func:`evaluate` and the pictures those from ``2**30`` on, and
the evaluations by which a run chooses its best agent those from ``2**31`` on, so that the choice flatters no result.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from scipy.stats import t as student
from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.runs import (
    BEST,
    Metrics,
    Row,
    best_return,
    freeze_reward,
    open_agent,
    read_config,
    save_best,
    with_frozen_reward,
    write_json,
)
from flowgym_gym.agents.settings import SEEDS, make_vector_env
from flowgym_gym.agents.vec_env import SB3VecEnv
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, ModelError, OptionError

EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.csv"
BATCH = 32
SHOWN_PROMPTS, SHOWN_CHARACTERS = 10, 40
COMPARED = ("agent", "base", "difference")
CONFIDENCE = 0.95
FORMULA = "mean +- t * s / sqrt(n), s with denominator n - 1, t of Student's distribution with n - 1 degrees of freedom"
QUANTITIES = {
    "terminal_reward": "terminal_rewards",
    "control_cost": "control_costs",
    "return": "returns",
}

Predict = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass
class Episodes:
    """What came of whole episodes; arrays of shape ``(n,)``.

    Attributes:
        terminal_rewards: Unscaled.
        control_costs: Sum over the episode, in nats.
        returns: What the agent was paid.
        valids: Whether each sample is valid.
        pictures: The first finished samples, uint8 ``(H, W, 3)``; empty if they are no pictures.
        prompts: The prompt of each episode; empty if the model has none.
    """

    terminal_rewards: np.ndarray
    control_costs: np.ndarray
    returns: np.ndarray
    valids: np.ndarray
    pictures: list[np.ndarray] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def means(self) -> dict[str, float | int]:
        """Mean of each quantity, and the number of episodes."""
        means: dict[str, float | int] = {name: float(getattr(self, a).mean()) for name, a in QUANTITIES.items()}
        return {"episodes": len(self.returns), **means}


def held_out_seeds(episodes: int, seed: int = 0) -> list[int]:
    """Seeds of evaluation episodes: from ``2**30 + seed`` on, which no training takes.

    >>> held_out_seeds(2)
    [1073741824, 1073741825]
    """
    return [SEEDS + seed + i for i in range(episodes)]


def selection_seeds(episodes: int) -> list[int]:
    """Seeds of the episodes by which a run chooses its best agent: from ``2**31`` on.

    >>> selection_seeds(2)
    [2147483648, 2147483649]
    """
    return [2 * SEEDS + i for i in range(episodes)]


def play(
    env: VectorEnv[Any, Any, Any], seeds: list[int], predict: Predict | None = None, pictures: int = 0
) -> Episodes:
    """Play one episode for each seed.

    Args:
        env: A denoising vector environment with autoreset mode ``"Disabled"``; episodes are played in batches of
            its size.
        seeds: One for each episode.
        predict: Gives actions for a batch of observations; None for no correction, the base model.
        pictures: How many of the finished samples to return as pictures.
    """
    n = env.num_envs
    results: dict[str, list[np.ndarray]] = {name: [] for name in ("terminal_reward", "control_cost", "return", "valid")}
    frames: list[np.ndarray] = []
    prompts: list[str] = []
    still = np.zeros(env.action_space.shape or (), dtype=np.float32)
    for start in range(0, len(seeds), n):
        batch = seeds[start : start + n]
        # The last batch is filled up with episodes that are not counted.
        observations, infos = env.reset(seed=batch + [batch[-1]] * (n - len(batch)))  # type: ignore[arg-type]
        prompts.extend(infos.get("prompt", ())[: len(batch)])
        costs, returns, done = np.zeros(n), np.zeros(n), False
        while not done:
            actions = still if predict is None else predict(observations)
            observations, rewards, terminations, truncations, infos = env.step(actions)
            costs += infos["control_cost"]
            returns += rewards
            done = bool((terminations | truncations).all())
        values = (infos["terminal_reward"], costs, returns, infos["valid"])
        for name, value in zip(results, values, strict=True):
            results[name].append(value[: len(batch)])
        if len(frames) < pictures:
            frames.extend(frames_of(env)[: min(len(batch), pictures - len(frames))])
    joined = {name: np.concatenate(values) for name, values in results.items()}
    return Episodes(
        joined["terminal_reward"], joined["control_cost"], joined["return"], joined["valid"], frames, prompts
    )


def watch(env: VectorEnv[Any, Any, Any], seed: int, predict: Predict) -> list[list[np.ndarray]]:
    """Film the base model and an agent on the same seed.

    Args:
        env: A denoising vector environment of two, with autoreset mode ``"Disabled"``.
        seed: Of both episodes.
        predict: The agent.

    Returns:
        At the start and after each step the two samples that the model expects, base model first; nothing if samples
        are no pictures.
    """
    observations, _ = env.reset(seed=[seed, seed])  # type: ignore[arg-type]
    frames, done = [frames_of(env)], False
    while frames[0] and not done:
        actions = np.array(predict(observations))
        actions[0] = 0
        observations, _, terminations, truncations, _ = env.step(actions)
        frames.append(frames_of(env))
        done = bool((terminations | truncations).all())
    return frames if frames[0] else []


class Evaluations:
    """The evaluations of a run: ``evaluations.csv``, and the best agent.

    They have an environment and seeds of their own and draw no random numbers, so training does not notice them. All
    are on the same seeds, and a reward that remembers what it has scored scores them with an empty memory, so that they
    can be compared.

    Args:
        out: The run folder.
        config: Its configuration.
    """

    COLUMNS = ("timesteps", "episodes", *(f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")))

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self.out = out
        self.budget = config["settings"]["kl_budget"]
        self.metrics = Metrics(out / EVALUATIONS, self.COLUMNS, self.COLUMNS)
        self._seeds = selection_seeds(config["settings"]["evaluation_episodes"])
        self._env = evaluation_env(config, min(len(self._seeds), BATCH))

    def run(self, model: BaseAlgorithm, env: SB3VecEnv, progress: Mapping[str, Any]) -> Row:
        """Evaluate an agent, and keep it if it is the best so far among those within the budget.

        Args:
            model: The agent, between two rollouts.
            env: The environment that it trains in.
            progress: What a checkpoint keeps besides.

        Returns:
            The new row of ``evaluations.csv``.
        """
        episodes = self.play(model)
        row: Row = {"timesteps": model.num_timesteps, "episodes": len(self._seeds)}
        for name, attribute in QUANTITIES.items():
            values = interval(getattr(episodes, attribute))
            row |= {name: values["mean"], f"{name}_low": values["low"], f"{name}_high": values["high"]}
        self.metrics.append(row)
        if not over_budget(self.budget, row) and episodes.returns.mean() > best_return(self.out):
            save_best(self.out, model, env, progress, row)
        return row

    def play(self, model: BaseAlgorithm) -> Episodes:
        """The episodes of an evaluation."""
        return play(self._env, self._seeds, deterministic(model))

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def over_budget(budget: float | None, row: Row | None) -> bool:
    """Whether the mean control cost in a row of metrics or evaluations passes the budget, if there is one."""
    cost = None if row is None else row["control_cost"]
    return budget is not None and cost is not None and cost > budget


@plain_defaults()
def evaluate(
    run_or_policy: Any,
    episodes: int = 256,
    seed: int = 0,
    *,
    which: str = "best",
    vector_env: VectorEnv[Any, Any, Any] | None = None,
) -> dict[str, Any]:
    """Compare an agent, acting deterministically, with the base model on the same held-out seeds.

    Args:
        run_or_policy: A run folder, what ``train`` returned, or anything with stable-baselines3's ``predict``.
        episodes: Number of episodes of each, at least 2.
        seed: Episode ``i`` starts from seed ``2**30 + seed + i``, which no training run uses.
        which: ``"best"`` or ``"newest"`` agent of a run folder; see ``load_agent``.
        vector_env: Where to play; needed for a policy that comes without a run folder. Its autoreset mode must be
            ``"Disabled"``, which is ``AutoresetMode.DISABLED``. If its reward remembers what it has scored, a copy is
            played in, whose reward learns nothing more: agent and base model are scored by one measure.

    Returns:
        For ``agent``, ``base`` and their paired ``difference`` the ``mean``, ``low``, ``high`` and ``std`` of
        ``terminal_reward``, ``control_cost`` and ``return``; with several prompts, the same for the episodes of each
        under ``prompts``; for a run folder, which ``checkpoint`` the agent is. Also written to the run folder's
        ``evaluation.json``, if no other ``vector_env`` is given.

    Raises:
        OptionError: If a number is out of range, there is nothing to evaluate, or prompts or weights that the run's
            settings name are no longer those that it was trained on.
        CheckpointError: If no checkpoint can be read, or the run folder cannot be written.
    """
    if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 2:
        raise OptionError(f"episodes is {episodes!r}, expected a whole number, at least 2")
    check_seed(seed, episodes)
    folder = Path(run_or_policy) if isinstance(run_or_policy, str | os.PathLike) else None
    file = folder / EVALUATION if folder is not None and vector_env is None else None
    agent, checkpoint = run_or_policy, None
    if folder is not None:
        config = read_config(folder)
        agent, checkpoint = open_agent(folder, which, only_policy=vector_env is not None)
        vector_env = evaluation_env(config, min(episodes, BATCH), checkpoint) if vector_env is None else vector_env
    if not hasattr(agent, "predict"):
        raise OptionError(f"run_or_policy is a {type(agent).__name__}, expected a run folder or a policy with predict")
    if vector_env is None:
        raise OptionError("a policy without a run folder needs vector_env, the environment to evaluate it in")
    if vector_env.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise OptionError(
            'vector_env resets by itself; make it with gymnasium.make_vec(..., autoreset_mode="Disabled")'
        )

    vector_env = with_frozen_reward(vector_env)
    seeds = held_out_seeds(episodes, seed)
    played = play(vector_env, seeds, predict=deterministic(agent))
    base = play(vector_env, seeds)
    report: dict[str, Any] = {
        "episodes": episodes,
        "seed": seed,
        "seeds": [seeds[0], seeds[-1]],
        "timesteps": getattr(agent, "num_timesteps", None),
        "checkpoint": checkpoint and ("best" if checkpoint.parent.name == BEST else "newest"),
        "confidence": CONFIDENCE,
        "interval": FORMULA,
        "agent": {name: interval(getattr(played, a)) for name, a in QUANTITIES.items()},
        "base": {name: interval(getattr(base, a)) for name, a in QUANTITIES.items()},
        "difference": {name: interval(getattr(played, a) - getattr(base, a)) for name, a in QUANTITIES.items()},
        "valid": {"agent": float(played.valids.mean()), "base": float(base.valids.mean())},
    }
    if len(set(base.prompts)) > 1:
        report["prompts"] = by_prompt(played, base)
    if file is not None:
        try:
            write_json(file, report)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written: {error.strerror or error}") from error
    return report


def by_prompt(agent: Episodes, base: Episodes) -> dict[str, Any]:
    """Results of the episodes of each prompt, most frequent first; see :func:`evaluate`."""
    prompts = np.array(base.prompts)
    report = {}
    for prompt, count in Counter(base.prompts).most_common():
        rows = prompts == prompt
        report[prompt] = {
            "episodes": count,
            "agent": {name: interval(getattr(agent, a)[rows]) for name, a in QUANTITIES.items()},
            "base": {name: interval(getattr(base, a)[rows]) for name, a in QUANTITIES.items()},
            "difference": {
                name: interval((getattr(agent, a) - getattr(base, a))[rows]) for name, a in QUANTITIES.items()
            },
        }
    return report


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % confidence interval, and the sample standard deviation; of a single value the mean alone.

    >>> {k: round(v, 3) for k, v in interval(np.array([1.0, 2.0, 3.0, 4.0])).items()}
    {'mean': 2.5, 'low': 0.446, 'high': 4.554, 'std': 1.291}
    """
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean}
    std = float(values.std(ddof=1))
    half = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "std": std}


def deterministic(agent: Any) -> Predict:
    """The mean action of a stable-baselines3 agent."""

    def predict(observations: dict[str, np.ndarray]) -> np.ndarray:
        actions: np.ndarray = agent.predict(observations, deterministic=True)[0]
        return actions

    return predict


def evaluation_env(config: dict[str, Any], num_envs: int, checkpoint: Path | None = None) -> VectorEnv[Any, Any, Any]:
    """The environment of a run for whole episodes with given seeds.

    A reward that remembers what it has scored knows what it knew at the checkpoint, and stays at that.
    """
    env = make_vector_env(config["env_id"], config["settings"], num_envs, AutoresetMode.DISABLED, "rgb_array")
    freeze_reward(env, checkpoint)
    return env


def check_seed(seed: int, num_envs: int = 1) -> None:
    """Raise an OptionError unless the seeds of all sub-environments are whole numbers below ``2**30``."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= SEEDS - num_envs:
        raise OptionError(f"seed is {seed!r}, expected a whole number from 0 to {SEEDS - num_envs}")


def table(report: dict[str, Any]) -> str:
    """An evaluation as a small table, means with their intervals."""
    rows = {name.replace("_", " "): {who: report[who][name] for who in COMPARED} for name in QUANTITIES}
    prompts = report.get("prompts", {})
    shown = [(_label(prompt, values["episodes"]), values) for prompt, values in list(prompts.items())[:SHOWN_PROMPTS]]
    width = max(len(label) for label in (*rows, *(label for label, _ in shown))) + 2
    lines = [" " * width + "".join(f"{title:>24}" for title in ("agent", "base model", "difference"))]
    lines += [_line(label, values, width) for label, values in rows.items()]
    if shown:
        lines.append(f"terminal reward by prompt ({len(prompts)}):")
        lines += [
            _line(label, {who: results[who]["terminal_reward"] for who in COMPARED}, width) for label, results in shown
        ]
    if len(prompts) > len(shown):
        lines.append(f"... and {len(prompts) - len(shown)} more prompts in {EVALUATION}")
    if report["checkpoint"] is not None:
        lines.append(f"agent: the {report['checkpoint']} of the run, after {report['timesteps']} timesteps")
    lines.append(f"means of {report['episodes']} episodes each on the same held-out seeds; 95 % confidence: {FORMULA}")
    return "\n".join(lines)


def _label(prompt: str, episodes: int) -> str:
    short = prompt if len(prompt) <= SHOWN_CHARACTERS else prompt[: SHOWN_CHARACTERS - 3] + "..."
    return f"{short} ({episodes})"


def _line(label: str, values: Mapping[str, dict[str, float]], width: int) -> str:
    return f"{label:{width}}" + "".join(f"{_cell(values[who]):>24}" for who in COMPARED)


def _cell(values: dict[str, float]) -> str:
    half = f" +- {values['high'] - values['mean']:.2g}" if "high" in values else ""
    return f"{values['mean']:.4g}{half}"


def frames_of(env: VectorEnv[Any, Any, Any]) -> list[np.ndarray]:
    """The samples of a vector environment as pictures; nothing if they are none."""
    try:
        return list(env.render() or ())  # type: ignore[arg-type]
    except ModelError:
        # Samples that are no pictures have none to show.
        return []
