"""The kernels that ran on the device, against the plan: no product outside the planned runners."""

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from support.kernel_configs import model_configs

from ownpath.config import EngineConfig
from ownpath.kernels.dsl.cache import Config
from ownpath.kernels.registry import spec_of
from ownpath.loading import default_model_dir, load_model, plan_model
from ownpath.model.batch import ForwardBatch
from ownpath.ops import OpKind
from ownpath.trace.launches import DeviceLaunch, record_launches

pytestmark = pytest.mark.gpu

BY_TORCH = ("torch.", "ref.")
"""Kernels of the plan that torch's libraries compute: cuBLAS is what the plan names there, and nowhere else."""


def kernel_configs() -> Iterator[Config]:
    """Those of the embedded model."""
    return model_configs(default_model_dir())


@pytest.fixture(scope="module")
def launches(cuda: torch.device) -> list[DeviceLaunch]:
    """A prefill that completes CSA and HCA windows beside a decode step, then both sequences' next tokens."""
    model = load_model(default_model_dir(), EngineConfig.for_device(str(cuda), 512))
    first, second = model.new_cache(), model.new_cache()
    model.forward(ForwardBatch.of([([3] * 130, first)], cuda))  # compiles what its first call compiles

    def run() -> None:
        model.forward(ForwardBatch.of([([5], first), (list(range(2, 200)), second)], cuda))
        model.forward(ForwardBatch.of([([6], first), ([7], second)], cuda))

    return record_launches(model.ledger, run)


def by_slot(launches: list[DeviceLaunch]) -> dict[str | None, list[DeviceLaunch]]:
    found: dict[str | None, list[DeviceLaunch]] = defaultdict(list)
    for launch in launches:
        found[launch.slot].append(launch)
    return found


def test_every_planned_slot_launched_its_kernels(launches: list[DeviceLaunch], cuda: torch.device) -> None:
    plan = plan_model(default_model_dir(), str(cuda))
    seen = set(by_slot(launches)) - {None}
    composites = {slot for slot, (runner, _) in plan.slots.items() if runner == "Router"}  # its gate is a slot itself
    assert seen - composites == set(plan.slots) - composites - plan.idle_slots


def test_no_product_runs_outside_the_planned_runners(launches: list[DeviceLaunch]) -> None:
    glue = by_slot(launches)[None]
    assert [launch.kernel for launch in glue if launch.is_product] == []


def test_libraries_compute_only_where_the_plan_names_them(launches: list[DeviceLaunch], cuda: torch.device) -> None:
    slots = plan_model(default_model_dir(), str(cuda)).slots
    for slot, found in by_slot(launches).items():
        kernel = slots[slot][1] if slot is not None else ""
        products = [launch.kernel for launch in found if launch.is_library_product]
        may_leave = any(spec_of(name).leaves_to_library for name in kernel.split("+") if name)
        if not kernel.startswith(BY_TORCH) and not may_leave:
            assert products == [], f"{slot} is planned on {kernel}"


@pytest.mark.sm90
def test_on_hopper_only_attention_and_plain_projections_are_left_to_libraries(
    launches: list[DeviceLaunch], cuda: torch.device
) -> None:
    plan = plan_model(default_model_dir(), str(cuda))
    for planned in plan.decided:
        kernel, kind = planned.choice.kernel, planned.spec.kind
        if kernel.name.startswith(BY_TORCH):
            assert kernel.runner == "PlainLinear" or kind is OpKind.ATTENTION, f"{planned.spec.slot}: {kernel.name}"
    table: dict[tuple[str, str], float] = defaultdict(float)
    for launch in launches:
        kernel_name = "(glue)" if launch.slot is None else plan.slots[launch.slot][1]
        table[kernel_name, launch.kernel[:70]] += launch.duration_us
    for (kernel_name, launched), total_us in sorted(table.items()):
        print(f"{kernel_name:32} {launched:70} {total_us:9.1f} us")
