"""Counts the modules whose input has no calibrated scale, and names the kernels that would need one."""

from collections.abc import Iterable
from dataclasses import dataclass

from ownpath.formats import NVFP4
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import InputRounding
from ownpath.plan.census import StoredModule


@dataclass(frozen=True)
class MissingInputScales:
    """num_modules: NVFP4 modules without a scale of their input.

    needed_by: kernels that cannot run without, and numerics; empty where none is missing.
    """

    num_modules: int
    needed_by: tuple[str, ...]


def missing_input_scales(modules: Iterable[StoredModule]) -> MissingInputScales:
    """Counts them; with 16-bit activations nothing needs them."""
    missing = [stored for stored in modules if stored.encoding.format is NVFP4 and not stored.encoding.has_input_scale]
    quantising = [spec for spec in SPECS if NVFP4 in spec.formats and spec.rounding is InputRounding.NVFP4]
    names = [spec.name for spec in quantising if not spec.official]
    names += ["any of --numerics official"] if any(spec.official for spec in quantising) else []
    return MissingInputScales(len(missing), tuple(names) if missing else ())
