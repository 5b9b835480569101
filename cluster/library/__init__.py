"""The model library: MLflow behind a few verbs, weights in our own storage."""
