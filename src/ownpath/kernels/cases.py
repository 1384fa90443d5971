"""The shapes at which tests run a kernel and bench times it. Each family lists its own in ``cases.py``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCase:
    """One operation at one shape. sizes: defined by the family; tokens: numbers of rows.

    op: whose arguments and judge ``conformance.operations`` takes. kernel: its name; ``triton.<op>`` by default.
    tiny: small enough to be interpreted on a CPU. bench: shown in the bench's table.
    """

    op: str
    label: str
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    tiny: bool = False
    bench: bool = False
    kernel: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", self.kernel or f"triton.{self.op}")
