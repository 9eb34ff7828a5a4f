r"""Evaluation: an agent and the base model on the same held-out seeds, and the agent at intervals
of its training.

The interval of a mean is Student's

.. math:: \bar x \pm t \, s / \sqrt{n},

with :math:`s` the sample standard deviation (denominator :math:`n - 1`) and :math:`t` the 0.975
quantile of Student's distribution with :math:`n - 1` degrees of freedom, 1.97 for 256 episodes. The
difference between agent and base model is paired: it is the mean of the differences of episodes
with the same seed, that is, the same initial noise.

Seeds lie apart: training takes those below ``2**30``, :func:`evaluate` and the pictures those from
``2**30`` on, and the evaluations by which a run chooses its best agent those from ``2**31`` on, so
that the choice flatters no result.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.kinds import AnyVectorEnv, Options, SomeOptions
from flowgym_gym.agents.runs.checkpoints import best_return, freeze_reward, save_best
from flowgym_gym.agents.runs.config import Config, read_config
from flowgym_gym.agents.runs.environments import make_vector_env, with_devices_for
from flowgym_gym.agents.runs.episodes import (
    BATCH,
    QUANTITIES,
    Episodes,
    Predict,
    check_seed,
    held_out_seeds,
    play,
    selection_seeds,
)
from flowgym_gym.agents.runs.files import BEST, write_json
from flowgym_gym.agents.runs.metrics import Metrics, Row
from flowgym_gym.agents.runs.opening import open_agent
from flowgym_gym.agents.runs.state import with_frozen_reward
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.statistics import CONFIDENCE, FORMULA, mean_and_interval

EVALUATION = "evaluation.json"
EVALUATIONS = "evaluations.csv"
SHOWN_PROMPTS, SHOWN_CHARACTERS = 10, 40
COMPARED = ("agent", "base", "difference")


class Evaluations:
    """The evaluations of a run: ``evaluations.csv``, and the best agent.

    They have an environment and seeds of their own and draw no random numbers, so training does not
    notice them. All are on the same seeds, and a reward that remembers what it has scored scores
    them with an empty memory, so that they can be compared.

    Args:
        out: The run folder.
        config: Its configuration.
    """

    COLUMNS = (
        "timesteps",
        "episodes",
        *(f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")),
    )

    def __init__(self, out: Path, config: Config) -> None:
        self.out = out
        self.budget = config.settings.kl_budget
        self.metrics = Metrics(out / EVALUATIONS, self.COLUMNS, self.COLUMNS)
        self._seeds = selection_seeds(config.settings.evaluation_episodes)
        self._env = evaluation_env(config, min(len(self._seeds), BATCH))

    def evaluate(self, model: BaseAlgorithm, env: SB3VecEnv, progress: SomeOptions) -> Row:
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
            values = mean_and_interval(getattr(episodes, attribute))
            row |= {
                name: values["mean"],
                f"{name}_low": values["low"],
                f"{name}_high": values["high"],
            }
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
    """Whether the mean control cost in a row of metrics or evaluations passes the budget, if there
    is one.
    """
    cost = None if row is None else row["control_cost"]
    return budget is not None and cost is not None and cost > budget


@plain_defaults()
def evaluate(
    run_or_policy: Any,
    episodes: int = 256,
    seed: int = 0,
    *,
    which: str = "best",
    vector_env: AnyVectorEnv | None = None,
) -> Options:
    """Compare an agent, acting deterministically, with the base model on the same held-out seeds.

    Args:
        run_or_policy: A run folder, what ``train`` returned, or anything with stable-baselines3's
            ``predict``.
        episodes: Number of episodes of each, at least 2.
        seed: Episode ``i`` starts from seed ``2**30 + seed + i``, which no training run uses.
        which: ``"best"`` or ``"newest"`` agent of a run folder; see ``load_agent``.
        vector_env: Where to play; needed for a policy that comes without a run folder. Its
            autoreset mode must be ``"Disabled"``, which is ``AutoresetMode.DISABLED``. If its
            reward remembers what it has scored, a copy is played in, whose reward learns nothing
            more: agent and base model are scored by one measure.

    Returns:
        For ``agent``, ``base`` and their paired ``difference`` the ``mean``, ``low``, ``high`` and
        ``std`` of ``terminal_reward``, ``control_cost`` and ``return``; with several prompts, the
        same for the episodes of each under ``prompts``; for a run folder, which ``checkpoint`` the
        agent is. Also written to the run folder's ``evaluation.json``, if no other ``vector_env``
        is given.

    Raises:
        OptionError: If a number is out of range, there is nothing to evaluate, or prompts or
            weights that the run's settings name are no longer those that it was trained on.
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
        vector_env = (
            evaluation_env(config, min(episodes, BATCH), checkpoint)
            if vector_env is None
            else vector_env
        )
    if not hasattr(agent, "predict"):
        raise OptionError(
            f"run_or_policy is a {type(agent).__name__}, expected a run folder or a policy with "
            "predict"
        )
    if vector_env is None:
        raise OptionError(
            "a policy without a run folder needs vector_env, the environment to evaluate it in"
        )
    if vector_env.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise OptionError(
            "vector_env resets by itself; make it with "
            'gymnasium.make_vec(..., autoreset_mode="Disabled")'
        )

    vector_env = with_frozen_reward(vector_env)
    seeds = held_out_seeds(episodes, seed)
    played = play(vector_env, seeds, predict=deterministic(agent))
    base = play(vector_env, seeds)
    report: Options = {
        "episodes": episodes,
        "seed": seed,
        "seeds": [seeds[0], seeds[-1]],
        "timesteps": getattr(agent, "num_timesteps", None),
        "checkpoint": checkpoint and ("best" if checkpoint.parent.name == BEST else "newest"),
        "confidence": CONFIDENCE,
        "interval": FORMULA,
        "agent": {name: mean_and_interval(getattr(played, a)) for name, a in QUANTITIES.items()},
        "base": {name: mean_and_interval(getattr(base, a)) for name, a in QUANTITIES.items()},
        "difference": {
            name: mean_and_interval(getattr(played, a) - getattr(base, a))
            for name, a in QUANTITIES.items()
        },
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


def by_prompt(agent: Episodes, base: Episodes) -> Options:
    """Results of the episodes of each prompt, most frequent first; see :func:`evaluate`."""
    prompts = np.array(base.prompts)
    report = {}
    for prompt, count in Counter(base.prompts).most_common():
        rows = prompts == prompt
        report[prompt] = {
            "episodes": count,
            "agent": {
                name: mean_and_interval(getattr(agent, a)[rows]) for name, a in QUANTITIES.items()
            },
            "base": {
                name: mean_and_interval(getattr(base, a)[rows]) for name, a in QUANTITIES.items()
            },
            "difference": {
                name: mean_and_interval((getattr(agent, a) - getattr(base, a))[rows])
                for name, a in QUANTITIES.items()
            },
        }
    return report


def deterministic(agent: Any) -> Predict:
    """The mean action of a stable-baselines3 agent."""

    def predict(observations: dict[str, np.ndarray]) -> np.ndarray:
        actions: np.ndarray = agent.predict(observations, deterministic=True)[0]
        return actions

    return predict


def evaluation_env(config: Config, num_envs: int, checkpoint: Path | None = None) -> AnyVectorEnv:
    """The environment of a run for whole episodes with given seeds.

    A reward that remembers what it has scored knows what it knew at the checkpoint, and stays at
    that.
    """
    settings = with_devices_for(config.settings, num_envs)
    env = make_vector_env(config.env_id, settings, num_envs, AutoresetMode.DISABLED, "rgb_array")
    freeze_reward(env, checkpoint)
    return env


def table(report: Options) -> str:
    """An evaluation as a small table, means with their intervals."""
    rows = {
        name.replace("_", " "): {who: report[who][name] for who in COMPARED} for name in QUANTITIES
    }
    prompts = report.get("prompts", {})
    shown = [
        (_label(prompt, values["episodes"]), values)
        for prompt, values in list(prompts.items())[:SHOWN_PROMPTS]
    ]
    width = max(len(label) for label in (*rows, *(label for label, _ in shown))) + 2
    lines = [
        " " * width + "".join(f"{title:>24}" for title in ("agent", "base model", "difference"))
    ]
    lines += [_line(label, values, width) for label, values in rows.items()]
    if shown:
        lines.append(f"terminal reward by prompt ({len(prompts)}):")
        lines += [
            _line(label, {who: results[who]["terminal_reward"] for who in COMPARED}, width)
            for label, results in shown
        ]
    if len(prompts) > len(shown):
        lines.append(f"... and {len(prompts) - len(shown)} more prompts in {EVALUATION}")
    if report["checkpoint"] is not None:
        lines.append(
            f"agent: the {report['checkpoint']} of the run, after {report['timesteps']} timesteps"
        )
    lines.append(
        f"means of {report['episodes']} episodes each on the same held-out seeds; 95 % confidence: "
        f"{FORMULA}"
    )
    return "\n".join(lines)


def _label(prompt: str, episodes: int) -> str:
    short = prompt if len(prompt) <= SHOWN_CHARACTERS else prompt[: SHOWN_CHARACTERS - 3] + "..."
    return f"{short} ({episodes})"


def _line(label: str, values: Mapping[str, dict[str, float]], width: int) -> str:
    return f"{label:{width}}" + "".join(f"{_cell(values[who]):>24}" for who in COMPARED)


def _cell(values: dict[str, float]) -> str:
    half = f" +- {values['high'] - values['mean']:.2g}" if "high" in values else ""
    return f"{values['mean']:.4g}{half}"
