"""One claim of the ledger: where it stands, what was measured, and the rule that judges it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import RESULTS, read_report
from .suite import SUITE

TRUE, CONDITIONS, FALSE, UNTESTABLE, MISSING = (
    "true",
    "true with conditions",
    "false",
    "cannot be tested",
    "not measured yet",
)
Figures = dict[str, float]
Results = Callable[[str], Mapping[str, Any]]  # the figures of a result by its name


class NotMeasured(Exception):
    """A result that a claim is judged by is not there."""


@dataclass(frozen=True)
class Claim:
    """A claim and its rule.

    Attributes:
        project: whose it is.
        says: the claim, in a sentence of ours.
        source: where it stands.
        results: names of the results that judge it; the first one's command is shown.
        figures: reads the numbers that the rule speaks of.
        measured: what they are, in words.
        true: the condition under which the claim is true.
        conditional: that under which it is true only as `conditions` says.
        conditions: in words.
        untestable: why nothing can judge it.
    """

    project: str
    says: str
    source: str
    results: tuple[str, ...] = ()
    figures: Callable[[Results], Figures] = lambda _: {}
    measured: str = ""
    true: str = ""
    conditional: str = ""
    conditions: str = ""
    untestable: str = ""

    def read(self, folder: Path = RESULTS) -> Figures:
        """Raises NotMeasured if a result is not there, or has not what is asked of it."""

        def result(name: str) -> Mapping[str, Any]:
            report = read_report(name, folder)
            if not report["seconds"]:
                raise NotMeasured(name)
            return report.get("figures", report)  # memory_recall has its figures outside

        try:
            return self.figures(result)
        except (KeyError, IndexError, ValueError) as error:
            raise NotMeasured(str(error)) from error

    def verdict(self, folder: Path = RESULTS) -> str:
        """What the rule says."""
        if self.untestable:
            return UNTESTABLE
        try:
            figures = self.read(folder)
        except NotMeasured:
            return MISSING
        if holds(self.true, figures):
            return TRUE
        return CONDITIONS if self.conditional and holds(self.conditional, figures) else FALSE

    def told(self, folder: Path = RESULTS) -> str:
        """What was measured, or why nothing was."""
        if self.untestable:
            return self.untestable
        try:
            figures = self.read(folder)
        except NotMeasured:
            return ""
        judged = ", ".join(f"`{name}` {_short(figures[name])}" for name in self._names)
        return f"{self.measured.format(**figures)}; {judged}"

    @property
    def _names(self) -> list[str]:
        """The figures that the rule speaks of, in the order in which it does."""
        words = (name for rule in (self.true, self.conditional) for name in re.findall(r"\b[a-zA-Z_]\w*", rule))
        return [name for name in dict.fromkeys(words) if name not in ("and", "abs", "max", "min")]

    @property
    def rule(self) -> str:
        """The rule in words, with its conditions as they are computed."""
        if self.untestable:
            return ""
        conditional = f"; `{self.conditional}`: {self.conditions}" if self.conditional else ""
        return f"`{self.true}`: true{conditional}; else false"

    @property
    def command(self) -> str:
        return f"`{SUITE[self.results[0]].command}`" if self.results and self.results[0] in SUITE else ""


def _short(figure: float) -> str:
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def holds(condition: str, figures: Figures) -> bool:
    """Whether a condition, one of those in this file, is true of the figures."""
    return bool(eval(condition, {"__builtins__": {"abs": abs, "max": max, "min": min}}, dict(figures)))
