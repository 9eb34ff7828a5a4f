r"""The reward-divergence frontier: what a method earns, against how far it leaves the base model.

The divergence is that of the steered process from the free one, in nats. Methods that steer pay it step by step (the
control cost), and by the chain rule the expected sum is the divergence of the two laws of whole paths; the samples' own
divergence is at most that.

**Best of n** draws :math:`n` samples and keeps the best. Its law has the density :math:`n F(r)^{n-1}` with respect to
the base model's, :math:`F` being the distribution function of the reward, so that

.. math:: \operatorname{KL} = \log n - \frac{n - 1}{n},

for paths and for samples alike, if the reward is continuous; where rewards are tied this is an upper bound (Beirami et
al., 2024). Between :math:`n` and :math:`n + 1` a coin decides which of the two is drawn, so that the reward goes
linearly from one to the other with the coin's probability, and the divergence is again an integral over
:math:`u \in [0, 1]`. With the rewards :math:`r_{(1)} \le \dots \le r_{(N)}` of one pool of base samples the expected
reward has the unbiased estimator

.. math:: \sum_{i=n}^{N} \binom{i-1}{n-1} \Big/ \binom{N}{n} \; r_{(i)},

the mean of the maximum over all subsets of size :math:`n`. With several prompts the best is taken among samples of the
same prompt.

**Guidance** steers by the reward's gradient. The base model tilted by :math:`\exp(\lambda r)` is what a control of
:math:`u = \tau \nabla \log V` samples, with :math:`V_s(x) = E[\exp(\lambda r(x_1)) \mid x_s = x]`. Taking
:math:`\log V_s \approx \lambda\, r(E[x_1 \mid x_s])` at the mean :math:`\mu` of the next state, the mean is shifted by

.. math:: \tau^2\, \lambda\, \nabla_{x}\, r(E[x_1 \mid x_s = x]) \big|_{x = \mu},

which is exact for Gaussian samples and a linear reward. The gradient goes through decoder and network (``"network"``),
or stops at the expected sample (``"endpoint"``), whose dependence on the state is then taken as that of samples with
unit variance, :math:`\alpha_s / (\alpha_s^2 + \beta_s^2)`.

**Agents** are trained at several reward scales and act deterministically. The scale of an agent is the weight of the
reward against the control costs, ``reward_scale / control_cost_weight``: what a reward of 1 is worth in nats. At the
optimum it is guidance's :math:`\lambda`.

References:
    Beirami et al., Theoretical guarantees on the best-of-n alignment policy, 2024 (arXiv:2401.01879).
    Domingo-Enrich et al., Adjoint Matching, ICLR 2025, for the control of a tilted model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from flowgym_gym.agents import contents
from flowgym_gym.agents.bars import Bar
from flowgym_gym.agents.contents import drawn_prompts
from flowgym_gym.agents.drawing import Figure, plain_style, plain_text, ticker
from flowgym_gym.agents.evaluation import CONFIDENCE, FORMULA, check_seed, evaluate, held_out_seeds, interval, play
from flowgym_gym.agents.runs import CONFIG, check_writable, locked, read_config, versions, write_json
from flowgym_gym.agents.settings import (
    Settings,
    check_algorithm,
    full_id,
    load_preset,
    make_vector_env,
    override,
)
from flowgym_gym.agents.training import Run, differences, prepare, run, save_curve, settings_of_run
from flowgym_gym.checks import check_choice, check_number, check_whole
from flowgym_gym.console import say
from flowgym_gym.envs.environment import Environment, seeded
from flowgym_gym.envs.rollout import DEFAULTS
from flowgym_gym.errors import CheckpointError, OptionError, RewardError, UnknownOptionError, reason, shown
from flowgym_gym.rewards import Reward
from flowgym_gym.types import FlowTensor

REPORT, PICTURE = "frontier.json", "frontier.png"
BEST_OF = (2, 4, 8, 16, 32, 64)
POOL = 1024
EPISODES = 256
BATCH = 32
# Reward scales and strengths in units of the environment's own reward scale.
REWARD_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
GRADIENTS = ("endpoint", "network")
BOOTSTRAP_SAMPLES = 1000
# Times n that a pool must have of a prompt. Below, intervals of best of n become too narrow: for normal rewards they
# hold the truth in 89 % of the cases with 4 n samples, in 71 % with n.
SAMPLES_OF_POOL = 8
# Steps of the coin's probability between best of n and best of n + 1.
COIN_STEPS = 16
# What belongs to an agent rather than to the process that it steers.
OF_THE_AGENT = ("action_type", "action_scale", "reward_scale", "control_cost_weight")
COST_WEIGHT = "env.control_cost_weight"

# Name in the report: name shown, what its labels are, colour, marker, and where labels stand (in points).
METHODS: dict[str, tuple[str, str, str, str, tuple[int, int]]] = {
    "base": ("base model", "", "black", "s", (6, -10)),
    "best_of_n": ("best of n", "n", "tab:gray", "o", (-4, 7)),
    "endpoint": ("guidance, gradient to the expected sample", "strength", "tab:olive", "v", (5, -9)),
    "network": ("guidance, gradient through the network", "strength", "tab:green", "^", (5, -9)),
    "ppo": ("PPO", "scale", "tab:red", "D", (-5, 6)),
    "sac": ("SAC", "scale", "tab:blue", "P", (6, -10)),
}
OTHER_METHOD = ("scale", "tab:purple", "X", (5, 5))

Report = dict[str, Any]
Point = dict[str, Any]


@dataclass(frozen=True)
class Frontier:
    """What :func:`frontier` measured.

    Attributes:
        out: Its folder.
        report: What ``frontier.json`` holds.
        signal: The signal that interrupted a training; None if everything is there.
    """

    out: Path
    report: Report
    signal: int | None = None


@dataclass(frozen=True)
class Agent:
    """An agent to train: its algorithm, its reward scale, and what decides its point in the report."""

    algo: str
    scale: float
    asked: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name in the report, and its run's folder."""
        return f"{self.algo}-{self.scale:g}"


