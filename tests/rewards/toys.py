"""Small models and rewards that tests of rewards use."""

import torch

from flowgym_gym import BaseModel, FlowTensor, OptimalTransportScheduler


class GreyModel(BaseModel):
    """Flows from noise to a grey picture; it has no prompts."""

    output_type = "velocity"

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 3, 8, 8)), kwargs

    def forward(self, x, t, **kwargs):
        return (0.5 - x) / (1 - t).reshape(-1, 1, 1, 1)
