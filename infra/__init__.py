"""Servers and workers that run the pipeline: on one machine, in containers, and on Kubernetes."""
