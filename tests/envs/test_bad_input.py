"""Whatever is put in, what comes out is a result or an error of this package, and the environment
stays usable.
"""

import math
from copy import copy
from decimal import Decimal
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flowgym_gym
from flowgym_gym import (
    BaseModel,
    FlowTensor,
    OptimalTransportScheduler,
    Reward,
    base_model_registry,
    reward_registry,
)
from flowgym_gym.envs import DenoisingEnv, DenoisingVectorEnv, VelocityEnvironment
from flowgym_gym.envs.rollout import Rollout
from flowgym_gym.errors import (
    ActionError,
    FlowGymError,
    ModelError,
    OptionError,
    RewardError,
    StateError,
    UnknownOptionError,
)
from flowgym_gym.models.loading import load_base_model
from flowgym_gym.registry import RegistryEntry
from flowgym_gym.wrappers import RewardScale
from flowgym_gym.wrappers.vector import RewardScale as VectorRewardScale
from tests.conftest import FLOWGYM_IDS, RED

MIXTURE = {"base_model": "1d/gaussian_mixture", "reward": "1d/gaussian", "discretization_steps": 3}
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["velocity", "ddim", "euler", "leading", "float16", "cpu", "rgb_array", "tiny", "1d/binary"]
    )
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
dtypes = st.sampled_from(
    [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64, "U3", "M8[s]"]
)


@st.composite
def arrays(draw, shape):
    """Arrays of any dtype, of the right shape more often than not."""
    dtype = np.dtype(draw(dtypes))
    return draw(
        hnp.arrays(
            dtype, draw(st.just(shape) | hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
        )
    )


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
    st.text(min_size=1, max_size=12).filter(
        lambda name: name not in {*OPTIONS, *PARTS["base_model_kwargs"]}
    ),
    anything,
)
def test_an_option_that_does_not_exist_is_named(name, value):
    with pytest.raises((UnknownOptionError, TypeError)) as raised:
        DenoisingEnv(**MIXTURE, **{name: value})
    assert name in str(raised.value) or repr(name) in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", **options),
        lambda **options: gymnasium.make_vec("flowgym/GaussianMixture-Gaussian-v0", 2, **options),
        lambda **options: DenoisingEnv(**MIXTURE, **options),
        lambda **options: DenoisingVectorEnv(2, **MIXTURE, **options),
        lambda **options: flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", **options),
        lambda **options: DenoisingEnv(**MIXTURE, base_model_kwargs=options),
        lambda **options: DenoisingEnv(**MIXTURE, reward_kwargs=options),
        lambda **options: base_model_registry.get("1d/gaussian_mixture").instantiate(**options),
        lambda **options: reward_registry.get("1d/gaussian").instantiate(**options),
    ],
)
def test_an_option_that_does_not_exist_is_named_in_pythons_own_words_too(make):
    """TorchRL gives every environment a ``frameskip``, and leaves it out where it reads these."""
    with pytest.raises(TypeError) as raised:
        make(frameskip=1)
    assert "no option 'frameskip'" in str(raised.value)
    assert "unexpected keyword argument 'frameskip'" in str(raised.value)


@pytest.mark.parametrize(
    "make", [lambda **k: DenoisingEnv(**k), lambda **k: DenoisingVectorEnv(2, **k)]
)
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
            state[name] = data.draw(
                anything | arrays(state[name].shape) | anything.map(lambda v: np.array(str(v)))
            )
    state["kwargs/other"] = data.draw(arrays((1,)))
    try:
        env.set_state(state)
    except StateError as error:
        said(error)
        assert state_of(env) == before
    else:
        env.step(np.zeros(1, np.float32)) if not env.rollout.finished[0] and env.rollout.started[
            0
        ] else env.reset()


@given(arrays((1,)).filter(lambda array: array.dtype.kind in "fiubc"))
def test_any_tensor_is_taken_or_refused_by_name(array):
    check_step(DenoisingEnv(**MIXTURE), torch.from_numpy(array), (1,))


