"""Products with BF16 weights for few rows of x on Hopper: gate, compressors, index weights.

How it works. A program owns up to 16 rows of W over all of K, each of its warps a slice of K. It begins to load its
weights before it waits for the kernel in front of it (weights never change), then loads x straight from L2 and
multiplies on the tensor cores, or in the lanes at one or two rows; the warps' float32 sums are added in one order. No
value passes through shared memory on its way to a product, and nothing is split between programs: no atomics, no
workspace, one launch.

Why it exists. cuBLAS needs two launches here, which do not overlap with their neighbours: 6 to 9 us for 0.5 to 17 MB.

Roofline. 2 * N * K bytes, once.

Limits. bfloat16 on both sides, K a multiple of 8, 16-byte aligned rows of x. Tiles are measured; what the table does
not hold, larger calls above all, runs on cuBLAS. The order of sums follows the tile, which follows the number of rows
of x: with one tile, a row's bits depend on nothing but the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
import triton

from ownpath.formats import BF16
from ownpath.kernels.checks import check, readable_rows, require_input
from ownpath.kernels.contract import Config, StoredLinear
from ownpath.kernels.dsl.driver import current_stream
from ownpath.kernels.dsl.triton import TritonCall, launch
from ownpath.kernels.empty import EmptyOutput
from ownpath.kernels.launch_cache import LaunchCache
from ownpath.kernels.plain.cublas import PLAIN_LINEAR as LIBRARY
from ownpath.kernels.plain.few_choose import FmaTile, PlainTile, choose_tile
from ownpath.kernels.plain.few_fma import plain_linear_few_fma_kernel
from ownpath.kernels.plain.few_sm90 import plain_linear_few_kernel
from ownpath.kernels.plain.operand import PlainOperand
from ownpath.kernels.variants import LIBRARY_VARIANT, variant_name
from ownpath.qtensor import QuantTensor

INTERPRETED = triton.knobs.runtime.interpret
FLOATS = (torch.bfloat16, torch.float32)
FewKey = tuple[int, int, torch.dtype]
"""Rows of x, elements from one to the next, dtype of y."""


@dataclass(frozen=True)
class FewOperand:
    """launches: by ``FewKey``, for inputs that have passed every check."""

    plain: PlainOperand
    launches: LaunchCache[FewKey, tuple[TritonCall, EmptyOutput]] = field(default_factory=LaunchCache, compare=False)
    lock: Lock = field(default_factory=Lock, compare=False)


class FewPlainKernel:
    """y = x Wᵀ in the dtype of x, or unrounded in float32."""

    def prepare(self, stored: StoredLinear) -> FewOperand:
        """Concatenates all shards' rows; a single shard is used as it is, without a copy."""
        plain = LIBRARY.prepare(stored)
        if plain.weight_NK.is_cuda:
            torch.cuda.synchronize(plain.weight_NK.device)  # the kernel does not wait for who writes weights
        return FewOperand(plain)

    def restore(self, operand: FewOperand) -> tuple[QuantTensor, ...]:
        """Returns all shards' rows as one matrix."""
        return LIBRARY.restore(operand.plain)

    def padding(self, operand: FewOperand) -> None:
        """Returns ``None``: the layout has no padding."""

    def configs(self, operand: FewOperand) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def planned_configs(self, stored: StoredLinear) -> Sequence[Config]:
        """Returns nothing: Triton compiles at the first call."""
        return ()

    def workspace(self, operand: FewOperand, num_tokens: int) -> None:
        """Returns ``None``: no call needs scratch."""

    def variant(self, x: torch.Tensor, operand: FewOperand) -> str:
        """Returns the tile's name, or ``library`` where cuBLAS computes."""
        weight_NK = operand.plain.weight_NK
        num_tokens = x.numel() // x.shape[-1]
        tile = choose_tile(num_tokens, *weight_NK.shape) if _is_readable(x, weight_NK) else None
        return LIBRARY_VARIANT if tile is None else tile_name(tile)

    def run(
        self,
        x: torch.Tensor,
        operand: FewOperand,
        *,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes y [..., N] in the dtype of x, or of ``out``. Errors: ValueError naming what is wrong with x, out."""
        return self._run(x, operand, x.dtype, out)

    def rounds_to_powers(self, operand: FewOperand, num_rows: int) -> bool:
        """See ``LinearKernel``."""
        return False

    def run_wide(self, x: torch.Tensor, operand: FewOperand) -> torch.Tensor:
        """Computes y in at least float32, with unrounded sums."""
        return self._run(x, operand, torch.promote_types(x.dtype, torch.float32), None)

    def __call__(self, x: torch.Tensor, weight_NK: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """Computes the product with the signature of the twin."""
        operand = self.prepare(StoredLinear((QuantTensor(weight_NK, None, None, BF16),)))
        return self._run(x, operand, out_dtype, None)

    def _run(self, x: torch.Tensor, operand: FewOperand, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
        weight_NK = operand.plain.weight_NK
        num_rows, width = weight_NK.shape
        device_index = weight_NK.get_device()
        readable = readable_rows(x, width, device_index)
        if readable is None:
            return self._refit(x, operand, dtype, out)
        num_tokens, pitch, address = readable
        key = num_tokens, pitch, dtype if out is None else out.dtype
        prepared = operand.launches.get(key)
        if prepared is None:
            return self._first(x, operand, key, out)
        call, empty = prepared
        if out is None:
            out = empty.new()
        else:
            check("out", out, FLOATS, (num_tokens, num_rows), weight_NK.device)
        with operand.lock:
            call.start(current_stream(device_index), address, out.data_ptr())
        return out

    def _refit(
        self, x: torch.Tensor, operand: FewOperand, dtype: torch.dtype, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Computes for x that is no matrix, or whose rows the kernel cannot read."""
        weight_NK = operand.plain.weight_NK
        require_input(x, weight_NK.shape[1], weight_NK)
        if x.ndim == 2:
            return _library(x, operand, dtype, out)
        shape = (*x.shape[:-1], len(weight_NK))
        if out is not None and out.shape != shape:
            raise ValueError(f"out must have shape {list(shape)}, found {list(out.shape)}")
        flat = None if out is None else out.view(-1, len(weight_NK))
        return self._run(x.reshape(-1, x.shape[-1]), operand, dtype, flat).view(shape)

    def _first(self, x: torch.Tensor, operand: FewOperand, key: FewKey, out: torch.Tensor | None) -> torch.Tensor:
        """Chooses a tile, launches, and caches the launch of this size."""
        weight_NK = operand.plain.weight_NK
        num_tokens, _, dtype = key
        tile = choose_tile(num_tokens, *weight_NK.shape) if num_tokens and dtype in FLOATS else None
        if tile is None or not _is_readable(x, weight_NK):
            return _library(x, operand, dtype, out)
        shape = (num_tokens, len(weight_NK))
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=x.device)
        else:
            check("out", out, FLOATS, shape, x.device)
        call = launch_few(x, weight_NK, out, tile)
        if call is not None:
            operand.launches.add(key, (call, EmptyOutput(shape, dtype, x.get_device())))
        return out


