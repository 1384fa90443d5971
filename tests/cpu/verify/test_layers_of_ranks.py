"""Layers that two ranks divide: each rank's values are within budget, and a wrong exchange is named on both."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ownpath.bench.published import SMALL
from ownpath.cli import main
from ownpath.config import EngineConfig, Parallel
from ownpath.finding import failed
from ownpath.inspect.memory import KINDS
from ownpath.kernels.exchange.layout import WindowLayout
from ownpath.kernels.exchange.window import Window, virtual_windows
from ownpath.loading import default_model_dir, planned
from ownpath.ranks.virtual import VirtualPeers, run_virtual
from ownpath.splits import ExpertSplit
from ownpath.verify import subject
from ownpath.verify.layers.text import text_of
from ownpath.verify.run import Verification, VerifyJob, verify
from ownpath.verify.subject import Selection

SIZES = {"hidden_size": 128, "head_dim": 64, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 16}
SIZES |= {"qk_rope_head_dim": 16, "vocab_size": 2560, "num_nextn_predict_layers": 0}
FIELDS = SMALL | SIZES | {"num_hidden_layers": 2, "compress_ratios": [0, 4], "num_hash_layers": 1}
ENGINE = EngineConfig(draws_weights=True)
(SM_90,) = (caps for caps in KINDS if caps.name == "sm_90")


class FaultyPeers(VirtualPeers):
    """The second rank gives 1% too much in one exchange."""

    def swap(self, slot: str, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """See ``Peers``."""
        if self.rank == 1 and slot == "layers.1.attn.reduce":
            tensors = [tensor * 1.01 for tensor in tensors]
        return super().swap(slot, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    (folder / "config.json").write_text(json.dumps(FIELDS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((default_model_dir() / name).read_bytes())
    return folder


def verified(folder: Path, layers: set[int], experts: ExpertSplit, *, is_faulty: bool = False) -> list[Verification]:
    """The results of two ranks."""

    def work(peers: VirtualPeers) -> Verification:
        if is_faulty:
            peers.__class__ = FaultyPeers
        engine = replace(ENGINE, parallel=Parallel(peers.rank, 2, experts=experts))
        return verify(VerifyJob(folder, engine, Selection(frozenset(layers)), peers=peers), ["layers"])

    return run_virtual(2, work)


def test_windows_have_room_for_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is longer than a step of the engine needs to be."""
    model, opened = default_model_dir(), list[WindowLayout]()
    engine = EngineConfig(device="cuda", dtype=torch.bfloat16, parallel=Parallel(0, 2), max_prefill_tokens=64)
    plan = planned(model, replace(engine, device="cpu"), SM_90)
    monkeypatch.setattr(subject, "planned", lambda *_: plan)

    def open_one(layout: WindowLayout) -> Window:
        opened.append(layout)
        return virtual_windows(layout, torch.device("cpu"))[0]

    found = subject.Subject.of(model, engine, open_window=open_one)
    assert text_of(found).num_tokens > 1000
    assert opened[0].max_elements >= text_of(found).num_tokens * found.config.hidden_size


def test_each_ranks_values_are_its_part_of_the_references(folder: Path) -> None:
    for result in verified(folder, {0, 1}, ExpertSplit.IDS):
        assert result.passed, failed(result.findings)
        seen = {(one.layer_idx, one.slot) for one in result.measurements}
        whole = {"attn.reduce", "ffn.reduce", "attn.wq_b", "attn.core", "attn.wo_a", "ffn.shared_experts.w13", "out"}
        assert {(idx, slot) for idx in (0, 1) for slot in whole} <= seen
        summands = {"attn.wo_b", "ffn.experts", "ffn.shared_experts.w2"}
        assert not summands & {slot for _, slot in seen}, "a summand is no value of the reference's"


def test_a_wrong_exchange_is_named_on_both_ranks(folder: Path) -> None:
    for result in verified(folder, {1}, ExpertSplit.WIDTH, is_faulty=True):
        first = failed(result.findings)[0]
        assert (first.id, first.where) == ("V01", "layers.1.attn.reduce")
        assert "exchange" in first.remedy
        assert not [one for one in result.measurements if one.slot == "attn.wo_a" and not one.is_within]


def test_options_that_ranks_do_not_take_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "--random-weights", "--ranks", "2", "--stages", "file"]) == 2
    assert "--stages: several ranks compare layers alone" in capsys.readouterr().err
