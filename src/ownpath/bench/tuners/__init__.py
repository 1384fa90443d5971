"""Kernel families that ``ownpath bench --tune`` can tune, one module each."""
