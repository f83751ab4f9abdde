"""Where the full-precision weights live: the same numbers everywhere, and no copy where none is promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coalora.cache import nbytes
from coalora.errors import CoaloraError
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers


def save(model: torch.nn.Module, folder: Path, prefix: str = "") -> Path:
    state = {prefix + k: v.clone() for k, v in model.state_dict().items() if "lm_head" not in k}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["dequantized", "packed"])
@pytest.mark.parametrize("master", ["cpu", "mmap"])
def test_switching_and_restoring_do_not_depend_on_where_the_masters_are(
    tiny_models, small_space, tmp_path, family: str, weights: str, master: str
) -> None:
    reference, model = tiny_models[family](), tiny_models[family]()
    layers = find_target_layers(model)
    expected = QuantizedBase(reference, layers, small_space)
    base = QuantizedBase(
        model, layers, small_space, master=master, weights=weights, checkpoint=save(model, tmp_path), cache_bytes=0
    )
    C = np.random.default_rng(0).integers(len(small_space), size=len(layers))
    for step in (lambda b: b.switch(C), lambda b: b.restore()):
        for b in (expected, base):
            step(b)
        for index in range(len(layers)):
            assert torch.equal(base.weight(index), expected.weight(index))


def test_mapped_masters_lie_in_the_file_and_nowhere_else(tiny_llama, small_space, tmp_path) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    base = QuantizedBase(model, layers, small_space, master="mmap", checkpoint=save(model, tmp_path))
    assert base.masters.held() == []
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    ]
    for stored in base.masters._stored:
        assert any(start <= stored.data_ptr() < stop for start, stop in mapped)


def test_masters_on_the_cpu_of_a_packed_model_are_its_own_weights_without_a_copy(tiny_llama, small_space) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    pointers = [model.get_submodule(layer.name).weight.data_ptr() for layer in layers]
    base = QuantizedBase(model, layers, small_space, master="cpu", weights="packed")
    assert [tensor.data_ptr() for tensor in base.masters.held()] == pointers
    assert nbytes(base.held()) == sum(layer.n_weights * 4 for layer in layers)


def test_a_checkpoint_of_the_body_alone_in_another_dtype_serves(tiny_llama, small_space, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    layers = find_target_layers(model)
    path = save(model, tmp_path)
    state = {k.removeprefix("model."): v.float() for k, v in load_file(path / "model.safetensors").items()}
    save_file(state, path / "model.safetensors")
    base = QuantizedBase(model, layers, small_space, master="mmap", checkpoint=path / "model.safetensors")
    assert base.masters[3].dtype == torch.bfloat16
    assert torch.equal(base.masters[3], model.get_submodule(layers[3].name).weight)


def test_a_checkpoint_that_is_not_the_models_is_refused(tiny_llama, small_space, tmp_path) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    for checkpoint, message in (
        (None, "no checkpoint"),
        (tmp_path / "nowhere", "missing"),
        (save(tiny_llama(seed=9), tmp_path), "has other numbers"),
    ):
        with pytest.raises(CoaloraError, match=message):
            QuantizedBase(model, layers, small_space, master="mmap", checkpoint=checkpoint)


def test_unknown_modes_are_refused(tiny_llama, small_space) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    with pytest.raises(CoaloraError, match="device or cpu or mmap"):
        QuantizedBase(model, layers, small_space, master="disk")  # type: ignore[arg-type]
    with pytest.raises(CoaloraError, match="dequantized or packed"):
        QuantizedBase(model, layers, small_space, weights="zipped")  # type: ignore[arg-type]
