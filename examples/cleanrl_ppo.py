"""PPO in plain torch, in the manner of CleanRL; a rollout is an episode of each sub-environment."""

import gymnasium
import torch
from torch import nn
from torch.distributions import Normal

from flowgym_gym import seeds
from flowgym_gym.optimal_control import optimal_value, uncontrolled_value
from flowgym_gym.wrappers.vector import ToTorch

ID, NUM_ENVS, STEPS = "flowgym/GaussianMixture-Gaussian-v0", 128, 10
EPOCHS, BATCH, CLIP = 10, 256, 0.2
PROCESS = {"discretization_steps": STEPS, "action_type": "control", "action_scale": 3.0}  # in stds


def network():
    layers = [nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    nn.init.zeros_(layers[-1].weight), nn.init.zeros_(layers[-1].bias)  # first, the base model
    return nn.Sequential(*layers)


@torch.no_grad()
def play(envs, act, seed):
    """One episode of each sub-environment: what was seen, done and paid, time first."""
    (observations, _), steps = envs.reset(seed=seeds(seed, NUM_ENVS)), []
    for _ in range(STEPS):
        x = torch.cat([observations["latent"], observations["time"]], dim=1)
        observations, rewards, *_ = envs.step(actions := act(x))
        steps.append((x, actions, torch.as_tensor(rewards, dtype=torch.float32)))
    return [torch.stack(part) for part in zip(*steps, strict=True)]


def main(iterations=50):
    torch.manual_seed(0)
    envs = ToTorch(gymnasium.make_vec(ID, NUM_ENVS, autoreset_mode="Disabled", **PROCESS))
    actor, critic, log_std = network(), network(), nn.Parameter(torch.tensor([-1.5]))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters(), log_std], lr=3e-3)
    for iteration in range(iterations):
        seen, done, paid = play(envs, lambda x: Normal(actor(x), log_std.exp()).sample(), iteration)
        to_go = paid.flip(0).cumsum(0).flip(0)
        advantages = to_go - critic(seen).squeeze(-1).detach()
        log_probs = Normal(actor(seen), log_std.exp()).log_prob(done).detach()
        advantages = (advantages - advantages.mean()) / advantages.std()
        batch = [part.flatten(0, 1) for part in (seen, done, log_probs.sum(-1), advantages, to_go)]
        for rows in torch.cat([torch.randperm(paid.numel()) for _ in range(EPOCHS)]).split(BATCH):
            x, actions, before, advantage, target = (part[rows] for part in batch)
            ratio = (Normal(actor(x), log_std.exp()).log_prob(actions).sum(-1) - before).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            loss = ((critic(x).squeeze(-1) - target).square() - gain).mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    mean = torch.cat([play(envs, actor, 10_000 + i)[2].sum(0) for i in range(32)]).mean().item()
    base, best = uncontrolled_value(envs.unwrapped), optimal_value(envs.unwrapped).value
    print(f"return of the base model {base:.2f}, of PPO {mean:.2f}, of an optimal agent {best:.2f}")
    return base, mean, best


if __name__ == "__main__":
    main()
