"""A run of a deployment whose pipeline is gone is refused; one under another name is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from coalora.errors import CoaloraError
from infra.server import stale_deployments
from pipeline.orchestration.server import FILE_VARIABLE, check_deployment, require_server_named


@pytest.mark.parametrize(
    ("deployment", "name"), [(None, "x"), ("demo", "demo"), ("demo", "my-own"), ("copy of demo", "demo")]
)
def test_runs_without_deployment_and_of_defined_pipelines_pass(deployment: str | None, name: str) -> None:
    check_deployment(deployment, name, {"demo": {}})


def test_a_deployment_of_a_pipeline_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "other.yaml")
    with pytest.raises(CoaloraError) as caught:
        check_deployment("old", "old", {"new": {}})
    for words in ("'pipeline/old'", "other.yaml defines no 'old'", "but new", "--file other.yaml --remove"):
        assert words in str(caught.value)


def test_deployments_of_other_files_are_nobodys_business() -> None:
    def deployment(name: str, runs: str, file: str | None = None) -> SimpleNamespace:
        env = {"env": {FILE_VARIABLE: file}} if file else {}
        return SimpleNamespace(name=name, parameters={"name": runs}, job_variables=env)

    made = [deployment("demo", "demo"), deployment("copy", "demo"), deployment("old", "old"),
            deployment("theirs", "theirs", "theirs.yaml")]  # fmt: skip

    class Client:
        def read_deployments(self, *, flow_filter: object, limit: int, offset: int) -> list[SimpleNamespace]:
            return made[offset : offset + 2]  # pages

    assert [d.name for d in stale_deployments(Client(), {"demo"})] == ["old"]
    assert [d.name for d in stale_deployments(Client(), {"demo"}, "theirs.yaml")] == ["theirs"]


def test_commands_that_change_a_server_need_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(CoaloraError, match="PREFECT_API_URL names no"),
    ):
        require_server_named()
