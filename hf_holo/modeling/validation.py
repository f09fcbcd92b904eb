"""Checks on the arguments of configs: each raises ValueError with the name, the value and what is accepted."""

import math
from typing import Any


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def check_positive(at_most: int = 2**31, /, **values: int) -> None:
    """Raise ValueError unless every value is an integer from 1 to `at_most`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive integer")
        if value > at_most:
            raise ValueError(f"{name}: {value} is beyond all models; at most {at_most}")


def check_probability(**values: float) -> None:
    """Raise ValueError unless every value is in [0, 1)."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{name}: {value!r} is not in [0, 1)")


def check_frequencies(**limits: float) -> None:
    """Raise ValueError unless the two limits are numbers above 0, at most π, and the second is not below the first."""
    for name, value in limits.items():
        if not (isinstance(value, (int, float)) and 0 < value <= math.pi):
            raise ValueError(f"{name}: {value!r} is not a positive number of at most π, in radians a token")
    (low, lowest), (high, highest) = limits.items()
    if lowest > highest:
        raise ValueError(f"{low}: {lowest} is above {high}={highest}")


def check_divides(name: str, value: int, total_name: str, total: int) -> None:
    """Raise ValueError unless `value` divides `total`."""
    if total % value:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise ValueError(f"{name}: {value} does not divide {total_name}={total}; choose one of {divisors}")


def check_state_start(start: float, learned: bool) -> None:
    """Raise ValueError unless `start`, of states that are learned, is a number of at least 0."""
    if not (isinstance(start, (int, float)) and start >= 0):
        raise ValueError(f"state_start: {start!r} is not a number of at least 0")
    if start and not learned:
        raise ValueError(f"state_start: {start} needs learned_state=True; without it, states start empty")
