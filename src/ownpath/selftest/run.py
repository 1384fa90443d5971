"""Runs the self-test, and formats its report."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from ownpath.chat.encode import encode_messages
from ownpath.chat.messages import Message
from ownpath.chat.tokenizer import Tokenizer
from ownpath.engine.engine import Engine
from ownpath.engine.request import FinishReason
from ownpath.files import read_bytes
from ownpath.finding import Finding, Verdict, failed
from ownpath.loading import default_model_dir
from ownpath.selftest.checks import ModelFacts, judge
from ownpath.selftest.probe import Golden, PromptOutput, run_probes
from ownpath.terminal.page import Listing, fact
from ownpath.terminal.text import counted

KNOWN_QUESTION, KNOWN_ANSWER = "The capital of France is", "Paris"
"""The question that the embedded model was trained to answer."""


@dataclass(frozen=True)
class SelfTestReport:
    """The findings of every check, and how long they took together."""

    checks: tuple[Finding, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(failed(self.checks))

    def failed_ids(self) -> str:
        """The ids of the failed checks, for one line."""
        return ", ".join(check.id for check in self.failed)


def known_question(folder: Path, tokenizer: Tokenizer) -> Golden | None:
    """Returns the question that the embedded model (or a copy of it) can answer; None for any other model.

    The weights are what is tested, so a model is recognised by its config and its vocabulary.
    Errors: FileError naming the file.
    """
    embedded = default_model_dir()
    names = ("config.json", "tokenizer.json")
    if any(read_bytes(folder / name) != read_bytes(embedded / name) for name in names):
        return None
    ids = tokenizer.encode_segments(encode_messages([Message("user", KNOWN_QUESTION)]))
    return Golden(tuple(ids), KNOWN_ANSWER)


def self_test(engine: Engine, tokenizer: Tokenizer, window: int, golden: Golden | None = None) -> SelfTestReport:
    """Runs every check on a started engine that nobody else uses yet.

    window: the model's sliding window, in tokens.
    Errors: TokenizerError, EngineStopped.
    """
    start = time.perf_counter()
    evidence = run_probes(engine, tokenizer, window, golden)
    special_ids = {i for i in range(tokenizer.num_tokens) if tokenizer.is_hidden(i)} | engine.end_token_ids
    known = None
    if golden is not None and evidence.golden is not None:
        known = _is_answered(evidence.golden, golden, tokenizer, special_ids)
    facts = ModelFacts(engine.num_vocab, special_ids, engine.config.dtype, known)
    return SelfTestReport(tuple(judge(evidence, facts)), time.perf_counter() - start)


def _is_answered(seen: PromptOutput, golden: Golden, tokenizer: Tokenizer, special_ids: set[int]) -> bool:
    """True if the text contains the expected answer and the model ended it itself."""
    data = b"".join(tokenizer.token_bytes(i) for i in seen.answer_ids if i not in special_ids)
    return golden.expected in data.decode("utf-8", "replace") and seen.finish_reason is FinishReason.STOP


def report_page(report: SelfTestReport) -> list[RenderableType]:
    """Returns a table of the checks, the failed ones first, and what to do about each of those."""
    failed = report.failed
    total = counted(len(report.checks), "check")
    told = f"{len(failed)} of {total} failed, {report.seconds:.1f} s"
    rows = []
    for check in sorted(report.checks, key=lambda check: check.verdict is not Verdict.FAIL):
        number = "-" if check.number is None else f"{check.number:.4g}"
        rows.append((check.verdict.value, check.id, number, check.allowed, check.message))
    headings = ("", "check", "found", "allowed", "what was counted")
    remedies = [fact(f"remedy for {check.id}", check.remedy) for check in failed]
    return [fact("self-test", told), Listing(headings, rows, num_lead=4, to_right=frozenset({2})), *remedies]
