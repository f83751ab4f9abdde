"""A finished run answers any budget, leaves nothing behind where it cannot, and says whether it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coalora.cli import main
from coalora.errors import CoaloraError
from coalora.export.base import load_adapted
from coalora.export.bundle import Bundle
from pipeline.sources import read_run
from tests.commands import refused as refuse
from tests.tiny_run import TinyRun, at_home, tiny_run

RECORDS = ["README.md", "configuration.json", "export.json"]
FOLDERS = {"peft": "adapter", "packed": "base"}


@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


def words(run: TinyRun | Path, out: Path, *more: str, budget: str = "3.3") -> list[str]:
    folder = run if isinstance(run, Path) else run.folder
    return ["adapt", str(folder), "--bits", budget, "--out", str(out), *more]


def adapt(run: TinyRun | Path, out: Path, *more: str, budget: str = "3.3") -> int:
    return main(words(run, out, *more, budget=budget))


def copy_record(run: TinyRun, folder: Path, **changes: Any) -> Path:
    record = json.loads((run.folder / "run.json").read_text()) | changes
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    shutil.copytree(run.folder / "bundle", folder / "bundle")
    return folder


def refused(run: TinyRun | Path, out: Path, **options: Any) -> str:
    return refuse(*words(run, out, **options))


def test_a_new_budget_is_answered_with_base_and_adapter(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "3.3-bits"
    assert adapt(run.folder.parent / "latest", out) == 0
    content = json.loads((out / "configuration.json").read_text())
    assert 2 < content["average_bits"] <= 3.3
    printed = capsys.readouterr().out
    sizes = {name: sum(p.stat().st_size for p in (out / at).iterdir()) for name, at in FOLDERS.items()}
    told = ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
    assert printed.startswith(f"{out}: {content['average_bits']:.2f} bits; {told}\n")
    assert "measured better" not in printed
    assert f'coalora.load_adapted("{out}/base", "{out}/adapter")' in printed
    assert content["digest"] == Bundle.load(run.folder / "bundle").adapt(3.3).digest
    model = load_adapted(out / "base", out / "adapter")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(1, 9)[None]).logits).all()
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter",
        "base",
        "configuration.json",
        "export.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["3.3-bits"]


def test_a_budget_that_is_not_used_up_is_told(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cheapest = Bundle.load(run.folder / "bundle").select(2.3)
    monkeypatch.setattr(Bundle, "select", lambda self, budget: cheapest)
    assert adapt(run, tmp_path / "out", budget="4") == 0
    assert "measured better than anything up to 4.00 bits\n" in capsys.readouterr().out


def test_a_budget_of_the_run_gives_the_runs_own_export(run: TinyRun, tmp_path: Path) -> None:
    adapt(run, tmp_path / "out", budget="2.5")
    exported = run.folder / "export" / "2.5-bits"
    files = [p.relative_to(exported) for p in exported.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert len(files) > 5
    for file in files:
        if file.name != "export.json":
            assert (tmp_path / "out" / file).read_bytes() == (exported / file).read_bytes(), file
    mine, own = (json.loads((folder / "export.json").read_text()) for folder in (tmp_path / "out", exported))
    assert mine.pop("run")["pipeline"] == "tiny"
    assert mine == own


def test_without_base_the_adapter_alone_is_written_and_no_model_is_read(run: TinyRun, tmp_path: Path) -> None:
    gone = run.calibrated.base.model_dump(mode="json") | {"digest": "0" * 64}
    folder = copy_record(run, tmp_path / "run", base=gone)
    assert adapt(folder, tmp_path / "out", "--to", "peft") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter",
        "configuration.json",
        "export.json",
    ]
    assert "no hub has it. Name its folder with --model" in refused(folder, tmp_path / "other")


def test_the_device_is_this_machines_and_not_the_runs(run: TinyRun, tmp_path: Path) -> None:
    settings = run.settings.model_dump(mode="json")
    settings["runtime"]["device"] = "cuda"
    assert adapt(copy_record(run, tmp_path / "run", settings=settings), tmp_path / "out") == 0


def test_an_empty_folder_is_written_to(run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert adapt(run, tmp_path / "out", "--to", "peft") == 0


def test_a_folder_with_files_is_left_alone(run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not new or empty" in refused(run, tmp_path)
    assert "is not new or empty" in refused(run, tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("budget", ["1.5", "0.001"])
def test_a_budget_below_the_space_is_refused_before_anything_is_written(
    run: TinyRun, tmp_path: Path, budget: str
) -> None:
    assert "is below the choice space" in refused(run, tmp_path / "out", budget=budget)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_the_middle_leaves_nothing(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("coalora.export.base.write_base", fail)
    with pytest.raises(OSError, match="disk full"):
        adapt(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["", "report"])
def test_a_folder_that_is_no_run_is_refused(run: TinyRun, tmp_path: Path, part: str) -> None:
    folder = run.folder / part if part else tmp_path / "runs" / "none"
    text = refused(folder, tmp_path / "out")
    assert str(folder) in text
    assert "Name a run folder" in text


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{", "run.json"),
        ("[]", "run.json"),
        ("{}", "'settings'"),
        ('{"settings": {"seed": -1}}', "model is missing"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: str, fragment: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CoaloraError) as caught:
        read_run(tmp_path)
    assert fragment in str(caught.value)


def test_a_bundle_alone_answers_with_the_same_adapter(run: TinyRun, tmp_path: Path) -> None:
    assert adapt(run.folder / "bundle", tmp_path / "out", "--to", "peft", budget="2.5") == 0
    exported = run.folder / "export" / "2.5-bits"
    assert (tmp_path / "out/configuration.json").read_bytes() == (exported / "configuration.json").read_bytes()


@pytest.mark.parametrize(
    ("part", "kind", "fact"),
    [
        ("", "run", "pipeline       tiny"),
        ("bundle", "bundle", "members"),
        ("export/2.5-bits", "export", "made for base"),
        ("export/2.5-bits/base", "base", "layers by bits"),
        ("export/2.5-bits/adapter", "adapter", "ranks"),
        ("export/2.5-bits/adapter", "adapter", "load with"),
        ("bundle/configurations.json", "set", "choices in use"),
    ],
)
def test_inspect_and_verify_know_each_part(
    run: TinyRun, part: str, kind: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run.folder / part)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith(f"kind {kind} ")
    assert " ".join(fact.split()) in told
    assert main(["verify", str(run.folder / part)]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: _flip(run / "report/result.json"), "its files were altered"),
        (lambda run: (run / "bundle/configurations.json").unlink(), "no configurations.json in"),
        (lambda run: (run / "report/note.txt").touch(), "note.txt is unknown"),
        (lambda run: (run / "export/2.5-bits/adapter/coalora.json").write_text("{}"), "2.5-bits"),
        (
            lambda run: _flip(run / "export/2.5-bits/base/quantized.safetensors"),
            "base/quantized.safetensors of ",
        ),
    ],
)
def test_verify_names_what_was_damaged(
    run: TinyRun, tmp_path: Path, damage: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    damage(tmp_path / "run")
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert words in capsys.readouterr().out


def test_verify_checks_a_configuration_against_its_own_digest(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    shutil.copytree(run.folder / "export/2.5-bits", out)
    (out / ".coalora-artifact").unlink()  # as a download leaves it
    content = json.loads((out / "configuration.json").read_text())
    content["layers"].popitem()
    (out / "configuration.json").write_text(json.dumps(content))
    assert main(["verify", str(out)]) == 1
    assert "configuration.json of " in capsys.readouterr().out


def test_a_record_without_a_bundle_is_refused(run: TinyRun, tmp_path: Path) -> None:
    folder = copy_record(run, tmp_path / "run", bundle={"kind": "bundle"})
    assert "no record of a finished run of this version" in refused(folder, tmp_path / "out")


def test_another_home_has_not_the_artifacts(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "elsewhere"))
    text = refused(run, tmp_path / "out")
    assert "no hub has it" in text
    assert "COALORA_HOME" in text
