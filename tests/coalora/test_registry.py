"""Registries: names without imports, what other packages add, and what an unknown name is told."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from coalora import registry
from coalora.errors import CoaloraError
from coalora.registry import Registry, added_modules

PLUGIN = """
from fractions import Fraction
half = Fraction(1, 2)
word = "half"
"""


@pytest.fixture
def units() -> Registry[Fraction]:
    return Registry("unit", "coalora.test_units", "fractions:Fraction", {"tenth": Fraction(1, 10)})


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package `units_plugin` with the entry point `half`."""
    (tmp_path / "units_plugin.py").write_text(PLUGIN)
    metadata = tmp_path / "units_plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: units-plugin\nVersion: 1\n")
    entries = "[coalora.test_units]\nhalf = units_plugin:half\ntenth = units_plugin:half\n"
    (metadata / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry._references.cache_clear()
    yield
    sys.modules.pop("units_plugin", None)
    registry._references.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_an_entry_point_adds_a_name_and_takes_none_over(units: Registry[Fraction]) -> None:
    assert list(units) == ["tenth", "half"]
    assert units["half"] == Fraction(1, 2)
    assert units["tenth"] == Fraction(1, 10)


@pytest.mark.usefixtures("plugin")
def test_a_reference_is_a_name(units: Registry[Fraction]) -> None:
    assert units["units_plugin:half"] == Fraction(1, 2)


@pytest.mark.usefixtures("plugin")
def test_names_are_checked_without_an_import(units: Registry[Fraction]) -> None:
    assert units.check("half") == "half"
    assert units.check("units_plugin:half") == "units_plugin:half"
    assert "units_plugin" not in sys.modules


@pytest.mark.usefixtures("plugin")
def test_only_objects_of_the_kind_are_taken(units: Registry[Fraction]) -> None:
    with pytest.raises(CoaloraError, match="'units_plugin:word' is no unit"):
        units["units_plugin:word"]
    with pytest.raises(CoaloraError, match="'os:system' is no unit"):
        units["os:system"]


def test_an_unknown_name_is_told_the_others_and_the_nearest(units: Registry[Fraction]) -> None:
    with pytest.raises(CoaloraError, match=r"no unit 'tent' \(did you mean 'tenth'\?\)\. Take one of tenth"):
        units["tent"]
    with pytest.raises(CoaloraError, match=r"cannot be imported from 'nowhere:half' \(No module named 'nowhere'\)"):
        units["nowhere:half"]


@pytest.mark.usefixtures("plugin")
def test_modules_of_added_names_are_found_for_the_cache_keys() -> None:
    assert added_modules("half") == added_modules("units_plugin:word") == {"units_plugin"}
    assert "units_plugin" not in sys.modules
    assert added_modules("units_plugin") == added_modules("nowhere:half") == added_modules("s3://bucket:80") == set()


def test_built_in_names_are_listed_without_torch_and_scipy() -> None:
    code = """if True:
        import sys
        from coalora.adapt.methods import METHODS
        from coalora.export.formats import EXPORT_FORMATS
        from coalora.models.architectures import ARCHITECTURES
        from coalora.quant.registry import SCHEMES
        from coalora.search.strategies import STRATEGIES
        for registry in (SCHEMES, ARCHITECTURES, STRATEGIES, METHODS, EXPORT_FORMATS):
            print(*registry, sep=",")
        print("torch" in sys.modules, "scipy" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *names, heavy = done.stdout.splitlines()
    assert heavy == "False False"
    assert names == [
        "nf,int,gptq,gguf,float",
        "bert,roberta,llama,mistral,qwen2,qwen3,gpt2",
        "ehvi,random,frozen",
        "none,shared,paper,coa,qlora,lq-lora",
        "peft,packed,compressed-tensors,mlx,gguf,gptq",
    ]


@pytest.mark.usefixtures("plugin")
def test_a_name_from_outside_imports_nothing_that_the_machine_has_not_agreed_to(
    units: Registry[Fraction], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tenth", "half", "units_plugin:half"):  # built in, registered, and what is registered by its reference
        assert units.check_foreign(name) == name
    assert units.check_foreign("fractions:Fraction") == "fractions:Fraction"  # imported already
    with pytest.raises(CoaloraError, match=r"'units_plugin:word' would import units_plugin.*COALORA_TRUST_CODE=1"):
        units.check_foreign("units_plugin:word")
    monkeypatch.setenv("COALORA_TRUST_CODE", "1")
    assert units.check_foreign("units_plugin:word") == "units_plugin:word"
    assert "units_plugin" not in sys.modules
