"""Errors of planning."""

from ownpath.checkpoint.errors import CheckpointError


class PlanError(ValueError):
    """Raised when no kernel can run an op of this checkpoint on this device; the message names both."""


class MissingInputScaleError(PlanError):
    """Raised when every kernel for these numerics needs a scale of the input. where: the tensor that is not there."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class MixedExpertsError(CheckpointError):
    """Raised when a layer's experts are stored differently. where: the module or tensor unlike the first."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where
