"""The conformance kit: does a model do what it claims? For every registered family and any Hugging Face model.

`check_causality(model)` answers the most important question; `hf-holo check` asks all of them.
"""

from . import (  # noqa: F401  (they register their checks)
    adapters,
    causality,
    equivalence,
    generation,
    order,
    persistence,
    senses,
    state,
)
from .causality import CausalityReport, Leak, check_causality
from .checks import CHECKS, GROUPS, Check, Report, Result, Violation, assert_same, check, run_check, select
from .subject import Subject

__all__ = [
    "CHECKS",
    "GROUPS",
    "CausalityReport",
    "Check",
    "Leak",
    "Report",
    "Result",
    "Subject",
    "Violation",
    "assert_same",
    "check",
    "check_causality",
    "run_check",
    "select",
]
