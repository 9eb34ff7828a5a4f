"""Every family of pipelines, on tiny ones with random weights; each is compared with diffusers' own
pipeline.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import gymnasium
import numpy as np
import pytest
import torch
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.dit import pipeline_dit

import flowgym_gym
from flowgym_gym import FlowTensor, VelocityEnvironment
from flowgym_gym.errors import CheckpointError, OptionError, StateError
from flowgym_gym.models import from_pipeline, from_pretrained
from flowgym_gym.models.pipeline import LatentBaseModel
from flowgym_gym.rewards.images import RedReward
from tests.conftest import RED
from tests.models import tiny

STEPS = 4
PROMPT = {name: ["a photo of a cat", "a red heart"] for name in tiny.BUILDERS} | {
    "dit": ["207", "3"]
}
FAMILIES = list(tiny.BUILDERS)
PROMPTED = [name for name in FAMILIES if name != "ddpm"]
FLOWS = ["stable_diffusion_3", "flux", "flux_schnell"]


def make(name, steps=STEPS, **options):
    """The environment, opened as a stranger would: from the folder, through the id that opens every
    family.
    """
    return flowgym_gym.make(
        "images/stable_diffusion",
        "images/red",
        steps,
        **{"checkpoint": tiny.folder(name), **tiny.OPTIONS.get(name, {}), **options},
    )


def start(env, name, n=2):
    return env.start(n, **({"prompt": PROMPT[name][:n]} if name in PROMPTED else {}))


def roll_out(env, x, kwargs, action=None):
    """Final states; the noise comes from torch's global generator, as in diffusers' schedulers."""
    states = x.data
    for i in range(env.discretization_steps):
        index = torch.full((len(states),), i)
        output = env.predict(FlowTensor(states), index, **kwargs)
        correction = torch.zeros_like(states) if action is None else action[i]
        noise = torch.randn_like(states) if env.noise_level > 0 else torch.zeros_like(states)
        states, _ = env.advance(states, output, correction, noise, index)
    return states


def diffusers_samples(name, env, x, monkeypatch, noise_level=0.0, **options):
    """Final latents of the checkpoint's own pipeline from the initial latents ``x``; seeded with 3."""
    kind = json.loads(Path(tiny.folder(name), "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, kind).from_pretrained(tiny.folder(name))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # opening a pipeline draws numbers, too
    height, width = getattr(env.base_model, "image_size", (None, None))
    common = {"num_inference_steps": env.discretization_steps}
    latent = {
        "height": height,
        "width": width,
        "output_type": "latent",
        "prompt": PROMPT[name][: len(x)],
    }
    if name in (
        "stable_diffusion",
        "stable_diffusion_2",
        "stable_diffusion_xl",
        "pixart",
        "pixart_sigma",
        "dit",
    ):
        spacing = {"timestep_spacing": SPACING[name]} if name in SPACING else {}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            pipe.scheduler.config, **NOT_CLIPPED, **spacing
        )
        common["eta"] = noise_level
    if name.startswith("pixart"):
        common["use_resolution_binning"] = False
    negative = options.pop("negative_prompt", "")
    if name.startswith("flux"):
        packed = pipe._pack_latents(x, len(x), *x.shape[1:])
        guided = (
            {"negative_prompt": [negative] * len(x)} if options.get("true_cfg_scale", 1) > 1 else {}
        )
        out = pipe(latents=packed, **latent, **common, **guided, **options).images
        return pipe._unpack_latents(out, height, width, pipe.vae_scale_factor)
    if name == "dit":
        decoded = []
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: x)
        decode = pipe.vae.decode
        monkeypatch.setattr(pipe.vae, "decode", lambda z: (decoded.append(z), decode(z))[1])
        del common["eta"]
        pipe([int(p) for p in PROMPT["dit"]], **common, **{"guidance_scale": 1.0, **options})
        return decoded[0] * pipe.vae.config.scaling_factor
    if name == "ddpm":
        pipe = diffusers.DDIMPipeline(
            pipe.unet, diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        )
        pipe.set_progress_bar_config(disable=True)
        monkeypatch.setattr(
            "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **kwargs: x
        )
        images = pipe(
            len(x), eta=noise_level, use_clipped_model_output=True, output_type="np", **common
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    if negative or name != "stable_diffusion_xl":
        options["negative_prompt"] = [negative] * len(x)
    if name.startswith("pixart"):
        options["negative_prompt"] = negative
    return pipe(latents=x, **latent, **common, **{"guidance_scale": 1.0, **options}).images


# The checkpoint's own is linspace, with which diffusers' DDIM steps to other times than it visits.
SPACING = {"pixart": "trailing", "pixart_sigma": "trailing"}
# Schedulers that do not clip say nothing of it, but DDIMScheduler clips unless it is told
# otherwise.
NOT_CLIPPED = {"clip_sample": False}


GUIDANCE = {
    "off": {},
    "on": {"guidance_scale": 3.0},
    "away from a prompt": {"guidance_scale": 3.0, "negative_prompt": "a red dog"},
}
CASES = [
    (name, guidance)
    for name in FAMILIES
    for guidance in GUIDANCE
    if name in PROMPTED or guidance == "off"
    if not (
        name == "dit" and guidance == "away from a prompt"
    )  # diffusers' pipeline has no negative class
]


def guided(name, guidance):
    options = GUIDANCE[guidance]
    if name.startswith("flux") and "guidance_scale" in options:
        options = {**options, "true_cfg_scale": options["guidance_scale"], "guidance_scale": 2.0}
        if name == "flux_schnell":
            del options["guidance_scale"]
    return options


@pytest.mark.parametrize(("name", "guidance"), CASES)
@torch.no_grad()
def test_zero_action_is_the_pipelines_own_sampler(name, guidance, monkeypatch):
    options = guided(name, guidance)
    env = make(name, noise_level=0.0, spacing=SPACING.get(name), **options)
    x, kwargs = start(env, name)
    expected = diffusers_samples(name, env, x.data, monkeypatch, **options)
    ours = roll_out(env, x, kwargs)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PROMPTED if name != "dit"])
