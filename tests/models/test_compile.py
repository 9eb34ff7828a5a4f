"""``compile=True``: a network of its own, and the same numbers to rounding."""

import gymnasium
import numpy as np
import pytest
from diffusers import UNet2DConditionModel

from flowgym_gym.errors import OptionError
from flowgym_gym.models import checkpoints
from flowgym_gym.models.stable_diffusion import StableDiffusionBaseModel
from flowgym_gym.sharing import Shared
from tests.conftest import RED


def final_latent(**kwargs):
    env = gymnasium.make(RED, discretization_steps=2, **kwargs)
    env.reset(seed=0)
    for _ in range(2):
        observation, *_ = env.step(np.full((4, 8, 8), 0.1, np.float32))
    return observation["latent"]


def test_only_the_network_that_was_asked_for_is_compiled(monkeypatch, model):
    monkeypatch.setattr(checkpoints, "_pipelines", Shared())
    compiled = []
    monkeypatch.setattr(
        UNet2DConditionModel, "compile", lambda self, *args, **kwargs: compiled.append(self)
    )
    fast = StableDiffusionBaseModel(compile=True)
    assert compiled == [fast.unet]
    assert fast.unet is not model.unet
    assert StableDiffusionBaseModel(compile=True, prompts="a red heart").unet is fast.unet
    with pytest.raises(OptionError, match="compile is 'yes'"):
        StableDiffusionBaseModel(compile="yes")


@pytest.mark.nightly
def test_a_compiled_network_gives_the_same_latents():
    np.testing.assert_allclose(final_latent(compile=True), final_latent(), atol=1e-4)
