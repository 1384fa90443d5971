"""Stage environment: what this machine lacks for a plan, by id and name; nothing where it lacks nothing."""

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.hopper_layouts import allow_packing_on_cpu, subject_on

from ownpath.finding import Finding, Verdict, failed
from ownpath.kernels.dsl import cache
from ownpath.loading import default_model_dir, planned
from ownpath.runners.make import compile_configs
from ownpath.verify import environment_stage as stage
from ownpath.verify.launch_configs import configs_of
from ownpath.verify.layer import load_part
from ownpath.verify.machine import KNOWN_BAD, Machine
from ownpath.verify.subject import Subject

TINY = default_model_dir()
H200 = {"device": "NVIDIA H200", "sm": 90, "driver": "580.95.05"}
FINE = {"python": "3.12.3", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}


def machine(sm: int | None = 90, driver: str = "580.95.05", **versions: str) -> Machine:
    return Machine("some device", sm, driver, FINE | versions)


def test_this_machine_can_run_the_embedded_model() -> None:
    found = list(stage.environment_stage(subject_on(TINY)))
    assert not failed(found)
    assert {finding.id for finding in found} == {"E01", "E02", "E03", "E04"}
    kernels = {choice for _, choice in subject_on(TINY).plan.slots.values()}
    assert {finding.where for finding in found if finding.id == "E02"} == kernels


@pytest.mark.parametrize(
    ("here", "num_bad"),
    [
        (machine(), 0),
        (machine(driver="575.57.08"), 1),
        (machine(driver="575.57.08", cuda="12.8"), 0),
        (machine(driver=""), 0),
        (machine(100, driver="570.86.15", cuda="12.8"), 1),
        (machine(100, driver="570.86.15"), 2),
        (machine(103), 1),
        (machine(103, triton="3.5.1"), 0),
        (machine(triton="3.7.1"), 1),
        (machine(triton="3.7.0"), 0),
        (Machine("cpu", None, "", {"torch": "2.13.0"}), 0),
    ],
)
def test_known_combinations_are_found(here: Machine, num_bad: int) -> None:
    found = list(stage.machine_findings(here))
    assert len(failed(found)) == num_bad
    assert len(found) == max(1, num_bad)
    assert all(finding.remedy and "http" in finding.message + "http" for finding in failed(found))
    assert all(known.source for known in KNOWN_BAD)


