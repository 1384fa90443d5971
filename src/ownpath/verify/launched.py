"""Kernels that the device really ran, as the profiler names them, against the plan.

A planned kernel of ours must be seen under the name of its own code, in its own slot. A product that is not ours may
run only in a slot whose planned kernel is torch's, and none outside all slots.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from ownpath.runners.launches import Launch
from ownpath.verdict import Verdict
from ownpath.verify.finding import Finding
from ownpath.verify.ledger_run import Ran
from ownpath.verify.places import folded
from ownpath.verify.planned import WrittenPlan

BY_TORCH = ("torch.", "ref.")
"""Kernels of the plan that torch and its libraries compute."""
_NVFP4_PRODUCT = (r"gemm_sm90",)
_HYPER = (r"\bspread_(few|many)\b", r"\bcollapse\b")
_GROUPED = (r"\brope_grouped_kernel\b",)
_W4A4 = (r"\bquantize_kernel\b", r"\bgemm_w4a4_kernel\b")
LAUNCHED = MappingProxyType(
    {
        "cute.nvfp4_linear": _NVFP4_PRODUCT,
        "cute.nvfp4_linear_invariant": _NVFP4_PRODUCT,
        "cute.nvfp4_moe": (*_NVFP4_PRODUCT, r"moe_sm90"),
        "cute.nvfp4_moe_invariant": (*_NVFP4_PRODUCT, r"moe_sm90"),
        "cute.fp8_linear_sm90": (r"w8a(16|8)_sm90",),
        "cute.fp8_linear_w8a16_sm90_invariant": (r"w8a16_sm90",),
        "triton.nvfp4_linear_w4a4_sm100": _W4A4,
        "triton.nvfp4_linear_w4a4_sm100_invariant": _W4A4,
        "triton.nvfp4_moe_w4a4_sm100": (*_W4A4, r"\bgate_up_w4a4_kernel\b", r"\bcombine_kernel\b"),
        "triton.nvfp4_moe_w4a4_sm100_invariant": (*_W4A4, r"\bgate_up_w4a4_kernel\b", r"\bcombine_kernel\b"),
        "triton.plain_linear_invariant": (r"\bplain_linear_kernel\b",),
        "triton.hyper_boundary": _HYPER,
        "triton.hyper_boundary_invariant": _HYPER,
        "triton.rms_norm": (r"\brms_norm_kernel\b",),
        "triton.router": (r"\brouter_kernel\b",),
        "triton.swiglu": (r"\bswiglu_kernel\b",),
        "triton.grouped_linear": _GROUPED,
        "triton.grouped_linear_invariant": _GROUPED,
    }
)
"""Planned kernel -> patterns of the names of what it launches; each of them is seen in every call."""
OURS = re.compile("|".join(dict.fromkeys(pattern for patterns in LAUNCHED.values() for pattern in patterns)))
_REMEDY = "the device ran something else than the plan says: a fallback inside a kernel, or a product in the model"


def check_launches(written: WrittenPlan, parts: Sequence[Ran]) -> Iterator[Finding]:
    """LG06: the profiler's kernels against the plan."""
    seen = [part for part in parts if part.launches is not None]
    if not seen:
        reason = "no profiler on this device, or it saw no kernel"
        yield Finding("LG06", "device", Verdict.SKIPPED, reason)
        return
    faults = [fault for part in seen for fault in launch_faults(written, part)]
    for where, message in folded(faults):
        yield Finding("LG06", where, Verdict.FAIL, message, allowed="the planned kernels", remedy=_REMEDY)
    if not faults:
        num_launches = sum(len(part.launches or ()) for part in seen)
        message = f"{num_launches} kernels ran where they are planned"
        yield Finding("LG06", "device", Verdict.PASS, message, 0, "no other product, no planned kernel missing")


def launch_faults(written: WrittenPlan, part: Ran) -> list[tuple[str, str]]:
    """What one part launched that was not planned, or did not launch that was."""
    by_slot: dict[str | None, list[Launch]] = defaultdict(list)
    for launch in part.launches or ():
        by_slot[launch.slot].append(launch)
    faults = [("outside every slot", f"a product ran: {name}") for name in _products(by_slot[None])]
    for slot in dict.fromkeys(record.slot for record in part.records):
        planned = written.slots.get(slot)
        faults += [] if planned is None else _slot_faults(slot, planned.kernel, by_slot[slot])
    return faults


def _slot_faults(slot: str, planned: str, launches: Sequence[Launch]) -> list[tuple[str, str]]:
    kernels = planned.split("+")
    names = [launch.kernel for launch in launches]
    wanted = [pattern for kernel in kernels for pattern in LAUNCHED.get(kernel, ())]
    missing = [pattern for pattern in wanted if not any(re.search(pattern, name) for name in names)]
    plain = [pattern.replace(r"\b", "") for pattern in missing]
    faults = [(slot, f"planned {planned}, but the device ran nothing named {pattern}") for pattern in plain]
    if not any(kernel.startswith(BY_TORCH) for kernel in kernels):
        faults += [
            (slot, f"planned {planned}, but a product that is not ours ran: {name}") for name in _others(launches)
        ]
    elif not names:
        faults.append((slot, f"planned {planned}, but the device ran nothing"))
    return faults


def _products(launches: Sequence[Launch]) -> list[str]:
    return list(dict.fromkeys(launch.kernel[:80] for launch in launches if launch.is_product))


def _others(launches: Sequence[Launch]) -> list[str]:
    return [name for name in _products(launches) if not OURS.search(name)]
