"""Packed bases that stay packed in memory: the numbers of the dequantized model, at the packed base's bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coalora.calibrate.tables import calibration_tables
from coalora.export.base import load_adapted, load_base, write_base
from coalora.models.switching.packed import PackedConv1D, PackedLinear
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace

CPU = torch.device("cpu")
IDS = torch.arange(2 * 7).view(2, 7)


def packed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PackedLinear | PackedConv1D)]


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every storage that a model keeps, by its address: parameters, buffers and what packed layers hold."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [part for layer in packed_layers(model) for part in layer.source.parts.values()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_outputs_are_those_of_the_dequantized_model_bit_for_bit(
    tiny_models: dict, tables_for: Callable, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = tiny_models[family]()
    tables = tables_for(model)
    task = "classification" if family in ("bert", "roberta") else "language-modeling"
    write_base(tmp_path, model, tables, np.arange(len(tables.layers)) % len(tables.space), task=task)
    wanted, found = (load_base(tmp_path, device=CPU, dtype=dtype, weights=w) for w in ("dequantized", "packed"))
    assert len(packed_layers(found)) == len(tables.layers)
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    assert found(IDS).logits.dtype == dtype


def test_an_adapted_model_generates_with_a_cache_by_stock_peft_as_well(
    make_bundle: Callable, tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    bundle, _ = make_bundle(tiny_llama)
    made = bundle.adapt(4.0)
    write_base(tmp_path / "base", tiny_llama(), bundle.tables, made.choices, task="language-modeling")
    made.save_pretrained(tmp_path / "adapter")
    ours = load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU, weights="packed")
    stock = PeftModel.from_pretrained(load_base(tmp_path / "base", device=CPU, weights="packed"), tmp_path / "adapter")
    plain = load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU)
    asked = {"attention_mask": torch.ones(2, 7), "max_new_tokens": 9, "do_sample": False, "use_cache": True}
    wanted = plain.generate(input_ids=IDS, **asked)
    assert wanted.shape[1] > 7
    for model in (ours, stock.eval()):
        assert len(packed_layers(model)) == len(bundle.tables.layers)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(model.generate(input_ids=IDS, **asked), wanted)
        assert torch.equal(model.generate(input_ids=IDS, **asked | {"use_cache": False}), wanted)


@torch.no_grad()
def test_memory_is_that_of_the_packed_base_the_other_tensors_and_one_weight(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    layers, space = find_target_layers(base), ChoiceSpace("int", bits=[2, 3], group_size=[64], mode=["asym"])
    tables = calibration_tables(layers, space, np.ones((len(layers), len(space))), "0" * 64)
    write_base(tmp_path, base, tables, np.arange(len(layers)) % 2, task="language-modeling")
    model = load_base(tmp_path, device=CPU, dtype=torch.float32, weights="packed")
    packed, n_weights = tables.total_nbytes(np.arange(len(layers)) % 2), sum(layer.n_weights for layer in layers)
    rest = sum(p.numel() for p in base.parameters()) - n_weights
    kept = sum(storages(model).values())
    hollow = 4 * len(layers)  # one number stands for each weight
    rotary = sum(t.untyped_storage().nbytes() for t in model.buffers())
    assert kept == packed + 4 * rest + hollow + rotary
    assert kept < 4 * n_weights / 4

    alive: set[int] = set()
    most = [0]

    def counted(source: Callable) -> Callable:
        def make() -> Tensor:
            weight = source()()
            alive.add(id(weight))
            weakref.finalize(weight, alive.discard, id(weight))
            most[0] = max(most[0], len(alive))
            return weight

        return lambda: make

    for layer in packed_layers(model):
        layer.source = counted(layer.source)
    model(IDS)
    model.generate(input_ids=IDS, attention_mask=torch.ones(2, 7), max_new_tokens=3, do_sample=False)
    assert (most[0], alive) == (1, set())