@pytest.mark.parametrize("folder_kind", ["tiny", "fp8"])
def test_shapes_alone_tell_what_will_be_compiled(
    folder_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same configurations as the loaded runners name."""
    allow_packing_on_cpu(monkeypatch)
    monkeypatch.setattr("ownpath.kernels.fp8.linear.num_sms", lambda _: 132)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 136}
    folder = TINY if folder_kind == "tiny" else random_checkpoint(tmp_path, "modelopt-experts-only", **sizes).folder
    subject = subject_on(folder, "sm_90")
    from_shapes = {c.name for configs in configs_of(subject.plan, subject.index).values() for c in configs}
    part = load_part(subject, lambda _: True)
    assert from_shapes == {config.name for config in compile_configs(part.runners.values())}
    assert len(from_shapes) > 10


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The embedded model planned for Hopper, with a kernel cache of its own."""
    monkeypatch.setenv("OWNPATH_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ownpath.kernels.fp8.linear.num_sms", lambda _: 132)
    return subject_on(TINY, "sm_90")


def of_kernel(found: list[Finding], name: str) -> Finding:
    (finding,) = (finding for finding in found if finding.where == name)
    return finding


def test_a_kernel_that_is_neither_compiled_nor_to_be_compiled_fails(
    hopper: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = configs_of(hopper.plan, hopper.index)
    with_compiler = list(stage.kernel_findings(hopper.plan, configs))
    assert not failed(with_compiler)
    assert "to be compiled at load" in of_kernel(with_compiler, "cute.nvfp4_moe").message
    monkeypatch.setattr(stage, "why_not", lambda: "no compiler is installed")
    without = list(stage.kernel_findings(hopper.plan, configs))
    assert {finding.where for finding in failed(without)} == set(configs)
    for found in configs.values():
        for config in found:
            cache.store(config, b"\x7fELF code", {"entry": "kernel", "num_threads": 128, "cluster": 1})
    assert not failed(stage.kernel_findings(hopper.plan, configs))


def test_a_kernel_whose_module_cannot_be_imported_fails(hopper: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from ownpath.kernels.registry import KERNELS

    monkeypatch.setitem(KERNELS._places, "triton.router", "no_such_module:router")
    failures = failed(stage.kernel_findings(hopper.plan, configs_of(hopper.plan, hopper.index)))
    assert [(finding.id, finding.where) for finding in failures] == [("E02", "triton.router")]


def test_damaged_and_stale_kernels_on_disk_are_told_apart(hopper: Subject) -> None:
    configs = [config for found in configs_of(hopper.plan, hopper.index).values() for config in found]
    facts = {"entry": "kernel", "num_threads": 128, "cluster": 1}
    for config in configs[:4]:
        cache.store(config, b"\x7fELF code", facts)
    old = cache.cache_dir() / f"{configs[0].name}-0123456789abcdef.json"
    old.write_text("{}")
    (intact,) = stage.cache_findings(configs)
    assert intact.verdict is Verdict.PASS
    assert intact.message.startswith("4 kernels")
    assert "1 of other sources" in intact.message
    cache.stem(configs[1]).with_suffix(".cubin").write_bytes(b"nothing")
    cache.stem(configs[2]).with_suffix(".cubin").unlink()
    cache.stem(configs[3]).with_suffix(".json").write_text("{}")
    found = failed(stage.cache_findings(configs))
    assert [finding.where for finding in found] == [f"{cache.stem(config).name}.json" for config in configs[1:4]]


def test_tuned_tables_say_where_they_come_from(tmp_path: Path) -> None:
    own = list(stage.table_findings(stage.TUNED, Machine("NVIDIA H200", 90, "", {})))
    assert len(own) == 3
    assert all(finding.verdict is Verdict.PASS and "perhaps" not in finding.message for finding in own)
    other = list(stage.table_findings(stage.TUNED, Machine("NVIDIA H100 PCIe", 90, "", {})))
    assert all("this is NVIDIA H100 PCIe" in finding.message for finding in other)
    assert not failed(other)
    (tmp_path / "moe.json").write_text(json.dumps({"entries": {}}))
    (broken,) = stage.table_findings(tmp_path, Machine("cpu", None, "", {}))
    assert (broken.id, broken.where, broken.verdict) == ("E03", "moe.json", Verdict.FAIL)


def test_memory_is_asked_for_two_layers_and_for_the_whole() -> None:
    subject = subject_on(TINY)
    plenty = {finding.where: finding for finding in stage.memory_findings(subject, 2**40)}
    two, whole = plenty["two layers"], plenty["whole model"]
    assert two.verdict is whole.verdict is Verdict.PASS
    plan, index = planned(TINY, subject.engine)
    stored = sum(info.num_bytes for info in index.tensors.values())
    assert two.number is not None
    assert whole.number is not None
    assert whole.number > stored, "operands take what is stored, and caches come on top"
    assert 2 / plan.config.num_hidden_layers * 0.8 * stored < two.number < stored
    between = {f.where: f for f in stage.memory_findings(subject, int(two.number))}
    assert between["two layers"].verdict is Verdict.PASS
    assert between["whole model"].verdict is Verdict.SKIPPED
    assert "layer by layer" in between["whole model"].message
    few = {f.where: f for f in stage.memory_findings(subject, int(two.number) - 1)}
    assert few["two layers"].verdict is Verdict.FAIL
    unknown = {f.where: f for f in stage.memory_findings(subject, None)}
    assert unknown["two layers"].verdict is Verdict.SKIPPED


def test_free_memory_is_a_plausible_number() -> None:
    free = stage.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
