"""Limits of GPU tags: what is asked of the server, and what is refused."""

from __future__ import annotations

import pytest

from coalora.errors import CoaloraError
from infra.server import set_limits
from tests.commands import refused


class Client:
    def __init__(self) -> None:
        self.limits: dict[str, int] = {}

    def create_concurrency_limit(self, tag: str, concurrency_limit: int) -> None:
        self.limits[tag] = concurrency_limit


def test_limits_are_set_for_all_and_by_machine() -> None:
    client = Client()
    lines = set_limits(client, 4, {"Node1.cluster": 2})
    assert client.limits == {"gpu": 4, "gpu-node1": 2}
    assert lines == ["tag gpu: 4 at a time", "tag gpu-node1: 2 at a time"]


def test_a_limit_of_nothing_is_refused_before_anything_is_set() -> None:
    client = Client()
    with pytest.raises(CoaloraError, match="limit of 0 for tag gpu-node1"):
        set_limits(client, 4, {"node1": 0})
    assert client.limits == {}


@pytest.mark.parametrize("text", ["node1", "=2", "node1=two"])
def test_a_machine_without_its_number_is_refused(text: str) -> None:
    assert "NAME=NUMBER" in refused("limits", "--gpus", 1, "--machine", text)
