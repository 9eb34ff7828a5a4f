"""Models are shared by all environments that name the same files with the same contents, and by no
others.
"""

import os
import shutil
from pathlib import Path

import diffusers
import gymnasium
import huggingface_hub
import pytest
import torch

import flowgym_gym
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.models.loading import clear_model_cache, load_base_model
from flowgym_gym.registry import Registry
from flowgym_gym.rewards.loading import load_reward
from tests.conftest import RED
from tests.models import tiny


def loaded(**options):
    return load_base_model("images/stable_diffusion", **options)


def test_a_model_is_made_once_for_the_same_arguments(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert loaded(prompts="a dog").pipe is loaded().pipe
    for options in (
        {},
        {"prompts": str(tmp_path / "prompts.txt")},
        {"checkpoint": tiny.folder("stable_diffusion")},
    ):
        assert loaded(**options) is loaded(**options)


@pytest.mark.parametrize("ending", ["", "#prompt"])
def test_prompts_that_were_edited_are_read_again(tmp_path, ending):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt\na cat\n")
    assert loaded(prompts=f"{file}{ending}").prompts == ["a cat"]
    file.write_text("prompt\na dog\n")
    assert loaded(prompts=f"{file}{ending}").prompts == ["a dog"]
    env = gymnasium.make(RED, prompts=f"{file}{ending}", discretization_steps=2)
    assert env.reset(seed=0)[1]["prompt"] == "a dog"


def test_weights_that_were_saved_anew_are_loaded_again(tmp_path):
    pipe = tiny.build("stable_diffusion")
    pipe.save_pretrained(tmp_path / "checkpoint")
    options = {"checkpoint": str(tmp_path / "checkpoint")}
    before = loaded(**options)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(0.25)
    pipe.unet.save_pretrained(tmp_path / "checkpoint" / "unet")
    after = loaded(**options)
    assert not torch.equal(before.unet.conv_out.bias, after.unet.conv_out.bias)
    assert torch.equal(after.unet.conv_out.bias, pipe.unet.conv_out.bias)
    assert loaded(**options, vae=str(tmp_path / "checkpoint")) is not after


def test_a_relative_path_means_what_lies_in_the_present_folder(tmp_path, monkeypatch):
    for name, prompt in (("one", "a cat"), ("two", "a dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.txt").write_text(prompt)
        os.utime(tmp_path / name / "prompts.txt", (1, 1))
        monkeypatch.chdir(tmp_path / name)
        assert loaded(prompts="prompts.txt").prompts == [prompt]


def test_a_reward_reads_weights_again_that_were_replaced(small_weights, tmp_path):
    own = small_weights["images/clip_score"]["weights"]
    shutil.copytree(own, tmp_path / "clip")
    options = {"weights": str(tmp_path / "clip")}
    first = load_reward("images/clip_score", **options)
    assert load_reward("images/clip_score", **options) is first
    os.utime(tmp_path / "clip" / "model.safetensors", (1, 1))
    assert load_reward("images/clip_score", **options) is not first


@pytest.fixture
def reads(monkeypatch):
    """How often an index is read from now on: a list that grows."""
    found, read_text = [], Path.read_text

    def read(path, *args, **kwargs):
        if path.name == "model_index.json":
            found.append(path)
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    return found


def test_a_checkpoint_is_resolved_once_for_an_environment(reads):
    checkpoint = tiny.folder("pixart")
    for made in range(1, 4):
        # Of any family by its index, anew and from what is shared.
        flowgym_gym.make("images/stable_diffusion", "images/red", 2, checkpoint=checkpoint)
        assert len(reads) == made
    clear_model_cache()
    flowgym_gym.make("images/pixart", "images/red", 2, checkpoint=checkpoint)
    assert len(reads) == 4
    clear_model_cache()
    flowgym_gym.make("images/stable_diffusion", "images/red", 2)
    assert len(reads) == 5


def test_the_hub_is_asked_once_for_an_index(reads, monkeypatch):
    folder, asked = Path(tiny.folder("pixart")), []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda id, name: (asked.append(name), folder / name)[1]
    )
    monkeypatch.setattr(
        diffusers.PixArtAlphaPipeline, "download", lambda *args, **kwargs: str(folder)
    )
    env = flowgym_gym.make(
        "images/stable_diffusion", "images/red", 2, checkpoint="somebody/tiny-pixart"
    )
    assert asked == ["model_index.json"]
    assert len(reads) == 1
    assert env.parts["base_model"]["checkpoint"] == "somebody/tiny-pixart"


def test_instances_belong_to_their_registry():
    registry = Registry("model")
    registry.register("a/one", GaussianMixtureBaseModel)
    registry.register("a/other", GaussianMixtureBaseModel, stds=(2.0, 0.4))
    entry = registry.get("a/one")
    assert entry.shared({}) is entry.shared({})
    assert entry.shared({"stds": (2.0, 0.4)}) is registry.get("a/other").shared({})
    assert entry.shared({}) is not load_base_model("1d/gaussian_mixture")
    made = entry.shared({})
    registry.forget_instances()
    assert entry.shared({}) is not made


@pytest.mark.parametrize(
    "load",
    [
        loaded,
        lambda: load_base_model("1d/gaussian_mixture"),
        lambda: load_reward("1d/gaussian"),
    ],
    ids=["stable_diffusion", "gaussian_mixture", "gaussian_reward"],
)
def test_who_loads_in_inference_mode_spoils_no_gradients_of_others(load):
    clear_model_cache()
    with torch.inference_mode():
        load()
    shared = load()
    tensors = [value for value in vars(shared).values() if isinstance(value, torch.Tensor)]
    if isinstance(shared, torch.nn.Module):
        tensors += [*shared.parameters(), *shared.buffers()]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)
    clear_model_cache()
