"""Finds what a checkpoint is and what is wrong with it, from headers, scalars, and samples of scales and weights."""
