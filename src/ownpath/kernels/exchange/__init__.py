"""Exchanges between the ranks of a step: sums of their parts, and rows."""
