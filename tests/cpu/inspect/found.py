"""An inspection's report in a form that tests compare."""

from pathlib import Path

from ownpath.checkpoint.problems import REMEDIES
from ownpath.inspect.inspection import inspect_folder

Found = set[tuple[str, str]]


def found(folder: Path) -> Found:
    """(check, where) of every problem; each message is one line."""
    problems = inspect_folder(folder).problems
    for problem in problems:
        assert "\n" not in problem.message
        assert REMEDIES[problem.id] == problem.remedy
    return {(problem.id, problem.where) for problem in problems}
