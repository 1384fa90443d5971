"""A decode step's writes to one layer's caches: keys, compressors' raw rows, and the entries whose windows end."""
