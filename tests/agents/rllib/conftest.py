"""A Ray of this machine alone, small, and gone when the tests are."""

import pytest

QUICK = {
    "ppo": {"train_batch_size_per_learner": 32, "minibatch_size": 16, "num_epochs": 2},
    "sac": {"train_batch_size_per_learner": 8, "num_steps_sampled_before_learning_starts": 8},
}
MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
LOCAL = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
MEMORY = 200_000_000


def quick(config, algo="ppo", num_envs=2):
    """A configuration whose iterations take a moment."""
    config.env_runners(num_envs_per_env_runner=num_envs)
    config.training(**QUICK[algo])
    if algo == "sac":
        config.reporting(min_sample_timesteps_per_iteration=32)
    return config.debugging(seed=0, log_level="ERROR")


@pytest.fixture(scope="session")
def _ray():
    import ray

    ray.init(num_cpus=4, object_store_memory=MEMORY, _node_ip_address="127.0.0.1", **LOCAL)
    yield
    ray.shutdown()


@pytest.fixture
def build(_ray):
    """Build algorithms, which stop when the test ends."""
    built = []

    def build(config):
        built.append(config.build_algo())
        return built[-1]

    yield build
    for algorithm in built:
        algorithm.stop()
