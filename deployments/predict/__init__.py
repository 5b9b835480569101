"""Tabular models: tensors in, tensors out. scikit-learn in skops' files, in its own batches; no pickle, one process a replica."""
