"""TorchRL: PPO on the batched environment; its collector wants no resets in the same call.

``GymEnv(ID)`` takes the single environment, too. ``info_keys="numeric"`` lets TorchRL read the
infos, which it keeps as tensors.
"""

import torch
from mixture import make_vec, report
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import CatTensors, GymWrapper, TransformedEnv
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

SIZES = {"depth": 2, "num_cells": 64, "activation_class": nn.Tanh}


def make(num_envs):
    envs = make_vec(num_envs, "Disabled", info_keys="numeric")
    env = GymWrapper(envs).auto_register_info_dict(ignore_private=True)
    return TransformedEnv(env, CatTensors(["latent", "time"], "observation", del_keys=False))


def main(timesteps=50_000, epochs=8):
    torch.manual_seed(0)
    env = make(8)
    network = nn.Sequential(MLP(2, 1, **SIZES), AddStateIndependentNormalScale(1))
    nn.init.constant_(network[1].state_independent_scale, -1.5)
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(2, 1, **SIZES), in_keys=["observation"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_bonus=False, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for batch in Collector(env, actor, frames_per_batch=640, total_frames=timesteps):
        for _ in range(epochs):
            advantage(batch)
            for part in batch.reshape(-1)[torch.randperm(640)].split(160):
                optimizer.zero_grad()
                losses = loss(part)
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()

    def act(observations):
        x = torch.cat([torch.from_numpy(observations[key]) for key in ("latent", "time")], dim=1)
        with torch.no_grad():
            return network(x)[0].numpy()

    return report("TorchRL PPO", timesteps, act)


if __name__ == "__main__":
    main()
