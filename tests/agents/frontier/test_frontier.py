import itertools
import json
import math
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

import flowgym_gym
from flowgym_gym import FlowTensor, Reward, reward_registry
from flowgym_gym.agents.frontier import measure, spec, trainings
from flowgym_gym.agents.frontier.measure import frontier
from flowgym_gym.agents.frontier.report import against_best_of_n, draw, table
from flowgym_gym.agents.runs import preparation
from flowgym_gym.agents.runs.metrics import Metrics, read_metrics
from flowgym_gym.agents.runs.presets import complete
from flowgym_gym.cli import main
from flowgym_gym.envs.environment import seeded
from flowgym_gym.errors import (
    CheckpointError,
    FlowGymError,
    OptionError,
    RewardError,
    UnknownOptionError,
)
from flowgym_gym.models.loading import clear_model_cache
from flowgym_gym.optimal_control.best_of_n import (
    SAMPLES_OF_POOL,
    best_of_n,
    best_of_n_curve,
    kl_best_of_n,
    maximum_weights,
    needed_pool,
    pool_notes,
)
from flowgym_gym.optimal_control.guidance import RewardGuidance
from tests.conftest import PROMPTS, RED, further

GAUSSIAN = "flowgym/GaussianMixture-Gaussian-v0"
SMALL = {
    "num_envs": 2,
    "policy.width": 8,
    "algo.batch_size": 8,
    "checkpoint_every": 40,
    "discretization_steps": 2,
}


@reward_registry.register("1d/linear_for_frontier")
class Linear(Reward[FlowTensor]):
    differentiable = True

    def forward(self, x, **kwargs):
        return 1.5 * x.data[:, 0], torch.ones(len(x), dtype=torch.bool)


@reward_registry.register("1d/cut_for_frontier")
class Cut(Linear):
    def forward(self, x, **kwargs):
        rewards, valids = super().forward(x)
        return rewards.detach(), valids


def gaussian(
    steps, std=0.5, reward="1d/linear_for_frontier", schedule="optimal_transport", **options
):
    model = {"means": [[1.0]], "stds": [std], "weights": [1.0], "schedule": schedule}
    return flowgym_gym.make(
        "1d/gaussian_mixture", reward, steps, base_model_kwargs=model, **options
    )


def sample(env, n, policy=None, seed=0):
    with seeded(seed):
        return env.sample(n, policy)


# Best of n


def test_the_divergence_of_best_of_n_is_that_of_the_law_of_the_maximum():
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 3, 10, 64):
        density = n * u ** (n - 1)
        assert kl_best_of_n(n) == pytest.approx(
            float(torch.xlogy(density, density).mean()), abs=1e-4
        )
        for coin in (0.0, 0.1, 0.7, 1.0):
            mixed = (1 - coin) * density + coin * (n + 1) * u**n
            assert kl_best_of_n(n, coin) == pytest.approx(
                float(torch.xlogy(mixed, mixed).mean()), abs=1e-4
            )
        assert kl_best_of_n(n, 1.0) == pytest.approx(kl_best_of_n(n + 1), abs=1e-6)


def test_between_two_n_the_curve_is_that_of_a_coin():
    # Uniform rewards: best of n has mean n / (n + 1).
    mean = np.arange(1, 9) / np.arange(2, 10)
    curve = best_of_n_curve({"mean": mean, "low": mean - 0.1, "high": mean + 0.2})
    assert (np.diff(curve["kl"]) > 0).all()
    assert (np.diff(curve["mean"]) > 0).all()
    assert np.interp(kl_best_of_n(3), curve["kl"], curve["mean"]) == pytest.approx(3 / 4)
    at = kl_best_of_n(1, 0.25)
    assert np.interp(at, curve["kl"], curve["mean"]) == pytest.approx(
        1 / 2 + 0.25 * (2 / 3 - 1 / 2)
    )
    # A small divergence buys more than in proportion.
    assert np.interp(0.01, curve["kl"], curve["mean"]) > 0.5 + 3 * (0.01 / kl_best_of_n(2)) * (
        2 / 3 - 1 / 2
    )
    np.testing.assert_allclose(curve["high"] - curve["low"], 0.3)


