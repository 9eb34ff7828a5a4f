r"""What no policy passes on an environment: ``python -m studies.bound StableDiffusion-Red-v0``.

A policy has to take initial noises as they come, so its expected return is at most the free energy

.. math:: E_{x_0} \Big[ w \log E\big[ \exp(\lambda r / w) \,\big|\, x_0 \big] \Big],

the inner expectation being over the base model's paths from :math:`x_0`, with :math:`\lambda` the reward scale and
:math:`w` the weight of control costs (docs/mathematics.md, equation 11). It is estimated from some continuations of
each of some initial noises; the logarithm of a mean of :math:`n` is low by about its relative variance over
:math:`2 n`, which is added back. The interval is over initial noises.

Where returns spread over many times :math:`w`, a few of any number of continuations decide, and the estimate stays too
low. So it is made from quarters of the continuations, too, and where these give another number, by more than half of
the interval's width, no estimate is printed, but what the bound is at least: without the correction the estimate is low
on average, so the bound lies above the lower end of its interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.episodes import held_out_seeds
from flowgym_gym.agents.runs.presets import full_id, load_preset
from flowgym_gym.agents.runs.settings import override, parse_assignments
from flowgym_gym.errors import OptionError
from flowgym_gym.statistics import interval


def returns(env_id: str, settings: dict[str, object], noises: int, continuations: int) -> np.ndarray:
    """Returns of the base model, ``(noises, continuations)``: a row's episodes begin with the same noise and prompt.

    Raises:
        OptionError: If the process draws no noise.
    """
    env = make_vector_env(env_id, settings, continuations, AutoresetMode.DISABLED)
    if not bool((env.unwrapped.rollout.environment.transitions.std > 0).any()):
        raise OptionError(
            "this process draws no noise: its control costs are no divergence, and the free energy bounds nothing; "
            "take a noise_level above 0"
        )
    still = np.zeros(env.action_space.shape or (), np.float32)
    rows = []
    for start in tqdm(held_out_seeds(noises * continuations)[::continuations], unit="noise", file=sys.stderr):
        env.reset(seed=[start + i for i in range(continuations)])
        state = env.unwrapped.get_state()
        for name, array in state.items():
            # Generators stay: they draw each continuation's own noise.
            if name in ("latents", "embeddings") or (name.startswith("kwargs/") and array.ndim):
                state[name] = np.repeat(array[:1], continuations, axis=0)
        env.unwrapped.set_state(state)
        total, done = np.zeros(continuations), False
        while not done:
            _, rewards, terminations, _, _ = env.step(still)
            total += rewards
            done = bool(terminations.all())
        rows.append(total)
    return np.array(rows)


def free_energies(returns: np.ndarray, weight: float, corrected: bool = True) -> np.ndarray:
    """Free energy from each noise, ``(noises,)``, for returns of the base model and this weight of control costs.

    Args:
        returns: From :func:`returns`.
        weight: Of the control costs.
        corrected: Add the first-order bias back; without it the estimate is low on average.

    >>> gaussian = np.random.default_rng(0).normal(1.0, 2.0, (200, 4000))
    >>> bool(abs(free_energies(gaussian, 4.0).mean() - (1 + 2**2 / 2 / 4)) < 0.01)
    True
    """
    top = returns.max(axis=1, keepdims=True)
    weights = np.exp((returns - top) / weight)
    mean = weights.mean(axis=1)
    correction = weights.var(axis=1, ddof=1) / mean**2 / (2 * returns.shape[1]) if corrected else 0.0
    return np.asarray(top[:, 0] + weight * (np.log(mean) + correction))


def bound(returns: np.ndarray, weight: float) -> tuple[dict[str, float], bool]:
    """Mean free energy with its interval, and whether the continuations are enough for an estimate; see the module.

    If they are not, the interval is that of a mean without correction, which is low on average.
    """
    estimate = interval(free_energies(returns, weight))
    size = returns.shape[1] // 4
    quarters = [free_energies(returns[:, i * size : (i + 1) * size], weight).mean() for i in range(4)]
    if abs(estimate["mean"] - np.mean(quarters)) <= estimate["high"] - estimate["mean"]:
        return estimate, True
    return interval(free_energies(returns, weight, corrected=False)), False


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the base model's return and the bound."""
    parser = argparse.ArgumentParser(prog="python -m studies.bound", description=__doc__.partition("\n")[0])
    parser.add_argument("env", help="environment id; its settings are those of the preset for PPO")
    parser.add_argument("--noises", type=int, default=64, help="at least 2 (default: %(default)s)")
    parser.add_argument("--continuations", type=int, default=64, help="of each, at least 8 (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    args = parser.parse_args(arguments)
    for name, value, least in (("noises", args.noises, 2), ("continuations", args.continuations, 8)):
        if value < least:
            parser.error(f"--{name} is {value}, expected at least {least}")
    env_id = full_id(args.env)
    settings = override(load_preset(env_id, "ppo"), parse_assignments(args.set), env_id, "ppo")
    weight = settings["env"].get("control_cost_weight", 1.0)
    if weight <= 0:
        parser.error(f"control_cost_weight is {weight}, expected a number above 0: without a price there is no bound")
    found = returns(env_id, settings, args.noises, args.continuations)
    print(f"base model        {_cell(interval(found.mean(axis=1)))}")
    value, estimated = bound(found, weight)
    if estimated:
        print(f"no policy passes  {_cell(value)}")
    else:
        too_few = f"{args.continuations} continuations are too few to estimate it"
        print(f"the bound is at least {value['low']:.2f}; {too_few}")


def _cell(values: dict[str, float]) -> str:
    return f"{values['mean']:.2f} +- {values['high'] - values['mean']:.2f}"


if __name__ == "__main__":
    main()
