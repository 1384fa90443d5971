"""The table of benches. A new one is a module and a line here; it is imported only when it is asked for."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ownpath.bench.cases import family_cases
from ownpath.bench.published import model_shape
from ownpath.bench.shapes import linear_shape, moe_shape, parallel_shape
from ownpath.formats import FP8_BLOCK, NVFP4, Format
from ownpath.ops import OpKind

if TYPE_CHECKING:
    from ownpath.bench.request import BenchRequest
    from ownpath.bench.row import Row

    Measured = Callable[[BenchRequest], Iterator[Row]]
    """Measures what is asked for, row by row. Errors: ValueError for an unknown shape or contender."""


class Bench(NamedTuple):
    """A bench. place: ``module:function`` in ``ownpath.bench``, a ``Measured``; about: for the help.

    find: looks up a shape by its name, without torch. Errors: ValueError for a name that is unknown.
    kind, stored: the operation, and the weights' format if they have one: every registered kernel of these may take
    part by its name. ``None``: a bench of more than one operation. kinds: the operations of such a one.
    """

    place: str
    about: str
    find: Callable[[str], object]
    kind: OpKind | None = None
    stored: Format | None = None
    kinds: tuple[OpKind, ...] = ()

    def load(self) -> "Measured":
        """Imports the bench."""
        module, _, name = self.place.partition(":")
        found: Measured = getattr(import_module(f"ownpath.bench.{module}"), name)
        return found


BENCHES = {
    "moe": Bench("moe:measured", "NVFP4 experts", moe_shape, OpKind.MOE, NVFP4),
    "linear": Bench("linear:measured_nvfp4", "NVFP4 linears", linear_shape, OpKind.LINEAR, NVFP4),
    "fp8": Bench("linear:measured_fp8", "FP8 linears", linear_shape, OpKind.LINEAR, FP8_BLOCK),
    "attend": Bench("attend:measured", "decode attention", partial(family_cases, "attend"), OpKind.ATTEND),
    "attend_chunk": Bench(
        "attend_chunk:measured", "attention of chunks", partial(family_cases, "chunks"), OpKind.ATTEND_CHUNK
    ),
    "scores": Bench("scores:measured", "the indexer's scores", partial(family_cases, "scores"), OpKind.INDEX_SCORES),
    "select": Bench("select:measured", "the selection by scores", partial(family_cases, "select"), OpKind.SELECT),
    "angles": Bench("angles:measured", "a decode step's angles", partial(family_cases, "angles"), OpKind.STEP_ANGLES),
    "entries": Bench(
        "entries:measured", "a decode step's cache writes", partial(family_cases, "entries"), OpKind.ENTRIES
    ),
    "chunk_entries": Bench(
        "chunk_entries:measured", "cache writes of chunks", partial(family_cases, "chunk_entries"), OpKind.CHUNK_ENTRIES
    ),
    "chunk_rings": Bench(
        "chunk_entries:measured_rings",
        "what chunks leave in the rings",
        partial(family_cases, "chunk_entries"),
        OpKind.CHUNK_RINGS,
    ),
    "sample": Bench("sample:measured", "the sampler", partial(family_cases, "sample"), OpKind.SAMPLE),
    "accept_drafts": Bench(
        "draft_ends:measured_accept",
        "which guesses of a step are right",
        partial(family_cases, "drafts"),
        OpKind.ACCEPT_DRAFTS,
    ),
    "go_on_drafting": Bench(
        "draft_ends:measured_go_on",
        "the end of a step with drafts",
        partial(family_cases, "drafts"),
        OpKind.GO_ON_DRAFTING,
    ),
    "step": Bench(
        "step:measured", "a decode step of a whole model of random weights", model_shape, kinds=(OpKind.TURN,)
    ),
    "prompt": Bench("prompt:measured", "a prompt of a whole model of random weights, in chunks", model_shape),
    "drafts": Bench("drafts:measured", "decode steps with drafts, of such a model", model_shape),
    "parallel": Bench(
        "parallel:measured",
        "exchanges between GPUs, and experts over them",
        parallel_shape,
        kinds=(OpKind.REDUCE, OpKind.GATHER, OpKind.SCATTER),
    ),
}
