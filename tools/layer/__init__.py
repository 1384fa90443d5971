"""Synthetic decoder layers of the published shapes, made directly in device memory."""
