"""A call that is refused, or that fails half-way, is as if it had never been made."""

import copy
import re

import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import assume, given, settings

import flowgym_gym
from flowgym_gym import FlowTensor, base_model_registry, reward_registry, wrappers
from flowgym_gym.agents import SB3VecEnv
from flowgym_gym.envs import environment
from flowgym_gym.errors import FlowGymError, ModelError, OptionError, RewardError, StateError
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.models.stable_diffusion import StableDiffusionBaseModel
from flowgym_gym.rewards.base import Reward
from tests.conftest import PROMPTS, RED
from tests.models import tiny

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
MODES = ["NextStep", "SameStep", "Disabled"]
NAN = float("nan")


def make(id, mode=None, **options):
    options = {"discretization_steps": 3, **({"prompts": PROMPTS} if id == RED else {}), **options}
    if mode is None:
        return gymnasium.make(id, disable_env_checker=True, **options)
    return gymnasium.make_vec(id, num_envs=3, autoreset_mode=mode, **options)


def everything(env):
    """All that the environment goes on from; what it knows and what it will draw."""
    inner = env.unwrapped
    rollout = inner.rollout
    return {
        **inner.get_state(),
        "seed": np.array(repr(inner._np_random_seed)),
        "steps": np.array(inner.discretization_steps),
        "scale": np.array(inner.action_scale),
        "settings": np.array(repr(rollout.environment.settings())),
        "reward": np.array(repr(rollout.environment.reward.get_state())),
        "output": np.array(repr(rollout._output)),
    }


def go_on(env):
    """What comes next, with resets that draw from every generator."""
    record = []
    for i in range(4):
        action = np.full(env.action_space.shape, 0.1 * i, np.float32)
        try:
            record.append(env.step(action))
        except gymnasium.error.ResetNeeded:
            record.append(env.reset())
    return [*record, env.reset(), everything(env)]


def refused(env, call, error=FlowGymError):
    """Make a call that must fail, and see that the environment goes on as one that never had it."""
    before, twin = everything(env), copy.deepcopy(env)
    with pytest.raises(error) as raised:
        call(env)
    assert data_equivalence(everything(env), before, exact=True)
    assert data_equivalence(go_on(env), go_on(twin), exact=True)
    return raised


bad_seeds = st.sampled_from(
    [
        -1,
        1.5,
        "0",
        True,
        2**63,
        [0],
        [1, 2],
        [0] * 4,
        [[0, 1, 2]],
        [0, 1, "2"],
        {},
        np.array(3),
        np.array([[1]]),
        NAN,
    ]
)
bad_prompts = st.sampled_from(
    [
        ["a", "b"],
        [],
        5,
        {"a": 1},
        b"a",
        [5],
        [["a"]],
        "word " * 500,
        "half an emoji \ud83d",
        True,
        np.array(["a", "b"]),
    ]
)
bad_options = st.one_of(
    bad_prompts.map(lambda prompt: {"prompt": prompt}),
    st.sampled_from(
        [5, "prompt", [1], {"prompts": "a"}, {5: 1}, {"reset_mask": np.array([True])}, {"seed": 1}]
    ),
)
bad_actions = st.sampled_from(
    [None, "x", NAN, [], [[0.0], [1.0, 2.0]], np.full((3, 4, 8, 8), np.nan), np.zeros(7), {}, object(), 1j, True,
     torch.full((3, 1), NAN), torch.zeros(9)]
)  # fmt: skip
bad_grids = st.sampled_from(
    [
        0,
        -1,
        1.5,
        "x",
        None,
        [],
        [0.5, 0.2],
        [5, 3000],
        [[1]],
        10**9,
        True,
        {},
        [NAN],
        [1, 2, 1],
        b"x",
        [0.1, 1.0],
    ]
)
DAMAGE = {
    "latents": [None, np.zeros(3), np.float32(1), "nan"],
    "index": [np.array([99] * 3), np.array([-1]), [0]],
    "started": [np.array([1, 1, 1]), None],
    "generators": ["zero", np.zeros(3)],
    "times": ["square"],
    "settings": ["no json", "[]", "{}", '{"a": 1}', 5],
    "kwargs": [
        "no json",
        "[]",
        '{"a": "list"}',
        '{"prompt": {"tensor": "load"}}',
        '{"prompt": {"plain": 5}}',
        5,
    ],
    "kwargs/prompt": [
        np.array(["a"] * 2),
        np.array([1, 2, 3]),
        np.array(["word " * 500] * 3),
        "drop",
    ],
    "kwargs/encoder_hidden_states": ["nan", "half", "short", "drop"],
    "embeddings": ["nan", np.zeros(3)],
    "random": [
        "{}",
        "no json",
        '{"bit_generator": "MT19937"}',
        '{"bit_generator": "PCG64", "state": {}}',
        5,
    ],
    "needs_reset": [np.zeros(7), "drop"],
}
bad_states = st.one_of(
    st.sampled_from([{}, 5, None, [], "state", {"random": 1}, {5: 6}]),
    st.sampled_from([(name, change) for name, changes in DAMAGE.items() for change in changes]),
)


