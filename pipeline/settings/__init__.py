"""Typed settings of a pipeline, and the pipelines by name."""
