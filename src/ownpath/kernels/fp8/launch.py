"""Launches of the FP8 kernels on tensors: arguments in their order, grids. No checks: see runners."""

from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass

from torch import Tensor

from ownpath.kernels.dsl.cache import load
from ownpath.kernels.dsl.driver import pointer, tensor_map
from ownpath.kernels.fp8.choose import WeightKey, w8a8_config, w8a8_configs, w8a16_config, w8a16_configs
from ownpath.kernels.fp8.config import (
    CHUNK_K,
    MAX_K_BLOCKS,
    QUANTIZE_ROWS,
    Fp8Config,
    QuantizeConfig,
    W8A8Config,
    W8A16Config,
)
from ownpath.kernels.fp8.layout import ACT_BLOCK_BYTES, PackedFp8, pack_fp8
from ownpath.kernels.fp8.spec import PREFILL_FROM
from ownpath.kernels.nvfp4.launch import current_stream, num_sms

MAX_WIDTH = 8 * MAX_K_BLOCKS * 128
ROWS_PER_WORKSPACE_BLOCK = 64


def workspace_bytes(num_tokens: int, num_k_blocks: int) -> int:
    """What W8A8 needs for the quantised activations of ``num_tokens`` rows."""
    return -(-num_tokens // ROWS_PER_WORKSPACE_BLOCK) * num_k_blocks * ACT_BLOCK_BYTES


def workspace_rows(workspace: Tensor, num_k_blocks: int) -> int:
    """Rows whose quantised activations fit a workspace: a multiple of 64."""
    return workspace.numel() // (num_k_blocks * ACT_BLOCK_BYTES) * ROWS_PER_WORKSPACE_BLOCK


def weight_key(weight: PackedFp8) -> WeightKey:
    """What of a weight decides its kernels: row blocks, K blocks, folded, ragged."""
    return weight.num_row_blocks, weight.num_k_blocks, weight.folded, weight.ragged


def w8a16_launch(config: W8A16Config, x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = x (E4M3 x scale).T with the kernel of ``config``. x bfloat16 [M, K] with 16-byte rows, out [M, N]."""
    sizes = (len(x), out.stride(0), weight.num_row_blocks, weight.num_k_blocks)
    operands = (weight.blocks, weight.scales, weight.rows, out)
    args = (tensor_map(x, config.num_n, CHUNK_K), *map(pointer, operands), *map(c_int, sizes))
    grid = config.grid(len(x), weight.num_row_blocks)
    load(config, x.device.index).launch(grid, args, current_stream(x))


def quantize_launch(config: QuantizeConfig, x: Tensor, workspace: Tensor, num_k_blocks: int) -> None:
    """Quantised blocks of x into ``workspace``."""
    args = (pointer(x), pointer(workspace), *map(c_int, (*x.shape, x.stride(0), num_k_blocks)))
    grid = -(-len(x) // QUANTIZE_ROWS) * num_k_blocks
    load(config, x.device.index).launch(grid, args, current_stream(x))


def w8a8_launch(config: W8A8Config, workspace: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = quantised x (E4M3 x scale).T from the blocks in ``workspace``."""
    sizes = (len(out), out.stride(0), weight.num_row_blocks, weight.num_k_blocks)
    operands = (workspace, weight.blocks, weight.scales, weight.rows, out)
    args = (*map(pointer, operands), *map(c_int, sizes))
    grid = config.grid(len(out), weight.num_row_blocks, num_sms(out.device.index))
    load(config, out.device.index).launch(grid, args, current_stream(out))


def fp8_w8a16(x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """out = x (E4M3 x block scale).T, weights decoded exactly. Any number of rows."""
    w8a16_launch(w8a16_config(len(x), weight_key(weight), num_sms(x.device.index)), x, weight, out)


def fp8_w8a16_invariant(x: Tensor, weight: PackedFp8, out: Tensor) -> None:
    """As ``fp8_w8a16``; a row's bits do not depend on the other rows, nor on their number."""
    w8a16_launch(w8a16_config(len(x), weight_key(weight), num_sms(x.device.index), True), x, weight, out)


def fp8_w8a8(x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
    """out = (x in E4M3 with a scale per 1 x 128) (E4M3 x block scale).T, in as many passes as the workspace asks."""
    sms = num_sms(x.device.index)
    step = workspace_rows(workspace, weight.num_k_blocks)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        quantize_launch(QuantizeConfig(weight.power_of_two), x[rows], workspace, weight.num_k_blocks)
        config = w8a8_config(len(x[rows]), weight_key(weight), sms)
        w8a8_launch(config, workspace, weight, out[rows])


@dataclass(frozen=True)
class Fp8Kernel:
    """W8A16 for fewer rows than ``prefill_from``, W8A8 from there; ``None``: W8A16 always."""

    prefill_from: int | None
    is_batch_invariant: bool = False

    def pack(self, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> PackedFp8:
        """The operand in the kernels' layout. Errors: ValueError for a K that 8 does not divide, or more than 64K."""
        width = weights[0].shape[1]
        if width % 8 or width > MAX_WIDTH:
            raise ValueError(f"weight has {width} columns; the Hopper kernels take multiples of 8 up to {MAX_WIDTH}")
        return pack_fp8(weights, scales)

    def workspace_bytes(self, weight: PackedFp8, num_tokens: int) -> int:
        """What calls of up to ``num_tokens`` rows use at once; 0 where every call is W8A16."""
        return 0 if self.prefill_from is None else workspace_bytes(num_tokens, weight.num_k_blocks)

    def configs(self, weight: PackedFp8) -> list[Fp8Config]:
        """Every kernel that a call may launch, to be compiled and loaded before the first one."""
        key, sms = weight_key(weight), num_sms(weight.blocks.device.index)
        found: list[Fp8Config] = [*w8a16_configs(key, sms, self.prefill_from, self.is_batch_invariant)]
        if self.prefill_from is not None:
            found += [QuantizeConfig(weight.power_of_two), *w8a8_configs(key)]
        return list({config.name: config for config in found}.values())

    def variant(self, x: Tensor, weight: PackedFp8, workspace: Tensor) -> str:
        """Names of the kernels that a call with these arguments launches."""
        key, sms = weight_key(weight), num_sms(x.device.index)
        if not self._quantizes(x):
            return w8a16_config(len(x), key, sms, self.is_batch_invariant).name
        step = workspace_rows(workspace, weight.num_k_blocks)
        counts = {min(step, len(x) - start) for start in range(0, len(x), step)}
        products = sorted(w8a8_config(count, key, sms).name for count in counts)
        return " ".join([QuantizeConfig(weight.power_of_two).name, *products])

    def _quantizes(self, x: Tensor) -> bool:
        return self.prefill_from is not None and len(x) >= self.prefill_from

    def __call__(self, x: Tensor, weight: PackedFp8, out: Tensor, workspace: Tensor) -> None:
        if self._quantizes(x):
            fp8_w8a8(x, weight, out, workspace)
        elif self.is_batch_invariant:
            fp8_w8a16_invariant(x, weight, out)
        else:
            fp8_w8a16(x, weight, out)


fp8_linear = Fp8Kernel(PREFILL_FROM)
fp8_linear_invariant = Fp8Kernel(None, is_batch_invariant=True)
