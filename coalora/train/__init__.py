"""Training over a set of configurations."""
