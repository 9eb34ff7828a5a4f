"""The checker of vector environments: it passes what is right and finds each thing that can be
wrong.
"""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorWrapper

from flowgym_gym import wrappers
from flowgym_gym.envs import DenoisingVectorEnv, check_vector_env
from flowgym_gym.errors import OptionError, VectorEnvError
from tests.conftest import FLOWGYM_IDS, PROMPTS, RED, further, prompted

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"


MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


@pytest.mark.parametrize(
    ("id", "mode"),
    [
        *[(id, MODES[0]) for id in FLOWGYM_IDS],
        *[(RED, mode) for mode in MODES[1:]],
        *further(*[(id, mode) for id in FLOWGYM_IDS if id != RED for mode in MODES[1:]]),
    ],
)
def test_every_id_passes_in_every_mode(id, mode):
    envs = gymnasium.make_vec(
        id, num_envs=3, discretization_steps=3, autoreset_mode=mode, **prompted(id)
    )
    assert check_vector_env(envs) >= 12
    assert envs.closed


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 1},
        {"num_envs": 5, "prompts": PROMPTS, "guidance_scale": 2.0},
        {"num_envs": 2, "noise_level": 0.0, "action_type": "noise", "discretization_steps": 1},
        {"num_envs": 2, "sampler": "euler", "noise_level": 0.5, "spacing": "trailing"},
        {"num_envs": 2, "discretization_steps": [900, 300, 20]},
    ],
)
def test_options_make_no_difference(options):
    check_vector_env(gymnasium.make_vec(RED, **{"discretization_steps": 2, **options}), episodes=1)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_gymnasiums_own_vector_environment_passes(mode):
    envs = gymnasium.make_vec(
        "CartPole-v1", num_envs=3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
    )
    check_vector_env(envs, max_steps=60)


