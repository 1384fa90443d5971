"""Compiles Triton kernels for a GPU that is not here, exactly as their launchers would launch them.

``recorded_launches`` runs host code on CPU tensors and, in place of each launch, keeps the kernel with the types,
constants and options of its arguments. ``compile_launch`` compiles one of them for a compute capability and reads
registers and stack off the cubin. A stack above 0 means that registers were spilt.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(nvidia.__file__).parent / "bin"
TYPES = {
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, each argument's Triton type, the compile-time constants, what 16 divides, options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Compiled:
    """The compiler's output. sass is disassembled on demand."""

    launch: Launch
    ptx: str
    cubin: Path
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    intermediate: str = field(repr=False)

    def sass(self) -> str:
        return _run("cuobjdump", "-sass", str(self.cubin))


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects every Triton launch in its body instead of making it; equal launches are kept once."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(kernel, args, kwargs)
        if launch not in launches:
            launches.append(launch)

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, sm: int, folder: Path) -> Compiled:
    """The launch compiled for ``sm``; the cubin is left in ``folder``."""
    names = [name for name, _ in launch.signature]
    attrs = {(names.index(name),): DIVISIBLE for name in launch.divisible}
    source_of = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_of(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    cubin = folder / f"{launch.name}.{sm}.{sum(1 for _ in folder.iterdir())}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = _run("cuobjdump", "-res-usage", str(cubin))
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    shared, columns = built.metadata.shared, getattr(built.metadata, "tmem_size", None) or 0
    return Compiled(launch, built.asm["ptx"], cubin, registers, stack, shared, columns, built.asm["ttgir"])


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    assert list(given) == list(kernel.arg_names), f"{kernel.__name__}: {set(kernel.arg_names) - set(given)} not given"
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, constants, divisible = [], [], []
    for param in kernel.params:
        value = given[param.name]
        kind = "constexpr" if param.is_constexpr else _type(value, not param.do_not_specialize)
        signature.append((param.name, kind))
        if kind == "constexpr":
            constants.append((param.name, value))
        elif kind.startswith("*") or (kind == "i32" and value % 16 == 0 and not param.do_not_specialize):
            divisible.append(param.name)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items())))


def _type(value: Any, specialize: bool) -> str:
    """Triton's name of an argument's type; None and 1 are compile-time constants, as in a launch."""
    if value is None or (specialize and type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        assert value.data_ptr() % 16 == 0
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    assert isinstance(value, int | float), value
    return "i32" if isinstance(value, int) else "fp32"


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / tool), *args], check=True, capture_output=True, text=True).stdout
