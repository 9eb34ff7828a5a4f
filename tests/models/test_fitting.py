"""Checkpoints whose parts users vary: each is read as diffusers reads it, or refused by name when
it is opened.
"""

import json
import shutil
from pathlib import Path

import diffusers
import gymnasium
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

import flowgym_gym
from flowgym_gym import FlowTensor, VelocityEnvironment
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models import from_pipeline, from_pretrained
from flowgym_gym.rewards.images import RedReward
from flowgym_gym.schedulers import DiffusionScheduler
from tests.conftest import RED, further
from tests.models import tiny
from tests.models.test_families import roll_out

TRAILING = {**tiny.DDIM, "timestep_spacing": "trailing"}


def changed(name, tmp_path, part, **values):
    """A copy of a tiny checkpoint with other values in the configuration of a part."""
    folder = Path(shutil.copytree(tiny.folder(name), tmp_path / "copy"))
    (file,) = (
        (folder / part).glob("*config.json")
        if part != "tokenizer"
        else [folder / part / "tokenizer_config.json"]
    )
    config = {**json.loads(file.read_text()), **values}
    file.write_text(
        json.dumps({key: value for key, value in config.items() if value != "left out"})
    )
    return str(folder)


# Zero terminal signal-to-noise ratio.


def latents_of_diffusers(pipe, x, steps, eta):
    """Final latents of the pipeline's own DDIM sampler; seeded with 3."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    common = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(["a cat", "a red heart"], latents=x, eta=eta, **common).images


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 5])
@torch.no_grad()
def test_zero_terminal_snr_is_sampled_as_by_diffusers(prediction, eta, steps):
    scheduler = diffusers.DDIMScheduler(
        **TRAILING, prediction_type=prediction, rescale_betas_zero_snr=True
    )
    pipe = tiny.stable_diffusion(scheduler)
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), steps, noise_level=eta)
    assert env.grid.alpha[0] == 0
    x, kwargs = env.start(2, prompt=["a cat", "a red heart"])
    torch.manual_seed(3)
    torch.testing.assert_close(
        roll_out(env, x, kwargs), latents_of_diffusers(pipe, x.data, steps, eta), rtol=0, atol=1e-4
    )


def zero_snr(kind=diffusers.DDIMScheduler, **options):
    return kind(**TRAILING, rescale_betas_zero_snr=True, **options)


@pytest.mark.parametrize("action_type", ["velocity", "control"])
@pytest.mark.parametrize(
    "sampler", [{}, {"noise_level": 0.0}, {"sampler": "euler", "noise_schedule": 0.5}]
)
def test_zero_terminal_snr_is_steered_at_finite_costs(action_type, sampler):
    pipe = tiny.stable_diffusion(zero_snr(prediction_type="v_prediction"))
    env = flowgym_gym.make(
        "images/stable_diffusion",
        "images/red",
        4,
        checkpoint=pipe,
        action_type=action_type,
        action_scale=None,
        **sampler,
    )
    policy = lambda x, t, **kwargs: x * 0 + 1  # noqa: E731
    sample = env.sample(2, policy)
    assert 0 < env.action_scale < 10
    assert torch.isfinite(sample.latents.data).all()
    assert torch.isfinite(sample.control_costs).all()
    assert (sample.control_costs[0] > 0).all()


def test_a_velocity_of_pure_noise_moves_the_next_state_as_its_neighbours_do():
    scheduler = DiffusionScheduler.from_diffusers(zero_snr())
    t = torch.tensor([0.001, 0.002, 0.01], dtype=torch.float64)
    alpha = scheduler.alphas_cumprod.sqrt()
    assert scheduler.alpha(t[:1]) == 0
    torch.testing.assert_close(scheduler.alpha_dot(t[:1]), 1000 * alpha[-2:-1])
    assert 0.5 < scheduler.alpha_dot(t[:1]) / scheduler.alpha_dot(t[2:]) < 1.5
    assert torch.isinf(scheduler.sigma(t[:1]))


@pytest.mark.parametrize(
    "kind", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler]
)
def test_zero_terminal_snr_of_solvers_is_that_of_ddim(kind):
    """They put 2**-24 there, which the network has never seen."""
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours = DiffusionScheduler.from_diffusers(kind(**options, rescale_betas_zero_snr=True))
    assert torch.equal(ours.alphas_cumprod.float(), zero_snr().alphas_cumprod)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"'epsilon' predictions .* singular at time 0\.001 .*velocity or the endpoint.*spacing 'leading'",
        ),
        ({"sampler": "euler"}, "singular"),
        (
            {"prediction_type": "v_prediction", "action_type": "noise"},
            "take velocity corrections, or controls",
        ),
        (
            {"prediction_type": "v_prediction", "sampler": "euler"},
            "take the 'ddim' sampler or a constant noise_schedule",
        ),
    ],
)
def test_what_is_singular_without_signal_is_named(options, message):
    prediction = options.pop("prediction_type", "epsilon")
    pipe = tiny.stable_diffusion(zero_snr(prediction_type=prediction))
    with pytest.raises(OptionError, match=message):
        flowgym_gym.make("images/stable_diffusion", "images/red", 4, checkpoint=pipe, **options)
    options["spacing"] = "leading"
    flowgym_gym.make("images/stable_diffusion", "images/red", 4, checkpoint=pipe, **options)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@torch.no_grad()
def test_zero_terminal_snr_with_clipping_is_sampled_as_by_diffusers(prediction, monkeypatch):
    pipe = tiny.ddpm()
    pipe.scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction
    )
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), 4, noise_level=0.0)
    x, kwargs = env.start(2)
    monkeypatch.setattr(
        "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **kwargs: x.data
    )
    ddim = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)
    ddim.scheduler = pipe.scheduler
    ddim.set_progress_bar_config(disable=True)
    images = ddim(2, num_inference_steps=4, use_clipped_model_output=True, output_type="np").images
    ours = env.base_model.postprocess(FlowTensor(roll_out(env, x, kwargs))).data
    torch.testing.assert_close(
        ours, torch.from_numpy(images).permute(0, 3, 1, 2), rtol=0, atol=1e-5
    )


def test_clipping_what_a_noise_says_of_no_signal_is_refused():
    pipe = tiny.ddpm()
    pipe.scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(
        CheckpointError, match="clip_sample, rescale_betas_zero_snr and prediction_type 'epsilon'"
    ):
        from_pipeline(pipe)


@pytest.mark.parametrize(
    "output_type", ["epsilon", "score", "velocity", "endpoint", "v_prediction"]
)
def test_the_training_loss_is_finite_without_signal(output_type):
    from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel

    model = GaussianMixtureBaseModel(output_type=output_type)
    model._scheduler = DiffusionScheduler.from_diffusers(zero_snr())
    x1 = model.sample_p1(4)
    eps = torch.randn(4, 1)
    t = torch.full((4,), 0.001)
    schedule = [
        getattr(model.scheduler, name)(t[:1]) for name in ("alpha", "beta", "alpha_dot", "beta_dot")
    ]
    alpha, beta, alpha_dot, beta_dot = schedule
    target = {
        "epsilon": eps,
        "score": -eps / beta,
        "velocity": alpha_dot * x1.data + beta_dot * eps,
        "endpoint": x1.data,
        "v_prediction": alpha * eps - beta * x1.data,
    }[output_type]
    xt = FlowTensor(alpha * x1.data + beta * eps)
    expected = (model(xt, t).data - target).square().mean(dim=1)
    torch.testing.assert_close(model.train_loss(x1, xt, t), expected)


# The scheduler's own schedule.

STEPS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    "options", [{"steps_offset": 1}, *further({}, {"timestep_spacing": "trailing"})]
)
def test_an_open_scheduler_visits_the_times_that_it_visits_when_saved(kind, options, tmp_path):
    if kind == "DPMSolverSinglestepScheduler":
        options = {}  # it takes none of these
    pipe = tiny.stable_diffusion(getattr(diffusers, kind)(**STEPS, **options))
    pipe.scheduler.save_pretrained(tmp_path)
    saved = type(pipe.scheduler).from_pretrained(tmp_path)
    ours, again = (
        DiffusionScheduler.from_diffusers(scheduler).time_grid(4)
        for scheduler in (pipe.scheduler, saved)
    )
    for name in ("timesteps", "alpha", "beta", "sigma"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(again, name), rtol=0, atol=0, equal_nan=True
        )
    # A configuration that was read from a file has all of its values, and so DDIM takes them over.
    ddim = diffusers.DDIMScheduler.from_config(saved.config)
    ddim.set_timesteps(4)
    assert ours.timesteps.tolist() == ddim.timesteps.tolist()
    abar = pipe.scheduler.alphas_cumprod[ddim.timesteps].double()
    torch.testing.assert_close(ours.alpha[:-1].square(), abar, rtol=1e-12, atol=0)
    assert (
        ours.alpha[-1] ** 2 == pytest.approx(float(ddim.final_alpha_cumprod))
        or kind == "CogVideoXDDIMScheduler"
    )


@pytest.mark.parametrize("name", sorted(tiny.BUILDERS))
def test_an_open_pipeline_visits_the_times_of_the_same_pipeline_saved(name):
    options = tiny.OPTIONS.get(name, {})
    ours = from_pipeline(tiny.build(name), **options).scheduler.time_grid(4)
    saved = from_pretrained(tiny.folder(name), **options).scheduler.time_grid(4)
    assert torch.equal(ours.times, saved.times)
    assert torch.equal(ours.alpha, saved.alpha)
    assert torch.equal(ours.beta, saved.beta)


def test_a_flow_scheduler_keeps_the_shift_that_it_was_told():
    pipe = tiny.build("stable_diffusion_3")
    pipe.scheduler.set_shift(7.0)
    grid = from_pipeline(pipe).scheduler.time_grid(5)
    pipe.scheduler.set_timesteps(5)
    assert torch.equal(grid.beta, pipe.scheduler.sigmas.double())


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift_terminal": 0.1},
    ],
)
def test_flow_schedulers_have_their_own_noise_levels(options):
    pipe = tiny.stable_diffusion_3(**options)
    model = from_pipeline(pipe)
    mu = (
        {"mu": 0.5 + (1.15 - 0.5) / (4096 - 256) * (4 - 256)}
        if "use_dynamic_shifting" in options
        else {}
    )
    pipe.scheduler.set_timesteps(6, **mu)
    assert torch.equal(model.scheduler.time_grid(6).beta, pipe.scheduler.sigmas.double())


def test_a_heun_flow_scheduler_has_the_noise_levels_that_it_steps_over_twice():
    pipe = tiny.build("stable_diffusion_3")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    grid = from_pipeline(pipe).scheduler.time_grid(6)
    pipe.scheduler.set_timesteps(6)
    torch.testing.assert_close(grid.beta[1:], pipe.scheduler.sigmas[1::2].double())


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
        diffusers.DDPMScheduler(beta_schedule="laplace", clip_sample=False),
        diffusers.DDPMScheduler(
            trained_betas=np.linspace(1e-3, 1e-2, 1000).tolist(), clip_sample=False
        ),
        diffusers.HeunDiscreteScheduler(beta_schedule="exp"),
        diffusers.CogVideoXDDIMScheduler(clip_sample=False, snr_shift_scale=2.0),
    ],
)
@torch.no_grad()
def test_a_noise_schedule_of_any_kind_is_the_schedulers_own(scheduler):
    pipe = tiny.stable_diffusion(scheduler)
    env = VelocityEnvironment(
        from_pipeline(pipe), RedReward(), 4, noise_level=0.0, spacing="leading"
    )
    x, kwargs = env.start(2, prompt=["a cat", "a red heart"])
    # Betas of the same products, to which DDIM comes back.
    abar = scheduler.alphas_cumprod.double()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    offset = {"steps_offset": pipe.scheduler.config.get("steps_offset", 0)}
    pipe.scheduler = diffusers.DDIMScheduler(
        trained_betas=betas.tolist(), clip_sample=False, **offset
    )
    latents = latents_of_diffusers(pipe, x.data, 4, 0.0)
    torch.testing.assert_close(roll_out(env, x, kwargs), latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            diffusers.LCMScheduler(),
            "LCMScheduler predicts the finished sample .* DDIMScheduler.from_config",
        ),
        (diffusers.TCDScheduler(), "TCDScheduler predicts the finished sample"),
        (type("Mine", (diffusers.LCMScheduler,), {})(), "Mine predicts the finished sample"),
        (diffusers.DDIMInverseScheduler(), "goes from data to noise"),
        (diffusers.DPMSolverMultistepInverseScheduler(), "goes from data to noise"),
        (diffusers.RePaintScheduler(), "fills in a picture"),
        (diffusers.UnCLIPScheduler(), "is that of a prior"),
        (diffusers.EDMEulerScheduler(), "has no discrete noise schedule"),
        (diffusers.IPNDMScheduler(), "has no discrete noise schedule"),
        (diffusers.CMStochasticIterativeScheduler(), "has no discrete noise schedule"),
        (diffusers.DDPMWuerstchenScheduler(), "has no discrete noise schedule"),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
            "on the levels of use_flow_sigmas",
        ),
        (
            diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.01, sigma_max=100
            ),
            "gives the network a continuous time",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "predicts 'flow_prediction'",
        ),
    ],
)
def test_a_scheduler_that_is_not_sampled_by_ddim_is_named(scheduler, message):
    pipe = tiny.build("dit")
    pipe.scheduler = scheduler
    with pytest.raises(CheckpointError, match=message):
        from_pipeline(pipe)
    assert pipe.transformer.training  # refused before anything was frozen


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchLCMScheduler(), "consistency sampling"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            "stochastic_sampling",
        ),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_a_flow_scheduler_that_draws_new_noise_is_named(scheduler, message):
    pipe = tiny.build("stable_diffusion_3")
    pipe.scheduler = scheduler
    with pytest.raises(CheckpointError, match=message):
        from_pipeline(pipe)


def test_a_scheduler_whose_values_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="the checkpoint's DDPMScheduler cannot be read: float"
    ):
        from_pretrained(changed("ddpm", tmp_path, "scheduler", clip_sample_range=None))


# Guidance.


@pytest.mark.parametrize("name", [name for name in tiny.BUILDERS if name != "ddpm"])
@pytest.mark.parametrize("scale", [0, 0.0, 0.5, 1])
@torch.no_grad()
def test_guidance_up_to_1_is_off_as_in_diffusers(name, scale):
    flux = name.startswith("flux")
    options = {"true_cfg_scale" if flux else "guidance_scale": scale}
    model, plain = (
        from_pretrained(tiny.folder(name), **tiny.OPTIONS.get(name, {}), **given)
        for given in (options, {})
    )
    x, kwargs = model.preprocess(
        *plain.sample_p0(1)[:1], prompt=["1" if name == "dit" else "a cat"]
    )
    t = torch.tensor([0.5])
    assert not model.do_guidance
    assert torch.equal(model(x, t, **kwargs).data, plain(x, t, **kwargs).data)
    with pytest.raises(OptionError, match=r"scale is -0\.1, expected a finite number, at least 0"):
        from_pretrained(tiny.folder(name), **dict.fromkeys(options, -0.1))


def test_guidance_of_a_network_that_takes_none_may_be_off():
    """As the card of FLUX.1-schnell has it."""
    options = {**tiny.OPTIONS["flux_schnell"], "guidance_scale": 0.0}
    assert not from_pretrained(tiny.folder("flux_schnell"), **options).do_guidance


# Open pipelines in environments.


@pytest.mark.parametrize("name", ["stable_diffusion", "dit", "ddpm"])
def test_gymnasium_makes_environments_of_an_open_pipeline(name):
    pipe = tiny.build(name)
    env = gymnasium.make(RED, checkpoint=pipe, discretization_steps=2)
    expected = gymnasium.make(RED, checkpoint=tiny.folder(name), discretization_steps=2)
    assert env.unwrapped.environment.base_model.pipe is pipe
    for ours, theirs in zip(
        env.reset(seed=1)[0].values(), expected.reset(seed=1)[0].values(), strict=True
    ):
        assert np.array_equal(ours, theirs)
    with pytest.raises(OptionError, match="leave device"):
        gymnasium.make(RED, checkpoint=pipe, device="cpu")
    with pytest.raises(OptionError, match="number format stays"):
        gymnasium.make(RED, checkpoint=pipe, dtype="float16")


# Parts that do not fit together.


def with_(name, change):
    pipe = tiny.build(name)
    change(pipe)
    return pipe


def swap(part, make):
    return lambda pipe: setattr(pipe, part, make())


def unet(**options):
    return lambda: tiny.unet(**{"cross_attention_dim": 16, **options})


def ip_adapter(pipe):
    network = getattr(pipe, "unet", None) or pipe.transformer
    layers = [ImageProjection(image_embed_dim=8, cross_attention_dim=16, num_image_text_embeds=2)]
    network.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    if hasattr(pipe, "unet"):
        network.config.encoder_hid_dim_type = "ip_image_proj"
        network.register_to_config(encoder_hid_dim_type="ip_image_proj")


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "cross_attention_dim": 32,
}
MISFITS = {
    "text of another width": (
        "stable_diffusion",
        swap("unet", unet(cross_attention_dim=24)),
        r"width 24 \(cross_attention_dim\), but the text encoder makes 16",
    ),
    "text of another width per block": (
        "stable_diffusion",
        swap("unet", unet(cross_attention_dim=(24, 16))),
        r"width 24 \(cross_attention_dim\), but the text encoder makes 16",
    ),
    "projected text of another width": (
        "stable_diffusion",
        swap("unet", unet(encoder_hid_dim=24, encoder_hid_dim_type="text_proj")),
        r"width 24 \(encoder_hid_dim\), but the text encoder makes 16",
    ),
    "XL's text of another width": (
        "stable_diffusion_xl",
        swap("unet", unet(**{**XL, "cross_attention_dim": 16})),
        r"width 16 \(cross_attention_dim\), but the text encoders together makes? 32",
    ),
    "XL's conditions of another width": (
        "stable_diffusion_xl",
        swap("unet", unet(**{**XL, "projection_class_embeddings_input_dim": 44})),
        r"width 44 \(projection_class_embeddings_input_dim\), but the second text encoder .* makes 40",
    ),
    "XL's network in SD": (
        "stable_diffusion",
        swap("unet", unet(**XL)),
        "addition_embed_type = 'text_time'",
    ),
    "SD's network in XL": (
        "stable_diffusion_xl",
        swap("unet", unet()),
        "addition_embed_type = None",
    ),
    "T5 of another width": (
        "stable_diffusion_3",
        swap("text_encoder_3", lambda: tiny.t5_of(16)),
        r"width 32 \(joint_attention_dim\), but the T5 encoder makes 16",
    ),
    "Flux's T5 of another width": (
        "flux",
        swap("text_encoder_2", lambda: tiny.t5_of(32)),
        r"width 16 \(joint_attention_dim\), but the T5 encoder makes 32",
    ),
    "PixArt's T5 of another width": (
        "pixart",
        swap("text_encoder", lambda: tiny.t5_of(32)),
        r"width 16 \(caption_channels\), but the T5 encoder makes 32",
    ),
    "channels of an inpainting network": (
        "stable_diffusion",
        swap("unet", unet(in_channels=9)),
        "takes 9 channels, but its autoencoder makes 4",
    ),
    "channels of an editing network": (
        "stable_diffusion",
        swap("unet", unet(in_channels=8)),
        "takes 8 channels, but its autoencoder makes 4",
    ),
    "channels of the output": (
        "stable_diffusion",
        swap("unet", unet(out_channels=3)),
        "takes 4 channels and gives 3, expected 4, or 8 with a variance",
    ),
    "channels of a pixel network": (
        "ddpm",
        swap("unet", lambda: diffusers.UNet2DModel(in_channels=6, out_channels=3, **PIXELS)),
        "takes 6 channels and gives 3",
    ),
    "classes of a pixel network": (
        "ddpm",
        swap("unet", lambda: diffusers.UNet2DModel(num_class_embeds=10, **PIXELS)),
        "wants class labels",
    ),
    "another autoencoder": (
        "dit",
        swap("vae", lambda: tiny.vae(8)),
        "takes 4 channels, but its autoencoder makes 8",
    ),
    "an autoencoder of grey pictures": (
        "stable_diffusion",
        swap("vae", lambda: tiny.vae(out_channels=1)),
        "autoencoder makes 1 channels, expected pictures of 3",
    ),
    "a consistency model": (
        "stable_diffusion",
        swap("unet", unet(time_cond_proj_dim=8)),
        "a consistency model",
    ),
    "class labels": (
        "stable_diffusion",
        swap("unet", unet(class_embed_type="timestep")),
        "wants class labels beside",
    ),
    "pictures as conditions": (
        "stable_diffusion",
        swap("unet", unet(encoder_hid_dim=8, encoder_hid_dim_type="image_proj")),
        "wants pictures beside the prompt",
    ),
    "SD's IP-Adapter": ("stable_diffusion", ip_adapter, "has an IP-Adapter loaded"),
    "Flux's IP-Adapter": ("flux", ip_adapter, "has an IP-Adapter loaded"),
    "no text encoder": (
        "stable_diffusion",
        swap("text_encoder", lambda: None),
        "has no text_encoder",
    ),
    "no tokenizer": ("stable_diffusion", swap("tokenizer", lambda: None), "has no tokenizer"),
    "no T5 tokenizer": (
        "stable_diffusion_3",
        swap("tokenizer_3", lambda: None),
        "has no tokenizer_3",
    ),
    "no CLIP encoder": ("flux", swap("text_encoder", lambda: None), "has no text_encoder"),
    "no autoencoder": ("pixart", swap("vae", lambda: None), "has no vae"),
    "no network": ("dit", swap("transformer", lambda: None), "has no transformer"),
}
PIXELS = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named_with_both_numbers(case):
    name, change, message = MISFITS[case]
    pipe = with_(name, change)
    with pytest.raises(CheckpointError, match=message):
        from_pipeline(pipe, **tiny.OPTIONS.get(name, {}))
    trained = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert all(parameter.requires_grad for part in trained for parameter in part.parameters())


def test_a_denoiser_for_other_text_is_refused_when_it_is_given(tmp_path):
    tiny.unet(cross_attention_dim=24).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"width 24 \(cross_attention_dim\), but the text encoder makes 16"
    ):
        from_pretrained(tiny.folder("stable_diffusion"), denoiser=str(tmp_path))


def test_an_unloaded_ip_adapter_is_no_obstacle():
    pipe = with_("stable_diffusion", ip_adapter)
    pipe.unet.encoder_hid_proj = None
    pipe.unet.register_to_config(encoder_hid_dim_type=None)
    assert from_pipeline(pipe).state_shape == (4, 4, 8)


@torch.no_grad()
def test_projected_text_is_projected_as_in_diffusers():
    pipe = with_(
        "stable_diffusion",
        swap(
            "unet",
            unet(cross_attention_dim=24, encoder_hid_dim=16, encoder_hid_dim_type="text_proj"),
        ),
    )
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), 2, noise_level=0.0)
    x, kwargs = env.start(2, prompt=["a cat", "a red heart"])
    torch.testing.assert_close(
        roll_out(env, x, kwargs), latents_of_diffusers(pipe, x.data, 2, 0.0), rtol=0, atol=1e-5
    )


# Sizes.


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_network_without_a_size_takes_the_one_that_is_given(name, tmp_path):
    folder = changed(name, tmp_path, "unet", sample_size=None)
    assert from_pretrained(folder, height=16, width=8).state_shape == (4, 8, 4)
    for size in ({}, {"height": 16}, {"width": 16}):
        with pytest.raises(OptionError, match=r"sample_size = None, .* give height= and width="):
            from_pretrained(folder, **size)


def test_a_pixel_network_without_a_size_is_named(tmp_path):
    with pytest.raises(OptionError, match="sample_size = None"):
        from_pretrained(changed("ddpm", tmp_path, "unet", sample_size=None))


def test_a_size_beyond_the_positions_of_the_network_is_named():
    with pytest.raises(
        OptionError, match=r"height and width are 64 and 32 pixels, but .* positions for 32 at most"
    ):
        from_pretrained(tiny.folder("stable_diffusion_3"), height=64, width=32)


@torch.no_grad()
def test_pixart_decides_by_its_size_whether_it_is_told_of_it():
    options = {"patch_size": 64, "attention_head_dim": 12, "cross_attention_dim": 24}
    pipe = tiny.pixart(sample_size=128, use_additional_conditions=None, **options)
    assert pipe.transformer.use_additional_conditions
    env = VelocityEnvironment(from_pipeline(pipe), RedReward(), 1)
    assert torch.isfinite(env.sample(1).latents.data).all()


# Tokens.


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
)
@torch.no_grad()
def test_a_tokenizer_without_a_length_takes_that_of_its_encoder(name, tmp_path):
    model = from_pretrained(
        changed(name, tmp_path, "tokenizer", model_max_length="left out"),
        **tiny.OPTIONS.get(name, {}),
    )
    expected = from_pretrained(tiny.folder(name), **tiny.OPTIONS.get(name, {}))
    for ours, theirs in zip(
        model.encode("a red heart")[0].values(),
        expected.encode("a red heart")[0].values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    if name.startswith("stable_diffusion") and name != "stable_diffusion_3":
        with pytest.raises(OptionError, match="but the checkpoint takes 32"):
            model.check_prompt("cat " * 50)


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"]
)
def test_a_tokenizer_that_is_longer_than_its_encoder_takes_what_the_encoder_takes(name, tmp_path):
    folder = changed(name, tmp_path, "tokenizer", model_max_length=77)
    model = from_pretrained(folder, **tiny.OPTIONS.get(name, {}))
    expected = from_pretrained(tiny.folder(name), **tiny.OPTIONS.get(name, {}))
    ours, theirs = (m.encode("a cat")[0]["encoder_hidden_states"] for m in (model, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "tokenizer has no pad_token"),
        ("<filler>", r"the token '<filler>', which is number \d+ of the tokenizer"),
    ],
)
def test_a_padding_token_that_the_encoder_does_not_have_is_named(token, message):
    pipe = tiny.build("stable_diffusion")
    pipe.tokenizer.add_special_tokens({"pad_token": token}) if token else setattr(
        pipe.tokenizer, "pad_token", None
    )
    with pytest.raises((CheckpointError, OptionError), match=message):
        from_pipeline(pipe)


def invert(pipe, vectors):
    """Load a textual inversion of as many vectors."""
    pipe.load_textual_inversion({"<toy>": torch.randn(vectors, 16)}, token="<toy>")
    return pipe


@torch.no_grad()
def test_a_textual_inversion_of_several_vectors_is_sampled_as_by_diffusers():
    pipe = invert(tiny.build("stable_diffusion"), 3)
    env = VelocityEnvironment(
        from_pipeline(pipe, prompts="a <toy> cat"), RedReward(), 2, noise_level=0.0
    )
    x, kwargs = env.start(2)
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    torch.testing.assert_close(
        roll_out(env, x, kwargs),
        pipe(["a <toy> cat"] * 2, latents=x.data, **common).images,
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("option", ["prompts", "negative_prompt"])
def test_tokens_beyond_the_encoder_are_refused_when_they_are_given(option):
    pipe = invert(tiny.build("stable_diffusion"), 31)
    with pytest.raises(OptionError, match="has 34 tokens, but the checkpoint takes 32"):
        from_pipeline(pipe, **{option: "<toy> cat"})
    pipe = tiny.build("stable_diffusion")
    known = len(pipe.tokenizer)
    pipe.tokenizer.add_tokens("<toy>")
    with pytest.raises(
        OptionError,
        match=rf"the token '<toy>', which is number {known} of the tokenizer, .* embeddings for {known};",
    ):
        from_pipeline(pipe, **{option: "a <toy>"})
    from_pipeline(pipe, **{option: "a cat"})


@torch.no_grad()
def test_an_encoder_that_pools_nothing_stands_for_a_prompt_by_the_mean_of_its_words():
    pipe = tiny.build("stable_diffusion")
    pipe.text_encoder, pipe.tokenizer = tiny.t5(), tiny.t5_tokenizer()
    model = from_pipeline(pipe, prompts=["a cat", "a red heart"])
    tokens = pipe.tokenizer("a cat", return_tensors="pt").input_ids
    states = model.encode("a cat")[0]["encoder_hidden_states"]
    torch.testing.assert_close(
        model.embed_prompts(["a cat"])[0], states[: tokens.shape[1]].mean(dim=0)
    )
    torch.testing.assert_close(states, pipe.encode_prompt("a cat", "cpu", 1, False)[0][0])


# Memory.


@pytest.mark.parametrize("option", ["model_cpu_offload", "sequential_cpu_offload"])
def test_offloading_without_an_accelerator_is_refused(option, monkeypatch):
    monkeypatch.setattr("diffusers.utils.torch_utils.get_device", lambda: "cpu")
    pipe = tiny.build("stable_diffusion")
    for opening in (
        lambda: from_pretrained(tiny.folder("stable_diffusion"), memory=option),
        lambda: from_pipeline(pipe, memory=option),
    ):
        with pytest.raises(
            OptionError,
            match=f"memory names '{option}', which .* needs them, but the device is 'cpu'",
        ):
            opening()
    assert pipe.unet.training
    assert not hasattr(pipe.unet, "_hf_hook")
