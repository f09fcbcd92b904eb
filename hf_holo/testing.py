"""The conformance kit as pytest tests, for one's own architectures too.

    from hf_holo.testing import ConformanceTests

    class TestMine(ConformanceTests):
        architecture = "mine"

runs every check that applies on every variant and head of the family "mine". Needs pytest.
"""

import pytest

from .eval.conformance import Subject, select
from .eval.conformance.targets import family_subjects
from .registry import architectures, get_architecture


class ConformanceTests:
    """Base of a test class: one test for each model and each check that applies to it.

    Slow checks carry the marker `slow`.

    Attributes:
        architecture: name of a registered family; None: all registered families.
        seed: of weights and inputs.
    """

    architecture: str | None = None
    seed: int = 0

    def subjects(self) -> list[Subject]:
        """The models to check; override it to check others."""
        chosen = architectures().values() if self.architecture is None else [get_architecture(self.architecture)]
        return [subject for architecture in chosen for subject in family_subjects(architecture, seed=self.seed)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make the cases; which checks apply is known only from the models."""
        metafunc.config.addinivalue_line("markers", "slow: takes more than a few seconds")
        cases = [
            pytest.param(subject, check, id=f"{subject}: {check.name}", marks=[pytest.mark.slow] * check.slow)
            for subject in self.subjects()
            for check in select(None, quick=False)
            if check.reason_not(subject) is None
        ]
        metafunc.parametrize(("subject", "check"), cases)

    def test_conformance(self, subject, check):
        check(subject)
