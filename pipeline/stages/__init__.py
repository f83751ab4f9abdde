"""Cached stages: a function from settings and artifacts to one artifact, its key, and the runners."""