def damaged(env, spec):
    if not isinstance(spec, tuple):
        return spec
    name, change = spec
    state = env.unwrapped.get_state()
    if name not in state or name == "needs_reset":
        return {}
    array = state[name]
    changes = {
        "nan": lambda: array * array.dtype.type("nan"),
        "zero": lambda: np.zeros_like(array),
        "square": lambda: array**2,
        "half": lambda: array.astype(np.float16),
        "short": lambda: array[:, :1],
    }
    if isinstance(change, str) and change == "drop":
        del state[name]
    elif isinstance(change, str):
        state[name] = changes[change]() if change in changes else np.array(change)
    else:
        state[name] = change
    return state


calls = st.one_of(
    bad_seeds.map(lambda seed: ("reset", lambda env: env.reset(seed=seed))),
    bad_options.map(lambda options: ("reset", lambda env: env.reset(seed=3, options=options))),
    bad_options.map(lambda options: ("reset", lambda env: env.reset(options=options))),
    bad_actions.map(lambda action: ("step", lambda env: env.step(action))),
    bad_grids.map(lambda steps: ("set_time_grid", lambda env: env.unwrapped.set_time_grid(steps))),
    st.sampled_from(["x", 5, "Leading", True]).map(
        lambda spacing: ("set_time_grid", lambda env: env.unwrapped.set_time_grid(2, spacing))
    ),
    bad_states.map(
        lambda state: ("set_state", lambda env: env.unwrapped.set_state(damaged(env, state)))
    ),
    st.sampled_from([-1, "x", [1] * 9, 0.5, {}]).map(
        lambda seed: (
            "set_state",
            lambda env: env.unwrapped.set_state(env.unwrapped.get_state(), seed=seed),
        )
    ),
)
moments = st.sampled_from(["fresh", "begun", "running", "ended"])


def arrive(env, moment):
    if moment == "fresh":
        return env
    env.reset(seed=5)
    for _ in range({"begun": 0, "running": 1, "ended": 3}[moment]):
        env.step(np.full(env.action_space.shape, 0.3, np.float32))
    return env


