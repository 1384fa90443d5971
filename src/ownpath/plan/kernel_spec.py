"""What the catalogue says of a kernel."""

from dataclasses import dataclass

from ownpath.formats import Format
from ownpath.official import PLAIN, Step
from ownpath.plan.opspec import OpKind


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's contract.

    name: key of the implementation in ``ownpath.kernels``.
    formats: stored formats it takes; empty for an op without a stored matrix.
    runner: the class in ``ownpath.runners`` that holds its operand.
    min_sm, end_sm: lowest compute capability times ten, and the first that is too new; ``None`` runs anywhere
        torch does.
    dim_multiple: every dimension of its operand must be a multiple of it.
    first_dim: what the first dimension must be; the multiple is asked of the others then.
    dim_power_of_two: every dimension must be a power of two.
    activations: dtypes it takes; empty for any.
    is_batch_invariant: a row's bits do not depend on the other rows of the call, nor on their number.
    packages: what must be importable.
    official: the steps that it computes as DeepSeek's published code does.
    """

    name: str
    kind: OpKind
    formats: tuple[Format, ...]
    runner: str
    layout: str
    why: str
    min_sm: int | None = None
    end_sm: int | None = None
    dim_multiple: int = 1
    first_dim: int | None = None
    dim_power_of_two: bool = False
    activations: tuple[str, ...] = ()
    is_batch_invariant: bool = False
    packages: tuple[str, ...] = ()
    official: frozenset[Step] = PLAIN
