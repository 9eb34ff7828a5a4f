"""Films of an episode: the picture that the model expects at each step, from noise to the end.

The first film is of the base model, the second of a steady push towards red, from the same noise.
"""

import argparse

import gymnasium
import numpy as np
from gymnasium.wrappers import RecordVideo

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.wrappers import CoarseAction


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="films", help="folder of the films (default: %(default)s)")
    parser.add_argument("--prompt", default="a photo of a cat")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    env = gymnasium.make(
        "flowgym/StableDiffusion-Red-v0",
        prompts=options.prompt,
        discretization_steps=options.steps,
        render_mode="rgb_array",
    )
    # One number per latent channel, the same for the whole picture.
    env = CoarseAction(env, 1)
    env = RecordVideo(env, options.out, episode_trigger=lambda episode: True, name_prefix="film")
    still = np.zeros(env.action_space.shape, np.float32)
    push = still + np.array([0.3, 0.3, 0.3, 0.0], np.float32).reshape(4, 1, 1)
    rewards = []
    for name, action in (("base model", still), ("steady push", push)):
        env.reset(seed=options.seed)
        cost, terminated = 0.0, False
        while not terminated:
            _, _, terminated, _, info = env.step(action)
            cost += info["control_cost"]
        rewards.append(info["terminal_reward"])
        print(f"{name}: red {info['terminal_reward']:.3f}, control cost {cost:.1f} nats")
    env.close()
    print(f"films in {options.out}: film-episode-0.mp4, film-episode-1.mp4")
    return rewards


if __name__ == "__main__":
    main()
