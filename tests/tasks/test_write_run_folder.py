"""A run's folder is whole, the same the second time, and `latest` points at it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.store.store import Artifact
from tasks.write_run_folder import write_run_folder
from tests.tiny_run import TinyRun


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def write(run: TinyRun, folder: Path, exports: dict[str, Artifact] | None = None) -> Path:
    exports = exports if exports is not None else {"export/2.5-bits": run.exported.exports[0]}
    made = write_run_folder.fn(
        folder=str(folder),
        report=run.exported.report,
        bundle=run.exported.bundle,
        exports=exports,
        record={"pipeline": "tiny"},
    )
    return Path(made)


def test_the_run_folder_holds_report_bundle_exports_and_record(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "runs" / "tiny" / "abc")
    names = set(files(folder))
    assert {"report/report.html", "report/front.png", "report/metrics.json", "report/table.md", "run.json"} <= names
    assert {"bundle/adapter.safetensors", "export/2.5-bits/adapter/adapter_model.safetensors"} <= names
    assert "export/2.5-bits/base/quantized.safetensors" in names
    assert json.loads((folder / "run.json").read_text()) == {"pipeline": "tiny"}
    assert os.readlink(folder.parent / "latest") == "abc"  # relative: the folder may move


def test_writing_it_again_touches_no_result(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "runs" / "abc")
    before = files(folder)
    write(run, folder)
    after = files(folder)
    assert {k: v for k, v in after.items() if k != "run.json"} == {k: v for k, v in before.items() if k != "run.json"}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["abc", "latest"]


def test_equal_exports_lie_there_once(run: TinyRun, tmp_path: Path) -> None:
    low, high = run.exported.exports
    folder = write(run, tmp_path / "abc", {"export/3-bits": low, "export/4-bits": low, "export/5-bits": high})
    before = files(folder)
    names = [name.removeprefix("export/3-bits/") for name in before if name.startswith("export/3-bits/")]
    names.remove(".coalora-artifact")
    assert "base/quantized.safetensors" in names
    for name in names:
        same, other = folder / "export/4-bits" / name, folder / "export/5-bits" / name
        assert same.samefile(folder / "export/3-bits" / name)
        assert not same.samefile(other)
    # Written again, and after a link was broken by a program that saves anew.
    (folder / "export/4-bits/configuration.json").unlink()
    write(run, folder, {"export/3-bits": low, "export/4-bits": low, "export/5-bits": high})
    assert (folder / "export/4-bits/configuration.json").samefile(folder / "export/3-bits/configuration.json")
    assert {n: b for n, (b, _) in files(folder).items()} == {n: b for n, (b, _) in before.items()}


def test_latest_follows_the_last_run(run: TinyRun, tmp_path: Path) -> None:
    first, second = write(run, tmp_path / "a"), write(run, tmp_path / "b")
    assert (tmp_path / "latest").resolve() == second
    write(run, first)
    assert (tmp_path / "latest").resolve() == first


def test_a_damaged_copy_is_made_whole(run: TinyRun, tmp_path: Path) -> None:
    folder = write(run, tmp_path / "abc")
    target = folder / "report" / "table.md"
    before = target.read_bytes()
    target.chmod(0o644)
    target.write_text("damaged")
    (folder / "report" / "extra.txt").write_text("left over")
    write(run, folder)
    assert target.read_bytes() == before
    assert not (folder / "report" / "extra.txt").exists()
