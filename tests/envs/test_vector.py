"""The vector environment equals Gymnasium's SyncVectorEnv over the single one, step for step."""

import gc
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from flowgym_gym import FlowTensor, Reward
from flowgym_gym.envs import DenoisingVectorEnv, check_vector_env
from flowgym_gym.envs.checker import difference
from flowgym_gym.errors import (
    ActionError,
    ClosedEnvironmentError,
    ModelError,
    OptionError,
    ResetNeededError,
    RewardError,
)
from tests.conftest import PROMPTS, RED


def both(id=RED, n=3, mode=AutoresetMode.NEXT_STEP, **kwargs):
    kwargs = {"discretization_steps": 3, **kwargs}
    vector = gymnasium.make_vec(id, num_envs=n, autoreset_mode=mode, **kwargs)
    sync = SyncVectorEnv([lambda: gymnasium.make(id, **kwargs)] * n, autoreset_mode=mode)
    return vector, sync


def assert_same(mine, theirs):
    """Equal structure, masks, dtypes and shapes; floats to the rounding of a batched network call."""
    assert difference(mine, theirs, tolerance=1e-4) is None


def actions_of(vector, seed):
    vector.action_space.seed(seed)
    while True:
        yield vector.action_space.sample()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_equals_sync_vector_env_with_partial_resets_at_different_times(mode):
    vector, sync = both(mode=mode, prompts=PROMPTS)
    vector.reset(seed=1), sync.reset(seed=1)
    actions = actions_of(vector, 1)
    action = next(actions)
    assert_same(vector.step(action), sync.step(action))
    mask = np.array([False, True, False])
    for seed in (None, [5, 6, None]):
        assert_same(
            vector.reset(seed=seed, options={"reset_mask": mask.copy()}),
            sync.reset(seed=seed, options={"reset_mask": mask.copy()}),
        )
    for _ in range(8):
        action = next(actions)
        mine, theirs = vector.step(action), sync.step(action)
        assert_same(mine, theirs)
        done = mine[2]
        if mode is AutoresetMode.DISABLED and done.any():
            assert_same(
                vector.reset(options={"reset_mask": done.copy()}),
                sync.reset(options={"reset_mask": done.copy()}),
            )


@pytest.mark.parametrize("seed", [4, [9, 2, 5], np.int64(4), np.array([9, 2, 5])], ids=str)
def test_seeds_reach_each_sub_environment(seed):
    vector, sync = both()
    plain = [int(s) for s in seed] if np.ndim(seed) else int(seed)
    assert_same(vector.reset(seed=seed), sync.reset(seed=plain))
    seeds = [int(s) for s in seed] if np.ndim(seed) else [int(seed) + i for i in range(3)]
    single = gymnasium.make(RED, discretization_steps=3)
    vector.reset(seed=seed)
    batch = vector.step(np.zeros((3, 4, 8, 8), np.float32))[0]["latent"]
    for i, own in enumerate(seeds):
        single.reset(seed=own)
        np.testing.assert_allclose(
            single.step(np.zeros((4, 8, 8), np.float32))[0]["latent"], batch[i], atol=1e-5
        )


def test_a_sub_environment_does_not_depend_on_the_size_of_the_batch():
    finals = []
    for n in (1, 2, 5):
        vector = gymnasium.make_vec(RED, num_envs=n, discretization_steps=3)
        vector.reset(seed=3)
        for _ in range(3):
            observation, reward, *_ = vector.step(np.full((n, 4, 8, 8), 0.4, np.float32))
        finals.append((observation["latent"][0], reward[0]))
    for latent, reward in finals[1:]:
        np.testing.assert_allclose(latent, finals[0][0], atol=1e-4)
        assert reward == pytest.approx(finals[0][1], abs=1e-3)


def test_one_network_call_serves_all_sub_environments_at_different_times(model):
    vector = gymnasium.make_vec(RED, num_envs=4, discretization_steps=5, guidance_scale=3.0)
    vector.reset(seed=0)
    vector.step(np.zeros((4, 4, 8, 8), np.float32))
    vector.reset(options={"reset_mask": np.array([True, False, True, False])})
    batches = []
    handle = model.unet.register_forward_hook(
        lambda module, args, output: batches.append(len(args[0]))
    )
    try:
        vector.step(np.zeros((4, 4, 8, 8), np.float32))
    finally:
        handle.remove()
    assert batches == [8]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_mode_is_announced_and_taken_by_value(mode):
    vector = gymnasium.make_vec(RED, num_envs=2, discretization_steps=1, autoreset_mode=mode.value)
    assert vector.metadata["autoreset_mode"] is mode
    assert vector.autoreset_mode is mode
    assert DenoisingVectorEnv.metadata.get("autoreset_mode") is None
    copy = gymnasium.make_vec(gymnasium.envs.registration.EnvSpec.from_json(vector.spec.to_json()))
    assert (copy.num_envs, copy.autoreset_mode) == (2, mode)
    by_member = gymnasium.make_vec(RED, num_envs=2, discretization_steps=1, autoreset_mode=mode)
    assert by_member.spec.to_json() == vector.spec.to_json()


