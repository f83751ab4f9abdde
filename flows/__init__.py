"""Prefect flows: the stages of tasks/ chained into a pipeline, and the commands that run them."""

from pipeline.environment import set_defaults

# Before anything here imports Prefect, which reads its settings once.
set_defaults()
