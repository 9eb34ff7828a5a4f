"""REINFORCE by hand on the torch environment; the policy is the steered sampler itself, as in DDPO.

Every denoising step draws the next state from a normal distribution, whose mean the network below
moves. So the probability of a trajectory is known exactly, and no noise is added to the actions.
What is climbed is

    E[R] = E[reward - KL(steered || free)], by its gradient E[(R - b) d log p(trajectory) - d KL].
"""

import torch
from torch import nn

import flowgym_gym
from flowgym_gym import FlowTensor
from flowgym_gym.optimal_control import free_energy, uncontrolled_value


def main(iterations=300):
    torch.manual_seed(0)

    # An action of 1 moves the next state by one standard deviation.
    env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", 10, 30.0, action_type="control")
    layers = nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    network = nn.Sequential(*layers)
    nn.init.zeros_(layers[-1].weight), nn.init.zeros_(layers[-1].bias)  # first, the base model
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def policy(x, t):
        return network(torch.cat([x.data, t[:, None]], dim=1))

    for iteration in range(iterations):
        sample = env.sample(256, policy)
        # What is still paid from each step on, less its mean over the batch; shape (steps, n).
        costs_to_go = sample.control_costs.flip(0).cumsum(0).flip(0)
        to_go = env.reward_scale * sample.rewards - costs_to_go
        advantages = to_go - to_go.mean(dim=1, keepdim=True)

        # All steps of all trajectories as one batch.
        states = torch.stack([state.data for state in sample.trajectory])
        x, following = states[:-1].flatten(0, 1), states[1:].flatten(0, 1)
        index = torch.arange(env.discretization_steps).repeat_interleave(len(sample))
        action, output = policy(FlowTensor(x), env.times[index]), env.predict(FlowTensor(x), index)
        log_prob = env.log_prob(x, output, action, following, index)
        _, cost = env.advance(x, output, action, torch.zeros_like(x), index)
        loss = (cost - advantages.flatten() * log_prob).mean()
        optimizer.zero_grad(), loss.backward()
        optimizer.step()
        if iteration % 50 == 0:
            print(f"iteration {iteration:3}: return {to_go[0].mean():.2f}")

    sample = env.sample(4096, policy)
    mean = (env.reward_scale * sample.rewards - sample.control_costs.sum(dim=0)).mean().item()
    base, bound = uncontrolled_value(env), free_energy(env)
    print(f"return: base model {base:.2f}, REINFORCE {mean:.2f}; no policy passes {bound:.2f}")
    return base, mean, bound


if __name__ == "__main__":
    main()
