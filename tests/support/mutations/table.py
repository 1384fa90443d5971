"""`docs/mutations.md`: what it says, and what is read back from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.mutations import GROUPS
from support.mutations.mutation import Mutation
from support.mutations.runs import Outcome
from support.mutations.unseen import MUTATIONS as UNSEEN

PATH = Path(__file__).parents[3] / "docs" / "mutations.md"
STAGE_OF = (
    ("F", "file"),
    ("E", "environment"),
    ("LG", "ledger"),
    ("L", "load"),
    ("K", "kernels"),
    ("V", "layers"),
)
"""Prefix of a check's id -> its stage; the first match counts."""
HEAD = """# What can `ownpath verify` catch, and what not?

{caught} ways to corrupt a good checkpoint, a loaded model or a kernel's output. `ownpath verify` failed on each and
named the place; five intact checkpoints of five exports and five seeds pass, and so does the embedded model
(`tests/cpu/verify/test_mutations.py`). A line has the mutation, the checks that failed and the place that the check
in bold named; `ownpath verify --list` says what each check looks at. `python tools/mutation_table.py` writes this
page and prints, for each mutation, what is corrupted, the options and the sentence.

Everything ran on a CPU, in float32, on checkpoints of three layers, one of each kind, with eight experts (packed
layouts: on the embedded model, planned for sm_90 and loaded on the CPU, which runs no kernel).
"""
TAIL = """
## Not caught
`ownpath verify` passes these.

"""
_ROW = re.compile(r"- (.+?): ([A-Z0-9*, ]+) at `(.+)`")


@dataclass(frozen=True)
class Row:
    """One line of the table as it was written."""

    name: str
    ids: tuple[str, ...]
    where: str


def page(outcomes: Mapping[str, Outcome]) -> str:
    """The whole page. outcomes: of every mutation, by name."""
    parts = [HEAD.format(caught=len(outcomes))]
    for heading, group in GROUPS.items():
        rows = [_row(name, mutation, outcomes[name]) for name, mutation in group.items()]
        parts.append("\n".join([f"\n## {heading}", *rows, ""]))
    unseen = [f"- {name} ({it.mutation.what}; {_code(it.mutation.options)}): {it.why}" for name, it in UNSEEN.items()]
    return "".join(parts) + TAIL + "\n".join(unseen) + "\n"


def _row(name: str, mutation: Mutation, outcome: Outcome) -> str:
    assert outcome.finding is not None, f"{name} is not caught"
    ids = ", ".join(f"**{id_}**" if id_ == mutation.check else id_ for id_ in outcome.ids)
    return f"- {name}: {ids} at {_code(outcome.finding.where)}"


def told(name: str, mutation: Mutation, outcome: Outcome) -> str:
    """Returns details that the page omits: the corruption, the options, the stages and the message."""
    assert outcome.finding is not None, f"{name} is not caught"
    stages = ", ".join(dict.fromkeys(map(stage_of, outcome.ids)))
    return f"{name} ({mutation.what}; {mutation.options or 'all stages'}), {stages}: {outcome.finding.message}"


def stage_of(id_: str) -> str:
    return next(stage for start, stage in STAGE_OF if id_.startswith(start))


def rows() -> list[Row]:
    """Returns the mutations that the committed page lists as caught, in its order."""
    caught = PATH.read_text(encoding="utf-8").split("## Not caught")[0]
    found = filter(None, map(_ROW.fullmatch, caught.splitlines()))
    return [Row(row[1], tuple(re.findall(r"[A-Z]+\d+", row[2])), row[3]) for row in found]


def unseen_names() -> list[str]:
    """Returns the mutations that it lists as not caught."""
    lines = PATH.read_text(encoding="utf-8").split("## Not caught")[1].splitlines()
    return [line[2:].split(" (")[0] for line in lines if line.startswith("- ")]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