def test_the_estimate_is_the_mean_over_all_subsets_of_the_pool():
    rewards = np.array([0.3, -1.0, 2.0, 0.3, 0.9, -0.2, 5.0])
    best = best_of_n(rewards, 7)
    for n in range(1, 8):
        subsets = [max(subset) for subset in itertools.combinations(rewards, n)]
        assert best["mean"][n - 1] == pytest.approx(np.mean(subsets), abs=1e-12)
        assert maximum_weights(7, n).sum() == pytest.approx(1)


def test_with_several_prompts_the_best_is_one_of_the_same_prompt():
    rewards = np.array([0.0, 10.0, 1.0, 12.0, 4.0, 2.0, 11.0])
    prompts = ["low", "high", "low", "high", "low", "low", "high"]
    best = best_of_n(rewards, 3, prompts)
    for n in (1, 2, 3):
        low = np.mean([max(s) for s in itertools.combinations([0.0, 1.0, 4.0, 2.0], n)])
        high = np.mean([max(s) for s in itertools.combinations([10.0, 12.0, 11.0], n)])
        assert best["mean"][n - 1] == pytest.approx((4 * low + 3 * high) / 7)


def test_the_estimate_is_unbiased_and_its_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    small = np.array(
        [maximum_weights(10, 6) @ np.sort(pool) for pool in rng.uniform(size=(40_000, 10))]
    )
    # The maximum of n uniform numbers has mean n / (n + 1).
    assert small.mean() == pytest.approx(6 / 7, abs=4 * small.std() / 200)
    covered = np.zeros(16)
    for pool in rng.uniform(size=(60, 128)):
        best, truth = best_of_n(pool, 16), np.arange(1, 17) / np.arange(2, 18)
        covered += (best["low"] <= truth) & (truth <= best["high"])
    assert (covered / 60 > 0.85).all()
    assert (covered / 60).mean() < 0.99


@pytest.mark.second
def test_with_several_prompts_the_interval_counts_that_prompts_are_drawn_too():
    rng = np.random.default_rng(1)
    covered = np.zeros(4)
    # Rewards uniform on (0, 1) and on (3, 4), so that most of the variance is that of the prompts'
    # shares.
    truth = np.arange(1, 5) / np.arange(2, 6) + 3 * 0.5
    for _ in range(100):
        prompts = rng.integers(2, size=128)
        best = best_of_n(rng.uniform(size=128) + 3 * prompts, 4, [str(p) for p in prompts])
        covered += (best["low"] <= truth) & (truth <= best["high"])
    assert (covered > 88).all()


# Guidance


@pytest.mark.parametrize("strength", [0.4, 2.0])
def test_guidance_of_a_linear_reward_and_gaussian_samples_is_the_optimal_tilt(strength):
    # N(m, v) tilted by exp(lambda a x) is N(m + lambda a v, v), at a divergence of (lambda a)^2 v /
    # 2.
    few, many = gaussian(20), gaussian(400)
    # With few steps the free process falls short of the model's variance, 0.25; its own is what
    # counts.
    own = sample(few, 40_000).sample.data.var().item()
    for env, variance, tolerance in ((few, own, 4 * (2 / 40_000) ** 0.5), (many, 0.25, 0.02)):
        free, steered = (
            sample(env, 8, policy) for policy in (None, RewardGuidance(env, strength, "network"))
        )
        moved = steered.sample.data - free.sample.data
        np.testing.assert_allclose(moved, strength * 1.5 * variance, rtol=tolerance)
        cost = (strength * 1.5) ** 2 * variance / 2
        np.testing.assert_allclose(steered.control_costs.sum(dim=0), cost, rtol=tolerance)


