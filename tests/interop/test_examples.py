"""The scripts in ``examples/`` run as they stand; at full length, and TorchRL's, at night."""

import importlib.util
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from moviepy import VideoFileClip

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    tests = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'load("{script.stem}")' in tests


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
    base, mean, best = load("ppo").main(["--timesteps", "500", "--episodes", "3"])
    assert base < best
    assert mean < 30
    assert "of the way" in capsys.readouterr().out


def test_tqc_is_evaluated_on_held_out_seeds(capsys):
    report = load("tqc").main(["--timesteps", "128", "--episodes", "2"])
    assert report["timesteps"] == 128
    assert report["base"]["control_cost"]["mean"] == 0
    assert "agent: red 0." in capsys.readouterr().out


@pytest.mark.nightly
def test_ppo_comes_half_of_the_way_to_the_optimum():
    base, mean, best = load("ppo").main([])
    assert base + 0.5 * (best - base) < mean < best + 1


@pytest.mark.nightly
def test_tqc_beats_the_base_model():
    report = load("tqc").main([])
    assert report["difference"]["return"]["low"] > 0
    assert report["difference"]["terminal_reward"]["low"] > 0.1


@pytest.mark.nightly
def test_torchrl_plays_the_episodes_of_the_vector_environment():
    pytest.importorskip("torchrl")
    example = load("torchrl_envs")
    rollouts = example.main([])
    for mode, rollout in rollouts.items():
        envs = gymnasium.make_vec(example.ID, num_envs=3, autoreset_mode=mode, discretization_steps=example.STEPS)
        # Seeding a TorchRL environment resets it once.
        envs.reset(seed=0)
        observations, _ = envs.reset()
        for step in range(2 * example.STEPS):
            now = rollout[:, step]
            np.testing.assert_allclose(now["latent"], observations["latent"], atol=1e-4, err_msg=f"{mode} {step}")
            np.testing.assert_allclose(now["time"], observations["time"])
            observations, rewards, terminations, _, _ = envs.step(now["action"].numpy())
            np.testing.assert_allclose(now["next", "reward"].squeeze(-1), rewards, rtol=1e-4)
            np.testing.assert_array_equal(now["next", "done"].squeeze(-1), terminations)
            ended = terminations.all()
            assert ended == (step % example.STEPS == example.STEPS - 1)
            # Where episodes are reset in the same step, TorchRL gives zeros for the last observation of one.
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
