"""The state of the layers stage after a layer: both sides' streams, and the findings so far.

``resume`` writes and reads it; the key is a digest of everything that the numbers depend on.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ownpath.finding import Finding, finding_fields, finding_from
from ownpath.model.block import Residual
from ownpath.runners import Mix
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.text import SampleText
from ownpath.verify.resume import SavedState, digest_of, read_state, write_state
from ownpath.verify.subject import Subject

FILE_NAME = "layers.safetensors"
_FORMAT = 1
_ENGINE = ("x", "y", "post", "comb", "other")


@dataclass
class State:
    """The progress of a run. num_done: layers that are finished. engine: ``None`` where its own streams are not
    carried."""

    num_done: int
    reference_TSD: torch.Tensor
    engine: Residual | None
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)


def key_of(subject: Subject, text: SampleText) -> str:
    """Digests what the numbers of a run depend on."""
    return digest_of(subject, format_of_streams=_FORMAT, text=text.token_ids)


def save(folder: Path, key: str, state: State) -> None:
    """Writes the state. Errors: OSError."""
    tensors = {"reference": state.reference_TSD}
    tensors |= {} if state.engine is None else _tensors_of(state.engine)
    value = {
        "num_done": state.num_done,
        "findings": [finding_fields(finding) for finding in state.findings],
        "measurements": [asdict(measured) for measured in state.measurements],
    }
    write_state(folder / FILE_NAME, key, value, tensors)


def restore(folder: Path, key: str, device: torch.device) -> tuple[SavedState, State | None]:
    """Reads the state of a run with this key, if there is one."""
    return read_state(folder / FILE_NAME, key, _state, device)


def _state(value: dict[str, Any], tensors: dict[str, torch.Tensor]) -> State:
    return State(
        num_done=value["num_done"],
        reference_TSD=tensors["reference"],
        engine=_residual(tensors) if "x" in tensors else None,
        findings=[finding_from(fields) for fields in value["findings"]],
        measurements=[Measurement(**fields) for fields in value["measurements"]],
    )


def _tensors_of(engine: Residual) -> dict[str, torch.Tensor]:
    mix = engine.mix
    mixes = (None, None) if mix is None else mix
    values = (engine.x_TSD, engine.y_TD, *mixes, engine.other_TD)
    return {name: value for name, value in zip(_ENGINE, values, strict=True) if value is not None}


def _residual(tensors: dict[str, torch.Tensor]) -> Residual:
    if "y" not in tensors:
        return Residual(tensors["x"])
    return Residual(tensors["x"], tensors["y"], Mix(tensors["post"], tensors["comb"]), tensors.get("other"))
