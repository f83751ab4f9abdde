"""A stage's key follows the code that it reaches and the content of its inputs, and nothing else."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from coalora.errors import CoaloraError
from pipeline.stages import keys
from pipeline.stages.keys import artifacts_in, function_source_digest, source_closure, source_digest, stage_key
from pipeline.store.store import Artifact

FILES = {
    "__init__.py": "VALUE = 1\n",
    "work.py": (
        "import fakelib.deep.one\nfrom . import near\nfrom fakelib import sibling as s, VALUE\n"
        'LAZY = {"gguf": "fakelib.lazy:Scheme"}\n\n'
        "def build(*, x=1):\n    from .inner import helper\n    return helper(x)\n"
    ),
    "near.py": "A = 1\n",
    "sibling.py": "from fakelib.deep import two\n",
    "inner.py": "import json\nfrom os.path import join\n\ndef helper(x):\n    return x  # plain\n",
    "lazy.py": "from ..fakelib import nowhere\n",
    "unrelated.py": "B = 2\n",
    "deep/__init__.py": "from fakelib.deep.from_init import C\n",
    "deep/one.py": "from ..near import A\n",
    "deep/two.py": "import fakelib.work\n",
    "deep/from_init.py": "C = 3\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "fakelib"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "fakelib"]:
        del sys.modules[name]


def digest(package: Path) -> str:
    return source_digest(package / "work.py", ("fakelib",))


def test_closure_follows_every_kind_of_import(package: Path) -> None:
    closure = source_closure(package / "work.py", ("fakelib",))
    names = {path.relative_to(package).as_posix() for path in closure.values()}
    assert names == set(FILES) - {"unrelated.py"}
    assert source_closure("fakelib.work", ("fakelib",)) == closure


def test_closure_stays_within_the_named_packages(package: Path) -> None:
    assert source_closure(package / "work.py", ("otherlib",)) == {"fakelib.work": package / "work.py"}


def test_closure_leaves_the_plumbing_out(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "EXCLUDED", ("fakelib.deep*",))
    names = {p.relative_to(package).as_posix() for p in source_closure("fakelib.work", ("fakelib",)).values()}
    assert not any(name.startswith("deep/") for name in names)


def test_closure_of_a_real_stage_module_has_the_library_and_no_plumbing(tmp_path: Path) -> None:
    module = tmp_path / "stage_module.py"
    module.write_text(
        "from coalora.errors import CoaloraError\nfrom pipeline.stages.runner import stage\nimport torch\n"
    )
    (tmp_path / "coalora").mkdir()  # a folder of tests, not the package
    closure = source_closure(module).values()
    names = {path.name for path in closure}
    assert {"stage_module.py", "errors.py"} <= names
    # It names every module of the library: with it, any edit would change every key.
    assert not any(path.parts[-2:] == ("coalora", "__init__.py") for path in closure)
    assert not names & {"engine.py", "stage.py", "store.py", "keys.py", "artifacts.py", "environment.py"}


def test_closure_of_what_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match=r"no module .no_such"):
        source_closure("no_such_module_at_all")
    with pytest.raises(CoaloraError, match="There is no module file"):
        source_closure(tmp_path / "absent.py")
    with pytest.raises(CoaloraError, match="source file"):
        function_source_digest(len)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"unrelated.py"}))
def test_an_edit_of_any_reached_file_changes_the_digest(package: Path, name: str) -> None:
    before = digest(package)
    (package / name).write_text(FILES[name] + "\nEDITED = True\n")
    assert digest(package) != before
    (package / name).write_text(FILES[name])
    assert digest(package) == before


def test_an_unrelated_edit_or_another_place_does_not_change_the_digest(package: Path, tmp_path: Path) -> None:
    before = digest(package)
    (package / "unrelated.py").write_text("B = 99\n")
    (package / "inner.py").write_text(
        '"""Docstring."""\nimport json\nfrom os.path import join\n\n\n'
        'def helper(x):\n    """Doc."""\n    return (x)  # a comment\n'
    )
    assert digest(package) == before
    moved = tmp_path / "elsewhere" / "fakelib"
    shutil.copytree(package, moved)
    assert digest(moved) == before


def test_a_module_that_appears_later_changes_the_digest(package: Path) -> None:
    before = digest(package)
    (package / "nowhere.py").write_text("D = 4\n")
    (package / "lazy.py").write_text("from . import nowhere\n")
    assert digest(package) != before


class Settings(BaseModel):
    steps: int = 10
    lr: float = 1e-3
    folder: Path = Path("x")


class Holder(BaseModel):
    inside: dict[str, Artifact]


def build(*, settings: Any = None) -> None:
    """A stage function for the tests below."""


def key(value: Any, name: str = "settings") -> str:
    return stage_key("train", build, {name: value})


A = Artifact(kind="table", digest="a" * 64, nbytes=1, meta={"loss": 1.0})


def test_key_is_stable_readable_and_follows_stage_source_and_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = key(Settings())
    assert first == key(Settings(steps=10))
    stage, _, digest = first.rpartition("-")
    assert stage == "train"
    assert len(digest) == 64
    assert stage_key("calibrate", build, {"settings": Settings()}) != first
    assert stage_key("train", build, {"settings": Settings()}, source="other") != first
    monkeypatch.setattr(keys, "_version", lambda package: "0.0")
    assert key(Settings()) != first


def test_an_edited_library_changes_the_key_of_an_imported_function(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys.function_source_digest, "__defaults__", (("fakelib",),))
    function = importlib.import_module("fakelib.work").build
    before = stage_key("train", function, {})
    assert stage_key("train", function, {}) == before
    (package / "inner.py").write_text("def helper(x):\n    return x + 1\n")
    assert stage_key("train", function, {}) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Settings(), Settings(steps=11)),
        (A, A.model_copy(update={"digest": "b" * 64})),
        (A, A.model_copy(update={"kind": "other"})),
        ([A, 1], [1, A]),
        ({"a": A}, {"b": A}),
        (1, 1.0),
        (1, True),
        (None, "None"),
        (0.1, 0.1 + 2**-54),
    ],
)
def test_key_tells_different_inputs_apart(one: Any, other: Any) -> None:
    assert key(one) != key(other)
    assert key(one) != key(one, name="other")


def test_key_ignores_what_is_no_content() -> None:
    assert key(A) == key(A.model_copy(update={"meta": {"loss": 2.0}}))
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    assert key((1, 2)) == key([1, 2])


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.zeros(2), "'settings'"),
        (Path("x"), "'settings'"),
        (object(), "'settings'"),
        (np, "'settings'"),
        (float("nan"), "'settings'"),
        ({1: "a"}, "'settings'"),
        ({"a": [1, {2}]}, r"settings\['a'\]\[1\]"),
        (Holder(inside={"a": A}), "settings.inside"),
    ],
)
def test_an_unsupported_input_is_a_type_error_that_names_it(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        key(value)


def test_artifacts_are_found_at_any_depth() -> None:
    found = dict(artifacts_in({"a": A, "b": [1, {"c": (A,)}], "d": "text"}))
    assert list(found) == ["a", "b[1]['c'][0]"]


def test_the_source_of_what_an_input_names_in_a_registry_counts(package: Path) -> None:
    inputs = {"choices": {"also": [{"scheme": "fakelib.near:A"}]}, "method": "coa"}
    before = stage_key("train", digest, inputs, source="s")
    (package / "unrelated.py").write_text("B = 3\n")
    assert stage_key("train", digest, inputs, source="s") == before
    (package / "near.py").write_text("A = 2\n")
    assert stage_key("train", digest, inputs, source="s") != before
