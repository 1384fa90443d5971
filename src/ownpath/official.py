"""The steps of a forward at which DeepSeek's published inference code rounds differently from the kernels here.

Every step is "plain" (as precise as the chosen kernel computes it) or "official" (rounded where the published code
rounds). The plan shows each; ``docs/numerics.md`` defines them and says how far apart the two are.
"""

from enum import StrEnum
from types import MappingProxyType


class Step(StrEnum):
    """A step whose numerics can be chosen: plain or official."""

    FP8_INPUTS = "fp8_inputs"
    NVFP4_INPUTS = "nvfp4_inputs"
    FP8_EXPERTS = "fp8_experts"
    KV = "kv"
    INDEXER = "indexer"
    Q_HEAD_NORM = "q_head_norm"
    ROUTING_WEIGHT = "routing_weight"
    COMPRESSOR = "compressor"
    HEAD = "head"


MEANING = MappingProxyType(
    {
        Step.FP8_INPUTS: "inputs of FP8 and MXFP4 weights: E4M3 with a power-of-two scale per 1 x 128",
        Step.NVFP4_INPUTS: "inputs of NVFP4 weights: E2M1 with an E4M3 scale per 1 x 16 and the file's input_scale",
        Step.FP8_EXPERTS: "inputs of NVFP4 experts: as fp8_inputs, which the MXFP4 they were made from would have",
        Step.KV: "keys, window and compressed: E4M3 with a power-of-two scale per 64 unrotated channels",
        Step.INDEXER: "index queries and keys: Hadamard rotation, then E2M1 with a power-of-two scale per 32",
        Step.Q_HEAD_NORM: "norm of query heads: every operation rounded to the activations' dtype",
        Step.ROUTING_WEIGHT: "experts: products rounded to the activations' dtype, routing weight before w2",
        Step.COMPRESSOR: "compressor: float32 products, sums and softmax",
        Step.HEAD: "vocabulary logits: float32",
    }
)
"""Step -> description of what the published code computes there."""

ALWAYS_OFFICIAL = frozenset({Step.COMPRESSOR, Step.HEAD})
"""Steps that plain numerics compute in the same way."""

PLAIN: frozenset[Step] = frozenset()
OFFICIAL = frozenset(Step) - {Step.FP8_EXPERTS}
"""All that the published code does with what is stored; an NVFP4 file alone does not say that it was MXFP4."""


def parse_numerics(text: str) -> frozenset[Step]:
    """Parses ``plain``, ``official``, or a comma-separated list of official steps.

    Errors: ValueError naming a word that is not a step.
    """
    if text in ("plain", "official"):
        return OFFICIAL if text == "official" else PLAIN
    names = text.split(",")
    unknown = [name for name in names if name not in tuple(Step)]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of plain, official, {', '.join(Step)}")
    return frozenset(map(Step, names))


def numerics_name(official: frozenset[Step]) -> str:
    """Returns the shortest text that ``parse_numerics`` reads as these steps; omits those that are always official."""
    chosen = official - ALWAYS_OFFICIAL
    if not chosen:
        return "plain"
    return "official" if chosen == OFFICIAL - ALWAYS_OFFICIAL else ",".join(step for step in Step if step in chosen)
