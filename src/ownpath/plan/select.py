"""Which kernel runs an op: a search through a table of facts that ends in a Choice or in a Refusal with reasons."""

from dataclasses import dataclass

from ownpath.formats import BF16, FP8_BLOCK, FP32, NVFP4, Format
from ownpath.plan.opspec import OpKind


@dataclass(frozen=True)
class Caps:
    """What a device is, as data. sm: CUDA compute capability times ten, ``None`` off CUDA."""

    device_type: str
    name: str
    sm: int | None = None


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's contract: what it computes, on which stored format, where, and in which layout.

    name: key of the implementation in ``ownpath.kernels``.
    runner: the class in ``ownpath.runners`` that holds its operand.
    min_sm: lowest compute capability times ten; ``None`` runs anywhere torch does.
    """

    name: str
    kind: OpKind
    formats: tuple[Format, ...]
    runner: str
    layout: str
    why: str
    min_sm: int | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that runs an op, and why."""

    kernel: KernelSpec
    why: str


@dataclass(frozen=True)
class Refusal:
    """No kernel runs the op; ``reason`` says what each candidate lacked."""

    reason: str


CATALOGUE = (
    KernelSpec(
        "ref.nvfp4_linear",
        OpKind.LINEAR,
        (NVFP4,),
        "Nvfp4Linear",
        "row_major",
        "W4A16: E2M1 x E4M3 decoded exactly, float32 sums, global scale per shard after the product",
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
        "ref.plain_linear",
        OpKind.LINEAR,
        (BF16, FP32),
        "PlainLinear",
        "row_major",
        "stored unquantised: a matrix product in the activations' dtype",
    ),
    KernelSpec(
        "ref.grouped_linear",
        OpKind.GROUPED,
        (BF16, FP32),
        "GroupedLinear",
        "row_major",
        "batched matrix product over head groups, no scale anywhere",
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
        "ref.nvfp4_moe",
        OpKind.MOE,
        (NVFP4,),
        "Nvfp4MoE",
        "row_major",
        "W4A16 per expert: exact decode, gate and up keep their own global scales, float32 combine",
    ),
)


def select(kind: OpKind, stored: Format, caps: Caps, catalogue: tuple[KernelSpec, ...] = CATALOGUE) -> Choice | Refusal:
    """The first kernel of the catalogue (best first) that runs ``kind`` on weights stored as ``stored``."""
    reasons = []
    for kernel in catalogue:
        if kernel.kind is not kind:
            continue
        if stored not in kernel.formats:
            reasons.append(f"{kernel.name} takes {'/'.join(map(str, kernel.formats))}")
        elif kernel.min_sm is not None and (caps.sm is None or caps.sm < kernel.min_sm):
            reasons.append(f"{kernel.name} needs sm_{kernel.min_sm}, this is {caps.name}")
        else:
            return Choice(kernel, kernel.why)
    return Refusal(f"no {kind} kernel for {stored}: " + "; ".join(reasons))
