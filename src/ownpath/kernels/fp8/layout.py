"""The layout of FP8 block weights that both Hopper kernels read: W8A16 from registers, W8A8 by descriptor.

A matrix is cut into blocks of 64 rows x 128 columns, 8 KiB each, contiguous in memory: a block is fetched by one
plain bulk copy, with no tensor map. Inside a block the bytes have the order that ``wgmma`` reads from shared memory:
rows of 128 bytes whose 16-byte units are exchanged by (unit XOR row % 8), the 128-byte swizzle. With three permutations
the same bytes also serve as a register operand, and both epilogues are shorter:

- columns: byte c of a row holds k = sigma(c), chosen so that one thread's two 16-byte units (2q and 2q + 1 of its row)
  hold exactly the k that the m64k16 register fragments of eight steps need in lane quarter q. The eight lanes of a
  shared-memory access then read eight different units: no bank conflict. The order of k does not change a sum, and
  W8A8's activations are quantised into the same order.
- bytes of a word: (2q + 8, 2q, 2q + 9, 2q + 1), so that a shift and a mask turn the odd bytes into one BF16 pair and
  the even bytes into the other.
- rows, inside every 16: stored row r is output feature 2 * (r % 8) + r // 8. A thread's accumulators then belong to
  neighbouring features.

Each block has one scale in a 16-byte entry (BF16 pair for the decode multiplication, float32 factor for the sums,
float32 scale, 0). Every shard starts with a new block, so a shard's last block may be partial.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ownpath.numerics.e8m0 import decode_e8m0

ROWS, COLS = 64, 128
BLOCK_BYTES = ROWS * COLS
ACT_BLOCK_BYTES = BLOCK_BYTES + 4 * ROWS
"""A block of quantised activations: the bytes, then its 64 float32 scales."""
_LIFT_EXPONENT = 120
"""E4M3 bits moved into BF16's fields give the value times 2**-120."""
_FOLDED_EXPONENTS = (-100, 7)
"""Exponents e of scales that the decode multiplication can apply: 2**(120 + e) and every product are normal BF16."""


