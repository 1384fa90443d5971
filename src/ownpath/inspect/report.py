"""Formats an inspection for people and for programs."""

from collections import Counter
from dataclasses import asdict

from rich.console import RenderableType

from ownpath.checkpoint.problems import REMEDIES
from ownpath.finding import Finding, failed, warned
from ownpath.inspect.inspection import Contents, Inspection
from ownpath.inspect.memory import CacheMemory, Memory
from ownpath.inspect.module_rows import bytes_by_format, module_rows, num_parameters
from ownpath.plan.input_scales import missing_input_scales
from ownpath.terminal.page import Listing, fact, line
from ownpath.terminal.text import counted, size_text

MAX_LINES = 8
"""Lines shown for one kind of problem; the rest is counted. ``--json`` has them all."""
_NUMBERS = frozenset({4, 5})
_SHAPE = (
    ("num_hidden_layers", "layers"),
    ("hidden_size", "hidden"),
    ("num_attention_heads", "heads"),
    ("n_routed_experts", "experts"),
    ("num_experts_per_tok", "per token"),
    ("moe_intermediate_size", "expert width"),
    ("vocab_size", "vocabulary"),
    ("num_hash_layers", "hash layers"),
)


def inspection_dict(inspection: Inspection) -> dict[str, object]:
    """Returns the inspection for programs; the keys are documented in docs/inspect.md."""
    index, contents = inspection.index, inspection.contents
    problems = [
        {"check": p.id, "severity": p.verdict.value.lower(), "where": p.where, "problem": p.message, "remedy": p.remedy}
        for p in inspection.problems
    ]
    common: dict[str, object] = {
        "folder": str(inspection.folder),
        "complete": contents is not None,
        "num_tensors": len(index.tensors),
        "num_files": len({info.file for info in index.tensors.values()}),
        "num_bytes": sum(info.num_bytes for info in index.tensors.values()),
        "seconds": round(inspection.seconds, 3),
    }
    end, release = inspection.end_tokens, inspection.release
    common["end_tokens"] = (
        None if end is None else {str(token_id): list(files) for token_id, files in end.sources.items()}
    )
    common["release"] = None if release is None else asdict(release)
    return common | (_contents_dict(inspection, contents) if contents else {}) | {"problems": problems}


def _contents_dict(inspection: Inspection, contents: Contents) -> dict[str, object]:
    index, census, blocks = inspection.index, contents.census, contents.blocks
    return {
        "shape": {field: getattr(contents.config, field) for field, _ in _SHAPE},
        "num_parameters": num_parameters(census, index),
        "bytes_by_format": bytes_by_format(census, index),
        "modules": [asdict(row) for row in module_rows(census, index)],
        "not_read": dict(Counter(census.ignored.values())),
        "block_scales": {
            "read": "all" if inspection.are_all_scales_read else "sample",
            "num_modules": blocks.num_modules,
            "num_blocks": blocks.num_blocks,
            "num_zero": blocks.num_zero,
            "num_saturated": blocks.num_saturated,
        },
        "lossless_casts": list(blocks.lossless_casts),
        "calibration": {name: asdict(coverage) for name, coverage in contents.calibration.items()},
        "gate_up": asdict(contents.gate_up),
        "missing_input_scales": asdict(missing_input_scales(census.modules)),
        "absent": dict(index.absent),
        "magnitudes": {
            "num_tensors": contents.magnitudes.num_tensors,
            "num_values": contents.magnitudes.num_values,
            "farthest": contents.magnitudes.farthest,
        },
        "memory": [asdict(memory) for memory in contents.memory],
    }


def inspection_page(inspection: Inspection) -> list[RenderableType]:
    """Returns a page: the checkpoint, how it is stored, what it takes to run, and what is wrong with it."""
    index, contents = inspection.index, inspection.contents
    files = counted(len({info.file for info in index.tensors.values()}), "file")
    total = sum(info.num_bytes for info in index.tensors.values())
    tensors = counted(len(index.tensors), "tensor")
    parts: list[RenderableType] = [fact(str(inspection.folder), f"{tensors}, {size_text(total)} in {files}")]
    if contents is not None:
        parts += _contents_parts(inspection, contents)
    if inspection.end_tokens is not None:
        ends = (f"{token_id} ({' and '.join(files)})" for token_id, files in inspection.end_tokens.sources.items())
        parts.append(fact("answers end at token", " or ".join(ends)))
    if inspection.release is not None:
        parts.append(fact("release of the chat format", str(inspection.release)))
    return [*parts, line(""), *_problem_parts(inspection), line(f"read in {inspection.seconds:.1f} s", style="dim")]


