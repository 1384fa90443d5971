"""The kinds of operation that V4 needs and a kernel can compute."""

from enum import StrEnum


class OpKind(StrEnum):
    """Products with stored weights first, then their companions."""

    LINEAR = "linear"
    """y = x Wᵀ; several modules are rows of one fused W."""
    GROUPED = "grouped_linear"
    """y[t, g] = W[g] x[t, g]: one matrix per group of heads."""
    MOE = "moe"
    """Routed SwiGLU experts; modules are all w1, then all w3, then all w2."""
    HYPER = "hyper_boundary"
    """Between two sublayers: streams take one's output in, the other's normed input is made of them."""
    NORM = "rms_norm"
    """RMS norm over the last dimension."""
    ROUTER = "router"
    """Expert ids and weights from the gate's logits."""
    SWIGLU = "swiglu"
    """The clamped activation between two products."""
    ATTENTION = "attention"
    """Everything between a layer's projections: caches, compression, selection, softmax and the sums over values."""
    KEY_QUANTIZER = "key_quantizer"
    """What keys are rounded to before attention sees them."""
    INDEX_QUANTIZER = "index_quantizer"
    """What index queries and keys are rounded to before they are scored."""
