"""A set of another run is the start of this one, if it fits; its content decides the key of the stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.method.initial import given_set as start_members
from flows.graph import Graph
from flows.run import Run
from pipeline.inputs.loaders import load_set, load_tables, read_set_file
from pipeline.preflight import preflight
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import default_store
from tasks.given_set import given_set
from tests.tiny_run import CHANGES, TinyRun

FILE = Path(__file__).parents[1] / "flows" / "tiny.yaml"


@pytest.fixture
def content(run: TinyRun) -> dict[str, Any]:
    """The set of round 1, with losses."""
    found: dict[str, Any] = json.loads((default_store().path(run.trained.sets[1]) / "configurations.json").read_text())
    assert any(member["loss"] is not None for member in found["members"])
    return found


def write(tmp_path: Path, content: object) -> str:
    path = tmp_path / "start.json"
    path.write_text(json.dumps(content))
    return str(path)


def starting_with(file: str, *changes: str) -> Settings:
    return load_settings("tiny", file=FILE, changes=[*CHANGES, f"initial_set.file={file}", *changes])


def test_the_members_of_a_set_start_another_run_without_their_losses(run: TinyRun, content: dict[str, Any]) -> None:
    measured = load_tables(run.calibrated.tables)
    made = load_set(given_set.fn(tables=run.calibrated.tables, content=content), measured)
    before = load_set(run.trained.sets[1], measured)
    assert {tuple(c) for c in made.configurations} == {tuple(c) for c in before.configurations}
    assert np.isnan(made.losses).all()
    assert (made.joined == 0).all()


def test_a_set_of_another_checkpoint_with_the_same_layers_fits(run: TinyRun, content: dict[str, Any]) -> None:
    measured = load_tables(run.calibrated.tables)
    assert len(start_members({**content, "base_digest": "of another"}, measured)) == len(content["members"])


def test_the_training_starts_with_the_file(
    run: TinyRun, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = starting_with(write(tmp_path, content), "search.rounds=0", "baselines.methods=[shared]")
    preflight(settings)
    made = Run.start("tiny", settings, DirectRunner())
    trained = Graph(made, calibrated=run.calibrated).trained
    measured = load_tables(run.calibrated.tables)
    assert len(trained.sets) == 1
    assert load_set(trained.sets[0], measured).configurations.tolist() == sorted_like(content, measured)
    # The same content elsewhere is the same start; another content is another.
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    moved = Run.start("tiny", starting_with(write(elsewhere, content)), DirectRunner())
    assert key(moved, run) == key(made, run)
    fewer = {**content, "members": content["members"][:-1]}
    changed = Run.start("tiny", starting_with(write(elsewhere, fewer)), DirectRunner())
    assert key(changed, run) != key(made, run)
    assert len({r.identity for r in (made, changed)}) == 2


def key(run: Run, tiny: TinyRun) -> str:
    return given_set.key({"tables": tiny.calibrated.tables, "content": run.given})


def sorted_like(content: dict[str, Any], measured: Any) -> list[list[int]]:
    found: list[list[int]] = start_members(content, measured).configurations.tolist()
    return found


def _other_layers(content: dict[str, Any]) -> None:
    content["layers"][0] = "model.layers.9.mlp.up_proj"


def _other_choice(content: dict[str, Any]) -> None:
    content["choices"][0]["bits"] = 8  # the tiny pipeline allows 2, 3 and 4


def _short_member(content: dict[str, Any]) -> None:
    content["members"][0]["choices"] = content["members"][0]["choices"][1:]


def _no_members(content: dict[str, Any]) -> None:
    del content["members"]


def _one_member(content: dict[str, Any]) -> None:
    content["members"] = [content["members"][0]] * 3


def _words_for_numbers(content: dict[str, Any]) -> None:
    content["members"][0]["choices"][0] = "two"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_layers, "does not fit this run: The set was made for .*initial_set.file=null"),
        (_other_choice, "does not fit this run: .*choice"),
        (_short_member, "does not fit this run: Member 0 of the set has 13 choices"),
        (_no_members, "is damaged .*members"),
        (_words_for_numbers, "is damaged"),
        (_one_member, "has 1 different configurations.*at least two"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_before_anything_runs(
    content: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    change(content)
    with pytest.raises(CoaloraError, match=said):
        preflight(starting_with(write(tmp_path, content)))


def test_a_file_that_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"initial_set\.file .*gone\.json does not exist.*coalora restore"):
        preflight(starting_with(str(tmp_path / "gone.json")))
    for text in ("{", "[]", '{"format": "coalora-configuration/1"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(CoaloraError, match=r"other\.json is (no JSON|of the form)"):
            read_set_file(tmp_path / "other.json")
