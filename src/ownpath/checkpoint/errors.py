"""The one error a checkpoint can cause."""


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be used as it is; the message names the tensor or the file."""
