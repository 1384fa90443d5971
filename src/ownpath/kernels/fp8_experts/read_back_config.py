"""The compile-time configuration of ``read_back_sm90``. Importable without the DSL."""

from dataclasses import dataclass
from typing import ClassVar

from ownpath.kernels.fp8_experts.config import QUANTIZE_GROUPS
from ownpath.kernels.nvfp4.config import DSL_SOURCES


@dataclass(frozen=True)
class ReadBackConfig:
    """The kernel that rounds rows to E4M3 and writes them as BF16."""

    compiler: ClassVar[str] = "fp8_experts.read_back_sm90:compile_read_back"

    @property
    def name(self) -> str:
        return "fp8_experts_read_back"

    @property
    def sources(self) -> tuple[str, ...]:
        own = (*(f"fp8_experts/{name}.py" for name in ("read_back_sm90", "read_back_config", "config", "ptx")),)
        return (*own, "fp8/ptx.py", "fp8/quantize_sm90.py", "fp8/layout.py", "fp8/config.py", *DSL_SOURCES)

    @property
    def num_threads(self) -> int:
        return 8 * QUANTIZE_GROUPS

    @property
    def cluster(self) -> int:
        return 1
