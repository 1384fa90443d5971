"""The environment of a process that was started as one of several ranks, by torchrun or by ``launch``, in one way.

Nothing heavy is imported here: a command asks before it imports torch.
"""

from collections.abc import Mapping

MARK, LAUNCHED = "TORCHELASTIC_RUN_ID", "ownpath"
"""The variable that torchrun sets, and its value in a process that ``launch`` has started."""


def is_rank(environment: Mapping[str, str]) -> bool:
    """Returns True in a process that torchrun or ``launch`` has started as a rank."""
    return MARK in environment and "RANK" in environment
