"""Finds what a checkpoint is and what is wrong with it, from headers, scalars and a sample of its block scales."""
