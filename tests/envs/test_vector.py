"""The vector environment equals Gymnasium's SyncVectorEnv over the single one, step for step."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from flowgym_gym.envs import DenoisingVectorEnv
from flowgym_gym.errors import ActionError, ClosedEnvironmentError, ModelError, OptionError, ResetNeededError
from tests.conftest import FLOWGYM_IDS, PROMPTS, RED, prompted


def both(id=RED, n=3, mode=AutoresetMode.NEXT_STEP, **kwargs):
    kwargs = {"discretization_steps": 3, **kwargs}
    vector = gymnasium.make_vec(id, num_envs=n, autoreset_mode=mode, **kwargs)
    sync = SyncVectorEnv([lambda: gymnasium.make(id, **kwargs)] * n, autoreset_mode=mode)
    return vector, sync


def assert_same(mine, theirs, path="result"):
    """Equal structure, masks, dtypes and shapes; floats to the rounding of a batched network call."""
    assert type(mine) is type(theirs), path
    if isinstance(mine, dict):
        assert set(mine) == set(theirs), path
        for key in mine:
            assert_same(mine[key], theirs[key], f"{path}[{key!r}]")
    elif isinstance(mine, tuple):
        assert len(mine) == len(theirs), path
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(mine, np.ndarray):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), path
        if mine.dtype == object:
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                assert_same(a, b, f"{path}[{i}]")
        elif mine.dtype.kind == "f":
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4, err_msg=path)
        else:
            np.testing.assert_array_equal(mine, theirs, err_msg=path)
    else:
        assert mine == theirs, path


def actions_of(vector, seed):
    vector.action_space.seed(seed)
    while True:
        yield vector.action_space.sample()


@pytest.mark.parametrize("id", FLOWGYM_IDS)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_equals_sync_vector_env_through_autoresets(id, mode):
    vector, sync = both(id, mode=mode, **prompted(id))
    assert vector.observation_space == sync.observation_space
    assert vector.action_space == sync.action_space
    assert_same(vector.reset(seed=7), sync.reset(seed=7))
    for action, _ in zip(actions_of(vector, 0), range(9), strict=False):
        assert_same(vector.step(action), sync.step(action))


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
                vector.reset(options={"reset_mask": done.copy()}), sync.reset(options={"reset_mask": done.copy()})
            )


@pytest.mark.parametrize("seed", [4, [9, 2, 5]])
def test_seeds_reach_each_sub_environment(seed):
    vector, sync = both()
    assert_same(vector.reset(seed=seed), sync.reset(seed=seed))
    seeds = seed if isinstance(seed, list) else [seed + i for i in range(3)]
    single = gymnasium.make(RED, discretization_steps=3)
    vector.reset(seed=seed)
    batch = vector.step(np.zeros((3, 4, 8, 8), np.float32))[0]["latent"]
    for i, own in enumerate(seeds):
        single.reset(seed=own)
        np.testing.assert_allclose(single.step(np.zeros((4, 8, 8), np.float32))[0]["latent"], batch[i], atol=1e-5)


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
    handle = model.unet.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
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
    [({"num_envs": 0}, "num_envs is 0"), ({"autoreset_mode": "never"}, "autoreset_mode is 'never'")],
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
