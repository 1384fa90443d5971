"""Inspects one checkpoint from all sides. Nothing here raises for what a checkpoint can get wrong."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ownpath.chat.effort import Release, find_release
from ownpath.checkpoint.drafts import Draft, carried_draft, requested_draft
from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import CheckpointIndex, Scan, scan_checkpoint
from ownpath.checkpoint.problems import make_problem
from ownpath.config import ConfigError, ModelConfig
from ownpath.end_tokens import EndTokens, read_end_tokens
from ownpath.files import FileError
from ownpath.finding import Finding, failed
from ownpath.inspect.blocks import SAMPLE_BYTES, BlockReport, read_blocks
from ownpath.inspect.expert_tables import table_problems
from ownpath.inspect.magnitudes import read_magnitudes
from ownpath.inspect.memory import KINDS, Memory, memory_needed
from ownpath.inspect.metadata import config_problems, format_problems, tokenizer_problems
from ownpath.inspect.peers import MagnitudeReport, compare_magnitudes
from ownpath.inspect.scalars import Coverage, GateUp, Scalar, calibration, gate_up, out_of_band, read_scalars
from ownpath.inspect.spans import wide_scales
from ownpath.plan.census import Census, StoredModule, take_census
from ownpath.plan.errors import MixedExpertsError, PlanError
from ownpath.plan.plan import Plan, make_plan
from ownpath.plan.select import Demands


@dataclass(frozen=True)
class Contents:
    """The tensors' content, where config.json can be read; scales and tables as far as they were read."""

    config: ModelConfig
    census: Census
    blocks: BlockReport
    calibration: dict[str, Coverage]
    gate_up: GateUp
    magnitudes: MagnitudeReport
    memory: tuple[Memory, ...]
    scalars: tuple[Scalar, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """contents: ``None`` when config.json or the tensors could not be read, so that nothing could be compared.

    are_all_scales_read: whether every block scale was read, or a sample of every module's.
    broken: shards that cannot be read.
    end_tokens: ``None`` where they cannot be read. release: ``None`` where what tells it cannot be read.
    """

    folder: Path
    index: CheckpointIndex
    contents: Contents | None
    problems: tuple[Finding, ...]
    are_all_scales_read: bool
    seconds: float
    broken: frozenset[Path] = frozenset()
    end_tokens: EndTokens | None = None
    release: Release | None = None


def inspect_folder(
    folder: Path,
    *,
    read_all_scales: bool = False,
    with_draft: bool = False,
    all_scales_in: frozenset[int] = frozenset(),
    reference: frozenset[str] = frozenset(),
) -> Inspection:
    """Reads headers, scalars, tables of ids, a sample (or all) of the block scales and rows of every weight, and
    collects every problem.

    all_scales_in: layers of the backbone whose block scales are all read, beside a sample of the others'.
    with_draft: look at the draft as at the backbone; otherwise they are counted as not read.
    reference: modules that torch is to compute from what is stored, see ``EngineConfig``.
    """
    start = time.perf_counter()
    problems: list[Finding] = []
    scan = scan_checkpoint(folder)
    problems += scan.problems
    config = _config(folder, problems)
    contents = None
    if config is not None:
        problems += tokenizer_problems(folder, config)
        if scan.has_tensors:
            problems += config_problems(config, scan.index)
            draft = _draft(config, scan.index, with_draft, problems)
            prefixes = ("",) if read_all_scales else tuple(f"layers.{idx}." for idx in sorted(all_scales_in))
            contents = _contents(config, draft, scan, problems, prefixes, reference)
    seconds = time.perf_counter() - start
    unique = tuple(dict.fromkeys(problems))
    end_tokens = None if config is None else _end_tokens(folder, config)
    return Inspection(
        folder, scan.index, contents, unique, read_all_scales, seconds, scan.broken, end_tokens, _release(folder)
    )


def _end_tokens(folder: Path, config: ModelConfig) -> EndTokens | None:
    try:
        return read_end_tokens(folder, config)
    except ConfigError:
        return None  # a problem of the tokenizer's


def _release(folder: Path) -> Release | None:
    try:
        return find_release(folder)
    except FileError:
        return None  # config.json's problem, or one of no consequence here


def _config(folder: Path, problems: list[Finding]) -> ModelConfig | None:
    path = folder / "config.json"
    try:
        return ModelConfig.from_file(path)
    except ConfigError as error:
        problems.append(make_problem("config", "config.json", str(error)))
        return None


def _draft(config: ModelConfig, index: CheckpointIndex, with_draft: bool, problems: list[Finding]) -> Draft:
    """Plans the draft as asked for. If it cannot be read, that is a problem, and it stays unread."""
    if with_draft:
        try:
            return requested_draft(config, index)
        except CheckpointError as error:
            problems.append(make_problem("draft", "mtp", str(error)))
    return carried_draft(index)


def _contents(
    config: ModelConfig,
    draft: Draft,
    scan: Scan,
    problems: list[Finding],
    whole: tuple[str, ...],
    reference: frozenset[str],
) -> Contents | None:
    """Reads what the tensors hold. whole: prefixes of modules whose block scales are all read."""
    index, broken = scan.index, scan.broken
    num_matrices = 3 * (config.num_hidden_layers + draft.num_modules) * config.n_routed_experts
    if num_matrices > 10_000 + 4 * len(index.tensors):  # counting billions of experts would take hours
        found = f"asks for {num_matrices} expert matrices; the checkpoint holds {len(index.tensors)} tensors"
        problems.append(
            make_problem("config-contradiction", "n_routed_experts", f"config.json: n_routed_experts {found}")
        )
        return None
    census = take_census(config, index, draft)
    problems += _not_explained(census, scan)
    problems += format_problems(index.folder, config, census.modules)
    scalars = read_scalars(census.modules, index, broken, problems)
    problems += out_of_band(scalars)
    pairs = gate_up(scalars, problems)

    def max_bytes(name: str) -> int | None:
        return None if name.startswith(whole) else SAMPLE_BYTES

    def max_bytes_of(stored: StoredModule) -> int | None:
        return max_bytes(stored.spec.name)

    blocks = read_blocks(census.modules, scalars, index, broken, problems, max_bytes_of)
    sampled = read_magnitudes(census.modules, census.params, scalars, index, broken, problems)
    magnitudes = compare_magnitudes(sampled, config.rms_norm_eps)
    problems += _beyond(magnitudes.problems, problems)
    problems += table_problems(census.params, config.n_routed_experts, index, broken)
    plan = None if census.problems else _plan(config, draft, index, problems, reference)
    if plan is not None:
        problems += wide_scales(plan, blocks.exponents, index, broken, max_bytes)
    memory = () if plan is None else memory_needed(plan, index)
    return Contents(config, census, blocks, calibration(scalars), pairs, magnitudes, memory, scalars)


def _beyond(magnitudes: Iterable[Finding], problems: Iterable[Finding]) -> list[Finding]:
    """Returns the odd magnitudes of weights without a failure of their own scales, which would explain them."""
    explained = {problem.where.rpartition(".")[0] for problem in failed(problems)}
    return [problem for problem in magnitudes if problem.where not in explained]


def _not_explained(census: Census, scan: Scan) -> list[Finding]:
    """Returns the census' problems, without tensors that the scan already reported as missing."""
    known = {problem.where for problem in scan.problems if problem.id == "missing-tensor"}
    return [p for p in census.problems if not (p.id == "missing-tensor" and p.where in known)]


def _plan(
    config: ModelConfig, draft: Draft, index: CheckpointIndex, problems: list[Finding], reference: frozenset[str]
) -> Plan | None:
    """Plans the model, and finds the claims of config.json that the tensors do not bear out; ``None``: it cannot be
    planned."""
    try:
        plan = make_plan(config, index, KINDS[0], Demands(reference=reference), loads_draft=draft.num_modules > 0)
    except MixedExpertsError as error:
        problems.append(make_problem("mixed-experts", error.where, str(error)))
        return None
    except PlanError as error:
        problems.append(make_problem("no-kernel", "plan", str(error)))
        return None
    problems += [make_problem("format-contradiction", "config.json", line) for line in plan.contradictions]
    return plan
