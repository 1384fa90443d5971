"""The stages of a verification, in order. A stage is one row of ``STAGES``; each also runs alone."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ownpath.checkpoint.errors import CheckpointError
from ownpath.checkpoint.index import scan_checkpoint
from ownpath.checkpoint.problems import make_problem
from ownpath.config import ConfigError, EngineConfig
from ownpath.finding import Finding, Verdict, failed
from ownpath.kernels.spec import InputRounding
from ownpath.loading import WindowOpener
from ownpath.model.build import ALONE
from ownpath.plan.errors import MissingInputScaleError, PlanError
from ownpath.plan.show import plan_dict
from ownpath.ranks.peers import Peers
from ownpath.terminal.progress import Progress
from ownpath.verify.environment_stage import environment_stage
from ownpath.verify.file_stage import file_stage
from ownpath.verify.kernel_stage import kernel_stage
from ownpath.verify.layer_stage import layer_stage
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.ledger_check import RanSlot, check_ledger
from ownpath.verify.load_stage import load_stage
from ownpath.verify.progress import StageProgress
from ownpath.verify.subject import Selection, Subject


@dataclass
class VerifyJob:
    """One verification to run. source: another export of the same model. work: where a stage may keep its state.

    written_plan: an earlier output of ``ownpath plan --json`` that should be what runs; ``None``: the plan of now.
    peers: the ranks that run it together, each of which verifies its part; open_window: as of ``load_model``.
    subject: the checkpoint's plan for the device, made when a stage first asks for it.
    """

    folder: Path
    engine: EngineConfig = field(default_factory=EngineConfig)
    selection: Selection = field(default_factory=Selection)
    source: Path | None = None
    work: Path | None = None
    written_plan: Mapping[str, object] | None = None
    peers: Peers = ALONE
    open_window: WindowOpener | None = None

    @cached_property
    def subject(self) -> Subject:
        """The checkpoint's plan. Errors: ConfigError, CheckpointError, PlanError; ValueError for an unknown layer or
        device."""
        return Subject.of(self.folder, self.engine, self.selection, self.peers, self.open_window)


def _run_file_stage(job: VerifyJob, progress: StageProgress) -> Iterator[Finding]:
    """Runs the file stage. What only the plan misses, a scale that its numerics need, is one of its findings."""
    missing = list[Finding]()
    readers = frozenset[str]()
    try:
        readers = _input_readers(job)
    except MissingInputScaleError as error:
        found = f"tensor {error.where!r} is missing, and no kernel for these numerics can do without"
        missing.append(make_problem("missing-tensor", error.where, found))
    except (ConfigError, CheckpointError, PlanError):
        pass  # the stages after this one say so
    yield from file_stage(job.folder, job.selection, job.source, progress, readers, job.engine.reference, missing)


def _input_readers(job: VerifyJob) -> frozenset[str]:
    """Returns the modules whose planned kernels read the scale of their input. Errors: as ``VerifyJob.subject``."""
    ops = job.subject.plan.ops
    reading = (op for op in ops if op.choice.kernel.rounding is InputRounding.NVFP4)
    return frozenset(module.name for op in reading for module in op.spec.modules)


StageRun = Callable[[VerifyJob, StageProgress], Iterator[Finding | Measurement | RanSlot]]

STAGES: MappingProxyType[str, StageRun] = MappingProxyType(
    {
        "file": _run_file_stage,
        "environment": lambda job, _: environment_stage(job.subject),
        "load": lambda job, progress: load_stage(job.subject, progress, job.work),
        "kernels": lambda job, progress: kernel_stage(job.subject, progress, job.work),
        "layers": lambda job, progress: layer_stage(job.subject, progress, job.work),
        "ledger": lambda job, progress: check_ledger(
            job.subject, job.written_plan or plan_dict(job.subject.plan), progress
        ),
    }
)
"""Stage -> its function, in the order in which they run."""


@dataclass(frozen=True)
class StageResult:
    """skipped: why the stage did not run, or did not finish; empty where it did.

    measurements: of the layers stage, every value's distance from the reference's. ran: of the ledger stage, every
    slot that a prompt called, with its kernel.
    """

    name: str
    findings: tuple[Finding, ...]
    seconds: float
    skipped: str = ""
    measurements: tuple[Measurement, ...] = ()
    ran: tuple[RanSlot, ...] = ()


@dataclass(frozen=True)
class Verification:
    """The results of every stage that was asked for. unreadable: why nothing could be compared; empty where it
    could. engine: whose layers were looked at, where they are not ours."""

    job: VerifyJob
    stages: tuple[StageResult, ...]
    unreadable: str = ""
    engine: str = ""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all stages, in their order."""
        return tuple(finding for stage in self.stages for finding in stage.findings)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """The measurements of all stages, layer by layer."""
        return tuple(measured for stage in self.stages for measured in stage.measurements)

    @property
    def ran(self) -> tuple[RanSlot, ...]:
        """The slots that a prompt called, with their kernels; empty without the ledger stage."""
        return tuple(call for stage in self.stages for call in stage.ran)

    @property
    def passed(self) -> bool:
        """True if nothing failed and every stage that was asked for finished."""
        return not failed(self.findings) and not any(stage.skipped for stage in self.stages)


