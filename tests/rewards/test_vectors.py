"""Rewards of points, against torch's distributions."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from flowgym_gym import FlowTensor
from flowgym_gym.errors import OptionError
from flowgym_gym.rewards.vectors import BinaryReward, GaussianReward


def test_binary_reward_is_1_inside_the_interval_and_0_outside():
    x = torch.tensor([-0.1, 0.0, 0.4, 1.0, 1.1])[:, None]
    rewards, valids = BinaryReward()(FlowTensor(x))
    assert rewards.tolist() == [0, 1, 1, 1, 0]
    assert valids.all()
    corner = FlowTensor(torch.tensor([[0.5, 0.5], [0.5, 2.0], [2.0, 0.5]]))
    assert BinaryReward()(corner)[0].tolist() == [1, 0, 0]
    assert BinaryReward(low=1.5, high=2.5)(corner)[0].tolist() == [0, 0, 0]


def test_gaussian_reward_is_the_normal_density():
    x = torch.linspace(-5, 2, 40)[:, None]
    rewards, _ = GaussianReward()(FlowTensor(x))
    torch.testing.assert_close(rewards, Normal(-2.5, 0.8).log_prob(x[:, 0]).exp())
    assert rewards.max().item() <= 1 / (0.8 * math.sqrt(2 * math.pi))
    plane = torch.randn(30, 2)
    rewards, _ = GaussianReward(mean=(-2.0, 1.0), std=1.5)(FlowTensor(plane))
    law = MultivariateNormal(torch.tensor([-2.0, 1.0]), 1.5**2 * torch.eye(2))
    torch.testing.assert_close(rewards, law.log_prob(plane).exp())


def test_bad_arguments_are_named():
    with pytest.raises(OptionError, match=r"high is 0\.0"):
        BinaryReward(low=1.0, high=0.0)
    with pytest.raises(OptionError, match="std 0"):
        GaussianReward(std=0)
    with pytest.raises(OptionError, match=r"points have shape \(2,\), but mean has \(1,\)"):
        GaussianReward()(FlowTensor(torch.zeros(3, 2)))
