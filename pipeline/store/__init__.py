"""Content-addressed store of artifacts: on this machine, and shared through S3."""
