"""Checks, what they need of a model, and the report of what came of them."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .quiet import quiet
from .subject import Subject

GROUPS = ("causality", "equivalence", "senses", "generation", "state", "persistence", "adapters")


class Violation(AssertionError):
    """A model does not do what it claims. The message names the fault, and where and how large it is."""


@dataclass(frozen=True)
class Check:
    """One property that a model must have.

    Attributes:
        name: what the table calls it.
        group: one of `GROUPS`.
        function: takes a subject, raises [`Violation`] or returns a remark for the table (or None).
        needs: features without which the check does not apply, see `subject.FEATURES`.
        slow: left out in quick mode.
    """

    name: str
    group: str
    function: Callable[[Subject], str | None]
    needs: tuple[str, ...]
    slow: bool

    def reason_not(self, subject: Subject) -> str | None:
        """Why the check does not apply to this model, or None if it does."""
        return subject.lacks(self.needs)

    def __call__(self, subject: Subject) -> str:
        """Run it; returns the remark, raises [`Violation`] or whatever the model raises."""
        torch.manual_seed(subject.seed)
        return self.function(subject) or ""


CHECKS: dict[str, Check] = {}


def check(group: str, *needs: str, slow: bool = False) -> Callable:
    """Decorator that makes a function a [`Check`]; its name, with spaces, is that of the check."""

    def register(function: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        name = function.__name__.replace("_", " ")
        CHECKS[name] = Check(name, group, function, needs, slow)
        return function

    return register


def assert_same(
    got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float, where: Sequence[str] = ("row", "position")
) -> str:
    """Raise [`Violation`] unless `got` is `expected` up to `tolerance` times the largest expected value.

    Args:
        got, expected: tensors of one shape; NaN equals nothing.
        what: the fault to name, as in "left padding changes the output".
        tolerance: relative to the largest value of `expected`.
        where: names of the leading dimensions, for the message.

    Returns:
        The remark "largest difference ...".
    """
    if got.shape != expected.shape:
        raise Violation(f"{what}: the shape is {tuple(got.shape)} instead of {tuple(expected.shape)}")
    got, expected = got.detach().double(), expected.detach().double()
    if not torch.isfinite(expected).all():
        raise Violation(f"{what}: nothing to compare with, the expected values are NaN or infinite")
    scale = max(expected.abs().max().item(), 1e-30)
    difference = (got - expected).abs() / scale
    wrong = ~(difference <= tolerance)  # NaN is wrong too
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        place = ", ".join(f"{name} {index}" for name, index in zip(where, first, strict=False))
        size = difference.nan_to_num(float("inf")).max().item()
        raise Violation(f"{what}: first at {place}; largest difference {size:.1e} relative, allowed {tolerance:.0e}")
    return f"largest difference {difference.max().item():.0e}"


@dataclass(frozen=True)
class Result:
    """What came of one check on one model; `status` is "passed", "failed" or "not applicable"."""

    subject: str
    check: str
    group: str
    status: str
    detail: str
    seconds: float = 0.0


@dataclass
class Report:
    """All results, in the order in which they came."""

    results: list[Result] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == "failed"]

    def records(self) -> list[dict[str, Any]]:
        """The results as plain dictionaries."""
        return [asdict(result) for result in self.results]

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, "results": self.records()}, indent=2)


def run_check(check: Check, subject: Subject) -> Result:
    """The result of one check; what the model raises is a failure."""
    start = time.perf_counter()
    try:
        with quiet():
            detail = check.reason_not(subject)
            status = "passed" if detail is None else "not applicable"
            if detail is None:
                detail = check(subject)
    except Violation as violation:
        status, detail = "failed", str(violation)
    except Exception as error:  # a model that cannot even run the check has failed it
        status, detail = "failed", f"raises {type(error).__name__}: {' '.join(str(error).split())}"
    return Result(subject.name, check.name, check.group, status, detail, round(time.perf_counter() - start, 3))


def select(names: Iterable[str] | None, quick: bool) -> list[Check]:
    """The checks of these names or groups (default: all), in the order of `GROUPS`; without the slow ones if quick."""
    chosen = [c for c in CHECKS.values() if names is None or c.name in names or c.group in names]
    return sorted((c for c in chosen if not (quick and c.slow)), key=lambda c: GROUPS.index(c.group))
