"""Which task runs count against the limits of GPUs."""

from __future__ import annotations

import pytest

from pipeline.orchestration.gpu_tags import machine_tag, tags_of_call
from pipeline.settings.sections import RuntimeSettings

CPU, GPU = ({"runtime": RuntimeSettings(device=device)} for device in ("cpu", "cuda"))


def test_a_task_on_a_gpu_counts_for_all_gpus_and_for_those_of_its_machine() -> None:
    assert tags_of_call(["gpu"], GPU, reused=False) == {"gpu", machine_tag()}


@pytest.mark.parametrize(("call", "reused"), [(CPU, False), (GPU, True), (CPU, True)])
def test_what_uses_no_gpu_takes_none_from_another(call: dict, reused: bool) -> None:
    tags = tags_of_call(["gpu", "slow"], call, reused=reused)
    assert not any(tag.startswith("gpu") for tag in tags)
    assert "slow" in tags
    assert tags_of_call(["gpu"], call, reused=reused)  # an empty set would leave Prefect the task's own tags


def test_other_tasks_keep_their_tags() -> None:
    assert tags_of_call([], GPU, reused=False) == set()
    assert tags_of_call(["slow"], CPU, reused=True) == {"slow"}


def test_a_machine_goes_by_the_first_part_of_its_name() -> None:
    assert machine_tag("Node1.cluster.local") == "gpu-node1"
