"""The batched environment in TorchRL: its own check, and whole episodes as a TensorDict.

TorchRL takes vector environments that reset in the same step or, better, not by themselves:
``autoreset_mode`` says so here, since Gymnasium's default, the next step, is refused. With
"SameStep" TorchRL loses an episode's last observation.
"""

import gymnasium
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

import flowgym_gym  # noqa: F401 (registers the ids)

ID = "flowgym/StableDiffusion-Red-v0"
STEPS = 4
MODES = ("Disabled", "SameStep")


def make(mode, num_envs=3, **kwargs):
    kwargs["discretization_steps"] = STEPS
    # With "SameStep" TorchRL reads infos, and takes numbers alone.
    kwargs["info_keys"] = "numeric"
    return GymWrapper(gymnasium.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **kwargs))


def main():
    rollouts = {}
    for mode in MODES:
        env = make(mode)
        check_env_specs(env)
        env.set_seed(0)
        rollouts[mode] = env.rollout(2 * STEPS, break_when_any_done=False)
        returns = rollouts[mode]["next", "reward"].squeeze(-1).unflatten(-1, (2, STEPS)).sum(-1)
        print(f"{mode}: specs are right; returns {returns.numpy().round(2).tolist()}")
    return rollouts


if __name__ == "__main__":
    main()
