"""Format compressed-tensors, by its written-out arithmetic: no engine is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from coalora.calibrate.tables import calibration_tables
from coalora.errors import CoaloraError
from coalora.export.compressed_tensors import CompressedTensorsFormat
from coalora.export.formats import write_export
from coalora.files import read_tensors
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes (rows, count) of streams of int32 words (rows, words), by the integers that the words make together."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in words]
    return np.array([[stream >> (bits * i) & (2**bits - 1) for i in range(count)] for stream in rows])


def test_what_is_stored_stands_for_the_weights_of_the_scheme_bit_for_bit(
    integer_export: Callable, tmp_path: Path
) -> None:
    made = integer_export("llama", "sym")
    write_export(tmp_path, ["compressed-tensors"], made.source)
    tensors = load_file(tmp_path / "compressed-tensors/base/model.safetensors")
    config = json.loads((tmp_path / "compressed-tensors/base/config.json").read_text())["quantization_config"]
    found = {}
    for group in config["config_groups"].values():
        given = group["weights"]
        assert (given["type"], given["strategy"], given["symmetric"]) == ("int", "group", True)
        for name in group["targets"]:
            shape, scales = tensors[f"{name}.weight_shape"], tensors[f"{name}.weight_scale"]
            assert (tensors[f"{name}.weight_packed"].dtype, scales.dtype) == (np.int32, np.float16)
            codes = unpacked(tensors[f"{name}.weight_packed"], given["num_bits"], shape[1])
            steps = codes.astype(np.float32) - 2 ** (given["num_bits"] - 1)
            found[name] = steps * scales.astype(np.float32).repeat(given["group_size"], 1)
    assert sorted(found) == sorted(layer.name for layer in made.source.tables.layers)
    assert len({group["weights"]["num_bits"] for group in config["config_groups"].values()}) >= 3
    for name, weight in found.items():
        assert np.array_equal(weight, made.weight(name).numpy()), name


def test_other_tensors_keep_the_checkpoint_s_type_and_the_model_computes_where_scales_are_exact(
    integer_export: Callable, tmp_path: Path
) -> None:
    for dtype, asked in ((torch.bfloat16, "float32"), (torch.float16, "float16"), (torch.float32, "float32")):
        made = integer_export("llama", "sym", dtype)
        folder = tmp_path / asked / str(dtype)
        write_export(folder, ["compressed-tensors"], made.source)
        tensors, _ = read_tensors(folder / "compressed-tensors/base/model.safetensors")
        embedding = made.source.load_model().get_input_embeddings().weight
        assert tensors["model.embed_tokens.weight"].dtype == dtype
        assert torch.equal(tensors["model.embed_tokens.weight"].float(), embedding)
        assert "lm_head.weight" not in tensors  # tied
        config = json.loads((folder / "compressed-tensors/base/config.json").read_text())
        assert (config["dtype"], config["use_cache"], config["architectures"]) == (asked, True, ["LlamaForCausalLM"])


LAYERS = [
    TargetLayer(f"model.layers.0.self_attn.{name}_proj", f"self_attn.{name}_proj", 0, (64, 96), False) for name in "qkv"
]


def refused(space: ChoiceSpace, layers: list[TargetLayer] = LAYERS, task: str = "language-modeling", **options) -> str:
    tables = calibration_tables(layers, space, np.ones((len(layers), len(space))), "", **options)
    with pytest.raises(CoaloraError) as caught:
        CompressedTensorsFormat().check(tables, None, task)
    return str(caught.value)


def test_what_cannot_be_held_is_told_with_the_layer_and_what_to_train_with() -> None:
    fits = ChoiceSpace("int", group_size=[32], mode=["sym"])
    first = "model.layers.0.self_attn.q_proj"
    message = refused(ChoiceSpace.union([fits, ChoiceSpace("nf", bits=[2], block_size=[64])]), tie="fused")
    assert f"{first} may take nf2" in message
    assert "Train with choices.scheme: int" in message
    message = refused(ChoiceSpace("int", mode=["sym"]), tie="fused")
    assert f"{first} may take int2 g64 sym" in message
    assert "Train with choices.allow: {group_size: [32]}" in message
    assert f"{first} may take int2 g32 asym" in (message := refused(ChoiceSpace("int", group_size=[32]), tie="fused"))
    assert "Train with choices.allow: {mode: [sym]}" in message
    message = refused(fits)
    assert f"{first}, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj may take different" in message
    assert "Train with choices.tie: fused" in message
    assert "Conv1D" in refused(fits, [replace(LAYERS[0], transposed=True)])
    assert "the task is classification" in refused(fits, task="classification", tie="fused")


def test_a_configuration_of_untied_training_is_held_where_it_happens_to_be_tied(
    integer_export: Callable, tmp_path: Path
) -> None:
    source = integer_export("llama", "sym", tie="none").source
    with pytest.raises(CoaloraError, match="may take different choices"):
        write_export(tmp_path / "untied", ["peft", "compressed-tensors"], source)
    assert not (tmp_path / "untied").exists()  # nothing was written, by any format
    even = np.full(len(source.tables.layers), 3)
    CompressedTensorsFormat().check(source.tables.fixed(even), source.config, "language-modeling")
