"""Launches Triton functions through the driver: Triton compiles and launches each once, the driver every later time.

Triton's own launch binds and specialises every argument again, which takes 20 us or more on the host. A ``TritonCall``
holds one specialisation and may be started again for tensors of the same shapes, dtypes and alignment; weights keep
their addresses.
"""

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ownpath.kernels.dsl.driver import Argument, Boxes, Function, Launch, Pointers, pointer

SCALARS: Mapping[str, Callable[[Any], Any]] = {"i32": ctypes.c_int, "i64": ctypes.c_longlong, "fp32": ctypes.c_float}
Given: TypeAlias = Any
"""An argument of a Triton function: a tensor, a descriptor, an integer or a float."""


class TritonCall:
    """A prepared launch of a Triton function. Its tensors' addresses may change between calls, nothing else."""

    def __init__(self, launch: Launch, pointers: Pointers, boxes: Boxes | None) -> None:
        self._launch, self._set, self._boxes = launch, pointers.set, boxes

    def start(self, stream: int, *addresses: int) -> None:
        """Launches. addresses: of the moving tensors, in order."""
        self._set(*addresses)
        self._launch.start(stream)

    def start_described(self, stream: int, described: int, *addresses: int) -> None:
        """Launches. described: address of the moving descriptor's tensor; addresses: of the other moving tensors."""
        assert self._boxes is not None
        self._boxes.point_at(described)
        self._set(*addresses)
        self._launch.start(stream)


def launch(
    function: "JITFunction[Any]",
    grid: tuple[int, ...],
    args: Sequence[Given],
    options: Mapping[str, Any],
    moving: Collection[int],
) -> TritonCall | None:
    """Launches through Triton and returns the prepared launch; ``None`` where Triton interprets.

    args: all arguments that are not constants, in the function's order. options: constants and launch options.
    moving: positions in ``args`` of the tensors, and of at most one descriptor, that later calls replace; the others
        must stay where they are.
    """
    compiled = function[grid](*args, **options)
    if compiled is None:
        return None
    metadata = compiled.metadata
    assert not metadata.global_scratch_size, f"{metadata.name} needs scratch of Triton's"
    assert metadata.num_ctas == 1, f"{metadata.name} needs a cluster"
    pointers = Pointers(sum(isinstance(args[idx], Tensor) for idx in moving))
    slots, described = iter(pointers.arguments), list[Boxes]()
    passed: list[Argument] = []
    descriptions = iter(metadata.tensordesc_meta or ())
    for idx, (kind, value) in enumerate(zip(compiled.src.signature.values(), args, strict=False)):
        if isinstance(value, TensorDescriptor):
            boxes = _boxes(value, next(descriptions))
            if idx in moving:
                described.append(boxes)
            passed += [boxes.argument, *map(ctypes.c_int, value.shape), *map(ctypes.c_longlong, value.strides)]
        elif kind == "constexpr":
            if isinstance(value, Tensor):
                raise AssertionError(f"{metadata.name} takes a tensor as a constant")
        elif isinstance(value, Tensor):
            passed.append(next(slots) if idx in moving else pointer(value))
        else:
            scalar: Argument = SCALARS[kind](value)
            passed.append(scalar)
    scratch = (ctypes.c_void_p(), ctypes.c_void_p())
    threads = 32 * metadata.num_warps
    function_on_device = Function(compiled.function, threads, metadata.shared, 1, bool(metadata.launch_pdl))
    sizes = (*grid, 1, 1)[:3]
    assert len(described) < 2, f"{metadata.name} has more than one moving descriptor"
    started = Launch(function_on_device, (sizes[0], sizes[1], sizes[2]), (*passed, *scratch))
    return TritonCall(started, pointers, described[0] if described else None)


def _boxes(descriptor: TensorDescriptor, description: Mapping[str, Any]) -> Boxes:
    """Returns the tensor map that Triton makes for a two-dimensional BF16 descriptor."""
    rows, cols = descriptor.shape
    block = description["block_size"]
    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[description["swizzle"]]
    return Boxes(descriptor.base.data_ptr(), (rows, cols), descriptor.strides[0], (block[0], block[1]), swizzle)
