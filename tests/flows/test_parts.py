"""A part is known as long as all that decides it is what it was, and its files are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import parts
from flows.graph import STAGES
from flows.parts import part_key, recall, remember, write_inputs
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.stages.keys import source_closure
from pipeline.store.store import Artifact, default_store

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """What the calibration of `tiny`, with a set from a file, made in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    Path("set.json").write_text("{}")
    artifact = default_store().put_json("calibration", {"tables.json": [1, 2]})
    remember("calibration", "tiny", part_key("calibration", "tiny", settings()), [("calibration", artifact)])
    return artifact


def settings(*changes: str) -> Settings:
    return load_settings("tiny", file=TINY, changes=["initial_set.file=set.json", *changes])


def test_what_is_known_is_copied(made: Artifact) -> None:
    assert recall("calibration", "tiny", settings())
    assert json.loads(Path("outputs/calibration/tables.json").read_text()) == [1, 2]
    assert recall("calibration", "tiny", settings("tracking.experiment=other"))  # where a run is kept decides no number


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "input": lambda patch: Path("set.json").write_text("[]"),
    "code": lambda patch: patch.setattr(parts, "_CODE", [["coalora/x.py", "0" * 64]]),
    "package": lambda patch: patch.setattr(parts, "versions", lambda: {"torch": "0"}),
    "GPU": lambda patch: patch.setenv("CUDA_VISIBLE_DEVICES", "1"),
    "memory": lambda patch: Path("home/parts/tiny-calibration.json").write_text('{"key": 1'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_anything_asks_the_stages(what: str, made: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    CHANGES[what](monkeypatch)
    assert not recall("calibration", "tiny", settings())


def test_other_settings_parts_and_damaged_files_ask_the_stages(made: Artifact) -> None:
    assert not recall("calibration", "tiny", settings("seed=1"))
    assert not recall("training", "tiny", settings())
    file = default_store().path(made) / "tables.json"
    file.chmod(0o600)
    file.write_text("[1, 3]\n")
    assert not recall("calibration", "tiny", settings())
    assert not Path("outputs").exists()


def test_a_registration_is_known_while_its_folder_its_sets_and_the_database_are_there(made: Artifact) -> None:
    key = part_key("registration", "tiny", settings())
    remember("registration", "tiny", key, {"folder": "runs/tiny/1"})
    assert not recall("registration", "tiny", settings())
    for file in (
        "home/mlflow.db",
        "runs/tiny/1/run.json",
        *(f"configurations/tiny/round-0{i}.json.dvc" for i in range(3)),
    ):
        assert not recall("registration", "tiny", settings())
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    assert recall("registration", "tiny", settings())
    assert json.loads(Path("outputs/registration.json").read_text()) == {"folder": "runs/tiny/1"}
    assert not recall("registration", "tiny", settings("tracking.experiment=other"))
    assert not recall("registration", "tiny", settings("storage.publish=true", "storage.bucket=abc"))


def test_seeing_that_nothing_is_to_be_done_imports_nothing_slow() -> None:
    slow = "{'torch', 'transformers', 'peft', 'prefect', 'mlflow', 'boto3', 'matplotlib', 'scipy'}"
    code = f"import sys, flows.parts; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TINY.parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_inputs_differ_with_code_settings_and_input_files_alone(
    made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(*changes: str) -> dict[str, str]:
        write_inputs("tiny", settings(*changes))
        found: dict[str, str] = json.loads(Path("outputs/inputs/digests.json").read_text())
        return found

    def differing(found: dict[str, str]) -> list[str]:
        return [name for name in before if found[name] != before[name]]

    before = digests()
    assert differing(digests("seed=1")) == ["settings"]
    for change, key in {"package": None, "GPU": None, "input": "data", "code": "code"}.items():
        with monkeypatch.context() as patch:
            CHANGES[change](patch)
            assert differing(digests()) == ([key] if key else []), change
            Path("set.json").write_text("{}")


def test_inputs_count_the_code_of_every_stage() -> None:
    files = {
        file.relative_to(parts.ROOT).as_posix()
        for stage in STAGES
        for file in source_closure(stage.fn.__module__).values()
    }
    rooms = [file for file in files if file.count("/") > 1 or not file.startswith("pipeline/")]
    assert [file for file in rooms if not file.startswith(parts.DECIDING)] == []
    assert len(rooms) > 50


def test_templates_and_tables_of_the_rooms_count_as_code() -> None:
    files = {name for name, _ in parts._code()}
    assert {"flows/parts.py", "pipeline/report/page.html.jinja"} <= files
    assert not any("__pycache__" in name for name in files)
