"""GPU tags, and checks of the Prefect server."""
