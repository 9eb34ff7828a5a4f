"""A run knows what its settings named: where that is, and what it held."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flowgym_gym
from flowgym_gym.agents import evaluate, export, load_agent, load_policy
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.contents import resolved
from flowgym_gym.agents.runs.state import relocated as _relocated
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models.fingerprint import WHOLE, digest, fingerprint
from flowgym_gym.models.loading import clear_model_cache
from tests.agents.conftest import draw_little, finished, resume, same_weights, tiny, untimed
from tests.conftest import PROMPTS

EMBEDDED = Path(flowgym_gym.__file__).parent / "models" / "embedded" / "tiny"
OTHER = ["a photo of a dog", *PROMPTS]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with prompts and a checkpoint."""
    folder = tmp_path / "here"
    shutil.copytree(EMBEDDED, folder / "models" / "tuned")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    monkeypatch.chdir(folder)
    yield folder
    clear_model_cache()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    return lambda: monkeypatch.chdir(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        return tiny(tmp_path_factory.mktemp("trained") / "run", timesteps=8).out


@pytest.fixture
def small_run(trained_once, tmp_path):
    """A run folder that may be damaged."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


SETTINGS = {"env.prompts": "prompts.txt", "env.checkpoint": "models/tuned"}


def test_paths_are_stored_as_they_are_meant_and_work_from_another_folder(here, elsewhere, tmp_path):
    tiny(tmp_path / "run", timesteps=8, overrides=SETTINGS)
    env = read_config(tmp_path / "run")["settings"]["env"]
    assert env["prompts"] == str(here / "prompts.txt")
    assert env["checkpoint"] == str(here / "models" / "tuned")
    # The same names from the same folder are no difference.
    assert resume(tmp_path / "run", overrides=SETTINGS).timesteps == 8
    elsewhere()
    assert resume(tmp_path / "run", timesteps=16).timesteps == 16
    assert set(evaluate(tmp_path / "run", episodes=8)["prompts"]) == set(PROMPTS)
    with pytest.raises(
        OptionError, match=r"env\.prompts is '.*elsewhere/prompts\.txt', but the run has"
    ):
        resume(tmp_path / "run", overrides=SETTINGS)


def test_what_is_no_path_stays_as_it_is(here, small_weights):
    for name in ("tiny", "cosine", "red", "v2.1", "images"):
        (here / name).mkdir()
    (here / "images" / "red").mkdir()
    (here / "head.safetensors").write_bytes(b"")
    text = {
        "checkpoint": "tiny",
        "reward": "images/red",
        "prompts": ["prompts.txt", "a cat"],
        "negative_prompt": "models/tuned",
        "lora": "somebody/lora",
        "reward_kwargs": {"weights": "v2.1", "units": "cosine", "batch_size": 3},
    }
    assert resolved(text) == text
    nested = {
        "reward_kwargs": {
            "weights": {"images/aesthetic": 1.0},
            "reward_kwargs": {
                "images/aesthetic": {"clip": "models/tuned", "head": "head.safetensors"}
            },
            "parts": [{"id": "images/red", "anything": "./prompts.txt"}],
        },
        "base_model_kwargs": {"prompts": "prompts.txt", "vae": "red"},
    }
    found = resolved(nested)
    arguments = found["reward_kwargs"]["reward_kwargs"]["images/aesthetic"]
    assert arguments == {"clip": str(here / "models/tuned"), "head": str(here / "head.safetensors")}
    assert found["reward_kwargs"]["parts"] == [
        {"id": "images/red", "anything": str(here / "prompts.txt")}
    ]
    assert found["base_model_kwargs"] == {
        "prompts": str(here / "prompts.txt"),
        "vae": str(here / "red"),
    }


def test_changed_prompts_are_refused_with_the_first_that_differs(here, tmp_path):
    out = tmp_path / "run"
    tiny(out, timesteps=8, overrides={"env.prompts": "prompts.txt"})
    assert json.loads((out / "prompts.json").read_text()) == PROMPTS
    (here / "prompts.txt").write_text("\n".join(OTHER))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = (
        rf"prompts\.txt prompt 1 is 'a photo of a dog', and was '{PROMPTS[0]}' \(3 prompts, and had 2\) "
        rf"\(the run's own are kept: --set env\.prompts={out / 'prompts.json'}\)"
    )
    for way in (
        lambda: resume(out, timesteps=16),
        lambda: evaluate(out, 2),
        lambda: load_agent(out),
    ):
        with pytest.raises(OptionError, match=refused):
            way()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # A policy is what it was, whatever happened to the prompts.
    assert load_policy(export(out, tmp_path / "policy")).description["timesteps"] == 8
    # Another spelling of the same prompts is no difference.
    (here / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    assert resume(out, timesteps=16).timesteps == 16


def test_the_advice_for_changed_prompts_goes_on_as_if_nothing_had_changed(here, tmp_path):
    tiny(tmp_path / "whole", timesteps=16, overrides={"env.prompts": "prompts.txt"})
    tiny(tmp_path / "run", timesteps=8, overrides={"env.prompts": "prompts.txt"})
    (here / "prompts.txt").unlink()
    with pytest.raises(OptionError, match=r"env\.prompts is not at .*prompts\.txt any more"):
        resume(tmp_path / "run", timesteps=16)
    own = {"env.prompts": str(tmp_path / "run" / "prompts.json")}
    assert resume(tmp_path / "run", timesteps=16, overrides=own).timesteps == 16
    (here / "prompts.txt").write_text("\n".join(PROMPTS))
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_config(tmp_path / "run")["settings"]["env"]["prompts"] == own["env.prompts"]


def test_lost_copies_of_prompts_are_no_matter(here, tmp_path):
    tiny(tmp_path / "run", timesteps=8, overrides={"env.prompts": "prompts.txt"})
    (tmp_path / "run" / "prompts.json").write_text("[" * 100_000)
    assert resume(tmp_path / "run", timesteps=16).timesteps == 16
    assert json.loads((tmp_path / "run" / "prompts.json").read_text()) == PROMPTS
    (tmp_path / "run" / "prompts.json").unlink()
    (here / "prompts.txt").write_text("\n".join(OTHER))
    with pytest.raises(OptionError, match="are 3 prompts, and were 2; at least one differs"):
        resume(tmp_path / "run", timesteps=24)


def change_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path)
    clear_model_cache()


def test_other_weights_are_refused_by_the_name_of_the_file(here, tmp_path, capsys):
    out = tmp_path / "run"
    tiny(out, timesteps=8, overrides={"env.checkpoint": "models/tuned"})
    (here / "models" / "tuned" / "README.md").write_text("It draws cats.")
    assert resume(out, timesteps=16).timesteps == 16
    change_weights(here / "models" / "tuned")
    (here / "models" / "tuned" / "unet" / "more.json").write_text("{}")
    refused = (
        r"env\.checkpoint: of .*tuned unet/diffusion_pytorch_model\.safetensors has changed, unet/more\.json is new; "
        "put back what was there"
    )
    for way in (
        lambda: resume(out, timesteps=24),
        lambda: evaluate(out, 2),
        lambda: load_agent(out),
    ):
        with pytest.raises(OptionError, match=refused):
            way()
    capsys.readouterr()
    export(out, tmp_path / "policy")
    assert "unet/diffusion_pytorch_model.safetensors has changed" in capsys.readouterr().err


@pytest.mark.second
def test_what_has_moved_is_found_again_if_it_is_the_same(here, elsewhere, tmp_path):
    tiny(tmp_path / "whole", timesteps=16, overrides=SETTINGS)
    tiny(tmp_path / "run", timesteps=8, overrides=SETTINGS)
    (here / "models" / "tuned").rename(tmp_path / "tuned")
    elsewhere()
    missing = rf"env\.checkpoint is not at {here / 'models/tuned'} any more \(put it, or a link to it, there\)"
    with pytest.raises(OptionError, match=missing):
        evaluate(tmp_path / "run", 2)
    other = shutil.copytree(tmp_path / "tuned", tmp_path / "other")
    change_weights(other)
    with pytest.raises(OptionError, match=missing):
        resume(tmp_path / "run", timesteps=16, overrides={"env.checkpoint": str(other)})
    moved = {"env.checkpoint": "../tuned"}
    assert resume(tmp_path / "run", timesteps=16, overrides=moved).timesteps == 16
    assert evaluate(tmp_path / "run", 2)["timesteps"] == 16
    # A link does as well, and the same files at their first place again are nothing new.
    (here / "models" / "tuned").symlink_to(tmp_path / "tuned", target_is_directory=True)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    back = {"env.checkpoint": str(here / "models" / "tuned")}
    assert resume(tmp_path / "run", timesteps=24, overrides=back).timesteps == 24


def forget(out):
    """Make a run one from before runs kept contents."""
    config = json.loads((out / "config.json").read_text())
    del config["contents"]
    config["settings"]["env"] |= {"prompts": "prompts.txt", "checkpoint": "models/tuned"}
    (out / "config.json").write_text(json.dumps(config))


def test_two_places_that_have_changed_with_each_other_are_found_again():
    settings = np.array(json.dumps({"lora": ["/a", "/b"], "vae": "/a/b"}))
    swapped = json.loads(str(_relocated(settings, {"/a": "/b", "/b": "/a"})))
    assert swapped == {"lora": ["/b", "/a"], "vae": "/a/b"}


@pytest.mark.parametrize(
    "contents",
    [
        [1], "x", {"files": "x"}, {"files": [1]}, {"files": {"env.lora": {"place": 5, "holds": {}}}},
        {"files": {"env.lora": {"place": "/x", "holds": ["y"]}}}, {"files": {"env.lora": {"holds": {}}}},
        {"files": {"env.lora": {"place": "/x", "holds": {"": 1}}}}, {"prompts": "x"}, {"prompts": None},
        {"prompts": {"place": "/x", "count": "2", "sha256": "y"}}, {"prompts": {"place": "/x", "count": 2}},
        {"prompts": {"place": "/x", "count": 2, "sha256": 5}},
    ],
)  # fmt: skip
def test_damaged_contents_of_a_configuration_are_named_however_the_run_is_opened(
    contents, small_run
):
    config = {**json.loads((small_run / "config.json").read_text()), "contents": contents}
    (small_run / "config.json").write_text(json.dumps(config))
    # Files are named, so that their places are compared first.
    ways = (
        lambda: resume(small_run, overrides={"env.prompts": "other.txt"}),
        lambda: load_agent(small_run),
    )
    for way in ways:
        with pytest.raises(
            CheckpointError, match=r"config\.json is damaged: .*; put a copy of it back"
        ):
            way()


@pytest.mark.second
def test_runs_from_before_there_were_fingerprints_go_on_with_a_note(here, tmp_path, capsys):
    tiny(tmp_path / "whole", timesteps=16, overrides=SETTINGS)
    tiny(tmp_path / "old", timesteps=8, overrides=SETTINGS)
    forget(tmp_path / "old")
    places = {str(here / name): name for name in ("prompts.txt", "models/tuned")}
    rename_places(tmp_path / "old", places)
    capsys.readouterr()
    assert resume(tmp_path / "old", timesteps=16).timesteps == 16
    assert (
        "kept no fingerprint of env.checkpoint, env.prompts when it began"
        in capsys.readouterr().err
    )
    assert untimed(tmp_path / "old") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "old", tmp_path / "whole")
    change_weights(here / "models" / "tuned")
    with pytest.raises(OptionError, match="has changed"):
        resume(tmp_path / "old", timesteps=24)


def rename_places(out, names):
    """Let the checkpoints of a run say that their environment was given other names."""
    import numpy as np

    for path in out.glob("checkpoints/*/state.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        text = str(arrays["env.settings"])
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        arrays["env.settings"] = np.array(text)
        np.savez(path, **arrays)


def test_a_run_without_files_has_nothing_to_note(tmp_path, capsys):
    finished(tmp_path, timesteps=8)
    assert not (tmp_path / "prompts.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("contents") == {"files": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    resume(tmp_path, timesteps=16)
    assert "fingerprint" not in capsys.readouterr().err


# --- fingerprints
# ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_sees_every_byte_of_a_small_file_and_the_header_of_a_large_one(tmp_path):
    small = tmp_path / "small.bin"
    content = bytearray(WHOLE)
    small.write_bytes(content)
    was = digest(small)
    content[WHOLE // 3] = 1
    small.write_bytes(content)
    assert digest(small) != was

    large = tmp_path / "large.safetensors"
    tensors = {f"layer.{i}": torch.zeros(100_000) for i in range(20)}
    save_file(tensors, large)
    assert large.stat().st_size > WHOLE
    was = digest(large)
    save_file(
        {("other" if i == 7 else f"layer.{i}"): torch.zeros(100_000) for i in range(20)}, large
    )
    renamed = digest(large)
    save_file({name: tensor + 1e-6 for name, tensor in tensors.items()}, large)
    assert len({was, renamed, digest(large)}) == 3


@pytest.mark.parametrize(
    "place", ["/" + "x" * 300, "x/" * 3000, "~nobody-is-called-so/x", "a\0b", "\ud83d", ""]
)
def test_a_place_that_cannot_be_one_holds_nothing(place):
    assert fingerprint(place) == {}


def test_a_fingerprint_of_a_folder_names_its_files_and_follows_links_once(tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("unet/config.json", "README.md", ".cache/x.json", "weights.safetensors"):
        (folder / name).write_text(name)
    (folder / "unet" / "again").symlink_to(folder, target_is_directory=True)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (folder / "vae").symlink_to(tmp_path / "vae", target_is_directory=True)
    assert list(fingerprint(str(folder))) == [
        "unet/config.json",
        "vae/config.json",
        "weights.safetensors",
    ]
    assert fingerprint(str(folder / "weights.safetensors")) == {
        "": digest(folder / "weights.safetensors")
    }


def test_a_hub_id_is_known_by_its_commit_in_the_cache_and_nobody_is_asked(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("model_index.json", "head/linear.safetensors"):
        file = repository / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert fingerprint("somebody/model") == {"@": commit}
    assert fingerprint("somebody/model:head/linear.safetensors") == {"@": commit}
    assert fingerprint("somebody/other") == {}
    assert fingerprint("no id") == fingerprint("../x/y") == fingerprint("a/b/c") == {}


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"x\.bin' cannot be read: .*Permission denied"):
        digest(tmp_path / "x.bin")
