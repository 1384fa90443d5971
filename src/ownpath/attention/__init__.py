"""What lies between a layer's projections: caches, compressed entries, which of them count, softmax."""
