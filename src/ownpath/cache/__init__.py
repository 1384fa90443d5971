"""Caches of sequences between steps: layout as arithmetic, pools of memory, slots and blocks, and a step's tables."""
