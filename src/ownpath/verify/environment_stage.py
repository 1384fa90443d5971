"""Stage ``environment``: checks that this machine can run the plan as it stands. Reads no weight, launches nothing."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ownpath.kernels
from ownpath.files import FileError
from ownpath.finding import Finding, Verdict
from ownpath.inspect.memory import cache_bytes, weights_bytes
from ownpath.kernels.contract import Config
from ownpath.kernels.dsl.cache import (
    CacheError,
    cache_dir,
    is_cached,
    is_noted,
    read_entry,
    require_own,
    source_key,
    stem,
)
from ownpath.kernels.dsl.compiler import compiler_name, why_not
from ownpath.kernels.registry import KERNELS, spec_of
from ownpath.plan.plan import Plan
from ownpath.verify.launch_configs import configs_of
from ownpath.verify.layer import in_layer, in_no_layer, restrict_plan
from ownpath.verify.machine import KNOWN_BAD, Machine, free_bytes, this_machine
from ownpath.verify.subject import Subject

TUNED = Path(ownpath.kernels.__path__[0])
_ELF = b"\x7fELF"
_MISSING = "pip install 'ownpath[cute]', or bring a kernel cache that was filled"
_CACHE = "delete the file and its .cubin: it will be compiled anew"
_OWN = "give it to this user alone (chown, chmod go-w), or name another folder in OWNPATH_KERNEL_CACHE"
_TABLE = "take the file from the release, or write it anew: ownpath bench --tune"


def environment_stage(subject: Subject) -> Iterator[Finding]:
    """Runs E01 to E04."""
    machine = this_machine(subject.device)
    yield from machine_findings(machine)
    configs = configs_of(subject.plan, subject.index)
    yield from kernel_findings(subject.plan, configs)
    yield from table_findings(TUNED, machine)
    yield from cache_findings([config for found in configs.values() for config in found])
    yield from memory_findings(subject, free_bytes(subject.device))


def machine_findings(machine: Machine) -> Iterator[Finding]:
    """E01: looks for combinations that are known to fail."""
    bad = [known for known in KNOWN_BAD if known.applies(machine)]
    for known in bad:
        yield Finding("E01", machine.device, Verdict.FAIL, f"{known.what} ({known.source})", remedy=known.remedy)
    if not bad:
        told = [f"{name} {version}" for name, version in machine.versions.items() if version]
        driver = [f"driver {machine.driver}"] if machine.driver else []
        message = ", ".join([machine.device, *driver, *told])
        yield Finding("E01", machine.device, Verdict.PASS, message, 0, f"none of {len(KNOWN_BAD)} known combinations")


def kernel_findings(plan: Plan, configs: dict[str, list[Config]]) -> Iterator[Finding]:
    """E02: checks that each planned kernel's implementation exists. configs: per kernel compiled to disk, its variants.

    The plan holds one kernel for each slot and nothing replaces it at run time, so there is no fallback: a missing
    kernel would be an error at its first call.
    """
    counts = Counter(op.choice.kernel.name for op in plan.decided)
    for name, num_slots in sorted(counts.items()):
        slots = f"for {num_slots} operations"
        try:
            KERNELS[name]
        except (ImportError, OSError, AttributeError) as error:
            message = f"{slots}: its module cannot be imported: {error}"
            yield Finding("E02", name, Verdict.FAIL, message, remedy="install the package it needs", kernel=name)
            continue
        missing = [config for config in configs.get(name, []) if not is_cached(config)]
        if missing and (lack := why_not()):
            message = f"{slots}: {len(missing)} of {len(configs[name])} are not compiled, {missing[0].name} among them"
            remedy = f"{lack}: {_MISSING} by {compiler_name()}"
            yield Finding("E02", name, Verdict.FAIL, message, len(missing), "all, or a compiler", remedy, name)
        else:
            how = _describe_compilation(name, configs.get(name, []), len(missing))
            yield Finding("E02", name, Verdict.PASS, f"{slots}: {how}", len(missing), kernel=name)


def _describe_compilation(name: str, configs: list[Config], num_missing: int) -> str:
    if configs:
        left = f", {num_missing} to be compiled at load" if num_missing else ""
        return f"{len(configs) - num_missing} of {len(configs)} variants compiled on disk{left}"
    if "triton" in spec_of(name).packages:
        return "Triton compiles it at its first call"
    return "torch's own operations"


def table_findings(folder: Path, machine: Machine) -> Iterator[Finding]:
    """E03: checks that tables of tuned tiles are readable, and says where they were measured.

    They choose between kernels that are all right, so another device's table costs time and nothing else.
    """
    for path in sorted(folder.rglob("*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            measured, entries = table["measured"], table["entries"]
            where, versions = str(measured["device"]), dict(measured["versions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"not a tuned table: {type(error).__name__} {error}"
            yield Finding("E03", path.name, Verdict.FAIL, message, remedy=_TABLE)
            continue
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        message = f"{len(entries)} entries, measured on {where} with {told}"
        if machine.sm is not None and machine.device != where:
            message += f"; this is {machine.device}: right, but perhaps not the fastest"
        yield Finding("E03", path.name, Verdict.PASS, message)


def cache_findings(configs: list[Config]) -> Iterator[Finding]:
    """E03: checks that kernels on disk are whole, and compiled from these sources."""
    if not configs:
        yield Finding("E03", "kernel cache", Verdict.SKIPPED, "no planned kernel is compiled to disk")
        return
    try:
        require_own(cache_dir())
    except CacheError as error:
        yield Finding("E03", "kernel cache", Verdict.FAIL, str(error), remedy=_OWN)
        return
    cached = [config for config in configs if is_noted(config)]
    broken = [(config, fault) for config in cached if (fault := _fault(config))]
    for config, fault in broken:
        where = stem(config).with_suffix(".json").name
        yield Finding("E03", where, Verdict.FAIL, f"in {cache_dir()}: {fault}", remedy=_CACHE)
    if not broken:
        stale = _num_stale(configs)
        message = f"{len(cached)} kernels of these sources in {cache_dir()}"
        message += f"; {stale} of other sources or compilers lie beside them, and are never loaded" if stale else ""
        yield Finding("E03", "kernel cache", Verdict.PASS, message, 0, "0 damaged")


def _fault(config: Config) -> str:
    """Describes what is wrong with a kernel's two files; empty if nothing is."""
    try:
        kernel = read_entry(config)
    except FileError as error:
        return str(error)
    return "" if kernel.code.startswith(_ELF) else "its machine code is no ELF file"


