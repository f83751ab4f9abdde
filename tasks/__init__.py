"""Prefect tasks over coalora, and the adapters to the outside: caching, tracking, versioning, reporting."""
