import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from flowgym_gym.agents.rllib import config
from flowgym_gym.errors import CheckpointError, OptionError
from tests.agents.rllib.conftest import MIXTURE, quick
from tests.conftest import RED


def pids(algorithm):
    return algorithm.env_runner_group.foreach_env_runner(
        lambda runner: os.getpid(), local_env_runner=False
    )


def test_a_runner_that_is_killed_comes_back_and_training_goes_on(build):
    algorithm = build(quick(config(MIXTURE, runners=2)))
    done = algorithm.train()["num_env_steps_sampled_lifetime"]
    first, second = pids(algorithm)
    os.kill(second, signal.SIGKILL)
    for _ in range(30):
        result = algorithm.train()
        assert np.isfinite(result["learners"]["default_policy"]["total_loss"])
        if algorithm.env_runner_group.num_healthy_remote_workers() == 2:
            break
        time.sleep(1)
    back = pids(algorithm)
    assert len(back) == 2
    assert first in back
    assert second not in back
    assert algorithm.train()["num_env_steps_sampled_lifetime"] >= done + 64


@pytest.mark.parametrize("runners", [0, 2])
def test_a_checkpoint_that_cannot_be_opened_shows_its_own_error_in_the_driver(
    runners, build, tmp_path
):
    missing = tmp_path / "none"
    with pytest.raises((CheckpointError, OptionError), match=str(missing)):
        build(quick(config(RED, runners=runners, checkpoint=str(missing))))
