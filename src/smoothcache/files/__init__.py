"""File formats, with atomic writes and validation on load."""
