"""Finds a kernel family's cases by words of their names. Imports no torch."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, TypeVar


class LabelledCase(Protocol):
    """A case of a family. tiny: a CPU can run it. bench: the bench shows it by default."""

    @property
    def label(self) -> str: ...

    @property
    def tiny(self) -> bool: ...

    @property
    def bench(self) -> bool: ...


_OneCase = TypeVar("_OneCase", bound=LabelledCase)


def cases_of(shapes: Sequence[str], cases: Sequence[_OneCase]) -> list[_OneCase]:
    """Returns the cases whose labels have all words of one of the shapes; without shapes, the bench's.

    The word "tiny" asks for those that a CPU can run. Errors: ValueError for a shape that no case has.
    """
    if not shapes:
        return [case for case in cases if case.bench]
    found: list[_OneCase] = []
    for shape in shapes:
        words = set(shape.split())
        fitting = [case for case in cases if (case.tiny if "tiny" in words else case.bench)]
        fitting = [case for case in fitting if words - {"tiny"} <= set(case.label.split())]
        if not fitting:
            known = dict.fromkeys(case.label for case in cases if case.bench)
            raise ValueError(f"--shape: no case has the words of {shape!r}; known: {', '.join(known)}")
        found += [case for case in fitting if case not in found]
    return found


def family_cases(family: str, shape: str) -> Sequence[LabelledCase]:
    """Returns the cases of a kernel family with a shape's words. Errors: ValueError, as above."""
    return cases_of([shape], import_module(f"ownpath.kernels.{family}.cases").CASES)