def test_after_an_error_the_same_episode_goes_on():
    env, twin = (
        gymnasium.make(RED, discretization_steps=2, disable_env_checker=True) for _ in range(2)
    )
    env.reset(seed=0), twin.reset(seed=0)
    for bad in (np.full((4, 8, 8), np.nan), np.zeros(3), "left", None):
        with pytest.raises(ActionError):
            env.step(bad)
    action = np.full((4, 8, 8), 0.25, np.float32)
    assert data_equivalence(env.step(action), twin.step(action), exact=True)


class Tame(BaseModel):
    """A model of three channels that does what it should."""

    output_type = "velocity"

    def __init__(self):
        super().__init__()
        self.prompts = ["one", "two"]

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 3, 2, 2)), {"prompt": ["one"] * n, **kwargs}

    def forward(self, x, t, **kwargs):
        return -x

    def embed_prompts(self, prompts):
        return torch.ones(len(prompts), 4)


class Mean(Reward):
    def forward(self, x, **kwargs):
        return x.data.flatten(1).mean(1), torch.ones(len(x))


def whole_episodes(model, reward=None):
    """Everything that an environment does with its model and reward."""
    environment = VelocityEnvironment(model, reward or Mean(), 2)
    rollout = Rollout(environment, 2)
    rollout.seed([0, 1], [0, 1])
    rollout.reset([0, 1])
    rollout.frames()
    for _ in range(2):
        rollout.step(np.zeros((2, 3, 2, 2), np.float32), [0, 1])
    environment.sample(2)


GREY = FlowTensor(torch.zeros(2, 1, 2, 2))
META = torch.zeros(2, 3, 2, 2, device="meta")
COMPLEX = torch.zeros(2, 3, 2, 2, dtype=torch.complex64)
SPARSE = torch.zeros(2, 3, 2, 2).to_sparse()
NO_TENSORS = (
    None,
    5,
    "text",
    [],
    {},
    torch.zeros(2, 3, 2, 2),
    (FlowTensor(torch.zeros(2, 3, 2, 2)),),
)
NO_STATES = (*NO_TENSORS, GREY, *map(FlowTensor, (META, COMPLEX, SPARSE, torch.zeros(3, 3, 2, 2))))
BAD_ANSWERS = {
    "scheduler": (None, 5, "cosine", OptimalTransportScheduler),
    "output_type": (None, 5, ["velocity"], "velocities"),
    "device": (None, "cpu", 5),
    "prompts": (5, "a cat", [], [None, "a"], [5], {"a": 1}),
    "preprocess": (*NO_TENSORS, (None, {}), (GREY, {}), (FlowTensor(META), {}), (FlowTensor(COMPLEX), {})),
    "sample_p0": (*NO_TENSORS, (None, {}), (GREY, None), (GREY[0], {})),
    "forward": (*NO_STATES, FlowTensor(torch.zeros(2, 3, 2, 2, dtype=torch.int64))),
    "postprocess": (*NO_TENSORS, *map(FlowTensor, (META, COMPLEX, SPARSE, torch.zeros(3, 3, 2, 2)))),
    "embed_prompts": (None, 5, "text", [1.0], GREY, torch.zeros(2), torch.zeros(3, 4), torch.full((1, 4), torch.nan),
                      torch.zeros(1, 0), torch.zeros(1, 4, dtype=torch.complex64), torch.zeros(1, 4, device="meta")),
    "picture": (None, 5, GREY, torch.zeros(2, 1, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4), META, COMPLEX,
                torch.full((2, 3, 4, 4), torch.nan), torch.full((2, 3, 4, 4), 255.0), torch.zeros(2, 3, 4, 4).int()),
}  # fmt: skip
ATTRIBUTES = ("scheduler", "output_type", "device", "prompts")


