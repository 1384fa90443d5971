"""Writes a checkpoint with NVFP4 weights from one with other weights."""
