"""Random operands of the NVFP4 and FP8 kernels, their products in float64 by the oracle, and the allowed errors.

Tests and bench share it. Legend: N rows, K columns of a weight; E experts, D hidden, F expert width; T tokens.
"""

from dataclasses import dataclass

import torch

from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.oracle.formats import decode, e2m1_pair_of, e4m3_of
from ownpath.oracle.formulas import swiglu

MAX_REL_L2 = 3e-3
"""Half an ulp of BF16 is 2**-9 of a value at most, 1.7e-3 of it in the root mean square over a binade at worst."""
BF16_ROUND = 2.0**-8
"""Half a unit in the last place of BF16, relative to the value: 8 significant bits."""
FP32_ROUND = 2.0**-24


def random_scales(shape: tuple[int, ...], device: torch.device, extreme: bool = False) -> torch.Tensor:
    """Draws E4M3 block scales: ordinary ones, or any positive value from the smallest subnormal to 448, and zeros."""
    if extreme:
        return torch.randint(0, 127, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    return (torch.rand(shape, device=device) * 3 + 0.25).to(torch.float8_e4m3fn)


def random_codes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Draws bytes of two codes each."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class DenseWeight:
    """A weight [N, K] with a global scale per row."""

    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor

    @classmethod
    def draw(cls, num_rows: int, num_cols: int, device: torch.device, extreme: bool = False) -> "DenseWeight":
        codes = random_codes((num_rows, num_cols // 2), device)
        scale = random_scales((num_rows, num_cols // 16), device, extreme)
        return cls(codes, scale, (torch.rand(num_rows, device=device) + 0.5) * 1e-2)

    def weight(self) -> torch.Tensor:
        """Decodes the weight, float64 [N, K]."""
        return decoded_nvfp4(self.codes, self.scale) * self.global_scale[:, None].double()


def decoded_nvfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiplies codes with block scales in float64, by the oracle's tables: [..., K]."""
    values = decode(codes, e2m1_pair_of).flatten(-2)
    scaled: torch.Tensor = values.unflatten(-1, (-1, 16)) * decode(scale, e4m3_of)[..., None]
    return scaled.flatten(-2)


def dense_reference(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes x W^T in float64, and the largest error of an element.

    Each product is exact in float32's 24 bits (8 + 6 significant ones); sums round once per addition in float32, in
    any order, and tensor cores cut aligned products to at least 2**-22 of the largest; the output is rounded to BF16.
    """
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    return exact, exact.abs() * BF16_ROUND + magnitude * (x.shape[1] + 8) * FP32_ROUND * 4


@dataclass(frozen=True)
class ExpertStacks:
    """Stacks of E experts, D hidden, F wide."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_scale_2: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_scale_2: torch.Tensor

    @classmethod
    def draw(
        cls, num_experts: int, hidden: int, inter: int, device: torch.device, extreme: bool = False
    ) -> "ExpertStacks":
        return cls(
            random_codes((num_experts, 2 * inter, hidden // 2), device),
            random_scales((num_experts, 2 * inter, hidden // 16), device, extreme),
            (torch.rand(num_experts, 2, device=device) + 0.5) * hidden**-0.5 / 4,
            random_codes((num_experts, hidden, inter // 2), device),
            random_scales((num_experts, hidden, inter // 16), device, extreme),
            (torch.rand(num_experts, device=device) + 0.5) * inter**-0.5 / 4,
        )

    def clone(self) -> "ExpertStacks":
        return ExpertStacks(*(tensor.clone() for tensor in vars(self).values()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens with their experts. Shapes: x bfloat16 [T, D]; ids [T, K]; weights float32 [T, K]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def draw(
        cls, num_tokens: int, hidden: int, num_experts: int, top_k: int, device: torch.device, amplitude: float = 1.0
    ) -> "RoutedTokens":
        ids = torch.rand(num_tokens, num_experts, device=device).topk(top_k).indices.int()
        x = (torch.randn(num_tokens, hidden, device=device) * amplitude).bfloat16()
        return cls(x, ids, torch.rand(num_tokens, top_k, device=device))


def moe_reference(
    experts: ExpertStacks, routed: RoutedTokens, limit: float, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the experts in float64, and the largest error of an element.

    An error d of gate or up moves silu(gate) * up by at most 1.1 |d| times the other factor (silu's slope is below
    1.1); hidden values and expert outputs are rounded to BF16; sums add as in ``dense_reference``.
    """
    num_tokens, hidden = routed.x.shape
    num_routed = len(experts.w13) - num_shared
    y = torch.zeros(num_tokens, hidden, dtype=torch.float64, device=routed.x.device)
    error = torch.zeros_like(y)
    everyone = torch.arange(num_tokens, device=y.device)
    for expert in range(len(experts.w13)):
        if expert < num_routed:
            token_ids, slots = torch.where(routed.ids == expert)
            weights = routed.weights[token_ids, slots, None].double()
        else:
            token_ids, weights = everyone, torch.ones(num_tokens, 1, dtype=torch.float64, device=y.device)
        if not len(token_ids):
            continue
        out, bound = _expert(experts, expert, routed.x[token_ids], limit)
        y.index_add_(0, token_ids, out * weights)
        error.index_add_(0, token_ids, bound * weights.abs())
    return y, error + y.abs() * BF16_ROUND


def _expert(experts: ExpertStacks, expert: int, x: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    inter = experts.w2.shape[2] * 2
    scale = experts.w13_scale_2[expert].double()[:, None, None]
    w13 = decoded_nvfp4(experts.w13[expert], experts.w13_scale[expert])
    w13 = (w13.view(2, inter, -1) * scale).flatten(0, 1)
    w2 = decoded_nvfp4(experts.w2[expert], experts.w2_scale[expert]) * experts.w2_scale_2[expert].double()
    gate, up = (x.double() @ w13.T).split(inter, dim=-1)
    gate_error, up_error = ((x.double().abs() @ w13.abs().T) * (x.shape[1] + 8) * FP32_ROUND * 4).split(inter, dim=-1)
    hidden, silu = swiglu(gate, up, limit), swiglu(gate.clamp(max=limit), torch.ones_like(up), torch.inf).abs()
    hidden_error = 1.1 * gate_error * up.abs().clamp(max=limit) + silu * up_error
    hidden_error = hidden_error + hidden.abs() * (BF16_ROUND + 16 * FP32_ROUND)
    out = hidden @ w2.T
    spread = hidden_error @ w2.abs().T + (hidden.abs() @ w2.abs().T) * (inter + 8) * FP32_ROUND * 4
    return out, spread + out.abs() * BF16_ROUND


def relative_l2(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Computes ||found - exact|| / ||exact||."""
    return float((found.double() - exact).norm() / exact.norm())


def first_beyond(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> str:
    """Describes the first element further off than its bound; empty when there is none."""
    beyond = ((found.double() - exact).abs() > bound).nonzero()
    if not len(beyond):
        return ""
    place = tuple(beyond[0].tolist())
    return f"{place}: {found[place]} for {exact[place]}, bound {bound[place]}, {len(beyond)} of {found.numel()}"


def draw_weights(case: Fp8Case, seed: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draws shards: codes of every magnitude, no NaN code, and their scales."""
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
    """Draws activations, the same for the same number of rows."""
    generator = torch.Generator(device).manual_seed(num_rows)
    return (torch.randn(num_rows, width, generator=generator, device=device) * amplitude).to(torch.bfloat16)
