"""Runs the Hopper kernels once each on small shapes, for a checker of memory accesses to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python3 tools/small_shapes.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 tools/small_shapes.py

(``make sanitize`` does both.) The answers are compared elsewhere, in tests/gpu; here they only have to be finite.
"""

from collections.abc import Iterator

import torch

from ownpath.conformance.quant_weights import DenseWeight, ExpertStacks, RoutedTokens, draw_rows, draw_weights
from ownpath.kernels.fp8.cases import Fp8Case
from ownpath.runners import Fp8Linear, Nvfp4Linear, Nvfp4MoE

CUDA = torch.device("cuda")
LINEAR_SHAPES = ((192, 384), (256, 512), (1536, 512))
EXPERTS, HIDDEN, INTER, TOP_K = 6, 256, 128, 2


def linears() -> Iterator[tuple[str, torch.Tensor]]:
    for rows, cols in LINEAR_SHAPES:
        for name in ("cute.nvfp4_linear", "cute.nvfp4_linear_invariant"):
            dense = DenseWeight.draw(rows, cols, CUDA)
            linear = Nvfp4Linear(dense.codes, dense.scale, dense.global_scale, kernel=name)
            for num_tokens in (1, 13, 60, 130, 600):
                yield f"{name} {num_tokens} x {rows} x {cols}", linear(draw_rows(num_tokens, cols, 1.0, CUDA))


def experts() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("cute.nvfp4_moe", "cute.nvfp4_moe_invariant"):
        w13, scale_13, global_13, w2, scale_2, global_2 = ExpertStacks.draw(EXPERTS, HIDDEN, INTER, CUDA).tensors()
        moe = Nvfp4MoE(w13, scale_13, global_13, w2, scale_2, global_2, swiglu_limit=10.0, kernel=name)
        for num_tokens in (1, 9, 60, 300):
            routed = RoutedTokens.draw(num_tokens, HIDDEN, EXPERTS, TOP_K, CUDA)
            yield f"{name} {num_tokens} tokens", moe(routed.x, routed.ids, routed.weights)


def fp8() -> Iterator[tuple[str, torch.Tensor]]:
    linear = Fp8Linear(*draw_weights(Fp8Case("small", (320,), 512, "e8m0"), 0, CUDA))
    for num_tokens in (1, 40, 300):
        yield f"cute.fp8_linear_sm90 {num_tokens} tokens", linear(draw_rows(num_tokens, 512, 1.0, CUDA))


def main() -> None:
    torch.manual_seed(0)
    for part in (linears, experts, fp8):
        for name, y in part():
            torch.cuda.synchronize()
            assert torch.isfinite(y).all(), name
            print(name)


if __name__ == "__main__":
    main()
