"""Every public name of the library shows a runnable example, and every example in its docstrings runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import coalora
from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, allocate

ROOT = Path(coalora.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
TEXTS = [f"text {i}: the quick brown fox jumps over the lazy dog, and a small model reads it." for i in range(12)]


@pytest.fixture(scope="module")
def names(tiny_llama, tiny_tokenizer, tmp_path_factory) -> dict[str, Any]:
    """What examples may use beside their own: a base model's folder, texts, and a fitted model with its tables."""
    base_folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(base_folder)
    tiny_tokenizer.save_pretrained(base_folder)
    space = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])
    model = CoaLoraModel.from_pretrained(base_folder, CoaLoraConfig(r=4, choices=space), max_length=16)
    tables = model.calibrate(TEXTS)
    model.fit(TEXTS, TEXTS[:4], steps=4, rounds=1)
    return {
        "base_folder": base_folder, "train_texts": TEXTS, "search_texts": TEXTS[:4], "allocate": allocate,
        "model": model, "tables": tables, "bundle": model.bundle(),
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str, names: dict[str, Any], tmp_path: Path) -> None:
    found = doctest.DocTestFinder().find(import_module(module), extraglobs=names | {"folder": tmp_path})
    examples = [test for test in found if test.examples]
    assert examples
    for example in examples:
        report: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
        assert not report, "".join(report)


@pytest.mark.parametrize("name", coalora.__all__)
def test_every_public_class_and_function_shows_an_example(name: str) -> None:
    value = getattr(coalora, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        value = type(value)  # a registry
    # A recipe may leave it to its base class, a class to one of its methods.
    own = [c for c in value.__mro__ if c.__module__.startswith("coalora.")] if inspect.isclass(value) else [value]
    methods = [m for c in own for m in vars(c).values() if isinstance(m, FunctionType | staticmethod | classmethod)]
    assert any(">>> " in (inspect.getdoc(member) or "") for member in (*own, *methods))


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {name: f"coalora.{module}" for name, module in coalora._HOME.items()}
    assert set(coalora.__all__) == set(seen)
    assert set(coalora.__all__) <= set(dir(coalora))
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        coalora.unheard_of  # noqa: B018
    assert (ROOT / "py.typed").is_file()


def test_importing_the_library_imports_none_of_what_it_needs() -> None:
    program = "import sys, coalora; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'peft'}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