@torch.no_grad()
def test_pictures_are_those_of_the_pipeline(name):
    """Of autoencoders that scale, shift and normalise their latents."""
    pipe = tiny.build(name)
    if name == "stable_diffusion_xl":
        pipe.vae.register_to_config(
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]
        )
    model = from_pipeline(pipe, **tiny.OPTIONS.get(name, {}))
    height, width = model.image_size
    latents = {}

    def keep(pipe, step, timestep, kwargs):
        latents["last"] = kwargs["latents"]
        return {}

    options = {"callback_on_step_end": keep}
    if name.startswith("pixart"):
        options = {
            "use_resolution_binning": False,
            "callback_steps": 1,
            "callback": lambda step, timestep, x: latents.update(last=x),
        }
    prompt = PROMPT[name][0]
    images = pipe(
        prompt, num_inference_steps=2, height=height, width=width, output_type="pt", **options
    ).images
    last = latents["last"]
    if name.startswith("flux"):
        last = pipe._unpack_latents(last, height, width, pipe.vae_scale_factor)
    torch.testing.assert_close(model.postprocess(FlowTensor(last)).data, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*FLOWS, "dit")])
@torch.no_grad()
def test_zero_action_with_noise_is_ancestral_sampling(name, monkeypatch):
    env = make(name, noise_level=1.0, spacing=SPACING.get(name))
    x, kwargs = start(env, name)
    torch.manual_seed(3)
    ours = roll_out(env, x, kwargs)
    expected = diffusers_samples(name, env, x.data, monkeypatch, noise_level=1.0)
    # Random networks leave PixArt's latents in the hundreds, where float32 itself is coarser than
    # 1e-5.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-4)


@torch.no_grad()
def test_noise_level_one_of_a_pixel_model_is_ddpms_own_sampler(monkeypatch):
    """With clipping at every step."""
    pipe = diffusers.DDPMPipeline.from_pretrained(tiny.folder("ddpm"))
    pipe.set_progress_bar_config(disable=True)
    env = make("ddpm", 250, noise_level=1.0)
    x, _ = env.start(1)
    torch.manual_seed(3)
    ours = roll_out(env, x, {})
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *args, **kwargs: x.data)
    torch.manual_seed(3)
    images = pipe(1, output_type="np", num_inference_steps=250).images
    torch.testing.assert_close(
        ours, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "flux_schnell"])
