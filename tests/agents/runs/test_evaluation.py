import json
import math

import gymnasium
import numpy as np
import pytest

from flowgym_gym.agents import evaluate
from flowgym_gym.agents.runs.episodes import held_out_seeds, play
from flowgym_gym.agents.runs.evaluation import table
from flowgym_gym.errors import OptionError
from flowgym_gym.statistics import mean_and_interval
from flowgym_gym.wrappers.vector import CoarseAction
from tests.agents.conftest import finished
from tests.conftest import RED


def make(num_envs=3, mode="Disabled", **kwargs):
    return gymnasium.make_vec(
        RED, num_envs=num_envs, autoreset_mode=mode, discretization_steps=2, **kwargs
    )


class Constant:
    """An agent that always does the same."""

    def __init__(self, action):
        self.action = action

    def predict(self, observations, deterministic=False):
        assert deterministic
        return np.full_like(observations["latent"], self.action), None


def test_interval_is_the_closed_form_for_coin_flips():
    heads, n = 40, 100
    values = np.array([1.0] * heads + [0.0] * (n - heads))
    p = heads / n
    # The 0.975 quantile of Student's distribution with 99 degrees of freedom, from a printed table.
    half = 1.984217 * math.sqrt(p * (1 - p) / (n - 1))
    assert mean_and_interval(values) == pytest.approx(
        {"mean": p, "low": p - half, "high": p + half, "std": math.sqrt(p * (1 - p) * n / (n - 1))}
    )


def test_a_reward_that_remembers_scores_agent_and_base_model_by_one_measure():
    options = {
        "reward": "images/standardize",
        "reward_kwargs": {"reward": "images/red", "min_count": 2},
    }
    env = gymnasium.make_vec(
        "flowgym/Denoising-v0",
        num_envs=3,
        autoreset_mode="Disabled",
        discretization_steps=2,
        **options,
    )
    play(env, [1, 2, 3])
    reward = env.unwrapped.rollout.environment.reward
    known = reward.statistics("a photo of a cat")
    report = evaluate(Constant(0.0), episodes=6, vector_env=env)
    assert report["difference"]["return"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "std": 0.0}
    assert report["base"]["terminal_reward"]["std"] > 0
    # The caller's own goes on as it was.
    assert reward.statistics("a photo of a cat") == known
    play(env, [4, 5, 6])
    assert reward.statistics("a photo of a cat") != known


@pytest.mark.parametrize("n", [2, 5, 200])
def test_interval_holds_the_true_mean_in_95_of_100_cases(n):
    rng = np.random.default_rng(0)
    intervals = [mean_and_interval(rng.normal(3.0, 2.0, n)) for _ in range(2000)]
    covered = np.mean([i["low"] <= 3.0 <= i["high"] for i in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_episodes_are_those_of_the_single_environment_with_the_same_seeds():
    episodes = play(
        make(render_mode="rgb_array"),
        [11, 12, 13, 14, 15],
        predict=lambda o: np.full_like(o["latent"], 0.5),
        pictures=4,
    )
    single = gymnasium.make(RED, discretization_steps=2, render_mode="rgb_array")
    assert len(episodes.returns) == 5
    for i in range(5):
        single.reset(seed=11 + i)
        action, costs, total = np.full((4, 8, 8), 0.5, dtype=np.float32), 0.0, 0.0
        for _ in range(2):
            _, reward, _, _, info = single.step(action)
            costs, total = costs + info["control_cost"], total + reward
        assert episodes.terminal_rewards[i] == pytest.approx(info["terminal_reward"], abs=1e-4)
        assert episodes.control_costs[i] == pytest.approx(costs, rel=1e-4)
        assert episodes.returns[i] == pytest.approx(total, abs=1e-2)


def test_pictures_are_the_finished_samples_in_order():
    env = make(num_envs=2, render_mode="rgb_array")
    pictures = play(env, [1, 2, 3], pictures=3).pictures
    assert len(pictures) == 3
    alone = play(make(num_envs=1, render_mode="rgb_array"), [3], pictures=1)
    assert np.abs(pictures[2].astype(int) - alone.pictures[0]).max() <= 1
    assert pictures[2][..., 0].mean() / 255 == pytest.approx(alone.terminal_rewards[0], abs=0.01)


def test_an_agent_that_does_nothing_is_the_base_model():
    report = evaluate(Constant(0.0), episodes=5, vector_env=make())
    assert report["agent"] == report["base"]
    assert report["difference"]["return"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "std": 0.0}
    assert report["agent"]["control_cost"]["mean"] == 0


def test_the_report_is_about_the_agent_and_the_base_model_on_the_same_seeds():
    agent, env = Constant(1.0), make()
    report = evaluate(agent, episodes=4, seed=3, vector_env=env)
    assert report["seeds"] == [2**30 + 3, 2**30 + 6]
    played = play(make(), held_out_seeds(4, 3), lambda o: agent.predict(o, deterministic=True)[0])
    base = play(make(), held_out_seeds(4, 3))
    assert report["agent"]["return"] == pytest.approx(mean_and_interval(played.returns))
    assert report["base"]["terminal_reward"] == pytest.approx(
        mean_and_interval(base.terminal_rewards)
    )
    paired = mean_and_interval(played.returns - base.returns)
    assert report["difference"]["return"] == pytest.approx(paired)
    assert report["agent"]["control_cost"]["mean"] > 0
    json.dumps(report)
    assert f"{report['agent']['return']['mean']:.4g}" in table(report)


def test_columns_of_the_table_stand_below_their_titles_whatever_the_prompts():
    prompts = ["a red heart", "a photo of a cat and a photo of a dog and a cat", "a dog"]
    report = evaluate(Constant(1.0), episodes=9, vector_env=make(prompts=prompts))
    lines = table(report).splitlines()
    end = lines[0].index("difference") + len("difference")
    rows = [line for line in lines[1:] if "+-" in line and "confidence" not in line]
    assert len(rows) == 3 + len(prompts)
    assert {len(row) for row in rows} == {end}
    assert any(row.startswith("a photo of a cat and a photo of a dog... (") for row in rows)


@pytest.mark.parametrize("episodes", [0, 1, 2.5, True])
def test_too_few_episodes_are_refused(episodes):
    with pytest.raises(OptionError, match="episodes is"):
        evaluate(Constant(0.0), episodes=episodes, vector_env=make())


def test_a_run_keeps_the_evaluation_in_its_own_environment(tmp_path):
    finished(tmp_path, timesteps=8)
    own = evaluate(tmp_path, episodes=2)
    other = gymnasium.make_vec(
        RED, num_envs=2, autoreset_mode="Disabled", discretization_steps=2, reward_scale=1.0
    )
    elsewhere = evaluate(tmp_path, episodes=2, vector_env=CoarseAction(other, 1))
    assert elsewhere["base"]["return"] != own["base"]["return"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == own


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    with pytest.raises(OptionError, match="holds no run"):
        evaluate(tmp_path)
    with pytest.raises(OptionError, match="vector_env"):
        evaluate(Constant(0.0))
    with pytest.raises(OptionError, match="Disabled"):
        evaluate(Constant(0.0), vector_env=make(mode="SameStep"))
    with pytest.raises(OptionError, match="with predict"):
        evaluate(3, vector_env=make())
    with pytest.raises(OptionError, match="seed is -1"):
        evaluate(Constant(0.0), seed=-1, vector_env=make())
