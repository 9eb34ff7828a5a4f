"""What exists is never a Hub id, and what looks like a path is not looked for on the Hub."""

import os
from pathlib import Path

import huggingface_hub
import pytest

from flowgym_gym.errors import CheckpointError
from flowgym_gym.models import from_pretrained, pipeline
from flowgym_gym.models.checkpoints import find_checkpoint
from flowgym_gym.rewards.clip import AestheticReward, CLIPScoreReward, PickScoreReward
from flowgym_gym.rewards.preference import HPSv2Reward, ImageRewardReward
from flowgym_gym.sources import Source, find_file, find_source
from tests.models import tiny

# Everything that takes the name of weights, or of what belongs to them: how it is given one.
TAKERS = {
    "checkpoint": lambda name: from_pretrained(name),
    "denoiser": lambda name: from_pretrained("tiny", denoiser=name),
    "vae": lambda name: from_pretrained("tiny", vae=name),
    "lora": lambda name: from_pretrained("tiny", lora=name),
    "weights of CLIPScore": lambda name: CLIPScoreReward(weights=name),
    "weights of PickScore": lambda name: PickScoreReward(weights=name),
    "clip of Aesthetic": lambda name: AestheticReward(clip=name, head=__file__),
    "head of Aesthetic": lambda name: AestheticReward(clip="x/y", head=name),
    "weights of ImageReward": lambda name: ImageRewardReward(weights=name, tokenizer="x/y"),
    "tokenizer of ImageReward": lambda name: ImageRewardReward(weights=__file__, tokenizer=name),
    "weights of HPSv2": lambda name: HPSv2Reward(weights=name, processor="x/y"),
    "processor of HPSv2": lambda name: HPSv2Reward(weights=__file__, processor=name),
}
LOCAL_LOOKING = [
    "models/tuned",
    "Checkpoints/sd15",
    "outputs/run-3",
    "loras/style",
    "somebody/x.safetensors",
    "somebody/x.CKPT",
    "somebody/checkpoint-500",
    "somebody/unet",
    "here/tuned",
    "file.txt/tuned",
    "./tuned",
    "~/nothing-here",
    "/no/such/folder",
    "C:/models/x",
    "D:x/y",
    "a\\b",
    "one",
    "a/b/c",
    "a/b/",
    "a b/c",
    "a--b/c",
    "-a/b",
    "a/b.git",
    "dangling/link",
    "hub:one",
    "hub:a/b/c",
    "hub:",
]
IMPOSSIBLE = [
    "",
    " ",
    "a\0b",
    "~nosuchuser/x",
    "x" * 5000,
    "a/" + "b" * 5000,
    "\ud800/x",
    5,
    b"x",
    [],
    {},
    1.5,
]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Whom the Hub would be asked for, which is nobody here; in an empty working directory of a few
    names.
    """
    names = []

    def ask(repository, *args, **kwargs):
        names.append(repository)
        raise OSError("the Hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, ask)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.parametrize("name", LOCAL_LOOKING)
def test_a_missing_path_says_where_it_was_looked_for_and_asks_nobody(name, asked):
    where = os.path.abspath(os.path.expanduser(name))
    for taker in TAKERS.values():
        with pytest.raises(CheckpointError) as caught:
            taker(name)
        assert repr(where) in str(caught.value)
        assert repr(name) in str(caught.value)
    assert not asked


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=[repr(name)[:20] for name in IMPOSSIBLE])
def test_names_that_nothing_can_have_are_named(name, asked):
    for taker in TAKERS.values():
        with pytest.raises(CheckpointError) as caught:
            taker(name)
        assert len(str(caught.value)) < 2000
    assert not asked


def test_what_exists_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "models/x", "tiny/x", "hub:owner/name"):
        Path(name).mkdir(parents=True)
        assert find_source("weights", name, "") == Source(str(tmp_path / name), local=True)
        Path(f"{name}.safetensors").touch()
        file = Source(str(tmp_path / f"{name}.safetensors"), local=True, file=True)
        assert find_checkpoint(f"{name}.safetensors") == file
        assert find_checkpoint(Path(f"{name}.safetensors")) == file
    assert find_checkpoint("tiny").name.endswith("embedded/tiny")
    os.mkfifo("pipe")
    with pytest.raises(CheckpointError, match="'pipe' is neither a folder nor a file"):
        find_checkpoint("pipe")
    with pytest.raises(CheckpointError, match="was not found"):
        find_checkpoint(Path("somebody/something"))


def test_other_names_are_hub_ids_and_a_prefix_insists(asked):
    for name in (
        "sd-legacy/stable-diffusion-v1-5",
        "stabilityai/sdxl-turbo",
        "a_b/C.d-1",
        "hub:a/b",
    ):
        assert find_checkpoint(name) == Source(name.removeprefix("hub:"), local=False)
    assert find_checkpoint("hub:models/tuned") == Source("models/tuned", local=False)
    with pytest.raises(
        CheckpointError, match=r"if the Hub's 'models/tuned' is meant, write 'hub:models/tuned'$"
    ):
        find_checkpoint("models/tuned")
    for name, taker in TAKERS.items():
        before = len(asked)
        with pytest.raises(CheckpointError):
            taker(
                "hub:models/tuned:file.pt"
                if name.startswith(("head", "weights of H", "weights of I"))
                else "hub:models/tuned"
            )
        if name in ("checkpoint", "denoiser", "vae", "lora", "head of Aesthetic"):
            assert asked[before:]
    assert set(asked) <= {"models/tuned", "x/y"}


def test_files_of_the_hub_have_the_same_rule(asked):
    for name in (
        "models/x:file.pt",
        "owner/name:../x",
        "owner/name:/x",
        "owner/name:",
        "owner/name",
        "C:/x:y",
    ):
        with pytest.raises(CheckpointError, match="was not found, looked for in"):
            find_file("head", name, "a file")
    with pytest.raises(CheckpointError, match=r"write 'hub:models/x:file.pt'$"):
        find_file("head", "models/x:file.pt", "a file")
    assert not asked
    for name in ("owner/name:folder/file.pt", "hub:owner/name:file.pt", "hub:models/x:file.pt"):
        with pytest.raises(CheckpointError, match="could not be had: OSError: the Hub was asked"):
            find_file("head", name, "a file")
    assert asked == ["owner/name", "owner/name", "models/x"]


def test_a_published_name_does_not_hide_a_file(asked, tmp_path):
    """A file called v2.1 is that file, not HPSv2's release of the same name."""
    (tmp_path / "v2.1").write_bytes(b"")
    (tmp_path / "ImageReward-v1.0").write_bytes(b"")
    with pytest.raises(CheckpointError, match="images/hpsv2 needs processor"):
        HPSv2Reward(weights="v2.1")
    with pytest.raises(CheckpointError, match="images/image_reward needs tokenizer"):
        ImageRewardReward(weights="ImageReward-v1.0")
    assert not asked


def test_missing_changes_are_errors_before_the_checkpoint_is_opened(monkeypatch):
    opened = []
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *args: opened.append(args))
    for option in ("denoiser", "vae", "lora"):
        with pytest.raises(CheckpointError, match=f"{option} './nowhere' was not found"):
            from_pretrained(tiny.folder("stable_diffusion"), **{option: "./nowhere"})
    assert not opened
