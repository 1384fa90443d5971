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
## How small a factor is seen
F14 decodes 16 rows of every matrix and 4 of every expert's (0.18 % of V4-Flash), and compares RMS and
largest value with the other layers' or experts'. An intact matrix is not at its peers' median, so that the factor that
shows is the limit times or divided by how far it was from there. Found by scaling each tensor alone: on the embedded
model, and on 43 layers of V4-Flash's kinds whose RMS spreads log-normally from layer to layer.

| one of these, scaled alone | embedded model | 43 layers, spread 1.05 to 1.35 | spread 1.5 | spread 1.65 |
|---|---|---|---|---|
| a projection, a router, a compressor | 4 to 15 | 6 to 7 | 6 to 12 | 8 to 20 |
| an expert | 5 to 9 | 5 to 8 | 7 to 10 | 10 to 20 |
| the indexer, of which the embedded model has two | 7 to 10 | 6 to 7 | 6 to 8 | 8 to 12 |
| all layers of a kind, or the head | 30 | 30 to 50 | 30 | 30 |
| a norm that other layers have | 15 to 50 | 20 to 30 | 20 to 50 | 20 to 50 |
| a matrix of a hyper-connection | 30 to 200 | | | |
| biases, sinks, positions of a compressor (upwards) | 200 to 1000, a sink's more | | | |
| the embedding, `norm.weight` | 50 down, 1000 up; 50 up, 1000 down | | | |

However wide the spread, a matrix 16 times its peers' median is too far. `hc_head_*` have no peers: nothing is said of
them. In a model of one layer each matrix is held against the other kinds (a factor of 24), of two layers against the
other one (8). Wrong block scales show where they move the sampled rows. No alarm: the embedded model,
what `quantize` makes of three exports, 114 random checkpoints of six exports (1 to 9 layers; gains of 0.5 to 1.5, or
one deviation of 0.006 to 1 for all matrices), 1000 drawn sets of magnitudes of 1 to 5 layers, and 72 of 43 layers with
spreads up to 1.65 and a trend over depth of up to 4.5. No published checkpoint was at hand.

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
    num_told = sum(mutation.is_warning for group in GROUPS.values() for mutation in group.values())
    parts = [HEAD.format(caught=len(outcomes) - num_told)]
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
    """Returns the mutations that the committed page lists as caught or told, in its order."""
    caught = PATH.read_text(encoding="utf-8").split("## How small")[0]
    found = filter(None, map(_ROW.fullmatch, caught.splitlines()))
    return [Row(row[1], tuple(re.findall(r"[A-Z]+\d+", row[2])), row[3]) for row in found]


def unseen_names() -> list[str]:
    """Returns the mutations that it lists as not caught."""
    lines = PATH.read_text(encoding="utf-8").split("## Not caught")[1].splitlines()
    return [line[2:].split(" (")[0] for line in lines if line.startswith("- ")]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
