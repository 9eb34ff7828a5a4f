"""The single environment: Gymnasium's rules, exact repetition, and diffusers' own pictures."""

import json
import pickle
import shutil
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import flowgym_gym
from flowgym_gym.errors import (
    ActionError,
    ClosedEnvironmentError,
    OptionError,
    ResetNeededError,
    UnknownIdError,
    UnknownOptionError,
)
from flowgym_gym.models.stable_diffusion import EMBEDDED
from tests.conftest import FLOWGYM_IDS, RED, further, prompted


def rollout(env, seed, actions):
    observation, info = env.reset(seed=seed)
    record = [(observation, info)]
    for action in actions:
        record.append(env.step(action))
    return record


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_gymnasium_check_env_without_warnings(id):
    env = gymnasium.make(id, discretization_steps=3, render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A latent has no bounds.
        warnings.filterwarnings(
            "ignore", message=".*(minimum value is -infinity|maximum value is infinity).*"
        )
        check_env(env)


@pytest.mark.parametrize("id", FLOWGYM_IDS)
@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # SB3 takes a latent for a picture and says how pictures should be
def test_stable_baselines3_check_env(id):
    sb3_check_env(gymnasium.make(id, discretization_steps=3))


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_one_seed_gives_the_same_episode_and_another_seed_another(id):
    env = gymnasium.make(id, discretization_steps=4)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(4)]
    first, again, other = (rollout(env, seed, actions) for seed in (3, 3, 4))
    assert data_equivalence(first, again, exact=True)
    assert not data_equivalence(first[0][0], other[0][0], exact=True)
    fresh = rollout(gymnasium.make(id, discretization_steps=4), 3, actions)
    assert data_equivalence(first, fresh, exact=True)


def test_wide_seeds_are_seeds_of_their_own():
    """Of a seed torch's generators on the CPU look at 32 bits."""
    seeds = [5, 2**32 + 5, 2**33 + 5, 2**62 + 5, 0, 2**32]
    env = gymnasium.make_vec("flowgym/GaussianMixture-Gaussian-v0", len(seeds))
    latents = env.reset(seed=seeds)[0]["latent"]
    assert len(np.unique(latents, axis=0)) == len(seeds)
    assert np.array_equal(env.reset(seed=seeds)[0]["latent"], latents)


def test_an_unseeded_reset_goes_on_with_the_random_stream(env):
    env.reset(seed=1)
    second, _ = env.reset()
    env.reset(seed=1)
    assert data_equivalence(env.reset()[0], second, exact=True)
    assert not data_equivalence(env.reset(seed=1)[0], second, exact=True)


def test_the_global_generators_are_left_alone(env):
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert (torch.rand(1).item(), np.random.rand()) == expected


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_spec_survives_json_and_makes_the_same_environment(id):
    from flowgym_gym.wrappers import CoarseAction, RewardScale, TimeGrid

    env, inner = (gymnasium.make(id, discretization_steps=3, **prompted(id)) for _ in range(2))
    wrapped = RewardScale(TimeGrid(inner, steps=2), scale=5.0)
    if len(env.action_space.shape) == 3:
        wrapped = CoarseAction(wrapped, resolution=2)
    for original in (env, wrapped):
        spec = gymnasium.envs.registration.EnvSpec.from_json(original.spec.to_json())
        for copy in (gymnasium.make(original.spec), gymnasium.make(spec)):
            assert copy.action_space == original.action_space
            assert copy.observation_space == original.observation_space
            actions = [
                np.full(original.action_space.shape, 0.3, np.float32)
            ] * copy.unwrapped.discretization_steps
            assert data_equivalence(
                rollout(copy, 5, actions), rollout(original, 5, actions), exact=True
            )
    json.loads(wrapped.spec.to_json())


def test_episode_length_rewards_and_infos(env):
    _, info = env.reset(seed=0)
    assert info == {"prompt": "a photo of a cat"}
    action = np.full(env.action_space.shape, 0.5, np.float32)
    for step in range(4):
        observation, reward, terminated, truncated, info = env.step(action)
        assert terminated is (step == 3)
        assert truncated is False
        assert isinstance(reward, float)
        assert info["control_cost"] > 0
        bonus = 100 * info["terminal_reward"] if terminated else 0
        assert reward == pytest.approx(bonus - info["control_cost"], rel=1e-12)
    assert observation["time"].tolist() == [1.0]
    assert info["valid"] is True
    assert 0 < info["terminal_reward"] < 1


