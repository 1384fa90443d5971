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
    """The boundary between two sublayers: adds one's output to the streams and makes the other's normed input."""
    NORM = "rms_norm"
    """RMS norm over the last dimension."""
    ROUTER = "router"
    """Expert ids and weights from the gate's logits."""
    SWIGLU = "swiglu"
    """The clamped activation between two products."""
    ATTENTION = "attention"
    """Everything between a layer's projections: caches, compression, selection, softmax and the sums over values."""
    KEY_QUANTIZER = "key_quantizer"
    """Rounding of keys to the cache's format before attention."""
    INDEX_QUANTIZER = "index_quantizer"
    """Rounding of index queries and keys to the index cache's format before they are scored."""
