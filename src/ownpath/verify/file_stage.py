"""Stage ``file``: reports an inspection as checks F01 to F14, and compares with another export as F13.

It needs no kernel and no engine: headers, scalars, tables, every block scale of the chosen layers, a few rows of every
weight, the tokenizer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from ownpath.chat.tokenizer import Tokenizer, TokenizerError
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.problems import make_problem
from ownpath.config import ConfigError, unread_fields
from ownpath.files import read_json_object
from ownpath.finding import Finding, Verdict
from ownpath.inspect.experts import expert_outliers, expert_spread, uncalibrated_experts
from ownpath.inspect.inspection import Contents, Inspection, inspect_folder
from ownpath.inspect.router import RouterBias, bias_problems, read_biases, repeated_ids
from ownpath.inspect.scalars import MAX_RATIO, farthest_from_median
from ownpath.inspect.tokens import generation_problems, missing_markers, token_problems
from ownpath.plan.claims import COMPARED_FIELDS
from ownpath.verify.progress import StageProgress
from ownpath.verify.source import ExpertSource, source_findings
from ownpath.verify.subject import Selection

CHECK_OF = MappingProxyType(
    {
        "F01": (
            *("folder", "file", "index", "escaping-shard", "missing-shard", "shard", "truncated-shard"),
            *("over-long-shard", "overlapping-tensors", "header-bomb", "duplicated-tensor", "unlisted-tensor"),
        ),
        "F02": ("missing-tensor", "unexpected-tensor", "draft"),
        "F03": ("wrong-dtype", "wrong-shape", "unknown-encoding"),
        "F04": ("mixed-experts", "no-kernel", "format-contradiction", "wide-scales"),
        "F05": ("scalar-scale", "reciprocal-scale", "out-of-band-scale"),
        "F06": ("gate-up-scale",),
        "F07": ("block-scale", "zero-block-scale", "vanished-blocks", "saturated-block-scale", "expert-outlier"),
        "F09": ("uncalibrated-expert", "input-scale"),
        "F10": ("expert-ids", "router-bias"),
        "F11": ("config", "config-contradiction"),
        "F12": ("tokenizer", "generation-config", "end-tokens", "token-id", "marker", "round-trip", "prompt"),
        "F14": ("weight-magnitude",),
    }
)
"""Check -> the kinds of problem that it collects."""
_ID_OF = MappingProxyType({kind: id_ for id_, kinds in CHECK_OF.items() for kind in kinds})
_INPUT_SCALES = ("input_scale", "input_global_scale")


@dataclass(frozen=True)
class FileEvidence:
    """An inspection, with the problems that this stage adds."""

    inspection: Inspection
    problems: tuple[Finding, ...]
    biases: tuple[RouterBias, ...]
    tokenizer: Tokenizer | None
    unread: tuple[str, ...]


def file_stage(
    folder: Path,
    selection: Selection,
    source: Path | None,
    progress: StageProgress,
    input_readers: frozenset[str] = frozenset(),
    reference: frozenset[str] = frozenset(),
    missing: Iterable[Finding] = (),
) -> Iterator[Finding]:
    """Runs F01 to F14: one PASS for each check, or a FAIL or WARN for each problem.

    source: another export, for F13. input_readers: modules whose planned kernels read the scale of their input: without
    a good one their answers are wrong. reference: modules that torch computes from what is stored. missing: what only
    a plan could tell to be missing.
    """
    progress(0, 2, "headers, scalars, tables, block scales")
    layers = selection.layer_ids
    inspection = inspect_folder(
        folder, read_all_scales=layers is None, all_scales_in=layers or frozenset(), reference=reference
    )
    evidence = gather(inspection)
    by_id: dict[str, list[Finding]] = {}
    for problem in (*evidence.problems, *missing):
        by_id.setdefault(check_of(problem), []).append(_judged(problem, input_readers))
    for id_, look in _CHECKS.items():
        found = by_id.get(id_, [])
        yield from (replace(problem, id=id_) for problem in found)
        if not found:
            yield look(evidence)
    progress(1, 2, "another export")
    yield from _against_source(folder, selection, source, progress)


def check_of(problem: Finding) -> str:
    """Returns the check that a problem belongs to: by its kind, and for scalars by whose scale it is."""
    id_ = _ID_OF[problem.id]
    return "F09" if id_ == "F05" and problem.where.endswith(_INPUT_SCALES) else id_


def _judged(problem: Finding, input_readers: frozenset[str]) -> Finding:
    """Makes a failure of a warning about an input scale that a planned kernel reads."""
    is_read = check_of(problem) == "F09" and problem.where.rpartition(".")[0] in input_readers
    return replace(problem, verdict=Verdict.FAIL) if is_read else problem


def gather(inspection: Inspection) -> FileEvidence:
    """Collects every problem, the inspection's own first."""
    folder, contents = inspection.folder, inspection.contents
    problems = list(inspection.problems)
    biases: tuple[RouterBias, ...] = ()
    unread: tuple[str, ...] = ()
    if contents is not None:
        broken = inspection.broken
        problems += expert_outliers(contents.blocks.largest, contents.scalars)
        problems += uncalibrated_experts(contents.scalars)
        params, index = contents.census.params, inspection.index
        biases = read_biases(params, index, broken, problems)
        problems += bias_problems(biases)
        problems += list(repeated_ids(params, index, broken, problems))
        problems += generation_problems(folder, contents.config)
        fields = read_json_object(folder / "config.json")
        unread = tuple(name for name in unread_fields(fields) if name not in COMPARED_FIELDS)
    tokenizer = _tokenizer(folder, problems)
    problems += token_problems(tokenizer) if tokenizer is not None else ()
    return FileEvidence(inspection, tuple(dict.fromkeys(problems)), biases, tokenizer, unread)