def _contents_parts(inspection: Inspection, contents: Contents) -> list[RenderableType]:
    index, census = inspection.index, contents.census
    shape = ", ".join(f"{label} {getattr(contents.config, field)}" for field, label in _SHAPE)
    sizes = ", ".join(f"{name} {size_text(size)}" for name, size in bytes_by_format(census, index).items())
    parts: list[RenderableType] = [fact("shape", shape), fact("parameters", f"{num_parameters(census, index):,}")]
    parts += [fact("bytes", sizes), line("")]
    rows = []
    for row in module_rows(census, index):
        cells = (f"{row.shape[0]} x {row.shape[1]}", str(row.num_modules), size_text(row.num_bytes))
        rows.append((row.modules, row.encoding, row.format, *cells))
    parts.append(Listing(("module", "stored as", "format", "shape", "modules", "bytes"), rows, to_right=_NUMBERS))
    for reason, count in Counter(census.ignored.values()).items():
        parts.append(fact("not read", f"{counted(count, 'tensor')} ({reason})"))
    for shard, count in Counter(index.absent.values()).items():
        told_of = f"{counted(count, 'tensor')} that the index lists in {shard!r}; nothing but a draft needs them"
        parts.append(fact("not there", told_of))
    told = [*_scale_facts(inspection, contents), *map(_memory_fact, contents.memory)]
    return [*parts, line(""), *(fact(label, text) for label, text in told)]


def _scale_facts(inspection: Inspection, contents: Contents) -> list[tuple[str, str]]:
    blocks = contents.blocks
    which = "all of them" if inspection.are_all_scales_read else "a sample: the first 4 KiB of every module's"
    found = f"{blocks.num_zero:,} zero, {blocks.num_saturated:,} at the largest number"
    modules = counted(blocks.num_modules, "module")
    told = [("block scales", f"{blocks.num_blocks:,} of {modules} ({which}); {found}")]
    if blocks.cast_slots:
        operands = counted(len(blocks.cast_slots), "NVFP4 operand")
        told.append(("cast from MXFP4 without loss", f"{len(blocks.lossless_casts)} of {operands}"))
    if contents.gate_up.num_pairs:
        pairs = contents.gate_up
        experts = counted(pairs.num_pairs, "expert")
        told.append(("gate and up share a global scale", f"{pairs.num_equal} of {experts}"))
    missing = missing_input_scales(contents.census.modules)
    if missing.num_modules:
        modules, kernels = counted(missing.num_modules, "NVFP4 module"), ", ".join(missing.needed_by)
        told.append(("no input scale", f"{modules}; kernels that would need it: {kernels}"))
    for projection, coverage in contents.calibration.items():
        own = counted(coverage.num_own, "expert has its own", "experts have their own")
        shared = counted(coverage.num_shared, "has", "have")
        told.append((f"input_scale of {projection}", f"{own}, {shared} the maximum of their layer"))
    seen = contents.magnitudes
    tensors = counted(seen.num_tensors, "tensor")
    sampled = f"{seen.num_values:,} values of {tensors} (rows spread over each)"
    told.append(("magnitudes", f"{sampled}; matrices within {seen.farthest:.3g} times their peers'"))
    return told


def _memory_fact(memory: Memory) -> tuple[str, str]:
    label = f"memory on {memory.device}"
    if memory.refusal is not None:
        return label, f"cannot run ({memory.refusal})"
    cache = f"{size_text(memory.cache_bytes)} for each sequence of {counted(memory.num_tokens, 'token')}"
    caches = "; ".join(map(_cache_text, memory.caches))
    return label, f"{size_text(memory.weights_bytes)} of weights, {cache} ({memory.activations}). Caches: {caches}"


def _cache_text(cache: CacheMemory) -> str:
    if cache.refusal:
        return f"{cache.format}: cannot be ({cache.refusal})"
    fixed = f"{size_text(cache.request_bytes)} a request and {size_text(cache.snapshot_bytes)} a snapshot"
    return f"{cache.format}: {cache.token_bytes:,.0f} bytes a token, {fixed}"


def _problem_parts(inspection: Inspection) -> list[RenderableType]:
    """Lists the problems, by kind, then the warnings."""
    problems, warnings = failed(inspection.problems), warned(inspection.problems)
    if problems:
        parts = [line(f"{counted(len(problems), 'problem')}:", style="bold red"), *_by_kind(problems)]
    else:
        parts = [line("no problems found", style="green")]
    if warnings:
        parts += [line(f"{counted(len(warnings), 'warning')}:", style="bold yellow"), *_by_kind(warnings)]
    return parts


def _by_kind(problems: list[Finding]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for check, count in Counter(problem.id for problem in problems).items():
        messages = [problem.message for problem in problems if problem.id == check]
        parts += [line(f"[{check}] {message}", indent=2) for message in messages[:MAX_LINES]]
        if count > MAX_LINES:
            parts.append(line(f"[{check}] and {count - MAX_LINES:,} more (--json lists them)", indent=2))
        parts.append(fact("remedy", REMEDIES[check], indent=4))
    return parts
