"""Where the base model that settings name lies: folders, packages and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import coalora.models.gguf
from coalora.errors import CoaloraError
from pipeline.inputs.base import base_name, base_source, model_content
from pipeline.settings.sections import ModelSettings


def saved(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")


def test_a_folder_is_itself_and_a_hub_id_stays_one(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    folder = ModelSettings(name_or_path=str(tmp_path / "m"))
    assert (base_source(folder), base_name(folder)) == (str(tmp_path / "m"), "m")
    assert len(str(model_content(folder))) == 64
    hub = ModelSettings(name_or_path="org/model")
    assert (base_source(hub), base_name(hub), model_content(hub)) == ("org/model", "org/model", None)


def test_a_package_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "with_model")
    (tmp_path / "with_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ModelSettings(name_or_path="package:with_model")
    assert base_source(model) == str(tmp_path / "with_model")
    with pytest.raises(CoaloraError, match=r"There is no package 'missing'.*Install it with pip"):
        base_source(ModelSettings(name_or_path="package:missing"))


def test_gguf_is_unpacked_once_for_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    seen: list[str] = []

    def unpack(file: Path, folder: Path) -> None:
        seen.append(file.name)
        saved(folder)

    monkeypatch.setattr(coalora.models.gguf, "unpack_gguf", unpack)
    for name, content in (("a.gguf", b"GGUF one"), ("b.gguf", b"GGUF two"), ("again.gguf", b"GGUF one")):
        (tmp_path / name).write_bytes(content)
    first, second, again = (
        ModelSettings(name_or_path=str(tmp_path), gguf_file=name) for name in ("a.gguf", "b.gguf", "again.gguf")
    )
    assert base_source(first) == base_source(first) == base_source(again) != base_source(second)
    assert seen == ["a.gguf", "b.gguf"]
    assert (base_name(first), Path(base_source(first)).parent) == ("a", tmp_path / "home" / "gguf")
    assert sorted(p.suffix for p in (tmp_path / "home" / "gguf").iterdir() if p.is_file()) in ([], [".lock", ".lock"])


def test_a_file_that_cannot_be_unpacked_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    model = ModelSettings(name_or_path=str(tmp_path), gguf_file="bad.gguf")
    for _ in range(2):
        with pytest.raises(CoaloraError):
            base_source(model)


def test_gguf_belongs_to_an_existing_model() -> None:
    with pytest.raises(ValueError, match=r"model\.gguf_file is a file of model\.name_or_path"):
        ModelSettings.model_validate({"pretrain": {}, "gguf_file": "a.gguf"})
