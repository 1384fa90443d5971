"""The kernels there are: the specs of every folder that has some, and the implementations behind them.

A folder of ``ownpath.kernels`` with a ``spec.py`` is a family. Nothing else lists kernels, so that adding one means
adding a folder. Implementations are imported when one is first asked for; until then no torch and no toolchain is.
"""

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from operator import attrgetter
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
    """All specs, those of the newest architecture's families first; within a family in its own order, best first."""
    found: list[tuple[KernelSpec, ...]] = [
        import_module(f"ownpath.kernels.{family}.spec").SPECS for family in sorted(families())
    ]
    return tuple(spec for specs in sorted(found, key=_newest_sm, reverse=True) for spec in specs)


def _newest_sm(specs: tuple[KernelSpec, ...]) -> int:
    return max(spec.min_sm or 0 for spec in specs)


SPECS = _specs()


def spec_of(name: str) -> KernelSpec:
    """The first spec of a kernel: those of one name differ in formats and runners. Errors: KeyError."""
    return _BY_NAME[name]


_BY_NAME = {spec.name: spec for spec in reversed(SPECS)}


Kernel = Callable[..., Any]


class Registry(Mapping[str, Kernel]):
    """Kernel name -> implementation. A name whose module needs an extra does not need it until it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> Kernel:
        module, _, attribute = self._places[name].partition(":")
        kernel: Kernel = attrgetter(attribute)(import_module(f"ownpath.kernels.{module}"))
        return kernel

    def place(self, name: str) -> str:
        """Where an implementation is, as ``module:attribute`` in ``ownpath.kernels``."""
        return self._places[name]

    def name_of(self, kernel: Kernel) -> str | None:
        """The name that an implementation goes by; ``None`` for one that is not here."""
        for name, place in self._places.items():
            # Whoever holds an implementation has imported its module; the others may need what is not installed.
            module, _, attribute = place.partition(":")
            loaded = sys.modules.get(f"ownpath.kernels.{module}")
            if loaded is not None and attrgetter(attribute)(loaded) is kernel:
                return name
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


KERNELS = Registry({spec.name: spec.entry for spec in SPECS})

VARIANTS = Registry(
    {
        "cute.nvfp4_linear": "nvfp4.linear:nvfp4_linear.variant",
        "cute.nvfp4_linear_invariant": "nvfp4.linear:nvfp4_linear_invariant.variant",
        "cute.nvfp4_moe": "nvfp4.moe:nvfp4_moe.variant",
        "cute.nvfp4_moe_invariant": "nvfp4.moe:nvfp4_moe_invariant.variant",
        "cute.fp8_linear_sm90": "fp8.launch:fp8_linear.variant",
        "cute.fp8_linear_w8a16_sm90_invariant": "fp8.launch:fp8_linear_invariant.variant",
        "triton.nvfp4_linear_w4a4_sm100": "variants:linear_w4a4",
        "triton.nvfp4_linear_w4a4_sm100_invariant": "variants:linear_w4a4_invariant",
        "triton.nvfp4_moe_w4a4_sm100": "variants:moe_w4a4",
        "triton.nvfp4_moe_w4a4_sm100_invariant": "variants:moe_w4a4_invariant",
        "triton.plain_linear_invariant": "variants:plain_linear",
        "triton.hyper_boundary": "variants:hyper_boundary",
        "triton.hyper_boundary_invariant": "variants:hyper_boundary_invariant",
        "triton.rms_norm": "variants:rms_norm",
        "triton.router": "variants:router",
        "triton.swiglu": "variants:swiglu",
        "triton.grouped_linear": "variants:grouped_linear",
        "triton.grouped_linear_invariant": "variants:grouped_linear_invariant",
    }
)
"""Kernel name -> which of its compiled configurations a call launches, by name, from the call's arguments without
those that results are written to. A kernel that is not here has one form only."""
