"""The conformance kit: does a model do what it claims? For every registered family and any Hugging Face model."""

from .causality import CausalityReport, Leak, check_causality
from .checks import CHECKS, Check, Report, Result, Violation, check, run_check
from .subject import Subject

__all__ = [
    "CHECKS",
    "CausalityReport",
    "Check",
    "Leak",
    "Report",
    "Result",
    "Subject",
    "Violation",
    "check",
    "check_causality",
    "run_check",
]
