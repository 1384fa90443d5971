"""One running server for the tests that do not need their own."""

from collections.abc import Iterator

import pytest
from cpu.server.harness import Harness, harness


@pytest.fixture(scope="module")
def served() -> Iterator[Harness]:
    """Reproducible random answers that never end by themselves."""
    with harness() as running:
        yield running
        assert running.settled(), "no request stays behind"