@pytest.mark.parametrize("steps", [1, 5, 28])
@torch.no_grad()
def test_flow_grids_hold_the_noise_levels_of_the_pipeline_to_the_digit(name, steps, monkeypatch):
    env = make(name, steps, noise_level=0.0)
    seen, expected = [], []
    env.base_model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    x, kwargs = start(env, name)
    pipe = tiny.build(name)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: expected.append(kwargs["timestep"]), with_kwargs=True
    )
    latents = pipe._pack_latents(x.data, 2, *x.shape[1:]) if name.startswith("flux") else x.data
    height, width = env.base_model.image_size
    pipe(
        "a cat",
        latents=latents[:1],
        num_inference_steps=steps,
        height=height,
        width=width,
        output_type="latent",
    )
    assert torch.equal(env.grid.beta, pipe.scheduler.sigmas.double())
    roll_out(env, x, kwargs)
    for ours, theirs in zip(seen, expected, strict=True):
        scale = 1000 if name.startswith("flux") else 1
        torch.testing.assert_close(ours[:1] * scale, theirs[:1] * scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "shift", [{"shift": 1.0}, {"use_dynamic_shifting": True, "shift_terminal": 0.02}]
)
def test_shifts_of_the_checkpoint_decide_the_grid(shift):
    pipe = tiny.stable_diffusion_3(**shift)
    model = from_pipeline(pipe)
    mu = (
        {"mu": 0.5 + (1.15 - 0.5) / (4096 - 256) * (4 - 256)}
        if "use_dynamic_shifting" in shift
        else {}
    )
    pipe.scheduler.set_timesteps(7, **mu)
    assert torch.equal(model.scheduler.time_grid(7).beta, pipe.scheduler.sigmas.double())
    even = model.scheduler.time_grid(4, "linspace").beta
    torch.testing.assert_close(even, torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    assert model.scheduler.time_grid([0.1, 0.4]).times.tolist() == [0.1, 0.4, 1.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_checkpoint_opens_through_the_stable_diffusion_id(name):
    env = gymnasium.make(
        RED,
        checkpoint=tiny.folder(name),
        discretization_steps=2,
        render_mode="rgb_array",
        **tiny.OPTIONS.get(name, {}),
    )
    observation, info = env.reset(seed=0)
    model = env.unwrapped.environment.base_model
    assert type(model.pipe).__name__ in model.pipelines
    assert ("prompt" in info) == (name in PROMPTED)
    for terminated in (False, True):
        observation, _, done, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
        assert done == terminated
        assert np.isfinite(observation["latent"]).all()
    assert 0 <= info["terminal_reward"] <= 1
    scale = 1 if name == "ddpm" else model.vae_scale
    assert env.render().shape == (model.state_shape[1] * scale, model.state_shape[2] * scale, 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", ["off", "on"])
@torch.no_grad()
def test_one_call_of_the_network_per_step(name, guidance):
    if name == "ddpm" and guidance == "on":
        pytest.skip("has no guidance")
    env = make(name, **guided(name, guidance))
    batches = []
    handle = env.base_model.denoiser.register_forward_hook(
        lambda module, args, output: batches.append(len(output[0]))
    )
    x, kwargs = start(env, name)
    roll_out(env, x, kwargs)
    handle.remove()
    assert batches == [2 if guidance == "off" else 4] * STEPS


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_batch_equals_its_single_runs(name):
    env = make(name, noise_level=0.0, **(guided(name, "on") if name in PROMPTED else {}))
    x, kwargs = start(env, name)
    whole = env.score(FlowTensor(roll_out(env, x, kwargs)))[0].data
    for i in range(2):
        options = {"prompt": PROMPT[name][i : i + 1]} if name in PROMPTED else {}
        single, kwargs = env.base_model.preprocess(x[i], **options)
        alone = env.score(FlowTensor(roll_out(env, single, kwargs)))[0].data
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_half_precision_stays_near_float32(name, dtype):
    env, exact = (make(name, dtype=d, noise_level=0.0) for d in (dtype, "float32"))
    x, kwargs = start(env, name)
    assert env.base_model.denoiser.dtype == getattr(torch, dtype)
    ours, expected = roll_out(env, x, kwargs), roll_out(exact, *start_from(exact, name, x))
    assert ours.dtype == torch.float32
    assert (ours - expected).std() < (0.01 if dtype == "float16" else 0.08) * expected.std()
    images, _, _ = env.score(FlowTensor(ours))
    torch.testing.assert_close(
        images.data, exact.score(FlowTensor(ours))[0].data, rtol=0, atol=0.05
    )


def start_from(env, name, x):
    return env.base_model.preprocess(x, **({"prompt": PROMPT[name]} if name in PROMPTED else {}))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_memory_options_change_no_result(name):
    memory = (
        ["attention_slicing"]
        if name == "ddpm"
        else ["attention_slicing", "vae_slicing", "vae_tiling"]
    )
    plain, frugal = make(name, noise_level=0.0), make(name, noise_level=0.0, memory=memory)
    assert plain.base_model.pipe is not frugal.base_model.pipe
    x, _ = start(plain, name)
    results = [
        env.score(FlowTensor(roll_out(env, *start_from(env, name, x))))[0].data
        for env in (plain, frugal)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_tiled_decoder_gives_diffusers_own_tiles():
    model = from_pipeline(tiny.build("stable_diffusion"), memory="vae_tiling", height=64, width=96)
    latents = torch.randn(1, 4, 32, 48)
    expected = tiny.build("stable_diffusion").vae
    expected.enable_tiling()
    assert expected.tile_latent_min_size < 32
    images = expected.decode(latents / expected.config.scaling_factor).sample
    torch.testing.assert_close(
        model.postprocess(FlowTensor(latents)).data, (images / 2 + 0.5).clamp(0, 1)
    )


@pytest.mark.parametrize("option", ["model_cpu_offload", "sequential_cpu_offload"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_offloading_changes_no_result(name, option):
    """Where there is an accelerator; elsewhere it is refused."""
    pytest.importorskip("accelerate")
    if not torch.cuda.is_available():
        with pytest.raises(
            OptionError, match=f"memory names '{option}', .* but the device is 'cpu'"
        ):
            make(name, memory=option)
        return
    device = "cuda"
    plain, frugal = (
        make(name, noise_level=0.0, device=device, memory=memory) for memory in ((), option)
    )
    x, _ = start(plain, name)
    results = [
        env.score(FlowTensor(roll_out(env, *start_from(env, name, x))))[0].data
        for env in (plain, frugal)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_are_frozen_and_in_evaluation_mode(name):
    for model in (
        from_pretrained(tiny.folder(name), **tiny.OPTIONS.get(name, {})),
        from_pipeline(tiny.build(name), **tiny.OPTIONS.get(name, {})),
    ):
        parts = [
            part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module)
        ]
        assert parts
        for part in [model, *parts]:
            assert not part.training
            assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_reward_agree_with_finite_differences(name):
    """Along a whole steered episode, decoding included, as gradient-based fine-tuning needs them."""
    options = (
        {"guidance_scale": 2.0} if name in PROMPTED and name not in ("flux", "flux_schnell") else {}
    )
    model = from_pipeline(
        tiny.build(name).to(torch.float64), **tiny.OPTIONS.get(name, {}), **options
    )
    env = VelocityEnvironment(model, RedReward(), 2, noise_level=0.0, action_scale=0.1)
    with torch.no_grad():
        x, kwargs = start(env, name, 1)
    x = x.to(torch.float64)
    action = torch.randn(2, *x.shape, dtype=torch.float64).requires_grad_()

    def reward(action):
        return (
            env.base_model.postprocess(FlowTensor(roll_out(env, x, kwargs, action)))
            .data[:, 0]
            .mean()
        )

    (gradient,) = torch.autograd.grad(reward(action), action)
    direction = torch.randn_like(gradient)
    # Flux turns its tokens in float32.
    step, rtol = (1e-2, 1e-2) if name.startswith("flux") else (1e-5, 1e-4)
    with torch.no_grad():
        difference = (reward(action + step * direction) - reward(action - step * direction)) / (
            2 * step
        )
    assert difference.abs() > 1e-9
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=rtol, atol=1e-12)


@torch.no_grad()
def test_fine_tuned_networks_and_other_autoencoders(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = tiny.stable_diffusion()
    other.unet.save_pretrained(tmp_path / "tuned")
    other.save_pretrained(tmp_path / "whole")
    reference = tiny.build("stable_diffusion")
    reference.unet, reference.vae = other.unet, other.vae
    expected = from_pipeline(reference)
    changed = from_pretrained(
        tiny.folder("stable_diffusion"),
        denoiser=str(tmp_path / "tuned"),
        vae=str(tmp_path / "whole"),
    )
    x, kwargs = expected.preprocess(FlowTensor(torch.randn(1, 4, 4, 8)), prompt=["a red heart"])
    t = torch.tensor([0.5])
    assert torch.equal(changed(x, t, **kwargs).data, expected(x, t, **kwargs).data)
    assert torch.equal(changed.postprocess(x).data, expected.postprocess(x).data)
    with pytest.raises(
        CheckpointError, match=r"holds a UNet2DConditionModel, .* cannot be the 'vae'"
    ):
        from_pretrained(tiny.folder("stable_diffusion"), vae=str(tmp_path / "tuned"))


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
)
@torch.no_grad()
def test_lora_weights_act_as_in_diffusers(name, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny.build(name)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, part)
    network.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers = peft.get_peft_model_state_dict(network)
    type(pipe).save_lora_weights(tmp_path, **{f"{part}_lora_layers": layers})
    reference = tiny.build(name)
    reference.load_lora_weights(tmp_path)
    reference.set_adapters(reference.get_active_adapters(), adapter_weights=[0.7])
    expected, plain = from_pipeline(reference, **tiny.OPTIONS.get(name, {})), make(name).base_model
    (file,) = tmp_path.glob("*.safetensors")
    for lora in (tmp_path, file):
        ours = make(name, lora=str(lora), lora_scale=0.7).base_model
        x, kwargs = start(make(name), name)
        t = torch.tensor([0.3, 0.8])
        output = ours(x, t, **kwargs).data
        torch.testing.assert_close(output, expected(x, t, **kwargs).data, rtol=0, atol=1e-5)
        assert (output - plain(x, t, **kwargs).data).abs().max() > 1e-3


def test_lora_weights_are_refused_where_they_do_not_fit(tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights are not loaded"):
        from_pretrained(tiny.folder("stable_diffusion"), lora=str(tmp_path / "lora.bin"))
    with pytest.raises(OptionError, match="a DiTPipeline takes no LoRA weights"):
        from_pretrained(tiny.folder("dit"), lora=str(tmp_path))


@pytest.mark.parametrize("name", PROMPTED)
def test_each_prompt_is_encoded_once_and_has_its_own_embedding(name):
    model = from_pipeline(tiny.build(name), prompts=PROMPT[name], **tiny.OPTIONS.get(name, {}))
    encoded = []
    encode = model.encode
    model.encode = lambda prompt: (encoded.append(prompt), encode(prompt))[1]
    x, kwargs = model.sample_p0(4, prompt=PROMPT[name] * 2)
    _, kwargs = model.preprocess(x, **kwargs)
    embeddings = model.embed_prompts(PROMPT[name])
    assert sorted(encoded) == sorted(PROMPT[name])
    assert embeddings.shape[0] == 2
    assert not torch.equal(*embeddings)
    for condition in model.conditions:
        assert len(kwargs[condition]) == 4
        assert torch.equal(kwargs[condition][0], kwargs[condition][2])


def test_a_pipeline_without_its_t5_encoder(monkeypatch):
    pipe = tiny.build("stable_diffusion_3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), 3, noise_level=0.0)
    with torch.no_grad():
        x, kwargs = start(env, "stable_diffusion_3")
        latents = pipe(
            PROMPT["stable_diffusion_3"],
            latents=x.data,
            num_inference_steps=3,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        torch.testing.assert_close(roll_out(env, x, kwargs), latents, rtol=0, atol=1e-4)


@torch.no_grad()
def test_size_conditions_of_pixart_alpha():
    """Checkpoints for 1024 pixels are told the size of the picture."""
    pipe = tiny.pixart(
        sample_size=128,
        patch_size=64,
        use_additional_conditions=True,
        attention_head_dim=12,
        cross_attention_dim=24,
    )
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), 2, noise_level=0.0)
    x, kwargs = start(env, "pixart", 1)
    latents = pipe(
        "a photo of a cat",
        latents=x.data,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        use_resolution_binning=False,
    ).images
    torch.testing.assert_close(roll_out(env, x, kwargs), latents, rtol=0, atol=1e-4)


def test_a_state_knows_the_guidance_that_a_network_takes_as_an_input():
    make = lambda scale: gymnasium.make(  # noqa: E731
        "flowgym/Flux-Red-v0",
        checkpoint=tiny.folder("flux"),
        **tiny.OPTIONS["flux"],
        guidance_scale=scale,
    )
    env = make(2.0)
    env.reset(seed=0)
    state = env.unwrapped.get_state()
    make(2.0).unwrapped.set_state(state)
    with pytest.raises(StateError, match=r"distilled_guidance = 2.0, but this one has 3.5"):
        make(None).unwrapped.set_state(state)


def test_classes_by_number_and_by_label():
    model = from_pipeline(
        tiny.build("dit"),
        prompts="golden retriever",
        negative_prompt="Tinca tinca",
        guidance_scale=2,
    )
    assert model.class_of("golden retriever") == model.class_of("207") == 207
    _, kwargs = model.preprocess(*model.sample_p0(2)[:1], prompt=["207", "5"])
    assert kwargs["class_labels"].tolist() == [207, 5]
    assert kwargs["negative_class_labels"].tolist() == [0, 0]
    with pytest.raises(OptionError, match="did you mean 'golden retriever'"):
        model.class_of("golden retreiver")
    with pytest.raises(OptionError, match="a number from 0 to 999"):
        from_pretrained(tiny.folder("dit"), prompts="1000")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux_schnell", {"guidance_scale": 3.0}, "not guidance-distilled"),
        ("flux", {"height": 30}, "height is 30, expected a multiple of 4 pixels"),
        ("stable_diffusion_3", {"width": 0}, "width is 0"),
        ("stable_diffusion", {"memory": "magic"}, "memory names 'magic'"),
        ("ddpm", {"memory": "vae_tiling"}, "a DDPMPipeline has no vae.enable_tiling"),
        ("flux", {"prompts": "cat " * 300}, "but the checkpoint takes 512"),
        ("stable_diffusion_3", {"prompts": "cat " * 150}, "but the checkpoint takes 256"),
        ("stable_diffusion_xl", {"prompts": "cat " * 50}, "but the checkpoint takes 32"),
        ("pixart", {"prompts": "cat " * 60}, "but the checkpoint takes 120"),
    ],
)
def test_options_that_do_not_fit_are_named(name, options, message):
    with pytest.raises(OptionError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    "family", ["StableDiffusionXL", "StableDiffusion3", "Flux", "PixArt", "DiT", "DDPM"]
)
def test_an_id_without_an_embedded_checkpoint_asks_for_one(family):
    with pytest.raises(
        CheckpointError,
        match="give checkpoint=, a local folder in diffusers' format or a Hub id such",
    ):
        gymnasium.make(f"flowgym/{family}-Red-v0", checkpoint=None)


def test_a_checkpoint_of_another_family_is_named():
    with pytest.raises(
        CheckpointError, match=r"holds a DiTPipeline, expected a FluxPipeline; .*from_pretrained"
    ):
        gymnasium.make("flowgym/Flux-Red-v0", checkpoint=tiny.folder("dit"))


def changed_index(name, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(tiny.folder(name), copy)
    index = json.loads((copy / "model_index.json").read_text())
    change(index)
    (copy / "model_index.json").write_text(json.dumps(index))
    return str(copy)


def test_labels_are_read_from_the_index(tmp_path):
    """Where facebook/DiT-XL-2-256 keeps them."""
    labels = {"0": "tench, Tinca tinca", "207": "golden retriever"}
    folder = changed_index("dit", tmp_path, lambda index: index.update(id2label=labels))
    assert (
        from_pretrained(folder, prompts=["golden retriever", "Tinca tinca"]).class_of(
            "golden retriever"
        )
        == 207
    )


def test_corrections_of_the_noise_are_refused_where_a_flow_model_has_only_noise():
    with pytest.raises(OptionError, match=r"singular at time 0 .*take velocity corrections"):
        make("flux", action_type="noise")
    env = make("flux", [0.1, 0.5], action_type="noise")
    assert torch.isfinite(env.sample(2).control_costs).all()


def test_an_unsupported_pipeline_is_named_with_those_that_are_supported(tmp_path):
    folder = changed_index(
        "dit", tmp_path, lambda index: index.update(_class_name="KandinskyPipeline")
    )
    message = (
        "holds a KandinskyPipeline, which is not supported; supported are DDIMPipeline, "
        "DDPMPipeline, DiTPipeline"
    )
    for opening in (from_pretrained, lambda checkpoint: gymnasium.make(RED, checkpoint=checkpoint)):
        with pytest.raises(CheckpointError, match=message):
            opening(folder)
    with pytest.raises(CheckpointError, match="this pipeline holds a ScoreSdeVePipeline"):
        from_pipeline(type("ScoreSdeVePipeline", (), {"components": {}})())


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(transformer=["my_code", "MyTransformer"]),
        lambda index: index.update(_class_name=["my_code", "MyPipeline"]),
    ],
)
def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path, change):
    folder = changed_index("dit", tmp_path, change)
    (tmp_path / "copy" / "my_code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="needs code of its own; that is never run"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "has no discrete noise schedule"),
        (diffusers.DDIMScheduler(thresholding=True), "has dynamic thresholding"),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "predicts 'flow_prediction'",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(scheduler, message):
    pipe = tiny.build("dit")
    pipe.scheduler = scheduler
    with pytest.raises(CheckpointError, match=message):
        from_pipeline(pipe)


def test_a_flow_model_needs_a_flow_matching_scheduler():
    pipe = tiny.build("stable_diffusion_3")
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(CheckpointError, match="expected a FlowMatchEulerDiscreteScheduler"):
        from_pipeline(pipe)


@pytest.mark.parametrize("option", ["denoiser", "vae", "lora"])
def test_pickled_parts_are_refused_even_where_they_fit(option, tmp_path):
    pipe = tiny.build("stable_diffusion")
    if option == "lora":
        peft = pytest.importorskip("peft")
        pipe.unet.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        )
        layers = peft.get_peft_model_state_dict(pipe.unet)
        pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, safe_serialization=False)
    else:
        (pipe.unet if option == "denoiser" else pipe.vae).save_pretrained(
            tmp_path, safe_serialization=False
        )
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        from_pretrained(tiny.folder("stable_diffusion"), **{option: str(tmp_path)})


def test_an_open_pipeline_is_taken_as_it_is():
    pipe = tiny.build("stable_diffusion")
    model = from_pipeline(pipe, guidance_scale=2.0)
    assert isinstance(model, LatentBaseModel)
    assert model.pipe is pipe
    with pytest.raises(OptionError, match="taken as it is"):
        from_pipeline(pipe, lora="some/lora")


@pytest.mark.second
def test_a_hub_id_opens_from_the_local_cache_without_a_network(tmp_path):
    """In the layout that downloads leave behind, read by another process that must not reach the
    network.
    """
    pipe, commit = tiny.build("stable_diffusion_xl"), "0123abcd" * 5
    pipe.vae.save_pretrained(tmp_path / "vae")
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet)
    )
    for name, folder in (
        ("tiny-xl", tiny.folder("stable_diffusion_xl")),
        ("vae-fix", tmp_path / "vae"),
        ("style", tmp_path / "lora"),
    ):
        repository = tmp_path / "hub" / f"models--somebody--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    code = (
        "import gymnasium, flowgym_gym\n"
        f"env = gymnasium.make({RED!r}, checkpoint='somebody/tiny-xl', "
        "denoiser='hub:somebody/tiny-xl',"
        " vae='somebody/vae-fix', lora='somebody/style', discretization_steps=2)\n"
        "print(type(env.unwrapped.environment.base_model).__name__, env.reset(seed=0)[0]['latent'].shape)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "StableDiffusionXLBaseModel (4, 4, 8)"


def test_a_model_of_pixels_may_keep_its_files_at_the_root(tmp_path):
    """As google/ddpm-cifar10-32 does."""
    for path in (f"{tiny.folder('ddpm')}/unet", f"{tiny.folder('ddpm')}/scheduler"):
        shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    shutil.copy(f"{tiny.folder('ddpm')}/model_index.json", tmp_path)
    model, expected = from_pretrained(str(tmp_path)), from_pretrained(tiny.folder("ddpm"))
    x, t = FlowTensor(torch.randn(1, 3, 8, 8)), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(model(x, t).data, expected(x, t).data)
