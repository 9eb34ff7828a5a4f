"""The batched environment in TorchRL: its own check, and whole episodes as a TensorDict.

TorchRL takes vector environments that reset in the same step or, better, not by themselves:
``autoreset_mode`` says so here, since Gymnasium's default, the next step, is refused. With
"SameStep" TorchRL loses an episode's last observation.
"""

import gymnasium
from gymnasium.vector import VectorWrapper
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

import flowgym_gym  # noqa: F401 (registers the ids)

ID = "flowgym/StableDiffusion-Red-v0"
STEPS = 4
MODES = ("Disabled", "SameStep")


class WithoutPrompts(VectorWrapper):
    """Leaves prompts out of the infos: with "SameStep" TorchRL takes numbers alone."""

    def __init__(self, env):
        super().__init__(env)
        self.autoreset_mode = env.metadata["autoreset_mode"]  # TorchRL asks the outermost wrapper

    def reset(self, **kwargs):
        observations, infos = self.env.reset(**kwargs)
        return observations, self._numbers(infos)

    def step(self, actions):
        *results, infos = self.env.step(actions)
        return *results, self._numbers(infos)

    def _numbers(self, infos):
        return {key: value for key, value in infos.items() if key not in ("prompt", "_prompt")}


def make(mode, num_envs=3, **kwargs):
    kwargs["discretization_steps"] = STEPS
    envs = gymnasium.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, **kwargs)
    return GymWrapper(WithoutPrompts(envs) if mode == "SameStep" else envs)


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
