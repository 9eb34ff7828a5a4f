"""Wrappers, single and vector."""

import pickle

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

from flowgym_gym import wrappers
from flowgym_gym.envs import check_vector_env
from flowgym_gym.errors import ActionError, OptionError
from flowgym_gym.optimal_control import optimal_value
from tests.conftest import PROMPTS, RED, further

KWARGS = {
    "RewardScale": {"scale": 3.0},
    "TimeGrid": {"steps": 2, "spacing": "trailing"},
    "CoarseAction": {"resolution": 3},
    "FlattenAction": {},
    "ToTorch": {},
}


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "name", ["CoarseAction", "RewardScale", "TimeGrid", *further("FlattenAction")]
)
def test_vector_wrapper_equals_the_vector_of_the_single_one(name, mode):
    envs = gymnasium.make_vec(RED, num_envs=2, discretization_steps=3, autoreset_mode=mode)
    check_vector_env(
        getattr(wrappers.vector, name)(envs, **KWARGS[name]),
        lambda: getattr(wrappers, name)(
            gymnasium.make(RED, discretization_steps=3), **KWARGS[name]
        ),
        episodes=1,
    )


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("name", wrappers.__all__)
def test_vector_wrappers_show_the_autoreset_mode(name, mode):
    envs = gymnasium.make_vec(RED, num_envs=2, discretization_steps=3, autoreset_mode=mode)
    assert getattr(wrappers.vector, name)(envs, **KWARGS[name]).autoreset_mode is mode


def test_every_wrapper_has_a_vector_version():
    from flowgym_gym.wrappers import vector

    assert set(vector.__all__) == set(wrappers.__all__) == set(KWARGS)


def test_reward_scale_leaves_the_control_costs_alone():
    action = np.full((4, 8, 8), 0.5, np.float32)
    env = wrappers.RewardScale(
        wrappers.RewardScale(gymnasium.make(RED, discretization_steps=2), 3.0), scale=0.5
    )
    env.reset(seed=0)
    total = costs = 0.0
    for _ in range(2):
        _, reward, *_, info = env.step(action)
        total, costs = total + reward, costs + info["control_cost"]
    assert total == pytest.approx(0.5 * info["terminal_reward"] - costs, rel=1e-9)
    assert env.reward_scale == 0.5


def test_time_grid_equals_an_environment_made_with_it():
    wrapped = wrappers.TimeGrid(
        gymnasium.make(RED, discretization_steps=5), steps=3, spacing="linspace"
    )
    made = gymnasium.make(RED, discretization_steps=3, spacing="linspace")
    assert wrapped.unwrapped.action_scale == made.unwrapped.action_scale
    action = np.full((4, 8, 8), 0.5, np.float32)
    assert data_equivalence(wrapped.reset(seed=0), made.reset(seed=0), exact=True)
    for _ in range(3):
        result = wrapped.step(action)
        assert data_equivalence(result, made.step(action), exact=True)
    assert result[2] is True


