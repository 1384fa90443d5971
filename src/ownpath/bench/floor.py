"""The least possible time of a call: the bytes to move and the operations to compute, over measured ceilings."""

from dataclasses import dataclass

from ownpath.bench.shapes import LinearShape, MoeShape

NVFP4_BYTES_PER_PARAM = 0.5 + 1 / 16
"""Half a byte of code and one E4M3 byte for each group of 16."""


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on one device: reads of its memory, and a large bfloat16 matrix product.

    A product on FP8 tensor cores can exceed ``tflop_per_s``, up to twice by the hardware's ratio.
    """

    read_tb_per_s: float
    tflop_per_s: float


H200 = Ceilings(read_tb_per_s=4.41, tflop_per_s=781.0)
"""One NVIDIA H200: a read-only reduction, and an 8192^3 bfloat16 product on random data."""


@dataclass(frozen=True)
class Work:
    """A call's bytes that must be read or written once, and its floating-point operations."""

    num_bytes: int
    num_flop: int

    def floor_us(self, ceilings: Ceilings) -> float:
        """Returns the larger of the two times in microseconds."""
        return max(self.num_bytes / ceilings.read_tb_per_s, self.num_flop / ceilings.tflop_per_s) / 1e6


def moe_work(shape: MoeShape, num_tokens: int, distinct_experts: float) -> Work:
    """Counts an MoE call: each routed expert's weights once, bfloat16 tokens in and out, int32 ids, float32 weights.

    The hidden rows between the two products are not counted: a fused kernel need not store them.
    """
    weights = distinct_experts * shape.params_per_expert * NVFP4_BYTES_PER_PARAM
    activations = 2 * 2 * num_tokens * shape.hidden + 8 * num_tokens * shape.top_k
    return Work(round(weights + activations), 2 * shape.params_per_expert * num_tokens * shape.top_k)


def nvfp4_linear_work(shape: LinearShape, num_rows: int) -> Work:
    """Counts an NVFP4 product: packed weight and scales, bfloat16 in and out."""
    return _linear_work(shape, num_rows, round(shape.num_params * NVFP4_BYTES_PER_PARAM))


def fp8_linear_work(shape: LinearShape, num_rows: int) -> Work:
    """Counts an FP8 product: E4M3 weight with one E8M0 byte for each block of 128x128, bfloat16 in and out."""
    blocks = -(-shape.out_features // 128) * -(-shape.in_features // 128)
    return _linear_work(shape, num_rows, shape.num_params + blocks)


def _linear_work(shape: LinearShape, num_rows: int, weight_bytes: int) -> Work:
    activations = 2 * num_rows * (shape.in_features + shape.out_features)
    return Work(weight_bytes + activations, 2 * shape.num_params * num_rows)
