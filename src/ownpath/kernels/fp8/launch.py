"""Prepares launches of the FP8 kernels: arguments, tensor maps, grids. ``linear`` checks the inputs.

A launch is prepared from sizes and fixed addresses; ``start`` takes the addresses that change between calls.
"""

from ctypes import c_int
from dataclasses import dataclass

from torch import Tensor

from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import Argument, Boxes, Launch, Pointers, current_stream, num_sms, pointer
from ownpath.kernels.fp8.choose import WeightKey
from ownpath.kernels.fp8.config import CHUNK_K, QuantizeConfig, W8A8Config, W8A16Config
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, PackedFp8

ROWS_PER_WORKSPACE_BLOCK = 64


@dataclass(frozen=True)
class Rows:
    """The rows of a launch: their number, and the elements from row to row in x and in out."""

    count: int
    x_pitch: int
    out_pitch: int


def workspace_bytes(num_tokens: int, num_k_blocks: int) -> int:
    """Returns the bytes that W8A8 needs for the quantised activations of ``num_tokens`` rows."""
    return -(-num_tokens // ROWS_PER_WORKSPACE_BLOCK) * num_k_blocks * ACT_BLOCK_BYTES


def workspace_rows(num_bytes: int, num_k_blocks: int) -> int:
    """Returns the number of rows whose quantised activations fit ``num_bytes``: a multiple of 64."""
    return num_bytes // (num_k_blocks * ACT_BLOCK_BYTES) * ROWS_PER_WORKSPACE_BLOCK


def weight_key(weight: PackedFp8) -> WeightKey:
    """Returns the properties of a weight that decide its kernels: row blocks, K blocks, folded, ragged."""
    return weight.num_row_blocks, weight.num_k_blocks, weight.folded, weight.ragged


class W8A16Launch:
    """Prepared launch of out = x (E4M3 x scale).T."""

    def __init__(self, config: W8A16Config, weight: PackedFp8, x_address: int, rows: Rows) -> None:
        self.x = Boxes(x_address, (rows.count, weight.in_features), rows.x_pitch, (config.num_n, CHUNK_K))
        self._pointers = Pointers(1)
        sizes = (rows.count, rows.out_pitch, weight.num_row_blocks, weight.num_k_blocks)
        operands = map(pointer, (weight.blocks, weight.scales, weight.rows))
        args: tuple[Argument, ...] = (self.x.argument, *operands, *self._pointers.arguments, *map(c_int, sizes))
        grid = config.grid(rows.count, weight.num_row_blocks)
        self._launch = Launch(load(config, weight.blocks.get_device()), (grid, 1, 1), args)

    def start(self, x: int, out: int, stream: int) -> None:
        """Launches with the given addresses."""
        self.x.point_at(x)
        self._pointers.set(out)
        self._launch.start(stream)


class QuantizeLaunch:
    """Prepared launch that quantises x, bfloat16 [count, K], in blocks."""

    def __init__(self, config: QuantizeConfig, width: int, num_k_blocks: int, rows: Rows, device_index: int) -> None:
        self._pointers = Pointers(2)
        sizes = (rows.count, width, rows.x_pitch, num_k_blocks)
        args: tuple[Argument, ...] = (*self._pointers.arguments, *map(c_int, sizes))
        self._launch = Launch(load(config, device_index), config.grid(rows.count, num_k_blocks), args)

    def start(self, x: int, workspace: int, stream: int) -> None:
        """Launches with the given addresses."""
        self._pointers.set(x, workspace)
        self._launch.start(stream)


class W8A8Launch:
    """Prepared launch of out = quantised x (E4M3 x scale).T."""

    def __init__(self, config: W8A8Config, weight: PackedFp8, rows: Rows) -> None:
        self._pointers = Pointers(2)
        workspace, out = self._pointers.arguments
        sizes = (rows.count, rows.out_pitch, weight.num_row_blocks, weight.num_k_blocks)
        operands = map(pointer, (weight.blocks, weight.scales, weight.rows))
        args: tuple[Argument, ...] = (workspace, *operands, out, *map(c_int, sizes))
        device_index = weight.blocks.get_device()
        grid = config.grid(rows.count, weight.num_row_blocks, num_sms(device_index))
        self._launch = Launch(load(config, device_index), (grid, 1, 1), args)

    def start(self, workspace: int, out: int, stream: int) -> None:
        """Launches with the given addresses."""
        self._pointers.set(workspace, out)
        self._launch.start(stream)


def w8a16_launch(config: W8A16Config, x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """Launches a product with the kernel of ``config``. x bfloat16 [M, K] with rows aligned to 16 bytes, out [M, N]."""
    call = W8A16Launch(config, weight, x.data_ptr(), Rows(len(x), x.stride(0), out.stride(0)))
    call.start(x.data_ptr(), out.data_ptr(), current_stream(x.get_device()))


def quantize_launch(config: QuantizeConfig, x: Tensor, workspace: Tensor, num_k_blocks: int) -> None:
    """Launches the quantisation of x into ``workspace``."""
    call = QuantizeLaunch(config, x.shape[1], num_k_blocks, Rows(len(x), x.stride(0), 0), x.get_device())
    call.start(x.data_ptr(), workspace.data_ptr(), current_stream(x.get_device()))


def w8a8_launch(config: W8A8Config, workspace: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """Launches a product of the blocks in ``workspace`` with the kernel of ``config``."""
    call = W8A8Launch(config, weight, Rows(len(out), 0, out.stride(0)))
    call.start(workspace.data_ptr(), out.data_ptr(), current_stream(out.get_device()))
