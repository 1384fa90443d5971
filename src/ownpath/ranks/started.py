"""The environment of a process that was started as one of several ranks, by torchrun or by ``launch``, in one way.

Nothing heavy is imported here: a command asks before it imports torch.
"""

import ctypes
import os
import signal
from collections.abc import Mapping
from contextlib import suppress

MARK = "TORCHELASTIC_RUN_ID"
"""The variable that torchrun sets, and ``launch`` too."""
RANK_LOST = 75
"""Exit code of a rank that another one has left (EX_TEMPFAIL: started again, it may work)."""
_LAUNCHED = "started by ownpath, process "
"""No name that a job has under torchrun."""
_PR_SET_PDEATHSIG = 1


def is_rank(environment: Mapping[str, str]) -> bool:
    """Returns True in a process that torchrun or ``launch`` has started as a rank."""
    return MARK in environment and "RANK" in environment


def launch_mark() -> dict[str, str]:
    """Returns the variable that says that this process has started another."""
    return {MARK: f"{_LAUNCHED}{os.getpid()}"}


def end_with_parent(environment: Mapping[str, str]) -> None:
    """Has the system end a rank that ``launch`` has started when the process that did has ended, in whatever way.

    If that has happened already, it ends here. To be called before anything heavy is imported. On Linux; elsewhere a
    rank ends once it misses the other.
    """
    mark = environment.get(MARK, "")
    if not mark.startswith(_LAUNCHED):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(mark.removeprefix(_LAUNCHED)):
        os._exit(RANK_LOST)
