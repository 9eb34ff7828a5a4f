"""Intervals of means."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95
FORMULA = (
    "mean +- t * s / sqrt(n), s with denominator n - 1, t of Student's distribution with n - 1 "
    "degrees of freedom"
)


def mean_and_interval(values: np.ndarray) -> dict[str, float]:
    """Mean with its 95 % confidence interval, and the sample standard deviation; of a single value
    the mean alone.

    >>> {k: round(v, 3) for k, v in mean_and_interval(np.array([1.0, 2.0, 3.0, 4.0])).items()}
    {'mean': 2.5, 'low': 0.446, 'high': 4.554, 'std': 1.291}
    """
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean}
    from scipy.stats import t as student  # Here, so that what only imports this needs no scipy.

    std = float(values.std(ddof=1))
    half = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "std": std}
