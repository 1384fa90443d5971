"""Writes a checkpoint of NVFP4 weights from one that stores them otherwise."""
