"""Runs that an earlier version of this package trained go on in this one, bit for bit.

``tests/kept_runs`` holds three small ones, stopped halfway. Their continuation by the version that
wrote them is in ``continued.json``: a digest of weights, optimisers, random states and episodes,
and the rows of the metrics. Instruction sets round differently, so the libraries are held to the
oldest one; and other versions of the libraries may round differently, too, so that there the run
only has to reach its end.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flowgym_gym.agents.runs.files import versions
from tests.agents.conftest import untimed

KEPT = Path(__file__).parents[2] / "kept_runs"
CONTINUED = json.loads((KEPT / "continued.json").read_text(encoding="utf-8"))
# The oldest instructions that MKL, torch and oneDNN have in common.
PORTABLE = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
RESUME = """
import sys
from flowgym_gym.agents import train
train(sys.argv[1], out=sys.argv[2], resume=True, timesteps=int(sys.argv[3]), progress=False)
"""


def flat(prefix, value):
    """Tensors and arrays in nested dictionaries and lists, by dotted name."""
    if isinstance(value, torch.Tensor | np.ndarray):
        yield prefix, np.ascontiguousarray(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{prefix}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat(f"{prefix}.{i}", inner)


def digest(checkpoint):
    """One of everything in a checkpoint but the text that names its environment."""
    with np.load(checkpoint / "state.npz") as file:
        arrays = {f"state.{name}": file[name] for name in file.files if name != "env.settings"}
    with zipfile.ZipFile(checkpoint / "model.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".pth") and name != "pytorch_variables.pth":
                tensors = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                arrays |= dict(flat(name, tensors))
    digests = {
        name: hashlib.sha256(array.tobytes()).hexdigest()[:16] for name, array in arrays.items()
    }
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@pytest.mark.second
@pytest.mark.parametrize("name", sorted(CONTINUED))
def test_a_run_of_an_earlier_version_goes_on_bit_by_bit(name, tmp_path):
    out, expected = tmp_path / name, CONTINUED[name]
    shutil.copytree(KEPT / name, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    arguments = [config["env_id"], str(out), str(expected["timesteps"])]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, *arguments],
        env={**os.environ, **PORTABLE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    newest = out / "checkpoints" / f"{expected['timesteps']:09d}"
    assert newest.is_dir()
    libraries = set(config["versions"]) - {"python", "flowgym_gym"}
    same = all(versions().get(library) == config["versions"][library] for library in libraries)
    if same and platform.machine() == "x86_64":
        assert json.loads(json.dumps(untimed(out))) == expected["metrics"]
        assert digest(newest) == expected["digest"]


@pytest.mark.second
def test_a_run_goes_on_where_the_times_of_its_grid_are_rounded_differently(tmp_path):
    out = tmp_path / "ppo"
    shutil.copytree(KEPT / "ppo", out)
    (newest,) = (out / "checkpoints").iterdir()
    with np.load(newest / "state.npz") as file:
        arrays = dict(file)
    times = arrays["env.times"]
    arrays["env.times"] = np.nextafter(times, np.full_like(times, 2.0))
    np.savez(newest / "state.npz", **arrays)
    arguments = ["flowgym/GaussianMixture-Gaussian2D-v0", str(out), "800"]
    done = subprocess.run(
        [sys.executable, "-c", RESUME, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
