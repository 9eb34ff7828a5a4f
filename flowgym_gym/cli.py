"""The command line ``flowgym-gym``: ``list``, ``sample``, ``train``, ``evaluate``, ``export``,
``frontier``.

Exit codes: 0 for success, 2 for input that cannot be used (one line says what), 130 and 143 after
SIGINT and SIGTERM, 141 if standard output cannot be written, as after ``| head``. torch and
everything that needs it are imported by the commands that use them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium

import flowgym_gym
from flowgym_gym.console import accept_all_text, flushed, say, tell
from flowgym_gym.errors import FlowGymError, OptionError, reason, shown

UNUSABLE = 2
INTERRUPTED = 130
CLOSED_PIPE = 141
EPISODES = 256

_unwritten: list[str] = []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command and options; those of the process if None.

    Returns:
        The exit code.
    """
    accept_all_text()
    _unwritten.clear()
    code = _run(parser().parse_args(arguments))
    complete = flushed(sys.stdout) and not _unwritten
    return code if complete else code or CLOSED_PIPE


def _run(options: argparse.Namespace) -> int:
    """Run a command; what it raises becomes a line and an exit code."""
    try:
        for name, value in vars(options).items():
            if isinstance(value, Path):
                _check_path(name, value)
        code: int = options.command(options)
    except FlowGymError as error:
        say(f"error: {error}")
        return UNUSABLE
    except MemoryError as error:
        say(f"error: the memory is not enough: {reason(error)}")
        return UNUSABLE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="flowgym-gym", description="Diffusion and flow models as Gymnasium environments."
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {flowgym_gym.__version__}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "list", help="environment ids, base models, and rewards with what they need"
    )
    listing.set_defaults(command=list_ids)

    sample = commands.add_parser("sample", help="pictures of the base model with their rewards")
    sample.add_argument("env", metavar="ENV", help="environment id, such as StableDiffusion-Red-v0")
    sample.add_argument(
        "--n", type=int, default=16, help="number of samples (default: %(default)s)"
    )
    sample.add_argument(
        "--seed", type=int, default=0, help="seed of the first sample (default: %(default)s)"
    )
    sample.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG file to write")
    _add_set(sample, "an argument of the environment, such as prompts='a red heart'")
    sample.set_defaults(command=sample_base_model)

    train = commands.add_parser("train", help="train an agent with the environment's preset")
    train.add_argument("env", metavar="ENV", help="environment id, such as StableDiffusion-Red-v0")
    train.add_argument("--algo", help="ppo, sac or tqc (default: ppo, with --resume the run's own)")
    train.add_argument(
        "--timesteps",
        type=int,
        help="environment steps of all sub-environments (default: the preset's)",
    )
    train.add_argument(
        "--num-envs", type=int, help="number of sub-environments (default: the preset's)"
    )
    train.add_argument(
        "--seed",
        type=int,
        help="random seed (default: 0); its sub-environments get seeds that no other seed's have "
        "(flowgym_gym.seeds), "
        "so that runs with different seeds share no noise",
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    train.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    train.add_argument(
        "--no-evaluate", action="store_true", help="do not compare agent and base model at the end"
    )
    train.add_argument(
        "--logger",
        help="where metrics are copied to: tensorboard, wandb or trackio (default: tensorboard if "
        "it is installed, with --resume the run's own)",
    )
    _add_engine(train)
    _add_set(
        train, "a setting of the preset, such as env.noise_level=0.5 or algo.learning_rate=1e-4"
    )
    train.set_defaults(command=train_agent)

    evaluate = commands.add_parser(
        "evaluate", help="compare the agent of a run with the base model"
    )
    evaluate.add_argument("run", type=Path, metavar="DIR", help="run folder")
    evaluate.add_argument(
        "--episodes", type=int, default=EPISODES, help="episodes of each (default: %(default)s)"
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, help="first held-out seed (default: %(default)s)"
    )
    _add_which(evaluate)
    evaluate.set_defaults(command=evaluate_run)

    export = commands.add_parser(
        "export", help="write a run's policy alone, to act without stable-baselines3"
    )
    export.add_argument("run", type=Path, metavar="DIR", help="run folder")
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="POLICY_DIR",
        help="folder to write, new or empty",
    )
    _add_which(export)
    export.set_defaults(command=export_policy)

    frontier = commands.add_parser(
        "frontier", help="reward against divergence: best of n, guidance and agents"
    )
    frontier.add_argument(
        "env", metavar="ENV", help="environment id, such as StableDiffusion-Red-v0"
    )
    frontier.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder; what it holds is not repeated",
    )
    frontier.add_argument(
        "--algos", nargs="*", default=["ppo", "sac"], help="agents (default: ppo sac)"
    )
    frontier.add_argument(
        "--reward-scales",
        type=float,
        nargs="+",
        metavar="S",
        help="what a reward of 1 is worth in nats, for agents",
    )
    frontier.add_argument(
        "--strengths", type=float, nargs="*", metavar="S", help="the same for guidance"
    )
    frontier.add_argument(
        "--gradients",
        nargs="*",
        default=["endpoint"],
        help="guidance's gradient: endpoint, network (default: endpoint)",
    )
    frontier.add_argument(
        "--best-of", type=int, nargs="+", metavar="N", help="numbers of samples (default: 2 to 64)"
    )
    frontier.add_argument(
        "--pool",
        type=int,
        default=1024,
        help="base samples to estimate from (default: %(default)s)",
    )
    frontier.add_argument(
        "--episodes",
        type=int,
        default=EPISODES,
        help="of each guidance and agent (default: %(default)s)",
    )
    frontier.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    frontier.add_argument("--timesteps", type=int, help="of each training (default: the preset's)")
    frontier.add_argument(
        "--batch-size", type=int, default=32, help="episodes at a time (default: %(default)s)"
    )
    _add_set(frontier, "a setting of the presets, such as env.prompts='a red heart'")
    frontier.set_defaults(command=draw_frontier)
    return root


