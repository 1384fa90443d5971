"""Verifies a checkpoint on a device: which kernel ran, and which layer is wrong. The rest of the package never imports
it."""
