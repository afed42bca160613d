"""Sparse autoencoders: trained, judged, spliced into a model, exchanged as files."""
