"""What a seed means: the same noise as ever, whatever else happens in the process."""

import random
import threading
from hashlib import sha256

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

import flowgym_gym
from flowgym_gym import BaseModel, FlowTensor, OptimalTransportScheduler, base_model_registry
from flowgym_gym.envs.randomness import Streams, takes_generator
from flowgym_gym.models import clear_model_cache
from flowgym_gym.models.ddpm import DDPMBaseModel
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.models.stable_diffusion import StableDiffusionBaseModel
from tests.conftest import RED
from tests.models import tiny

MIXTURE = "flowgym/GaussianMixture-Gaussian2D-v0"
# Initial states of two episodes, one seeded and one that follows, written down when the global
# generators drew them.
MIXTURE_NOISE = {
    0: ([-0.09819923341274261, 2.1938161849975586], [0.5219677090644836, 0.6511330008506775]),
    1: ([0.671164870262146, 0.4288024306297302], [0.2603346109390259, -1.2811909914016724]),
    2**31: ([-0.41513895988464355, 0.29653382301330566], [-1.5790777206420898, 1.0930215120315552]),
    2**32 - 1: (
        [-0.9561293721199036, 0.8731058239936829],
        [-1.495038628578186, -0.8932253122329712],
    ),
}
LATENT_NOISE = {
    0: (("3fcb85aa505982e9", "a red heart"), ("f4d6d5240b7df7a9", "a photo of a cat")),
    7: (("b9bcc9ed44d0cc94", "a dog"), ("6e1bc457bebca50f", "a dog")),
}
FAMILY_NOISE = {"ddpm": "c1d25a09f88d141f", "dit": "3b47c2efa3ae7bc7", "flux": "3c48835ed25524a9"}
IDS = {"ddpm": "DDPM", "dit": "DiT", "flux": "Flux", "stable_diffusion_3": "StableDiffusion3"}


def digest(observation):
    return sha256(np.ascontiguousarray(observation["latent"]).tobytes()).hexdigest()[:16]


def family(name, **options):
    options = {"discretization_steps": 2, **tiny.OPTIONS.get(name, {}), **options}
    return gymnasium.make(f"flowgym/{IDS[name]}-Red-v0", checkpoint=tiny.folder(name), **options)


@pytest.mark.parametrize("seed", MIXTURE_NOISE)
def test_a_seed_of_a_mixture_means_the_noise_that_it_always_meant(seed):
    env = gymnasium.make(MIXTURE)
    found = env.reset(seed=seed)[0]["latent"].tolist(), env.reset()[0]["latent"].tolist()
    assert found == MIXTURE_NOISE[seed]


@pytest.mark.parametrize("seed", LATENT_NOISE)
def test_a_seed_of_stable_diffusion_means_the_latents_and_prompts_that_it_always_meant(seed):
    prompts = ["a photo of a cat", "a red heart", "a dog"]
    env = gymnasium.make(RED, prompts=prompts, discretization_steps=1)
    found = [env.reset(seed=seed), env.reset()]
    assert (
        tuple((digest(observation), info["prompt"]) for observation, info in found)
        == LATENT_NOISE[seed]
    )


@pytest.mark.parametrize("name", FAMILY_NOISE)
def test_a_seed_of_the_other_families_means_the_noise_that_it_always_meant(name):
    assert digest(family(name).reset(seed=5)[0]) == FAMILY_NOISE[name]


def global_states():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def test_resets_of_this_packages_models_do_not_touch_the_global_generators(monkeypatch):
    """Not even for a moment: another thread could draw then."""
    envs = [
        gymnasium.make(MIXTURE),
        gymnasium.make(RED, prompts=["a", "b"]),
        family("ddpm"),
        family("dit"),
    ]
    before = global_states()

    def touched(*_):
        raise AssertionError("a global generator is seeded")

    monkeypatch.setattr(torch.random, "fork_rng", touched)
    monkeypatch.setattr(torch, "manual_seed", touched)
    monkeypatch.setattr(np.random, "seed", touched)
    monkeypatch.setattr(random, "seed", touched)
    for env in envs:
        for seed in (3, None):
            env.reset(seed=seed)
        env.step(np.zeros(env.action_space.shape, np.float32))
    assert global_states() == before


def test_a_thread_that_draws_during_resets_gets_its_own_sequence():
    torch.manual_seed(11)
    expected = torch.rand(20_000)
    torch.manual_seed(11)
    env, stop = gymnasium.make(MIXTURE), threading.Event()

    def reset():
        while not stop.is_set():
            env.reset(seed=1)

    thread = threading.Thread(target=reset)
    thread.start()
    drawn = torch.stack([torch.rand(()) for _ in range(20_000)])
    stop.set()
    thread.join()
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("cls", [GaussianMixtureBaseModel, DDPMBaseModel, StableDiffusionBaseModel])
def test_this_packages_models_take_a_generator(cls):
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    assert takes_generator(model)


