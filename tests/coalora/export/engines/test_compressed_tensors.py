"""Exports in transformers with compressed-tensors."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from coalora.export.formats import write_export

pytestmark = pytest.mark.engines
pytest.importorskip("compressed_tensors", reason="`make test-engines` installs compressed-tensors")

TEXT = pydoc_data.topics.topics["for"][:400]


def opened(folder: Path) -> PeftModel:
    """What `start_line` says."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base(torch.zeros(1, 1, dtype=torch.long))
    return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        ("llama", torch.float32, 1e-5),
        ("llama", torch.bfloat16, 1e-5),  # computed in float32, where scales are exact
        ("llama", torch.float16, 0.01),  # computed in float16
        ("mistral", torch.float32, 1e-5),
        ("qwen2", torch.float32, 1e-5),
        ("qwen3", torch.float32, 1e-5),
    ],
)
@torch.no_grad()
def test_transformers_and_peft_run_the_pair_as_the_adapted_model_in_memory(
    integer_export: Callable, tmp_path: Path, architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    made = integer_export(architecture, "sym", dtype)
    write_export(tmp_path, ["compressed-tensors"], made.source)
    folder = tmp_path / "compressed-tensors"
    model, tokenizer = opened(folder), AutoTokenizer.from_pretrained(folder / "base")
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[:, :120]
    wanted, found = (
        torch.log_softmax(m(input_ids=tokens).logits.float(), -1) for m in (made.adapted.peft_model, model)
    )
    assert (found - wanted).abs().max() < tolerance
    base = model.get_base_model()
    for layer in made.source.tables.layers:
        weight = base.get_submodule(layer.name).base_layer.weight
        assert torch.equal(weight, made.weight(layer.name).to(weight.dtype))
    if weight.dtype == torch.float32:
        prompt = {"input_ids": tokens[:, :20], "attention_mask": torch.ones(1, 20), "max_new_tokens": 12}
        ours = made.adapted.peft_model.generate(**prompt, do_sample=False)
        assert torch.equal(model.generate(**prompt, do_sample=False), ours)


def test_compressed_tensors_accepts_the_config_and_unpacks_the_weights_bit_for_bit(
    integer_export: Callable, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    made = integer_export("llama", "sym")
    write_export(tmp_path, ["compressed-tensors"], made.source)
    base = tmp_path / "compressed-tensors/base"
    written = json.loads((base / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    assert config.quantization_status == "compressed"
    tensors = load_file(base / "model.safetensors")
    reader = BaseCompressor.get_value_from_registry(config.format)
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.weight_")}
            assert parts.keys() == set(reader.compression_param_names(scheme))
            parts["weight_scale"] = parts["weight_scale"].float()
            assert torch.equal(reader.decompress(parts, scheme)["weight"], made.weight(name))
