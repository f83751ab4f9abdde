"""Profiles of devices: what a device cannot hold is never chosen, and a profile that nothing meets says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.export.bundle import Bundle
from coalora.export.device import export_for
from coalora.export.profile import DeviceProfile, shipped


@pytest.fixture
def bundle(tiny_llama: Any, make_bundle: Any) -> Bundle:
    made = make_bundle(tiny_llama)[0]
    made.tables = replace(made.tables, rest_nbytes=50_000)
    return made


def profile(folder: Path, text: str) -> DeviceProfile:
    (folder / "mine.yaml").write_text(text)
    return DeviceProfile.load(folder / "mine.yaml")


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_load(name: str) -> None:
    found = DeviceProfile.load(name)
    assert (found.name, bool(found.description)) == (name, True)


def test_memory_is_a_ceiling(bundle: Bundle, tmp_path: Path) -> None:
    found = profile(tmp_path, "to: [peft]\nmemory: 8GB\n")
    made = export_for(bundle, tmp_path / "out", device=found)
    counted = bundle.counting("file_bytes").tables
    assert float(counted.costs(made.adapted.choices)) <= counted.cost_range()[1]
    assert '"device": "mine"' in (tmp_path / "out" / "export.json").read_text()


def test_choices_outside_of_the_profile_are_never_taken(bundle: Bundle, tmp_path: Path) -> None:
    widths = sorted({choice.as_dict()["bits"] for choice in bundle.tables.space.choices})
    few = widths[:-1]
    found = profile(tmp_path, f"to: [peft]\nmemory: 8GB\nallow: {{bits: {few}}}\n").restrict(bundle)
    low, high = found.tables.cost_range()
    for budget in np.linspace(low, high, 9):
        chosen = found.select(float(budget))
        assert {bundle.tables.space.choices[k].as_dict()["bits"] for k in chosen} <= set(few)


def test_a_device_that_needs_ties_gets_them_from_an_untied_training(bundle: Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bundle.members.configurations[:] = rng.integers(0, len(bundle.tables.space), bundle.members.configurations.shape)
    found = profile(tmp_path, "to: [peft]\nmemory: 8GB\ntie: fused\n").restrict(bundle)
    assert not len(found.members)
    low, high = found.tables.cost_range()
    for budget in np.linspace(low, high, 5):
        found.tables.of_groups(found.select(float(budget)))  # refuses broken ties


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("to: [peft]\n", "one of memory, bits and latency"),
        ("to: [peft]\nmemory: 1GB\nbits: 3\n", "one of memory, bits and latency"),
        ("memory: 1GB\n", "without to"),
        ("to: peft\nmemory: 1GB\n", "a list"),
        ("to: [none]\nmemory: 1GB\n", "no export format 'none'"),
        ("to: [peft]\nmemory: 1\n", "memory"),
        ("to: [peft]\nmemory: 1ms\n", "no size in bytes"),
        ("to: [peft]\nbits: 3\ntie: loose\n", "tie"),
        ("to: [peft]\nlatency: 20ms\n", "a latency with its table"),
        ("to: [peft]\nbits: 3\nbit: 4\n", "has bit"),
        ("[1]\n", "holds no mapping"),
        ("to: [peft\n", "not YAML"),
        ("to: [peft]\nbits: 3\nmax_bits: x\n", "max_bits"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CoaloraError, match=words):
        profile(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("allow: {bits: [5]}", "asks for choices that the bundle has not"),
        ("allow: {colour: [red]}", "asks for choices that the bundle has not"),
        ("min_bits: 9", "leaves model.layers.0.self_attn.q_proj without a choice"),
    ],
)
def test_a_profile_that_nothing_meets_says_so(bundle: Bundle, tmp_path: Path, text: str, words: str) -> None:
    found = profile(tmp_path, f"to: [peft]\nmemory: 8GB\n{text}\n")
    with pytest.raises(CoaloraError, match=words):
        export_for(bundle, tmp_path / "out", device=found)
    with pytest.raises(CoaloraError, match="There is no device profile nobody"):
        export_for(bundle, tmp_path / "out", device="nobody")
    assert not (tmp_path / "out").exists()
