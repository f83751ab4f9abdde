"""Format gptq, by its written-out arithmetic: no engine is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, PhiConfig

from coalora.calibrate.tables import calibration_tables
from coalora.errors import CoaloraError
from coalora.export.formats import write_export
from coalora.export.gptq import GPTQFormat, layer_tensors
from coalora.models.targets import TargetLayer
from coalora.quant.gptq.scheme import GPTQChoice, GPTQScheme
from coalora.quant.integer.scheme import IntChoice, IntScheme
from coalora.quant.space import ChoiceSpace

LAYER = TargetLayer("model.layers.0.self_attn.q_proj", "self_attn.q_proj", 0, (64, 96), False)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, 32 m / bits) of streams of int32 words (rows, m)."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ 2 ** np.arange(bits)


@pytest.mark.parametrize(("mode", "offset"), [("sym", 1), ("asym", 0)])
def test_what_is_stored_stands_for_the_weights_of_the_scheme_bit_for_bit(
    integer_export: Callable, tmp_path: Path, mode: str, offset: int
) -> None:
    made = integer_export("qwen2", mode)
    write_export(tmp_path, ["gptq"], made.source)
    tensors = load_file(tmp_path / "gptq/base/model.safetensors")
    config = json.loads((tmp_path / "gptq/base/quantize_config.json").read_text())
    model_config = json.loads((tmp_path / "gptq/base/config.json").read_text())
    assert model_config["quantization_config"] == config
    assert (model_config["rope_theta"], model_config["rope_scaling"]) == (500000.0, None)  # for transformers before 5
    assert config["checkpoint_format"] == ("gptq" if offset else "gptq_v2")
    for layer in made.source.tables.layers:
        own = config | config["dynamic"].get(f"+:^{layer.name.replace('.', chr(92) + '.')}$", {})
        qweight, qzeros, scales, g_idx = (
            tensors[f"{layer.name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")
        )
        assert (qweight.dtype, qzeros.dtype, scales.dtype, g_idx.dtype) == (np.int32, np.int32, np.float16, np.int32)
        assert np.array_equal(g_idx, np.arange(layer.shape[1]) // own["group_size"])
        zeros = unpacked(qzeros, own["bits"]) + offset
        weight = (unpacked(qweight.T, own["bits"]).T - zeros[g_idx]) * scales.astype(np.float32)[g_idx]
        assert np.array_equal(weight.T.astype(np.float32), made.weight(layer.name).numpy())
    assert len({own["bits"] for own in [config, *config["dynamic"].values()]}) >= 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scheme_gptq_is_stored_as_the_same_integers_of_scheme_int(bits: int) -> None:
    weight = torch.randn(LAYER.shape, generator=torch.Generator().manual_seed(0))
    for mode, sym in (("asym", 0), ("sym", 1)):
        ours, theirs = IntChoice(bits, 32, mode), GPTQChoice(bits, 32, sym)
        packed = IntScheme().quantize_packed(weight, ours)
        named = {"zeros" if name == "zero_points" else name: tensor for name, tensor in packed.items()}
        GPTQScheme().unpack(named, theirs, LAYER.shape)  # it is a packed layer of the scheme
        first, second = (layer_tensors(LAYER, c, p, zeros=not sym) for c, p in ((ours, packed), (theirs, named)))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_choice_of_all_layers_needs_no_dynamic(integer_export: Callable, tmp_path: Path) -> None:
    write_export(tmp_path / "all", ["gptq"], integer_export("llama", "sym", uniform=4).source)
    config = json.loads((tmp_path / "all/gptq/base/quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert "dynamic" not in config
    write_export(
        tmp_path / "some",
        ["gptq"],
        integer_export("llama", "sym", uniform=4, targets=("self_attn.q_proj", "mlp.down_proj")).source,
    )
    config = json.loads((tmp_path / "some/gptq/base/quantize_config.json").read_text())
    assert config["dynamic"]["-:^model\\.layers\\.0\\.mlp\\.up_proj$"] == {}
    assert len(config["dynamic"]) == 10


def test_what_cannot_be_held_is_told_with_the_layer_and_what_to_train_with() -> None:
    def refused(config: object, space: ChoiceSpace, **change) -> str:
        tables = calibration_tables([replace(LAYER, **change)], space, np.ones((1, len(space))), "")
        with pytest.raises(CoaloraError) as caught:
            GPTQFormat().check(tables, config, "language-modeling")
        return str(caught.value)

    groups = ChoiceSpace("int", group_size=[32])
    assert "architecture phi. Export without it, or train one of llama" in refused(PhiConfig(), groups)
    assert "{group_size: [32]}" in refused(LlamaConfig(), ChoiceSpace("gptq"))
    assert "choices.scheme: int or gptq" in refused(LlamaConfig(), ChoiceSpace("nf", bits=[4]))
    assert "packs 32 codes together" in refused(LlamaConfig(), groups, shape=(60, 96))
    GPTQFormat().check(
        calibration_tables([LAYER], ChoiceSpace("gptq", group_size=[32]), np.ones((1, 8)), ""),
        LlamaConfig(),
        "language-modeling",
    )