@pytest.mark.parametrize(
    ("method", "answer"), [(name, bad) for name, all in BAD_ANSWERS.items() for bad in all]
)
def test_what_a_model_returns_is_right_or_named_with_its_method(method, answer):
    value = answer if method in ATTRIBUTES else lambda self, *args, **kwargs: answer
    if method in ("prompts", "device"):  # which __init__ sets
        value = property(lambda self: answer, lambda self, value: None)
    model = type("Tame", (Tame,), {method: value})()
    with pytest.raises((ModelError, OptionError), match=f"Tame.{method}|{method} of Tame"):
        whole_episodes(model)


def test_a_model_and_a_reward_that_do_as_they_should_play_whole_episodes():
    whole_episodes(Tame())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"prompt": ["one"]},
        {"prompt": ["one"] * 3},
        {"c": torch.zeros(3)},
        {"d": {"e": [1]}},
        {5: [1, 2]},
    ],
)
def test_arguments_of_a_model_have_one_entry_per_state(kwargs):
    model = type("Tame", (Tame,), {"preprocess": lambda self, x, **_: (x, kwargs)})()
    with pytest.raises(ModelError, match=r"Tame.preprocess returned .*expected"):
        VelocityEnvironment(model, Mean(), 2).sample(2)


def test_arguments_of_a_model_are_not_called_what_forward_calls_its_own():
    model = type("Tame", (Tame,), {"preprocess": lambda self, x, **_: (x, {"t": [1] * len(x)})})()
    with pytest.raises(ModelError, match=r"Tame.preprocess returned an argument 't'.*rename"):
        whole_episodes(model)


def test_the_smallest_number_formats_are_read_and_too_large_numbers_are_not():
    """float8 has neither isfinite nor clamp; float64 beyond float32 would become infinite."""
    small, large = torch.float8_e4m3fn, lambda x: x.double() * 1e200
    methods = {
        "preprocess": lambda self, x, **kwargs: (FlowTensor(x.data.to(small)), kwargs),
        "picture": lambda self, x: torch.full((2, 3, 4, 4), 0.5).to(small),
    }
    whole_episodes(type("Small", (Tame,), methods)())
    vast = type(
        "Vast",
        (Tame,),
        {"preprocess": lambda self, x, **kwargs: (FlowTensor(large(x.data)), kwargs)},
    )()
    with pytest.raises(
        ModelError, match=r"Vast.preprocess returned states that hold NaN or infinity"
    ):
        whole_episodes(vast)


@pytest.mark.parametrize("value", [torch.zeros(1, device="meta"), torch.zeros(1).to_sparse()])
def test_arguments_that_no_array_holds_are_named_by_get_state(value):
    model = type("Tame", (Tame,), {"preprocess": lambda self, x, **_: (x, {"extra": value})})()
    rollout = Rollout(VelocityEnvironment(model, Mean(), 2), 1)
    rollout.reset([0])
    with pytest.raises(StateError, match="kwargs/extra is a tensor"):
        rollout.get_state()


def test_one_channel_is_never_spread_over_three():
    """Neither the states that a model starts from, nor what it draws."""
    grey = type(
        "Grey",
        (Tame,),
        {"preprocess": lambda self, x, **kwargs: (FlowTensor(x.data[:, :1]), kwargs)},
    )()
    with pytest.raises(
        ModelError, match=r"Grey.preprocess returned .*\(1, 1, 2, 2\).*expected .*\(1, 3, 2, 2\)"
    ):
        whole_episodes(grey)


@pytest.mark.parametrize("coefficient", ["_alpha", "_alpha_dot", "_beta", "_beta_dot", "_sigma"])
@pytest.mark.parametrize(
    "answer", [None, 1.0, torch.zeros(7), torch.zeros(3, dtype=torch.complex64)]
)
def test_what_a_schedule_returns_is_named(coefficient, answer):
    schedule = type("Mine", (OptimalTransportScheduler,), {coefficient: lambda self, t: answer})()
    with pytest.raises(ModelError, match=f"Mine.{coefficient} returned"):
        VelocityEnvironment(type("Tame", (Tame,), {"scheduler": schedule})(), Mean(), 2)


ONES = torch.ones(2)


