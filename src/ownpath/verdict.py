"""How a check ends."""

from enum import Enum


class Verdict(Enum):
    """``SKIPPED``: there was nothing to look at."""

    PASS = "pass"
    FAIL = "FAIL"
    SKIPPED = "skipped"
