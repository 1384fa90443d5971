"""Compares the kernels that the device really ran, as the profiler names them, with the plan.

A planned kernel of ours must appear under the name of its own code, in its own slot. A product that is not ours may run
only in a slot whose planned kernel is torch's, or passed a recorded call on to torch's libraries. Outside all slots run
neither kernels of ours nor products.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ownpath.finding import Finding, Verdict
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import KernelSpec
from ownpath.kernels.variants import LIBRARY_VARIANT
from ownpath.trace.launches import DeviceLaunch
from ownpath.verify.fold import fold_layers
from ownpath.verify.ledger_run import PartRun
from ownpath.verify.plan_file import PlanFile

_SPECS = {spec.name: spec for spec in SPECS}
_OURS = re.compile("|".join(dict.fromkeys(pattern for spec in SPECS for pattern in spec.launches)))
_REMEDY = "the device ran something else than the plan says: a fallback inside a kernel, or a product in the model"


def check_launches(written: PlanFile, parts: Sequence[PartRun]) -> Iterator[Finding]:
    """LG06: compares the profiler's kernels with the plan."""
    seen = [part for part in parts if part.launches is not None]
    if not seen:
        reason = "no profiler on this device, or it saw no kernel"
        yield Finding("LG06", "device", Verdict.SKIPPED, reason)
        return
    faults = [fault for part in seen for fault in launch_faults(written, part)]
    for where, message in fold_layers(faults):
        yield Finding("LG06", where, Verdict.FAIL, message, allowed="the planned kernels", remedy=_REMEDY)
    if not faults:
        num_launches = sum(len(part.launches or ()) for part in seen)
        message = f"{num_launches} kernels ran where they are planned"
        yield Finding("LG06", "device", Verdict.PASS, message, 0, "no other product, no planned kernel missing")


def launch_faults(written: PlanFile, part: PartRun) -> list[tuple[str, str]]:
    """Lists launches of one part that were not planned, and planned ones that did not happen."""
    by_slot: dict[str | None, list[DeviceLaunch]] = defaultdict(list)
    for launch in part.launches or ():
        by_slot[launch.slot].append(launch)
    faults = [("outside every slot", words) for words in _unplanned(by_slot[None])]
    variants: dict[str, list[str]] = defaultdict(list)
    for record in part.records:
        variants[record.slot].append(record.variant)
    for slot, recorded in variants.items():
        planned = written.slots.get(slot)
        faults += [] if planned is None else _slot_faults(slot, planned.kernel, recorded, by_slot[slot])
    return faults


def _slot_faults(
    slot: str, planned: str, variants: Sequence[str], launches: Sequence[DeviceLaunch]
) -> list[tuple[str, str]]:
    kernels = planned.split("+")
    names = [launch.kernel for launch in launches]
    specs = [_SPECS[kernel] for kernel in kernels if kernel in _SPECS]
    wanted = [pattern for spec in specs if _launches_itself(spec, variants) for pattern in spec.launches]
    missing = [pattern for pattern in wanted if not any(re.search(pattern, name) for name in names)]
    plain = [pattern.replace(r"\b", "") for pattern in missing]
    faults = [(slot, f"planned {planned}, but the device ran nothing named {pattern}") for pattern in plain]
    if not any(spec.is_torch or _asks_library(spec, variants) for spec in specs):
        faults += [
            (slot, f"planned {planned}, but a product that is not ours ran: {name}") for name in _others(launches)
        ]
    elif not names:
        faults.append((slot, f"planned {planned}, but the device ran nothing"))
    return faults


def _launches_itself(spec: KernelSpec, variants: Sequence[str]) -> bool:
    """Returns False if every recorded call was passed on to torch's libraries."""
    return not spec.leaves_to_library or any(set(variant.split("+")) != {LIBRARY_VARIANT} for variant in variants)


def _asks_library(spec: KernelSpec, variants: Sequence[str]) -> bool:
    """Returns True if a recorded call was passed on to torch's libraries."""
    return spec.leaves_to_library and any(LIBRARY_VARIANT in variant.split("+") for variant in variants)


def _unplanned(launches: Sequence[DeviceLaunch]) -> list[str]:
    """Describes launches outside every slot that belong into one: products, and any other kernel of ours."""
    found = [f"a product ran: {name}" for name in _products(launches)]
    ours = (one.kernel[:80] for one in launches if not one.is_product and _OURS.search(one.kernel))
    return found + [f"a kernel of ours ran: {name}" for name in dict.fromkeys(ours)]


def _products(launches: Sequence[DeviceLaunch]) -> list[str]:
    return list(dict.fromkeys(launch.kernel[:80] for launch in launches if launch.is_product))


def _others(launches: Sequence[DeviceLaunch]) -> list[str]:
    return [name for name in _products(launches) if not _OURS.search(name)]
