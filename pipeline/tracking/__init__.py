"""MLflow: runs, curves, and the model registry."""
