"""Intact models pass, whatever their seed; every fault fails the check that is there for it."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu.engine.fake_model import EOS_ID
from cpu.server.harness import TOKENIZER, VOCAB
from support.broken import Tensors, change_tensors
from support.checkpoints import THREE_LAYERS, random_checkpoint
from support.pages import self_test_text

from ownpath.cache.pools import CachePool
from ownpath.chat.tokenizer import Tokenizer
from ownpath.config import EngineConfig
from ownpath.engine.engine import Engine
from ownpath.finding import Verdict
from ownpath.loading import default_model_dir, load_model
from ownpath.model.batch import ForwardBatch
from ownpath.model.model import Model
from ownpath.selftest.checks import REMEDIES
from ownpath.selftest.run import SelfTestReport, known_question, self_test

NUM_PROMPTS_AT_FIRST = 4
"""One token, two, a text and another text: caches that exist before anything is repeated."""


def report_of(model: Any, max_model_len: int = 512, folder: Path | None = None) -> SelfTestReport:
    """folder: where the tokenizer is, and what tells whether something is known of the model."""
    tokenizer = TOKENIZER if folder is None else Tokenizer.from_folder(folder)
    engine = Engine(model, EngineConfig(max_model_len=max_model_len), tokenizer.num_tokens)
    engine.start()
    try:
        golden = None if folder is None else known_question(folder, tokenizer)
        return self_test(engine, tokenizer, model.config.sliding_window, golden)
    finally:
        engine.stop()


def failed(report: SelfTestReport) -> set[str]:
    return {check.id for check in report.failed}


def load(folder: Path, max_model_len: int = 512) -> Model:
    return load_model(folder, EngineConfig(max_model_len=max_model_len))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(random_checkpoint(tmp_path_factory.mktemp("intact"), seed=11, vocab_size=VOCAB, **THREE_LAYERS).folder)


@pytest.mark.parametrize(
    ("seed", "layout"),
    [
        (1, "modelopt-experts-only"),
        (2, "deepseek-native"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, "full-nvfp4"), (3, "bf16"), (4, "compressed-tensors"))
        ),
    ],
)
def test_random_weights_pass(seed: int, layout: str, tmp_path: Path) -> None:
    report = report_of(load(random_checkpoint(tmp_path, layout, seed, vocab_size=VOCAB, **THREE_LAYERS).folder))
    assert not report.failed, self_test_text(report)
    skipped = [check.id for check in report.checks if check.verdict is Verdict.SKIPPED]
    assert skipped == ["S01-golden"], "nothing is known of random weights, and everything else was looked at"
    assert {check.id for check in report.checks} == set(REMEDIES)


@pytest.mark.parametrize("max_model_len", [1, 2, 8, 40, 144])
def test_a_short_context_is_no_fault(max_model_len: int, intact: Model) -> None:
    report = report_of(intact, max_model_len)
    assert not report.failed, self_test_text(report)


@dataclass(frozen=True)
class Rows:
    """One sequence's share of a step: its first row's position, and how many rows."""

    slot: int
    position: int
    count: int


class Faulty:
    """A good model whose logits are changed on the way out."""

    def __init__(self, model: Model, change: Callable[["Faulty", torch.Tensor, ForwardBatch], torch.Tensor]) -> None:
        self.config, self.inner, self.change = model.config, model, change
        self.slots: list[int] = []

    @property
    def caches(self) -> CachePool:
        return self.inner.caches

    def new_cache(self, num_tokens: int | None = None) -> Any:
        cache = self.inner.new_cache(num_tokens)
        self.slots.append(cache.slot)
        return cache

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self.change(self, self.inner.forward(batch), batch)

    def number(self, slot: int) -> int:
        """Returns the number of sequences that began before the one that has this slot now."""
        return max(n for n, known in enumerate(self.slots) if known == slot)


def table(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(5)) * 3


def always(token_id: int) -> Any:
    def change(_: Faulty, logits: torch.Tensor, __: ForwardBatch) -> torch.Tensor:
        logits = logits.clone()
        logits[:, token_id] = logits.amax(dim=-1) + 2
        return logits

    return change


def rolled_where(is_wrong: Callable[[Faulty, Any], bool]) -> Any:
    """Another token is likeliest in the rows of some sequences."""

    def change(faulty: Faulty, logits: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        wrong = torch.zeros(len(batch.token_ids_T), dtype=torch.bool)
        tables = batch.tables
        for slot, start, rows in zip(tables.slots, tables.starts, tables.rows, strict=True):
            wrong[rows] = is_wrong(faulty, Rows(slot, start, rows.stop - rows.start))
        return torch.where(wrong[batch.logits_ids].unsqueeze(-1), logits.roll(1, dims=-1), logits)

    return change


def nan_from(position: int) -> Any:
    def change(_: Faulty, logits: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        late = batch.positions_T[batch.logits_ids] >= position
        return torch.where(late.unsqueeze(-1), torch.nan, logits)

    return change


def break_down(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel for this")


FAULTS: dict[str, tuple[Any, str]] = {
    "NaN everywhere": (nan_from(0), "S03-finite"),
    "NaN past a hundred tokens": (nan_from(100), "S03-finite"),
    "one infinite logit": (lambda f, logits, b: logits.index_fill(1, torch.tensor([3]), torch.inf), "S03-finite"),
    "constant logits": (lambda f, logits, b: table(1).expand_as(logits).clone(), "S02-frozen"),
    "logits by position": (lambda f, logits, b: table(600)[b.positions_T[b.logits_ids]], "S02-input"),
    "logits by the last token": (lambda f, logits, b: table(VOCAB)[b.token_ids_T[b.logits_ids]], "S02-context"),
    "always EOS": (always(EOS_ID), "S02-special"),
    "always BOS": (always(0), "S02-special"),
    "one repeated token": (always(77), "S02-repeat"),
    "no difference between tokens": (lambda f, logits, b: logits * 1e-4, "S02-uniform"),
    "logits a thousand times as large": (lambda f, logits, b: logits * 1000, "S02-certain"),
    "wrong when a token is read alone": (
        rolled_where(lambda _, rows: rows.count == 1 and rows.position > 2),
        "S01-decode",
    ),
    "wrong behind a cut": (
        rolled_where(lambda _, rows: rows.count > 1 and rows.position > 0),
        "S01-chunked",
    ),
    "wrong from the second request on": (
        rolled_where(lambda faulty, rows: faulty.number(rows.slot) >= NUM_PROMPTS_AT_FIRST),
        "S01-repeatable",
    ),
    "a step that fails": (break_down, "S01-answers"),
}


ALONE = ("logits by the last token", "wrong behind a cut", "wrong when a token is read alone", "one repeated token")
"""Faults that fail nothing else: the id is the place to look at, so that neighbours keep quiet where they can."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_check(name: str, intact: Model) -> None:
    change, expected = FAULTS[name]
    report = report_of(Faulty(intact, change))
    assert expected in failed(report), self_test_text(report)
    check = next(check for check in report.failed if check.id == expected)
    assert check.number is not None
    text = self_test_text(report)
    assert re.search(rf"^FAIL +{expected} ", text, re.M)
    assert check.remedy in text
    if name in ALONE:
        assert failed(report) == {expected}


