"""Every fault of a layer fails the check that is there for it, in its layer and at its value, and nowhere else."""

from pathlib import Path

import pytest
from support.checkpoints import random_checkpoint
from support.layer_faults import FAULTS
from support.mutations.mutation import on_layer

from ownpath.config import EngineConfig
from ownpath.finding import Finding, failed
from ownpath.verify import layer_stage as stage
from ownpath.verify.subject import Selection, Subject

REACHES_OUT = (
    *("transposed Sinkhorn before the experts", "a NaN in the last row", "a kernel that raises"),
    *("a stale row in the window's cache", "sequences of a step mixed up"),
)
"""Wrong streams, no number, no streams, wrong caches, wrong rows: all that could reach the layer behind a fault, which
is looked at beside these alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("faults"), "full-nvfp4", seed=21).folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    if fault.check == "V01":  # told before other batches run, which take half of the time
        monkeypatch.setattr(stage.Batching, "findings", lambda _: iter(()))
    layers = {fault.layer_idx, fault.layer_idx + (name in REACHES_OUT)}
    chosen = Selection(frozenset(layers))
    with on_layer(fault.layer_idx, fault.change).applied():
        seen = list(stage.layer_stage(Subject.of(folder, EngineConfig(), chosen)))
    found = failed(found for found in seen if isinstance(found, Finding))
    assert {f"layers.{idx}" for idx in layers} <= {one.where for one in seen if isinstance(one, Finding)}
    layer = f"layers.{fault.layer_idx}"
    assert found, "nothing failed"
    assert (found[0].id, found[0].where) == (fault.check, f"{layer}.{fault.where}".rstrip(".")), found
    assert found[0].remedy
    assert all(finding.where.startswith(layer) for finding in found), "the layer behind it is judged by itself"
    if fault.check != "V01":
        assert {finding.id for finding in found} == {fault.check}