def test_disabled_autoreset_asks_for_a_reset():
    vector = gymnasium.make_vec(RED, num_envs=2, discretization_steps=1, autoreset_mode="Disabled")
    action = np.zeros((2, 4, 8, 8), np.float32)
    with pytest.raises(ResetNeededError, match="sub-environment 0 has no episode"):
        vector.step(action)
    vector.reset(seed=0)
    vector.step(action)
    with pytest.raises(ResetNeededError, match="sub-environment 0 is over"):
        vector.step(action)


def test_bad_actions_name_the_sub_environment_and_change_nothing():
    vector, sync = both()
    vector.reset(seed=0), sync.reset(seed=0)
    bad = np.zeros((3, 4, 8, 8), np.float32)
    bad[2, 1, 0, 0] = np.nan
    with pytest.raises(ActionError, match="sub-environment 2 is nan"):
        vector.step(bad)
    with pytest.raises(ActionError, match=r"shape \(2, 4, 8, 8\), expected \(3, 4, 8, 8\)"):
        vector.step(bad[:2])
    good = np.zeros((3, 4, 8, 8), np.float32)
    assert_same(vector.step(good), sync.step(good))


def test_a_model_that_returns_nan_names_the_sub_environment(model):
    vector = gymnasium.make_vec(RED, num_envs=3, discretization_steps=2)
    vector.reset(seed=0)

    def poison(module, args, output):
        output = output[0].clone()
        output[1] = torch.nan
        return (output,)

    handle = model.unet.register_forward_hook(poison)
    with pytest.raises(ModelError, match="sub-environment 1 at step 0"):
        vector.step(np.zeros((3, 4, 8, 8), np.float32))
    handle.remove()
    vector.reset(seed=0)
    vector.step(np.zeros((3, 4, 8, 8), np.float32))


class Late(Reward[FlowTensor]):
    """Goes wrong for the second sample that it ever scores."""

    def __init__(self, how):
        super().__init__()
        self.how, self.scored = how, 0

    def forward(self, x, **kwargs):
        rewards, valids = torch.zeros(len(x)), torch.ones(len(x))
        if self.scored == 0:
            rewards[1] = torch.nan
        self.scored += len(x)
        if self.how == "shape":
            return rewards[:1], valids
        if self.how == "raises":
            raise ZeroDivisionError("nothing to divide by")
        return rewards, valids


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "nan",
            r"Late.forward returned nan for sample 1 of 2 in sub-environment 3; reset to go on \(over in sub-env",
        ),
        ("shape", r"shape \(1,\), expected .* in sub-environments 1, 3"),
        ("raises", r"Late raised ZeroDivisionError: nothing to divide by in sub-environments 1, 3"),
    ],
)
def test_a_reward_that_fails_names_the_sub_environments_and_a_reset_goes_on(how, message):
    vector = gymnasium.make_vec(RED, num_envs=4, discretization_steps=2, autoreset_mode="Disabled")
    action = np.zeros((4, 4, 8, 8), np.float32)
    vector.reset(seed=0)
    vector.step(action)
    vector.reset(options={"reset_mask": np.array([True, False, True, False])})
    environment = vector.environment
    reward, environment.reward = environment.reward, Late(how)
    with pytest.raises(RewardError, match=message):
        vector.step(action)
    environment.reward = reward
    # Those that should have been scored are over, whether it was their reward that failed or not.
    vector.reset(options={"reset_mask": np.array([False, False, False, True])})
    with pytest.raises(ResetNeededError, match="sub-environment 1 is over"):
        vector.step(action)
    vector.reset(options={"reset_mask": np.array([False, True, False, False])})
    vector.step(action)
    vector.reset(seed=0)
    vector.step(action)
    assert vector.step(action)[2].all()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_after_a_reward_that_fails_a_step_goes_on(mode):
    vector = gymnasium.make_vec(RED, num_envs=2, discretization_steps=1, autoreset_mode=mode)
    vector.reset(seed=0)
    environment = vector.environment
    reward, environment.reward = environment.reward, Late("nan")
    action = np.zeros((2, 4, 8, 8), np.float32)
    with pytest.raises(RewardError):
        vector.step(action)
    environment.reward = reward
    _, _, terminated, _, infos = vector.step(action)  # a reset, as after any end
    assert not terminated.any()
    assert "prompt" in infos
    assert vector.step(action)[2].all()