@pytest.mark.parametrize("action", [("velocity", 1.0), ("noise", 0.3), ("control", 2.5)])
@pytest.mark.parametrize("noise_level", [0.5, 1.0])
def test_every_shift_is_strength_times_variance_times_gradient_whatever_an_action_is(
    action, noise_level
):
    kind, scale = action
    env = gaussian(
        5, schedule="diffusion", action_type=kind, action_scale=scale, noise_level=noise_level
    )
    free = sample(env, 16)
    policy = RewardGuidance(env, 0.7, "network")
    steered = sample(env, 16, policy)
    alpha, beta, alpha_s, beta_s = (
        env.grid.alpha[:-1],
        env.grid.beta[:-1],
        env.grid.alpha[1:],
        env.grid.beta[1:],
    )
    variance = noise_level**2 * (beta_s / beta) ** 2 * (beta**2 - (alpha / alpha_s * beta_s) ** 2)
    # E[x_1 | x_s] of N(1, 0.25) has this slope; the last state is the sample itself.
    slope = alpha_s * 0.25 / (alpha_s**2 * 0.25 + beta_s**2)
    slope[-1] = 1.0
    shift = 0.7 * variance * 1.5 * slope
    costs = torch.where(variance > 0, shift**2 / (2 * variance), 0.0)
    np.testing.assert_allclose(
        steered.control_costs.double().T, costs.expand(16, 5), rtol=1e-4, atol=1e-9
    )
    # What a shift moves the next state by, as the free process goes on from there.
    index = torch.zeros(16, dtype=torch.int64)
    action = policy(steered.trajectory[0], env.times[index])
    output = env.predict(steered.trajectory[0], index)
    noise = torch.zeros(16, 1)
    moved, _ = env.advance(free.trajectory[0].data, output, action, noise, index)
    still, _ = env.advance(free.trajectory[0].data, output, noise, noise, index)
    np.testing.assert_allclose(moved - still, float(shift[0]), rtol=1e-3)


def test_the_gradient_that_stops_at_the_expected_sample_is_right_for_samples_of_unit_variance():
    env = gaussian(8, std=1.0)
    through, stopped = (
        sample(env, 8, RewardGuidance(env, 1.3, how)) for how in ("network", "endpoint")
    )
    np.testing.assert_allclose(through.latents.data, stopped.latents.data, rtol=1e-5, atol=1e-6)
    other = gaussian(8, std=0.5)
    through, stopped = (
        sample(other, 8, RewardGuidance(other, 1.3, how)) for how in ("network", "endpoint")
    )
    assert (through.latents.data - stopped.latents.data).abs().min() > 0.1


