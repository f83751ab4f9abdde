"""What runs the pipeline for real: servers and workers on one machine, in containers, and on Kubernetes."""