def list_ids(options: argparse.Namespace) -> int:
    """Print what is registered."""
    ids = sorted(id for id in gymnasium.registry if id.startswith("flowgym/"))
    registries = {
        "base models": flowgym_gym.base_model_registry,
        "rewards": flowgym_gym.reward_registry,
    }
    needs = {
        title: {name: registry.get(name).needs for name in registry.list()}
        for title, registry in registries.items()
    }
    for title, entries in {"environments": dict.fromkeys(ids, ""), **needs}.items():
        _tell(f"{title}:")
        width = max(map(len, entries)) + 2
        for name, what in entries.items():
            _tell(f"  {name:{width}}{what}".rstrip())
    return 0


def sample_base_model(options: argparse.Namespace) -> int:
    """Write a grid of base-model samples and print their mean reward."""
    if options.n < 1:
        raise OptionError(f"--n is {options.n}, expected a whole number, at least 1")
    _check_png(options.out)
    from flowgym_gym.agents import imports_of_extra

    with imports_of_extra():
        from flowgym_gym.agents.runs.episodes import BATCH, check_seed, frames_of, play
        from flowgym_gym.agents.runs.pictures import picture_grid
        from flowgym_gym.agents.runs.presets import full_id
        from flowgym_gym.agents.runs.settings import env_options, parse_assignments

    check_seed(options.seed, options.n)
    env_id = full_id(options.env)
    kwargs = env_options(env_id, parse_assignments(_texts(options.set)))
    env = gymnasium.make_vec(
        env_id,
        num_envs=min(options.n, BATCH),
        autoreset_mode="Disabled",
        render_mode="rgb_array",
        **kwargs,
    )
    env.reset(seed=options.seed)
    if not frames_of(env):
        raise OptionError(f"samples of {env_id} are no pictures and cannot be drawn")
    episodes = play(env, [options.seed + i for i in range(options.n)], pictures=options.n)
    try:
        picture_grid(options.out, [(env_id, episodes)])
    except OSError as error:
        raise OptionError(
            f"--out is {options.out}, which cannot be written: {error.strerror or error}"
        ) from error
    _tell(
        f"mean reward {episodes.terminal_rewards.mean():.4f} of {options.n} samples; pictures in "
        f"{options.out}"
    )
    return 0


