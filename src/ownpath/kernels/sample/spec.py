"""Specs of the sampler: the next token of each row from its logits."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.sample",
        OpKind.SAMPLE,
        (),
        "Sample",
        "row_major",
        "one pass for a greedy or unfiltered row; filters by testing drawn tokens: no sort",
        "sample.launch:SAMPLE",
        min_sm=90,
        activations=("float32",),
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bsample_kernel\b",),
        evidence=Evidence("sample.ref:sample", "tests/gpu/test_sample_gpu.py", "ownpath bench sample"),
    ),
    KernelSpec(
        "ref.sample",
        OpKind.SAMPLE,
        (),
        "Sample",
        "row_major",
        "torch: a sort where a row has filters",
        "sample.ref:SAMPLE",
        is_batch_invariant=True,
        is_default=True,
    ),
)