def test_actions_of_ended_episodes_are_not_looked_at():
    vector, sync = both(n=2)
    for envs in (vector, sync):
        envs.reset(seed=0)
        envs.step(np.zeros((2, 4, 8, 8), np.float32))
        envs.reset(seed=[1, 2], options={"reset_mask": np.array([True, False])})
        for _ in range(2):
            envs.step(np.zeros((2, 4, 8, 8), np.float32))
    action = np.zeros((2, 4, 8, 8), np.float32)
    action[1] = np.nan
    assert_same(vector.step(action), sync.step(action))
    with pytest.raises(ActionError, match="sub-environment 1 is nan"):
        vector.step(action)


def test_async_vector_env_equals_sync_vector_env():
    makers = [
        lambda: gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", discretization_steps=3)
    ] * 2
    envs = AsyncVectorEnv(makers)
    try:
        check_vector_env(envs, makers[0], episodes=1, tolerance=0.0)
    finally:
        envs.close()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.second)])
def test_async_vector_env_runs_the_network_in_its_processes(context):
    """Torch's threads do not survive a fork: the children must not wait for them."""
    kwargs = {"discretization_steps": 2, "prompts": PROMPTS}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    single = gymnasium.make(RED, **kwargs)
    single.reset(seed=1)
    single.step(np.zeros((4, 8, 8), np.float32))  # the parent's threads are up
    # A spawned process has imported nothing: the id's prefix does.
    envs = AsyncVectorEnv(
        [lambda: gymnasium.make(f"flowgym_gym:{RED}", **kwargs)] * 2, context=context
    )
    sync = SyncVectorEnv([lambda: gymnasium.make(RED, **kwargs)] * 2)
    try:
        assert_same(envs.reset(seed=0), sync.reset(seed=0))
        for _ in range(3):
            action = np.full((2, 4, 8, 8), 0.5, np.float32)
            envs.step_async(action)
            assert_same(envs.step_wait(timeout=60), sync.step(action))
    finally:
        envs.close(terminate=True)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.reset(seed=[1, 2]), "list of 2"),
        (lambda v: v.reset(options={"reset_mask": [True, False, True]}), "reset_mask"),
        (lambda v: v.reset(options={"reset_mask": np.array([True])}), "reset_mask"),
        (lambda v: v.reset(options={"reset_mask": np.zeros(3, bool)}), "at least one True"),
    ],
)
def test_bad_resets_are_named(call, message):
    vector = gymnasium.make_vec(RED, num_envs=3, discretization_steps=2)
    with pytest.raises(OptionError, match=message):
        call(vector)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"autoreset_mode": "never"}, "autoreset_mode is 'never'"),
    ],
)
def test_bad_vector_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        DenoisingVectorEnv(**options)


def test_returned_arrays_are_not_shared_between_steps():
    vector = gymnasium.make_vec(RED, num_envs=2, discretization_steps=3)
    first, _ = vector.reset(seed=0)
    kept = {key: value.copy() for key, value in first.items()}
    vector.step(np.ones((2, 4, 8, 8), np.float32))
    assert data_equivalence(first, kept, exact=True)


def test_renders_every_sub_environment():
    vector, sync = both(render_mode="rgb_array")
    vector.reset(seed=0), sync.reset(seed=0)
    for mine, theirs in zip(vector.render(), sync.render(), strict=True):
        assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1


def test_closing_twice_is_fine_and_stepping_afterwards_is_not():
    vector = gymnasium.make_vec(RED, num_envs=2, discretization_steps=1)
    vector.reset(seed=0)
    vector.close()
    vector.close()
    with pytest.raises(ClosedEnvironmentError):
        vector.step(np.zeros((2, 4, 8, 8), np.float32))


def test_an_environment_that_cannot_be_made_raises_one_error(monkeypatch):
    others = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)

    def make():
        with pytest.raises(OptionError):
            gymnasium.make_vec(RED, num_envs=2, discretization_steps=-1)

    make()
    gc.collect()
    assert not others
