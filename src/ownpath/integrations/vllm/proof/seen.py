"""A run of vLLM, as it is left in a folder: steps with the taps' values, a file a layer, and the walk of each rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ownpath.checkpoint.reader import read_file
from ownpath.integrations.vllm.proof.points import named_values
from ownpath.integrations.vllm.proof.steps import PlacedRows, Planned, place_rows
from ownpath.integrations.vllm.proof.taps import Kept

ENDS = "ends"


@dataclass(frozen=True)
class StepRun:
    """One step that the engine ran, as one rank saw it. how: eager or graphs. files: of a layer, or of the ends.

    missed: why a tap could not copy, by its key. unwritten: taps whose buffer the step did not fill. from_python: False
    where a replayed graph filled them. kernels: how often the device ran each, by name; ``None``: not recorded.
    """

    planned: Planned
    how: str
    files: Mapping[str, Path]
    missed: Mapping[str, str]
    unwritten: tuple[str, ...]
    from_python: bool
    rank: int = 0
    kernels: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        """``decode of 5 rows, eager``."""
        count = self.planned.num_rows
        return f"{self.planned.kind} of {count} row{'s' * (count != 1)}, {self.how}"

    @property
    def num_rows(self) -> int:
        return self.planned.num_rows

    @property
    def is_judged(self) -> bool:
        return self.planned.is_judged

    def layer(self, layer_idx: int) -> Kept:
        """Reads a layer's values, by our names; none where nothing was tapped. Errors: CheckpointError."""
        return named_values(self._read(str(layer_idx)))[1].get(layer_idx, {})

    def ends(self) -> Kept:
        """Reads the values outside all layers. Errors: CheckpointError."""
        return named_values(self._read(ENDS))[0]

    def _read(self, part: str) -> Kept:
        path = self.files.get(part)
        return {} if path is None else read_file(path)[1]

    @cached_property
    def parts(self) -> tuple[PlacedRows, ...]:
        """Each sequence's rows. Errors: ValueError for rows of nobody."""
        first = min(int(part) for part in self.files if part != ENDS)
        values, ends = self.layer(first), self.ends()
        ids = values["token_ids"] if "token_ids" in values else ends["token_ids"]
        return place_rows(ids.tolist(), values["positions"].tolist(), self.planned)


@dataclass(frozen=True)
class EngineRun:
    """A whole run. by_rank: of each rank, the steps. refused: sentences about steps that the engine cannot run in one
    piece. error: how it ended early; during: what it was about to run then."""

    by_rank: tuple[tuple[StepRun, ...], ...]
    refused: tuple[str, ...]
    ranks: tuple[dict[str, Any], ...]
    facts: Mapping[str, Any]
    error: str | None
    during: str

    @classmethod
    def of(cls, folder: Path, report: Mapping[str, Any]) -> "EngineRun":
        """Reads ``run.json``'s content."""
        steps = [[_step(folder, fields, seen) for seen in fields["ranks"]] for fields in report["steps"]]
        told = report["error"], report["during"]
        return cls(
            tuple(zip(*steps, strict=True)), tuple(report["refused"]), tuple(report["ranks"]), report["engine"], *told
        )

    @property
    def steps(self) -> tuple[StepRun, ...]:
        """The steps of the first rank: of the same rows as every other's."""
        return self.by_rank[0] if self.by_rank else ()


def _step(folder: Path, fields: Mapping[str, Any], seen: Mapping[str, Any]) -> StepRun:
    rows = {name: (start, tuple(ids)) for name, (start, ids) in fields["rows"].items()}
    planned = Planned(fields["kind"], fields["num_rows"], rows, fields["is_judged"])
    files = {part: folder / name for part, name in seen["files"].items()}
    unwritten, ran = tuple(seen["unwritten"]), (seen["from_python"], seen["rank"], seen.get("kernels"))
    return StepRun(planned, fields["how"], files, seen["missed"], unwritten, *ran)
