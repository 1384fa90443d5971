"""Random NVFP4 operands, their float64 products, and how far a right answer may lie from those."""

from dataclasses import dataclass

import torch

from ownpath.numerics import decode_nvfp4_blocks

NUM_TOKENS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 127, 128, 129, 255, 1024, 4096, 6144, 8192)
MAX_REL_L2 = 3e-3
BF16_ROUND = 2.0**-8
"""Half a unit in the last place of BF16, relative to the value: 8 significant bits."""
FP32_ROUND = 2.0**-24


def random_scales(shape: tuple[int, ...], device: torch.device, extreme: bool = False) -> torch.Tensor:
    """E4M3 block scales: ordinary ones, or any positive value from the smallest subnormal to 448, and zeros."""
    if extreme:
        return torch.randint(0, 127, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    return (torch.rand(shape, device=device) * 3 + 0.25).to(torch.float8_e4m3fn)


def random_codes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Dense:
    """A weight [N, K] with a global scale per row."""

    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor

    @classmethod
    def draw(cls, num_rows: int, num_cols: int, device: torch.device, extreme: bool = False) -> "Dense":
        codes = random_codes((num_rows, num_cols // 2), device)
        scale = random_scales((num_rows, num_cols // 16), device, extreme)
        return cls(codes, scale, (torch.rand(num_rows, device=device) + 0.5) * 1e-2)

    def weight(self) -> torch.Tensor:
        return decode_nvfp4_blocks(self.codes, self.scale, torch.float64) * self.global_scale[:, None].double()


def dense_reference(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T in float64, and the largest error of an element.

    Each product is exact in float32's 24 bits (8 + 6 significant ones); sums round once per addition in float32, in
    any order, and tensor cores cut aligned products to at least 2**-22 of the largest; the output is rounded to BF16.
    """
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    return exact, exact.abs() * BF16_ROUND + magnitude * (x.shape[1] + 8) * FP32_ROUND * 4


@dataclass(frozen=True)
class Experts:
    """Stacks of E experts, D hidden, F wide."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_scale_2: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_scale_2: torch.Tensor

    @classmethod
    def draw(cls, num_experts: int, hidden: int, inter: int, device: torch.device, extreme: bool = False) -> "Experts":
        return cls(
            random_codes((num_experts, 2 * inter, hidden // 2), device),
            random_scales((num_experts, 2 * inter, hidden // 16), device, extreme),
            (torch.rand(num_experts, 2, device=device) + 0.5) * hidden**-0.5 / 4,
            random_codes((num_experts, hidden, inter // 2), device),
            random_scales((num_experts, hidden, inter // 16), device, extreme),
            (torch.rand(num_experts, device=device) + 0.5) * inter**-0.5 / 4,
        )

    def clone(self) -> "Experts":
        return Experts(*(tensor.clone() for tensor in vars(self).values()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Routed:
    """Tokens with their experts. Shapes: x bfloat16 [T, D]; ids [T, K]; weights float32 [T, K]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def draw(
        cls, num_tokens: int, hidden: int, num_experts: int, top_k: int, device: torch.device, amplitude: float = 1.0
    ) -> "Routed":
        ids = torch.rand(num_tokens, num_experts, device=device).topk(top_k).indices.int()
        x = (torch.randn(num_tokens, hidden, device=device) * amplitude).bfloat16()
        return cls(x, ids, torch.rand(num_tokens, top_k, device=device))


def moe_reference(
    experts: Experts, routed: Routed, limit: float, num_shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts in float64, and the largest error of an element.

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


def _expert(experts: Experts, expert: int, x: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    inter = experts.w2.shape[2] * 2
    scale = experts.w13_scale_2[expert].double()[:, None, None]
    w13 = decode_nvfp4_blocks(experts.w13[expert], experts.w13_scale[expert], torch.float64)
    w13 = (w13.view(2, inter, -1) * scale).flatten(0, 1)
    w2 = decode_nvfp4_blocks(experts.w2[expert], experts.w2_scale[expert], torch.float64)
    w2 = w2 * experts.w2_scale_2[expert].double()
    gate, up = (x.double() @ w13.T).split(inter, dim=-1)
    gate_error, up_error = ((x.double().abs() @ w13.abs().T) * (x.shape[1] + 8) * FP32_ROUND * 4).split(inter, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    act = torch.nn.functional.silu(gate)
    hidden = act * up
    hidden_error = 1.1 * gate_error * up.abs() + act.abs() * up_error + hidden.abs() * (BF16_ROUND + 16 * FP32_ROUND)
    out = hidden @ w2.T
    spread = hidden_error @ w2.abs().T + (hidden.abs() @ w2.abs().T) * (inter + 8) * FP32_ROUND * 4
    return out, spread + out.abs() * BF16_ROUND


def relative_l2(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def first_beyond(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> str:
    """The first element further off than its bound, in words; empty when there is none."""
    beyond = ((found.double() - exact).abs() > bound).nonzero()
    if not len(beyond):
        return ""
    place = tuple(beyond[0].tolist())
    return f"{place}: {found[place]} for {exact[place]}, bound {bound[place]}, {len(beyond)} of {found.numel()}"
