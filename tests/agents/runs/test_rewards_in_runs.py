"""What a run keeps of its reward and says of its prompts."""

import json

import gymnasium
import numpy as np
import pytest

from flowgym_gym.agents import evaluate, train
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.episodes import play
from flowgym_gym.agents.runs.evaluation import by_prompt, evaluation_env, table
from flowgym_gym.rewards.compose import Standardize
from tests.agents.conftest import TINY, same_weights, untimed
from tests.conftest import PROMPTS, RED

STANDARDIZED = {
    "env.reward": "images/standardize",
    "env.reward_kwargs": {"reward": "images/red", "buffer_size": 12, "min_count": 2},
    "env.prompts": PROMPTS,
}


def run(out, timesteps, **kwargs):
    overrides = (
        {}
        if kwargs.get("resume")
        else {"overrides": {**TINY["ppo"], **STANDARDIZED}, "num_envs": 2}
    )
    train(
        "flowgym/Denoising-v0",
        "ppo",
        out=out,
        timesteps=timesteps,
        progress=False,
        **overrides,
        **kwargs,
    )


def test_a_resumed_run_goes_on_with_the_statistics_of_its_reward(tmp_path):
    run(tmp_path / "whole", 24)
    run(tmp_path / "parts", 8)
    with np.load(checkpoints(tmp_path / "parts")[0] / "state.npz") as state:
        assert state["reward.counts"].sum() == 4
        assert set(state["reward.prompts"]) <= set(PROMPTS)
    run(tmp_path / "parts", 24, resume=True)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_an_evaluation_measures_agent_and_base_model_by_the_statistics_of_the_run(tmp_path):
    run(tmp_path, 16)
    env = evaluation_env(read_config(tmp_path), 2, checkpoints(tmp_path)[0])
    reward = env.unwrapped.rollout.environment.reward
    before = reward.get_state()
    assert before["counts"].sum() == 8
    raw = gymnasium.make_vec(
        RED, 2, autoreset_mode="Disabled", discretization_steps=2, prompts=PROMPTS
    )
    seeds = [5, 6, 7, 8]
    scores, reds = play(env, seeds), play(raw, seeds)
    expected = [
        (red - mean) / std
        for red, (mean, std) in zip(
            reds.terminal_rewards, map(reward.statistics, reds.prompts), strict=True
        )
    ]
    np.testing.assert_allclose(scores.terminal_rewards, expected, rtol=1e-3)
    assert isinstance(reward, Standardize)
    for name, values in reward.get_state().items():
        np.testing.assert_array_equal(values, before[name])
    report = evaluate(tmp_path, episodes=4)
    assert (
        json.loads((tmp_path / "evaluation.json").read_text())["prompts"].keys()
        == report["prompts"].keys()
    )


class Constant:
    def predict(self, observations, deterministic=False):
        return np.full_like(observations["latent"], 0.5), None


def test_results_of_each_prompt_are_those_of_its_episodes():
    envs = gymnasium.make_vec(
        RED, 4, autoreset_mode="Disabled", discretization_steps=2, prompts=PROMPTS
    )
    report = evaluate(Constant(), episodes=9, vector_env=envs)
    single = gymnasium.make(RED, discretization_steps=2, prompts=PROMPTS)
    rewards = {prompt: [] for prompt in PROMPTS}
    for i in range(9):
        _, info = single.reset(seed=2**30 + i)
        for _ in range(2):
            *_, end = single.step(np.zeros(single.action_space.shape, np.float32))
        rewards[info["prompt"]].append(end["terminal_reward"])
    for prompt, values in rewards.items():
        result = report["prompts"][prompt]
        assert result["episodes"] == len(values)
        assert result["base"]["terminal_reward"]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert result["base"]["terminal_reward"]["std"] == pytest.approx(
            np.std(values, ddof=1), abs=1e-5
        )
    for who in ("agent", "base", "difference"):
        parts = [(r["episodes"], r[who]["return"]["mean"]) for r in report["prompts"].values()]
        assert sum(n * mean for n, mean in parts) / 9 == pytest.approx(
            report[who]["return"]["mean"]
        )
    lines = table(report).splitlines()
    assert "terminal reward by prompt (2):" in lines
    assert any(line.startswith(f"{PROMPTS[0]} (") for line in lines)


def test_a_prompt_with_one_episode_has_a_mean_and_no_interval():
    envs = gymnasium.make_vec(
        RED, 2, autoreset_mode="Disabled", discretization_steps=1, prompts=PROMPTS
    )
    episodes = play(envs, [0, 1])
    episodes.prompts[:] = PROMPTS
    report = by_prompt(episodes, episodes)
    assert set(report[PROMPTS[0]]["agent"]["return"]) == {"mean"}
    json.dumps(report, allow_nan=False)


def test_one_prompt_is_not_reported_by_itself():
    envs = gymnasium.make_vec(RED, 2, autoreset_mode="Disabled", discretization_steps=1)
    assert "prompts" not in evaluate(Constant(), episodes=2, vector_env=envs)
