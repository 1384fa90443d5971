"""The shapes at which tests run a kernel and bench times it. Each family lists its own in ``cases.py``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCase:
    """One operation at one shape. sizes: defined by the family; tokens: numbers of rows.

    op: the registry's names are ``ref.<op>`` and, with the variant, ``triton.<op><variant>``.
    tiny: small enough to be interpreted on a CPU. bench: shown in the bench's table.
    """

    op: str
    label: str
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    tiny: bool = False
    bench: bool = False
    variant: str = ""

    @property
    def kernel(self) -> str:
        return self.op + self.variant
