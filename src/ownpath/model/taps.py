"""Taps: the values of a layer that no slot returns, by the names under which observers see them.

An observer of a slot's call (``attn.wo_b``, ``hc_ffn``) sees what the slot takes and returns; a tap shows a value in
between. A tap returns its value unchanged. A captured graph replays without host code, so observers see nothing of it.
"""

from ownpath.config import CSA_RATIO, Layer

EVERY_LAYER = ("attn.q", "attn.kv")
"""Queries [T, N, H], normed and rotated; the window's keys [T, H], normed, rotated, in the cache's format."""
CSA_LAYER = ("attn.indexer.q", "attn.indexer.weights", "attn.indexer.mask")
"""Index queries [T, I, H], rotated, in the index keys' format; head weights [T, I]; and, once for each sequence of a
step, which of its compressed entries each of its rows attends to, bool [t, C]."""


def tap_names(layer: Layer) -> tuple[str, ...]:
    """Lists the taps of one decoder layer, by full name."""
    names = EVERY_LAYER + (CSA_LAYER if layer.ratio == CSA_RATIO else ())
    return tuple(f"{layer.name}.{name}" for name in names)