def _add_engine(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--engine",
        help="sb3, stable-baselines3 in this process, or rllib, Ray's RLlib on any machine of a "
        "cluster (default: sb3, with --resume the run's own)",
    )
    train.add_argument(
        "--runners",
        type=int,
        metavar="N",
        help="of RLlib: processes that play, over which sub-environments are split (default: 0, "
        "the process that learns plays, too)",
    )
    train.add_argument(
        "--gpus-per-runner",
        type=float,
        metavar="G",
        help="of RLlib: accelerators of each runner, or a part of one (default: 0)",
    )
    train.add_argument(
        "--address",
        help="of RLlib: a running Ray cluster, such as auto (default: one started on this machine)",
    )


def _runners(options: argparse.Namespace) -> Any:
    """Where RLlib plays, if anything is said of that."""
    from flowgym_gym.agents.runs.preparation import Runners

    given = (options.runners, options.gpus_per_runner, options.address)
    if all(value is None for value in given):
        return None
    return Runners(options.runners or 0, options.gpus_per_runner or 0.0, options.address)


def _engine_options(options: argparse.Namespace) -> str:
    """What a command that goes on with a run of RLlib says of runners."""
    named = {
        "--runners": options.runners,
        "--gpus-per-runner": options.gpus_per_runner,
        "--address": options.address,
    }
    return "".join(
        f" {name} {shlex.quote(str(value))}" for name, value in named.items() if value is not None
    )


def train_agent(options: argparse.Namespace) -> int:
    """Train, evaluate, and say what to do next."""
    _import_agents()
    from flowgym_gym.agents.runs.preparation import TrainRequest, prepare
    from flowgym_gym.agents.runs.records import TENSORBOARD
    from flowgym_gym.agents.runs.settings import describe, parse_assignments
    from flowgym_gym.agents.runs.training import carry_out

    request = TrainRequest(
        options.env,
        options.algo,
        out=options.out,
        timesteps=options.timesteps,
        num_envs=options.num_envs,
        seed=options.seed,
        resume=options.resume,
        overrides=parse_assignments(_texts(options.set)),
        engine=options.engine,
        runners=_runners(options),
        logger=options.logger,
    )
    prepared = prepare(request)
    config = prepared.config
    here = shlex.quote(str(options.out))
    again = f"flowgym-gym train {options.env} --algo {config.algo} --out {here} --resume"
    if config.engine is not None:
        again += _engine_options(options)
    # Hours of work must not depend on whether somebody reads what is said of it.
    _tell(f"{config.env_id}, {config.algo}, seed {config.seed}")
    _tell(describe(config.settings))
    result = carry_out(prepared, on_failure=lambda: _tell(f"to go on: {again}"))
    if result.signal is not None:
        _tell(f"to go on: {again}")
        return 128 + result.signal
    # Of samples that are no pictures there is no comparison to see.
    drawn = " and ".join(
        name for name in ("learning_curve.png", "comparison.png") if (options.out / name).is_file()
    )
    _tell(
        f"trained for {result.timesteps} timesteps; see {drawn or 'metrics.csv'} in {options.out}"
    )
    commands = [f"flowgym-gym evaluate {here}"]
    if not options.no_evaluate:
        _evaluate(options.out, EPISODES, seed=0)
        commands[0] += " --seed 1000"
    if result.stopped is None:
        commands.append(f"{again} --timesteps {2 * result.target}")
    policy = options.out / "policy"
    if policy.exists():
        policy = options.out / f"policy-{result.timesteps}"
    commands.append(f"flowgym-gym export {here} --out {shlex.quote(str(policy))}")
    if (options.out / TENSORBOARD).is_dir():
        commands.append(f"tensorboard --logdir {here}")
    _tell("next: " + "\n      ".join(commands))
    return 0


