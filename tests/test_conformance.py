"""Every registered family does what it claims: the conformance kit on all variants and heads."""

from hf_holo.testing import ConformanceTests


class TestFamilies(ConformanceTests):
    pass