@pytest.mark.parametrize(
    "answer",
    [
        None, 5, ONES, (ONES,), (ONES, ONES, ONES), [ONES, ONES], (None, ONES), (ONES, None), (ONES[:1], ONES),
        (ONES, ONES[:1]), (ONES[:, None], ONES), (torch.ones(()), ONES), (ONES * torch.nan, ONES), (ONES / 0, ONES),
        (ONES.to(torch.complex64), ONES), (ONES, ONES.to(torch.complex64)), (ONES, ONES * torch.nan), (ONES, -ONES),
        (ONES, 2 * ONES), (ONES, 0.5 * ONES), (torch.ones(2, device="meta"), ONES), (ONES.to_sparse(), ONES),
        (ONES, ONES.to_sparse()), ("ab", ONES), ([1.0, 1.0], ONES),
    ],
)  # fmt: skip
def test_what_a_reward_returns_is_right_or_named(answer):
    reward = type("Mine", (Reward,), {"forward": lambda self, x, **kwargs: answer})()
    with pytest.raises(RewardError, match=r"Mine.forward returned .*"):
        whole_episodes(Tame(), reward)


@pytest.mark.parametrize(
    ("rewards", "paid"),
    [
        (torch.tensor([2**24 + 1, 3]), [2.0**24 + 1, 3.0]),
        (torch.tensor([True, False]), [1.0, 0.0]),
        (torch.ones(2, dtype=torch.float64, requires_grad=True), [1.0, 1.0]),
        (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]),
    ],
)
@pytest.mark.parametrize(
    "valids", [torch.tensor([1, 0]), torch.tensor([1.0, 0.0]), torch.tensor([True, False])]
)
def test_rewards_keep_their_numbers_whatever_their_type(rewards, paid, valids):
    reward = type("Mine", (Reward,), {"forward": lambda self, x, **kwargs: (rewards, valids)})()
    rollout = Rollout(VelocityEnvironment(Tame(), reward, 1), 2)
    rollout.reset([0, 1])
    outcome = rollout.step(np.zeros((2, 3, 2, 2), np.float32), [0, 1])
    assert outcome.terminal_rewards.tolist() == paid
    assert outcome.valids.tolist() == [True, False]


@pytest.mark.parametrize(
    "method", ["sample_p0", "preprocess", "forward", "postprocess", "embed_prompts", "picture"]
)
def test_what_a_model_raises_itself_comes_as_it_is(method):
    class MineError(Exception):
        pass

    def fail(self, *args, **kwargs):
        raise MineError(method)

    with pytest.raises(MineError, match=method):
        whole_episodes(type("Tame", (Tame,), {method: fail})())


def test_after_a_wrong_answer_at_the_end_of_an_episode_the_step_can_be_taken_again():
    envs = DenoisingVectorEnv(2, **MIXTURE)
    envs.reset(seed=0)
    model = copy(envs.environment.base_model)
    model.postprocess = lambda x: None
    envs.environment.base_model, sound = model, envs.environment.base_model
    envs.step(np.zeros((2, 1), np.float32)), envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(ModelError, match="postprocess returned None"):
        envs.step(np.zeros((2, 1), np.float32))
    envs.environment.base_model = sound
    _, _, terminations, *_ = envs.step(np.zeros((2, 1), np.float32))
    assert terminations.all()


