"""Checkouts as in the tests of the flows."""

from tests.flows.conftest import make_checkout, prefect_home

__all__ = ["make_checkout", "prefect_home"]