def test_the_gradient_through_the_network_agrees_with_finite_differences():
    env = flowgym_gym.make("2d/gaussian_mixture", "2d/gaussian", 6)
    torch.manual_seed(3)
    x, index = FlowTensor(torch.randn(12, 2)), torch.full((12,), 3)
    gradient = RewardGuidance(env, 1.0, "network").gradient(x, index)
    model = env.base_model
    t, s = float(env.grid.times[3]), float(env.grid.times[4])
    data, noise = model.conditional_means(x.data, torch.full((12,), t))
    # At noise level 1 the free mean is that of x_s given x_t and the expected x_1.
    spread = (1 - t) ** 2 - (t / s * (1 - s)) ** 2
    kept = math.sqrt((1 - s) ** 2 - ((1 - s) / (1 - t)) ** 2 * spread)
    mean = s * data + kept * noise

    def value(at):
        return env.reward(FlowTensor(model.conditional_means(at, torch.full((12,), s))[0]))[0]

    h = 1e-5
    for axis in (0, 1):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = h
        expected = (value(mean + step) - value(mean - step)) / (2 * h)
        np.testing.assert_allclose(gradient[:, axis], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gradient", ["endpoint", "network"])
def test_guidance_of_strength_zero_is_the_base_model_and_more_of_it_earns_and_costs_more(gradient):
    env = flowgym_gym.make("images/stable_diffusion", "images/redness", 3)
    free = sample(env, 4)
    zero, weak, strong = (
        sample(env, 4, RewardGuidance(env, s, gradient)) for s in (0.0, 20.0, 200.0)
    )
    assert torch.equal(zero.latents.data, free.latents.data)
    assert torch.equal(zero.rewards, free.rewards)
    assert not zero.control_costs.any()
    assert free.rewards.mean() < weak.rewards.mean() < strong.rewards.mean()
    assert 0 < weak.control_costs.sum() < strong.control_costs.sum()


def test_guidance_needs_a_gradient():
    with pytest.raises(OptionError, match="BinaryReward is not differentiable"):
        RewardGuidance(flowgym_gym.make("1d/gaussian_mixture", "1d/binary", 4), 1.0)
    own = type("Own", (Linear,), {"differentiable": False})()
    environment = gaussian(4)
    environment.reward = own
    with pytest.raises(
        OptionError, match=r"Own is not differentiable; .*set differentiable = True in the class"
    ):
        RewardGuidance(environment, 1.0)
    own.differentiable = True
    assert bool(
        (environment.sample(2, RewardGuidance(environment, 1.0)).control_costs.sum(dim=0) > 0).all()
    )
    env = gaussian(4, reward="1d/cut_for_frontier")
    with pytest.raises(RewardError, match="carries no gradient"):
        env.sample(2, RewardGuidance(env, 1.0))


# The report


def point(method, setting, kl, reward, half=0.01):
    reward = {"mean": reward, "low": reward - half, "high": reward + half}
    return {
        "method": method,
        "setting": setting,
        "kl": {"mean": kl, "low": kl, "high": kl},
        "reward": reward,
    }


@pytest.fixture
def report():
    """Best of 1 to 8 of uniform rewards, known to 0.005."""
    mean = np.arange(1, 9) / np.arange(2, 10)
    best = {"mean": mean.tolist(), "low": (mean - 0.005).tolist(), "high": (mean + 0.005).tolist()}
    points = {
        "base": point("base", 0, 0.0, 0.5),
        "best-of-8": point("best_of_n", 8, kl_best_of_n(8), 8 / 9),
        "ppo-1": point("ppo", 1.0, kl_best_of_n(4), 0.7),
        "ppo-3": point("ppo", 3.0, kl_best_of_n(4), 0.79),
        "ppo-10": point("ppo", 10.0, kl_best_of_n(4), 0.8),
        "ppo-100": point("ppo", 100.0, 50.0, 0.95),
        "sac-1": point("sac", 1.0, kl_best_of_n(4), 0.9),
        "sac-10": point("sac", 10.0, 50.0, 0.8),
    }
    for name, p in points.items():
        if "-of-" not in name and name != "base":
            p["against_best_of_n"] = against_best_of_n(p, best)
    return {
        "env_id": RED,
        "settings": {"env": {}},
        "best_of_n": best,
        "points": points,
        "notes": ["a note"],
    }


def test_a_point_is_compared_with_best_of_n_at_its_own_divergence(report):
    verdicts = {name: p.get("against_best_of_n") for name, p in report["points"].items()}
    assert verdicts == {
        "base": None,
        "best-of-8": None,
        "ppo-1": "below",  # best of 4 earns 0.8
        "ppo-3": "level",  # the intervals overlap
        "ppo-10": "level",
        "ppo-100": "beyond n = 8",
        "sac-1": "above",
        "sac-10": "below",  # best of 8 earns 0.89 for less
    }


def test_the_interval_of_the_divergence_counts(report):
    best = report["best_of_n"]
    interval = {"mean": kl_best_of_n(4), "low": kl_best_of_n(2), "high": kl_best_of_n(8)}

    def verdict(reward, kl):
        return against_best_of_n(
            {"reward": dict.fromkeys(("mean", "low", "high"), reward), "kl": kl}, best
        )

    exact = {"mean": kl_best_of_n(4)}
    at_4, at_2, at_8 = ({end: best[end][n - 1] for end in ("low", "high")} for n in (4, 2, 8))
    below, above = at_4["low"] - 1e-6, at_4["high"] + 1e-6
    assert [verdict(r, exact) for r in (below, above)] == ["below", "above"]
    assert [verdict(r, interval) for r in (below, above)] == ["level", "level"]
    assert [verdict(r, interval) for r in (at_2["low"] - 1e-6, at_8["high"] + 1e-6)] == [
        "below",
        "above",
    ]
    # What best of n earns at the interval's upper end is not known.
    beyond = {**interval, "high": kl_best_of_n(8) + 1e-6}
    assert [verdict(r, beyond) for r in (at_2["low"] - 1e-6, at_8["high"] + 1e-6)] == [
        "below",
        "beyond n = 8",
    ]


def test_the_table_has_a_row_for_every_point_and_the_notes(report):
    lines = table(report).splitlines()
    assert len(lines) == 2 + 8 + 2
    assert lines[4] == "| PPO | scale = 1 | 0.6363 | 0.7 ± 0.01 | below |"
    assert lines[-1] == "a note"
    report["points"]["ppo-1"]["timesteps"] = 11520
    assert (
        table(report).splitlines()[4]
        == "| PPO | scale = 1, 11,520 steps | 0.6363 | 0.7 ± 0.01 | below |"
    )


def test_what_lies_below_best_of_n_is_drawn_hollow(report):
    axis = draw(report).axes[0]
    hollow = {}
    for container in axis.containers:
        line = container[0]
        at = tuple(float(values[0]) for values in line.get_data())
        hollow[at] = line.get_markerfacecolor() == "white"
    below = {
        p["reward"]["mean"]
        for p in report["points"].values()
        if p.get("against_best_of_n") == "below"
    }
    assert len(hollow) == 8
    assert (
        sorted(at[1] for at, is_hollow in hollow.items() if is_hollow)
        == sorted(below)
        == [0.7, 0.8]
    )
    assert {text.get_text() for text in axis.texts} == {"", "1", "3", "8", "10", "100"}


# The command


def command(out):
    changes = [f"--set={key}={value}" for key, value in SMALL.items()]
    return [
        "frontier", "GaussianMixture-Gaussian-v0", "--out", str(out), "--algos", "ppo", "--timesteps", "80",
        "--reward-scales", "3", "60", "--strengths", "0", "20", "--best-of", "2", "4", "--pool", "32",
        "--episodes", "8", *changes,
    ]  # fmt: skip


@pytest.fixture
def terminate_at(monkeypatch):
    """Send the process SIGTERM when a run has done this many timesteps."""

    def install(timesteps, append=Metrics.append):
        def watch(self, row):
            append(self, row)
            if row["timesteps"] == timesteps:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Metrics, "append", watch)

    return install


