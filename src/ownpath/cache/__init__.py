"""Caches of sequences between steps: the layout as arithmetic, memory pools, slots and blocks, and a step's tables."""
