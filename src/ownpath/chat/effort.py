"""Reasoning effort: the words of each release, and the text that a word puts before the conversation.

The refresh of 31 July moved the scale by one: the text of the first release's strongest word became that of "high".

Source: ``encoding/`` in the model repositories of each release.
"""

from pathlib import Path

from ownpath.files import is_present, read_bytes, read_json_object

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


def release_of_folder(folder: Path) -> str:
    """Tells which release's effort words a model folder uses.

    Its own ``encoding/encoding_dsv4.py`` decides (read as text, never run). Exports often lack it; then a
    ``dspark_block_size`` in config.json, a drafter's field that came with the refresh, decides.
    Errors: FileError naming a file that is there and cannot be read.
    """
    encoder = folder / "encoding" / "encoding_dsv4.py"
    config = folder / "config.json"
    if is_present(encoder):
        is_refresh = b"Reasoning Effort: Beyond maximum" in read_bytes(encoder)
    else:
        is_refresh = is_present(config) and "dspark_block_size" in read_json_object(config)
    return "0731" if is_refresh else "v4"