@pytest.mark.second
def test_an_interrupted_command_goes_on_without_repeating_and_ends_as_an_uninterrupted_one(
    tmp_path, terminate_at, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole)) == 0
    printed = capsys.readouterr().out
    assert "| PPO | scale = 60, 80 steps |" in printed
    assert str(whole / "frontier.png") in printed
    with Image.open(whole / "frontier.png") as picture:
        assert picture.width > 500

    terminate_at(40)
    assert main(command(parts)) == 128 + signal.SIGTERM
    assert "same command again" in capsys.readouterr().out
    saved = json.loads((parts / "frontier.json").read_text())
    assert sorted(saved["points"]) == [
        "base",
        "best-of-2",
        "best-of-4",
        "endpoint-0",
        "endpoint-20",
    ]
    assert not (parts / "runs" / "ppo-60").exists()

    terminate_at(None)
    with monkeypatch.context() as patched:
        for done in ("play", "RewardGuidance"):
            patched.setattr(measure, done, lambda *a: pytest.fail("done before"))
        assert main(command(parts)) == 0
        assert "resuming at 40 timesteps" in capsys.readouterr().err
    finished, expected = (json.loads((out / "frontier.json").read_text()) for out in (parts, whole))
    assert finished == expected
    assert [row["timesteps"] for row in read_metrics(parts / "runs" / "ppo-3" / "metrics.csv")] == [
        40,
        80,
    ]

    monkeypatch.setattr(trainings, "carry_out", lambda *a: pytest.fail("done before"))
    assert main(command(parts)) == 0
    assert json.loads((parts / "frontier.json").read_text()) == expected


def test_the_numbers_are_those_of_the_runs_of_the_torch_environment_and_of_the_pool(tmp_path):
    options = {
        "episodes": 16,
        "pool": 16,
        "best_of": [2],
        "reward_scales": [60],
        "strengths": [0, 20],
        "timesteps": 40,
    }
    report = frontier(GAUSSIAN, out=tmp_path, overrides=SMALL, batch_size=4, **options).report
    points = report["points"]
    for algo in ("ppo", "sac"):
        folder = tmp_path / "runs" / f"{algo}-60"
        played = json.loads((folder / "evaluation.json").read_text())
        assert points[f"{algo}-60"]["reward"] == played["agent"]["terminal_reward"]
        assert points[f"{algo}-60"]["kl"] == played["agent"]["control_cost"]
        assert points["base"]["reward"] == played["base"]["terminal_reward"]
        settings = json.loads((folder / "config.json").read_text())["settings"]
        # The environment's own reward scale is 30: a reward of 1 is worth 60 nats.
        assert settings["env"]["control_cost_weight"] == 0.5
        assert settings["timesteps"] == 40
    rewards = report["pool"]["rewards"]
    pairs = [max(pair) for pair in itertools.combinations(rewards, 2)]
    assert points["best-of-2"]["reward"]["mean"] == pytest.approx(np.mean(pairs))
    assert points["endpoint-0"]["kl"]["mean"] == 0
    env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", 2, action_type="control")
    # Four batches, each seeded as the first of its episodes.
    guided = [
        sample(env, 4, RewardGuidance(env, 20.0), seed=2**30 + first) for first in range(0, 16, 4)
    ]
    for name, found in (
        ("reward", torch.cat([batch.rewards.double() for batch in guided])),
        ("kl", torch.cat([batch.control_costs.double().sum(dim=0) for batch in guided])),
    ):
        assert points["endpoint-20"][name]["mean"] == pytest.approx(found.mean().item())
        assert points["endpoint-20"][name]["std"] == pytest.approx(found.std().item())
    assert {"torch", "stable_baselines3"} <= set(report["versions"])


