"""Counts the modules whose input has no calibrated scale, and names the kernels that would need one."""

from collections.abc import Iterable
from dataclasses import dataclass

from ownpath.formats import NVFP4
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import InputRounding
from ownpath.plan.census import StoredModule


@dataclass(frozen=True)
class MissingInputScales:
    """num_modules: NVFP4 modules without a scale of their input. needed_by: kernels that cannot run without; empty
    where none is missing."""

    num_modules: int
    needed_by: tuple[str, ...]


def missing_input_scales(modules: Iterable[StoredModule]) -> MissingInputScales:
    """Counts them; with 16-bit activations nothing needs them."""
    missing = [stored for stored in modules if stored.encoding.format is NVFP4 and not stored.encoding.has_input_scale]
    quantising = (spec.name for spec in SPECS if NVFP4 in spec.formats and spec.rounding is InputRounding.NVFP4)
    return MissingInputScales(len(missing), tuple(dict.fromkeys(quantising)) if missing else ())
