"""Proof: which kernel ran, and which layer is wrong. Beside all of the package, and imported by none of it."""
