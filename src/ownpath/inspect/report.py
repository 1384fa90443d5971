"""Formats an inspection for people and for programs."""

from collections import Counter
from dataclasses import asdict

from ownpath.checkpoint.problems import REMEDIES
from ownpath.finding import Finding, failed, warned
from ownpath.inspect.inspection import Contents, Inspection
from ownpath.inspect.memory import Memory
from ownpath.inspect.module_rows import bytes_by_format, module_rows, num_parameters
from ownpath.plan.input_scales import missing_input_scales
from ownpath.plan.show import align

MAX_LINES = 8
"""Lines shown for one kind of problem; the rest is counted. ``--json`` has them all."""
MAX_WIDTH = 400
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


def inspection_text(inspection: Inspection) -> str:
    """Returns a page: the checkpoint, how it is stored, what it takes to run, and what is wrong with it."""
    index, contents = inspection.index, inspection.contents
    num_files = len({info.file for info in index.tensors.values()})
    total = sum(info.num_bytes for info in index.tensors.values())
    lines = [f"{inspection.folder}: {len(index.tensors)} tensors, {_size(total)} in {num_files} files"]
    if contents is not None:
        lines += _contents_lines(inspection, contents)
    if inspection.end_tokens is not None:
        ends = (f"{token_id} ({' and '.join(files)})" for token_id, files in inspection.end_tokens.sources.items())
        lines.append(f"answers end at token {' or '.join(ends)}")
    if inspection.release is not None:
        lines.append(f"release of the chat format: {inspection.release}")
    lines += ["", *_problem_lines(inspection), f"read in {inspection.seconds:.1f} s"]
    return "\n".join(printable(line) for line in lines)


def _contents_lines(inspection: Inspection, contents: Contents) -> list[str]:
    index, census = inspection.index, contents.census
    shape = ", ".join(f"{label} {getattr(contents.config, field)}" for field, label in _SHAPE)
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in bytes_by_format(census, index).items())
    lines = [f"shape: {shape}", f"parameters: {num_parameters(census, index):,}", f"bytes: {sizes}", ""]
    table: list[tuple[str, ...]] = [("module", "stored as", "format", "shape", "modules", "bytes")]
    for row in module_rows(census, index):
        cells = (f"{row.shape[0]} x {row.shape[1]}", str(row.num_modules), _size(row.num_bytes))
        table.append((row.modules, row.encoding, row.format, *cells))
    lines += align(table)
    for reason, count in Counter(census.ignored.values()).items():
        lines.append(f"not read: {count} tensors ({reason})")
    for shard, count in Counter(index.absent.values()).items():
        lines.append(f"not there: {count} tensors that the index lists in {shard!r}; nothing but a draft needs them")
    return [*lines, "", *_scale_lines(inspection, contents), *(_memory_line(memory) for memory in contents.memory)]


def _scale_lines(inspection: Inspection, contents: Contents) -> list[str]:
    blocks = contents.blocks
    which = "all" if inspection.are_all_scales_read else "a sample: the first 4 KiB of every module's"
    found = f"{blocks.num_zero} zero, {blocks.num_saturated} at the largest number"
    lines = [f"block scales: {blocks.num_blocks:,} of {blocks.num_modules} modules ({which}); {found}"]
    if blocks.cast_slots:
        casts = len(blocks.lossless_casts)
        lines.append(f"cast from MXFP4 without loss: {casts} of {len(blocks.cast_slots)} NVFP4 operands")
    if contents.gate_up.num_pairs:
        pairs = contents.gate_up
        lines.append(f"gate and up share a global scale: {pairs.num_equal} of {pairs.num_pairs} experts")
    missing = missing_input_scales(contents.census.modules)
    if missing.num_modules:
        kernels = ", ".join(missing.needed_by)
        lines.append(f"no input scale: {missing.num_modules} NVFP4 modules; kernels that would need it: {kernels}")
    for projection, coverage in contents.calibration.items():
        counts = f"{coverage.num_own} experts have their own, {coverage.num_shared} share the maximum"
        lines.append(f"input_scale of {projection}: {counts}")
    seen = contents.magnitudes
    sampled = f"{seen.num_values:,} values of {seen.num_tensors} tensors (rows spread over each)"
    lines.append(f"magnitudes: {sampled}; matrices within {seen.farthest:.3g} times their peers'")
    return lines


def _memory_line(memory: Memory) -> str:
    if memory.refusal is not None:
        return f"memory on {memory.device}: cannot run ({memory.refusal})"
    cache = f"{_size(memory.cache_bytes)} for each sequence of {memory.num_tokens} tokens"
    return f"memory on {memory.device}: {_size(memory.weights_bytes)} of weights, {cache} ({memory.activations})"


def _problem_lines(inspection: Inspection) -> list[str]:
    """Formats the problems, by kind, then the warnings."""
    problems, warnings = failed(inspection.problems), warned(inspection.problems)
    lines = [f"{len(problems)} problems:", *_by_kind(problems)] if problems else ["no problems found"]
    return [*lines, f"{len(warnings)} warnings:", *_by_kind(warnings)] if warnings else lines


def _by_kind(problems: list[Finding]) -> list[str]:
    lines: list[str] = []
    for check, count in Counter(problem.id for problem in problems).items():
        messages = [problem.message for problem in problems if problem.id == check]
        lines += [f"  [{check}] {message}" for message in messages[:MAX_LINES]]
        lines += [f"  [{check}] and {count - MAX_LINES} more (--json lists them)"] if count > MAX_LINES else []
        lines.append(f"    remedy: {REMEDIES[check]}")
    return lines


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def printable(line: str) -> str:
    """Escapes what a terminal would act on, since names come from files, and cuts a line that is too long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return text if len(text) <= MAX_WIDTH else f"{text[:MAX_WIDTH]}…"