def test_prompts_without_enough_samples_and_rewards_without_gradient_leave_out_a_part_with_a_note(
    tmp_path,
):
    changes = {"prompts": PROMPTS, "discretization_steps": 2, "reward": "images/compression"}
    with pytest.raises(UnknownOptionError):
        frontier(RED, out=tmp_path, algos=[], overrides={"promts": PROMPTS})
    result = frontier(RED, out=tmp_path, algos=[], overrides=changes, pool=48, best_of=range(2, 7))
    pool = result.report["pool"]
    fewest = min(pool["prompts"].count(prompt) for prompt in PROMPTS)
    assert set(result.report["points"]) == {
        "base",
        *(f"best-of-{n}" for n in range(2, fewest // 8 + 1)),
    }
    first, second = result.report["notes"]
    assert re.match(
        f"best of .*6 is left out: the pool has {fewest} samples of one of the prompts, .* 8 n",
        first,
    )
    assert second.startswith(
        "no guidance: CompressionReward is not differentiable; where its gradients do reach"
    )
    assert first in table(result.report)
    means = {
        prompt: np.mean([max(p) for p in itertools.combinations(rewards, 2)])
        for prompt in PROMPTS
        for rewards in [
            [r for r, own in zip(pool["rewards"], pool["prompts"], strict=True) if own == prompt]
        ]
    }
    expected = np.mean([means[prompt] for prompt in pool["prompts"]])
    assert result.report["points"]["best-of-2"]["reward"]["mean"] == pytest.approx(expected)


def test_points_of_earlier_calls_stay(tmp_path):
    options = {"out": tmp_path, "algos": [], "pool": 24, "best_of": [2], "episodes": 2}
    frontier(GAUSSIAN, strengths=[1], overrides={"discretization_steps": 2}, **options)
    options |= {"best_of": [3]}
    report = frontier(
        GAUSSIAN, strengths=[5], overrides={"discretization_steps": 2}, **options
    ).report
    assert set(report["points"]) == {"base", "best-of-3", "endpoint-1", "endpoint-5"}
    with pytest.raises(OptionError, match="of another environment or other settings"):
        frontier(GAUSSIAN, strengths=[5], overrides={"discretization_steps": 3}, **options)
    (tmp_path / "frontier.json").write_text('{"env_id": ')
    with pytest.raises(CheckpointError, match="is damaged"):
        frontier(GAUSSIAN, strengths=[5], overrides={"discretization_steps": 2}, **options)


def test_what_another_process_did_before_the_folder_was_taken_stays_and_is_not_done_again(
    tmp_path, monkeypatch
):
    options = {
        "out": tmp_path,
        "algos": ["ppo"],
        "pool": 24,
        "best_of": [2],
        "episodes": 2,
        "reward_scales": [30],
    }
    options |= {"timesteps": 40, "overrides": SMALL}
    make_env, run = measure._make_env, trainings.carry_out
    trained = []

    def late(plan):
        monkeypatch.setattr(measure, "_make_env", make_env)
        frontier(GAUSSIAN, strengths=[1], **options)
        return make_env(plan)

    monkeypatch.setattr(measure, "_make_env", late)
    monkeypatch.setattr(
        trainings, "carry_out", lambda prepared: (trained.append(prepared.out), run(prepared))[1]
    )
    report = frontier(GAUSSIAN, strengths=[5], **options).report
    assert set(report["points"]) == {"base", "best-of-2", "endpoint-1", "endpoint-5", "ppo-30"}
    assert trained == [tmp_path / "runs" / "ppo-30"]


def test_an_agent_with_other_settings_does_not_go_on_in_the_folder_of_the_old_one(tmp_path):
    options = {
        "out": tmp_path,
        "algos": ["ppo"],
        "pool": 2,
        "best_of": [2],
        "episodes": 2,
        "strengths": [],
    }
    options |= {"reward_scales": [30], "timesteps": 40}
    frontier(GAUSSIAN, overrides=SMALL, **options)
    message = (
        r"ppo-30 holds another run, move it away .*algo\.gae_lambda is 0\.5, but the run has 0\.9"
    )
    with pytest.raises(OptionError, match=message):
        frontier(GAUSSIAN, overrides={**SMALL, "gae_lambda": 0.5}, **options)
    (tmp_path / "runs" / "ppo-30").rename(tmp_path / "old")
    report = frontier(GAUSSIAN, overrides={**SMALL, "gae_lambda": 0.5}, **options).report
    assert report["points"]["ppo-30"]["overrides"]["gae_lambda"] == 0.5
    # What a call no longer names differs, too.
    with pytest.raises(OptionError, match=r"algo\.gae_lambda is 0\.9, but the run has 0\.5"):
        frontier(GAUSSIAN, overrides=SMALL, **options)
    for change, message in (
        ({"timesteps": None}, "timesteps is .*, but the run has 40"),
        ({"seed": 1}, "seed is 1"),
    ):
        with pytest.raises(OptionError, match=message):
            frontier(GAUSSIAN, overrides={**SMALL, "gae_lambda": 0.5}, **{**options, **change})


def test_a_setting_that_one_of_the_algorithms_lacks_is_refused_by_its_name(tmp_path):
    with pytest.raises(
        UnknownOptionError,
        match=r"no setting 'gae_lambda'.* for SAC; a change applies to all agents",
    ):
        frontier(
            GAUSSIAN, out=tmp_path / "new", algos=["ppo", "sac"], overrides={"gae_lambda": 0.5}
        )


@pytest.mark.parametrize("pool", [64, *further(128)])
def test_the_interval_of_the_largest_n_that_a_pool_allows_covers_the_truth(pool):
    rng = np.random.default_rng(0)
    n = pool // SAMPLES_OF_POOL
    grid = np.linspace(0, 1, 100_001)[1:-1]
    truth = np.trapezoid(norm.ppf(grid) * n * grid ** (n - 1), grid)
    covered = 0
    for _ in range(200):
        best = best_of_n(rng.normal(size=pool), n)
        covered += best["low"][-1] <= truth <= best["high"][-1]
    # Normal intervals of a maximum are a little too narrow; with n samples they would hold it in 71
    # % of the cases.
    assert covered >= 0.87 * 200


def test_all_agents_steer_the_process_of_the_first_ones_preset(tmp_path, monkeypatch):
    presets = {
        "ppo": {
            "env": {"discretization_steps": 2},
            "wrappers": {"time_grid": 3},
            "policy": {"width": 8},
        },
        "sac": {
            "env": {"discretization_steps": 5, "action_type": "control"},
            "policy": {"width": 8},
        },
    }
    small = {"num_envs": 2, "timesteps": 8, "algo": {"batch_size": 2}}
    monkeypatch.setattr(spec, "load_preset", lambda id, algo: complete({**small, **presets[algo]}))
    monkeypatch.setattr(
        preparation, "load_preset", lambda id, algo: complete({**small, **presets[algo]})
    )
    options = {"pool": 16, "best_of": [2], "episodes": 2, "strengths": [], "reward_scales": [15]}
    report = frontier(
        GAUSSIAN, out=tmp_path / "a", algos=["sac", "ppo"], overrides={"algo.n_steps": 1}, **options
    ).report
    assert report["settings"] == {"env": {"discretization_steps": 5}, "wrappers": {}}
    env = json.loads((tmp_path / "a" / "runs" / "ppo-15" / "config.json").read_text())["settings"]
    assert env["env"] == {"discretization_steps": 5, "control_cost_weight": 2.0}
    assert env["wrappers"] == {"time_grid": None}
    note = (
        "ppo steers the process of the preset for sac: env.discretization_steps=5, "
        "wrappers.time_grid=None"
    )
    assert report["notes"] == [note]
    presets["sac"]["env"]["noise_level"] = 0.5
    with pytest.raises(
        OptionError, match=r"the preset for sac sets env\.noise_level, that for ppo does not"
    ):
        frontier(GAUSSIAN, out=tmp_path / "b", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "flowgym/Nothing-v0"}, "no environment"),
        ({"algos": ["pp0"]}, "algo is 'pp0'"),
        ({"gradients": ["unet"]}, "gradients is 'unet'"),
        ({"best_of": [1]}, "best_of is 1"),
        ({"best_of": [8], "pool": 4}, "best_of has 8, but the pool only 4"),
        ({"episodes": 1}, "episodes is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"reward_scales": [0]}, "reward_scales has 0"),
        ({"reward_scales": [-1.0]}, "reward_scales is -1.0"),
        ({"strengths": [math.nan]}, "strengths is nan"),
        ({"timesteps": 0}, "timesteps is 0"),
        ({"overrides": {"control_cost_weight": 1.0}}, "follows from the reward scales"),
        ({"overrides": {"reward_scale": 0.0}}, r"reward_scale is 0\.0, expected a number above 0"),
        ({"overrides": {"env.reward_scale": 0.0}}, "reward_scale is 0.0"),
        ({"overrides": {"env.means": object()}}, "no plain value"),
    ],
)
def test_bad_input_is_refused_before_any_work(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "make_vector_env", lambda *a: pytest.fail("work began"))
    with pytest.raises(FlowGymError, match=message):
        frontier(**{"env_id": GAUSSIAN, "out": tmp_path / "new", **options})
    assert not (tmp_path / "new").exists()


