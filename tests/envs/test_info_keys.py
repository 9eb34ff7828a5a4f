"""Infos with the same numbers at any time, for libraries that keep infos as arrays."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

from flowgym_gym.envs import DenoisingEnv, check_vector_env
from flowgym_gym.errors import OptionError
from flowgym_gym.wrappers import RewardScale
from flowgym_gym.wrappers.vector import RewardScale as VectorRewardScale
from tests.conftest import PROMPTS, RED

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
KEYS = {"control_cost", "terminal_reward", "valid"}
STEPS = 2


def make(id=MIXTURE, info_keys="numeric", **kwargs):
    return gymnasium.make(id, discretization_steps=STEPS, info_keys=info_keys, **kwargs)


def make_vec(mode, info_keys="numeric", num_envs=3):
    return gymnasium.make_vec(
        MIXTURE,
        num_envs=num_envs,
        autoreset_mode=mode,
        discretization_steps=STEPS,
        info_keys=info_keys,
    )


def test_numeric_infos_have_the_same_keys_and_formats_at_reset_step_and_end():
    numeric, varying = make(RED, prompts=PROMPTS), make(RED, "varying", prompts=PROMPTS)
    infos = [(numeric.reset(seed=0)[1], varying.reset(seed=0)[1])]
    action = numeric.action_space.sample()
    for _ in range(STEPS):
        mine, theirs = numeric.step(action), varying.step(action)
        assert data_equivalence(mine[:4], theirs[:4], exact=True)
        infos.append((mine[4], theirs[4]))
    for mine, theirs in infos:
        assert set(mine) == KEYS
        assert {type(value) for value in mine.values()} == {np.float32}
        assert mine == {key: np.float32(theirs.get(key, 0)) for key in KEYS}
    assert infos[-1][0]["terminal_reward"] > 0
    assert infos[-1][0]["valid"] == 1


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_numeric_infos_of_vector_environments_are_those_of_gymnasium(mode):
    assert check_vector_env(make_vec(mode)) > 0
    scaled = VectorRewardScale(make_vec(mode), 3.0)
    assert check_vector_env(scaled, lambda: RewardScale(make(), 3.0), episodes=1) > 0


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_numeric_infos_tell_of_every_sub_environment_at_any_time(mode):
    numeric, varying = make_vec(mode), make_vec(mode, "varying")
    keys = KEYS | {f"_{key}" for key in KEYS}
    final = {"final_obs", "_final_obs", "final_info", "_final_info"}
    infos = [numeric.reset(seed=0)[1]]
    varying.reset(seed=0)
    numeric.action_space.seed(0)
    for _ in range(STEPS):
        actions = numeric.action_space.sample()
        mine, theirs = numeric.step(actions), varying.step(actions)
        assert data_equivalence(mine[:4], theirs[:4], exact=True)
        infos.append(mine[4])
    told = infos[-1]
    if mode is AutoresetMode.SAME_STEP:
        assert set(told["final_info"]) == keys
        told = told["final_info"]
        theirs = theirs[4]["final_info"]
    else:
        theirs = theirs[4]
    for key in KEYS:
        np.testing.assert_array_equal(told[key], theirs[key].astype(np.float32))
    for step in infos:
        assert set(step) - final == keys
        assert all(step[key].dtype == np.float32 and step[f"_{key}"].all() for key in KEYS)
    if mode is AutoresetMode.DISABLED:
        mask = np.array([True, False, True])
        _, some = numeric.reset(options={"reset_mask": mask})
        assert set(some) == keys
        np.testing.assert_array_equal(some["_valid"], mask)


def test_numeric_infos_go_through_specifications_and_checkers():
    env = make()
    check_env(env.unwrapped, skip_render_check=True)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.reset(seed=0)[1] == dict.fromkeys(KEYS, np.float32(0))


def test_other_info_keys_are_named():
    with pytest.raises(OptionError, match="info_keys is 'numbers', expected"):
        DenoisingEnv(info_keys="numbers")
    with pytest.raises(OptionError, match="info_keys is None"):
        make_vec("SameStep", None)
