"""Stable Diffusion 1.5 in its full size, with random weights."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.full_size import build

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
    with torch.random.fork_rng():
        return build(tmp_path_factory.mktemp("full_size") / "stable-diffusion-v1-5", torch.float16)


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
