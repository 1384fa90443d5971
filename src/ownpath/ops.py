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
    ROUTE = "route"
    """Expert ids and weights from the router's input: a decode step's gate and router in one."""
    SWIGLU = "swiglu"
    """The clamped activation between two products."""
    ATTENTION = "attention"
    """Everything between a layer's projections: caches, compression, selection, softmax and the sums over values."""
    KEY_QUANTIZER = "key_quantizer"
    """Rounding of keys to the cache's format before attention."""
    INDEX_QUANTIZER = "index_quantizer"
    """Rounding of index queries and keys to the index cache's format before they are scored."""
    STEP_ANGLES = "step_angles"
    """cos and sin of a decode step's positions, for all layers at once."""
    ENTRIES = "attention_entries"
    """One decode row's writes to the caches: its key, its compressors' raw rows, and the entries that end at it."""
    CHUNK_ENTRIES = "chunk_entries"
    """Near keys of the rows of chunks, and their writes of the entries that end."""
    CHUNK_RINGS = "chunk_rings"
    """The last keys and raw rows of each request of chunks, in the rings."""
    INDEX_SCORES = "index_scores"
    """The indexer's scores of a row's entries."""
    SELECT = "select"
    """The entries with the best scores, as rows of the pool."""
    ATTEND = "attend"
    """Attention of decode rows over window and selected entries, in the pool's memory."""
    ATTEND_CHUNK = "attend_chunk"
    """Attention of the rows of chunks over near keys, each other's among them, and entries in the pool's memory."""
    SAMPLE = "sample"
    """The next token from a row of logits."""
    ACCEPT_DRAFTS = "accept_drafts"
    """The judgement of a step's guesses by the tokens drawn, and the row from which each request goes on."""
    GO_ON_DRAFTING = "go_on_drafting"
    """The rows of the next step with drafts, and what the host reads of this one."""

    REDUCE = "all_reduce"
    """The sum of all ranks' parts, on every rank."""
    GATHER = "all_gather"
    """The rows of all ranks, or their columns, on every rank."""
    SCATTER = "reduce_scatter"
    """The sum of all ranks' parts, of each rank its own rows."""
    TURN = "all_to_all"
    """Of each rank its own rows, whole, from columns that the ranks have of all rows."""
    DISPATCH = "routed_dispatch"
    """Each row to the ranks that have one of its experts, and to no other."""
    COMBINE = "routed_combine"
    """The sums of such rows, back to where they came from, added up."""

    @property
    def is_exchange(self) -> bool:
        """True for what ranks send each other."""
        return self in _EXCHANGES

    @property
    def is_of_lines(self) -> bool:
        """True for what only lines of kernels run, those of decode steps and of chunks: in place of norms, rotations
        and ``ATTENTION``, of gate and router."""
        return self in _OF_LINES


_OF_LINES = frozenset(
    {
        OpKind.STEP_ANGLES,
        OpKind.ENTRIES,
        OpKind.CHUNK_ENTRIES,
        OpKind.CHUNK_RINGS,
        OpKind.INDEX_SCORES,
        OpKind.SELECT,
        OpKind.ATTEND,
        OpKind.ATTEND_CHUNK,
        OpKind.ROUTE,
    }
)
_EXCHANGES = frozenset({OpKind.REDUCE, OpKind.GATHER, OpKind.SCATTER, OpKind.TURN, OpKind.DISPATCH, OpKind.COMBINE})
