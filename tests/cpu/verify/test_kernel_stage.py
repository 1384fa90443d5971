"""The kernels stage beside what test_mutations runs: other numerics, the ends, a sample, what cannot be loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import random_checkpoint
from support.layer_faults import linear
from support.mutations.mutation import on_layer

from ownpath.config import EngineConfig
from ownpath.finding import Verdict, failed
from ownpath.loading import default_model_dir
from ownpath.official import OFFICIAL
from ownpath.verify import kernel_stage as stage
from ownpath.verify.layer import LoadedLayer
from ownpath.verify.subject import Selection, Subject

CSA = 3
"""A layer with everything."""
PRODUCTS = [
    ("full-nvfp4", "wq_b"),
    ("deepseek-native", "wq_b"),
    ("deepseek-native", "indexer.wq_b"),
    ("full-nvfp4", "indexer.weights_proj"),
    ("full-nvfp4", "indexer.compressor.wkv_wgate"),
]


def subject(folder: Path, layer_idx: int, **changes: Any) -> Subject:
    engine = EngineConfig(**changes)
    return Subject.of(folder, engine, Selection(layer_ids=frozenset({layer_idx})))


@pytest.mark.parametrize("layout", ["full-nvfp4", "fp8-experts"])
def test_official_numerics_in_bfloat16_pass(layout: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / layout, layout, seed=12)
    found = list(stage.kernel_stage(subject(checkpoint.folder, CSA, dtype=torch.bfloat16, official=OFFICIAL)))
    assert not failed(found)
    assert [finding.verdict for finding in found if finding.id == "K03"] == [Verdict.PASS]


def test_what_is_in_no_layer_is_looked_at_with_all_layers(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "short", "bf16", num_hidden_layers=1, compress_ratios=[0])
    heard = []
    whole = Subject.of(checkpoint.folder, EngineConfig())
    found = list(stage.kernel_stage(whole, lambda *told: heard.append(told)))
    assert not failed(found)
    assert heard == [(0, 2, "layers.0"), (1, 2, "ends")]
    assert {finding.id for finding in found if finding.where in ("ends", "hc_head")} >= {"K01", "K02", "K08", "K10"}


def test_a_sample_of_the_embedded_models_experts() -> None:
    of = Subject.of(default_model_dir(), EngineConfig(), Selection(frozenset({1}), num_experts=3, seed=5))
    found = list(stage.kernel_stage(of))
    assert not failed(found)
    (clamp,) = [finding for finding in found if (finding.id, finding.where) == ("K06", "layers.1.ffn.experts")]
    assert "3 comparisons" in clamp.message


def test_a_layer_that_cannot_be_loaded_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint(tmp_path, "bf16").folder

    def load(of: Subject, layer_idx: int) -> LoadedLayer:
        raise ValueError("layers.3.attn.wq_b.weight: not where the index says")

    monkeypatch.setattr(stage, "load_layer", load)
    (found,) = stage.kernel_stage(subject(folder, CSA))
    assert (found.id, found.where, found.verdict) == ("K01", "layers.3", Verdict.FAIL)
    assert "layers.3.attn.wq_b.weight" in found.message


@pytest.mark.parametrize(("layout", "name"), PRODUCTS)
def test_a_product_one_percent_too_large_in_bfloat16(layout: str, name: str, tmp_path: Path) -> None:
    """The mutation of the same kind is in float32, where one rounding is 2^16 times smaller. Joined products are told
    apart."""
    folder = random_checkpoint(tmp_path, layout).folder
    with on_layer(CSA, linear(name, lambda run, x: run(x) * 1.01)).applied():
        found = failed(stage.kernel_stage(subject(folder, CSA, dtype=torch.bfloat16)))
    assert ("K01", f"layers.3.attn.{name}") in {(finding.id, finding.where) for finding in found}
