"""Digest of a saved model: by content, whatever the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from coalora.models.files import model_digest, model_files, model_folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save_model(folder: Path, **files: str) -> Path:
    for name, content in {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "t", **files}.items():
        write(folder / name, content)
    return folder


def test_a_models_digest_is_that_of_its_files_and_not_of_its_place(tmp_path: Path) -> None:
    a, b = save_model(tmp_path / "a"), save_model(tmp_path / "deep" / "b")
    write(b / "README.md", "words")
    write(b / "training_args.bin", "pickle")
    assert model_digest(a) == model_digest(b)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "modeling_x.py"])
def test_every_file_that_decides_the_model_decides_the_digest(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "m", **{"vocab.txt": "v", "modeling_x.py": "c = 1"})
    before = model_digest(folder)
    write(folder / name, "another")
    changed = model_digest(folder)
    assert changed != before


def test_a_renamed_file_changes_the_digest(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    before = model_digest(folder)
    (folder / "tokenizer.json").rename(folder / "added_tokens.json")
    assert model_digest(folder) != before


@pytest.mark.parametrize("names", [[], ["config.json"], ["model.safetensors"], ["config.json", "pytorch_model.bin"]])
def test_an_incomplete_model_folder_is_refused_with_what_is_there(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in names:
        write(folder / name, "{}")
    with pytest.raises(CoaloraError, match=r"no config\.json or no safetensors weights") as caught:
        model_files(folder)
    assert (", ".join(n for n in names if not n.endswith(".bin")) or "nothing") in caught.value.problem


def test_a_model_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match="nothing"):
        model_files(tmp_path / "none")


def test_a_local_folder_is_its_own_and_a_name_that_nobody_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_folder(save_model(tmp_path / "m")) == tmp_path / "m"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CoaloraError, match=r"no local folder, and the hub does not give it \(.+\)"):
        model_folder("nobody/has-this-model")