def test_control_cost_weight_and_reward_scale_weigh_what_they_say():
    action = np.full((4, 8, 8), 0.5, np.float32)
    totals = {}
    for scale, weight in [(100.0, 1.0), (1.0, 1.0), (0.0, 2.0)]:
        env = gymnasium.make(
            RED, discretization_steps=3, reward_scale=scale, control_cost_weight=weight
        )
        steps = rollout(env, 0, [action] * 3)[1:]
        costs, terminal = sum(s[4]["control_cost"] for s in steps), steps[-1][4]["terminal_reward"]
        totals[scale] = (costs, terminal)
        assert sum(s[1] for s in steps) == pytest.approx(scale * terminal - weight * costs)
    assert len(set(totals.values())) == 1


def test_a_random_agent_pays_a_tenth_of_the_reward_scale():
    env = gymnasium.make(RED)
    env.action_space.seed(0)
    env.reset(seed=0)
    cost = sum(env.step(env.action_space.sample())[4]["control_cost"] for _ in range(50))
    assert cost == pytest.approx(10, rel=0.05)


def test_finite_actions_outside_the_space_are_clipped():
    env = gymnasium.make(RED, discretization_steps=2, disable_env_checker=True)
    large = rollout(env, 0, [np.full((4, 8, 8), 7.0)])
    limit = rollout(env, 0, [np.ones((4, 8, 8), np.float32)])
    assert data_equivalence(large[1][0], limit[1][0], exact=True)


@pytest.fixture(scope="module")
def ending_at(tmp_path_factory):
    """The embedded checkpoint by its scheduler's ``set_alpha_to_one``."""
    folder = tmp_path_factory.mktemp("checkpoint") / "noise_free"
    shutil.copytree(EMBEDDED / "tiny", folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "set_alpha_to_one": True}))
    return {False: EMBEDDED / "tiny", True: folder}


