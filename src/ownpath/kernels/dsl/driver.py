"""Launches compiled kernels through the CUDA driver, so that a machine with a warm cache needs no kernel compiler.

It calls ``libcuda``'s C interface through ctypes: module load, tensor maps, launches with the two attributes that the
kernels use (clusters, programmatic dependent launch).

A ``Launch`` is prepared once, with grid, arguments and their addresses in place. A call changes only the addresses that
differ and starts it, with one driver call. The driver copies arguments when it is called. Only one thread at a time may
use a launch.
"""

import ctypes
from collections.abc import Sequence
from ctypes import addressof, byref
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

import torch

CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
BFLOAT16 = 9
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
PROMOTE_L2_256B = 3
Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.c_float | ctypes.Structure
"""A kernel argument as a ctypes value."""


class CudaError(RuntimeError):
    """Raised when a driver call fails, with its name and code."""


class TensorMap(ctypes.Structure):
    """A tensor map: 128 opaque bytes that describe a tensor to the copy engine; aligned to 64 when passed."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class _AttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("cluster", ctypes.c_uint * 3), ("flag", ctypes.c_int))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@lru_cache(maxsize=1)
def _cuda() -> ctypes.CDLL:
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    cuda.cuTensorMapReplaceAddress.argtypes = (ctypes.c_void_p,) * 2
    return cuda


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


@dataclass(frozen=True)
class Function:
    """A kernel on a device. handle: the driver's function; shared_bytes: dynamic shared memory of a CTA.

    dependent: it may start while its predecessor drains, because it waits where it must.
    """

    handle: int
    num_threads: int
    shared_bytes: int = 0
    cluster: int = 1
    dependent: bool = True


def load_function(binary: Binary) -> Function:
    """Loads machine code onto the current device. Errors: CudaError."""
    cuda, module, function = _cuda(), ctypes.c_void_p(), ctypes.c_void_p()
    torch.cuda.current_stream()
    _check("cuModuleLoadData", cuda.cuModuleLoadData(byref(module), binary.code))
    name = binary.entry.encode()
    _check("cuModuleGetFunction", cuda.cuModuleGetFunction(byref(function), module, name))
    assert function.value
    return Function(function.value, binary.num_threads, 0, binary.cluster, binary.dependent)


class Pointers:
    """Addresses that change from call to call, in one buffer that one or several launches read.

    arguments: the launches' arguments, in the order of ``set``.
    """

    def __init__(self, count: int) -> None:
        self._memory = (ctypes.c_uint64 * count)()
        self.arguments = tuple(ctypes.c_void_p.from_buffer(self._memory, 8 * idx) for idx in range(count))
        self._pack_into = Struct(f"{count}Q").pack_into

    def set(self, *addresses: int) -> None:
        """Sets all addresses."""
        self._pack_into(self._memory, 0, *addresses)


class Launch:
    """A prepared launch of a kernel.

    args: ctypes values in the order of the kernel's parameters; addresses that change between calls are ``Pointers``.
    """

    def __init__(self, function: Function, grid: tuple[int, int, int], args: Sequence[Argument]) -> None:
        self._attributes = (_Attribute * 2)()
        used = 0
        if function.dependent:
            self._attributes[used].id = PROGRAMMATIC_STREAM_SERIALIZATION
            self._attributes[used].value.flag = 1
            used += 1
        if function.cluster > 1:
            self._attributes[used].id = CLUSTER_DIMENSION
            self._attributes[used].value.cluster = (function.cluster, 1, 1)
            used += 1
        self._config = _LaunchConfig(
            grid=grid,
            block=(function.num_threads, 1, 1),
            shared_bytes=function.shared_bytes,
            attributes=self._attributes,
            num_attributes=used,
        )
        self._args = tuple(args)
        self._addresses = (ctypes.c_void_p * len(args))(*map(addressof, args))
        self._launch = _cuda().cuLaunchKernelEx
        self._call = addressof(self._config), function.handle, addressof(self._addresses), None
        self._stream = 0

    def start(self, stream: int) -> None:
        """Launches on a stream (its handle). Errors: CudaError when the driver refuses."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code = self._launch(*self._call)
        if code:
            _check("cuLaunchKernelEx", code)


class Boxes:
    """A row-major matrix [rows, cols] as the copy engine sees it: boxes of [box_rows, box_cols].

    ``argument`` is passed to a launch; ``point_at`` moves it to another matrix of the same shape and pitch.
    """

    def __init__(
        self, address: int, shape: tuple[int, int], pitch: int, box: tuple[int, int], swizzle_bytes: int = 128
    ) -> None:
        """Describes BF16 at an address, rows ``pitch`` elements apart.

        Errors: CudaError, for an address that is not 16-byte aligned or a pitch that is not a multiple of 16 bytes.
        """
        self.num_rows = shape[0]
        self._raw = (ctypes.c_uint64 * 24)()
        offset = -addressof(self._raw) % 64
        self.argument = TensorMap.from_buffer(self._raw, offset)  # keeps the memory alive, as from_address does not
        self._map_address = addressof(self.argument)
        self._address = address
        code = _cuda().cuTensorMapEncodeTiled(
            byref(self.argument),
            BFLOAT16,
            2,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(shape[1], shape[0]),
            (ctypes.c_uint64 * 1)(2 * pitch),
            (ctypes.c_uint32 * 2)(box[1], box[0]),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            SWIZZLES[swizzle_bytes],
            PROMOTE_L2_256B,
            0,
        )
        _check("cuTensorMapEncodeTiled", code)

    def point_at(self, address: int) -> None:
        """Moves the map to another address. Errors: CudaError for one that is not 16-byte aligned."""
        if address != self._address:
            _check("cuTensorMapReplaceAddress", _cuda().cuTensorMapReplaceAddress(self._map_address, address))
            self._address = address


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Returns the address of a tensor's first element as a kernel argument."""
    return ctypes.c_void_p(tensor.data_ptr())


def current_stream(device_index: int) -> int:
    """Returns the handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


@lru_cache(maxsize=16)
def num_sms(device_index: int) -> int:
    """Returns a device's number of streaming multiprocessors."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count
