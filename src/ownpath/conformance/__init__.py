"""What any kernel of an operation must do, on any weights: its operands, its exact result, its memory, its refusals.

Tests, bench and ``ownpath verify`` share it. Right answers come from ``oracle``, never from a kernel's torch twin.
"""
