"""The share of pictures that still show their subject."""

import re
import sys

import gymnasium
import numpy as np
import pytest

from flowgym_gym.agents import evaluate
from flowgym_gym.agents.runs.episodes import held_out_seeds
from studies import recognition
from tests.agents.conftest import draw_little, tiny
from tests.conftest import RED


def pictures(subject, count):
    """Pictures of the base model, one environment at a time."""
    env = gymnasium.make(
        RED, prompts=f"a photo of a {subject}", discretization_steps=10, render_mode="rgb_array"
    )
    found = []
    for seed in held_out_seeds(count):
        env.reset(seed=seed)
        done = False
        while not done:
            *_, done, _, _ = env.step(np.zeros(env.action_space.shape, np.float32))
        found.append(env.render())
    return found


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["recognition", str(folder), *arguments])
    recognition.main()


def test_pictures_are_taken_for_their_subject_and_for_no_other():
    frogs = pictures("frog", 6)
    first, five = recognition.recognised(frogs, "frog")
    assert first >= 4 / 6
    assert five >= first
    assert recognition.recognised(frogs, "cat")[0] == 0
    noise = list(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8))
    assert recognition.recognised(noise, "frog")[0] < 0.5


@pytest.mark.second
def test_agent_and_base_model_of_a_run_are_compared(tmp_path, monkeypatch, capsys):
    draw_little(monkeypatch)
    tiny(
        tmp_path,
        timesteps=8,
        overrides={"env.prompts": "a photo of a frog", "env.discretization_steps": 10},
    )
    run(monkeypatch, tmp_path, "--episodes", "4")
    base, agent = capsys.readouterr().out.splitlines()
    report = evaluate(tmp_path, episodes=4)
    for line, who in ((base, "base"), (agent, "agent")):
        reward = float(re.search(r"mean reward (\S+)", line)[1])
        assert reward == pytest.approx(report[who]["terminal_reward"]["mean"], abs=1e-4)
    first, five = recognition.recognised(pictures("frog", 4), "frog")
    assert base.endswith(f"'frog' first {first:.1%}, among the first five {five:.1%}")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a photo of a cat", "a photo of a frog"], "the run has 2 prompts, expected a single one"),
        ("something else", "prompt 'something else' names none of the classifier's subjects"),
    ],
)
def test_a_run_without_a_subject_is_refused(prompts, message, tmp_path, monkeypatch, capsys):
    draw_little(monkeypatch)
    tiny(tmp_path, timesteps=8, overrides={"env.prompts": prompts})
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert message in capsys.readouterr().err
