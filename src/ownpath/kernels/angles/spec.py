"""Specs of the angles of a decode step."""

from ownpath.kernels.spec import Evidence, KernelSpec
from ownpath.ops import OpKind

SPECS = (
    KernelSpec(
        "triton.step_angles",
        OpKind.STEP_ANGLES,
        (),
        "RotaryAngles",
        "row_major",
        "one launch for all layers, with full range reduction",
        "angles.launch:STEP_ANGLES",
        min_sm=90,
        is_batch_invariant=True,
        packages=("triton",),
        launches=(r"\bstep_angles_kernel\b",),
        evidence=Evidence("angles.ref:step_angles", "tests/gpu/test_entries.py", "ownpath bench angles"),
    ),
    KernelSpec(
        "ref.step_angles",
        OpKind.STEP_ANGLES,
        (),
        "RotaryAngles",
        "row_major",
        "torch: float32 angles, their cosines and sines",
        "angles.ref:STEP_ANGLES",
        is_batch_invariant=True,
        is_default=True,
    ),
)
