"""The cases that every test of the FP8 linears shares: shapes, rows, amplitudes, and how operands are drawn."""

from dataclasses import dataclass

import torch

NUM_ROWS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127, 128, 129, 255, 1024, 2048, 4096)
AMPLITUDES = (1e-4, 1.0, 1e4)
W8A16_MAX_REL_L2 = 3e-3
"""Half an ulp of BF16 is 2**-9 of a value at most, 1.7e-3 of it in the root mean square over a binade at worst."""


@dataclass(frozen=True)
class Fp8Case:
    """Rows of each shard, columns, and the kind of scales: small or wide powers of two, or any float32."""

    name: str
    shard_rows: tuple[int, ...]
    width: int
    scales: str


CASES = (
    Fp8Case("fused", (1024, 512), 4096, "e8m0"),
    Fp8Case("rows", (4096,), 1024, "e8m0"),
    Fp8Case("float32-scales", (1024, 512), 2048, "float32"),
    Fp8Case("wide-scales", (256,), 512, "e8m0-wide"),
    Fp8Case("partial-blocks", (576, 200), 384, "e8m0"),
    Fp8Case("ragged", (577, 203), 600, "float32"),
    Fp8Case("tiny", (8,), 128, "e8m0"),
)


def draw_weights(case: Fp8Case, seed: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random shards: codes of every magnitude, no NaN code, and their scales."""
    generator = torch.Generator(device).manual_seed(seed)
    weights, scales = [], []
    for num_rows in case.shard_rows:
        codes = torch.randint(0, 127, (num_rows, case.width), generator=generator, device=device, dtype=torch.uint8)
        signs = torch.randint(0, 2, codes.shape, generator=generator, device=device, dtype=torch.uint8)
        weights.append((codes | signs << 7).view(torch.float8_e4m3fn))
        grid = (-(-num_rows // 128), -(-case.width // 128))
        low, high = (60, 190) if case.scales == "e8m0-wide" else (112, 122)
        if case.scales == "float32":
            scales.append(torch.rand(grid, generator=generator, device=device) * 1e-3 + 1e-4)
        else:
            raw = torch.randint(low, high, grid, generator=generator, device=device, dtype=torch.uint8)
            scales.append(raw.view(torch.float8_e8m0fnu))
    return weights, scales


def draw_rows(num_rows: int, width: int, amplitude: float, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(num_rows)
    return (torch.randn(num_rows, width, generator=generator, device=device) * amplitude).to(torch.bfloat16)


def relative_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())