class Drawing(GaussianMixtureBaseModel):
    """Draws from every global generator, also where the episode is prepared."""

    def sample_p0(self, n, **kwargs):
        x, kwargs = super().sample_p0(n, **kwargs)
        extra = random.random() + np.random.rand()
        return x, {**kwargs, "shift": torch.full((n, 1), extra)}

    def preprocess(self, x, **kwargs):
        return x, {**kwargs, "more": torch.randn(len(x), 1)}

    def forward(self, x, t, **kwargs):
        assert set(kwargs) == {"shift", "more"}
        return super().forward(x, t)


class DrawingLater(GaussianMixtureBaseModel):
    """Leaves the noise to its base class and draws once more."""

    def preprocess(self, x, **kwargs):
        return x, {**kwargs, "more": torch.randn(len(x), 2)}

    def forward(self, x, t, **kwargs):
        return super().forward(x, t)


def own_env(monkeypatch, cls, num_envs=None):
    monkeypatch.setattr(base_model_registry, "_entries", dict(base_model_registry._entries))
    base_model_registry.register("1d/own", cls)
    options = {"base_model": "1d/own", "reward": "1d/binary", "discretization_steps": 2}
    if num_envs is None:
        return gymnasium.make("flowgym/Denoising-v0", **options)
    return gymnasium.make_vec("flowgym/Denoising-v0", num_envs=num_envs, **options)


@pytest.mark.parametrize("seed", [4, 2**40])
def test_a_model_that_takes_no_generator_draws_from_global_ones_that_are_seeded_and_restored(
    monkeypatch, seed
):
    env = own_env(monkeypatch, Drawing).unwrapped
    assert not takes_generator(env.environment.base_model)
    before = global_states()
    episodes = []
    for _ in range(2):
        observation, _ = env.reset(seed=seed)
        kwargs = env.rollout._kwargs[0]
        episodes.append(
            (observation["latent"].item(), kwargs["shift"].item(), kwargs["more"].item())
        )
    assert episodes[0] == episodes[1]
    assert global_states() == before
    if seed < 2**32:
        plain = gymnasium.make("flowgym/GaussianMixture-Binary-v0")
        assert plain.reset(seed=seed)[0]["latent"].item() == episodes[0][0]


def test_what_a_model_of_ones_own_draws_does_not_depend_on_global_defaults(monkeypatch):
    env = own_env(monkeypatch, Drawing).unwrapped

    def draw():
        latent = env.reset(seed=4)[0]["latent"].item()
        return [latent, *(value.item() for value in env.rollout._kwargs[0].values())]

    expected = draw()
    torch.set_default_dtype(torch.float64)
    try:
        assert draw() == expected
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert draw() == expected


def test_what_a_model_draws_after_the_noise_of_its_base_class_is_not_that_noise_again(monkeypatch):
    env = own_env(monkeypatch, DrawingLater).unwrapped
    observation, _ = env.reset(seed=0)
    more = env.rollout._kwargs[0]["more"]
    assert observation["latent"].item() not in more.flatten().tolist()
    env.reset(seed=0)
    assert torch.equal(env.rollout._kwargs[0]["more"], more)


def test_a_model_of_ones_own_may_take_the_generator(monkeypatch):
    class Own(BaseModel[FlowTensor]):
        output_type = "velocity"

        @property
        def scheduler(self):
            return OptimalTransportScheduler()

        def sample_p0(self, n, *, generator=None, **kwargs):
            assert generator is not None
            return FlowTensor(torch.randn(n, 1, generator=generator)), kwargs

        def forward(self, x, t, **kwargs):
            return -x

    env = own_env(monkeypatch, Own)
    plain = gymnasium.make("flowgym/GaussianMixture-Binary-v0")
    assert env.reset(seed=9)[0]["latent"] == plain.reset(seed=9)[0]["latent"]


def episode(make):
    env = make()
    record = [env.reset(seed=3)]
    for _ in range(2):
        record.append(env.step(np.full(env.action_space.shape, 0.25, np.float32)))
        if env.render_mode is not None:
            record.append(env.render())
    state = env.unwrapped.get_state()
    env.unwrapped.set_state(state)
    return [*record, state, env.reset()]


