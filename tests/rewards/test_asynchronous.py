"""Slow rewards: scored in a thread, with a time-out, retries, and an error when the scorer stays
away.
"""

import subprocess
import sys
import threading
import time

import gymnasium
import numpy as np
import pytest
import torch

import flowgym_gym
from flowgym_gym import FlowTensor, Reward
from flowgym_gym.errors import OptionError, RewardError
from flowgym_gym.rewards.asynchronous import Asynchronous
from flowgym_gym.rewards.base import as_images
from flowgym_gym.rewards.loading import load_reward
from tests.rewards.toys import GreyModel

PICTURES = FlowTensor(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


class Scorer(Reward):
    """The mean of the picture; each call first does what ``script`` says, by its number."""

    def __init__(self, script=()):
        self.script, self.calls = list(script), []

    def forward(self, x, **kwargs):
        number = len(self.calls)
        self.calls.append((threading.current_thread().name, time.monotonic()))
        if number < len(self.script) and self.script[number] is not None:
            self.script[number]()
        as_images("Scorer", x)
        means = x.data.mean(dim=(1, 2, 3))
        return means, torch.ones_like(means, dtype=torch.bool)


def sleeps(seconds):
    return lambda: time.sleep(seconds)


def fails(error):
    def fail():
        raise error

    return fail


MEANS = PICTURES.data.mean(dim=(1, 2, 3))


def test_scores_come_from_another_thread_and_are_the_same():
    scorer = Scorer()
    rewards, valids = Asynchronous(scorer)(PICTURES)
    torch.testing.assert_close(rewards, MEANS)
    assert valids.all()
    assert scorer.calls[0][0] == "flowgym-reward"


def test_submitting_does_not_wait():
    reward = Asynchronous(Scorer([sleeps(0.5)]))
    started = time.monotonic()
    pending = reward.submit(PICTURES)
    assert time.monotonic() - started < 0.25
    assert not pending.done()
    torch.testing.assert_close(pending.result()[0], MEANS)
    assert time.monotonic() - started >= 0.5
    assert pending.done()


def test_a_scorer_that_fails_or_is_late_is_asked_again():
    scorer = Scorer(
        [fails(ConnectionError("refused")), sleeps(5), fails(TimeoutError("read timed out"))]
    )
    reward = Asynchronous(scorer, timeout=0.3, retries=3, backoff=0.05)
    started = time.monotonic()
    torch.testing.assert_close(reward(PICTURES)[0], MEANS)
    assert time.monotonic() - started < 3
    waits = np.diff([when for _, when in scorer.calls])
    assert len(scorer.calls) == 4
    assert (waits >= [0.05, 0.3 + 0.1, 0.2]).all()


def test_a_scorer_that_stays_away_is_a_clear_error():
    started = time.monotonic()
    with pytest.raises(
        RewardError,
        match=r"Scorer gave no scores in 2 attempts of at most 0\.1 s; .*no answer in time",
    ):
        Asynchronous(Scorer([sleeps(30)] * 5), timeout=0.1, retries=1, backoff=0)(PICTURES)
    assert time.monotonic() - started < 5
    with pytest.raises(
        RewardError, match=r"the last: ConnectionError: refused\. Check that the scorer runs"
    ) as caught:
        Asynchronous(Scorer([fails(ConnectionError("refused"))]), retries=0)(PICTURES)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_sample_at_fault_is_not_asked_about_again():
    scorer = Scorer()
    with pytest.raises(RewardError, match=r"got image 0 .* expected \[0, 1\]"):
        Asynchronous(scorer, backoff=0)(FlowTensor(PICTURES.data + 2))
    assert len(scorer.calls) == 1


@pytest.mark.second
def test_a_thread_that_was_given_up_does_not_keep_the_process():
    code = (
        "import time, torch\n"
        "from flowgym_gym import FlowTensor, Reward\n"
        "from flowgym_gym.errors import RewardError\n"
        "from flowgym_gym.rewards.asynchronous import Asynchronous\n"
        "class Slow(Reward):\n"
        "    def forward(self, x, **kwargs): time.sleep(300)\n"
        "try: Asynchronous(Slow(), timeout=0.1, retries=0)(FlowTensor(torch.rand(1, 3, 4, 4)))\n"
        "except RewardError: print('gave up')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "gave up\n"
    assert result.returncode == 0


def test_the_next_batch_is_rolled_out_while_the_last_is_scored():
    events = []

    class Slow(Scorer):
        def forward(self, x, **kwargs):
            events.append("score")
            time.sleep(0.3)
            result = super().forward(x, **kwargs)
            events.append("scored")
            return result

    class Noted(GreyModel):
        def sample_p0(self, n, **kwargs):
            events.append("start")
            return super().sample_p0(n, **kwargs)

    env = flowgym_gym.VelocityEnvironment(Noted(), Asynchronous(Slow()), discretization_steps=3)
    plain = flowgym_gym.VelocityEnvironment(GreyModel(), Scorer(), discretization_steps=3)
    events.clear()
    torch.manual_seed(5)
    samples = list(env.stream(4, batches=3))
    torch.manual_seed(5)
    expected = [plain.sample(4) for _ in range(3)]
    for sample, other in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample.rewards, other.rewards)
        torch.testing.assert_close(sample.latents.data, other.latents.data)
    first = events.index("scored")
    assert events[:first].count("start") == 2  # The second batch began before the first was scored.
    with pytest.raises(OptionError, match="batches is 0"):
        next(env.stream(4, batches=0))


def test_gymnasium_makes_it_from_plain_data():
    options = {
        "reward": "images/asynchronous",
        "reward_kwargs": {"reward": "images/redness", "timeout": 100},
    }
    infos = []
    for more in (options, {"reward": "images/redness"}):
        env = gymnasium.make("flowgym/Denoising-v0", discretization_steps=1, **more)
        env.reset(seed=0)
        infos.append(env.step(np.zeros(env.action_space.shape, np.float32))[4])
    assert infos[0]["terminal_reward"] == infos[1]["terminal_reward"]


def test_a_reward_that_remembers_cannot_be_asked_twice():
    with pytest.raises(OptionError, match="Standardize, which remembers what it has scored"):
        load_reward(
            "images/asynchronous", reward={"id": "images/standardize", "reward": "images/red"}
        )
    with pytest.raises(OptionError, match="timeout is -1"):
        Asynchronous("images/red", timeout=-1)
