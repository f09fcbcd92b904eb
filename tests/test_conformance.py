"""Every registered family does what it claims: the conformance kit on all variants and heads."""

import pytest

from hf_holo.testing import ConformanceTests


@pytest.mark.feature("{check.group}", "{check.name}", family="{subject.config.model_type}")
class TestFamilies(ConformanceTests):
    pass
