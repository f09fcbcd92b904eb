"""The conformance kit as pytest tests, for one's own architectures too.

    from hf_holo.testing import ConformanceTests

    class TestMine(ConformanceTests):
        architecture = "mine"

runs every check that applies on every variant and head of the family "mine". Needs pytest.
"""

import pytest
from transformers import PreTrainedModel

from .eval.conformance import Check, Subject, select
from .eval.conformance.targets import family_subjects
from .registry import architectures, get_architecture

ONCE = ("generation", "persistence", "adapters")  # groups that take long and say much the same of every variant
THOROUGH = ("suffix exchange in every setting", "suffix exchange at usual lengths")  # hundreds of passes each


class ConformanceTests:
    """Base of a test class: one test for each model and each check that applies to it.

    Slow checks carry the marker `slow`; so do the rarer models that `hf-holo check --quick` leaves out, what is
    generated, saved, loaded and adapted in other variants than the first of a family, and the most thorough checks of
    causality of other models than the main one of that variant.

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
        first = _of_first_variants(common)
        main = [subject for subject in first if subject.model_class is _main_model(subject)]
        fast = dict.fromkeys(ONCE, first) | dict.fromkeys(THOROUGH, main)
        cases = []
        for subject in common if quick else self.subjects(quick=False):
            for check in select(None, quick):
                if check.reason_not(subject) is None:
                    where = fast.get(check.name, fast.get(check.group, common))
                    slow = check.slow or subject.name not in [other.name for other in where]
                    name = f"{subject.name}: {check.name}"
                    cases.append(pytest.param(subject, check, id=name, marks=[pytest.mark.slow] * slow))
        metafunc.parametrize(("subject", "check"), cases)

    def test_conformance(self, subject: Subject, check: Check) -> None:
        check(subject)


def _of_first_variants(subjects: list[Subject]) -> list[Subject]:
    """Those that are of the same variant as the first of their family."""
    variants: dict[str, str] = {}
    for subject in subjects:
        variants.setdefault(subject.config.model_type, _variant(subject))
    return [subject for subject in subjects if variants[subject.config.model_type] == _variant(subject)]


def _variant(subject: Subject) -> str:
    return subject.name.partition("/")[2]


def _main_model(subject: Subject) -> type[PreTrainedModel]:
    return get_architecture(subject.config.model_type).main_model