def _tokenizer(folder: Path, problems: list[Finding]) -> Tokenizer | None:
    """Opens the tokenizer; ``None`` where the inspection could not read it either, and reported that."""
    if any(problem.id == "tokenizer" for problem in problems):
        return None
    try:
        return Tokenizer.from_folder(folder)
    except TokenizerError as error:
        problems.append(make_problem("tokenizer", "tokenizer.json", str(error)))
        return None


def _pass(id_: str, message: str, number: float | None = None, allowed: str = "") -> Finding:
    return Finding(id_, "checkpoint", Verdict.PASS, message, number, allowed)


def _of_tensors(id_: str, look: Callable[[FileEvidence, Contents], Finding]) -> Callable[[FileEvidence], Finding]:
    """Makes a check that needs config.json and tensors; without them it is skipped."""

    def looked(evidence: FileEvidence) -> Finding:
        contents = evidence.inspection.contents
        if contents is None:
            return Finding(id_, "checkpoint", Verdict.SKIPPED, "config.json or the tensors could not be read")
        return look(evidence, contents)

    return looked


def _files(evidence: FileEvidence) -> Finding:
    tensors = evidence.inspection.index.tensors
    num_files = len({info.file for info in tensors.values()})
    return _pass("F01", f"{len(tensors)} tensors in {num_files} files", 0, "0 problems")


def _census(evidence: FileEvidence, contents: Contents) -> Finding:
    census = contents.census
    found = f"{len(census.modules)} matrices, {len(census.params)} other tensors, {len(census.ignored)} not read"
    return _pass("F02", found, 0, "0 missing or unexpected")


def _shapes(evidence: FileEvidence, contents: Contents) -> Finding:
    return _pass("F03", f"{len(contents.census.modules)} matrices", 0, "0 wrong")


def _formats(evidence: FileEvidence, contents: Contents) -> Finding:
    counts: dict[str, int] = {}
    for stored in contents.census.modules:
        counts[stored.encoding.name] = counts.get(stored.encoding.name, 0) + 1
    return _pass("F04", ", ".join(f"{n} x {name}" for name, n in counts.items()), 0, "0 contradictions")


def _global_scales(evidence: FileEvidence, contents: Contents) -> Finding:
    scalars = [scalar for scalar in contents.scalars if scalar.role == "global_scale"]
    if not scalars:
        return Finding("F05", "checkpoint", Verdict.SKIPPED, "no format here has a global scale")
    worst = farthest_from_median(scalars)
    return _pass("F05", f"{len(scalars)} global scales", worst, f"within {MAX_RATIO:g} of a layer's median")


def _gate_up(evidence: FileEvidence, contents: Contents) -> Finding:
    pairs = contents.gate_up
    if not pairs.num_pairs:
        return Finding("F06", "checkpoint", Verdict.SKIPPED, "no expert here has a global scale")
    return _pass("F06", f"{pairs.num_equal} of {pairs.num_pairs} experts share one", 0, "0 experts differ")


