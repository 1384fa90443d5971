"""Attention between a layer's projections: writes to the caches, compressed entries, their selection, softmax."""
