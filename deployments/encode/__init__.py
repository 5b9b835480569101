"""Encoders: texts in, vectors or labels out. Its own batching; no cache, no sampling, one process a replica."""
