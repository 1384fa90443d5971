"""Every kernel says under which names it runs, what defines it, where it is tested and where it is measured."""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

from ownpath.bench.benches import BENCHES
from ownpath.cli import main
from ownpath.conformance.operations import CASES
from ownpath.kernels.registry import SPECS
from ownpath.kernels.spec import Evidence, KernelSpec

ROOT = Path(__file__).parents[2]
FIRST = next(spec for spec in SPECS if spec.name == "triton.rms_norm")


def faults_of(spec: KernelSpec) -> Iterator[str]:
    """Returns the evidence that a kernel lacks. References define what others compute and need none."""
    if spec.name.startswith("ref."):
        return
    if not spec.launches and not spec.name.startswith("torch."):
        yield "launches nothing that has a name"
    if spec.evidence is None:
        yield "has no evidence"
        return
    if not _is_function(spec.evidence.twin):
        yield f"there is no twin {spec.evidence.twin}"
    if not _asks_for(spec.evidence.test, spec):
        yield f"is not tested in {spec.evidence.test}"
    if not _measures(spec.evidence.bench, spec):
        yield f"is not measured by {spec.evidence.bench}"


def _is_function(place: str) -> bool:
    module, _, name = place.partition(":")
    try:
        found = vars(import_module(f"ownpath.kernels.{module}")).get(name)
    except ImportError:
        return False
    return isinstance(found, FunctionType)


def _asks_for(path: str, spec: KernelSpec) -> bool:
    """Returns True if a file names the kernel, imports it, or iterates over cases that include it."""
    if not (ROOT / path).is_file():
        return False
    text = (ROOT / path).read_text(encoding="utf-8")
    module, _, attribute = spec.entry.partition(":")
    imported = re.search(rf"from ownpath\.kernels\.{re.escape(module)} import .*\b{attribute}\b", text)
    base = spec.name.removesuffix("_invariant")
    is_named = f'"{spec.name}"' in text or (f'"{base}"' in text and '"_invariant"' in text)
    return is_named or imported is not None or _has_case(text, spec)


def _has_case(text: str, spec: KernelSpec, *, for_bench: bool = False) -> bool:
    cases = (case for case in CASES if case.bench or not for_bench)
    return "from ownpath.conformance.operations import CASES" in text and spec.name in {case.kernel for case in cases}


def _measures(command: str, spec: KernelSpec) -> bool:
    """Returns True if a command exists and measures this kernel or its runner."""
    program, _, what = command.partition(" ")
    if program == "python":
        path = ROOT / what
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return f'"{spec.name}"' in text or _has_case(text, spec, for_bench=True)
    bench = BENCHES.get(command.removeprefix("ownpath bench "))
    same = [other for other in SPECS if other.name == spec.name]
    return bench is not None and any(
        other.kind in (bench.kind, *bench.kinds) and (bench.stored is None or bench.stored in other.formats)
        for other in same
    )


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.name} {spec.runner} {'/'.join(map(str, spec.formats))}"
)
def test_every_kernel_has_its_evidence(spec: KernelSpec) -> None:
    assert not list(faults_of(spec))


ANOTHER = replace(FIRST, name="triton.another")
PROOF = FIRST.evidence or Evidence("", "", "")


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (replace(FIRST, launches=()), "launches nothing that has a name"),
        (replace(FIRST, evidence=None), "has no evidence"),
        (replace(FIRST, evidence=replace(PROOF, twin="norms.ref:no_such_norm")), "no twin norms.ref:no_such_norm"),
        (replace(FIRST, evidence=replace(PROOF, twin="no_such_family.ref:norm")), "no twin no_such_family.ref:norm"),
        (replace(FIRST, evidence=replace(PROOF, twin="norms.ref:RMS_NORM")), "no twin norms.ref:RMS_NORM"),
        (replace(FIRST, evidence=replace(PROOF, test="tests/gpu/test_no_such.py")), "not tested in"),
        (replace(FIRST, evidence=replace(PROOF, test="tests/gpu/test_nvfp4_moe.py")), "not tested in"),
        (replace(ANOTHER, evidence=replace(PROOF, bench="ownpath bench no_such")), "not measured by"),
        (replace(ANOTHER, evidence=replace(PROOF, bench="ownpath bench moe")), "not measured by"),
        (replace(ANOTHER, evidence=replace(PROOF, bench="python bench/no_such.py")), "not measured by"),
        (ANOTHER, "not measured by python bench/small_ops.py"),
    ],
)
def test_what_is_missing_is_found(spec: KernelSpec, fault: str) -> None:
    assert any(fault in found for found in faults_of(spec))


def test_plan_list_prints_the_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    out = "".join(capsys.readouterr().out.split())  # lines are wrapped
    for held in (spec.evidence for spec in SPECS if spec.evidence is not None):
        assert f"twin{held.twin};test{held.test};bench{''.join(held.bench.split())}" in out