def _blocks(evidence: FileEvidence, contents: Contents) -> Finding:
    blocks = contents.blocks
    if not blocks.num_modules:
        return Finding("F07", "checkpoint", Verdict.SKIPPED, "no format here has block scales")
    share = blocks.num_saturated / max(1, blocks.num_blocks)
    found = f"{blocks.num_blocks} block scales: {blocks.num_zero} zero, {share:.2%} at the largest number"
    rough = blocks.num_rough
    if rough:  # no fault here: kernels multiply by the scale as it is, though others may keep exponents alone
        found += f"; {sum(rough.values())} FP8 scales in {sum(n > 0 for n in rough.values())} of {len(rough)} matrices"
        found += " are no power of two"
    spread = expert_spread(blocks.largest, contents.scalars)
    return _pass("F07", found, spread, "no expert far from its layer's median")


def _input_scales(evidence: FileEvidence, contents: Contents) -> Finding:
    if not any(scalar.role == "input_scale" for scalar in contents.scalars):
        return Finding("F09", "checkpoint", Verdict.SKIPPED, "no format here has input scales")
    shared = sum(coverage.num_shared for coverage in contents.calibration.values())
    own = sum(coverage.num_own for coverage in contents.calibration.values())
    found = f"{own} expert matrices have their own, {shared} share their layer's maximum (not reached in calibration)"
    return _pass("F09", found, shared / max(1, own + shared), "none at a default of 1")


def _router(evidence: FileEvidence, contents: Contents) -> Finding:
    biases = evidence.biases
    if not biases:
        return _pass("F10", "no layer has a router bias; tables name experts that exist, each once", 0)
    ties, largest = sum(bias.num_ties for bias in biases), max(bias.largest for bias in biases)
    unused = " (all constant: trained without)" if all(bias.is_constant for bias in biases) else ""
    found = f"{len(biases)} biases up to {largest:.3g}{unused}; {ties} experts tie with another of their layer"
    return _pass("F10", found, ties, "any: ties go to the lower id")


def _config(evidence: FileEvidence) -> Finding:
    if evidence.inspection.contents is None:
        return Finding("F11", "config.json", Verdict.SKIPPED, "there are no tensors to hold it against")
    names = ", ".join(evidence.unread) or "none"
    return _pass("F11", f"not read by this engine: {names}", len(evidence.unread), "any")


def _magnitudes(evidence: FileEvidence, contents: Contents) -> Finding:
    seen = contents.magnitudes
    message = f"{seen.num_values} values of {seen.num_tensors} tensors; every matrix is like its peers"
    return _pass("F14", message, seen.farthest, "a factor of 6, and the peers' own spread")


def _tokens(evidence: FileEvidence) -> Finding:
    if evidence.tokenizer is None:
        return Finding("F12", "tokenizer.json", Verdict.SKIPPED, "config.json could not be read")
    missing = missing_markers(evidence.tokenizer)
    found = f"{evidence.tokenizer.num_tokens} tokens; golden prompts and round trips hold"
    return _pass("F12", found + (f"; without {', '.join(missing)}" if missing else ""), 0, "0 differences")


_CHECKS: MappingProxyType[str, Callable[[FileEvidence], Finding]] = MappingProxyType(
    {
        "F01": _files,
        "F02": _of_tensors("F02", _census),
        "F03": _of_tensors("F03", _shapes),
        "F04": _of_tensors("F04", _formats),
        "F05": _of_tensors("F05", _global_scales),
        "F06": _of_tensors("F06", _gate_up),
        "F07": _of_tensors("F07", _blocks),
        "F09": _of_tensors("F09", _input_scales),
        "F10": _of_tensors("F10", _router),
        "F11": _config,
        "F12": _tokens,
        "F14": _of_tensors("F14", _magnitudes),
    }
)
"""Check -> the function that makes its finding when it found no problem."""


def _against_source(
    folder: Path, selection: Selection, source: Path | None, progress: StageProgress
) -> Iterator[Finding]:
    if source is None:
        yield Finding("F13", "checkpoint", Verdict.SKIPPED, "no other export to compare with (--source DIR)")
        return
    cpu = torch.device("cpu")
    try:
        ours, theirs = ExpertSource.of(folder, cpu), ExpertSource.of(source, cpu)
    except (ConfigError, CheckpointError) as error:
        remedy = "give the folder of a checkpoint that `ownpath inspect` can read"
        yield Finding("F13", "--source", Verdict.FAIL, f"nothing to compare: {error}", remedy=remedy)
        return
    yield from source_findings(ours, theirs, selection, progress)