def _num_stale(configs: list[Config]) -> int:
    """Counts kernels of the same names under another key."""
    keys = {config.name: source_key(config.sources) for config in configs}
    names = (path.stem.rpartition("-") for path in cache_dir().glob("*.json"))
    return sum(1 for name, _, key in names if name in keys and keys[name] != key)


def memory_findings(subject: Subject, free: int | None) -> Iterator[Finding]:
    """E04: checks that two layers fit, for verifying; serving needs room for the whole model."""
    plan, index, config = subject.plan, subject.index, subject.config
    if free is None:
        yield Finding("E04", "two layers", Verdict.SKIPPED, "the system does not say how much memory is free")
    else:
        parts = [in_no_layer(config), *(in_layer(layer.name) for layer in config.backbone_layers())]
        needed = 2 * max(weights_bytes(restrict_plan(plan, holds), index) for holds in parts)
        verdict = Verdict.PASS if needed <= free else Verdict.FAIL
        message = f"{_gib(needed)} for two layers at a time, {_gib(free)} are free"
        remedy = "free memory on the device, or verify on another (--device)"
        yield Finding("E04", "two layers", verdict, message, needed, f"<= {free} bytes", remedy)
        num_tokens = min(subject.engine.max_model_len, config.max_position_embeddings)
        caches = cache_bytes(plan, num_tokens, subject.engine.dtype, subject.engine.cache_format)
        whole = weights_bytes(plan, index) + caches
        message = f"{_gib(whole)} with the caches of one sequence of {num_tokens} tokens, {_gib(free)} are free"
        if whole <= free:
            yield Finding("E04", "whole model", Verdict.PASS, message, whole, f"<= {free} bytes")
        else:
            message += ": it can be verified here, layer by layer, and not served"
            yield Finding("E04", "whole model", Verdict.SKIPPED, message, whole, f"<= {free} bytes")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
