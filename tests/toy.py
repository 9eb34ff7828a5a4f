"""A pytest plugin that registers an id of a model of one's own, without prompts, before tests are
collected.
"""

import gymnasium
import torch

import flowgym_gym
from flowgym_gym import BaseModel, FlowTensor, OptimalTransportScheduler
from flowgym_gym.catalogue import DENOISING, DENOISING_VECTOR

ID = "flowgym/Toy-Red-v0"


@flowgym_gym.base_model_registry.register("images/toy")
class ToyModel(BaseModel[FlowTensor]):
    """Flows from noise to a grey picture."""

    output_type = "velocity"

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 3, 8, 8)), kwargs

    def forward(self, x, t, **kwargs):
        return (0.5 - x) / (1 - t).reshape(-1, 1, 1, 1)


gymnasium.register(
    ID,
    entry_point=DENOISING,
    vector_entry_point=DENOISING_VECTOR,
    kwargs={"base_model": "images/toy", "reward": "images/red"},
)
