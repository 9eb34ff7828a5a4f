"""Copies, pickles and states: an episode goes on from anywhere as if nothing had happened."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

import flowgym_gym
from flowgym_gym import (
    BaseModel,
    FlowTensor,
    OptimalTransportScheduler,
    base_model_registry,
    wrappers,
)
from flowgym_gym.envs.state import pack, row, unpack
from flowgym_gym.errors import ClosedEnvironmentError, StateError
from tests.conftest import FLOWGYM_IDS, PROMPTS, RED, prompted

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"


def through_numpy(state):
    """The state written by numpy.savez and read without pickle."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def play(env, actions):
    """Steps, and an unseeded reset with one step more."""
    record = [env.step(action) for action in actions]
    return [*record, env.reset(), env.step(actions[0])]


def actions_of(env, n):
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(n)]


def in_the_middle(id, **kwargs):
    env = gymnasium.make(id, discretization_steps=4, **prompted(id), **kwargs)
    actions = actions_of(env, 4)
    env.reset(seed=3)
    env.step(actions[0])
    return env, actions[1:]


COPIES = {"pickle": lambda env: pickle.loads(pickle.dumps(env)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("id", FLOWGYM_IDS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_in_the_middle_of_an_episode_goes_on_alone(id, how):
    env, actions = in_the_middle(id)
    twin = COPIES[how](env)
    expected = play(env, actions)
    assert data_equivalence(expected, play(twin, actions), exact=True)
    assert twin.spec == env.spec


@pytest.mark.parametrize("id", FLOWGYM_IDS)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_before_the_first_episode_is_a_new_environment(id, how):
    env = gymnasium.make(id, discretization_steps=3)
    twin = COPIES[how](env)
    actions = actions_of(env, 3)
    assert data_equivalence(env.reset(seed=5), twin.reset(seed=5), exact=True)
    assert data_equivalence(play(env, actions), play(twin, actions), exact=True)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_vector_environments_are_copied_too(how, mode):
    envs = gymnasium.make_vec(
        RED, num_envs=2, discretization_steps=3, prompts=PROMPTS, autoreset_mode=mode
    )
    actions = actions_of(envs, 2)
    envs.reset(seed=1)
    envs.step(actions[0])
    envs.reset(options={"reset_mask": np.array([True, False])})
    twin = COPIES[how](envs)
    assert data_equivalence(play(envs, actions), play(twin, actions), exact=True)
    assert twin.spec == envs.spec


@pytest.mark.parametrize("how", COPIES)
def test_copies_share_the_model_and_a_pickle_holds_no_weights(how):
    env, _ = in_the_middle(RED)
    twin = COPIES[how](env)
    assert twin.unwrapped.environment.base_model is env.unwrapped.environment.base_model
    assert len(pickle.dumps(env)) < 2e5


@pytest.mark.parametrize("how", COPIES)
def test_wrapped_environments_are_copied_with_their_grid(how):
    env = wrappers.CoarseAction(
        wrappers.RewardScale(
            wrappers.TimeGrid(gymnasium.make(RED), steps=3, spacing="trailing"), scale=2.0
        ),
        2,
    )
    actions = actions_of(env, 2)
    env.reset(seed=0)
    twin = COPIES[how](env)
    wrappers.TimeGrid(env, steps=5)
    assert twin.unwrapped.discretization_steps == 3
    env.reset(seed=0)
    twin.set_wrapper_attr("scale", 2.0)
    assert len([twin.step(action) for action in actions]) == 2
    assert twin.step(actions[0])[2]


def test_torch_environments_are_copied():
    env = flowgym_gym.make("images/stable_diffusion", "images/red", 3, action_scale=0.5)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert twin.base_model is env.base_model
        assert type(twin) is type(env)
        torch.manual_seed(0)
        expected = env.sample(2).latents.data
        torch.manual_seed(0)
        assert torch.equal(twin.sample(2).latents.data, expected)
        twin.set_time_grid(2)
        assert env.discretization_steps == 3


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_a_restored_state_goes_on_bit_by_bit(id):
    env, actions = in_the_middle(id)
    state = through_numpy(env.unwrapped.get_state())
    expected = play(env, actions)
    env.unwrapped.set_state(state)
    assert data_equivalence(expected, play(env, actions), exact=True)
    other = gymnasium.make(id, discretization_steps=4, **prompted(id))
    other.reset(seed=99)
    other.unwrapped.set_state(state)
    assert data_equivalence(expected, play(other, actions), exact=True)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_a_restored_vector_state_goes_on_bit_by_bit(id, mode):
    def make():
        return gymnasium.make_vec(
            id, num_envs=3, discretization_steps=3, autoreset_mode=mode, **prompted(id)
        )

    envs = make()
    actions = actions_of(envs, 5)
    envs.reset(seed=0)
    for action in actions[:2]:
        envs.step(action)
    envs.reset(options={"reset_mask": np.array([False, True, False])})
    for _ in range(2 if mode != "Disabled" else 1):
        state = through_numpy(envs.unwrapped.get_state())
        steps = 3 if mode != "Disabled" else 1
        expected = [envs.step(action) for action in actions[:steps]]
        other = make()
        other.unwrapped.set_state(state)
        assert data_equivalence(
            expected, [other.step(action) for action in actions[:steps]], exact=True
        )
        assert data_equivalence(envs.reset(), other.reset(), exact=True)


def test_a_state_of_an_ended_or_not_yet_begun_episode_is_kept():
    envs = gymnasium.make_vec(MIXTURE, num_envs=2, discretization_steps=1)
    fresh = envs.unwrapped.get_state()
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())
    ended = envs.unwrapped.get_state()
    assert ended["needs_reset"].all()
    _, _, _, _, infos = envs.step(envs.action_space.sample())
    assert "control_cost" not in infos
    envs.unwrapped.set_state(ended)
    assert "control_cost" not in envs.step(envs.action_space.sample())[4]
    envs.unwrapped.set_state(fresh)
    with pytest.raises(flowgym_gym.errors.ResetNeededError):
        envs.step(envs.action_space.sample())


@pytest.mark.parametrize("num_envs", [None, 2])
def test_an_unseeded_environment_goes_on_with_the_random_state_it_had(num_envs):
    def make():
        return (
            gymnasium.make(MIXTURE)
            if num_envs is None
            else gymnasium.make_vec(MIXTURE, num_envs=num_envs)
        )

    env, twin = make(), make()
    twin.unwrapped.set_state(through_numpy(env.unwrapped.get_state()))
    assert data_equivalence(env.reset(), twin.reset(), exact=True)


def test_what_was_rendered_before_a_state_is_restored_is_forgotten():
    """Rendering keeps the network's output for the next step, which another state must not take."""
    env = gymnasium.make(RED, discretization_steps=4, render_mode="rgb_array")
    action = np.zeros((4, 8, 8), np.float32)
    env.reset(seed=0)
    state = env.unwrapped.get_state()
    expected = env.step(action)
    env.render()
    env.unwrapped.set_state(state)
    assert data_equivalence(env.step(action), expected, exact=True)


def test_an_episode_is_branched_with_fresh_noise():
    env, actions = in_the_middle(RED)
    state = env.unwrapped.get_state()
    finals = []
    for seed in (None, None, 1, 2, 2):
        env.unwrapped.set_state(state, seed=seed)
        finals.append(env.step(actions[0])[0]["latent"].tobytes())
    assert finals[0] == finals[1]
    assert finals[3] == finals[4]
    assert len(set(finals)) == 3
    held = env.unwrapped.get_state()
    held["latents"][:] = 0  # the caller's own array
    assert np.abs(env.unwrapped.get_state()["latents"]).max() > 0


def test_a_vector_is_branched_with_fresh_noise():
    envs = gymnasium.make_vec(MIXTURE, num_envs=2)
    envs.reset(seed=[4, 4])
    state = envs.unwrapped.get_state()
    latents = {}
    for seed in (None, 7, (7, 7), (7, 8)):
        envs.unwrapped.set_state(state, seed=list(seed) if isinstance(seed, tuple) else seed)
        latents[seed] = envs.step(np.zeros((2, 1), np.float32))[0]["latent"]
    assert latents[None][0] == latents[None][1]
    assert latents[7, 7][0] == latents[7, 7][1] != latents[None][0]
    assert np.array_equal(latents[7], latents[7, 8])
    assert latents[7][0] != latents[7][1]
    with pytest.raises(flowgym_gym.errors.OptionError, match="list of 3"):
        envs.unwrapped.set_state(state, seed=[1, 2, 3])


def test_a_state_keeps_the_prompt_of_its_episode():
    env = gymnasium.make(RED, prompts=PROMPTS, discretization_steps=2, guidance_scale=2.0)
    env.reset(seed=0, options={"prompt": "a green apple"})
    state = env.unwrapped.get_state()
    assert state["kwargs/prompt"].tolist() == ["a green apple"]
    expected = env.step(np.zeros((4, 8, 8), np.float32))
    env.reset(seed=1, options={"prompt": "a red heart"})
    env.unwrapped.set_state(state)
    assert data_equivalence(env.step(np.zeros((4, 8, 8), np.float32)), expected, exact=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("latents"), "no 'latents'"),
        (lambda s: s.pop("random"), "expected what get_state returned"),
        (
            lambda s: s.update(latents=s["latents"].astype(np.float64)),
            "latents of the state has .* float64",
        ),
        (
            lambda s: s.update(latents=s["latents"][:, :2]),
            r"latents of the state has shape \(1, 2, 8, 8\)",
        ),
        (lambda s: s.update(latents=s["latents"] * np.float32("nan")), "NaN"),
        (lambda s: s.update(index=[1]), "index of the state has list"),
        (lambda s: s.update(index=np.array([9])), "index of the state is 9"),
        (lambda s: s.update(times=s["times"] ** 2), "times of the state are not"),
        (lambda s: s.update(times=s["times"][:-1]), "times of the state has shape"),
        (lambda s: s.update(random=np.array("{}")), "random state"),
        (lambda s: s.update(kwargs=np.array("no json")), "part of the state is damaged"),
        (lambda s: s.pop("kwargs/prompt"), "part of the state is damaged"),
        (
            lambda s: s.update({"kwargs/prompt": np.array(["a", "b"])}),
            "kwargs/prompt of the state has 2 rows",
        ),
        (lambda s: s.update(generators=np.zeros_like(s["generators"])), "Invalid mt19937 state"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(change, message):
    env, actions = in_the_middle(RED)
    state = env.unwrapped.get_state()
    change(state)
    twin = copy.deepcopy(env)
    with pytest.raises(StateError, match=message):
        env.unwrapped.set_state(state)
    assert data_equivalence(play(env, actions), play(twin, actions), exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale = 1.0, but this one has 3.0"),
        ({"noise_level": 0.5}, "noise_level = 1.0, but this one has 0.5"),
        ({"action_type": "noise"}, "action_type = 'velocity', but this one has 'noise'"),
        ({"reward_scale": 1.0}, "reward_scale = 100.0, but this one has 1.0"),
    ],
)
def test_a_state_of_an_environment_with_other_settings_is_refused(options, message):
    env, _ = in_the_middle(RED)
    other = gymnasium.make(RED, discretization_steps=4, **prompted(RED), **options)
    other.reset(seed=0)
    with pytest.raises(StateError, match=message):
        other.unwrapped.set_state(env.unwrapped.get_state())


def test_a_default_that_is_written_out_is_the_same_setting():
    env, actions = in_the_middle(RED)
    named = gymnasium.make(RED, discretization_steps=4, checkpoint="tiny", **prompted(RED))
    named.reset(seed=9)
    named.unwrapped.set_state(env.unwrapped.get_state())
    assert data_equivalence(named.step(actions[0]), env.step(actions[0]), exact=True)


def test_episodes_survive_inference_mode_and_other_default_dtypes():
    expected = play(*in_the_middle(MIXTURE))
    with torch.inference_mode():
        env, actions = in_the_middle(MIXTURE)
        twin = copy.deepcopy(env)
    assert data_equivalence(play(env, actions), expected, exact=True)
    assert data_equivalence(play(twin, actions), expected, exact=True)
    torch.set_default_dtype(torch.float64)
    try:
        assert data_equivalence(play(*in_the_middle(MIXTURE)), expected, exact=True)
    finally:
        torch.set_default_dtype(torch.float32)


def test_resets_in_threads_keep_their_seeds():
    envs = [gymnasium.make(MIXTURE).unwrapped for _ in range(4)]
    expected = [envs[0].reset(seed=seed)[0]["latent"].item() for seed in range(100)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda env: [env.reset(seed=seed)[0]["latent"].item() for seed in range(100)], envs
        )
        assert all(latents == expected for latents in found)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_vector_state_needs_as_many_sub_environments():
    envs, more = (gymnasium.make_vec(MIXTURE, num_envs=n) for n in (2, 3))
    envs.reset(seed=0)
    with pytest.raises(StateError, match=r"shape \(2,\)"):
        more.unwrapped.set_state(envs.unwrapped.get_state())
    with pytest.raises(StateError, match="needs_reset"):
        more.unwrapped.set_state(gymnasium.make(MIXTURE).unwrapped.get_state())
    envs.close()
    with pytest.raises(ClosedEnvironmentError):
        envs.unwrapped.set_state({})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_every_kind_of_argument_survives(dtype):
    kwargs = {
        "a": torch.tensor([[1, 0], [3, 4], [5, 6]]).to(dtype),
        "b": FlowTensor(torch.rand(3, 2)),
        "c": ["x", "yy", "z"],
        "d": [1, 2, 3],
        "e": {"f": torch.rand(3, 1), "g": None},
        "h": "plain",
        "i": 0.5,
        "j": torch.tensor(2.0),
    }
    back = unpack(through_numpy(pack(kwargs)), torch.device("cpu"))
    assert back["a"].dtype is dtype
    assert torch.equal(back["a"], kwargs["a"])
    assert torch.equal(back["b"].data, kwargs["b"].data)
    assert torch.equal(back["e"]["f"], kwargs["e"]["f"])
    assert {k: back[k] for k in "cdhi"} == {k: kwargs[k] for k in "cdhi"}
    assert back["e"]["g"] is None
    assert back["j"].item() == 2
    second = row(back, 1)
    assert second["c"] == ["yy"]
    assert torch.equal(second["a"], kwargs["a"][1:2])
    assert second["j"].item() == 2
    with pytest.raises(StateError, match="kwargs/k is a set"):
        pack({"k": {1, 2}})


class Conditioned(BaseModel[FlowTensor]):
    """A model with arguments of its own, drawn for each episode."""

    output_type = "velocity"

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 1)), {
            "target": torch.randn(n, 1),
            "more": {"names": ["a"] * n},
        }

    def forward(self, x, t, **kwargs):
        return FlowTensor((kwargs["target"] - x.data) / (1 - t)[:, None])


def test_arguments_of_ones_own_model_are_part_of_the_state(monkeypatch):
    monkeypatch.setattr(base_model_registry, "_entries", dict(base_model_registry._entries))
    base_model_registry.register("1d/conditioned", Conditioned)
    env = gymnasium.make(
        "flowgym/Denoising-v0",
        base_model="1d/conditioned",
        reward="1d/binary",
        discretization_steps=2,
    )
    env.reset(seed=0)
    state = through_numpy(env.unwrapped.get_state())
    expected = env.step(np.zeros(1, np.float32))
    env.reset(seed=1)
    env.unwrapped.set_state(state)
    assert data_equivalence(env.step(np.zeros(1, np.float32)), expected, exact=True)
