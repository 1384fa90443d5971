"""Runs the Hopper kernels once each on small shapes, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tools/small_shapes.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 tools/small_shapes.py

(``make sanitize`` does both.) The answers are compared elsewhere, in tests/gpu; here they only have to be finite.
"""

from collections.abc import Iterator

import torch

from ownpath.runners import Fp8Linear, Nvfp4Linear, Nvfp4MoE

LINEAR_SHAPES = ((192, 384), (256, 512), (1536, 512))
EXPERTS, HIDDEN, INTER, TOP_K = 6, 256, 128, 2


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, device="cuda") + 0.5).to(torch.float8_e4m3fn)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def linears() -> Iterator[tuple[str, torch.Tensor]]:
    for rows, cols in LINEAR_SHAPES:
        for name in ("cute.nvfp4_linear", "cute.nvfp4_linear_invariant"):
            one = torch.ones((), device="cuda")
            linear = Nvfp4Linear(codes(rows, cols // 2), scales(rows, cols // 16), one, kernel=name)
            for num_tokens in (1, 13, 60, 130, 600):
                yield f"{name} {num_tokens} x {rows} x {cols}", linear(activations(num_tokens, cols))


def experts() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("cute.nvfp4_moe", "cute.nvfp4_moe_invariant"):
        moe = Nvfp4MoE(
            codes(EXPERTS, 2 * INTER, HIDDEN // 2),
            scales(EXPERTS, 2 * INTER, HIDDEN // 16),
            torch.full((EXPERTS,), 0.01, device="cuda"),
            codes(EXPERTS, HIDDEN, INTER // 2),
            scales(EXPERTS, HIDDEN, INTER // 16),
            torch.full((EXPERTS,), 0.01, device="cuda"),
            swiglu_limit=10.0,
            kernel=name,
        )
        for num_tokens in (1, 9, 60, 300):
            ids = torch.rand(num_tokens, EXPERTS, device="cuda").topk(TOP_K).indices.int()
            weights = torch.rand(num_tokens, TOP_K, device="cuda")
            yield f"{name} {num_tokens} tokens", moe(activations(num_tokens, HIDDEN), ids, weights)


def fp8() -> Iterator[tuple[str, torch.Tensor]]:
    weight = torch.randn(320, 512, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.full((3, 4), 2.0**-6, device="cuda").to(torch.float8_e8m0fnu)
    linear = Fp8Linear(weight, scale)
    for num_tokens in (1, 40, 300):
        yield f"cute.fp8_linear_sm90 {num_tokens} tokens", linear(activations(num_tokens, 512))


def activations(num_tokens: int, width: int) -> torch.Tensor:
    return torch.randn(num_tokens, width, device="cuda").bfloat16()


def main() -> None:
    torch.manual_seed(0)
    for part in (linears, experts, fp8):
        for name, y in part():
            torch.cuda.synchronize()
            assert torch.isfinite(y).all(), name
            print(name)


if __name__ == "__main__":
    main()
