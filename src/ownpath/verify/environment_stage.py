"""Stage ``environment``."""

from collections.abc import Iterator
from ownpath.verify.finding import Finding
from ownpath.verify.subject import Subject


def environment_stage(subject: Subject) -> Iterator[Finding]:
    yield from ()
