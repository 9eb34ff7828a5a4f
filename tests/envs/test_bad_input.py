"""Whatever is put in, what comes out is a result or an error of this package, and the environment stays usable."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flowgym_gym.envs import DenoisingEnv, DenoisingVectorEnv
from flowgym_gym.errors import ActionError, FlowGymError, StateError, UnknownOptionError
from tests.conftest import FLOWGYM_IDS, RED

MIXTURE = {"base_model": "1d/gaussian_mixture", "reward": "1d/gaussian", "discretization_steps": 3}
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["velocity", "ddim", "euler", "leading", "float16", "cpu", "rgb_array", "tiny", "1d/binary"])
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
dtypes = st.sampled_from(
    [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64, "U3", "M8[s]"]
)


@st.composite
def arrays(draw, shape):
    """Arrays of any dtype, of the right shape more often than not."""
    dtype = np.dtype(draw(dtypes))
    return draw(hnp.arrays(dtype, draw(st.just(shape) | hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))))


def said(error):
    assert len(str(error)) > 10


def state_of(env):
    return {key: value.tobytes() for key, value in env.get_state().items()}


def check_step(env, action, shape):
    env.reset(seed=0)
    before = state_of(env)
    try:
        env.step(action)
    except ActionError:
        assert state_of(env) == before
        return False
    array = np.asarray(action)
    assert array.shape == shape
    assert array.dtype.kind in "fiu"
    assert np.isfinite(array).all()
    return True


@given(arrays((1,)) | anything)
@example(np.array([np.nan], np.float32))
@example(np.array([np.inf]))
@example(np.array([10**300], np.float64))
def test_any_action_is_taken_or_refused_by_name(action):
    check_step(DenoisingEnv(**MIXTURE), action, (1,))


@given(arrays((2, 1)) | anything)
def test_any_actions_are_taken_or_refused_by_name_in_a_vector(actions):
    check_step(DenoisingVectorEnv(2, **MIXTURE), actions, (2, 1))


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_every_id_takes_what_its_space_holds(id):
    env = gymnasium.make(id, discretization_steps=2, disable_env_checker=True).unwrapped
    for _ in range(3):
        assert check_step(env, env.action_space.sample(), env.action_space.shape)
        assert check_step(env, env.action_space.sample().tolist(), env.action_space.shape)


OPTIONS = (
    "discretization_steps", "action_type", "action_scale", "sampler", "noise_level", "noise_schedule", "spacing",
    "reward_scale", "control_cost_weight", "device", "dtype", "render_mode", "base_model", "reward",
    "base_model_kwargs", "reward_kwargs", "checkpoint", "prompts", "guidance_scale", "negative_prompt",
    "decode_batch_size",
)  # fmt: skip
PARTS = {
    "base_model_kwargs": ("means", "stds", "weights", "output_type", "schedule"),
    "reward_kwargs": ("mean", "std"),
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=60)
@given(value=anything)
@example(value=2**63)
@example(value=-1)
def test_any_value_of_any_option_makes_an_environment_or_a_named_error(name, value):
    stable_diffusion = {"reward": "images/red", "discretization_steps": 2}
    base = stable_diffusion if name in OPTIONS[16:] else MIXTURE
    try:
        env = DenoisingEnv(**{**base, name: value})
    except FlowGymError as error:
        said(error)
        return
    env.reset(seed=0)
    _, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert math.isfinite(reward)


@pytest.mark.parametrize(("part", "name"), [(part, name) for part in PARTS for name in PARTS[part]])
@settings(max_examples=60)
@given(value=anything)
def test_any_argument_of_a_model_or_reward_is_taken_or_named(part, name, value):
    try:
        env = DenoisingEnv(**MIXTURE, **{part: {name: value}})
    except FlowGymError as error:
        said(error)
        return
    env.reset(seed=0)


@given(
    st.text(min_size=1, max_size=12).filter(lambda name: name not in {*OPTIONS, *PARTS["base_model_kwargs"]}), anything
)
def test_an_option_that_does_not_exist_is_named(name, value):
    with pytest.raises((UnknownOptionError, TypeError)) as raised:
        DenoisingEnv(**MIXTURE, **{name: value})
    assert name in str(raised.value) or repr(name) in str(raised.value)


@pytest.mark.parametrize("make", [lambda **k: DenoisingEnv(**k), lambda **k: DenoisingVectorEnv(2, **k)])
@given(seed=anything, options=anything)
def test_any_seed_or_options_reset_or_are_named(make, seed, options):
    env = make(**MIXTURE)
    try:
        env.reset(seed=seed, options=options)
    except FlowGymError as error:
        said(error)
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, np.float32))


@given(num_envs=anything, mode=anything)
def test_any_number_of_environments_or_mode_is_taken_or_named(num_envs, mode):
    number = num_envs if not isinstance(num_envs, int) or abs(num_envs) < 100 else 3
    for options in ({"num_envs": number}, {"autoreset_mode": mode}):
        try:
            envs = DenoisingVectorEnv(**{"num_envs": 2, **options}, **MIXTURE)
        except FlowGymError as error:
            said(error)
            continue
        envs.reset(seed=0)


def real_state():
    env = DenoisingEnv(**MIXTURE)
    env.reset(seed=0)
    return env.get_state()


@given(st.data())
def test_any_change_of_a_state_is_a_state_or_a_named_error(data):
    """Keys of a real state that are missing or hold something else, and keys of others."""
    env = DenoisingEnv(**MIXTURE)
    env.reset(seed=1)
    before, state = state_of(env), real_state()
    for name in data.draw(st.sets(st.sampled_from(sorted(state)), min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            del state[name]
        else:
            state[name] = data.draw(anything | arrays(state[name].shape) | anything.map(lambda v: np.array(str(v))))
    state["kwargs/other"] = data.draw(arrays((1,)))
    try:
        env.set_state(state)
    except StateError as error:
        said(error)
        assert state_of(env) == before
    else:
        env.step(np.zeros(1, np.float32)) if not env.rollout.finished[0] and env.rollout.started[0] else env.reset()


@given(arrays((1,)).filter(lambda array: array.dtype.kind in "fiubc"))
def test_any_tensor_is_taken_or_refused_by_name(array):
    check_step(DenoisingEnv(**MIXTURE), torch.from_numpy(array), (1,))


def test_after_an_error_the_same_episode_goes_on():
    env, twin = (gymnasium.make(RED, discretization_steps=2, disable_env_checker=True) for _ in range(2))
    env.reset(seed=0), twin.reset(seed=0)
    for bad in (np.full((4, 8, 8), np.nan), np.zeros(3), "left", None):
        with pytest.raises(ActionError):
            env.step(bad)
    action = np.full((4, 8, 8), 0.25, np.float32)
    assert data_equivalence(env.step(action), twin.step(action), exact=True)
