"""A run folder or checkpoint from somebody else runs no code of theirs."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch

import flowgym_gym
from flowgym_gym.agents import evaluate, load_agent
from flowgym_gym.agents.runs.checkpoints import checkpoints
from flowgym_gym.cli import main
from flowgym_gym.errors import CheckpointError
from tests.agents.conftest import draw_little, resume, tiny
from tests.conftest import RED, further

PACKAGE = Path(flowgym_gym.__file__).parent
TINY_CHECKPOINT = PACKAGE / "models" / "embedded" / "tiny"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """What a pickle that is executed leaves behind."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.is_dir()
    mark.rmdir()
    return mark


@pytest.fixture(scope="module", params=["ppo", "sac"])
def trained(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / request.param
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        tiny(out, request.param, timesteps=8)
    return out


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def replaced(archive, name, content):
    """Put other content into a file of a zip archive, or a new file."""
    with zipfile.ZipFile(archive) as file:
        parts = {entry: file.read(entry) for entry in file.namelist()}
    parts[name] = content
    with zipfile.ZipFile(archive, "w") as file:
        for entry, data in parts.items():
            file.writestr(entry, data)


def pickled(mark):
    return pickle.dumps(Evil(mark), protocol=2)


def saved_by_torch(mark):
    buffer = io.BytesIO()
    torch.save({"weights": Evil(mark)}, buffer)
    return buffer.getvalue()


def array_of_objects(mark):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def every_way_in(run):
    """Open a run folder in all the ways there are, and return what they raise."""
    algo = run.name
    errors = []
    for way in (
        lambda: load_agent(run),
        lambda: evaluate(run, episodes=2),
        lambda: resume(run, algo, timesteps=16),
    ):
        try:
            way()
        except CheckpointError as error:
            errors.append(str(error))
        else:
            errors.append(None)
    return errors


@pytest.mark.parametrize("make", [saved_by_torch, *further(pickled)])
@pytest.mark.parametrize(
    "part", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "extra.pth"]
)
def test_pickles_among_the_weights_are_refused(part, make, run, mark, capsys):
    if run.name == "sac":
        part = part.replace("policy.optimizer", "actor.optimizer")
    replaced(checkpoints(run)[0] / "model.zip", part, make(mark))
    # Every way in passes over to the checkpoint before, and says so.
    found = every_way_in(run)
    assert not mark.exists()
    assert found == [None, None, None]
    assert capsys.readouterr().err.count("000000008 cannot be read") == 3


def test_pickles_among_the_data_are_not_opened(run, mark):
    archive = checkpoints(run)[0] / "model.zip"
    with zipfile.ZipFile(archive) as file:
        data = json.loads(file.read("data"))
    code = base64.b64encode(cloudpickle.dumps(Evil(mark))).decode()
    for entry in ("policy_class", "policy_kwargs", "lr_schedule", "observation_space"):
        data[entry] = {":type:": "<class 'function'>", ":serialized:": code}
    replaced(archive, "data", json.dumps(data))
    # stable-baselines3's own way of loading would have opened them.
    with pytest.raises(Exception, match=r".*"):
        type(load_agent(run)).load(archive, device="cpu")
    assert mark.exists()
    mark.rmdir()
    assert every_way_in(run) == [None, None, None]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "entry"), [("state.npz", "latents.npy"), ("replay_buffer.npz", "rewards.npy")]
)
def test_pickles_among_the_arrays_are_refused(file, entry, run, mark, capsys):
    if file == "replay_buffer.npz" and run.name == "ppo":
        pytest.skip("has no replay buffer")
    for checkpoint in checkpoints(run):
        if (checkpoint / file).exists():
            replaced(checkpoint / file, entry, array_of_objects(mark))
    found = every_way_in(run)[2]
    said = capsys.readouterr().err
    if file == "state.npz":
        assert (
            "state.npz is damaged, or holds other things than arrays of numbers and text" in found
        )
    else:
        # The agent goes on without it.
        assert found is None
        assert "going on with an empty one" in said
    assert "allow_pickle" not in f"{found}{said}"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("algo", "tensorboard_log", "elsewhere"),
        ("algo", "replay_buffer_class", "os.system"),
        ("algo", "policy_kwargs", {}),
        ("policy", "optimizer_class", "os.system"),
        ("env", "entry_point", "os:system"),
        ("env", "trust_remote_code", True),
        ("wrappers", "os", "system"),
    ],
)
def test_settings_that_a_run_cannot_have_are_refused(section, name, value, run):
    config = json.loads((run / "config.json").read_text())
    config["settings"][section][name] = value
    (run / "config.json").write_text(json.dumps(config))
    for error in every_way_in(run):
        assert f"there is no setting {section}.{name}" in error


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{}",
        '{"env_id": 3, "algo": "ppo", "seed": 0, "settings": {}}',
        '{"env_id": "flowgym/StableDiffusion-Red-v0", "algo": [], "seed": 0, "settings": {}}',
        '{"env_id": "flowgym/StableDiffusion-Red-v0", "algo": "ppo", "seed": "x", "settings": {}}',
        '{"env_id": "flowgym/StableDiffusion-Red-v0", "algo": "ppo", "seed": 0, "settings": {"algo": 3}}',
        '{"env_id": "flowgym/StableDiffusion-Red-v0", "algo": "ppo", "seed": 0, "settings": {"extra": {}}}',
        '{"env_id": "flowgym/StableDiffusion-Red-v0", "algo": "ppo", "seed": 0, "settings": {"num_envs": -1}}',
    ],
)
def test_a_configuration_that_is_none_is_one_line(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert main(["evaluate", str(tmp_path)]) == 2
    assert re.fullmatch(
        r"error: .*config\.json (is damaged|does not describe a run): .*\n", capsys.readouterr().err
    )


# --- checkpoints of models
# -------------------------------------------------------------------------------------------


def pickled_weights(folder, mark):
    for part in ("unet", "vae", "text_encoder"):
        for weights in (folder / part).glob("*.safetensors"):
            # That another file is there must not do.
            weights.rename(weights.with_name("other.safetensors"))
        for file in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            (folder / part / file).write_bytes(saved_by_torch(mark))


def module_of_its_own(folder, mark):
    index = json.loads((folder / "model_index.json").read_text())
    library, name = index["unet"]
    index["unet"] = ["evil", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "evil.py").write_text(
        f"import os\nfrom {library} import {name}\nos.mkdir({str(mark)!r})\n"
    )


def pipeline_of_its_own(folder, mark):
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "StableDiffusionPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")


@pytest.mark.parametrize("change", [pickled_weights, module_of_its_own, pipeline_of_its_own])
def test_checkpoints_bring_no_code(change, tmp_path, mark):
    folder = Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / "checkpoint"))
    change(folder, mark)
    with pytest.raises(CheckpointError):
        gymnasium.make(RED, checkpoint=str(folder))
    assert not mark.exists()


def test_nothing_in_the_package_could_execute_a_pickle():
    forbidden = (
        r"trust_remote_code|allow_pickle=True|torch\.load\((?![^)]*weights_only=True)|pickle\.loads?\("
        r"|(?<![.\w])(eval|exec)\("
    )
    for path in PACKAGE.rglob("*.py"):
        found = re.search(forbidden, path.read_text(encoding="utf-8"))
        assert not found, f"{path} has {found}"