@dataclass(frozen=True)
class Plan:
    """A frontier that has been checked and can be measured; see :func:`frontier` for what is not named here.

    Attributes:
        process: Settings of the process that all methods share.
        agents: Those to train.
        notes: What the user should know, one line each.
    """

    env_id: str
    out: Path
    process: Settings
    agents: list[Agent]
    strengths: list[float]
    gradients: list[str]
    best_of: list[int]
    pool: int
    episodes: int
    seed: int
    timesteps: int | None
    batch_size: int
    notes: list[str]


def frontier(
    env_id: str,
    *,
    out: str | Path,
    algos: Sequence[str] = ("ppo", "sac"),
    reward_scales: Sequence[float] | None = None,
    strengths: Sequence[float] | None = None,
    gradients: Sequence[str] = ("endpoint",),
    best_of: Sequence[int] = BEST_OF,
    pool: int = POOL,
    episodes: int = EPISODES,
    seed: int = 0,
    timesteps: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
) -> Frontier:
    """Measure the frontier of an environment, or go on with it: what is in ``out`` already is not done again.

    Args:
        env_id: The environment, with or without ``flowgym/``.
        out: Folder for ``frontier.json``, ``frontier.png`` and the agents' ``runs``; points of earlier calls stay.
        algos: Algorithms of the agents. The preset for the first decides the process, its steps say, for all.
        reward_scales: ``reward_scale / control_cost_weight`` of the agents; 0.1 to 10 times the environment's own
            reward scale if None.
        strengths: Strengths of the guidance; 0.03 to 3 times the environment's own reward scale if None.
        gradients: How the guidance's gradient goes: ``"endpoint"``, ``"network"``, or both.
        best_of: Numbers of samples that the best is taken of.
        pool: Number of base samples that best of n is estimated from.
        episodes: Of each guidance and each agent, at least 2.
        seed: Of the trainings; held-out episode ``i`` starts from ``2**30 + seed + i``.
        timesteps: Of each training; the preset's if None.
        overrides: Changes to the presets by dotted name, ``{"env.prompts": "a photo of a frog"}``.
        batch_size: Episodes at a time, which bounds the memory that gradients take.

    Returns:
        The measured points. A SIGINT or SIGTERM during a training saves it and returns.

    Raises:
        FlowGymError: If an argument cannot be used, before any long work.
        CheckpointError: If what is in ``out`` is damaged.
    """
    plan = _plan(
        env_id, out, algos, reward_scales, strengths, gradients, best_of, pool, episodes, seed, timesteps,
        dict(overrides or {}), batch_size,
    )  # fmt: skip
    # What cannot be done is refused before there is a folder.
    report, runs = _begin_runs(plan)
    for _, prepared in runs:
        make_vector_env(env_id, prepared.config["settings"], 1).close()
    env = _make_env(plan)
    prompts = drawn_prompts(env)
    known = contents.contents_of(plan.env_id, plan.process["env"], prompts)
    _check_contents(plan, report, known)
    for note in pool_notes(plan.best_of, plan.pool, len(set(prompts or ()))):
        say(note)
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        # Another process may have gone on in the meantime.
        report, runs = _begin_runs(plan)
        report["contents"] = known
        _measure_base_model(plan, report, env)
        _measure_guidance(plan, report, _environment(env))
        for agent, prepared in runs:
            say(f"training {agent.algo.upper()} at reward scale {agent.scale:g} in {prepared.out}")
            result = run(prepared)
            if result.signal is not None:
                return Frontier(plan.out, report, result.signal)
            played = evaluate(prepared.out, episodes, seed)
            _save_curve(prepared.out)
            _add(plan, report, agent.name, {**agent.asked, "timesteps": played["timesteps"]}, played["agent"])
    return Frontier(plan.out, report)


