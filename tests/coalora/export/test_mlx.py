"""Format mlx, by its written-out arithmetic: no engine is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, PhiConfig, Qwen2Config

from coalora.calibrate.tables import calibration_tables
from coalora.errors import CoaloraError
from coalora.export.adapter import peft_key
from coalora.export.formats import write_export
from coalora.export.mlx import MlxFormat
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace


@pytest.mark.parametrize("mode", ["sym", "asym"])
def test_what_is_stored_stands_for_the_weights_of_the_scheme(
    integer_export: Callable, tmp_path: Path, mode: str
) -> None:
    made = integer_export("qwen2", mode)
    write_export(tmp_path, ["mlx"], made.source)
    tensors = load_file(tmp_path / "mlx/base/model.safetensors")
    config = json.loads((tmp_path / "mlx/base/config.json").read_text())
    given = config["quantization"]
    assert {given[layer.name]["bits"] for layer in made.source.tables.layers} >= {2, 3, 8}
    for layer in made.source.tables.layers:
        bits, size = given[layer.name]["bits"], given[layer.name]["group_size"]
        words, scales, biases = (tensors[f"{layer.name}.{part}"] for part in ("weight", "scales", "biases"))
        kept = np.float16 if mode == "sym" else np.float32
        assert (words.dtype, scales.dtype, biases.dtype) == (np.uint32, np.float16, kept)
        stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(*layer.shape, bits)
        codes = stream @ 2 ** np.arange(bits)
        weight = codes * scales.astype(np.float32).repeat(size, 1) + biases.astype(np.float32).repeat(size, 1)
        assert np.array_equal(weight.astype(np.float32), made.weight(layer.name).numpy())
    assert tensors["model.layers.0.self_attn.q_proj.bias"].shape == (64,)  # the layer's own, beside `biases`
    assert (config["rope_theta"], config["rope_scaling"], config["tie_word_embeddings"]) == (500000.0, None, True)


def test_the_adapter_is_the_same_product_at_one_rank(integer_export: Callable, tmp_path: Path) -> None:
    source = integer_export("llama").source
    write_export(tmp_path, ["mlx"], source)
    tensors = load_file(tmp_path / "mlx/adapter/adapters.safetensors")
    lora = json.loads((tmp_path / "mlx/adapter/adapter_config.json").read_text())["lora_parameters"]
    assert (lora["rank"], lora["scale"]) == (6, 1.5)
    assert lora["keys"] == [layer.name for layer in source.tables.layers]
    for layer in source.tables.layers:
        a, b = (torch.from_numpy(tensors[f"{layer.name}.lora_{side}"]) for side in "ab")
        assert (a.shape, b.shape) == ((layer.shape[1], 6), (6, layer.shape[0]))
        A, B = (source.adapted.tensors[peft_key(f"{layer.name}.lora_{side}.weight")] for side in "AB")
        torch.testing.assert_close((a @ b).T, B @ A)


def test_what_cannot_be_held_is_told_with_the_layer_and_what_to_train_with() -> None:
    layers = [TargetLayer("model.layers.0.self_attn.q_proj", "self_attn.q_proj", 0, (64, 96), False)]

    def refused(config: object, space: ChoiceSpace | None = None, **change) -> str:
        space = space or ChoiceSpace("int", group_size=[32])
        own = [replace(layer, **change) for layer in layers]
        tables = calibration_tables(own, space, np.ones((1, len(space))), "")
        with pytest.raises(CoaloraError) as caught:
            MlxFormat().check(tables, config, "language-modeling")
        return str(caught.value)

    assert "architecture phi" in refused(PhiConfig())
    assert "hidden_act of the model is 'gelu'" in refused(LlamaConfig(hidden_act="gelu"))
    assert "use_sliding_window" in refused(Qwen2Config(use_sliding_window=True))
    assert "{group_size: [32]}" in refused(LlamaConfig(), ChoiceSpace("int"))
    assert "Export without mlx" in refused(LlamaConfig(), ChoiceSpace("int"), shape=(64, 100))
    assert "may take bf16 of scheme float" in refused(LlamaConfig(), ChoiceSpace("float", dtype=["bf16"]))
