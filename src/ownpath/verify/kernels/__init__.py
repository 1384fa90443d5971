"""Checks planned kernels alone, on a layer's real weights: their results, memory, edge cases and refusals."""