def pool_notes(best_of: Sequence[int], pool: int, prompts: int) -> list[str]:
    """What a pool will not do, and which one does; said before it is sampled.

    Args:
        best_of: Numbers of samples that the best is taken of.
        pool: Number of base samples.
        prompts: Number of prompts, each as likely as the others; 0 where there are none.
    """
    prompts = max(1, prompts)
    each = pool / prompts
    missing = [n for n in best_of if n * SAMPLES_OF_POOL > each]
    if not missing:
        return []
    of_prompts = f", about {each:.3g} of each of {prompts} prompts" if prompts > 1 else ""
    pools = ", ".join(f"{needed_pool(n, prompts)} for n = {n}" for n in missing)
    return [
        f"best of {', '.join(map(str, missing))} will be left out: it takes {SAMPLES_OF_POOL} n samples of each "
        f"prompt, and the pool has {pool}{of_prompts}; a pool that does: {pools}"
    ]


def needed_pool(n: int, prompts: int) -> int:
    """Samples of a pool of which each prompt has enough for best of n, all but surely.

    Prompts are drawn, so that of ``m`` samples on average a prompt may have some ``sqrt(m)`` less; four times that is
    allowed for where there are several.
    """
    least = n * SAMPLES_OF_POOL
    if prompts <= 1:
        return least
    return math.ceil(prompts * (2 + math.sqrt(4 + least)) ** 2)


