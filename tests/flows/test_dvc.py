"""`dvc repro` runs the same stages as the flow, with its cache warm and cold, to the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from flows.graph import PARTS
from tests.flows.checkout import Checkout, computed, reused


@pytest.fixture(scope="module")
def cold(make_checkout: Callable[..., Checkout]) -> tuple[Checkout, str]:
    # The stages of `dvc repro` are forks as well, but for one: its numbers do not depend on the seed of hashes.
    checkout = make_checkout("cold", real='*"stage training"*')
    return checkout, checkout.repro()


def test_repro_with_a_cold_cache_gives_the_numbers_of_the_flow(
    cold: tuple[Checkout, str], finished: tuple[Checkout, str]
) -> None:
    by_repro = (cold[0].root / "outputs" / "report" / "metrics.json").read_bytes()
    assert by_repro == (finished[0].latest / "report" / "metrics.json").read_bytes()


def test_repro_after_the_flow_computes_nothing(finished: tuple[Checkout, str]) -> None:
    checkout, _ = finished
    output = checkout.repro()
    assert computed(output) == []
    assert output.count(": known, with everything") == len(PARTS)  # and no stage was asked
    assert reused(output) == []
    by_repro = (checkout.root / "outputs" / "report" / "metrics.json").read_bytes()
    assert by_repro == (checkout.latest / "report" / "metrics.json").read_bytes()


def test_a_second_repro_looks_at_the_inputs_and_runs_no_part(cold: tuple[Checkout, str]) -> None:
    output = cold[0].repro()
    # A set: DVC's log is shown twice by processes that are forks.
    assert set(re.findall(r"Running stage '(\w+)'", output)) == {"inputs"}
    assert set(re.findall(r"Stage '(\w+)' didn't change", output)) == set(PARTS)


def test_experiments_have_a_column_for_what_runs_are_compared_by(cold: tuple[Checkout, str]) -> None:
    cold[0].git("add", "dvc.yaml", "dvc.lock", "pipelines.yaml")
    cold[0].git("commit", "--quiet", "--message", "a run")  # DVC compares with what is committed
    header, *_ = cold[0].run("-m", "dvc", "exp", "show", "--csv").splitlines()
    columns = set(header.split(","))
    compared = {"adapter.r", "training.steps", "search.rounds", "hypervolume.coa", "bits_per_byte.2.5"}
    assert compared <= columns
    hashes = {column for column in columns if column.startswith("outputs/")}
    assert len(hashes) <= 5
    assert len(columns - hashes - {"rev", "typ", "parent"}) <= 12


def test_repro_versions_every_rounds_set_from_inside_its_stage(cold: tuple[Checkout, str]) -> None:
    folder = cold[0].root / "configurations" / "tiny"
    assert len(list(folder.glob("round-*.json.dvc"))) == 3


def test_no_stage_starts_a_prefect_server(cold: tuple[Checkout, str]) -> None:
    assert "temporary server" not in cold[1]


def test_metrics_and_plots_are_declared(cold: tuple[Checkout, str]) -> None:
    metrics = json.loads(cold[0].run("-m", "dvc", "metrics", "show", "--json"))
    (shown,) = metrics[""]["data"].values()
    assert set(shown["data"]["hypervolume"]) == {"none", "shared", "coa"}
    assert set(shown["data"]["bits_per_byte"]) == {"2.5", "3"}


def test_plots_work_without_a_network(cold: tuple[Checkout, str]) -> None:
    cold[0].run("-m", "dvc", "plots", "show", "--out", "plots")
    page = (cold[0].root / "plots" / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]*)"', page)
    assert len(pictures) == 2
    assert all((cold[0].root / "plots" / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in page.replace("http://www.w3.org", "")
