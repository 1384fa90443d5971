"""The lightning indexer's scores over paged keys."""

from ownpath.kernels.spec import Evidence, KernelSpec
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
        activations=("bfloat16",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bindex_scores_kernel\b",),
        evidence=Evidence("scores.ref:index_scores", "tests/gpu/test_indexer.py", "python bench/indexer.py"),
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
)
