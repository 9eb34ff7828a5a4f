import os

import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from ray.cluster_utils import Cluster

from flowgym_gym.agents.rllib import config
from tests.agents.rllib.conftest import MEMORY, MIXTURE, quick


@pytest.fixture
def two_nodes():
    """Two nodes of a real cluster, both on this machine, with room for a runner each."""
    if ray.is_initialized():
        ray.shutdown()
    node = {"object_store_memory": MEMORY, "include_dashboard": False, "num_gpus": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 1})
    cluster.add_node(object_store_memory=MEMORY, num_cpus=1, num_gpus=0)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_of_two_nodes_trains_across_both(two_nodes):
    algorithm = quick(config(MIXTURE, runners=2)).build_algo()
    try:
        results = [algorithm.train() for _ in range(2)]
        nodes = algorithm.env_runner_group.foreach_env_runner(
            lambda runner: (ray.get_runtime_context().get_node_id(), os.getpid()),
            local_env_runner=False,
        )
    finally:
        algorithm.stop()
    assert len({node for node, _ in nodes}) == len({pid for _, pid in nodes}) == 2
    assert results[1]["num_env_steps_sampled_lifetime"] == 64
    assert np.isfinite(results[1]["learners"]["default_policy"]["total_loss"])