@pytest.mark.parametrize("guidance_scale", [3.0, *further(1.0)])
@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 7), *further(("trailing", 10))])
def test_zero_action_reproduces_diffusers_ddim(
    ending_at, guidance_scale, noise_level, set_alpha_to_one, spacing, steps
):
    """The whole episode: the network, its time steps, guidance and the sampler."""
    prompt, checkpoint = "a photo of a cat", ending_at[set_alpha_to_one]
    env = gymnasium.make(
        RED,
        checkpoint=str(checkpoint),
        discretization_steps=steps,
        guidance_scale=guidance_scale,
        noise_level=noise_level,
        spacing=spacing,
        negative_prompt="a red heart",
    )
    pipe = StableDiffusionPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, safety_checker=None
    )
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    assert ddim.config.set_alpha_to_one is set_alpha_to_one
    ddim.set_timesteps(steps)
    embeddings, negative = pipe.encode_prompt(prompt, "cpu", 1, guidance_scale > 1, "a red heart")

    observation, _ = env.reset(seed=11)
    x = torch.from_numpy(observation["latent"])[None]
    noise_source = torch.Generator()
    noise_source.set_state(env.unwrapped.rollout.streams.generators[0].get_state())
    for k in ddim.timesteps:
        with torch.no_grad():
            output = pipe.unet(x, k, embeddings).sample
            if guidance_scale > 1:
                unconditional = pipe.unet(x, k, negative).sample
                output = unconditional + guidance_scale * (output - unconditional)
        noise = torch.randn(x.shape, generator=noise_source)
        x = ddim.step(
            output, int(k), x, eta=noise_level, variance_noise=noise if noise_level else None
        ).prev_sample
        observation, *_, info = env.step(np.zeros((4, 8, 8), np.float32))
        np.testing.assert_allclose(observation["latent"], x[0].numpy(), rtol=0, atol=1e-4)
        assert info["control_cost"] == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_finished_picture_is_that_of_diffusers_pipeline(guidance_scale):
    env = gymnasium.make(
        RED,
        discretization_steps=8,
        noise_level=0.0,
        guidance_scale=guidance_scale,
        render_mode="rgb_array",
    )
    observation, info = env.reset(seed=2)
    start = torch.from_numpy(observation["latent"])[None]
    for _ in range(8):
        env.step(np.zeros((4, 8, 8), np.float32))
    pipe = StableDiffusionPipeline.from_pretrained(
        EMBEDDED / "tiny", dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        info["prompt"],
        latents=start,
        num_inference_steps=8,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images[0]
    difference = np.abs(env.render().astype(int) - np.round(255 * picture).astype(int))
    assert difference.max() <= 1
    assert env.render().std() > 10


def test_render_shows_a_picture_and_changes_nothing():
    plain, filmed = (
        gymnasium.make(RED, discretization_steps=3, render_mode=m) for m in (None, "rgb_array")
    )
    action = np.full((4, 8, 8), -0.2, np.float32)
    plain.reset(seed=0)
    filmed.reset(seed=0)
    for _ in range(3):
        frame = filmed.render()
        assert frame.shape == (64, 64, 3)
        assert frame.dtype == np.uint8
        assert data_equivalence(plain.step(action), filmed.step(action), exact=True)
    filmed.render()


def test_rendering_costs_no_second_network_call(model):
    env = gymnasium.make(RED, discretization_steps=2, render_mode="rgb_array").unwrapped
    calls = []
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        env.reset(seed=0)
        env.render()
        env.step(env.action_space.sample())
        assert len(calls) == 1
    finally:
        handle.remove()


def test_record_video_films_an_episode(tmp_path):
    pytest.importorskip("moviepy")
    env = gymnasium.make(RED, discretization_steps=3, render_mode="rgb_array")
    env = gymnasium.wrappers.RecordVideo(env, str(tmp_path), disable_logger=True)
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    env.close()
    assert [f.suffix for f in tmp_path.iterdir()] == [".mp4"]


def test_several_prompts_are_drawn_and_observed():
    prompts = ["a photo of a cat", "a red heart", "a green apple"]
    env = gymnasium.make(RED, prompts=prompts, discretization_steps=2)
    seen = {}
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        seen.setdefault(info["prompt"], observation["prompt"])
        np.testing.assert_array_equal(observation["prompt"], seen[info["prompt"]])
    assert set(seen) == set(prompts)
    assert len({v.tobytes() for v in seen.values()}) == 3
    _, info = env.reset(options={"prompt": "a blue car"})
    assert info["prompt"] == "a blue car"


def test_prompts_come_from_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a cat\n\na red heart\n")
    assert gymnasium.make(RED, prompts=str(path)).unwrapped.environment.base_model.prompts == [
        "a photo of a cat",
        "a red heart",
    ]


def test_returned_arrays_belong_to_the_caller(env):
    observation, _ = env.reset(seed=0)
    expected = rollout(env, 0, [np.zeros((4, 8, 8), np.float32)])[1][0]
    observation, _ = env.reset(seed=0)
    observation["latent"][:] = 1e6
    assert data_equivalence(env.step(np.zeros((4, 8, 8), np.float32))[0], expected, exact=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"discretization_stepz": 4}, UnknownOptionError, "did you mean 'discretization_steps'"),
        ({"action_typ": "noise"}, UnknownOptionError, "did you mean 'action_type'"),
        ({"rewad_kwargs": {}}, UnknownOptionError, "did you mean 'reward_kwargs'"),
        ({"discretization_steps": 0}, OptionError, "discretization_steps is 0"),
        ({"discretization_steps": 5000}, OptionError, "5000"),
        ({"action_type": "score"}, OptionError, "action_type is 'score'"),
        ({"action_scale": -1.0}, OptionError, "action_scale is -1.0"),
        ({"action_scale": float("nan")}, OptionError, "action_scale is nan"),
        ({"reward_scale": float("inf")}, OptionError, "reward_scale is inf"),
        ({"control_cost_weight": -1}, OptionError, "control_cost_weight is -1"),
        ({"noise_level": 2}, OptionError, "noise_level is 2"),
        ({"sampler": "dpm"}, OptionError, "sampler is 'dpm'"),
        ({"spacing": "even"}, OptionError, "spacing is 'even'"),
        ({"device": "meta"}, OptionError, "device is 'meta'"),
        ({"guidance_scale": -0.1}, OptionError, "guidance_scale is -0.1"),
        ({"guidance_scale": float("nan")}, OptionError, "guidance_scale is nan"),
        ({"prompts": []}, OptionError, "prompts is"),
        ({"prompts": ["a cat", " "]}, OptionError, "prompts is"),
        ({"prompts": "missing.txt"}, OptionError, "missing.txt"),
        ({"prompts": "cat " * 100}, OptionError, "tokens"),
        ({"device": "cuda:77"}, OptionError, "device is 'cuda:77'"),
        ({"device": "toaster"}, OptionError, "device is 'toaster'"),
        ({"dtype": "int8"}, OptionError, "dtype is 'int8'"),
        ({"render_mode": "human"}, OptionError, "render_mode is 'human'"),
        ({"reward": "1d/binary"}, OptionError, "same domain"),
        ({"reward": "images/reed"}, UnknownIdError, "did you mean 'images/red'"),
        ({"base_model": "images/stable_difusion"}, UnknownIdError, "did you mean"),
        ({"decode_batch_size": 0}, OptionError, "decode_batch_size is 0"),
    ],
)
def test_bad_options_are_named(options, error, message):
    from flowgym_gym.envs import DenoisingEnv

    with pytest.raises(error, match=message):
        DenoisingEnv(**options)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 8), np.float32), r"shape \(4, 8\), expected \(4, 8, 8\)"),
        (np.full((4, 8, 8), np.nan, np.float32), "nan"),
        (np.full((4, 8, 8), np.inf, np.float32), "inf"),
        (np.full((4, 8, 8), "a"), "dtype"),
        (np.zeros((4, 8, 8), np.complex64), "dtype"),
        (None, "dtype"),
        ([[1.0], [1.0, 2.0]], "ragged"),
    ],
)
def test_bad_actions_are_named_and_change_nothing(action, message):
    env = gymnasium.make(RED, discretization_steps=2, disable_env_checker=True)
    expected = rollout(env, 0, [np.zeros((4, 8, 8), np.float32)])
    env.reset(seed=0)
    with pytest.raises(ActionError, match=message):
        env.step(action)
    assert data_equivalence(env.step(np.zeros((4, 8, 8), np.float32)), expected[1], exact=True)


