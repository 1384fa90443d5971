"""Specs of the exchanges between ranks."""

from dataclasses import replace

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

_WHY = {
    OpKind.REDUCE: "every rank gives every other its part; each adds them in the order of ranks, in at least float32",
    OpKind.GATHER: "every rank gives every other its rows, or its columns",
    OpKind.SCATTER: "every rank gives every other its part of that one's rows; each adds them in the order of ranks",
    OpKind.TURN: "every rank gives every other its columns of that one's rows",
    OpKind.DISPATCH: "every rank gives every other the rows that chose one of that one's experts, through the host",
    OpKind.COMBINE: "every rank gives every other its sums of that one's rows; each adds them in the order of ranks",
}

_REFERENCES = tuple(
    KernelSpec(
        f"ref.{kind}",
        kind,
        (),
        "Exchange",
        "row_major",
        f"torch: {why}",
        f"exchange.ref:{kind.name}",
        is_batch_invariant=True,
        is_default=True,
    )
    for kind, why in _WHY.items()
)

PUSHED = KernelSpec(
    "triton.reduce",
    OpKind.REDUCE,
    (),
    "Exchange",
    "row_major",
    "pushed into every rank's inbox, awaited and added in the order of ranks, in one launch",
    "exchange.launch:PUSHED_REDUCE",
    min_sm=90,
    dim_multiple=128,
    activations=("bfloat16",),
    is_batch_invariant=True,
    packages=("triton",),
    launches=(r"\bexchange_(rows|words)\b",),
    evidence=Evidence("exchange.ref:all_reduce", "tests/interpret/test_exchange_kernel.py", "ownpath bench parallel"),
)
PUSHED_GATHER = KernelSpec(
    "triton.gather",
    OpKind.GATHER,
    (),
    "Exchange",
    "row_major",
    "pushed to every other rank and awaited, in one launch; all ranks have as many rows",
    "exchange.gather:PUSHED_GATHER",
    min_sm=90,
    is_batch_invariant=True,
    packages=("triton",),
    launches=(r"\b(gather_rows|place_rows|gather_words)\b",),
    evidence=Evidence("exchange.ref:all_gather", "tests/interpret/test_gather_kernel.py", "ownpath bench parallel"),
)
PUSHED_SCATTER = KernelSpec(
    "triton.scatter",
    OpKind.SCATTER,
    (),
    "Exchange",
    "row_major",
    "rows pushed to their rank, awaited and added in the order of ranks, in one launch; all ranks have as many rows",
    "exchange.scatter:PUSHED_SCATTER",
    min_sm=90,
    activations=("bfloat16",),
    is_batch_invariant=True,
    packages=("triton",),
    launches=(r"\bscatter_(rows|words)\b",),
    evidence=Evidence(
        "exchange.ref:reduce_scatter", "tests/interpret/test_scatter_kernel.py", "ownpath bench parallel"
    ),
)

PUSHED_TURN = replace(
    PUSHED_GATHER,
    name="triton.turn",
    kind=OpKind.TURN,
    entry="exchange.gather:PUSHED_TURN",
    why="columns of all rows pushed to every rank and awaited, in one launch; each keeps its own rows",
    evidence=Evidence("exchange.ref:all_gather", "tests/support/mapped_windows.py", "ownpath bench step"),
)

SPECS = (PUSHED, PUSHED_GATHER, PUSHED_SCATTER, PUSHED_TURN, *_REFERENCES)
