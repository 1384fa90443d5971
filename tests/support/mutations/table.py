"""`docs/mutations.md`: what it says, and what is read back from it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.mutations import GROUPS
from support.mutations.mutation import Mutation
from support.mutations.runs import Outcome
from support.mutations.unseen import MUTATIONS as UNSEEN

PATH = Path(__file__).parents[3] / "docs" / "mutations.md"
COLUMNS = ("mutation", "what is corrupted", "options", "caught by", "named", "what it prints")
STAGE_OF = (
    ("F", "file"),
    ("E", "environment"),
    ("LG", "ledger"),
    ("L", "load"),
    ("K", "kernels"),
    ("V", "layers"),
)
"""How a check's id begins -> its stage; the first that fits."""
HEAD = """# What `ownpath verify` was seen to catch

{caught} ways to corrupt a good checkpoint, a loaded model or a kernel's output. Each was done, `ownpath verify` was run
on it, failed, and named the place. Five intact checkpoints of five exports and five seeds pass, and so does the
embedded model. `tests/cpu/verify/test_mutations.py` does all of it again; the corruptions are in
`tests/support/mutations/`. This page is written by `python tools/mutation_table.py`.

- **caught by**: the checks that failed and their stage. The first is not always the nearest: the place and the sentence
  are those of the check in bold. [verify.md](verify.md) says what each looks at.
- **options**: what the command was given besides the model; everything else is its default. Where no stages are named,
  all ran (behind a failed file stage the others are skipped). Fewer stages save the tests' time: what
  loading gets wrong, what a kernel does and what only a whole layer shows go through the stages that look there.
- Everything ran on a CPU, in float32, on checkpoints of three layers, one of each kind, with eight experts (the packed
  layout: on the embedded model). Packed layouts are planned for sm_90 and loaded on the CPU, which runs no kernel.
- No CUDA graphs are captured here, so that their stale inputs are those of a runner that keeps a buffer of its own.
"""
TAIL = """
## Not caught
`ownpath verify` passes these, and says so here rather than nowhere.

| mutation | what is corrupted | options | why |
|---|---|---|---|
"""


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
        parts.append("\n".join([f"\n## {heading}", _line(COLUMNS), "|---" * len(COLUMNS) + "|", *rows, ""]))
    unseen = [_line((name, it.mutation.what, _code(it.mutation.options), it.why)) for name, it in UNSEEN.items()]
    return "".join(parts) + TAIL + "\n".join(unseen) + "\n"


def _row(name: str, mutation: Mutation, outcome: Outcome) -> str:
    assert outcome.finding is not None, f"{name} is not caught"
    stages: dict[str, list[str]] = {}
    for id_ in outcome.ids:
        shown = f"**{id_}**" if id_ == mutation.check else id_
        stages.setdefault(stage_of(id_), []).append(shown)
    caught = "; ".join(f"{', '.join(ids)} ({stage})" for stage, ids in stages.items())
    finding = outcome.finding
    return _line((name, mutation.what, _code(mutation.options), caught, _code(finding.where), finding.message))


def stage_of(id_: str) -> str:
    return next(stage for start, stage in STAGE_OF if id_.startswith(start))


def rows() -> list[Row]:
    """What the committed page says was caught, in its order."""
    found = []
    for line in PATH.read_text(encoding="utf-8").split("## Not caught")[0].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == len(COLUMNS) and cells[0] != COLUMNS[0] and not cells[0].startswith("---"):
            found.append(Row(cells[0], tuple(re.findall(r"[A-Z]+\d+", cells[3])), cells[4].strip("`")))
    return found


def unseen_names() -> list[str]:
    """What it says was not."""
    lines = PATH.read_text(encoding="utf-8").split("## Not caught")[1].splitlines()
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
