"""Writes a JSON line for each row, with the provenance of its number."""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ownpath.bench.row import Row
from ownpath.versions import versions


def provenance(device: str, commit: str, command: str, timer: str) -> dict[str, object]:
    """Returns device, versions, commit, command, timer and date of a run."""
    return {
        "device": device_name(device),
        "timer": timer,
        "versions": versions(),
        "commit": commit,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def row_dict(row: Row, seed: int, origin: Mapping[str, object]) -> dict[str, object]:
    """Returns a row as JSON values. Units are in the keys; NaN becomes null, so that the line is valid JSON."""
    case, timing = row.case, row.timing
    measured = {"us": None, "us_p10": None, "us_p90": None, "calls_per_replay": None, "replays": None}
    if timing is not None:
        values = (timing.us, timing.us_p10, timing.us_p90, timing.num_calls, timing.num_replays)
        measured = dict(zip(measured, values, strict=True))  # type: ignore[arg-type]
    rel_l2 = None if row.rel_l2 is None or math.isnan(row.rel_l2) else row.rel_l2
    return {
        "bench": case.bench,
        "shape": case.shape,
        **case.dims,
        "tokens": case.num_tokens,
        "contender": row.contender,
        "is_peer": row.is_peer,
        "status": row.status,
        "reason": row.reason,
        **measured,
        "rel_l2": rel_l2,
        "floor_us": case.floor_us,
        "bytes": case.num_bytes,
        "flop": case.num_flop,
        "tb_per_s": row.tb_per_s,
        "tflop_per_s": row.tflop_per_s,
        "distinct_experts": case.distinct_experts,
        **row.facts,
        "seed": seed,
        **origin,
    }


def append_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Appends to a JSON-lines file, and makes it if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, allow_nan=False) + "\n")


def device_name(device: str) -> str:
    """Returns the driver's name of the device; "cpu" and the architecture for a CPU."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}"
