"""Taps: the values of a layer that no slot returns, by the names under which observers see them.

What a slot takes and returns is seen by its call (``attn.wo_b``, ``hc_ffn``); a tap is for what is made of it before
the next slot takes it. A tap returns its value as it is. A captured graph replays without host code: nothing sees it.
"""

from ownpath.config import CSA_RATIO, Layer

EVERY_LAYER = ("attn.q", "attn.kv")
"""Queries [T, N, H], normed and rotated; the window's keys [T, H], normed, rotated, in the cache's format."""
CSA_LAYER = ("attn.indexer.q", "attn.indexer.weights", "attn.indexer.mask")
"""Index queries [T, I, H], rotated, in the index keys' format; head weights [T, I]; and, once for each sequence of a
step, which of its compressed entries each of its rows attends to, bool [t, C]."""


def tap_names(layer: Layer) -> tuple[str, ...]:
    """The taps of one decoder layer, by full name."""
    names = EVERY_LAYER + (CSA_LAYER if layer.ratio == CSA_RATIO else ())
    return tuple(f"{layer.name}.{name}" for name in names)
