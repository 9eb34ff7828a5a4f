"""Makes the figures of ``docs/mathematics.md``: ``python docs/figures/make.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

import flowgym_gym

HERE = Path(__file__).parent
SAMPLES = 50_000
SEEDS = range(4)
LAW = (Normal(0.0, 1.0), Normal(3.0, 0.4))


def distance(x: torch.Tensor) -> float:
    """Wasserstein-1 distance of samples ``(n,)`` from the mixture: the area between the
    distribution functions.
    """
    points = torch.linspace(-6, 8, 20_001, dtype=torch.float64)
    exact = sum(0.5 * law.cdf(points) for law in LAW)
    empirical = torch.searchsorted(x.double().sort().values, points, right=True) / len(x)
    return float((exact - empirical).abs().sum() * (points[1] - points[0]))


def terminal_errors(steps: int, sampler: str, noise_level: float) -> list[float]:
    """Distance of the final samples from the mixture on Stable Diffusion's schedule, one for each
    seed.
    """
    kwargs = {
        "base_model_kwargs": {"schedule": "diffusion"},
        "sampler": sampler,
        "noise_level": noise_level,
    }
    env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", steps, **kwargs)
    errors = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        errors.append(distance(env.sample(SAMPLES).latents.data.flatten()))
    return errors


def draw_terminal_error() -> None:
    """Error against the number of steps for each sampler, mean and range over seeds."""
    counts = [5, 10, 20, 50, 100, 200, 500]
    _, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for sampler, noise_level in [
        ("ddim", 0.0),
        ("ddim", 0.5),
        ("ddim", 1.0),
        ("euler", 0.0),
        ("euler", 1.0),
    ]:
        errors = torch.tensor([terminal_errors(n, sampler, noise_level) for n in counts])
        means = errors.mean(dim=1)
        axes.loglog(counts, means, "o-", label=f"{sampler}, noise level {noise_level:g}")
        axes.fill_between(counts, errors.min(dim=1).values, errors.max(dim=1).values, alpha=0.2)
        print(
            f"{sampler} {noise_level:g}:",
            ", ".join(f"{n} steps {m:.4f}" for n, m in zip(counts, means, strict=True)),
        )
    exact = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        chosen = torch.rand(SAMPLES) < 0.5
        exact.append(
            distance(torch.where(chosen, LAW[0].sample((SAMPLES,)), LAW[1].sample((SAMPLES,))))
        )
    print(f"exact samples: {min(exact):.4f} to {max(exact):.4f}")
    axes.axhspan(
        min(exact), max(exact), color="grey", alpha=0.3, label=f"{SAMPLES:,} exact samples"
    )
    axes.set(xlabel="discretization steps", ylabel="Wasserstein-1 distance from the mixture")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    plt.savefig(HERE / "terminal_error.png", dpi=120)


def draw_control_cost() -> None:
    """Divergence of a correction of 1 in one dimension at each of 50 steps on Stable Diffusion's
    schedule.
    """
    _, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for action_type in ("velocity", "noise"):
        for noise_level in (1.0, 0.5):
            env = flowgym_gym.make(
                "1d/gaussian_mixture",
                "1d/gaussian",
                50,
                action_type=action_type,
                noise_level=noise_level,
                base_model_kwargs={"schedule": "diffusion"},
            )
            cost = 0.5 * (env.transitions.gain / env.transitions.cost_std) ** 2
            axes.semilogy(
                env.times[:-1],
                cost,
                ".-",
                label=f"{action_type} correction, noise level {noise_level:g}",
            )
    axes.set(xlabel="time", ylabel="nats per dimension for a correction of 1")
    axes.legend()
    axes.grid(alpha=0.3)
    plt.savefig(HERE / "control_cost.png", dpi=120)


if __name__ == "__main__":
    draw_terminal_error()
    draw_control_cost()