MAKERS = {
    "mixture": lambda: gymnasium.make(MIXTURE, discretization_steps=2, render_mode="rgb_array"),
    "diffusion mixture": lambda: gymnasium.make(
        MIXTURE,
        discretization_steps=2,
        base_model_kwargs={"schedule": "diffusion"},
        action_scale=None,
    ),
    "weighted sum": lambda: gymnasium.make(
        "flowgym/Denoising-v0",
        base_model="1d/gaussian_mixture",
        reward="1d/standardize",
        reward_kwargs={
            "reward": {"id": "1d/weighted_sum", "weights": {"1d/gaussian": 1.5}},
            "per_prompt": False,
        },
        discretization_steps=2,
    ),
    "Stable Diffusion": lambda: gymnasium.make(
        RED,
        discretization_steps=2,
        prompts=["a cat", "a red heart"],
        guidance_scale=2.0,
        render_mode="rgb_array",
    ),
    "alignment": lambda: gymnasium.make(
        "flowgym/StableDiffusion-Alignment-v0", discretization_steps=2
    ),
    "ddpm": lambda: family("ddpm"),
    "dit": lambda: family("dit", prompts=["1", "2"], guidance_scale=2.0),
    "flux": lambda: family("flux"),
    "stable_diffusion_3": lambda: family("stable_diffusion_3", prompts=["a cat", "a red heart"]),
}


@pytest.fixture(scope="module")
def ordinary():
    return {name: episode(make) for name, make in MAKERS.items()}


@pytest.fixture(params=["float64", "float16", "meta", "meta around", "inference", "deterministic"])
def around(request):
    if request.param.startswith("float"):
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)
    elif request.param == "meta":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    elif request.param == "deterministic":
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
    else:
        with torch.inference_mode() if request.param == "inference" else torch.device("meta"):
            yield


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_global_changes_what_a_seed_means(name, ordinary, around):
    # Models are made anew, under what is set now, and are not left to other tests.
    clear_model_cache()
    try:
        assert data_equivalence(episode(MAKERS[name]), ordinary[name], exact=True)
    finally:
        clear_model_cache()


def test_nothing_global_changes_what_the_torch_environment_samples(around):
    def sample():
        env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", 3)
        torch.default_generator.manual_seed(0)
        return env.sample(4)

    found = sample()
    assert found.latents.data.dtype is torch.float32
    assert (
        found.latents.device.type == found.rewards.device.type == found.valids.device.type == "cpu"
    )
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    with torch.device("cpu"):
        assert torch.equal(found.latents.data, sample().latents.data)


def test_the_defaults_of_other_threads_outlive_resets():
    """The default number format is one for all threads, and two of them are inside at once."""
    torch.set_default_dtype(torch.float64)
    try:
        expected = gymnasium.make(MIXTURE).reset(seed=0)[0]["latent"].tolist()
        envs = [gymnasium.make(MIXTURE) for _ in range(4)]
        found = [[] for _ in envs]

        def play(i):
            found[i] = [envs[i].reset(seed=0)[0]["latent"].tolist() for _ in range(50)]

        threads = [threading.Thread(target=play, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert torch.get_default_dtype() is torch.float64
        assert all(latents == expected for each in found for latents in each)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_was_drawn_can_be_undone():
    """Bit by bit: noise of steps, seeds of episodes, other seeds and other generators."""
    streams = Streams(3, (2, 3))
    for i in range(3):
        streams.seed(i, 7 + i)
    streams.episode(1)
    streams.noise([0, 1])
    streams.noise([1])
    mark = streams.mark()
    generators, states = (
        streams.generators,
        [generator.get_state() for generator in streams.generators],
    )
    streams.noise([0, 1, 2])
    streams.seed(2, 2**40)
    streams.episode(0)
    streams.noise([0])
    streams.back_to(mark)
    assert all(map(torch.equal, states, [generator.get_state() for generator in generators]))
    streams.noise([1])
    streams.replace([torch.Generator().manual_seed(i) for i in range(3)])
    streams.noise([1])
    streams.back_to(mark)
    assert streams.generators is generators
    assert all(map(torch.equal, states, [generator.get_state() for generator in generators]))


def test_noise_of_a_step_is_what_each_generator_alone_draws():
    """Also of shapes that torch fills several numbers at a time, and rows that are not aligned."""
    for shape in ((1,), (3, 5), (4, 8, 8), (17,)):
        streams, others = (
            Streams(3, shape),
            [torch.Generator().manual_seed(5 + i) for i in range(3)],
        )
        for i in range(3):
            streams.seed(i, 5 + i)
        noise = streams.noise([2, 0])
        for row, i in zip(noise, (2, 0), strict=True):
            assert torch.equal(
                row, torch.randn(shape, generator=others[i], dtype=torch.float32, device="cpu")
            )