def verify(job: VerifyJob, names: Iterable[str], *, keeps_going: bool = False) -> Verification:
    """Runs the named stages in their order.

    keeps_going: run what follows a failed file stage too; otherwise it is skipped, because it would only find the
    consequences.
    Errors: ValueError for an unknown layer, device or stage.
    """
    wanted = set(names)
    if not wanted <= set(STAGES):
        raise ValueError(f"there is no stage {sorted(wanted - set(STAGES))[0]!r}; stages: {', '.join(STAGES)}")
    results: list[StageResult] = []
    unreadable = ""
    for name in (name for name in STAGES if name in wanted):
        if results and not keeps_going and _stops(results[0]):
            results.append(StageResult(name, (), 0.0, "the file stage failed (--keep-going runs it all the same)"))
            continue
        result = _run(name, job)
        results.append(result)
        unreadable = unreadable or _unreadable(result, job)
    return Verification(job, tuple(results), unreadable)


def _stops(result: StageResult) -> bool:
    return result.name == "file" and bool(failed(result.findings))


def _run(name: str, job: VerifyJob) -> StageResult:
    """Runs one stage to its end, or as far as it comes."""
    start = time.perf_counter()
    found: list[Finding | Measurement | RanSlot] = []
    skipped = ""
    try:
        with Progress(f"checking: {name}") as progress:
            for item in STAGES[name](job, progress):
                found.append(item)  # one by one: what came before an error is kept
    except (ConfigError, CheckpointError, PlanError) as error:
        skipped = f"there is no plan: {error}"
    except RuntimeError as error:  # a device or driver that gave up: earlier findings are kept
        first = str(error).partition("\n")[0]
        remedy = "run this stage alone; if the device is out of memory, on fewer layers (--layers)"
        found.append(Finding("RUN", f"stage {name}", Verdict.FAIL, f"did not end: {first}", remedy=remedy))
    seconds = time.perf_counter() - start
    findings = tuple(item for item in found if isinstance(item, Finding))
    measurements = tuple(item for item in found if isinstance(item, Measurement))
    ran = tuple(item for item in found if isinstance(item, RanSlot))
    return StageResult(name, findings, seconds, skipped, measurements, ran)


def _unreadable(result: StageResult, job: VerifyJob) -> str:
    """Returns why a failed stage had nothing to compare: no config.json that can be honoured, or no tensors."""
    if not result.skipped and not _stops(result):
        return ""
    try:
        job.subject  # noqa: B018
    except ConfigError as error:
        return str(error)
    except (CheckpointError, PlanError) as error:
        return "" if scan_checkpoint(job.folder).has_tensors else str(error)
    return ""
