"""The lightning indexer's scores over paged keys."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.official import Step
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.index_scores",
        OpKind.INDEX_SCORES,
        (),
        "IndexScores",
        "paged_bf16",
        "queries rotated once a program; 64 keys by all heads on tensor cores, weighted sums in registers",
        "scores.launch:INDEX_SCORES",
        min_sm=90,
        dim_multiple=64,
        first_dim=128,
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bindex_scores_kernel\b",),
        evidence=Evidence("scores.ref:index_scores", "tests/gpu/test_indexer.py", "ownpath bench scores"),
    ),
    KernelSpec(
        "triton.index_scores_fp4",
        OpKind.INDEX_SCORES,
        (),
        "IndexScores",
        "paged_bf16",
        "queries rotated, Hadamard-rotated and rounded to E2M1 once a program; the rest as plain scores",
        "scores.launch:INDEX_SCORES_FP4",
        min_sm=90,
        dim_multiple=64,
        first_dim=128,
        activations=("bfloat16",),
        official=frozenset({Step.INDEXER}),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bindex_scores_kernel\b",),
        evidence=Evidence("scores.ref:index_scores_fp4", "tests/gpu/test_indexer.py", "ownpath bench scores"),
    ),
    KernelSpec(
        "ref.index_scores",
        OpKind.INDEX_SCORES,
        (),
        "IndexScores",
        "paged",
        "torch, at least float32 inside",
        "scores.ref:INDEX_SCORES",
        is_default=True,
    ),
    KernelSpec(
        "ref.index_scores_fp4",
        OpKind.INDEX_SCORES,
        (),
        "IndexScores",
        "paged",
        "torch: queries behind a Hadamard rotation, E2M1 and back, a power-of-two scale per 32 channels",
        "scores.ref:INDEX_SCORES_FP4",
        official=frozenset({Step.INDEXER}),
    ),
)
