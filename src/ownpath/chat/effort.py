"""Reasoning effort: the words of each release, and the text that a word puts before the conversation.

The refresh of 31 July moved the scale by one: the text of the first release's strongest word became that of "high".

Source: ``encoding/`` in the model repositories of each release.
"""

from dataclasses import dataclass
from pathlib import Path

from ownpath.files import MissingFileError, read_bytes, read_json_object

_ABSOLUTE = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_BEYOND = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""

RELEASES: dict[str, dict[str, str]] = {
    "v4": {"high": "", "max": _ABSOLUTE},
    "0731": {"low": "", "high": _ABSOLUTE, "max": _BEYOND},
    "0813": {"low": "", "high": _ABSOLUTE, "max": _BEYOND},
}
"""Release -> effort word -> text. Thinking without a word adds no text in any release."""


DEFAULT = "v4"
_ENCODER, _CONFIG, _DRAFTER_FIELD = "encoding/encoding_dsv4.py", "config.json", "dspark_block_size"


@dataclass(frozen=True)
class Release:
    """The release whose effort words a model knows: a key of ``RELEASES``. told_by: what says so.

    is_guess: nothing says so; it is the first release, of which exports carry no sign.
    """

    name: str
    told_by: str
    is_guess: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {'guessed' if self.is_guess else 'told'} by {self.told_by}"


def find_release(folder: Path, named: str | None = None) -> Release:
    """Returns the release of a model folder, or the one that is named.

    Its own ``encoding/encoding_dsv4.py`` decides (read as text, never run). Exports often lack it; then a
    ``dspark_block_size`` in config.json, a drafter's field that came with the refresh, decides.
    Errors: ValueError for a name that is none, with those that there are; FileError for a file that cannot be read.
    """
    if named is not None:
        return Release(require_release(named), "--release")
    try:
        encoder = read_bytes(folder / _ENCODER)
    except MissingFileError:
        pass
    else:
        is_refresh = b"Reasoning Effort: Beyond maximum" in encoder
        return Release("0731" if is_refresh else DEFAULT, _ENCODER)
    try:
        config = read_json_object(folder / _CONFIG)
    except MissingFileError:
        config = {}
    if _DRAFTER_FIELD in config:
        return Release("0731", f"{_DRAFTER_FIELD} in {_CONFIG}")
    absent = f"the absence of {_ENCODER} and of {_DRAFTER_FIELD} in {_CONFIG}"
    return Release(DEFAULT, f"{absent} (`ownpath serve --release` names another)", is_guess=True)


def require_release(name: str) -> str:
    """Returns the name of a release. Errors: ValueError, with the names that there are."""
    if name not in RELEASES:
        raise ValueError(f"there is no release {name!r}; known: {', '.join(RELEASES)}")
    return name
