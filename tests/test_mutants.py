"""Seeded errors have to be in step with the source: one whose place is gone says nothing about the tests."""

from types import ModuleType

import geometry_mutants
import kernel_mutants
import pytest
import statement_mutants
from seeding import outdated


@pytest.mark.parametrize("hunt", [geometry_mutants, kernel_mutants, statement_mutants], ids=lambda hunt: hunt.__name__)
def test_what_a_mutant_replaces_is_in_the_source(hunt: ModuleType):
    assert not outdated(hunt.MUTANTS)
