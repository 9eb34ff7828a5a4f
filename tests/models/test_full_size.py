"""Stable Diffusion 1.5 in its full size, with random weights."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
import transformers

from tests.models import tiny

EPISODE = """
import json, resource, sys, time
import gymnasium, numpy as np, torch, flowgym_gym

torch.set_num_threads(int(sys.argv[2]))
started = time.perf_counter()
env = gymnasium.make("flowgym/StableDiffusion-Red-v0", checkpoint=sys.argv[1], discretization_steps=2)
opened = time.perf_counter()
observation, _ = env.reset(seed=0)
for _ in range(2):
    observation, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
print(json.dumps({
    "shape": observation["latent"].shape,
    "finite": bool(np.isfinite(observation["latent"]).all()),
    "terminated": terminated,
    "terminal_reward": info["terminal_reward"],
    "seconds to open": opened - started,
    "seconds of the episode": time.perf_counter() - opened,
    "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Stable Diffusion 1.5's architecture, saved in float16 (2 GB)."""
    tokenizer = tiny.clip_tokenizer()
    tokenizer.model_max_length = 77
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
        pipe = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=512,
            ),
            text_encoder=transformers.CLIPTextModel(text),
            tokenizer=tokenizer,
            scheduler=diffusers.PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                steps_offset=1,
                set_alpha_to_one=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    folder = tmp_path_factory.mktemp("full_size") / "stable-diffusion-v1-5"
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_full_size_stable_diffusion_runs_an_episode_from_a_local_folder(full_size):
    run = subprocess.run(
        [sys.executable, "-c", EPISODE, str(full_size), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    print(result)
    assert result["shape"] == [4, 64, 64]
    assert result["finite"]
    assert result["terminated"]
    assert 0 <= result["terminal_reward"] <= 1
    assert result["peak GiB"] < 10
