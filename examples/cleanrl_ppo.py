"""PPO in one file of plain torch, in the manner of CleanRL, on the batched environment.

All sub-environments start together and an episode has a known length, so a rollout is one whole episode of each, and
no value is bootstrapped.

    pip install flowgym_gym
    python examples/cleanrl_ppo.py
"""

import argparse

import gymnasium
import torch
from torch import nn
from torch.distributions import Normal

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.optimal_control import optimal_value, uncontrolled_value
from flowgym_gym.wrappers.vector import ToTorch

ID, NUM_ENVS, STEPS, EPOCHS, BATCH, LAMBDA, CLIP = "flowgym/GaussianMixture-Gaussian-v0", 128, 10, 10, 256, 0.97, 0.2


def network():
    layers = [nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    nn.init.zeros_(layers[-1].weight), nn.init.zeros_(layers[-1].bias)  # The untrained agent is the base model.
    return nn.Sequential(*layers)


@torch.no_grad()
def play(envs, act):
    """One episode of each sub-environment: what was seen, done and paid, time first."""
    observations, _ = envs.reset()
    seen, done, paid = [], [], []
    for _ in range(STEPS):
        seen.append(torch.cat([observations["latent"], observations["time"]], dim=1))
        done.append(act(seen[-1]))
        observations, rewards, *_ = envs.step(done[-1])
        paid.append(torch.as_tensor(rewards, dtype=torch.float32))
    return torch.stack(seen), torch.stack(done), torch.stack(paid)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=50)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    # An action of 1 moves the next state by three standard deviations of its noise.
    kwargs = {"discretization_steps": STEPS, "action_type": "control", "action_scale": 3.0}
    envs = ToTorch(gymnasium.make_vec(ID, NUM_ENVS, autoreset_mode="Disabled", **kwargs))
    envs.reset(seed=0)
    actor, critic, log_std = network(), network(), nn.Parameter(torch.tensor([-1.5]))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters(), log_std], lr=3e-3)

    for iteration in range(options.iterations):
        seen, done, paid = play(envs, lambda x: Normal(actor(x), log_std.exp()).sample())
        with torch.no_grad():
            log_probs, values = Normal(actor(seen), log_std.exp()).log_prob(done).sum(-1), critic(seen).squeeze(-1)
        # Generalised advantages; nothing comes after the last step.
        advantages = paid + torch.cat([values[1:], torch.zeros_like(values[:1])]) - values
        for t in reversed(range(STEPS - 1)):
            advantages[t] += LAMBDA * advantages[t + 1]
        whitened = (advantages - advantages.mean()) / advantages.std()
        batch = [part.flatten(0, 1) for part in (seen, done, log_probs, whitened, advantages + values)]

        for rows in [rows for _ in range(EPOCHS) for rows in torch.randperm(paid.numel()).split(BATCH)]:
            x, actions, before, advantage, target = (part[rows] for part in batch)
            ratio = (Normal(actor(x), log_std.exp()).log_prob(actions).sum(-1) - before).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            loss = (critic(x).squeeze(-1) - target).square().mean() - gain
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if iteration % 10 == 0:
            print(f"iteration {iteration:2}: return {paid.sum(0).mean():.2f} while exploring")

    mean = torch.cat([play(envs, actor)[2].sum(0) for _ in range(32)]).mean().item()
    base, best = uncontrolled_value(envs.unwrapped), optimal_value(envs.unwrapped).value
    print(f"return of the base model {base:.2f}, of PPO {mean:.2f}, of an optimal agent {best:.2f}")
    return base, mean, best


if __name__ == "__main__":
    main()
