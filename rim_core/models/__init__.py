"""Models loaded, checked, run in batches, read and written by hooks."""
