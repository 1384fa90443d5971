"""What a run keeps on disk behind each layer, so that another can go on there.

One safetensors file holds the streams (the reference's and the engine's own) as tensors, and as metadata the run's key,
how many layers are done, and what was found in them. It is written beside its final name, flushed and renamed: there is
the state behind one layer or behind the next, never half of one.

The key is a digest of everything that the numbers depend on. A file with another key is of another run.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ownpath.finding import Finding, finding_fields, finding_from
from ownpath.model.block import Residual
from ownpath.runners import Mix
from ownpath.verify.kept import digest_of
from ownpath.verify.layers.measure import Measurement
from ownpath.verify.layers.text import Text
from ownpath.verify.subject import Subject

FILE_NAME = "layers.safetensors"
_FORMAT = 1
_ENGINE = ("x", "y", "post", "comb")


@dataclass
class State:
    """How far a run is. num_done: layers that are behind it. engine: ``None`` where its own streams are not carried."""

    num_done: int
    reference_TSD: torch.Tensor
    engine: Residual | None
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)


def key_of(subject: Subject, text: Text) -> str:
    """What the numbers of a run depend on."""
    return digest_of(subject, format_of_streams=_FORMAT, text=text.token_ids)


def save(folder: Path, key: str, state: State) -> None:
    """Writes the state. Errors: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"reference": state.reference_TSD}
    tensors |= {} if state.engine is None else _tensors_of(state.engine)
    metadata = {
        "key": key,
        "num_done": str(state.num_done),
        "findings": json.dumps([finding_fields(finding) for finding in state.findings]),
        "measurements": json.dumps([asdict(measured) for measured in state.measurements]),
    }
    beside = folder / f".{FILE_NAME}.writing"
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, beside, metadata)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(folder / FILE_NAME)


class Found(Enum):
    """What lies in a work folder."""

    NOTHING = "nothing"
    OTHER = "what is there is of another run, or cannot be read"
    SAME = "this run, as far as it came"


def restore(folder: Path, key: str, device: torch.device) -> tuple[Found, State | None]:
    """The state that a run with this key left, if one did."""
    path = folder / FILE_NAME
    if not path.exists():
        return Found.NOTHING, None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return Found.OTHER, None
            # Copies lie where torch aligns them: in which order a processor sums depends on that.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return Found.SAME, _state(metadata, tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return Found.OTHER, None


def _state(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> State:
    findings: Sequence[dict[str, Any]] = json.loads(metadata["findings"])
    return State(
        num_done=int(metadata["num_done"]),
        reference_TSD=tensors["reference"],
        engine=_residual(tensors) if "x" in tensors else None,
        findings=[finding_from(fields) for fields in findings],
        measurements=[Measurement(**fields) for fields in json.loads(metadata["measurements"])],
    )


def _tensors_of(engine: Residual) -> dict[str, torch.Tensor]:
    mix = engine.mix
    values = (engine.x_TSD, engine.y_TD, None if mix is None else mix.post_TS, None if mix is None else mix.comb_TSS)
    return {name: value for name, value in zip(_ENGINE, values, strict=True) if value is not None}


def _residual(tensors: dict[str, torch.Tensor]) -> Residual:
    if "y" not in tensors:
        return Residual(tensors["x"])
    return Residual(tensors["x"], tensors["y"], Mix(tensors["post"], tensors["comb"]))