def test_a_process_without_noise_has_no_frontier(tmp_path):
    with pytest.raises(OptionError, match="no finite divergence"):
        frontier(GAUSSIAN, out=tmp_path / "new", algos=[], overrides={"noise_level": 0.0})
    assert not (tmp_path / "new").exists()


def test_a_reward_that_remembers_has_no_frontier(tmp_path):
    changes = {
        "reward": "1d/standardize",
        "reward_kwargs": {"reward": "1d/gaussian", "per_prompt": False},
    }
    with pytest.raises(OptionError, match="remembers what it has scored"):
        frontier(GAUSSIAN, out=tmp_path, algos=[], overrides=changes)


def test_what_pool_best_of_n_takes_is_said_before_the_first_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "play", lambda *args: pytest.fail(capsys.readouterr().err))
    options = {"algos": [], "overrides": {"prompts": PROMPTS}, "pool": 100, "best_of": [2, 8, 64]}
    said = (
        r"best of 8, 64 will be left out: it takes 8 n samples of each prompt, and the pool has "
        r"100, about 50 of each "
        rf"of 2 prompts; a pool that does: {needed_pool(8, 2)} for n = 8, {needed_pool(64, 2)} for "
        r"n = 64"
    )
    with pytest.raises(pytest.fail.Exception, match=said):
        frontier(RED, out=tmp_path, **options)


