"""Rules for one value, and the legal value nearest to an illegal one."""

from __future__ import annotations

import math

from titans_dist.config.errors import ConfigError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} is unknown; choose one of {', '.join(allowed)}")


def at_least(key: str, value: float, low: float) -> None:
    """Raise ConfigError unless `value >= low`."""
    if not value >= low:
        raise ConfigError(f"{key}={value} is too small; use {low} or more")


def between(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{key}={value} is out of range; use {low} to {high}")


def positive(key: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{key}={value} must be a finite number above 0")


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step`, at least `step`, that is nearest to `value`."""
    return max(step, round(value / step) * step)


def nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` that is nearest to `wanted` (the smaller one on a tie)."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
