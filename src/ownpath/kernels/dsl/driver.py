"""Launches compiled kernels through the CUDA driver, so that a machine with a warm cache needs no kernel compiler.

Everything here is ``libcuda``'s C interface through ctypes: module load, tensor maps, launches with the two attributes
the kernels use (clusters, programmatic dependent launch). The caller keeps arguments alive until the launch returns;
the driver copies them.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
BFLOAT16, FLOAT8 = 9, 0
SWIZZLE_128B, PROMOTE_L2_256B = 3, 3


class CudaError(RuntimeError):
    """A driver call that failed, with its name and code."""


class TensorMap(ctypes.Structure):
    """128 opaque bytes that describe a tensor to the copy engine; aligned to 64 when passed as an argument."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("cluster", ctypes.c_uint * 3), ("flag", ctypes.c_int))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@lru_cache(maxsize=1)
def _cuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(name: str, code: int) -> None:
    if code:
        raise CudaError(f"{name} failed with CUDA driver error {code}")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: machine code, entry name, threads per CTA, CTAs per cluster.

    dependent: it may be started while its predecessor drains.
    """

    code: bytes
    entry: str
    num_threads: int
    cluster: int = 1
    dependent: bool = True


class Kernel:
    """A loaded kernel. ``dependent``: it may start while its predecessor drains, because it waits where it must."""

    def __init__(self, binary: Binary) -> None:
        cuda, module, function = _cuda(), ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream()
        _check("cuModuleLoadData", cuda.cuModuleLoadData(ctypes.byref(module), binary.code))
        name = binary.entry.encode()
        _check("cuModuleGetFunction", cuda.cuModuleGetFunction(ctypes.byref(function), module, name))
        self._function = function
        self._attributes = (_Attribute * 2)()
        used = 0
        if binary.dependent:
            self._attributes[used].id = PROGRAMMATIC_STREAM_SERIALIZATION
            self._attributes[used].value.flag = 1
            used += 1
        if binary.cluster > 1:
            self._attributes[used].id = CLUSTER_DIMENSION
            self._attributes[used].value.cluster = (binary.cluster, 1, 1)
            used += 1
        self._config = _Config(block=(binary.num_threads, 1, 1), attributes=self._attributes, num_attributes=used)

    def launch(self, grid: int, args: Sequence[Any], stream: int) -> None:
        """Starts the kernel. args: ctypes values in the order of the kernel's parameters.

        Errors: CudaError when the driver refuses the launch.
        """
        self._config.grid[0], self._config.grid[1], self._config.grid[2] = grid, 1, 1
        self._config.stream = stream
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        code = _cuda().cuLaunchKernelEx(ctypes.byref(self._config), self._function, pointers, None)
        _check("cuLaunchKernelEx", code)


def tensor_map(tensor: torch.Tensor, box_rows: int, box_cols: int) -> TensorMap:
    """Describes a row-major matrix [rows, cols] for boxes of [box_rows, box_cols] with the 128-byte swizzle.

    Errors: CudaError, for a pointer that is not 16-byte aligned or a row pitch that is not a multiple of 16 bytes.
    """
    rows, cols = tensor.shape
    width = tensor.element_size()
    raw = (ctypes.c_uint64 * 24)()
    start = ctypes.addressof(raw)
    described = TensorMap.from_address(start + -start % 64)
    dims = (ctypes.c_uint64 * 2)(cols, rows)
    pitch = (ctypes.c_uint64 * 1)(tensor.stride(0) * width)
    box, unit = (ctypes.c_uint32 * 2)(box_cols, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    code = _cuda().cuTensorMapEncodeTiled(
        ctypes.byref(described),
        BFLOAT16 if width == 2 else FLOAT8,
        2,
        ctypes.c_void_p(tensor.data_ptr()),
        dims,
        pitch,
        box,
        unit,
        0,
        SWIZZLE_128B,
        PROMOTE_L2_256B,
        0,
    )
    _check("cuTensorMapEncodeTiled", code)
    described._keep = raw
    return described


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """The address of a tensor's first element as a kernel argument."""
    return ctypes.c_void_p(tensor.data_ptr())
