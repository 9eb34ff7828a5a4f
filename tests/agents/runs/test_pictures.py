"""What a run shows."""

import gymnasium
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from flowgym_gym.agents import load_agent
from flowgym_gym.agents.runs import pictures
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.episodes import Episodes, watch
from flowgym_gym.agents.runs.evaluation import evaluation_env
from flowgym_gym.agents.runs.pictures import film, learning_curve, picture_grid
from flowgym_gym.wrappers import CoarseAction
from tests.agents.conftest import tiny
from tests.conftest import RED

STEPS = 3


def push(observations):
    return np.full((len(observations["latent"]), 4, 8, 8), 0.7, np.float32)


def test_a_film_is_what_the_single_environment_renders_from_the_same_seed():
    envs = gymnasium.make_vec(
        RED,
        2,
        autoreset_mode="Disabled",
        discretization_steps=STEPS,
        render_mode="rgb_array",
        action_scale=1.0,
    )
    frames = watch(envs, 7, push)
    assert len(frames) == STEPS + 1
    for i, strength in enumerate((0.0, 0.7)):
        env = gymnasium.make(
            RED, discretization_steps=STEPS, render_mode="rgb_array", action_scale=1.0
        )
        env.reset(seed=7)
        for step in range(STEPS + 1):
            assert np.abs(env.render().astype(int) - frames[step][i]).max() <= 1
            if step < STEPS:
                env.step(np.full((4, 8, 8), strength, np.float32))
    np.testing.assert_array_equal(*frames[0])
    assert np.abs(frames[-1][0].astype(int) - frames[-1][1]).max() > 10


def test_a_grid_tells_prompts_where_there_are_several(tmp_path, monkeypatch):
    written = []
    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda axis, text, **k: (written.append(text), set_title(axis, text, **k)),
    )
    values = np.array([0.25, 0.5])
    for prompts in (
        ["a cat"] * 2,
        ["a $5 cat", "a photo of a cat that sits on a mat and " + "looks " * 20],
    ):
        pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
        picture_grid(
            tmp_path / "grid.png",
            [("two", Episodes(values, values, values, values > 0, pictures, prompts))],
        )
    assert written[:2] == ["0.25", "0.5"]
    assert written[2] == "\na \\$5 cat\n0.25"
    lines = written[3].split("\n")
    assert lines[0] == "a photo of a cat that"
    assert lines[1].endswith("...")
    assert lines[2:] == ["0.5"]


def test_a_film_is_an_animation_of_pictures_side_by_side(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    frames = [
        [np.full((64, 64, 3), colours[(i + j) % 4], np.uint8) for j in range(2)] for i in range(4)
    ]
    film(tmp_path / "film.gif", frames, ("left", "right"))
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 4
        durations = []
        for i in range(4):
            gif.seek(i)
            durations.append(gif.info["duration"])
            still = np.asarray(gif.convert("RGB")).astype(int)
            middle = still.shape[0] // 2 + 9
            assert np.abs(still[middle, 128] - colours[i]).max() <= 2
            assert np.abs(still[middle, still.shape[1] - 128] - colours[(i + 1) % 4]).max() <= 2
        assert gif.info["loop"] == 0
        assert durations == [150, 150, 150, 2000]


@pytest.mark.parametrize("height", [8, 64, 300, 512])
def test_a_film_is_never_larger_than_two_pictures_of_256(height, tmp_path):
    film(
        tmp_path / "film.gif",
        [[np.zeros((height, 2 * height, 3), np.uint8)] * 2] * 2,
        ("left", "right"),
    )
    with Image.open(tmp_path / "film.gif") as gif:
        assert 200 <= gif.height <= 256 + 18
        assert gif.width <= 4 * 256 + 4


@pytest.mark.usefixtures("drawing")
def test_a_run_films_base_model_and_agent(tmp_path):
    changes = {"algo.learning_rate": 0.1, "env.action_type": "noise", "env.action_scale": 20.0}
    tiny(tmp_path, timesteps=16, overrides=changes)
    config = read_config(tmp_path)
    agent = load_agent(tmp_path)
    env = CoarseAction(gymnasium.make(RED, render_mode="rgb_array", **config["settings"]["env"]), 1)
    observation, _ = env.reset(seed=2**30)
    terminated = False
    while not terminated:
        observation, *_, terminated, _, _ = env.step(
            agent.predict(observation, deterministic=True)[0]
        )
    frames = watch(
        evaluation_env(config, 2), 2**30, lambda o: agent.predict(o, deterministic=True)[0]
    )
    assert np.abs(frames[-1][1].astype(int) - env.render()).max() <= 1
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(2)
        still = np.asarray(gif.convert("RGB")).astype(float)
    # 64 pixels are drawn as 256, under a line of 18; a GIF has 256 colours.
    agents = still[18:, -256:].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(agents - frames[-1][1]).mean() < 5
    assert np.abs(agents - frames[-1][0]).mean() > 10


def test_the_evaluations_and_the_best_are_drawn_into_the_learning_curve(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        pictures.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self)
    )
    names = ("terminal_reward", "return", "control_cost")
    rows = [{"timesteps": 8 * i, **dict.fromkeys(names, float(i))} for i in range(1, 4)]
    evaluations = [
        {
            "timesteps": t,
            "episodes": 3,
            **{n + end: t + d for n in names for end, d in (("", 0), ("_low", -2), ("_high", 1))},
        }
        for t in (0, 8, 16)
    ]
    learning_curve(tmp_path / "curve.png", rows, "title", None, evaluations, 8)
    learning_curve(tmp_path / "curve.png", rows, "title", None)
    for axis in drawn[0].axes:
        (errors,) = axis.containers
        line, _, (bars,) = errors.lines
        np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [8, 8], [16, 16]])
        np.testing.assert_array_equal(
            [s[:, 1] for s in bars.get_segments()], [[-2, 1], [6, 9], [14, 17]]
        )
        (star,) = [line for line in axis.lines if line.get_marker() == "*"]
        np.testing.assert_array_equal(star.get_xydata(), [[8, 8]])
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert "agent, evaluated, mean of 3 and 95 % interval" in texts
    assert not any(axis.containers for axis in drawn[1].axes)