def kl_best_of_n(n: int, coin: float = 0.0) -> float:
    """Divergence of best of n from the base model, in nats; an upper bound where rewards are tied.

    Args:
        n: Number of samples.
        coin: Probability that it is best of n + 1 instead.

    References:
        Beirami et al., Theoretical guarantees on the best-of-n alignment policy, 2024, theorem 1.

    >>> [round(kl_best_of_n(n), 3) for n in (1, 2, 64)]
    [0.0, 0.193, 3.175]
    >>> round(kl_best_of_n(1, coin=0.5), 3)
    0.043
    """
    # The density with respect to the law of best of n is w; the expectation of log(w) is that of a polynomial of degree
    # n - 1 times something smooth.
    nodes, quadrature = np.polynomial.legendre.leggauss(n // 2 + 32)
    u = (nodes + 1) / 2
    w = 1 - coin + coin * (n + 1) / n * u
    extra = quadrature / 2 @ (n * u ** (n - 1) * w * np.log(w))
    return float(math.log(n) - (n - 1) / n * (1 - coin / (n + 1)) + extra)


def maximum_weights(size: int, n: int) -> np.ndarray:
    """Weights of sorted rewards, ascending, in the mean of the maximum over all subsets of ``n`` of ``size``.

    >>> maximum_weights(3, 2).round(4)
    array([0.    , 0.3333, 0.6667])
    """
    # Of two neighbours the lower one's weight is (i - n) / (i - 1) of the other's, i being the other's rank.
    rank = np.arange(size, 1, -1)
    descending = n / size * np.cumprod(np.concatenate([[1.0], (rank - n) / (rank - 1)]))
    return descending[::-1]


def best_of_n(rewards: np.ndarray, largest: int, prompts: Sequence[str] = (), seed: int = 0) -> dict[str, np.ndarray]:
    """Expected reward of the best of 1, 2, ... ``largest`` base samples, from one pool, without bias.

    Args:
        rewards: Of the pool, shape ``(N,)``.
        largest: The largest ``n``; no prompt may have fewer samples in the pool.
        prompts: The prompt of each sample, where there are several.
        seed: Of the bootstrap that the intervals come from: normal, with the standard deviation of the estimates from
            1000 resampled pools, and of the prompts' shares.

    Returns:
        ``mean``, ``low`` and ``high``, each of shape ``(largest,)``.
    """
    labels = np.asarray(prompts if len(prompts) else [""] * len(rewards))
    pools = [rewards[labels == label] for label in dict.fromkeys(labels.tolist())]
    weights = [np.stack([maximum_weights(len(p), n) for n in range(1, largest + 1)]) for p in pools]
    shares = np.array([len(p) for p in pools]) / len(rewards)

    def by_prompt(samples: list[np.ndarray]) -> np.ndarray:
        return np.stack([w @ np.sort(sample) for w, sample in zip(weights, samples, strict=True)])

    rng = np.random.default_rng(seed)
    resampled = [shares @ by_prompt([rng.choice(p, len(p)) for p in pools]) for _ in range(BOOTSTRAP_SAMPLES)]
    own = by_prompt(pools)
    mean = shares @ own
    # Prompts are drawn like samples: to the variance within them comes that of how often each was drawn.
    between = shares @ (own - mean) ** 2 / len(rewards)
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * np.sqrt(np.var(resampled, axis=0, ddof=1) + between)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def best_of_n_curve(best: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Best of n at every divergence up to that of the largest n.

    Args:
        best: ``mean``, ``low`` and ``high`` for n = 1, 2, ..., from :func:`best_of_n`.

    Returns:
        ``kl``, ascending, and the ``mean``, ``low`` and ``high`` that belong to it: best of n, or best of n + 1 where a
        coin says so. The intervals between two are at least as wide as they must be.
    """
    largest = len(best["mean"])
    steps = [(n, p) for n in range(1, largest) for p in np.arange(COIN_STEPS) / COIN_STEPS]
    at = np.array([n + p for n, p in steps] + [largest])
    curve = {"kl": np.array([kl_best_of_n(n, p) for n, p in steps] + [kl_best_of_n(largest)])}
    return curve | {end: np.interp(at, np.arange(1, largest + 1), best[end]) for end in ("mean", "low", "high")}


class RewardGuidance:
    """A policy for :meth:`flowgym_gym.envs.Environment.sample` that follows the gradient of the reward.

    Args:
        environment: The torch environment, with a differentiable reward; any action type.
        strength: The ``lambda`` of the tilted model; a reward of 1 is worth so many nats.
        gradient: ``"network"`` or ``"endpoint"``; see the module.

    Raises:
        OptionError: If the reward is not differentiable, or another argument cannot be used.

    >>> import flowgym_gym
    >>> env = flowgym_gym.make("images/stable_diffusion", "images/redness", discretization_steps=4)
    >>> sample = env.sample(2, RewardGuidance(env, strength=30.0))
    >>> sample.rewards.shape, bool((sample.control_costs.sum(dim=0) > 0).all())
    (torch.Size([2]), True)
    """

    def __init__(self, environment: Environment[Any], strength: float, gradient: str = "endpoint") -> None:
        check_number("strength", strength)
        check_choice("gradient", gradient, GRADIENTS)
        if not environment.reward.differentiable:
            raise OptionError(f"{no_gradient(environment.reward)}: guidance follows its gradient")
        self.environment = environment
        self.strength = float(strength)
        self.through_network = gradient == "network"

    def __call__(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Actions for states ``(n, *)`` that are all at the same time."""
        env = self.environment
        index = torch.full((len(x),), int((env.times[:-1] == t[0]).nonzero()), device=x.device)
        here = env.transitions.at(index, x.data.ndim)
        shift = self.strength * here.std**2 * self.gradient(x, index, **kwargs)
        unit = here.gain * env.action_scale
        return torch.where(unit != 0, shift / unit, torch.zeros_like(shift))

    def gradient(self, x: FlowTensor, index: Tensor, **kwargs: Any) -> Tensor:
        """Gradient of the reward that the model expects, with respect to the next state at its free mean.

        Args:
            x: States, shape ``(n, *)``.
            index: Which visited time they are at, the same for all, int64, shape ``(n,)``.
            **kwargs: What :meth:`flowgym_gym.envs.Environment.start` returned.

        Returns:
            Shape ``(n, *)``.

        Raises:
            RewardError: If the reward carries no gradient.
        """
        env, i = self.environment, int(index[0])
        with torch.no_grad():
            output = env.predict(x, index, **kwargs)
            here = env.transitions.at(index, x.data.ndim)
            mean = here.mean_x * x.data + here.mean_output * output
            expected = env.expected_endpoint(x.data, output, index)
        last = i + 1 == env.discretization_steps
        factor = 1.0
        with torch.enable_grad():
            if last:
                point = sample = mean.requires_grad_()
            elif self.through_network:
                point = mean.requires_grad_()
                sample = env.expected_endpoint(point, env.predict(type(x)(point), index + 1, **kwargs), index + 1)
            else:
                point = sample = expected.requires_grad_()
                alpha, beta = float(env.grid.alpha[i + 1]), float(env.grid.beta[i + 1])
                factor = alpha / (alpha**2 + beta**2)
            _, rewards, _ = env.score(type(x)(sample), **kwargs)
            if not rewards.requires_grad:
                raise RewardError(f"{type(env.reward).__name__} says it is differentiable, but carries no gradient")
            (gradient,) = torch.autograd.grad(rewards.sum(), point)
        return factor * gradient


def no_gradient(reward: Reward[Any]) -> str:
    """What keeps a reward from guiding, and what to do where it could."""
    name = type(reward).__name__
    return (
        f"{name} is not differentiable; where its gradients do reach the samples, set differentiable = True in the "
        "class, else take another reward"
    )


def against_best_of_n(point: Point, best: Mapping[str, Any]) -> str:
    """How a point compares with best of n at the same divergence.

    Args:
        point: With ``reward`` and ``kl``.
        best: The report's ``best_of_n``: ``mean``, ``low`` and ``high`` for n = 1, 2, ...

    Returns:
        ``"above"`` or ``"below"`` where the intervals of the rewards do not overlap for any divergence in the interval
        of the point's, else ``"level"``; where that interval goes beyond the divergence of the largest n, ``"below"``
        if best of n earns more already, else ``"beyond n = ..."``.
    """
    curve = best_of_n_curve(best)
    kl, reward = point["kl"], point["reward"]
    # Best of n at the end of the divergence's interval that is in the point's favour, and at the one that is not.
    low, high = (float(np.interp(kl.get(end, kl["mean"]), curve["kl"], curve[end])) for end in ("low", "high"))
    if reward["high"] < low:
        return "below"
    if kl.get("high", kl["mean"]) > curve["kl"][-1]:
        return f"beyond n = {len(best['mean'])}"
    return "above" if reward["low"] > high else "level"


def table(report: Report) -> str:
    """The frontier as a Markdown table."""
    lines = [
        "| method | setting | KL [nats] | reward | against best of n at that KL |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for point in _sorted(report):
        title, kind, *_ = _style(point["method"])
        setting = f"{kind} = {point['setting']:g}" if kind else ""
        if "timesteps" in point:
            setting += f", {point['timesteps']:,} steps"
        verdict = point.get("against_best_of_n", "")
        cells = [title, setting, _cell(point["kl"]), _cell(point["reward"]), verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(f"\n{note}" for note in report["notes"])])


@plain_style()
def draw(report: Report) -> Figure:
    """Reward against divergence; what lies below best of n is hollow."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    curve = best_of_n_curve(report["best_of_n"])
    axis.plot(curve["kl"], curve["mean"], color=_style("best_of_n")[2], linewidth=1)
    axis.fill_between(curve["kl"], curve["low"], curve["high"], color=_style("best_of_n")[2], alpha=0.2, linewidth=0)
    points = _sorted(report)
    for method in dict.fromkeys(point["method"] for point in points):
        title, kind, color, marker, offset = _style(method)
        axis.plot([], [], color=color, marker=marker, linestyle="", label=f"{title} ({kind} = ...)" if kind else title)
        own = [point for point in points if point["method"] == method]
        if method not in ("base", "best_of_n"):
            axis.plot([p["kl"]["mean"] for p in own], [p["reward"]["mean"] for p in own], color=color, linewidth=0.7)
        for i, point in enumerate(own):
            kl, reward = point["kl"], point["reward"]
            # Where the last two are close, their labels stand on either side.
            close = i == len(own) - 1 > 0 and kl["mean"] < 1.5 * own[i - 1]["kl"]["mean"]
            right = (offset[0] > 0) != close
            below = point.get("against_best_of_n") == "below"
            axis.errorbar(
                kl["mean"], reward["mean"], xerr=_bars(kl), yerr=_bars(reward), color=color, marker=marker,
                markerfacecolor="white" if below else color, markersize=7, linestyle="", capsize=2,
                zorder=3,
            )  # fmt: skip
            axis.annotate(
                f"{point['setting']:g}" if kind else "", (kl["mean"], reward["mean"]), textcoords="offset points",
                xytext=(abs(offset[0]) * (1 if right else -1), offset[1]), fontsize=8, color=color,
                ha="left" if right else "right",
            )  # fmt: skip
    axis.plot([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="hollow: below best of n")
    furthest = max(point["kl"].get("high", point["kl"]["mean"]) for point in points)
    axis.set_xscale("symlog", linthresh=1, linscale=1)
    axis.set_xlim(-0.05, 2 * max(furthest, 1.0))
    ticks = [0, 0.2, 0.5, *(d * 10.0**e for e in range(8) for d in (1, 2, 5))]
    axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.FixedLocator([]))
    axis.set_xlabel("divergence from the base model [nats], linear up to 1, then logarithmic")
    axis.set_ylabel("terminal reward, mean with 95 % interval")
    axis.set_title(report["env_id"] + _described(report["settings"]["env"]), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    return figure


def _plan(
    env_id: str,
    out: str | Path,
    algos: Sequence[str],
    reward_scales: Sequence[float] | None,
    strengths: Sequence[float] | None,
    gradients: Sequence[str],
    best_of: Sequence[int],
    pool: int,
    episodes: int,
    seed: int,
    timesteps: int | None,
    overrides: dict[str, Any],
    batch_size: int,
) -> Plan:
    """Check everything that can be checked without a sample."""
    env_id, out, overrides = full_id(env_id), Path(out), _resolved(overrides)
    for algo in algos:
        check_algorithm(algo)
    for gradient in gradients:
        check_choice("gradients", gradient, GRADIENTS)
    check_whole("episodes", episodes, minimum=2)
    check_whole("pool", pool, minimum=2)
    check_whole("batch_size", batch_size)
    check_seed(seed, max(pool, episodes))
    for n in best_of:
        check_whole("best_of", n, minimum=2)
        if n > pool:
            raise OptionError(f"best_of has {n}, but the pool only {pool} samples; take a pool of many times {n}")
    for name, values in (("reward_scales", reward_scales), ("strengths", strengths)):
        for value in values or ():
            check_number(name, value, minimum=0)
    if 0 in (reward_scales or ()):
        raise OptionError("reward_scales has 0, expected numbers above 0; an agent without reward is the base model")
    for name in (COST_WEIGHT, COST_WEIGHT.partition(".")[2]):
        if name in overrides:
            raise OptionError(f"{name} cannot be set: it follows from the reward scales")
    check_writable(out)

    algos = list(dict.fromkeys(algos))
    presets = {algo: _preset(env_id, algo, overrides) for algo in algos or ["ppo"]}
    first = next(iter(presets))
    process, unit = _process(presets[first]), _reward_scale(env_id, presets[first])
    agents, notes = [], []
    for algo in algos:
        shared = _shared(process, _process(presets[algo]), first, algo)
        if shared:
            told = ", ".join(f"{name}={value}" for name, value in shared.items())
            notes.append(f"{algo} steers the process of the preset for {first}: {told}")
        for scale in _scales(reward_scales, REWARD_SCALES, unit):
            changes = {**overrides, **shared, COST_WEIGHT: _reward_scale(env_id, presets[algo]) / scale}
            asked = {"episodes": episodes, "seed": seed, "asked_timesteps": timesteps, "overrides": _as_json(changes)}
            agents.append(Agent(algo, scale, {"method": algo, "setting": scale, **asked}))
    return Plan(
        env_id=env_id,
        out=out,
        process=process,
        agents=agents,
        strengths=_scales(strengths, STRENGTHS, unit),
        gradients=list(dict.fromkeys(gradients)),
        best_of=sorted(set(best_of)),
        pool=pool,
        episodes=episodes,
        seed=seed,
        timesteps=timesteps,
        batch_size=batch_size,
        notes=notes,
    )


def _preset(env_id: str, algo: str, overrides: Mapping[str, Any]) -> Settings:
    try:
        settings = override(load_preset(env_id, algo), overrides, env_id, algo)
        return {**settings, "env": contents.resolved(settings["env"])}
    except UnknownOptionError as error:
        raise UnknownOptionError(f"{error} for {algo.upper()}; a change applies to all agents") from error


def _shared(process: Settings, own: Settings, first: str, algo: str) -> dict[str, Any]:
    """What to change about a preset with the process ``own`` to make it steer ``process``.

    Raises:
        OptionError: If the other preset says nothing of something that this one sets.
    """
    changes = {
        f"{section}.{name}": process[section].get(name)
        for section in process
        for name in {**process[section], **own[section]}
        if process[section].get(name) != own[section].get(name)
    }
    for name, value in changes.items():
        if value is None and name.startswith("env."):
            raise OptionError(
                f"the preset for {algo} sets {name}, that for {first} does not, and both must steer one process; give "
                f"{name} yourself"
            )
    return changes


def _scales(given: Sequence[float] | None, multiples: Sequence[float], unit: float) -> list[float]:
    return [multiple * unit for multiple in multiples] if given is None else [float(s) for s in dict.fromkeys(given)]


def _prepare_run(plan: Plan, agent: Agent) -> Run:
    out, asked = plan.out / "runs" / agent.name, agent.asked["overrides"]
    if not (out / CONFIG).is_file():
        return prepare(plan.env_id, agent.algo, out=out, timesteps=plan.timesteps, seed=plan.seed, overrides=asked)
    # Resuming alone would go on with whatever the run has and this call does not name.
    own, (settings, _) = read_config(out), settings_of_run(plan.env_id, agent.algo, plan.timesteps, None, asked)
    found = differences(_as_json(settings), own["settings"])
    found += [
        f"{name} is {shown(value)}, but the run has {shown(has)}"
        for name, value, has in (
            ("timesteps", settings["timesteps"], own["settings"]["timesteps"]),
            ("seed", plan.seed, own["seed"]),
        )
        if value != has
    ]
    if found:
        raise OptionError(f"{out} holds another run, move it away to train this agent anew: {'; '.join(found)}")
    return prepare(plan.env_id, agent.algo, out=out, resume=True)


def _process(settings: Settings) -> Settings:
    """The part of an agent's settings that decides what it steers: environment and time grid, as JSON keeps them."""
    env = {name: value for name, value in settings["env"].items() if name not in OF_THE_AGENT}
    grid = {name: v for name, v in settings["wrappers"].items() if name == "time_grid" and v is not None}
    return _as_json({"env": env, "wrappers": grid})


def _as_json(settings: Settings) -> Settings:
    """Settings as JSON gives them back."""
    try:
        plain: Settings = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise OptionError(f"a setting is no plain value: {reason(error)}") from error
    return plain


def _reward_scale(env_id: str, settings: Settings) -> float:
    """Weight of the terminal reward that an agent is trained with."""
    own = gymnasium.spec(env_id).kwargs.get("reward_scale", DEFAULTS["reward_scale"])
    scale = settings["wrappers"].get("reward_scale")
    scale = settings["env"].get("reward_scale", own) if scale is None else scale
    check_number("reward_scale", scale)
    if scale <= 0:
        raise OptionError(f"reward_scale is {scale}, expected a number above 0")
    return float(scale)


def _begin(plan: Plan) -> Report:
    """The report of earlier calls, or an empty one.

    Raises:
        OptionError: If the folder holds the frontier of another process.
        CheckpointError: If it is damaged.
    """
    path = plan.out / REPORT
    report: Report = {"env_id": plan.env_id, "settings": plan.process, "points": {}}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings = {**found["settings"], "env": contents.resolved(found["settings"]["env"])}
            same = (found["env_id"], settings) == (report["env_id"], report["settings"])
            report["pool"] = _checked_pool(found["pool"])
            report["points"] = {
                name: _checked_point(point) for name, point in found["points"].items() if point["method"] != "best_of_n"
            }
            if "contents" in found:
                report["contents"] = dict(found["contents"])
        except Exception as error:  # Anything may stand in a file that is damaged.
            raise CheckpointError(
                f"{path} is damaged: {type(error).__name__}: {reason(error)}; move it away"
            ) from error
        if not same:
            raise OptionError(f"{path} is the frontier of another environment or other settings; choose another folder")
    return {
        **report,
        "confidence": CONFIDENCE,
        "interval": FORMULA,
        "interval_of_best_of_n": f"mean +- 1.96 standard deviations, from {BOOTSTRAP_SAMPLES} bootstrap samples",
        "versions": versions(),
        "notes": list(plan.notes),
    }


def _checked_pool(pool: Mapping[str, Any]) -> dict[str, Any]:
    """The pool of a report, or an error unless it is one."""
    rewards, prompts = np.array(pool["rewards"], dtype=float), pool["prompts"]
    good = rewards.ndim == 1 and len(rewards) == pool["episodes"] and np.isfinite(rewards).all()
    if not good or len(prompts) not in (0, len(rewards)) or not all(isinstance(p, str) for p in prompts):
        raise ValueError("the pool is not one of a reward, and a prompt where there are several, for each episode")
    return dict(pool)


def _checked_point(point: Mapping[str, Any]) -> Point:
    """A point of a report, with absolute paths, or an error unless it can be drawn."""
    check_number("setting", point["setting"])
    for name in ("reward", "kl"):
        for end in ("mean", *({"low", "high"} & point[name].keys())):
            check_number(f"{name}.{end}", point[name][end])
    if not isinstance(point["method"], str) or not isinstance(point.get("timesteps", 0), int):
        raise ValueError("a point's method is no text, or its timesteps are no number")
    changes = {"overrides": _resolved(point["overrides"])} if "overrides" in point else {}
    return {**point, **changes}


def _resolved(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by dotted name, with absolute paths."""
    names = {key: key.rpartition(".")[2] for key in overrides}
    return {key: contents.resolved({names[key]: value})[names[key]] for key, value in overrides.items()}


def _begin_runs(plan: Plan) -> tuple[Report, list[tuple[Agent, Run]]]:
    """The report of earlier calls, and the trainings whose points it does not have."""
    report = _begin(plan)
    waiting = [agent for agent in plan.agents if not _is_done(report, agent.name, agent.asked)]
    return report, [(agent, _prepare_run(plan, agent)) for agent in waiting]


def _check_contents(plan: Plan, report: Report, known: contents.Contents) -> None:
    """Raise an OptionError if a frontier was begun with other prompts or weights under the same names."""
    was = report.get("contents", known)
    if was != known:
        raise OptionError(
            f"{plan.out / REPORT} was measured with other contents of {contents.different(was, known)}; put back what "
            "was there, or choose another folder"
        )


def _save_curve(out: Path) -> None:
    """Draw an agent's curve; that it cannot be drawn is no reason to lose the agent's point."""
    try:
        save_curve(out)
    except CheckpointError as error:
        say(str(error))


def _is_done(report: Report, name: str, asked: Mapping[str, Any]) -> bool:
    point = report["points"].get(name, {})
    return all(point.get(key) == value for key, value in asked.items()) and bool(point)


def _measure_base_model(plan: Plan, report: Report, env: VectorEnv[Any, Any, Any]) -> None:
    """The pool of base samples, and what follows from it: the base model's own mean and best of n."""
    asked = {"episodes": plan.pool, "seed": plan.seed}
    if {key: report.get("pool", {}).get(key) for key in asked} != asked:
        seeds = held_out_seeds(plan.pool, plan.seed)
        played = [play(env, batch) for batch in _batches("base model", seeds, env.num_envs)]
        rewards = np.concatenate([episodes.terminal_rewards for episodes in played])
        prompts = [prompt for episodes in played for prompt in episodes.prompts]
        several = len(set(prompts)) > 1
        report["pool"] = {
            **asked, "seeds": [seeds[0], seeds[-1]], "rewards": rewards.tolist(), "prompts": prompts if several else [],
        }  # fmt: skip
    rewards, prompts = np.array(report["pool"]["rewards"]), report["pool"]["prompts"]
    fewest = min(np.unique(prompts, return_counts=True)[1]) if prompts else len(rewards)
    possible = [n for n in plan.best_of if n * SAMPLES_OF_POOL <= fewest]
    if len(possible) < len(plan.best_of):
        left_out = ", ".join(str(n) for n in plan.best_of if n not in possible)
        of_which = f"{fewest} samples of one of the prompts" if prompts else f"{fewest} samples"
        report["notes"].append(
            f"best of {left_out} is left out: the pool has {of_which}, and an estimate with an interval takes "
            f"{SAMPLES_OF_POOL} n; take a larger pool"
        )
    best = best_of_n(rewards, max(possible, default=1), prompts, plan.seed)
    report["best_of_n"] = {end: values.tolist() for end, values in best.items()}
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    report["points"]["base"] = {"method": "base", "setting": 0, **asked, "reward": interval(rewards), "kl": nothing}
    for n in possible:
        report["points"][f"best-of-{n}"] = {
            "method": "best_of_n", "setting": n, **asked,
            "reward": {end: float(values[n - 1]) for end, values in best.items()},
            "kl": {"mean": kl_best_of_n(n)},
        }  # fmt: skip
    _save(plan, report)
    base = report["points"]["base"]["reward"]
    say(f"base model: reward {_cell(base)}" + "".join(f", best of {n}: {best['mean'][n - 1]:.4g}" for n in possible))


def _measure_guidance(plan: Plan, report: Report, environment: Environment[Any]) -> None:
    """Guidance at every strength, in batches that are seeded as the first of their episodes."""
    if not environment.reward.differentiable and plan.strengths and plan.gradients:
        report["notes"].append(f"no guidance: {no_gradient(environment.reward)}")
        say(report["notes"][-1])
        return
    for gradient in plan.gradients:
        for strength in plan.strengths:
            name = f"{gradient}-{strength:g}"
            asked = {
                "method": gradient, "setting": strength, "episodes": plan.episodes, "seed": plan.seed,
                "batch_size": plan.batch_size,
            }  # fmt: skip
            if _is_done(report, name, asked):
                continue
            policy = RewardGuidance(environment, strength, gradient)
            rewards, costs = [], []
            for seeds in _batches(f"guidance {strength:g}", held_out_seeds(plan.episodes, plan.seed), plan.batch_size):
                with seeded(seeds[0]):
                    sample = environment.sample(len(seeds), policy)
                rewards.append(sample.rewards.double().cpu().numpy())
                costs.append(sample.control_costs.double().sum(dim=0).cpu().numpy())
            measured = {
                "terminal_reward": interval(np.concatenate(rewards)),
                "control_cost": interval(np.concatenate(costs)),
            }
            _add(plan, report, name, asked, measured)


def _add(plan: Plan, report: Report, name: str, asked: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put a point into the report and onto the disk."""
    point = {**asked, "reward": measured["terminal_reward"], "kl": measured["control_cost"]}
    report["points"][name] = point
    _save(plan, report)
    title, kind, *_ = _style(point["method"])
    measured_text = f"reward {_cell(point['reward'])} for {_cell(point['kl'])} nats"
    say(f"{title}, {kind} = {point['setting']:g}: {measured_text}, against best of n: {point['against_best_of_n']}")


def _save(plan: Plan, report: Report) -> None:
    for point in report["points"].values():
        if point["method"] not in ("base", "best_of_n"):
            point["against_best_of_n"] = against_best_of_n(point, report["best_of_n"])
    try:
        write_json(plan.out / REPORT, report)
        with plain_style():
            draw(report).savefig(plan.out / PICTURE, dpi=120)
    except OSError as error:
        raise CheckpointError(f"{plan.out} cannot be written: {error.strerror or error}") from error


def _make_env(plan: Plan) -> VectorEnv[Any, Any, Any]:
    """The process that all methods share; its actions are controls in standard deviations of the transition.

    Raises:
        OptionError: If no divergence can be measured on it, or no reward compared.
    """
    settings = {**plan.process, "env": {**plan.process["env"], "action_type": "control", "action_scale": 1.0}}
    env = make_vector_env(plan.env_id, settings, min(plan.batch_size, plan.pool), AutoresetMode.DISABLED)
    reward = _environment(env).reward
    if reward.stateful:
        raise OptionError(
            f"{type(reward).__name__} remembers what it has scored, and a frontier compares samples by one measure; "
            "take the reward inside it"
        )
    if not bool((_environment(env).transitions.std > 0).any()):
        raise OptionError(
            "this process draws no noise, so that a steered one has no finite divergence from it; take a noise_level "
            "above 0"
        )
    return env


def _environment(env: VectorEnv[Any, Any, Any]) -> Environment[Any]:
    environment: Environment[Any] = env.unwrapped.rollout.environment  # type: ignore[attr-defined]
    return environment


def _batches(label: str, seeds: list[int], size: int) -> Iterator[list[int]]:
    """Seeds in batches, with a progress bar where standard error is a terminal."""
    with closing(Bar(len(seeds), unit="episode", label=label)) as bar:
        for start in range(0, len(seeds), size):
            batch = seeds[start : start + size]
            yield batch
            bar.update(len(batch))


def _style(method: str) -> tuple[str, str, str, str, tuple[int, int]]:
    return METHODS.get(method) or (method.upper(), *OTHER_METHOD)


def _sorted(report: Report) -> list[Point]:
    order = list(METHODS)
    points: Iterable[Point] = report["points"].values()
    return sorted(
        points, key=lambda p: (order.index(p["method"]) if p["method"] in order else len(order), p["setting"])
    )


def _bars(values: Mapping[str, float]) -> list[list[float]]:
    mean = values["mean"]
    return [[mean - values.get("low", mean)], [values.get("high", mean) - mean]]


def _cell(values: Mapping[str, float]) -> str:
    half = values.get("high", values["mean"]) - values["mean"]
    return f"{values['mean']:.4g}" + (f" ± {half:.2g}" if half else "")


def _described(env: Mapping[str, Any]) -> str:
    """Settings of the environment for the title."""
    text = ", ".join(f"{name}={value}" for name, value in env.items())
    return plain_text(f"\n{text:.100}") if text else ""
