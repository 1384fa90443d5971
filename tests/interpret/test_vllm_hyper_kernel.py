"""vLLM's names with our Triton kernel, interpreted: within bfloat16 of the reference, one runner a boundary."""

import torch
from torch import Tensor

from ownpath.integrations.vllm.hyper import HOPPER, HYPERS, REFERENCE, Hyper

EPS, ITERS, DIM = 1e-6, 3, 64


def calls(hyper: Hyper, num_tokens: int) -> list[Tensor]:
    """The first boundary, then two of those between sublayers."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = normal(24, 4 * DIM) / 16, 1 + normal(3) / 4, normal(24), EPS, EPS, EPS, 2.0, ITERS
    norm = {"norm_weight": (1 + normal(DIM) / 8).bfloat16(), "norm_eps": EPS}
    streams, post, comb, h = hyper.pre_broadcast(normal(num_tokens, DIM).bfloat16(), *given, **norm)
    for _ in range(2):
        streams, post, comb, h = hyper.fused(h, streams, post, comb, *given, n_splits=1, tile_n=1, **norm)
    return [streams, post, comb, h]


def test_the_kernel_takes_what_vllm_passes() -> None:
    hyper = HYPERS.new(HOPPER)
    found, wanted = calls(hyper, 2), calls(HYPERS.new(REFERENCE), 2)
    assert len(hyper._runners) == 1
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        # Three boundaries in bfloat16: a flipped last bit of one is an input of the next.
        assert (one.float() - other.float()).norm() <= 3 * 2**-8 * other.float().norm()
