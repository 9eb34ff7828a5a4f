"""Models are shared by those who ask for the same, but files that were written anew are read anew."""

import os

import pytest
import torch

from flowgym_gym.models import from_pretrained
from tests.models import tiny


def save(folder, bias):
    pipe = tiny.build("stable_diffusion")
    with torch.no_grad():
        pipe.unet.conv_in.bias.fill_(bias)
    pipe.save_pretrained(folder)


def bias(checkpoint, **options):
    return from_pretrained(checkpoint, **options).denoiser.conv_in.bias[0].item()


@pytest.mark.parametrize("option", ["checkpoint", "denoiser"])
def test_weights_that_are_saved_over_others_are_read(option, tmp_path):
    def opened():
        if option == "checkpoint":
            return bias(str(tmp_path))
        return bias(tiny.folder("stable_diffusion"), denoiser=str(tmp_path))

    save(tmp_path, 1)
    assert opened() == 1
    save(tmp_path, 2)
    assert opened() == 2


def test_a_relative_path_is_one_of_the_folder_where_it_is_given(tmp_path, monkeypatch):
    for name, value in (("one", 1), ("two", 2)):
        save(tmp_path / name / "tuned", value)
    for name, value in (("one", 1), ("two", 2), ("one", 1)):
        monkeypatch.chdir(tmp_path / name)
        assert bias("./tuned") == value


@pytest.mark.parametrize("name", ["p.txt", "p.csv#prompt"])
def test_prompts_that_are_edited_are_read(name, tmp_path):
    file = tmp_path / name.partition("#")[0]
    for prompt in ("a cat", "a blue dog"):
        file.write_text(f"prompt\n{prompt}\n" if "#" in name else prompt)
        assert from_pretrained("tiny", prompts=str(tmp_path / name)).prompts == [prompt]


def test_what_did_not_change_is_shared(tmp_path):
    save(tmp_path, 1)
    first = from_pretrained(str(tmp_path))
    assert from_pretrained(str(tmp_path)) is first
    assert from_pretrained(str(tmp_path), prompts="a dog").pipe is first.pipe
    os.utime(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert from_pretrained(str(tmp_path)) is not first