def test_steps_out_of_order_are_errors():
    env = gymnasium.make(RED, discretization_steps=1, render_mode="rgb_array").unwrapped
    action = np.zeros((4, 8, 8), np.float32)
    with pytest.raises(ResetNeededError, match="call reset first"):
        env.step(action)
    with pytest.raises(ResetNeededError, match="call reset first"):
        env.render()
    env.reset(seed=0)
    env.step(action)
    with pytest.raises(gymnasium.error.ResetNeeded, match="over"):
        env.step(action)
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(action), env.render):
        with pytest.raises(ClosedEnvironmentError, match="closed"):
            call()


def test_unknown_reset_options_are_errors(env):
    with pytest.raises(OptionError, match="promt"):
        env.reset(options={"promt": "a photo of a cat"})


def test_models_are_loaded_once_and_frozen():
    first, second = (
        gymnasium.make(RED, prompts=p).unwrapped.environment.base_model for p in ("a", "b")
    )
    assert first.unet is second.unet
    assert not first.unet.training
    assert not any(p.requires_grad for p in first.parameters())


def test_module_prefixed_id_registers_the_package():
    assert gymnasium.make(f"flowgym_gym:{RED}").spec.id == RED
    assert flowgym_gym.DenoisingEnv is type(gymnasium.make(RED).unwrapped)


def test_a_bfloat16_network_keeps_the_step_in_float32():
    """diffusers' own step in float32, given what the network returned, leads to the same latent."""
    env = gymnasium.make(RED, discretization_steps=3, dtype="bfloat16")
    unet = env.unwrapped.environment.base_model.unet
    assert unet.dtype is torch.bfloat16
    outputs = []
    handle = unet.register_forward_hook(lambda module, args, result: outputs.append(result[0]))
    try:
        visited = rollout(env, 0, [np.zeros((4, 8, 8), np.float32)] * 3)
        noise_source = torch.Generator().manual_seed(0)
        torch.randint(2**62, (), generator=noise_source)
    finally:
        handle.remove()
    ddim = DDIMScheduler.from_pretrained(EMBEDDED / "tiny" / "scheduler")
    ddim.set_timesteps(3)
    x = torch.from_numpy(visited[0][0]["latent"])[None]
    for k, output, step in zip(ddim.timesteps, outputs, visited[1:], strict=True):
        assert output.dtype is torch.bfloat16
        noise = torch.randn(x.shape, generator=noise_source)
        x = ddim.step(output.float(), int(k), x, eta=1.0, variance_noise=noise).prev_sample
        np.testing.assert_allclose(step[0]["latent"], x[0].numpy(), rtol=0, atol=1e-5)
        x = torch.from_numpy(step[0]["latent"])[None]


def test_spec_can_be_pickled(env):
    assert gymnasium.make(pickle.loads(pickle.dumps(env.spec))).spec == env.spec
