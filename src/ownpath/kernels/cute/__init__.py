"""Kernels in CuTe DSL. Only the modules that compile import the DSL; launching a cached kernel needs none of it."""
