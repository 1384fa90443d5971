"""The progress of a stage, as the stage reports it; ``terminal.progress`` shows it."""

from typing import Protocol


class StageProgress(Protocol):
    """Called by a stage: ``done`` of ``total`` parts are checked, and ``name`` is the next."""

    def __call__(self, done: int, total: int, name: str, /) -> None: ...
