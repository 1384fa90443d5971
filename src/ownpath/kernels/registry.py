"""The kernels there are: the specs of every folder that has some, and the implementations behind them.

A folder of ``ownpath.kernels`` with a ``spec.py`` is a family. Nothing else lists kernels, so that adding one means
adding a folder. Implementations are imported when one is first asked for; until then no torch and no toolchain is.
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
    """Names of the folders that hold kernels."""
    for found in pkgutil.iter_modules(ownpath.kernels.__path__):
        if found.ispkg and any((Path(path) / found.name / "spec.py").exists() for path in ownpath.kernels.__path__):
            yield found.name


@cache
def _specs() -> tuple[KernelSpec, ...]:
    """All specs, best first: families without a reference of their own, then those of the newest architecture.

    Within a family its own order holds. A family without references is an alternative to what others refer to: it is
    asked before them, or it would never be where a reference runs.
    """
    found: list[tuple[KernelSpec, ...]] = [
        import_module(f"ownpath.kernels.{family}.spec").SPECS for family in sorted(families())
    ]
    return tuple(spec for specs in sorted(found, key=_rank) for spec in specs)


def _rank(specs: tuple[KernelSpec, ...]) -> tuple[bool, int]:
    return any(spec.evidence is None for spec in specs), -max(spec.min_sm or 0 for spec in specs)


SPECS = _specs()


def spec_of(name: str) -> KernelSpec:
    """The first spec of a kernel: those of one name differ in formats and runners. Errors: KeyError."""
    return _BY_NAME[name]


_BY_NAME = {spec.name: spec for spec in reversed(SPECS)}


class Registry(Mapping[str, Any]):
    """Kernel name -> implementation. A name whose module needs an extra does not need it until it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self._places[name].partition(":")
        return vars(import_module(f"ownpath.kernels.{module}"))[attribute]

    def place(self, name: str) -> str:
        """Where an implementation is, as ``module:attribute`` in ``ownpath.kernels``."""
        return self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


KERNELS = Registry({spec.name: spec.entry for spec in SPECS})