@dataclass(frozen=True)
class PackedFp8:
    """An FP8 matrix, or fused shards of one, in the kernels' layout.

    blocks: uint8 [T, B, 8192], T row blocks (an even number), B = ceil(K / 128). scales: int32 [T, B, 4].
    rows: int32 [T, 2], first output feature and number of valid rows of each row block.
    folded: every scale is a power of two that the decode multiplication can apply. power_of_two: scales were E8M0.
    ragged: some row block starts or ends at a feature that 4 does not divide.
    """

    blocks: Tensor
    scales: Tensor
    rows: Tensor
    out_features: int
    in_features: int
    folded: bool
    power_of_two: bool
    ragged: bool

    @property
    def num_row_blocks(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_k_blocks(self) -> int:
        return self.blocks.shape[1]


def column_order() -> Tensor:
    """Returns sigma: the k of each of a row's 128 bytes before the swizzle. int64 [128]."""
    byte = torch.arange(COLS)
    quarter, half, step, j = byte // 32, byte // 16 % 2, byte // 4 % 4, byte % 4
    within = 2 * quarter + torch.tensor([8, 0, 9, 1])[j]
    return 16 * (4 * half + step) + within


def row_order() -> Tensor:
    """Returns the source row of each of a block's 64 stored rows. int64 [64]."""
    row = torch.arange(ROWS)
    return row // 16 * 16 + 2 * (row % 8) + row // 8 % 2


def block_order(rows: Tensor) -> Tensor:
    """Returns each packed byte's index in a row-major 64 x 128 block, for stored rows ``rows``. int64 [8192]."""
    stored = torch.arange(ROWS)[:, None]
    byte = torch.arange(COLS)[None, :]
    source = (byte // 16 ^ stored % 8) * 16 + byte % 16
    return (rows[:, None] * COLS + column_order()[source]).flatten()


def pack_blocks(codes: Tensor, rows: Tensor) -> Tensor:
    """Packs bytes [R, K] into uint8 [ceil(R/64), ceil(K/128), 8192], padded with 0."""
    num_rows, width = codes.shape
    tiles, k_blocks = -(-num_rows // ROWS), -(-width // COLS)
    raw = codes.view(torch.uint8)
    if (tiles * ROWS, k_blocks * COLS) != (num_rows, width):
        raw = torch.nn.functional.pad(raw, (0, k_blocks * COLS - width, 0, tiles * ROWS - num_rows))
    tiled = raw.view(tiles, ROWS, k_blocks, COLS).transpose(1, 2).reshape(tiles, k_blocks, BLOCK_BYTES)
    return tiled[..., block_order(rows).to(codes.device)]


def unpack_blocks(blocks: Tensor, rows: Tensor, num_rows: int, width: int) -> Tensor:
    """Inverts ``pack_blocks``: returns uint8 [R, K]."""
    tiles, k_blocks, _ = blocks.shape
    tiled = torch.empty_like(blocks)
    tiled[..., block_order(rows).to(blocks.device)] = blocks
    whole = tiled.view(tiles, k_blocks, ROWS, COLS).transpose(1, 2).reshape(tiles * ROWS, k_blocks * COLS)
    return whole[:num_rows, :width]


def pack_fp8(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> PackedFp8:
    """Packs shards that share K: E4M3 [N, K] with scales E8M0 or float32 [ceil(N/128), ceil(K/128)].

    Errors: ValueError naming a shard with a NaN code or a scale that is not finite and positive.
    """
    factors = [_scale_values(scale) for scale in scales]
    for idx, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        if bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise ValueError(f"weight[{idx}] holds a NaN code")
        if not bool(((factor > 0) & torch.isfinite(factor)).all()):
            raise ValueError(f"scale[{idx}] must be finite and positive")
    folded = all(_foldable(factor) for factor in factors)
    blocks = torch.cat([pack_blocks(weight, row_order()) for weight in weights])
    entries = torch.cat(
        [_entries(len(weight), factor, folded) for weight, factor in zip(weights, factors, strict=True)]
    )
    rows = _row_table([len(weight) for weight in weights])
    if len(blocks) % 2:
        blocks, entries = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (blocks, entries))
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
    out_features = sum(len(weight) for weight in weights)
    return PackedFp8(
        blocks=blocks,
        scales=entries,
        rows=rows.to(blocks.device),
        out_features=out_features,
        in_features=weights[0].shape[1],
        folded=folded,
        power_of_two=all(scale.dtype == torch.float8_e8m0fnu for scale in scales),
        ragged=bool((rows % 4 != 0).any()),
    )


def fp8_shape(shard_rows: Sequence[int], width: int) -> tuple[int, int, bool]:
    """Returns row blocks, K blocks and raggedness of the operand that ``pack_fp8`` makes of shards of these rows."""
    rows = _row_table(shard_rows)
    return len(rows) + len(rows) % 2, -(-width // COLS), bool((rows % 4 != 0).any())


def restore_fp8(packed: PackedFp8, shard_rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Inverts ``pack_fp8`` for shards of these rows: returns E4M3 [N, K] and float32 [ceil(N/128), ceil(K/128)].

    The layout holds a scale in several forms, twice for 128 rows; where they disagree, it comes back as NaN.
    """
    shards, start = [], 0
    for num_rows in shard_rows:
        stop = start - (-num_rows // ROWS)
        codes = unpack_blocks(packed.blocks[start:stop], row_order(), num_rows, packed.in_features)
        shards.append((codes.contiguous().view(torch.float8_e4m3fn), _unpack_scales(packed.scales[start:stop])))
        start = stop
    return shards


def _unpack_scales(entries: Tensor) -> Tensor:
    after, scale = (entries[..., idx].contiguous().view(torch.float32) for idx in (1, 2))
    pair = entries[..., 0].contiguous()
    high = (pair & -(1 << 16)).view(torch.float32)
    is_pair = (pair & 0xFFFF) == (pair >> 16 & 0xFFFF)
    decoded = torch.where(is_pair, high * 2.0**-_LIFT_EXPONENT * after, torch.nan)
    agreed = torch.where(decoded == scale, scale, torch.nan)
    twin = agreed[1::2]
    same = agreed[::2].clone()
    same[: len(twin)] = torch.where(same[: len(twin)] == twin, twin, torch.nan)
    return same


def fp8_padding(packed: PackedFp8) -> Tensor:
    """Returns the padding codes: uint8, one after the other."""
    tiles, k_blocks, _ = packed.blocks.shape
    whole = unpack_blocks(packed.blocks, row_order(), tiles * ROWS, k_blocks * COLS).view(tiles, ROWS, -1)
    row, col = (torch.arange(n, device=whole.device) for n in whole.shape[1:])
    is_outside = (row[None, :, None] >= packed.rows[:, 1, None, None]) | (col >= packed.in_features)
    return whole[is_outside.expand_as(whole)]


def _scale_values(scale: Tensor) -> Tensor:
    return decode_e8m0(scale) if scale.dtype == torch.float8_e8m0fnu else scale


def _foldable(factor: Tensor) -> bool:
    bits = factor.view(torch.int32)
    exponent = (bits >> 23) - 127
    low, high = _FOLDED_EXPONENTS
    return bool((((bits & 0x7FFFFF) == 0) & (exponent >= low) & (exponent <= high)).all())


def _entries(num_rows: int, factor: Tensor, folded: bool) -> Tensor:
    """Makes a shard's entries, int32 [T, B, 4]: decode multiplier (a BF16 pair), factor of the sums, scale, 0."""
    block_idx = torch.arange(-(-num_rows // ROWS), device=factor.device) * ROWS // 128
    spread = factor[block_idx]
    lift = spread * 2.0**_LIFT_EXPONENT if folded else torch.full_like(spread, 2.0**_LIFT_EXPONENT)
    pair = lift.view(torch.int32) | (lift.view(torch.int32) >> 16)
    after = torch.ones_like(spread) if folded else spread
    zero = torch.zeros_like(pair)
    return torch.stack([pair, after.view(torch.int32), spread.contiguous().view(torch.int32), zero], dim=-1)


def _row_table(shard_rows: Sequence[int]) -> Tensor:
    entries = []
    start = 0
    for num_rows in shard_rows:
        entries += [(start + row, min(ROWS, num_rows - row)) for row in range(0, num_rows, ROWS)]
        start += num_rows
    return torch.tensor(entries, dtype=torch.int32)
