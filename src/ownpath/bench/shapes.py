"""The shapes that benchmarks measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeShape:
    """A mixture of SwiGLU experts: E experts of width ``inter`` on ``hidden`` features, ``top_k`` per token."""

    name: str
    num_experts: int
    hidden: int
    inter: int
    top_k: int

    @property
    def params_per_expert(self) -> int:
        """Weights of gate, up and down of one expert."""
        return 3 * self.hidden * self.inter


@dataclass(frozen=True)
class LinearShape:
    """A dense weight [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int

    @property
    def num_params(self) -> int:
        return self.out_features * self.in_features


MOE_SHAPES = (
    MoeShape("v4-flash", num_experts=256, hidden=4096, inter=2048, top_k=6),
    MoeShape("v4-flash-half", num_experts=256, hidden=4096, inter=1024, top_k=6),
    MoeShape("v4-pro", num_experts=384, hidden=7168, inter=3072, top_k=6),
    MoeShape("tiny", num_experts=8, hidden=256, inter=128, top_k=2),
)
LINEAR_SHAPES = (
    LinearShape("wqa_wkv", 1536, 4096),
    LinearShape("wq_b", 32768, 1024),
    LinearShape("wo_b", 4096, 8192),
    LinearShape("gate_up", 4096, 4096),
    LinearShape("down", 4096, 2048),
    LinearShape("tiny", 256, 128),
    LinearShape("queries", 40960, 1024),
)
"""DeepSeek-V4-Flash's dense matrices, gate_up and down being the shared expert's; tiny is for trying the harness, and
queries, a CSA layer's ``wq_b`` and index ``wq_b``, are measured if they are named."""
HALF_SHAPES = (
    LinearShape("wq_b_half", 16384, 1024),
    LinearShape("queries_half", 24576, 1024),
    LinearShape("gate_up_half", 2048, 4096),
    LinearShape("down_half", 4096, 1024),
)
"""One of two ranks' parts of them, as v4-flash-half of the experts; its ``wo_b`` is as large as gate_up."""

MOE_TOKENS = (1, 4, 8, 16, 64, 256, 1024, 4096, 8192)
LINEAR_TOKENS = (1, 16, 64, 256, 2048)


def moe_shape(name: str) -> MoeShape:
    """Returns a shape by name. Errors: ValueError for an unknown name."""
    for shape in MOE_SHAPES:
        if shape.name == name:
            return shape
    raise ValueError(f"--shape: no MoE shape {name!r}; known: {', '.join(s.name for s in MOE_SHAPES)}")


def parallel_shape(name: str) -> MoeShape:
    """Returns an MoE shape by its name, which may lack "v4-". Errors: ValueError for an unknown name."""
    return moe_shape(f"v4-{name}" if name in ("flash", "pro") else name)


def linear_shape(name: str) -> LinearShape:
    """Returns a shape by name. Errors: ValueError for an unknown name."""
    known = (*LINEAR_SHAPES, *HALF_SHAPES)
    for shape in known:
        if shape.name == name:
            return shape
    raise ValueError(f"--shape: no linear shape {name!r}; known: {', '.join(s.name for s in known)}")
