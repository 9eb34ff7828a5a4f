"""What a run has come to: its learning curve, its pictures and its film."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.runs.checkpoints import best_checkpoint
from flowgym_gym.agents.runs.config import Config, read_config
from flowgym_gym.agents.runs.episodes import QUANTITIES, Episodes, held_out_seeds, play, watch
from flowgym_gym.agents.runs.evaluation import (
    EVALUATIONS,
    Evaluations,
    deterministic,
    evaluation_env,
)
from flowgym_gym.agents.runs.files import CONFIG, UNREADABLE
from flowgym_gym.agents.runs.metrics import METRICS, Row, read_metrics
from flowgym_gym.agents.runs.opening import load_agent
from flowgym_gym.agents.runs.pictures import film, learning_curve, picture_grid
from flowgym_gym.agents.runs.preparation import RunResult
from flowgym_gym.console import say
from flowgym_gym.errors import CheckpointError, reason, shown

PICTURES = 16


def show(result: RunResult, config: Config) -> None:
    """Draw what a run has come to."""
    out = result.out
    save_curve(out)
    if result.signal is not None:
        return
    agent = load_agent(out)
    before, after = play_pictures(config), play_pictures(config, agent)
    save_pictures(out / "after.png", [("after: trained agent", after)])
    save_pictures(
        out / "comparison.png",
        [("base model", before), (f"agent after {agent.num_timesteps:,} steps, same seeds", after)],
    )
    _save_film(out / "episode.gif", config, agent)


def save_curve(out: Path) -> None:
    """Draw ``learning_curve.png`` of a run from its metrics, and its evaluations if there are any.

    Raises:
        CheckpointError: If one of its files is damaged, or the picture cannot be written.
    """
    config, evaluations = read_config(out), read_metrics(out / EVALUATIONS, Evaluations.COLUMNS)
    # The untrained agent, on the seeds of the curve's other points, is the base model.
    base = next((row for row in evaluations if row["timesteps"] == 0), None)
    if base is None and config.base_model is not None:
        base = _means(config.base_model)
        if base is None:
            say(
                f"the base model's means in {out / CONFIG} are damaged; the curve does without them"
            )
    evaluation = out / "evaluation.json"
    if evaluation.is_file():
        try:
            report = json.loads(evaluation.read_text(encoding="utf-8"))
            means = {name: report["base"][name]["mean"] for name in QUANTITIES}
            base = _means({**means, "episodes": report["episodes"]})
            if base is None:
                raise ValueError(f"base is {shown(report['base'], 60)}, expected numbers")
        except UNREADABLE as error:
            raise CheckpointError(
                f"{evaluation} is damaged: {type(error).__name__}: {reason(error)}; move it away"
            ) from error
    title = f"{config['env_id']}, {config['algo'].upper()}, seed {config['seed']}"
    best, picture = best_checkpoint(out), out / "learning_curve.png"
    try:
        learning_curve(
            picture,
            read_metrics(out / METRICS),
            title,
            base,
            evaluations,
            None if best is None else int(best.name),
        )
    except OSError as error:
        raise CheckpointError(f"{picture} cannot be written: {error.strerror or error}") from error


def _means(means: Any) -> Row | None:
    """Means of the base model; None unless there is a number for each quantity."""
    names = ("episodes", *QUANTITIES)
    known = {name: means.get(name) for name in names} if isinstance(means, dict) else {}
    good = known and all(type(value) in (int, float) for value in known.values())
    return known if good else None


def play_pictures(config: Config, model: BaseAlgorithm | None = None) -> Episodes:
    """Held-out episodes of an agent, or of the base model, with their pictures."""
    env = evaluation_env(config, PICTURES)
    predict = None if model is None else deterministic(model)
    episodes = play(env, held_out_seeds(PICTURES), predict, pictures=PICTURES)
    env.close()
    return episodes


def save_pictures(path: Path, parts: list[tuple[str, Episodes]]) -> None:
    """Save rows of pictures, unless samples are no pictures."""
    if all(episodes.pictures for _, episodes in parts):
        picture_grid(path, parts)


def _save_film(path: Path, config: Config, agent: BaseAlgorithm) -> None:
    env = evaluation_env(config, 2)
    frames = watch(env, held_out_seeds(1)[0], deterministic(agent))
    env.close()
    if frames:
        film(path, frames, ("base model", "agent"))
