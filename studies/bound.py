r"""What no policy passes on an environment: ``python -m studies.bound StableDiffusion-Red-v0``.

A policy has to take initial noises as they come, so its expected return is at most the free energy

.. math:: E_{x_0} \Big[ w \log E\big[ \exp(\lambda r / w) \,\big|\, x_0 \big] \Big],

the inner expectation being over the base model's paths from :math:`x_0`, with :math:`\lambda` the
reward scale and
:math:`w` the weight of control costs (docs/mathematics.md, equation 11). How it is estimated, and
when it is not but only what the bound is at least, is in :mod:`flowgym_gym.optimal_control.bound`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.episodes import held_out_seeds
from flowgym_gym.agents.runs.presets import full_id, load_preset
from flowgym_gym.agents.runs.settings import override, parse_assignments
from flowgym_gym.optimal_control.bound import bound, continued_returns
from flowgym_gym.statistics import mean_and_interval


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the base model's return and the bound."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.bound", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("env", help="environment id; its settings are those of the preset for PPO")
    parser.add_argument("--noises", type=int, default=64, help="at least 2 (default: %(default)s)")
    parser.add_argument(
        "--continuations", type=int, default=64, help="of each, at least 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting"
    )
    args = parser.parse_args(arguments)
    for name, value, least in (
        ("noises", args.noises, 2),
        ("continuations", args.continuations, 8),
    ):
        if value < least:
            parser.error(f"--{name} is {value}, expected at least {least}")
    env_id = full_id(args.env)
    settings = override(load_preset(env_id, "ppo"), parse_assignments(args.set), env_id, "ppo")
    weight = settings["env"].get("control_cost_weight", 1.0)
    if weight <= 0:
        parser.error(
            f"control_cost_weight is {weight}, expected a number above 0: without a price there is "
            "no bound"
        )
    env = make_vector_env(env_id, settings, args.continuations, AutoresetMode.DISABLED)
    seeds = held_out_seeds(args.noises * args.continuations)[:: args.continuations]
    found = continued_returns(env, tqdm(seeds, unit="noise", file=sys.stderr))
    print(f"base model        {_cell(mean_and_interval(found.mean(axis=1)))}")
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