class Wrong(VectorWrapper):
    """Passes everything on; each subclass does one thing wrong."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options)


class OtherObservation(Wrong):
    def step(self, actions):
        observations, *rest = super().step(actions)
        return {**observations, "latent": observations["latent"] + np.float32(1e-2)}, *rest


class OtherReward(Wrong):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards * 1.01, *rest


class Float32Reward(Wrong):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards.astype(np.float32), *rest


class Truncates(Wrong):
    def step(self, actions):
        observations, rewards, terminations, truncations, infos = super().step(actions)
        return observations, rewards, truncations, terminations, infos


class NoMask(Wrong):
    def step(self, actions):
        *rest, infos = super().step(actions)
        return *rest, {key: value for key, value in infos.items() if key != "_control_cost"}


class WrongMask(Wrong):
    def step(self, actions):
        *rest, infos = super().step(actions)
        return *rest, {**infos, "_control_cost": ~infos.get("_control_cost", np.zeros(3, bool))}


class NoFinalInfo(Wrong):
    def step(self, actions):
        *rest, infos = super().step(actions)
        return *rest, {key: value for key, value in infos.items() if "final_info" not in key}


class OtherFinalObservation(Wrong):
    def step(self, actions):
        *rest, infos = super().step(actions)
        for final in infos.get("final_obs", ()):
            if final is not None:
                final["latent"] += 1
        return *rest, infos


class SharedArrays(Wrong):
    def step(self, actions):
        observations, *rest = super().step(actions)
        if not hasattr(self, "kept"):
            self.kept = observations
        self.kept["latent"][:] = observations["latent"]
        self.kept["time"][:] = observations["time"]
        return self.kept, *rest


class TwoBuffers(Wrong):
    """Two arrays in turn: the one before the last is written over."""

    def step(self, actions):
        observations, *rest = super().step(actions)
        self.buffers = getattr(self, "buffers", [])
        if len(self.buffers) < 2:
            self.buffers.append({key: value.copy() for key, value in observations.items()})
            return self.buffers[-1], *rest
        self.buffers.append(self.buffers.pop(0))
        for key, value in observations.items():
            self.buffers[-1][key][:] = value
        return self.buffers[-1], *rest


class WritesToActions(Wrong):
    def step(self, actions):
        result = super().step(actions)
        actions *= 2
        return result


class OneSeedForAll(Wrong):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=[seed] * 3 if isinstance(seed, int) else seed, options=options)


class IgnoresListsOfSeeds(Wrong):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if isinstance(seed, list) else seed, options=options)


class IgnoresMasks(Wrong):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


class CannotCloseTwice(Wrong):
    def close(self, **kwargs):
        if self.env.closed:
            raise VectorEnvError("closed twice")
        super().close(**kwargs)


class OtherSpace(Wrong):
    @property
    def single_action_space(self):
        return gymnasium.spaces.Box(-2, 2, (1,), np.float32)


class WrongMode(Wrong):
    def __init__(self, env):
        super().__init__(env)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (OtherObservation, r"step 1 differs .*result\[0\]\['latent'\] is"),
        (OtherReward, r"result\[1\] is"),
        (Float32Reward, r"result\[1\] has shape \(3,\) and float32"),
        (Truncates, r"result\[2\] is"),
        (NoMask, r"result\[4\] has the keys"),
        (WrongMask, r"result\[4\]\['_control_cost'\]"),
        (NoFinalInfo, "final_info"),
        (OtherFinalObservation, r"final_obs'\]\[0\]\['latent'\]"),
        (SharedArrays, "changed what a call before had returned"),
        (TwoBuffers, "changed what a call before had returned"),
        (WritesToActions, "changed what it was given: actions is"),
        (OneSeedForAll, r"reset\(seed=0\) differs"),
        (IgnoresListsOfSeeds, r"reset\(seed=\[114, 107, 100\]\) differs"),
        (IgnoresMasks, "reset_mask.* differs"),
        (CannotCloseTwice, "closed twice"),
        (OtherSpace, "single_action_space is Box"),
    ],
)
def test_each_fault_is_found_and_named(wrong, message):
    envs = wrong(
        gymnasium.make_vec(MIXTURE, num_envs=3, discretization_steps=3, autoreset_mode="SameStep")
    )
    with pytest.raises(VectorEnvError, match=message):
        check_vector_env(envs, lambda: gymnasium.make(MIXTURE, discretization_steps=3))


def test_a_wrong_autoreset_mode_is_found():
    make_single = lambda: gymnasium.make(MIXTURE, discretization_steps=3)  # noqa: E731
    envs = gymnasium.make_vec(MIXTURE, num_envs=2, discretization_steps=3)
    with pytest.raises(VectorEnvError, match="SyncVectorEnv"):
        check_vector_env(WrongMode(envs), make_single)
    envs.metadata = {}
    with pytest.raises(VectorEnvError, match="metadata"):
        check_vector_env(envs, make_single)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("num_envs", [1, 3])
def test_episodes_of_one_step_pass(mode, num_envs):
    check_vector_env(
        gymnasium.make_vec(MIXTURE, num_envs=num_envs, discretization_steps=1, autoreset_mode=mode)
    )
    blackjack = gymnasium.make_vec(
        "Blackjack-v1",
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
    )
    check_vector_env(blackjack)


def test_a_check_that_sees_no_episode_end_says_so():
    envs = gymnasium.make_vec(MIXTURE, num_envs=2, discretization_steps=20)
    with pytest.raises(OptionError, match="no episode ended within 5 steps"):
        check_vector_env(envs, max_steps=5)
    with pytest.raises(OptionError, match="wrapped in a TimeGrid; give make_single"):
        check_vector_env(wrappers.vector.TimeGrid(envs, steps=2))


def test_a_single_environment_that_cannot_be_made_is_named():
    envs = DenoisingVectorEnv(num_envs=2, discretization_steps=2)
    with pytest.raises(OptionError, match="give make_single"):
        check_vector_env(envs)
    with pytest.raises(OptionError, match="give make_single"):
        check_vector_env(
            gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
        )