@pytest.fixture(scope="module", autouse=True)
def _quick_network():
    """What the network answers does not matter here, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StableDiffusionBaseModel, "denoise", lambda self, x, timesteps, **conditions: x.sin()
        )
        patch.setattr(
            StableDiffusionBaseModel,
            "postprocess",
            lambda self, x: FlowTensor(x.data[:, :3].sigmoid()),
        )
        yield


@pytest.fixture(scope="module")
def envs():
    return {(id, mode): make(id, mode) for id in (MIXTURE, RED) for mode in (None, *MODES)}


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("id", [MIXTURE, RED])
def test_a_refused_call_changes_nothing(envs, id, mode):
    @settings(max_examples=50 if id == MIXTURE else 25)
    @given(call=calls, moment=moments)
    def check(call, moment):
        name, make_call = call
        assume(not (name == "step" and moment == "ended"))  # where no action is looked at
        refused(
            arrive(copy.deepcopy(envs[id, mode]), moment),
            make_call,
            (FlowGymError, gymnasium.error.ResetNeeded),
        )

    check()


@pytest.mark.parametrize("mode", [None, "NextStep"])
def test_every_damaged_part_of_a_state_is_refused(envs, mode):
    env = arrive(copy.deepcopy(envs[RED, mode]), "running")
    before = everything(env)
    for name, changes in DAMAGE.items():
        for change in changes:
            with pytest.raises(StateError):
                env.unwrapped.set_state(damaged(env, (name, change)))
            assert data_equivalence(everything(env), before, exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"kwargs/encoder_hidden_states": s["kwargs/encoder_hidden_states"][:, :3]}),
         r"encoder_hidden_states of the state is a Tensor of float32, rows of shape \[3, .* makes a Tensor"),
        (lambda s: s["kwargs/encoder_hidden_states"].fill(NAN), "encoder_hidden_states of the state holds NaN"),
        (lambda s: s["embeddings"].fill(NAN), "embeddings of the state hold NaN"),
        (lambda s: s.update({"kwargs/prompt": np.array(["word " * 500])}), "prompt of the state cannot be used here"),
        (lambda s: s.update({"kwargs/prompt": np.array([5])}), "prompt of the state cannot be used here"),
        (lambda s: s.update({"kwargs": np.array('{"prompt": "list"}')}), r"has the arguments \['prompt'\], but"),
        (lambda s: s.update({"started": np.array([False])}), "but no episode that they belong to"),
    ],
)  # fmt: skip
def test_arguments_in_a_state_are_such_as_the_model_makes(envs, change, message):
    env = arrive(copy.deepcopy(envs[RED, None]), "running")
    state = env.unwrapped.get_state()
    change(state)
    raised = refused(env, lambda env: env.unwrapped.set_state(state), StateError)
    assert re.search(message, str(raised.value)), raised.value


@pytest.mark.parametrize("mode", [None, "Disabled"])
def test_wrappers_that_are_refused_change_nothing(envs, mode):
    module = wrappers if mode is None else wrappers.vector
    outside = gymnasium.wrappers if mode is None else gymnasium.wrappers.vector
    flatten = outside.FlattenObservation
    for make_wrapper in (
        lambda env: module.TimeGrid(env, 0),
        lambda env: module.TimeGrid(env, 2, "x"),
        lambda env: module.CoarseAction(env, 99),
        lambda env: module.RewardScale(env, "x"),
        lambda env: module.ToTorch(flatten(env)),
    ):
        refused(arrive(copy.deepcopy(envs[RED, mode]), "running"), make_wrapper)


@pytest.mark.parametrize("mode", [None, "NextStep"])
def test_refused_calls_of_wrapped_environments_change_nothing(envs, mode):
    module = wrappers if mode is None else wrappers.vector

    def wrapped():
        env = module.CoarseAction(module.RewardScale(copy.deepcopy(envs[RED, mode]), 2.0), 2)
        return arrive(env, "running")

    for call in (
        lambda env: env.step(np.zeros((4, 8, 8), np.float32)),
        lambda env: module.ToTorch(env).step(torch.full(env.action_space.shape, NAN)),
        lambda env: module.ToTorch(env).reset(seed=0, options={"prompt": 5}),
    ):
        refused(wrapped(), call)


def test_refused_calls_of_the_agents_interface_change_nothing(envs):
    env = copy.deepcopy(envs[RED, "SameStep"])
    ours = SB3VecEnv(arrive(env, "running"))
    for call in (
        lambda _: ours.seed("x"),
        lambda _: ours.step(np.zeros(3)),
        lambda _: ours.env_method("set_time_grid", 0),
        lambda _: ours.set_attr("render_mode", None, indices=[0]),
    ):
        refused(env, call)
    ours.set_options({"prompt": 5})
    before = ours.seed(1)
    refused(env, lambda _: ours.reset())
    assert ours._seeds == before


def test_a_prompt_for_a_model_without_prompts_is_refused_by_name():
    raised = refused(
        arrive(make(MIXTURE), "begun"), lambda env: env.reset(options={"prompt": "a"}), OptionError
    )
    assert "prompt is 'a', but GaussianMixtureBaseModel has no prompts" in str(raised.value)
    env = make(MIXTURE)
    first = env.reset(seed=0, options={"prompt": None})
    assert data_equivalence(first, make(MIXTURE).reset(seed=0), exact=True)


def test_a_class_that_there_is_not_is_refused_before_anything_changes():
    env = gymnasium.make(
        "flowgym/DiT-Red-v0",
        checkpoint=tiny.folder("dit"),
        prompts=["1", "2"],
        discretization_steps=3,
    )
    for prompt in ("9999", "golden retriver", "9" * 5000, "", "-1"):
        refused(
            arrive(copy.deepcopy(env), "running"),
            lambda env, p=prompt: env.reset(options={"prompt": p}),
        )


def test_a_prompt_may_be_a_string_or_a_list_of_one():
    env = make(RED)
    for prompt in ("a dog", ["a dog"], ("a dog",), np.array(["a dog"]), np.str_("a dog")):
        assert env.reset(seed=0, options={"prompt": prompt})[1]["prompt"] == "a dog"


class Flaky(GaussianMixtureBaseModel):
    """Fails where it is told to."""

    where = None
    calls = 0

    def _fail(self, where):
        if self.where == where:
            Flaky.calls += 1
            if Flaky.calls > 1:
                raise ZeroDivisionError(where)

    def sample_p0(self, n, *, generator=None, **kwargs):
        x, kwargs = super().sample_p0(n, generator=generator, **kwargs)
        self._fail("sample_p0")
        return x, kwargs

    def preprocess(self, x, *, generator=None, **kwargs):
        self._fail("preprocess")
        return x, kwargs

    def forward(self, x, t, **kwargs):
        self._fail("forward")
        return super().forward(x, t) * (NAN if self.where == "NaN" else 1.0)

    def postprocess(self, x):
        self._fail("postprocess")
        return x

    def picture(self, x):
        self._fail("picture")
        return super().picture(x)


class Remembering(Reward):
    """Remembers how many it has scored, and fails where it is told to."""

    stateful = True
    where = None

    def __init__(self):
        self.scored = 0

    def forward(self, x, **kwargs):
        self.scored += len(x)
        if Remembering.where == "reward":
            raise ZeroDivisionError("reward")
        return x.data[:, 0] + self.scored, torch.ones(len(x))

    def get_state(self):
        return {"scored": np.array(self.scored)}

    def set_state(self, state):
        self.scored = int(state["scored"])


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr(base_model_registry, "_entries", dict(base_model_registry._entries))
    monkeypatch.setattr(reward_registry, "_entries", dict(reward_registry._entries))
    base_model_registry.register("1d/flaky", Flaky)
    reward_registry.register("1d/remembering", Remembering)

    def make_flaky(mode=None, **options):
        options = {
            "base_model": "1d/flaky",
            "reward": "1d/remembering",
            "render_mode": "rgb_array",
            **options,
        }
        return make("flowgym/Denoising-v0", mode, **options)

    yield make_flaky
    Flaky.where = Remembering.where = None


def fails(where, call, after=0):
    def broken(env):
        Flaky.where, Flaky.calls = where, 1 - after
        try:
            call(env)
        finally:
            Flaky.where = None

    return broken


ZERO = {None: np.zeros(1, np.float32), **dict.fromkeys(MODES, np.zeros((3, 1), np.float32))}


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_model_that_fails_half_way_has_changed_nothing(flaky, mode):
    step, reset, render = (
        lambda env: env.step(ZERO[mode]),
        lambda env: env.reset(seed=8),
        lambda env: env.render(),
    )
    for moment, where, call, after in (
        ("running", "sample_p0", reset, 0),
        ("fresh", "preprocess", reset, 0),
        ("running", "preprocess", lambda env: env.reset(), 0),
        ("begun", "forward", step, 0),
        ("running", "forward", render, 0),
        ("running", "postprocess", render, 0),
        ("running", "picture", render, 0),
    ):
        refused(arrive(flaky(mode), moment), fails(where, call, after), ZeroDivisionError)
    last = arrive(flaky(mode), "running")
    last.step(ZERO[mode])
    refused(last, fails("postprocess", step), ZeroDivisionError)
    raised = refused(arrive(flaky(mode), "running"), fails("NaN", step), ModelError)
    assert "returned NaN or infinity" in str(raised.value)


@pytest.mark.parametrize("where", ["sample_p0", "preprocess"])
def test_a_reset_that_fails_within_a_step_takes_the_step_back(flaky, where):
    """Also what the reward has learnt of it, and where the second of three resets fails."""
    for mode in ("SameStep", "NextStep"):
        env = arrive(flaky(mode), "running")
        for _ in range(1 if mode == "SameStep" else 2):
            env.step(ZERO[mode])
        refused(
            env, fails(where, lambda env: env.step(ZERO["SameStep"]), after=1), ZeroDivisionError
        )


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_reward_that_fails_ends_its_episodes(flaky, mode):
    env = arrive(flaky(mode), "running")
    env.step(ZERO[mode])
    Remembering.where = "reward"
    with pytest.raises(RewardError):
        env.step(ZERO[mode])
    Remembering.where = None
    assert env.unwrapped.rollout.finished.all()


class Fickle(GaussianMixtureBaseModel):
    """Makes arguments of other names, shapes or kinds for every other episode."""

    change = None
    episodes = 0

    def sample_p0(self, n, *, generator=None, **kwargs):
        Fickle.episodes += 1
        other = Fickle.episodes % 2 == 0
        kwargs = {
            None: {},
            "names": {"a": [1] * n} if other else {},
            "shapes": {"a": torch.zeros(n, 1 + other)},
            "kinds": {"a": [1] * n if other else torch.zeros(n, 1)},
        }[Fickle.change]
        return super().sample_p0(n, generator=generator)[0], kwargs

    def forward(self, x, t, **kwargs):
        return super().forward(x, t)


@pytest.mark.parametrize("change", ["names", "shapes", "kinds"])
def test_episodes_that_make_no_batch_are_refused_when_they_begin(monkeypatch, change):
    monkeypatch.setattr(base_model_registry, "_entries", dict(base_model_registry._entries))
    base_model_registry.register("1d/fickle", Fickle)
    envs = gymnasium.make_vec(
        "flowgym/Denoising-v0",
        num_envs=2,
        base_model="1d/fickle",
        reward="1d/binary",
        discretization_steps=2,
        autoreset_mode="Disabled",
    )
    Fickle.change = change
    try:
        Fickle.episodes = 0
        refused_state = everything(envs)
        with pytest.raises(ModelError, match="cannot run side by side"):
            envs.reset(seed=0)
        assert data_equivalence(everything(envs), refused_state, exact=True)
        Fickle.change = None
        envs.reset(seed=0)
        Fickle.change, Fickle.episodes = change, 1
        before = everything(envs)
        with pytest.raises(ModelError, match="cannot run side by side"):
            envs.reset(options={"reset_mask": np.array([True, False])})
        assert data_equivalence(everything(envs), before, exact=True)
        envs.step(np.zeros((2, 1), np.float32))
        # Episodes that are over, or that all begin anew, bother nobody.
        envs.step(np.zeros((2, 1), np.float32))
        Fickle.episodes = 1
        envs.reset(options={"reset_mask": np.array([True, False])})
        assert envs.unwrapped.get_state()["index"].tolist() == [0, 2]
    finally:
        Fickle.change = None


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda env: env.sample(0), OptionError),
        (lambda env: env.sample(2, prompt=["a"]), OptionError),
        (lambda env: env.sample(2, prompt={"a": 1, "b": 2}), OptionError),
        (lambda env: env.sample(2, prompt="word " * 500), OptionError),
        (lambda env: env.sample(2, lambda x, t, **kwargs: torch.zeros(7)), FlowGymError),
        (lambda env: env.sample(2, lambda x, t, **kwargs: FlowTensor(x.data * NAN)), FlowGymError),
        (lambda env: list(env.stream(2, 2, lambda x, t, **kwargs: None)), FlowGymError),
        (lambda env: env.set_time_grid(0), OptionError),
        (lambda env: env.set_time_grid([999, 1000]), OptionError),
    ],
)
def test_refused_calls_of_the_torch_environment_change_nothing(torch_env, call, error):
    before = torch.get_rng_state(), dict(vars(torch_env))
    with pytest.raises(error):
        call(torch_env)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert vars(torch_env) == before[1]


def test_a_grid_whose_scale_cannot_be_worked_out_changes_nothing(monkeypatch):
    env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", 3, action_scale=None)
    before = dict(vars(env))

    def overflow(*_):
        raise OverflowError

    monkeypatch.setattr(environment, "default_action_scale", overflow)
    with pytest.raises(OverflowError):
        env.set_time_grid(2)
    assert vars(env) == before


def test_a_state_that_is_none_is_named():
    for state in (5, None, [], "x", {}):
        for mode in (None, "NextStep"):
            with pytest.raises(StateError, match=r"expected what get_state|the state has no"):
                make(MIXTURE, mode).unwrapped.set_state(state)
