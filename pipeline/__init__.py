"""What stands around the method: settings, stage cache, store, S3, MLflow, DVC, workers, report."""
