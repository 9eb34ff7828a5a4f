"""skrl: PPO on the batched environment, which it takes as it is, resets in the same step."""

import torch
from mixture import flat, make_vec, report
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
from skrl.utils import set_seed
from torch import nn


def network():
    return nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


class Policy(GaussianMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self, clip_actions=True)
        self.net, self.log_std = network(), nn.Parameter(torch.tensor([-1.5]))

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, **spaces):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = network()

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


def main(timesteps=50_000, num_envs=8):
    set_seed(0)
    env = wrap_env(make_vec(num_envs, "SameStep"))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    policy, value = (kind(**spaces, device=env.device) for kind in (Policy, Value))
    cfg = PPO_CFG(rollouts=80, mini_batches=4, discount_factor=1.0, value_loss_scale=0.5)
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0  # writes no files
    agent = PPO(
        models={"policy": policy, "value": value},
        memory=RandomMemory(memory_size=80, num_envs=num_envs, device=env.device),
        cfg=cfg,
        **spaces,
        device=env.device,
    )
    trainer = SequentialTrainerCfg(timesteps=timesteps // num_envs, headless=True)
    SequentialTrainer(cfg=trainer, env=env, agents=agent).train()

    def act(observations):
        with torch.no_grad():
            return policy.net(torch.from_numpy(flat(observations))).numpy()

    return report("skrl PPO", timesteps, act)


if __name__ == "__main__":
    main()
