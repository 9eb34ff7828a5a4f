"""tianshou 2: PPO on flat observations and actions, in tianshou's own vector environment."""

import numpy as np
import torch
from gymnasium.wrappers import FlattenObservation
from mixture import flat, make, report
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from torch import nn
from torch.distributions import Independent, Normal

from flowgym_gym.wrappers import FlattenAction


def network():
    return Net(state_shape=(2,), hidden_sizes=[64, 64], activation=nn.Tanh)


def main(timesteps=30_000, num_envs=8):
    torch.manual_seed(0), np.random.seed(0)
    envs = DummyVectorEnv([lambda: FlattenAction(FlattenObservation(make()))] * num_envs)
    envs.seed(0)
    actor = ContinuousActorProbabilistic(
        preprocess_net=network(), action_shape=(1,), unbounded=True
    )
    nn.init.constant_(actor.sigma_param, -1.5)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda parameters: Independent(Normal(*parameters), 1),
        action_space=envs.action_space[0],
    )
    ppo = PPO(
        policy=policy,
        critic=ContinuousCritic(preprocess_net=network()),
        optim=AdamOptimizerFactory(lr=1e-3),
        gamma=1.0,
        ent_coef=0.0,
        max_grad_norm=0.5,
    )
    ppo.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector(ppo, envs, VectorReplayBuffer(800, num_envs)),
            max_epochs=1,
            epoch_num_steps=timesteps,
            collection_step_num_env_steps=640,
            update_step_num_repetitions=8,
            batch_size=160,
        )
    )

    def act(observations):
        with torch.no_grad():
            return actor(flat(observations))[0][0].numpy()

    return report("tianshou PPO", timesteps, act)


if __name__ == "__main__":
    main()
