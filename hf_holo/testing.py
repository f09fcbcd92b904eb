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


class ConformanceTests:
    """Base of a test class: one test for each model and each check that applies to it.

    Slow checks, and the rarer models that `hf-holo check --quick` leaves out, carry the marker `slow`.

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
        cases = []
        for subject in common if quick else self.subjects(quick=False):
            for check in select(None, quick):
                if check.reason_not(subject) is None:
                    slow = check.slow or subject.name not in names
                    name = f"{subject.name}: {check.name}"
                    cases.append(pytest.param(subject, check, id=name, marks=[pytest.mark.slow] * slow))
        metafunc.parametrize(("subject", "check"), cases)

    def test_conformance(self, subject: Subject, check: Check) -> None:
        check(subject)
