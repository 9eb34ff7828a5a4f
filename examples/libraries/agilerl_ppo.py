"""AgileRL: one PPO agent of its evolvable ones on the batched environment, resets in the same step.

Its loop knows no other mode, and its networks take actions that are vectors alone.
"""

import torch
from agilerl.algorithms import PPO
from agilerl.rollouts.on_policy import collect_rollouts
from mixture import make_vec, report

from flowgym_gym.wrappers.vector import FlattenAction


def main(timesteps=50_000, num_envs=8, rollout=640):
    torch.manual_seed(0)
    envs = FlattenAction(make_vec(num_envs, "SameStep"))
    envs.reset(seed=0)
    agent = PPO(
        envs.single_observation_space,
        envs.single_action_space,
        num_envs=num_envs,
        learn_step=rollout,
        batch_size=160,
        update_epochs=8,
        lr=1e-3,
        gamma=1.0,
        ent_coef=0.0,
        rollout_buffer_config={"use_gae": False},  # which ends episodes a step too early
    )
    log_std = agent.actor.head_net.log_std.data
    log_std.fill_(-1.5)  # action_std_init is taken for it, and must not be negative
    state = {}
    for _ in range(timesteps // rollout):
        _, *last = collect_rollouts(agent, envs, **state)
        state = dict(zip(("last_obs", "last_done", "last_scores", "last_info"), last, strict=True))
        agent.learn()

    log_std.fill_(-20.0)  # get_action has no other way to leave exploration out
    act = lambda observations: agent.get_action(observations)[0]  # noqa: E731
    return report("AgileRL PPO", timesteps, act)


if __name__ == "__main__":
    main()
