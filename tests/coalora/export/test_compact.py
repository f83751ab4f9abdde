"""Adapters of 8 and 4 bits: their size, their error, and that nobody takes codes for weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from coalora.contents import describe, problems
from coalora.errors import CoaloraError
from coalora.export.adapter import adapter_nbytes
from coalora.export.base import load_adapted, write_base
from coalora.export.compact import COMPACT, pack_adapter
from coalora.files import folder_nbytes

DTYPES = [torch.int8, torch.int4]
CPU = torch.device("cpu")


@pytest.fixture
def pair(tiny_models, make_bundle, tmp_path):
    """`pair(family, dtype)`: the adapter in memory; base and adapter lie in `tmp_path`."""

    def make(family: str, dtype: torch.dtype):
        bundle, _ = make_bundle(tiny_models[family])
        made = bundle.adapt_to(np.zeros(len(bundle.tables.layers), dtype=np.int64))
        task = "classification" if family == "bert" else "language-modeling"
        write_base(tmp_path / "base", tiny_models[family](), bundle.tables, made.choices, task=task)
        made.save_pretrained(tmp_path / "adapter", dtype=dtype)
        return bundle, made

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_loaded_is_what_was_stored_within_half_a_step(pair, tmp_path, family, dtype) -> None:
    bundle, made = pair(family, dtype)
    found = load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU)
    state = {k.replace(".default", "").replace(".modules_to_save", ""): v for k, v in found.state_dict().items()}
    steps = 127.5 if dtype == torch.int8 else 7.5
    for name, wanted in made.tensors.items():
        largest = float(wanted.abs().max())
        if ".lora_" not in name:
            torch.testing.assert_close(state[name], wanted, rtol=1e-3, atol=1e-3 * largest)
            continue
        power = math.log2(float(state[name].abs().max()) / largest)  # of two, given to the other factor
        restored = state[name] / 2.0 ** round(power)
        # Half a step, and what the largest weight is clipped by under a scale rounded to fp16.
        assert float((restored - wanted).abs().max()) <= 1.2 * largest / steps / 2
    products = [
        (state[a], state[b], made.tensors[a], made.tensors[b])
        for a in made.tensors if "lora_A" in a for b in [a.replace("lora_A", "lora_B")]
    ]  # fmt: skip
    for A, B, wanted_A, wanted_B in products:
        wanted = wanted_B @ wanted_A
        assert float((B @ A - wanted).norm()) <= (0.02 if dtype == torch.int8 else 0.3) * float(wanted.norm())
    size = folder_nbytes(tmp_path / "adapter")
    heads = sum(v.numel() for k, v in made.tensors.items() if ".lora_" not in k)
    counted = adapter_nbytes(bundle.tables.layers, bundle.ranks, heads, dtype)
    assert size <= counted <= size + 64 * 4 * len(made.tensors)


def test_loading_warns_of_nothing_and_keeps_the_name_of_the_base(pair, tmp_path, recwarn) -> None:
    _, made = pair("llama", torch.int8)
    found = load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU)
    named = found.peft_config["default"].base_model_name_or_path
    assert named is not None
    assert named == made.config.base_model_name_or_path
    assert [str(w.message) for w in recwarn if "base_model_name_or_path" in str(w.message)] == []


def test_eight_bits_are_half_and_four_a_quarter_of_sixteen() -> None:
    tensors = {"m.lora_A.weight": torch.randn(16, 2048), "m.lora_B.weight": 1e-6 * torch.randn(4096, 16)}
    sixteen = 2 * sum(t.numel() for t in tensors.values())
    sizes = [sum(t.nbytes for t in pack_adapter(tensors, dtype).values()) / sixteen for dtype in DTYPES]
    assert sizes == pytest.approx([(8 + 16 / 128) / 16, (4 + (16 + 4) / 32) / 16])


def test_stock_peft_refuses_the_folder(pair, tmp_path, tiny_llama) -> None:
    pair("llama", torch.int8)
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert describe(tmp_path / "adapter")["kind"] == "adapter of integers"
    assert problems(tmp_path / "adapter")[1] == []


@pytest.mark.parametrize("change", ["missing", "more", "altered"])
def test_tensors_that_are_not_those_of_the_layers_are_refused(pair, tmp_path, change) -> None:
    pair("llama", torch.int8)
    file = tmp_path / "adapter" / COMPACT
    tensors = load_file(file)
    if change == "missing":
        tensors.pop(next(name for name in tensors if name.endswith("scales")))
    elif change == "more":
        tensors["other"] = torch.zeros(3)
    else:
        next(iter(tensors.values()))[0] += 1
    save_file(tensors, file)
    with pytest.raises(CoaloraError, match="adapter"):
        load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU)
