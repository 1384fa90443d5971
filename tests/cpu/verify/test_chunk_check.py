"""K12: intact lines of chunks pass, wrong ones are named. On a CPU the twins take the kernels' place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.layer_faults import in_operand, with_attn
from support.mutations.mutation import around, on_layer
from support.mutations.runs import write_model

from ownpath.config import EngineConfig
from ownpath.finding import Finding, Verdict, failed
from ownpath.formats import CacheFormat
from ownpath.kernels.chunks.types import ChunkKeys, ChunkRows
from ownpath.loading import default_model_dir
from ownpath.numerics import rotate_pairs
from ownpath.plan.planner import Planner
from ownpath.plan.show import plan_dict
from ownpath.verify import kernel_stage as stage
from ownpath.verify.kernels.chunks import check_chunks
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.ledger_check import check_ledger
from ownpath.verify.subject import Selection, Subject

SLIDING, CSA, HCA = 0, 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chunks") / "model")


@pytest.fixture(autouse=True)
def with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "CHECKS", (("K12", check_chunks),))
    monkeypatch.setattr(Planner, "no_chunks", "")


def subject_of(folder: Path, layer_idx: int, cache_format: CacheFormat = CacheFormat.BF16) -> Subject:
    return Subject.of(folder, EngineConfig(cache_format=cache_format), Selection(frozenset({layer_idx})))


def checked(folder: Path, layer_idx: int, cache_format: CacheFormat = CacheFormat.BF16) -> list[Finding]:
    return list(stage.kernel_stage(subject_of(folder, layer_idx, cache_format)))


@pytest.mark.parametrize("layer_idx", [SLIDING, CSA, HCA])
def test_a_right_layer_passes(layer_idx: int, folder: Path) -> None:
    [finding] = checked(folder, layer_idx)
    assert (finding.where, finding.verdict) == (f"layers.{layer_idx}", Verdict.PASS), finding.message


def test_pages_are_checked_to_the_code() -> None:
    [finding] = checked(default_model_dir(), CSA, CacheFormat.FP8)
    assert finding.verdict is Verdict.PASS, finding.message


def test_without_a_line_there_is_nothing_to_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "no_chunks", "none here")
    [finding] = checked(folder, SLIDING)
    assert finding.verdict is Verdict.SKIPPED


def test_the_ledger_asks_for_what_runs(folder: Path) -> None:
    """Slots whose place the line takes need not run; those of the line must."""
    subject = subject_of(folder, CSA)
    found = [one for one in check_ledger(subject, plan_dict(subject.plan)) if isinstance(one, Finding)]
    assert not failed(found), failed(found)
    ran = [one.slot for one in check_ledger(subject, plan_dict(subject.plan)) if not isinstance(one, Finding)]
    assert {f"layers.1.attn.chunk.{name}" for name in ("entries", "scores", "select", "attend", "rings")} <= {*ran}
    assert "layers.1.attn.core" not in ran


def called(part: str, call: Callable[..., Any]) -> Callable[[LoadedLayer], LoadedLayer]:
    """A kernel of the line that is called by ``call(runner, *args)``."""

    def change(loaded: LoadedLayer) -> LoadedLayer:
        line: Any = loaded.block.attn.chunk
        return with_attn(loaded, chunk=replace(line, **{part: around(getattr(line, part), call)}))

    return change


def attended(**parts: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[LoadedLayer], LoadedLayer]:
    """Attention with some fields of its rows exchanged."""

    def call(run: Any, q: Any, cos: Any, sin: Any, keys: ChunkKeys, rows: ChunkRows) -> torch.Tensor:
        changed = {name: change(getattr(rows, name)) for name, change in parts.items()}
        found: torch.Tensor = run(q, cos, sin, keys, rows._replace(**changed))
        return found

    return called("attend", call)


def key_lost(run: Any, q: Any, cos: Any, sin: Any, keys: ChunkKeys, rows: ChunkRows) -> torch.Tensor:
    """Near keys one place on: the oldest is lost, and a row sees the one behind it."""
    found: torch.Tensor = run(q, cos, sin, keys._replace(near_WH=keys.near_WH.roll(-1, 0)), rows)
    return found


def unturned(run: Any, q: Any, cos: Any, sin: Any, *others: Any) -> torch.Tensor:
    return rotate_pairs(run(q, cos, sin, *others), cos, sin)


def near_lost(run: Any, *args: Any) -> torch.Tensor:
    """A window's oldest keys are those of the request behind."""
    near_WH: torch.Tensor = run(*args)
    return torch.cat((near_WH[1:], near_WH[:1]))


def finished(**parts: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[LoadedLayer], LoadedLayer]:
    """Entries with some fields of their places exchanged."""

    def call(run: Any, raw: Any, ends: Any, places: Any, pools: Any) -> torch.Tensor:
        changed = {name: change(getattr(places, name)) for name, change in parts.items()}
        found: torch.Tensor = run(raw, ends, places._replace(**changed), pools)
        return found

    return called("write", call)


def without_sink(loaded: LoadedLayer) -> LoadedLayer:
    attend = loaded.block.attn.chunk.attend.runner  # type: ignore[union-attr]
    in_operand(attend, sink_N=torch.full_like(attend.operand.sink_N, -torch.inf))
    return loaded


FAULTS = {
    "a window one key on": (SLIDING, "attend", called("attend", key_lost)),
    "no inverse rotation": (SLIDING, "attend", called("attend", unturned)),
    "sink dropped": (SLIDING, "attend", without_sink),
    "another request's table": (HCA, "attend", attended(requests_T=lambda x: (x + 1) % (x.max() + 1))),
    "an incomplete window seen": (HCA, "attend", attended(positions_T=lambda x: x + 1)),
    "another row's selection": (CSA, "attend", attended(selected_TK=lambda x: x.roll(1, 0))),
    "near keys one place on": (SLIDING, "entries", called("write", near_lost)),
    "raw rows of another slot": (CSA, "entries", finished(slots_R=lambda x: x.roll(1, 0))),
    "an entry in another request's block": (HCA, "entries", finished(blocks_RB=lambda x: x.roll(1, 0))),
    "rows that no ring keeps": (SLIDING, "rings", called("keep", lambda *_: None)),
    "rows kept in another slot": (
        CSA,
        "rings",
        called(
            "keep", lambda run, raw, places, pools: run(raw, places._replace(slots_R=places.slots_R.roll(1, 0)), pools)
        ),
    ),
    "index scores of another row": (
        CSA,
        "scores",
        called("score", lambda run, query, *rest: run(query, *rest).roll(1, 0)),
    ),
}


@pytest.mark.parametrize(("layer_idx", "slot", "change"), FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_line_is_named(layer_idx: int, slot: str, change: Any, folder: Path) -> None:
    with on_layer(layer_idx, change).applied():
        [finding] = failed(checked(folder, layer_idx))
    assert finding.where == f"layers.{layer_idx}.attn.chunk.{slot}"
