"""Triton kernels. Each module imports triton itself: nothing here is imported before a plan asks for it."""