@pytest.mark.parametrize(("n", "prompts"), [(2, 2), (4, 45), (2, 256)])
def test_the_pool_that_is_named_is_large_enough(n, prompts):
    rng = np.random.default_rng(0)
    size = needed_pool(n, prompts)
    counts = rng.multinomial(size, np.full(prompts, 1 / prompts), size=400)
    assert (counts.min(axis=1) >= n * SAMPLES_OF_POOL).mean() > 0.98
    assert size < 3.5 * n * SAMPLES_OF_POOL * prompts
    assert pool_notes([n], size, prompts) == []
    assert needed_pool(n, 1) == needed_pool(n, 0) == n * SAMPLES_OF_POOL


def test_a_frontier_whose_prompts_have_changed_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    changes = {"prompts": "prompts.txt", "discretization_steps": 2}
    options = {"algos": [], "strengths": [], "pool": 32, "best_of": [2], "overrides": changes}
    report = frontier(RED, out=tmp_path / "out", **options).report
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    changes["prompts"] = "../prompts.txt"
    assert frontier(RED, out=tmp_path / "out", **options).report["pool"] == report["pool"]
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na photo of a cat")
    clear_model_cache()
    with pytest.raises(
        OptionError, match=r"other contents of env\.prompts; put back what was there"
    ):
        frontier(RED, out=tmp_path / "out", **options)
