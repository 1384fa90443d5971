"""The table of benches. A new one is a module and a line here; nothing is imported before it is asked for."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ownpath.formats import FP8_BLOCK, NVFP4, Format
from ownpath.ops import OpKind

if TYPE_CHECKING:
    from ownpath.bench.request import BenchRequest
    from ownpath.bench.row import Row

    Measured = Callable[[BenchRequest], Iterator[Row]]
    """Measures what is asked for, row by row. Errors: ValueError for an unknown shape or contender."""


class Bench(NamedTuple):
    """A bench. place: ``module:function`` in ``ownpath.bench``, a ``Measured``; about: for the help.

    kind, stored: the operation, and the weights' format if they have one: every registered kernel of these may take
    part by its name. ``None``: a bench of more than one operation.
    """

    place: str
    about: str
    kind: OpKind | None = None
    stored: Format | None = None

    def load(self) -> "Measured":
        """Imports the bench."""
        module, _, name = self.place.partition(":")
        found: Measured = getattr(import_module(f"ownpath.bench.{module}"), name)
        return found


BENCHES = {
    "moe": Bench("moe:measured", "NVFP4 experts", OpKind.MOE, NVFP4),
    "linear": Bench("linear:measured_nvfp4", "NVFP4 linears", OpKind.LINEAR, NVFP4),
    "fp8": Bench("linear:measured_fp8", "FP8 linears", OpKind.LINEAR, FP8_BLOCK),
    "attend": Bench("attend:measured", "decode attention", OpKind.ATTEND),
    "scores": Bench("scores:measured", "the indexer's scores", OpKind.INDEX_SCORES),
    "select": Bench("select:measured", "the selection by scores", OpKind.SELECT),
    "entries": Bench("entries:measured", "a decode step's cache writes", OpKind.ENTRIES),
    "sample": Bench("sample:measured", "the sampler", OpKind.SAMPLE),
    "step": Bench("step:measured", "a decode step of a whole model of random weights"),
}
