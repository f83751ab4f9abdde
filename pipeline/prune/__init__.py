"""Garbage collector: what runs, MLflow, DVC and copies refer to, and the rest of the store, here and in a bucket."""
