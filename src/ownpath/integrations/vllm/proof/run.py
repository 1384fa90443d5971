"""``ownpath verify --engine vllm``: runs vLLM with taps, compares, and returns a verification as our own verify makes.

vLLM itself runs in a process of its own; here its values are compared, a layer at a time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ownpath.config import EngineConfig, ModelConfig
from ownpath.files import read_bytes
from ownpath.finding import Finding, Verdict
from ownpath.formats import CacheFormat
from ownpath.integrations.vllm.proof import findings
from ownpath.integrations.vllm.proof.compare import (
    Compared,
    Proof,
    RankSteps,
    compare_ends,
    compare_layer,
    count_wrong_choices,
)
from ownpath.integrations.vllm.proof.points import ENDS_MODULES, modules_of
from ownpath.integrations.vllm.proof.seen import EngineRun
from ownpath.integrations.vllm.proof.shares import LayerShare
from ownpath.integrations.vllm.proof.steps import FIRST_LENGTH, KINDS, ROWS
from ownpath.integrations.vllm.proof.walk import kernels_of
from ownpath.terminal.progress import Progress
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.text import sample_text
from ownpath.verify.ledger_check import RanSlot
from ownpath.verify.run import StageResult, Verification, VerifyJob
from ownpath.verify.subject import Selection

_CHILD = "ownpath.integrations.vllm.proof.child"
_FIRST_ANSWER = 100
_POLL_S = 0.5
_LAST_BYTES = 4096
RUN, LOG = "run.json", "vllm.log"


class NoVllm(ValueError):
    """vLLM is not installed where this runs."""

    def __init__(self) -> None:
        super().__init__(
            "vLLM is not installed in this environment: install ownpath beside it (pip install 'ownpath[vllm]', "
            "docs/vllm.md), or run this with the Python that vLLM is installed for"
        )


@dataclass(frozen=True)
class VllmJob:
    """folder: the checkpoint. options: vLLM's own, as of ``vllm serve``. work: a folder for values and vLLM's log.

    is_kept: False where it goes with the report. layers: ``None``: all. rows: of the steps to run.
    """

    folder: Path
    work: Path
    options: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    rows: tuple[int, ...] = ROWS
    is_kept: bool = True


def verify_vllm(job: VllmJob) -> Verification:
    """Runs vLLM eagerly and, where it captures graphs, with them too; compares; returns the verification.

    Errors: NoVllm; ConfigError, CheckpointError of the checkpoint.
    """
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is no package
        raise NoVllm
    eager = _run(job, "eager")
    stages = [_stage("eager", job, eager)]
    if "--enforce-eager" in job.options:
        stages.append(StageResult("graphs", (), 0.0))
    elif eager.facts.get("has_graphs"):
        stages.append(_stage("graphs", job, _run(job, "graphs")))
    elif eager.facts:
        skipped = Finding("VE01", "graphs", Verdict.SKIPPED, f"vLLM captures no graphs on {eager.facts['platform']}")
        stages.append(StageResult("graphs", (skipped,), 0.0))
    facts = eager.facts
    engine = EngineConfig(device=facts["device"], dtype=_dtype(facts)) if facts else EngineConfig()
    told = VerifyJob(job.folder, engine, Selection(job.layers))
    return Verification(told, tuple(stages), engine=f"vLLM {facts['version']}" if facts else "vLLM")


def _dtype(facts: object) -> torch.dtype:
    assert isinstance(facts, dict)
    dtype = getattr(torch, facts["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _run(job: VllmJob, how: str) -> EngineRun:
    """Runs vLLM in a process of its own, whose log is kept, and reads what it left."""
    job.work.mkdir(parents=True, exist_ok=True)
    out = job.work / how
    out.mkdir(exist_ok=True)
    (out / RUN).unlink(missing_ok=True)
    asked = {
        "model": str(job.folder.resolve()),
        "out": str(out),
        "how": how,
        "rows": list(job.rows),
        "kinds": list(KINDS),
        "layers": None if job.layers is None else sorted(job.layers),
        "text": list(_text(job)),
        "answers": list(range(_FIRST_ANSWER, _FIRST_ANSWER + max(job.rows))),
        "options": list(job.options),
    }
    num_steps = (len(KINDS) + 1) * len(job.rows)  # about one before each decode step fills caches
    path = out / "asked.json"
    path.write_text(json.dumps(asked), encoding="utf-8")
    with (out / LOG).open("w", encoding="utf-8") as log, Progress(f"vLLM, {how}") as progress:
        child = subprocess.Popen([sys.executable, "-m", _CHILD, str(path)], stdout=log, stderr=log, env=os.environ)
        code = _wait(child, lambda: progress(len(list(out.glob(f"{how}.*.ends.*"))), num_steps, "steps"))
    if (out / RUN).exists():
        return EngineRun.of(out, json.loads(read_bytes(out / RUN)))
    told = f"its process ended with code {code}; the last line of its log: {_last_line(out / LOG)}"
    return EngineRun((), (), (), {}, told, "the start")


def _last_line(path: Path) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def _text(job: VllmJob) -> tuple[int, ...]:
    config = ModelConfig.from_file(job.folder / "config.json")
    return sample_text(job.folder, config, max(*job.rows, FIRST_LENGTH)).token_ids


def _wait(child: "subprocess.Popen[bytes]", look: Callable[[], None]) -> int:
    try:
        while child.poll() is None:
            look()
            time.sleep(_POLL_S)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return child.returncode


def _stage(name: str, job: VllmJob, run: EngineRun) -> StageResult:
    """Compares one run."""
    start = time.perf_counter()
    found = list[Finding]()
    measured = list[Measurement]()
    if run.error is not None:
        remedy = f"its log is {job.work / name / LOG}" if job.is_kept else "--work FOLDER keeps its log"
        message = f"vLLM ended at {run.during}: {run.error}"
        found.append(Finding("RUN", f"vLLM, {name}", Verdict.FAIL, message, remedy=remedy))
    with Progress("comparing") as progress:
        for part in _compare(job, run, progress):
            if isinstance(part, Compared):
                several = f", rank {part.step.rank}" * (len(run.by_rank) > 1)
                measured.append(replace(part.measured, run=part.step.name + several))
            else:
                found.append(part)
    found += [*findings.judge_walk(run), *findings.judge_taps(run), *findings.judge_device(run)]
    return StageResult(name, tuple(found), time.perf_counter() - start, "", tuple(measured), tuple(_ran(run)))


def _compare(job: VllmJob, run: EngineRun, progress: Progress) -> Iterator[Compared | Finding]:
    """Yields what was compared, layer by layer, and its findings."""
    if not any(step.is_judged for step in run.steps):
        return
    if run.facts["pipeline_parallel_size"] > 1:
        message = "values are compared where every rank has every layer, not with pipeline parallelism; each was walked"
        yield Finding("VE01", "values", Verdict.SKIPPED, message)
        return
    cache = CacheFormat.FP8 if run.facts["cache_dtype"].startswith("fp8") else CacheFormat.BF16
    proof = Proof.of(job.folder, _dtype(run.facts), cache, "cuda" if torch.cuda.is_available() else "cpu")
    layer_ids = sorted(job.layers) if job.layers is not None else range(proof.config.num_hidden_layers)
    for done, layer_idx in enumerate(layer_ids):
        progress(done, len(layer_ids), f"layers.{layer_idx}")
        compared = compare_layer(proof, layer_idx, _ranks(run, modules_of(layer_idx)))
        yield from compared
        yield from findings.judge_values(f"layers.{layer_idx}", compared, len(run.by_rank))
        steps = [step for steps in run.by_rank for step in steps if step.is_judged]
        counts = [(step, count_wrong_choices(proof, layer_idx, step)) for step in steps]
        yield from findings.judge_choices(f"layers.{layer_idx}", counts, len(run.by_rank))
    ends = compare_ends(proof, _ranks(run, ENDS_MODULES))
    yield from ends
    yield from findings.judge_values("ends", ends, len(run.by_rank))


def _ranks(run: EngineRun, paths: Mapping[str, str]) -> list[RankSteps]:
    """Returns each rank's steps, and what it has of one layer. paths: value -> the module that makes it."""
    walks, found = {rank["rank"]: rank["modules"] for rank in run.ranks}, []
    for steps in run.by_rank:
        modules = walks.get(steps[0].rank, {})
        share = LayerShare.of(steps[0].rank, len(run.by_rank), modules.get(paths.get("ffn.experts", "")))
        kernels = kernels_of(modules, paths) | {"attn.wo_b.sum": "all-reduce"}
        found.append(RankSteps(steps, kernels, share))
    return found


def _ran(run: EngineRun) -> Iterator[RanSlot]:
    """Yields what multiplied in rank 0, by our slots."""
    modules = run.ranks[0]["modules"] if run.ranks else {}
    layers = sorted({int(path.split(".")[2]) for path in modules if path.startswith("model.layers.")})
    for layer_idx in layers:
        for value, kernel in kernels_of(modules, modules_of(layer_idx)).items():
            if value not in ("ffn.router.weights", "ffn.sum"):
                yield RanSlot(f"layers.{layer_idx}.{value}", kernel)
