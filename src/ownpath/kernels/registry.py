"""The registry of kernels: the specs of every family, and their implementations by name.

A folder of ``ownpath.kernels`` with a ``spec.py`` is a family. Nothing else lists kernels, so that adding one means
adding a folder. An implementation is imported when it is first looked up; until then neither torch nor a toolchain is.
"""

import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import ownpath.kernels
from ownpath.kernels.spec import KernelSpec


def families() -> Iterator[str]:
    """Yields the names of the folders that hold kernels."""
    for found in pkgutil.iter_modules(ownpath.kernels.__path__):
        if found.ispkg and any((Path(path) / found.name / "spec.py").exists() for path in ownpath.kernels.__path__):
            yield found.name


@cache
def _specs() -> tuple[KernelSpec, ...]:
    """Returns all specs, best first: families without a torch reference, then the newest architecture's.

    A family keeps its own order. One without a reference is an alternative to kernels of other families, so it comes
    before these: their reference runs everywhere, and ``select`` takes the first kernel that can run.
    """
    found: list[tuple[KernelSpec, ...]] = [
        import_module(f"ownpath.kernels.{family}.spec").SPECS for family in sorted(families())
    ]
    return tuple(spec for specs in sorted(found, key=_rank) for spec in specs)


def _rank(specs: tuple[KernelSpec, ...]) -> tuple[bool, int]:
    return any(spec.evidence is None for spec in specs), -max(spec.min_sm or 0 for spec in specs)


SPECS = _specs()


def spec_of(name: str) -> KernelSpec:
    """Returns the first spec of a kernel; specs of one name differ in formats and runners. Errors: KeyError."""
    return _BY_NAME[name]


_BY_NAME = {spec.name: spec for spec in reversed(SPECS)}


class Registry(Mapping[str, Any]):
    """Kernel name -> implementation. A module that needs an optional package is imported only when looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self._places[name].partition(":")
        return vars(import_module(f"ownpath.kernels.{module}"))[attribute]

    def place(self, name: str) -> str:
        """Returns an implementation's path, ``module:attribute`` in ``ownpath.kernels``."""
        return self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


KERNELS = Registry({spec.name: spec.entry for spec in SPECS})