def zero_head(tensors: Tensors) -> None:
    tensors["head.weight"].zero_()


def scale_head(tensors: Tensors) -> None:
    tensors["head.weight"] *= 1000


def zero_attention(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("attn.wo_b.weight"):
            tensors[name].zero_()


@pytest.mark.parametrize(
    ("change", "expected"), [(zero_head, "S02-uniform"), (scale_head, "S02-certain"), (zero_attention, "S02-context")]
)
def test_a_broken_checkpoint_fails(change: Callable[[Tensors], None], expected: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, "bf16", vocab_size=VOCAB, **THREE_LAYERS).folder
    change_tensors(folder, change)
    report = report_of(load(folder))
    assert expected in failed(report), self_test_text(report)


def test_the_embedded_model_passes_and_knows_the_capital() -> None:
    folder = default_model_dir()
    report = report_of(load(folder), folder=folder)
    assert all(check.verdict is Verdict.PASS for check in report.checks), self_test_text(report)


def test_the_embedded_model_with_a_scale_squared_fails(tmp_path: Path) -> None:
    """The global scale of every NVFP4 tensor applied twice: no signature need show it, the known question does."""
    folder = tmp_path / "squared"
    shutil.copytree(default_model_dir(), folder)

    def square(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".weight_scale_2"):
                tensors[name] = tensors[name] ** 2

    change_tensors(folder, square)
    report = report_of(load(folder), folder=folder)
    assert "S01-golden" in failed(report), self_test_text(report)