class Strange:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "action",
    [
        torch.zeros(1, device="meta"), torch.zeros(1).to_sparse(), torch.zeros(1, dtype=torch.complex64),
        torch.zeros(1, dtype=torch.bool), torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8),
        torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged), torch.zeros(()), torch.zeros(2), "0.5",
        ["0.5"], b"1", None, {}, {"a": 1}, {0.5}, [None], [[1], [1, 2]], Strange(), [Strange()], object(), lambda: 0,
        np.ma.array([1.0], mask=[True]), np.array(["0.5"]), np.array([None]), np.array([0.5 + 0j]),
        [Fraction(1, 2)], [Decimal("0.5")], [torch.zeros(1, device="meta")], ["x" * 10**6], 10**400, [10**400],
        np.zeros(1, [("a", float)]), np.array(["2020"], "M8[Y]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_no_action_is_named_and_changes_nothing(action, number):
    env = DenoisingEnv(**MIXTURE) if number == 1 else DenoisingVectorEnv(2, **MIXTURE)
    env.reset(seed=0)
    before = state_of(env)
    with pytest.raises(ActionError) as raised:
        env.step(action)
    assert 10 < len(str(raised.value)) < 1000
    assert state_of(env) == before


@pytest.mark.parametrize(
    "action",
    [torch.full((1,), 0.5, requires_grad=True), torch.tensor([0.5], dtype=torch.float8_e4m3fn), [0.5],
     np.array([0.5], np.float16), torch.tensor([0.5], dtype=torch.float64), [np.float32(0.5)], [torch.tensor(0.5)]],
)  # fmt: skip
def test_real_numbers_of_any_type_are_the_same_action(action):
    envs = [DenoisingEnv(**MIXTURE) for _ in range(2)]
    for env in envs:
        env.reset(seed=0)
    assert data_equivalence(
        envs[0].step(action), envs[1].step(np.array([0.5], np.float32)), exact=True
    )


@pytest.mark.parametrize(
    "answer", [torch.zeros(2, 3, 2, 2, dtype=torch.complex64), META, SPARSE, True, "left", None]
)
def test_what_a_policy_returns_is_numbers_or_named(answer):
    with pytest.raises(ActionError, match="the policy returned"):
        VelocityEnvironment(Tame(), Mean(), 2).sample(2, lambda x, t, **kwargs: answer)


def test_a_policy_whose_costs_are_infinite_is_named():
    env = VelocityEnvironment(Tame(), Mean(), 2, action_scale=1e15)
    with pytest.raises(ActionError, match="control cost is infinite"):
        env.sample(2, lambda x, t, **kwargs: 1e10)


@pytest.mark.parametrize("action_type", ["velocity", "noise", "control"])
@pytest.mark.parametrize("noise_level", [0.0, 1e-6, 1.0])
def test_every_scale_pays_finite_rewards_or_is_refused(action_type, noise_level):
    refused = []
    for exponent in range(10, 310, 20):
        for options in ({"action_scale": 10.0**exponent}, {"control_cost_weight": 10.0**exponent}):
            try:
                env = DenoisingEnv(
                    **MIXTURE,
                    action_type=action_type,
                    noise_level=noise_level,
                    schedule="diffusion",
                    **options,
                )
            except OptionError as error:
                said(error)
                refused.append((*options, exponent))
                continue
            env.reset(seed=0)
            _, reward, *_, info = env.step(np.ones(1, np.float32))
            assert np.isfinite(np.float32(reward))
            assert np.isfinite(info["control_cost"])
    assert {("action_scale", 30), ("control_cost_weight", 50)} <= set(refused)
    assert ("action_scale", 10) not in refused


@pytest.mark.parametrize(
    "scale", [1e39, 1e300, -1e300, 10**400, complex(1), Fraction(1), Decimal(1), "1.0", True, None]
)
def test_a_reward_scale_beyond_float32_or_no_number_is_refused(scale):
    with pytest.raises(OptionError, match="reward_scale is"):
        DenoisingEnv(**MIXTURE, reward_scale=scale)
    for wrap in (RewardScale, VectorRewardScale):
        env = DenoisingEnv(**MIXTURE) if wrap is RewardScale else DenoisingVectorEnv(2, **MIXTURE)
        with pytest.raises(OptionError, match="scale is"):
            wrap(env, scale)


def test_a_reward_that_its_scale_makes_infinite_is_named():
    reward = type("Mine", (Reward,), {"forward": lambda self, x, **kwargs: (1e30 * ONES, ONES)})()
    rollout = Rollout(VelocityEnvironment(Tame(), reward, 1, reward_scale=1e10), 2)
    rollout.reset([0, 1])
    with pytest.raises(
        RewardError,
        match=r"Mine returned 1e\+30, which times reward_scale 1e\+10 is beyond float32",
    ):
        rollout.step(np.zeros((2, 3, 2, 2), np.float32), [0, 1])


STABLE = {
    "base_model": "images/stable_diffusion",
    "reward": "images/red",
    "discretization_steps": 2,
}


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({**MIXTURE, "reward_kwargs": {"id": "1d/binary"}}, "reward is '1d/gaussian'", "reward_kwargs has 'id'"),
        ({**MIXTURE, "base_model_kwargs": {"id": "1d/other"}}, "base_model is '1d/gauss", "base_model_kwargs has 'id'"),
        ({**MIXTURE, "device": "cpu", "base_model_kwargs": {"device": "meta"}}, "device is", "'device': 'meta'"),
        ({**STABLE, "dtype": "float32", "base_model_kwargs": {"dtype": "float16"}}, "dtype is", "'dtype': 'float16'"),
        ({**STABLE, "prompts": "a", "base_model_kwargs": {"prompts": "b"}}, "prompts is 'a'", "'prompts': 'b'"),
        ({**STABLE, "checkpoint": "tiny", "base_model_kwargs": {"checkpoint": "x"}}, "checkpoint is", "'checkpoint'"),
        ({**STABLE, "prompts": None, "base_model_kwargs": {"prompts": "b"}}, "prompts is None", "'prompts': 'b'"),
        ({**MIXTURE, "means": [[1.0]], "base_model_kwargs": {"means": [[2.0]]}}, "means is", "'means'"),
        (
            {**STABLE, "reward": "images/weighted_sum", "reward_kwargs": {
                "weights": {"images/red": 1}, "reward_kwargs": {"images/red": {"id": "images/redness"}}}},
            "reward's id is 'images/red'", "'id': 'images/redness'",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_named_with_both_places(options, first, second):
    with pytest.raises(OptionError) as raised:
        DenoisingEnv(**options)
    assert first in str(raised.value)
    assert second in str(raised.value)


def test_what_is_given_once_may_be_given_in_either_place():
    direct = DenoisingEnv(**STABLE, prompts="a", device="cpu", dtype="bfloat16").environment
    inside = DenoisingEnv(
        **STABLE, base_model_kwargs={"prompts": "a", "device": "cpu", "dtype": "bfloat16"}
    ).environment
    assert direct.base_model.prompts == inside.base_model.prompts == ["a"]
    assert direct.base_model.denoiser_dtype is inside.base_model.denoiser_dtype is torch.bfloat16


@pytest.mark.parametrize("id", ["weighted_sum", "clip", "standardize", "asynchronous"])
def test_a_compound_reward_without_its_argument_says_what_it_needs(id):
    argument = "weights" if id == "weighted_sum" else "reward"
    with pytest.raises(
        OptionError,
        match=rf"needs the argument '{argument}'.*reward_kwargs={{'{argument}': \.\.\.}}",
    ):
        gymnasium.make(RED, reward=f"images/{id}")


NO_NAMES = (
    [],
    ["cpu"],
    np.array(["ddim", "euler"]),
    np.zeros(2),
    {},
    5,
    b"cpu",
    ("cpu",),
    "a\0b",
    "x" * 5000,
)


@pytest.mark.parametrize("name", [*OPTIONS[1:2], "sampler", "spacing", "device", "dtype", "render_mode", "base_model",
                                  "reward"])  # fmt: skip
@pytest.mark.parametrize("value", NO_NAMES, ids=lambda value: type(value).__name__)
def test_what_is_no_name_is_named_in_a_line(name, value):
    with pytest.raises(FlowGymError) as raised:
        DenoisingEnv(**{**MIXTURE, name: value})
    assert 10 < len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    "name", ["memory", "lora", "checkpoint", "prompts", "negative_prompt", "vae", "denoiser"]
)
@pytest.mark.parametrize("value", [5, 0.5, b"x", [5], {"a": object()}, np.zeros(2), object()])
def test_what_is_no_argument_of_a_pipeline_is_named_in_a_line(name, value):
    with pytest.raises(FlowGymError) as raised:
        DenoisingEnv(**{**STABLE, name: value})
    assert 10 < len(str(raised.value)) < 2000


@pytest.mark.parametrize("state", [5, None, "state", [], {}, {1: 2}, np.zeros(2), object()])
@pytest.mark.parametrize(
    "make", [lambda: DenoisingEnv(**MIXTURE), lambda: DenoisingVectorEnv(2, **MIXTURE)]
)
def test_what_is_no_state_is_named(make, state):
    env = make()
    env.reset(seed=0)
    before = state_of(env)
    with pytest.raises(StateError, match="state"):
        env.set_state(state)
    assert state_of(env) == before


@pytest.mark.parametrize(
    "seed", [np.array(3), np.array(3.0), True, 1.5, "1", Fraction(1), [True, 1], [[1], 2], {1: 2}]
)
@pytest.mark.parametrize(
    "make", [lambda: DenoisingEnv(**MIXTURE), lambda: DenoisingVectorEnv(2, **MIXTURE)]
)
def test_what_is_no_seed_is_named_and_changes_nothing(make, seed):
    env = make()
    env.reset(seed=0)
    before = state_of(env)
    with pytest.raises(OptionError, match="seed is"):
        env.reset(seed=seed)
    assert state_of(env) == before


@pytest.mark.parametrize("mode", ["DISABLED", "disabled", "NEXT_STEP", "samestep"])
def test_a_misspelt_autoreset_mode_gets_a_hint(mode):
    with pytest.raises(
        OptionError, match=r"autoreset_mode is .* did you mean '(Disabled|NextStep|SameStep)'"
    ):
        DenoisingVectorEnv(2, autoreset_mode=mode, **MIXTURE)


@pytest.mark.parametrize(
    "kwargs",
    [{"means": torch.tensor([[1j]])}, {"means": np.array([[1j]])}, {"stds": [1j]}, {"means": [["1.0"]]},
     {"weights": "11"}],
)  # fmt: skip
def test_numbers_of_a_mixture_are_real(kwargs):
    with pytest.raises(OptionError, match=r"means|stds|weights"):
        DenoisingEnv(**MIXTURE, base_model_kwargs=kwargs)


def test_times_and_a_target_are_real():
    for options in (
        {"discretization_steps": torch.tensor([0.0, 0.5j])},
        {"reward_kwargs": {"mean": np.array([1j])}},
    ):
        with pytest.raises(OptionError, match=next(iter(options)).replace("reward_kwargs", "mean")):
            DenoisingEnv(**{**MIXTURE, **options})


@pytest.mark.parametrize(
    "options",
    [{"prompt": "x" * 2 * 10**6}, {"sampler": "x" * 2 * 10**6}, {"base_model": "x/" * 10**6},
     {"discretization_steps": [2.0] * 10**5}, {"base_model_kwargs": {"stds": [-1.0] * 10**5}},
     {"reward_kwargs": {"mean": "x" * 10**6}}, {"reward_kwargs": {"x" * 10**6: 1}}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_an_error_does_not_repeat_a_long_value(options):
    with pytest.raises(FlowGymError) as raised:
        DenoisingEnv(**{**MIXTURE, **options})
    assert len(str(raised.value)) < 2500


def test_no_memory_option_is_none_at_all():
    assert DenoisingEnv(**STABLE, memory=None).environment.base_model is not None


def test_a_model_that_forgets_its_base_class_is_told(monkeypatch):
    cls = type("Forgetful", (Tame,), {"__init__": lambda self, device=None: None})
    monkeypatch.setitem(
        base_model_registry._entries, "tests/forgetful", RegistryEntry("tests/forgetful", cls)
    )
    with pytest.raises(OptionError, match=r"__init__ of Forgetful does not call super\(\)"):
        load_base_model("tests/forgetful")
