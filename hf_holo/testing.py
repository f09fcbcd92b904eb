"""The conformance kit as pytest tests, for one's own architectures too.

    from hf_holo.testing import ConformanceTests

    class TestMine(ConformanceTests):
        architecture = "mine"

runs every check that applies on every variant and head of the family "mine". Needs pytest.
"""

import pytest

from .eval.conformance import Check, Subject, select
from .eval.conformance.targets import family_subjects
from .registry import architectures, get_architecture

ONCE = ("generation", "persistence", "adapters")  # groups that take long and say much the same of every variant


class ConformanceTests:
    """Base of a test class: one test for each model and each check that applies to it.

    Slow checks carry the marker `slow`; so do the rarer models that `hf-holo check --quick` leaves out, and what is
    generated, saved, loaded and adapted in other variants than the first of a family.

    Attributes:
        architecture: name of a registered family; None: all registered families.
        seed: of weights and inputs.
    """

    architecture: str | None = None
    seed: int = 0

    def subjects(self, quick: bool) -> list[Subject]:
        """The models to check, without the rarer ones if quick; override it to check others."""
        chosen = architectures().values() if self.architecture is None else [get_architecture(self.architecture)]
        return [subject for architecture in chosen for subject in family_subjects(architecture, quick, self.seed)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make the cases; which checks apply is known only from the models, which takes seconds for the rarer ones."""
        metafunc.config.addinivalue_line("markers", "slow: takes more than a few seconds")
        quick = metafunc.config.getoption("markexpr") == "not slow"
        common = self.subjects(quick=True)
        names = {subject.name for subject in common}
        first = _of_first_variants(common)
        cases = []
        for subject in common if quick else self.subjects(quick=False):
            for check in select(None, quick):
                if check.reason_not(subject) is None:
                    rarer = subject.name not in names or (check.group in ONCE and subject.name not in first)
                    name = f"{subject.name}: {check.name}"
                    cases.append(
                        pytest.param(subject, check, id=name, marks=[pytest.mark.slow] * (check.slow or rarer))
                    )
        metafunc.parametrize(("subject", "check"), cases)

    def test_conformance(self, subject: Subject, check: Check) -> None:
        check(subject)


def _of_first_variants(subjects: list[Subject]) -> set[str]:
    """The names of those that are of the same variant as the first of their family."""
    variants: dict[str, str] = {}
    for subject in subjects:
        variants.setdefault(subject.config.model_type, _variant(subject))
    return {subject.name for subject in subjects if variants[subject.config.model_type] == _variant(subject)}


def _variant(subject: Subject) -> str:
    return subject.name.partition("/")[2]
