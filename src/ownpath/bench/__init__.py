"""Benchmarks of the runners and of other systems' kernels: same process, same operands, same timer.

shapes, floor, row, table: what is measured and how it is shown (no torch). routing, operands, rotation, timing, check:
how. contender, ours, peers: who. moe, linear: one benchmark each. record, plot, tune: what stays on disk.
"""
