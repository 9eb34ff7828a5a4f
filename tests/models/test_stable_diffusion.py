"""Stable Diffusion checkpoints: where they come from, what is refused, how prompts and guidance
reach the network.
"""

import json
import shutil
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from safetensors import safe_open

from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models.stable_diffusion import EMBEDDED, StableDiffusionBaseModel
from flowgym_gym.rewards.alignment import EMBEDDED_CLIP
from tests.conftest import RED
from tests.models import tiny


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """A small pipeline of another size with random weights and SD 1.5's own scheduler, in
    diffusers' folder format.
    """
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "other"
    tiny.stable_diffusion(scheduler).save_pretrained(folder)
    return folder


def test_any_local_folder_is_an_environment(other_checkpoint):
    env = gymnasium.make(
        RED, checkpoint=str(other_checkpoint), discretization_steps=3, render_mode="rgb_array"
    )
    observation, _ = env.reset(seed=0)
    assert observation["latent"].shape == (4, 4, 8)
    assert env.action_space.shape == (4, 4, 8)
    assert env.unwrapped.environment.grid.timesteps.tolist() == [667, 334, 1]
    for _ in range(3):
        *_, info = env.step(np.zeros((4, 4, 8), np.float32))
    assert 0 <= info["terminal_reward"] <= 1
    assert env.render().shape == (8, 16, 3)


def test_the_embedded_checkpoint_is_what_it_says():
    index = json.loads((EMBEDDED / "tiny" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not list((EMBEDDED / "tiny").rglob("*.bin"))
    size = sum(f.stat().st_size for f in (EMBEDDED / "tiny").rglob("*.safetensors"))
    assert size <= 20e6
    model = StableDiffusionBaseModel()
    assert model.output_type == "epsilon"
    assert (model.scheduler.spacing, model.scheduler.steps_offset) == ("leading", 1)
    assert model.scheduler.final_alpha_cumprod == pytest.approx(1 - 0.00085)
    assert model.sample_p0(2)[0].shape == (2, 4, 8, 8)


# Parts of a CLIP model besides its text encoder.
OTHER_NAMES = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# Embedding of "a photo of a cat": sum of the hidden states, and the first pooled features.
RECORDED = (-1.68943, [-1.223174, 1.130386, -0.304173])
EMBED = """
from flowgym_gym.models import from_pretrained
conditions, pooled = from_pretrained("tiny").encode("a photo of a cat")
print(conditions["encoder_hidden_states"].sum().item(), *pooled[:3].tolist())
"""


@pytest.mark.second
def test_every_process_embeds_a_prompt_alike():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", EMBED], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    first, second = ([float(number) for number in output.split()] for output in outputs)
    assert first == second
    assert first[0] == pytest.approx(RECORDED[0], abs=2e-4)
    assert first[1:] == pytest.approx(RECORDED[1], abs=1e-5)


def test_the_embedded_text_encoder_has_the_names_that_every_transformers_reads():
    """Those of published checkpoints: before 5.6 transformers leaves the weights of other names
    random.
    """
    for folder in (EMBEDDED / "tiny" / "text_encoder", EMBEDDED_CLIP):
        with safe_open(folder / "model.safetensors", "pt") as file:
            text = [name for name in file.keys() if not name.startswith(OTHER_NAMES)]  # noqa: SIM118
        assert text
        assert all(name.startswith("text_model.") for name in text)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("tinny", "'tinny' was not found"),
        ("./missing", "'./missing' was not found"),
        ("/no/such/folder", "'/no/such/folder' was not found"),
        ("", "checkpoint is ''"),
        (7, "checkpoint is 7"),
    ],
)
def test_a_missing_checkpoint_is_named(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionBaseModel(checkpoint=checkpoint)


def test_a_single_file_is_named_as_what_it_is(other_checkpoint):
    file = other_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    for option in ("denoiser", "vae"):
        with pytest.raises(
            CheckpointError, match=r"checkpoint file .* is a single file; expected a folder"
        ):
            StableDiffusionBaseModel(**{option: str(file)})
    with pytest.raises(
        CheckpointError, match=f"checkpoint file '{file}' holds a U-Net; give a checkpoint"
    ):
        StableDiffusionBaseModel(checkpoint=file)


def test_a_hub_id_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    """The Hub is asked only when a checkpoint that is not local is named; offline, that is one
    clear error.
    """
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="Hub id 'nobody/nothing' could not be loaded"):
        StableDiffusionBaseModel(checkpoint="nobody/nothing")


def damaged(folder, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    return str(copy)


def truncate(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle_only(folder):
    for weights in folder.rglob("*.safetensors"):
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()


def other_architecture(folder):
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in f.iterdir()],
            r"no model_index\.json",
        ),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot be read"),
        (other_architecture, "holds a FluxPipeline"),
        (pickle_only, "no safetensors weights"),
        (truncate, "could not be loaded"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"no tokenizer\.json or .* in 'tokenizer'"),
    ],
    ids=[
        "empty",
        "broken index",
        "other architecture",
        "pickled weights",
        "truncated",
        "no tokenizer",
    ],
)
def test_a_damaged_folder_is_named(other_checkpoint, tmp_path, damage, message):
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionBaseModel(checkpoint=damaged(other_checkpoint, tmp_path, damage))


def test_prompts_reach_the_network_and_each_is_encoded_once(monkeypatch):
    model = StableDiffusionBaseModel(prompts=["a photo of a cat", "a red heart"])
    calls = []
    handle = model.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        x, kwargs = model.sample_p0(4, prompt=["a photo of a cat", "a red heart"] * 2)
        x, kwargs = model.preprocess(x, **kwargs)
        model.preprocess(x, prompt=["a red heart"] * 4)
    finally:
        handle.remove()
    assert len(calls) == 2
    states = kwargs["encoder_hidden_states"]
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])
    expected, _ = model.pipe.encode_prompt("a red heart", "cpu", 1, False)
    torch.testing.assert_close(states[1], expected[0])


def test_guidance_runs_once_on_twice_the_batch_and_needs_no_second_pass_when_off():
    x, t = FlowTensor(torch.randn(3, 4, 8, 8)), torch.full((3,), 0.5)
    for guidance_scale, expected in [(1.0, 3), (4.0, 6)]:
        model = StableDiffusionBaseModel(guidance_scale=guidance_scale)
        batches = []
        handle = model.unet.register_forward_hook(
            lambda module, args, output, b=batches: b.append(len(args[0]))
        )
        with torch.no_grad():
            model(x, t, **model.preprocess(x, prompt=["a photo of a cat"] * 3)[1])
        handle.remove()
        assert batches == [expected]


def test_decoding_in_slices_gives_the_same_pictures():
    latents = FlowTensor(torch.randn(5, 4, 8, 8))
    with torch.no_grad():
        whole, slices = (
            StableDiffusionBaseModel(decode_batch_size=n).postprocess(latents) for n in (5, 2)
        )
    torch.testing.assert_close(whole.data, slices.data, rtol=0, atol=1e-5)


def test_bad_prompts_are_named():
    model = StableDiffusionBaseModel()
    with pytest.raises(OptionError, match="expected a string or a list of 2 strings"):
        model.sample_p0(2, prompt=["a cat"])
    with pytest.raises(OptionError, match="negative_prompt"):
        StableDiffusionBaseModel(negative_prompt=None)
