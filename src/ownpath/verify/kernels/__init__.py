"""The planned kernels alone, on a layer's real weights: their results, their memory, their edges, their refusals."""
