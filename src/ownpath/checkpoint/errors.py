"""The one error a checkpoint can cause."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the tensor or the file."""
