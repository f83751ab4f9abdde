"""Prefect as a person meets it: progress, waiting for GPUs, deployments."""
