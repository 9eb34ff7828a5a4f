"""``train`` takes stable-baselines3's callbacks, to which a run of many intervals is one training."""

import json

import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)

from flowgym_gym.errors import OptionError
from tests.agents.conftest import resume, same_weights, tiny, untimed
from tests.conftest import further


class Counting(BaseCallback):
    """Counts what happens; stops after some timesteps."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at
        self.events, self.seen = [], []

    def _init_callback(self):
        self.events.append("init")

    def _on_training_start(self):
        self.events.append("start")

    def _on_training_end(self):
        self.events.append("end")

    def _on_step(self):
        assert len(self.locals["infos"]) == 2
        self.seen.append(self.num_timesteps)
        return self.stop_at is None or self.num_timesteps < self.stop_at


@pytest.mark.parametrize("algo", ["ppo", *further("sac")])
def test_callbacks_are_called_on_every_step_and_change_nothing(tmp_path, algo):
    own, rarely = Counting(), Counting()
    result = tiny(tmp_path / "a", algo, callbacks=[own, EveryNTimesteps(8, rarely)])
    assert result.stopped is None
    assert own.seen == list(range(2, 17, 2))
    assert rarely.seen == [8, 16]
    # However many intervals there are.
    assert own.events == ["init", "start", "end"]
    tiny(tmp_path / "b", algo)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("algo", ["sac", *further("ppo")])
def test_a_run_stops_where_a_callback_returns_false_and_can_be_resumed(tmp_path, algo):
    # Two sub-environments end an episode each in 4 timesteps.
    asked = {"callbacks": StopTrainingOnMaxEpisodes(max_episodes=1)}
    result = tiny(tmp_path / "run", algo, timesteps=24, **asked)
    # An interval of PPO is a rollout of 8 timesteps, one of SAC an episode of each sub-environment.
    assert result.timesteps == {"ppo": 8, "sac": 4}[algo]
    assert result.stopped == "StopTrainingOnMaxEpisodes returned False"
    assert result.signal is None
    own = Counting(stop_at=result.timesteps + 2)
    again = resume(tmp_path / "run", algo, callbacks=own)
    assert again.stopped == "Counting returned False"
    assert again.timesteps == 2 * result.timesteps
    # What has said that it is enough is not asked again.
    assert own.seen == [result.timesteps + 2]
    assert resume(tmp_path / "run", algo).stopped is None
    tiny(tmp_path / "whole", algo, timesteps=24)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_function_is_a_callback(tmp_path):
    seen = []

    def watch(local, everything):
        seen.append(local["self"].num_timesteps)
        return seen[-1] < 4

    result = tiny(tmp_path / "run", callbacks=watch)
    assert seen == [2, 4]
    assert (result.timesteps, result.stopped) == (8, "watch returned False")


def test_what_a_callback_raises_stops_the_run_where_it_can_go_on(tmp_path):
    def fail(local, everything):
        if local["self"].num_timesteps > 8:
            raise RuntimeError("no more")
        return True

    with pytest.raises(RuntimeError, match="no more"):
        tiny(tmp_path / "run", callbacks=[fail])
    resume(tmp_path / "run")
    tiny(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "callbacks", [5, "often", [None], [Counting], Counting, {"a": 1}, [[Counting()]]]
)
def test_what_is_no_callback_is_refused_before_any_work(tmp_path, callbacks):
    with pytest.raises(
        OptionError, match=r"callbacks is or has .*, expected a stable-baselines3 callback"
    ):
        tiny(tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()
