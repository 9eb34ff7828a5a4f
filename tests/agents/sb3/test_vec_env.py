import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from flowgym_gym import seeds
from flowgym_gym.agents import SB3VecEnv
from flowgym_gym.errors import OptionError
from flowgym_gym.wrappers import CoarseAction, RewardScale
from flowgym_gym.wrappers.vector import CoarseAction as VectorCoarseAction
from tests.conftest import RED

STEPS = 3


def make_vec(num_envs=3, coarse=True, **kwargs):
    env = gymnasium.make_vec(
        RED, num_envs=num_envs, autoreset_mode="SameStep", discretization_steps=STEPS, **kwargs
    )
    return SB3VecEnv(VectorCoarseAction(env, 2) if coarse else env)


def make_dummy(num_envs=3, **kwargs):
    def make():
        return CoarseAction(gymnasium.make(RED, discretization_steps=STEPS, **kwargs), 2)

    return DummyVecEnv([make] * num_envs)


@pytest.mark.parametrize("prompts", ["a photo of a cat", ["a photo of a cat", "a red heart"]])
def test_equals_dummy_vec_env_step_for_step(prompts):
    ours, theirs = make_vec(prompts=prompts), make_dummy(prompts=prompts)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    theirs._seeds = ours.seed(5)
    observations = ours.reset(), theirs.reset()
    actions = np.random.default_rng(0)
    for step in range(2 * STEPS + 1):
        for key in observations[1]:
            np.testing.assert_allclose(observations[0][key], observations[1][key], atol=1e-4)
            assert observations[0][key].dtype == observations[1][key].dtype
        assert ours.reset_infos == theirs.reset_infos
        action = actions.uniform(-1, 1, (3, *ours.action_space.shape)).astype(np.float32)
        (o1, r1, d1, i1), (o2, r2, d2, i2) = ours.step(action), theirs.step(action)
        np.testing.assert_allclose(r1, r2, rtol=1e-4, atol=1e-4)
        assert r1.dtype == r2.dtype
        np.testing.assert_array_equal(d1, d2)
        assert d1.all() == (step % STEPS == STEPS - 1)
        for mine, other in zip(i1, i2, strict=True):
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"terminal_observation"}:
                assert type(mine[key]) is type(other[key])
                assert mine[key] == pytest.approx(other[key], rel=1e-4)
            for key, value in other.get("terminal_observation", {}).items():
                np.testing.assert_allclose(mine["terminal_observation"][key], value, atol=1e-4)
        observations = o1, o2


def test_seeds_are_used_by_the_next_reset_only():
    env = make_vec()
    env.seed(7)
    first = env.reset()["latent"]
    second = env.reset()["latent"]
    assert not np.array_equal(first, second)
    single = gymnasium.make(RED, discretization_steps=STEPS)
    for i in range(3):
        np.testing.assert_array_equal(first[i], single.reset(seed=seeds(7, 3)[i])[0]["latent"])


def test_neighbouring_seeds_share_no_sub_environment():
    env = make_vec()
    given = [env.seed(seed) for seed in range(4)]
    assert given == [seeds(seed, 3) for seed in range(4)]
    assert len({one for each in given for one in each}) == 12
    with pytest.raises(OptionError, match="seed is -1"):
        env.seed(-1)
    assert env._seeds == given[-1]
    np.random.seed(0)
    drawn = env.seed(None)
    np.random.seed(0)
    assert drawn == env.seed(None) != given[0]


def test_options_reach_the_reset_once():
    env = make_vec(prompts=["a photo of a cat", "a red heart"])
    env.set_options({"prompt": "a red heart"})
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == ["a red heart"] * 3
    env.set_options([{"prompt": "a red heart"}, {}, {}])
    with pytest.raises(OptionError, match="different reset options"):
        env.reset()


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_other_autoreset_modes_are_refused(mode):
    env = gymnasium.make_vec(RED, num_envs=2, autoreset_mode=mode, discretization_steps=STEPS)
    with pytest.raises(OptionError, match=f"'{mode}'.*make_vec.*SameStep"):
        SB3VecEnv(env)


def test_a_single_environment_is_refused(env):
    with pytest.raises(OptionError, match="expected a gymnasium VectorEnv"):
        SB3VecEnv(env)


def test_attributes_and_methods():
    env = make_vec()
    assert env.get_attr("discretization_steps") == [STEPS] * 3
    assert env.get_attr("resolution", indices=[0, 2]) == [2, 2]
    assert env.get_attr("action_space", indices=1)[0].shape == (4, 2, 2)
    assert not env.has_attr("nonsense")
    with pytest.raises(AttributeError, match="nonsense"):
        env.get_attr("nonsense")
    env.env_method("set_time_grid", 5)
    assert env.vector_env.unwrapped.discretization_steps == 5
    env.set_attr("resolution", 3)
    assert env.vector_env.resolution == 3
    with pytest.raises(OptionError, match="shared"):
        env.set_attr("resolution", 1, indices=[0])
    with pytest.raises(OptionError, match="shared"):
        env.env_method("set_time_grid", 4, indices=0)
    assert env.env_is_wrapped(CoarseAction) == [True] * 3
    assert env.env_is_wrapped(VectorCoarseAction, indices=0) == [True]
    assert env.env_is_wrapped(RewardScale) == [False] * 3
    assert env.env_is_wrapped(Monitor) == [False] * 3


def test_render_tiles_the_pictures_of_all():
    env = make_vec(num_envs=4, render_mode="rgb_array")
    env.reset()
    pictures = env.get_images()
    assert env.render().shape == (2 * pictures[0].shape[0], 2 * pictures[0].shape[1], 3)
    np.testing.assert_array_equal(
        env.render()[: pictures[0].shape[0], : pictures[0].shape[1]], pictures[0]
    )


def test_without_a_render_mode_there_are_no_pictures():
    env = make_vec()
    with pytest.warns(UserWarning, match="rgb_array"):
        assert env.get_images() == [None] * 3


def test_close_closes_the_vector_environment():
    env = make_vec()
    env.close()
    assert env.vector_env.closed


def test_sb3_wrappers_and_algorithms_run_on_it():
    env = VecMonitor(make_vec(num_envs=2, coarse=False))
    agent = PPO(
        "MultiInputPolicy", env, n_steps=STEPS, batch_size=2 * STEPS, n_epochs=1, device="cpu"
    )
    agent.learn(2 * STEPS)
    assert agent.num_timesteps == 2 * STEPS
    assert agent.ep_info_buffer[0]["l"] == STEPS


def test_sb3_runs_on_the_plain_gymnasium_environment():
    env = gymnasium.make(RED, discretization_steps=4)
    PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8)


def test_sb3_make_vec_env_takes_the_id():
    env = make_vec_env(RED, n_envs=2, seed=3, env_kwargs={"discretization_steps": 2})
    assert env.reset()["latent"].shape == (2, 4, 8, 8)
    _, _, dones, _ = env.step(np.zeros((2, *env.action_space.shape), dtype=np.float32))
    _, _, dones, infos = env.step(np.zeros((2, *env.action_space.shape), dtype=np.float32))
    assert dones.all()
    assert infos[0]["episode"]["l"] == 2
