"""A seed means the same episode on a GPU; these tests need one and are skipped without."""

import gymnasium
import numpy as np
import pytest
import torch

import flowgym_gym  # noqa: F401 (registers the ids)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ID = "flowgym/StableDiffusion-Red-v0"


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


def episode(device, **options):
    """Latents, rewards and control costs of an episode of three sub-environments with random
    actions.
    """
    envs = gymnasium.make_vec(ID, num_envs=3, device=device, discretization_steps=10, **options)
    observations, _ = envs.reset(seed=5)
    draws = np.random.default_rng(0)
    latents, rewards, costs = [observations["latent"]], [], []
    for _ in range(10):
        actions = draws.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
        observations, reward, _, _, infos = envs.step(actions)
        latents.append(observations["latent"])
        rewards.append(reward)
        costs.append(infos["control_cost"])
    envs.close()
    return np.stack(latents), np.stack(rewards), np.stack(costs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 3.0},
        {"noise_level": 0.0},
        {"sampler": "euler"},
        {"action_type": "control"},
    ],
    ids=str,
)
def test_a_seed_means_the_same_episode_on_the_gpu(options):
    for here, there in zip(episode("cpu", **options), episode("cuda", **options), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(dtype):
    exact, half = episode("cpu"), episode("cuda", dtype=dtype)
    assert np.abs(exact[0] - half[0]).mean() < 0.05
    np.testing.assert_allclose(half[2], exact[2], rtol=1e-3)


def test_a_compiled_network_gives_the_same_episode_on_the_gpu():
    for here, there in zip(episode("cuda"), episode("cuda", compile=True), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)


# One GPU is enough to see that what goes from one device to another arrives.
@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cpu", "cuda:0"], ["cuda:0", "cuda:1"]])
def test_sub_environments_are_split_over_devices(devices):
    if torch.cuda.device_count() < len([name for name in devices if name != "cpu"]):
        pytest.skip("needs two CUDA devices")
    options = {"prompts": ["a photo of a cat", "a red heart"], "guidance_scale": 3.0}
    for here, there in zip(episode("cpu", **options), episode(devices, **options), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-3)
