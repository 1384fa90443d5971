"""Random operands of the NVFP4 and FP8 kernels, mixtures of experts in float64.

Tests and bench share it. Legend: N rows, K columns of a weight; E experts, D hidden, F expert width; T tokens.
"""

from dataclasses import dataclass

import torch

from ownpath.conformance.bounds import Exact, rounding
from ownpath.conformance.exact import ExpertMatrices, ExpertSteps, expert
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.oracle.formats import decode, e2m1_pair_of, e4m3_of


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
        return decode_nvfp4(self.codes, self.scale) * self.global_scale[:, None].double()


def decode_nvfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiplies codes with block scales in float64, by the oracle's tables: [..., K]."""
    values = decode(codes, e2m1_pair_of).flatten(-2)
    scaled: torch.Tensor = values.unflatten(-1, (-1, 16)) * decode(scale, e4m3_of)[..., None]
    return scaled.flatten(-2)


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

    def matrices(self, expert: int) -> ExpertMatrices:
        """Decodes one expert."""
        w13 = decode_nvfp4(self.w13[expert], self.w13_scale[expert]).unflatten(0, (2, -1))
        w1, w3 = w13 * self.w13_scale_2[expert].double()[:, None, None]
        return ExpertMatrices(w1, w3, decode_nvfp4(self.w2[expert], self.w2_scale[expert]) * self.w2_scale_2[expert])


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


def exact_mixture(experts: ExpertStacks, routed: RoutedTokens, limit: float, num_shared: int = 0) -> Exact:
    """Computes the experts of each token, and the shared ones, which are last in the stacks: [T, D]."""
    num_routed = len(experts.w13) - num_shared
    value = torch.zeros(routed.x.shape, dtype=torch.float64, device=routed.x.device)
    bound = torch.zeros_like(value)
    everyone = torch.arange(len(value), device=value.device)
    for idx in range(len(experts.w13)):
        token_ids, slots = torch.where(routed.ids == idx) if idx < num_routed else (everyone, None)
        weights = torch.ones(len(value), 1) if slots is None else routed.weights[token_ids, slots, None]
        if not len(token_ids):
            continue
        exact = expert(routed.x[token_ids], experts.matrices(idx), ExpertSteps(limit, routed.x.dtype))
        # A kernel may round each expert's output before it sums them.
        exact = exact.plus(rounding(routed.x.dtype) * exact.value.abs())
        weights = weights.to(value)
        value.index_add_(0, token_ids, exact.value * weights)
        bound.index_add_(0, token_ids, exact.bound * weights.abs())
    return Exact(value, bound)


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
