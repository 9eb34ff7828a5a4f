"""An environment of another package, whose steps fail: as if a reward's server were gone."""

import gymnasium

from flowgym_gym import DenoisingVectorEnv
from flowgym_gym.catalogue import DENOISING
from flowgym_gym.errors import RewardError


class Failing(DenoisingVectorEnv):
    def step(self, actions):
        raise RewardError("the server is gone")


if "toy/Failing-v0" not in gymnasium.registry:
    gymnasium.register(
        "toy/Failing-v0",
        entry_point=DENOISING,
        vector_entry_point=f"{__name__}:Failing",
        kwargs={"base_model": "1d/gaussian_mixture", "reward": "1d/gaussian"},
    )