def _is_readable(x: torch.Tensor, weight_NK: torch.Tensor) -> bool:
    """Returns True for bfloat16 x and weights whose rows begin at multiples of 16 bytes."""
    flat, width = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x, weight_NK.shape[1]
    return (
        weight_NK.dtype is torch.bfloat16
        and not width % 8
        and not weight_NK.data_ptr() % 16
        and (readable_rows(flat, width, weight_NK.get_device()) is not None)
    )


def _library(x: torch.Tensor, operand: FewOperand, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """Computes through torch's library."""
    shape = (len(x), len(operand.plain.weight_NK))
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}, found {list(out.shape)}")
    y = LIBRARY(x, operand.plain.weight_NK, dtype if out is None else out.dtype)
    return y if out is None else out.copy_(y)


def launch_few(x_TK: torch.Tensor, weight_NK: torch.Tensor, y_TN: torch.Tensor, tile: PlainTile) -> TritonCall | None:
    """Launches one product, and returns the prepared launch for another x and y of the same sizes."""
    num_tokens, (num_rows, width), pdl = len(x_TK), weight_NK.shape, not INTERPRETED
    return launch(
        plain_linear_few_fma_kernel if isinstance(tile, FmaTile) else plain_linear_few_kernel,
        (triton.cdiv(num_rows, tile.live),),
        (x_TK, weight_NK, y_TN, num_tokens, num_rows, x_TK.stride(0) // 8, width // 8),
        {**tile.constants(width), "PDL": pdl, "num_warps": tile.warps_for(width), "launch_pdl": pdl},
        moving=(0, 2),
    )


def tile_name(tile: PlainTile) -> str:
    """Returns the variant's name."""
    return variant_name("plain_linear_few", **tile.sizes)


PLAIN_LINEAR = FewPlainKernel()
