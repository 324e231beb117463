"""Architectures at full size with random weights, and the caches that are timed on them."""
