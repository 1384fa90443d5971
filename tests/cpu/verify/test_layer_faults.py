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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("faults"), "full-nvfp4", seed=21).folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, folder: Path) -> None:
    fault = FAULTS[name]
    chosen = Selection(frozenset({fault.layer_idx, fault.layer_idx + 1}))
    with on_layer(fault.layer_idx, fault.change).applied():
        seen = list(stage.layer_stage(Subject.of(folder, EngineConfig(), chosen)))
    found = failed(found for found in seen if isinstance(found, Finding))
    layer = f"layers.{fault.layer_idx}"
    assert found, "nothing failed"
    assert (found[0].id, found[0].where) == (fault.check, f"{layer}.{fault.where}".rstrip(".")), found
    assert found[0].remedy
    assert all(finding.where.startswith(layer) for finding in found), "the layer behind it is judged by itself"
    if fault.check != "V01":
        assert {finding.id for finding in found} == {fault.check}
