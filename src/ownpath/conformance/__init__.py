"""Conformance of any kernel of an operation, on any weights: operands, exact results, memory, refusals.

Tests, bench and ``ownpath verify`` share it. Right answers come from ``oracle``, never from a kernel's torch twin.
"""
