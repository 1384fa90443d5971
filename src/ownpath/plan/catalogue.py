"""The kernels there are, best first, each with its contract: what it computes, on what, where, and what it promises."""

from dataclasses import dataclass

from ownpath.formats import BF16, FP8_BLOCK, FP32, NVFP4, Format
from ownpath.plan.opspec import OpKind


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's contract.

    name: key of the implementation in ``ownpath.kernels``.
    formats: stored formats it takes; empty for an op without a stored matrix.
    runner: the class in ``ownpath.runners`` that holds its operand.
    min_sm, end_sm: lowest compute capability times ten, and the first that is too new; ``None`` runs anywhere
        torch does.
    dim_multiple: every dimension of its operand must be a multiple of it.
    first_dim: what the first dimension must be; the multiple is asked of the others then.
    activations: dtypes it takes; empty for any.
    is_batch_invariant: a row's bits do not depend on the other rows of the call, nor on their number.
    packages: what must be importable.
    """

    name: str
    kind: OpKind
    formats: tuple[Format, ...]
    runner: str
    layout: str
    why: str
    min_sm: int | None = None
    end_sm: int | None = None
    dim_multiple: int = 1
    first_dim: int | None = None
    activations: tuple[str, ...] = ()
    is_batch_invariant: bool = False
    packages: tuple[str, ...] = ()


_BF16 = ("bfloat16",)
_FLOATS = ("bfloat16", "float32")
_TRITON = ("triton",)

_NOT_RUN = "compiled and interpreted, never run on a device: compared with its torch twin when it is loaded"

FP8_PREFILL_FROM = 65
"""Rows from which FP8 linears on Hopper quantise their activations: up to 64, W8A16 is faster, and exact."""

CATALOGUE = (
    KernelSpec(
        "triton.nvfp4_linear_w4a4_sm100",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4LinearW4A4",
        "scales_128x4",
        f"W4A4: activations quantised with the checkpoint's input_scale, block-scaled tensor cores; {_NOT_RUN}",
        min_sm=100,
        end_sm=104,
        dim_multiple=64,
        activations=_BF16,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.nvfp4_linear_w4a4_sm100_invariant",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4LinearW4A4",
        "scales_128x4",
        f"as triton.nvfp4_linear_w4a4_sm100, with one width of tiles; {_NOT_RUN}",
        min_sm=100,
        end_sm=104,
        dim_multiple=64,
        activations=_BF16,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "cute.nvfp4_linear",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4Linear",
        "packed_64x128",
        "W4A16 on wgmma: codes decoded exactly in registers, float32 sums, global scale per row; tiles from a table",
        min_sm=90,
        end_sm=100,
        dim_multiple=128,
        activations=_BF16,
    ),
    KernelSpec(
        "cute.nvfp4_linear_invariant",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4Linear",
        "packed_64x128",
        "as cute.nvfp4_linear, with K never split: one order of sums for every number of tokens",
        min_sm=90,
        end_sm=100,
        dim_multiple=128,
        activations=_BF16,
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.nvfp4_linear",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4Linear",
        "row_major",
        "W4A16: E2M1 x E4M3 decoded exactly, float32 sums, global scale per shard after the product",
    ),
    KernelSpec(
        "cute.fp8_linear_sm90",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "blocks_64x128",
        f"W8A16 below {FP8_PREFILL_FROM} rows: exact decode, float32 sums, scale per 128 x 128; from there W8A8: "
        "activations to E4M3 with a scale per 1 x 128, FP8 tensor cores, float32 promotion per 128 of K",
        min_sm=90,
        end_sm=100,
        dim_multiple=8,
        activations=_BF16,
    ),
    KernelSpec(
        "cute.fp8_linear_w8a16_sm90_invariant",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "blocks_64x128",
        "W8A16 for any number of rows: exact decode, float32 sums, one order of sums for every number of tokens",
        min_sm=90,
        end_sm=100,
        dim_multiple=8,
        activations=_BF16,
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.fp8_linear",
        OpKind.LINEAR,
        (FP8_BLOCK,),
        "Fp8Linear",
        "row_major",
        "W8A16: E4M3 x block scale decoded, float32 sums",
    ),
    KernelSpec(
        "torch.plain_linear",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: cuBLAS, float32 sums, kept in float32 where the model asks for it",
        min_sm=80,
    ),
    KernelSpec(
        "triton.plain_linear_invariant",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: one tile and one order of sums for every number of tokens",
        min_sm=90,
        activations=_FLOATS,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "ref.plain_linear",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: a matrix product in the activations' dtype",
    ),
    KernelSpec(
        "triton.grouped_linear",
        OpKind.GROUPED,
        (BF16,),
        "GroupedLinear",
        "row_major",
        "inverse rotation in registers on the way to the tensor cores, one launch",
        min_sm=90,
        dim_multiple=64,
        activations=_BF16,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.grouped_linear",
        OpKind.GROUPED,
        (FP8_BLOCK,),
        "GroupedLinear",
        "dequantized",
        "FP8 on disk, decoded to BF16 at load (exact for E8M0 scales); inverse rotation in registers, one launch",
        min_sm=90,
        dim_multiple=64,
        activations=_BF16,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.grouped_linear_invariant",
        OpKind.GROUPED,
        (BF16,),
        "GroupedLinear",
        "row_major",
        "as triton.grouped_linear, with one tile and one order of sums for every number of tokens",
        min_sm=90,
        dim_multiple=64,
        activations=_BF16,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.grouped_linear_invariant",
        OpKind.GROUPED,
        (FP8_BLOCK,),
        "GroupedLinear",
        "dequantized",
        "as triton.grouped_linear, with one tile and one order of sums for every number of tokens",
        min_sm=90,
        dim_multiple=64,
        activations=_BF16,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "ref.grouped_linear",
        OpKind.GROUPED,
        (BF16, FP32),
        "GroupedLinear",
        "row_major",
        "inverse rotation, then a batched matrix product over head groups, no scale anywhere",
    ),
    KernelSpec(
        "ref.grouped_linear",
        OpKind.GROUPED,
        (FP8_BLOCK,),
        "GroupedLinear",
        "dequantized",
        "FP8 on disk, decoded at load as DeepSeek's own conversion does: to BF16 (exact) for E8M0 scales, else FP32",
    ),
    KernelSpec(
        "triton.nvfp4_moe_w4a4_sm100",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoEW4A4",
        "scales_128x4",
        f"W4A4 per expert, SwiGLU and its quantisation inside the first product; {_NOT_RUN}",
        min_sm=100,
        end_sm=104,
        dim_multiple=128,
        activations=_BF16,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.nvfp4_moe_w4a4_sm100_invariant",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoEW4A4",
        "scales_128x4",
        f"as triton.nvfp4_moe_w4a4_sm100, with one width of tiles; {_NOT_RUN}",
        min_sm=100,
        end_sm=104,
        dim_multiple=128,
        activations=_BF16,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "cute.nvfp4_moe",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoE",
        "packed_64x128",
        "W4A16 on wgmma: align, gate_up with SwiGLU, down, combine; at most five launches that overlap",
        min_sm=90,
        end_sm=100,
        dim_multiple=128,
        activations=_BF16,
    ),
    KernelSpec(
        "cute.nvfp4_moe_invariant",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoE",
        "packed_64x128",
        "as cute.nvfp4_moe, with experts' outputs summed in float32 for every number of tokens",
        min_sm=90,
        end_sm=100,
        dim_multiple=128,
        activations=_BF16,
        is_batch_invariant=True,
    ),
    KernelSpec(
        "ref.nvfp4_moe",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoE",
        "row_major",
        "W4A16 per expert: exact decode, gate and up keep their own global scales, float32 combine",
    ),
    KernelSpec(
        "triton.hyper_boundary",
        OpKind.HYPER,
        (),
        "HyperBoundary",
        "row_major",
        "post, pre and norm in two launches that overlap; the mixing logits split over the whole device",
        min_sm=90,
        dim_multiple=8,
        first_dim=4,
        activations=_BF16,
        packages=_TRITON,
    ),
    KernelSpec(
        "triton.hyper_boundary_invariant",
        OpKind.HYPER,
        (),
        "HyperBoundary",
        "row_major",
        "as triton.hyper_boundary, with one way of summing for every number of tokens",
        min_sm=90,
        dim_multiple=8,
        first_dim=4,
        activations=_BF16,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "ref.hyper_boundary",
        OpKind.HYPER,
        (),
        "HyperBoundary",
        "row_major",
        "post, pre and norm as torch computes them one after the other",
    ),
    KernelSpec(
        "triton.rms_norm",
        OpKind.NORM,
        (),
        "RMSNorm",
        "row_major",
        "a row stays in registers between its sum of squares and its scaling",
        min_sm=90,
        dim_multiple=8,
        activations=_FLOATS,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec("ref.rms_norm", OpKind.NORM, (), "RMSNorm", "row_major", "torch, at least float32 inside"),
    KernelSpec(
        "triton.router",
        OpKind.ROUTER,
        (),
        "Router",
        "row_major",
        "a warp a token: K rounds of the largest score, the lowest id first, in registers",
        min_sm=90,
        activations=_FLOATS,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec(
        "ref.router", OpKind.ROUTER, (), "Router", "row_major", "torch: a stable sort, so that ties are decided"
    ),
    KernelSpec(
        "triton.swiglu",
        OpKind.SWIGLU,
        (),
        "SwiGLU",
        "row_major",
        "one launch, float32 inside",
        min_sm=90,
        dim_multiple=8,
        activations=_FLOATS,
        is_batch_invariant=True,
        packages=_TRITON,
    ),
    KernelSpec("ref.swiglu", OpKind.SWIGLU, (), "SwiGLU", "row_major", "torch, at least float32 inside"),
    KernelSpec(
        "ref.attention",
        OpKind.ATTENTION,
        (),
        "SharedKeyAttention",
        "row_major",
        "torch, one sequence at a time: products with keys and values are not projections, no weight is involved",
        is_batch_invariant=True,
    ),
)
