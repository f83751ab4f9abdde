"""Exports in mlx-lm, on its CPU backend."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from coalora.export.formats import write_export

pytestmark = pytest.mark.engines
mlx_lm = pytest.importorskip("mlx_lm", reason="`make test-engines` installs mlx[cpu] and mlx-lm")
mx = pytest.importorskip("mlx.core", reason="`make test-engines` installs mlx[cpu]")

TEXT = pydoc_data.topics.topics["for"][:400]


@pytest.mark.parametrize(
    ("architecture", "mode", "dtype", "tolerance"),
    [
        ("llama", "asym", torch.float32, 1e-5),
        ("llama", "sym", torch.float32, 1e-5),
        ("llama", "asym", torch.bfloat16, 0.02),
        ("llama", "asym", torch.float16, 0.03),
        ("llama", "sym", torch.float16, 0.03),
        ("mistral", "asym", torch.float32, 1e-5),
        ("qwen2", "asym", torch.float32, 1e-5),
        ("qwen3", "asym", torch.float32, 1e-5),
    ],
)
def test_mlx_lm_runs_the_pair_as_the_adapted_model_in_memory(
    integer_export: Callable, tmp_path: Path, architecture: str, mode: str, dtype: torch.dtype, tolerance: float
) -> None:
    made = integer_export(architecture, mode, dtype)
    write_export(tmp_path, ["mlx"], made.source)
    model, tokenizer = mlx_lm.load(str(tmp_path / "mlx/base"), adapter_path=str(tmp_path / "mlx/adapter"))
    modules = dict(model.named_modules())
    for layer in made.source.tables.layers:
        linear = modules[layer.name].linear
        parts = (linear.weight, linear.scales.astype(mx.float32), linear.biases.astype(mx.float32))
        weight = np.array(mx.dequantize(*parts, group_size=linear.group_size, bits=linear.bits))
        assert np.array_equal(weight, made.weight(layer.name).numpy())
    tokens = tokenizer.encode(TEXT)[:120]
    found = torch.from_numpy(np.array(model(mx.array([tokens])).astype(mx.float32)))
    with torch.no_grad():
        wanted = made.adapted.peft_model(input_ids=torch.tensor([tokens])).logits
    difference = torch.log_softmax(found, -1) - torch.log_softmax(wanted, -1)
    assert difference.abs().max() < tolerance


def test_mlx_lm_generates_what_the_adapted_model_generates(integer_export: Callable, tmp_path: Path) -> None:
    made = integer_export("llama", "sym")
    write_export(tmp_path, ["mlx"], made.source)
    model, tokenizer = mlx_lm.load(str(tmp_path / "mlx/base"), adapter_path=str(tmp_path / "mlx/adapter"))
    tokens = tokenizer.encode(TEXT)[:20]
    found = [step.token for step in mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=12)]
    ours = made.adapted.peft_model.generate(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, 20), max_new_tokens=12, do_sample=False
    )
    assert found == ours[0, 20:].tolist()
