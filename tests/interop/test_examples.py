"""The scripts in ``examples/`` run as they stand; at full length, and TorchRL's, at night."""

import importlib.util
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import flowgym_gym
from flowgym_gym import FlowTensor, reward_registry

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'load("{script.stem}")' in tests
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.second
def test_the_films_show_an_episode_each(tmp_path, capsys):
    base, pushed = load("film").main(["--out", str(tmp_path / "films"), "--steps", "4"])
    assert 0 < base < pushed < 1
    films = sorted(tmp_path.glob("films/*.mp4"))
    assert [film.name for film in films] == ["film-episode-0.mp4", "film-episode-1.mp4"]
    for film in films:
        with VideoFileClip(str(film)) as clip:
            assert len(list(clip.iter_frames())) == 5
    assert "steady push: red 0." in capsys.readouterr().out


def test_ppo_compares_itself_with_the_optimum(capsys):
    base, mean, best = load("ppo").main(timesteps=500, episodes=3)
    assert base < best
    assert -30 < mean < best
    assert "of the way" in capsys.readouterr().out


def test_tqc_is_evaluated_on_held_out_seeds(capsys):
    report = load("tqc").main(timesteps=128, episodes=2)
    assert report["timesteps"] == 128
    assert report["base"]["control_cost"]["mean"] == 0
    assert "agent: red 0." in capsys.readouterr().out


def test_reinforce_climbs_towards_the_bound():
    base, mean, bound = load("reinforce").main(iterations=25)
    assert base + 0.4 * (bound - base) < mean < bound + 0.3


@pytest.mark.second
def test_plain_torch_ppo_learns():
    base, mean, best = load("cleanrl_ppo").main(iterations=8)
    assert base + 0.15 * (best - base) < mean < best + 0.3


@pytest.fixture
def ring():
    yield load("custom_reward")
    del reward_registry._entries["2d/ring"]


@pytest.mark.second
def test_the_custom_reward_is_what_its_docstring_says_and_is_learnt(ring):
    reward = ring.RingReward(radius=5.0, width=2.0)
    points = FlowTensor(torch.tensor([[3.0, -4.0], [0.0, 7.0], [0.0, 0.0]]))
    rewards, valids = reward(points)
    torch.testing.assert_close(rewards, torch.tensor([0.0, -0.5, -3.125]).exp())
    assert valids.all()

    report = ring.main(timesteps=12800)
    assert report["difference"]["terminal_reward"]["low"] > 0.1
    # The base model, sampled through the torch interface.
    env = flowgym_gym.make("2d/gaussian_mixture", "2d/ring", 10, reward_kwargs={"radius": 4.0})
    assert report["base"]["terminal_reward"]["mean"] == pytest.approx(
        env.sample(4096).rewards.mean().item(), abs=0.03
    )


@pytest.mark.second
def test_the_batched_agent_is_evaluated_on_held_out_seeds(capsys):
    report = load("batched").main(timesteps=320, episodes=2)
    assert report["timesteps"] == 320
    assert report["base"]["control_cost"]["mean"] == 0 < report["agent"]["control_cost"]["mean"]
    assert "agent: redness 0." in capsys.readouterr().out


def test_the_custom_policy_starts_as_the_base_model_and_sees_channel_statistics():
    example = load("custom_policy")
    report = example.main(timesteps=0, episodes=2)
    assert report["agent"] == report["base"]

    envs = example.make(3, "Disabled")
    observations, _ = envs.reset(seed=0)
    tensors = {name: torch.from_numpy(value) for name, value in observations.items()}
    features = example.ChannelStatistics(envs.single_observation_space)(tensors).numpy()
    cells = observations["latent"].reshape(3, 4, -1)
    expected = np.concatenate([cells.mean(-1), cells.std(-1, ddof=1), observations["time"]], axis=1)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_ppo_comes_half_of_the_way_to_the_optimum():
    base, mean, best = load("ppo").main()
    assert base + 0.5 * (best - base) < mean < best + 1


@pytest.mark.nightly
def test_tqc_beats_the_base_model():
    report = load("tqc").main()
    assert report["difference"]["return"]["low"] > 0
    assert report["difference"]["terminal_reward"]["low"] > 0.1


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "least"), [("batched", 0.2), ("custom_policy", 0.1)])
def test_the_agents_on_pictures_beat_the_base_model(name, least):
    report = load(name).main()
    assert report["difference"]["return"]["low"] > 0
    assert report["difference"]["terminal_reward"]["low"] > least


@pytest.mark.nightly
def test_torchrl_plays_the_episodes_of_the_vector_environment():
    pytest.importorskip("torchrl")
    example = load("torchrl_envs")
    rollouts = example.main()
    for mode, rollout in rollouts.items():
        envs = gymnasium.make_vec(
            example.ID, num_envs=3, autoreset_mode=mode, discretization_steps=example.STEPS
        )
        # Seeding a TorchRL environment resets it once.
        envs.reset(seed=0)
        observations, _ = envs.reset()
        for step in range(2 * example.STEPS):
            now = rollout[:, step]
            np.testing.assert_allclose(
                now["latent"], observations["latent"], atol=1e-4, err_msg=f"{mode} {step}"
            )
            np.testing.assert_allclose(now["time"], observations["time"])
            observations, rewards, terminations, _, _ = envs.step(now["action"].numpy())
            np.testing.assert_allclose(now["next", "reward"].squeeze(-1), rewards, rtol=1e-4)
            np.testing.assert_array_equal(now["next", "done"].squeeze(-1), terminations)
            ended = terminations.all()
            assert ended == (step % example.STEPS == example.STEPS - 1)
            # Where episodes are reset in the same step, TorchRL gives zeros for the last
            # observation of one.
            if mode == "Disabled" or not ended:
                np.testing.assert_allclose(now["next", "latent"], observations["latent"], atol=1e-4)
            if ended:
                # TorchRL resets when all episodes are over, in either mode.
                observations, _ = envs.reset()


@pytest.mark.nightly
def test_torchrl_refuses_the_next_step_mode():
    pytest.importorskip("torchrl")
    with pytest.raises(RuntimeError, match="SAME_STEP or DISABLED"):
        load("torchrl_envs").make("NextStep")