def test_time_grid_in_mid_episode_asks_for_a_reset():
    env = gymnasium.make(RED, discretization_steps=5)
    env.reset(seed=0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        wrappers.TimeGrid(env, steps=3).unwrapped.step(np.zeros((4, 8, 8), np.float32))


@pytest.mark.parametrize("resolution", [1, 2, 3, 8])
def test_coarse_action_is_upsampled_to_the_nearest(resolution):
    env = wrappers.CoarseAction(gymnasium.make(RED, discretization_steps=2), resolution=resolution)
    coarse = np.random.default_rng(0).uniform(-1, 1, (4, resolution, resolution)).astype(np.float32)
    fine = env.action(coarse)
    assert fine.shape == (4, 8, 8)
    for y in range(8):
        for x in range(8):
            np.testing.assert_array_equal(
                fine[:, y, x], coarse[:, y * resolution // 8, x * resolution // 8]
            )


@pytest.mark.parametrize("resolution", [0, 9, 2.0, True])
def test_bad_resolutions_are_named(resolution):
    with pytest.raises(OptionError, match=f"resolution is {resolution}"):
        wrappers.CoarseAction(gymnasium.make(RED), resolution=resolution)


@pytest.mark.parametrize("tensor", [False, True])
def test_flat_actions_are_those_of_the_environment_row_by_row(tensor):
    plain, flat = (gymnasium.make(RED, discretization_steps=2) for _ in range(2))
    flat = wrappers.FlattenAction(flat)
    assert flat.action_space == gymnasium.spaces.Box(-1, 1, (256,), np.float32)
    assert data_equivalence(plain.reset(seed=0), flat.reset(seed=0), exact=True)
    action = plain.action_space.sample()
    vector = torch.from_numpy(action).flatten() if tensor else action.flatten()
    assert data_equivalence(flat.step(vector), plain.step(action), exact=True)


def test_flat_actions_of_vector_environments_are_those_of_each():
    plain, flat = (gymnasium.make_vec(RED, num_envs=2, discretization_steps=2) for _ in range(2))
    flat = wrappers.vector.FlattenAction(flat)
    assert flat.single_action_space.shape == (256,)
    assert flat.action_space == gymnasium.spaces.Box(-1, 1, (2, 256), np.float32)
    assert data_equivalence(plain.reset(seed=0), flat.reset(seed=0), exact=True)
    actions = plain.action_space.sample()
    assert data_equivalence(flat.step(actions.reshape(2, 256)), plain.step(actions), exact=True)


def test_flat_actions_go_around_coarse_ones_and_around_vectors():
    env = wrappers.FlattenAction(
        wrappers.CoarseAction(gymnasium.make(RED, discretization_steps=2), 2)
    )
    check_env(env, skip_render_check=True)
    again = pickle.loads(pickle.dumps(env))
    made = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert (made.action_space.shape, type(made)) == ((16,), wrappers.FlattenAction)
    action = np.arange(16, dtype=np.float32) / 16
    for other in (again, made):
        assert data_equivalence(env.reset(seed=3), other.reset(seed=3), exact=True)
        assert data_equivalence(env.step(action), other.step(action), exact=True)
    assert env.env.action(action.reshape(4, 2, 2))[1, 0, 0] == action[4]

    mixture = gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", discretization_steps=2)
    assert wrappers.FlattenAction(mixture).action_space == mixture.action_space
    assert optimal_value(wrappers.FlattenAction(mixture)).value == optimal_value(mixture).value


def test_bad_flat_actions_are_named():
    env = wrappers.FlattenAction(gymnasium.make(RED, discretization_steps=2))
    env.reset(seed=0)
    for action in (np.zeros((4, 8, 8)), torch.zeros(4, 8, 8)):
        with pytest.raises(ActionError, match=r"\(4, 8, 8\), expected \(256,\)"):
            env.step(action)
    with pytest.raises(ActionError, match=r"expected float32 numbers of shape \(256,\)"):
        env.step(torch.zeros(256).to_sparse())
    with pytest.raises(OptionError, match="FlattenAction needs"):
        wrappers.FlattenAction(gymnasium.make("CartPole-v1"))


def test_bad_wrapper_input_is_named():
    env = gymnasium.make(RED, discretization_steps=2)
    with pytest.raises(ActionError, match=r"\(4, 8, 8\), expected \(4, 2, 2\)"):
        wrappers.CoarseAction(env, 2).action(np.zeros((4, 8, 8)))
    with pytest.raises(OptionError, match="CoarseAction needs"):
        wrappers.CoarseAction(gymnasium.make("CartPole-v1"), 2)
    with pytest.raises(OptionError, match="scale is nan"):
        wrappers.RewardScale(env, float("nan"))
    with pytest.raises(OptionError, match="discretization_steps is 0"):
        wrappers.TimeGrid(env, steps=0)


def as_arrays(result):
    observation, *rest = result
    return {key: value.numpy() for key, value in observation.items()}, *rest


@pytest.mark.parametrize("num_envs", [None, 3])
def test_tensors_hold_what_the_arrays_hold(num_envs):
    def make():
        kwargs = {"discretization_steps": 3, "prompts": PROMPTS}
        return (
            gymnasium.make(RED, **kwargs)
            if num_envs is None
            else gymnasium.make_vec(RED, num_envs=num_envs, **kwargs)
        )

    kind = wrappers if num_envs is None else wrappers.vector
    plain, torched = kind.CoarseAction(make(), 2), kind.ToTorch(kind.CoarseAction(make(), 2))
    observation, info = torched.reset(seed=0)
    assert data_equivalence(as_arrays((observation, info)), plain.reset(seed=0), exact=True)
    plain.action_space.seed(0)
    for _ in range(3):
        action = plain.action_space.sample()
        result = torched.step(torch.from_numpy(action))
        assert data_equivalence(as_arrays(result), plain.step(action), exact=True)
    latents = torched.unwrapped.rollout.latents
    assert result[0]["latent"].data_ptr() == latents.data_ptr()


def test_tensors_can_be_learned_from_and_stay_as_they_were():
    env = wrappers.ToTorch(gymnasium.make(RED, discretization_steps=3))
    first, _ = env.reset(seed=0)
    second, *_ = env.step(torch.zeros(4, 8, 8))
    kept = first["latent"].clone(), second["latent"].clone()
    policy = torch.nn.Conv2d(4, 4, 1)
    for latent in (first["latent"], second["latent"]):
        policy.zero_grad()
        action = policy(latent[None])[0]
        action.sum().backward()
        assert policy.weight.grad.abs().max() > 0
    env.step(action)  # its gradient is not followed
    assert torch.equal(first["latent"], kept[0])
    assert torch.equal(second["latent"], kept[1])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_tensors_of_reset_episodes_can_be_learned_from(mode):
    envs = wrappers.vector.ToTorch(
        gymnasium.make_vec(RED, num_envs=2, discretization_steps=1, autoreset_mode=mode)
    )
    observations = [envs.reset(seed=0)[0]]
    observations += [envs.step(torch.zeros(2, 4, 8, 8))[0] for _ in range(3)]
    for observation in observations:
        policy = torch.nn.Conv2d(4, 4, 1)
        policy(observation["latent"]).sum().backward()
        assert policy.weight.grad.abs().max() > 0


def test_tensors_do_not_pass_by_what_changes_observations():
    env = gymnasium.make(RED, discretization_steps=1)
    changed = gymnasium.wrappers.TransformObservation(
        env, lambda observation: observation, env.observation_space
    )
    for wrapped in (changed, gymnasium.wrappers.FlattenObservation(env)):
        with pytest.raises(
            OptionError, match="changes observations, and ToTorch would pass them by"
        ):
            wrappers.ToTorch(wrapped)


def test_wrappers_of_other_environments_are_refused():
    other = gymnasium.make("CartPole-v1")
    sync = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(RED, discretization_steps=1)])
    for name in ("RewardScale", "TimeGrid", "ToTorch"):
        with pytest.raises(OptionError, match="expected a flowgym environment"):
            getattr(wrappers, name)(other, **KWARGS[name])
        with pytest.raises(OptionError, match="take or wrap the single environments"):
            getattr(wrappers.vector, name)(sync, **KWARGS[name])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.full((4, 8, 8), torch.nan, dtype=torch.bfloat16), "nan"),
        (torch.zeros(4, 8), r"shape \(4, 8\), expected \(4, 8, 8\)"),
        (torch.full((4, 8, 8), torch.nan), "nan"),
        (torch.zeros(4, 8, 8, dtype=torch.complex64), "dtype complex64"),
        (torch.zeros(4, 8, 8, dtype=torch.bool), "dtype bool"),
    ],
)
def test_bad_tensors_are_named(action, message):
    env = wrappers.ToTorch(gymnasium.make(RED, discretization_steps=1))
    env.reset(seed=0)
    with pytest.raises(ActionError, match=message):
        env.step(action)
    clipped, *_ = env.step(torch.full((4, 8, 8), 9.0))
    env.reset(seed=0)
    limit, *_ = env.step(torch.ones(4, 8, 8))
    assert torch.equal(clipped["latent"], limit["latent"])


def test_the_spec_of_tensors_makes_them_again():
    env = wrappers.ToTorch(gymnasium.make(RED, discretization_steps=2))
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, wrappers.ToTorch)
    assert torch.equal(env.reset(seed=3)[0]["latent"], again.reset(seed=3)[0]["latent"])