def evaluate_run(options: argparse.Namespace) -> int:
    """Compare the agent of a run with the base model."""
    _import_agents()
    _evaluate(options.run, options.episodes, options.seed, options.which)
    return 0


def export_policy(options: argparse.Namespace) -> int:
    """Write a run's policy alone."""
    _import_agents()
    from flowgym_gym.agents import export

    folder = export(options.run, options.out, options.which)
    _tell(
        f"the policy is in {folder}; flowgym_gym.agents.load_policy({str(folder)!r}) acts with it"
    )
    return 0


def draw_frontier(options: argparse.Namespace) -> int:
    """Measure reward against divergence, as far as it has not been measured yet."""
    from flowgym_gym.agents import imports_of_extra

    if options.algos:
        _import_agents()
    with imports_of_extra():
        from flowgym_gym.agents.frontier.measure import frontier
        from flowgym_gym.agents.frontier.report import PICTURE, REPORT, table
        from flowgym_gym.agents.frontier.spec import BEST_OF
        from flowgym_gym.agents.runs.settings import parse_assignments

    result = frontier(
        options.env,
        out=options.out,
        algos=options.algos,
        reward_scales=options.reward_scales,
        strengths=options.strengths,
        gradients=options.gradients,
        best_of=BEST_OF if options.best_of is None else options.best_of,
        pool=options.pool,
        episodes=options.episodes,
        seed=options.seed,
        timesteps=options.timesteps,
        overrides=parse_assignments(_texts(options.set)),
        batch_size=options.batch_size,
    )
    if result.signal is not None:
        _tell("to go on: the same command again")
        return 128 + result.signal
    _tell(table(result.report))
    _tell(f"picture in {options.out / PICTURE}, everything in {options.out / REPORT}")
    return 0


def _evaluate(out: Path, episodes: int, seed: int, which: str = "best") -> None:
    from flowgym_gym.agents.runs.evaluation import evaluate, table
    from flowgym_gym.agents.runs.results import save_curve

    _tell(table(evaluate(out, episodes, seed, which=which)))
    save_curve(out)


def _texts(arguments: Sequence[str]) -> list[str]:
    """Arguments as the UTF-8 that was typed, also where the locale, such as ``LANG=C``, has let
    Python escape it.
    """
    texts = []
    for text in arguments:
        try:
            texts.append(text.encode("utf-8", "surrogateescape").decode("utf-8"))
        except UnicodeError:
            texts.append(text)
    return texts


def _tell(text: str) -> None:
    """Print a line; one that cannot be written is told by the exit code."""
    if not tell(text, sys.stdout):
        _unwritten.append(text)


def _add_set(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"{what}; can be repeated"
    )


def _add_which(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--which",
        choices=["best", "newest"],
        default="best",
        help="the agent: the best in the evaluations of the run, if it had any, or the newest "
        "(default: %(default)s)",
    )


def _import_agents() -> None:
    """Fail with a clear message where the libraries of the agents extra are missing."""
    import flowgym_gym.agents

    _ = flowgym_gym.agents.train


def _check_path(name: str, path: Path) -> None:
    """Raise an OptionError where a system call would fail on the path itself."""
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except (
        OSError,
        ValueError,
    ) as error:  # too long, through a file, not permitted, or with a NUL in it
        flag = "DIR" if name == "run" else f"--{name}"
        why = (isinstance(error, OSError) and error.strerror) or reason(error)
        raise OptionError(f"{flag} is {shown(str(path))}, which cannot be used: {why}") from error


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise OptionError(f"--out is {path}, expected a file name that ends in .png")
    if path.is_dir():
        raise OptionError(f"--out is {path}, which is a folder; expected a file to write")
    if not path.absolute().parent.is_dir():
        raise OptionError(
            f"--out is {path}, but there is no folder {path.absolute().parent}; make it first"
        )
