"""Weight switching: what is in the model after a switch, and what is not touched by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from coalora.cache import nbytes, share_of_free_memory
from coalora.errors import CoaloraError
from coalora.models.switching.quantized import (
    FULL_PRECISION,
    QuantizedBase,
    check_configuration,
)
from coalora.models.targets import find_target_layers
from coalora.quant.nf.scheme import NFScheme
from coalora.quant.scheme import InputStatistics

FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "bert", "roberta"]


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}


@pytest.fixture
def configuration(small_space) -> np.ndarray:
    return np.random.default_rng(3).integers(len(small_space), size=14)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_switch_equals_fresh_quantization_of_the_original_and_touches_nothing_else(
    tiny_models, small_space, configuration, family: str
) -> None:
    model = tiny_models[family]()
    original = _copy(model)
    layers = find_target_layers(model)
    base = QuantizedBase(model, layers, small_space)
    C = configuration[: len(layers)]
    base.switch((C + 1) % len(small_space))  # a history must not matter
    base.switch(C)
    now = _copy(model)
    targets = {f"{layer.name}.weight": (layer, k) for layer, k in zip(layers, C, strict=True)}
    for name, tensor in now.items():
        if name not in targets:
            assert torch.equal(tensor, original[name]), name
            continue
        layer, k = targets[name]
        choice = small_space.choices[k]
        # An independent way to the weight: through the packed bytes.
        W = layer.matrix(original[name]).contiguous()
        scheme = small_space.scheme
        packed = scheme.pack(scheme.quantize(W, choice), choice, layer.shape)
        expected = scheme.dequantize(scheme.unpack(packed, choice, layer.shape), choice, layer.shape)
        assert torch.equal(layer.matrix(tensor), expected), name
        assert not torch.equal(tensor, original[name]), name
    assert base.configuration.tolist() == C.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_bit_exact(tiny_models, small_space, configuration, family: str) -> None:
    model = tiny_models[family]()
    original = _copy(model)
    layers = find_target_layers(model)
    base = QuantizedBase(model, layers, small_space)
    base.switch(configuration[: len(layers)])
    base.restore()
    assert all(torch.equal(tensor, original[name]) for name, tensor in _copy(model).items())
    assert set(base.configuration.tolist()) == {FULL_PRECISION}


def test_tied_embeddings_stay_tied_and_unchanged(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    QuantizedBase(model, find_target_layers(model), small_space).switch(configuration)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


def test_only_layers_that_change_are_written(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    base = QuantizedBase(model, layers, small_space)
    base.switch(configuration)
    storages = [model.get_submodule(layer.name).weight.data.data_ptr() for layer in layers]
    for layer in layers:  # a mark that any writing removes
        model.get_submodule(layer.name).weight.data[0, 0] = 77.0
    target = configuration.copy()
    target[[2, 9]] = (target[[2, 9]] + 3) % len(small_space)
    base.switch(target)
    marks = [bool(model.get_submodule(layer.name).weight[0, 0] == 77.0) for layer in layers]
    assert [i for i, kept in enumerate(marks) if not kept] == [2, 9]
    after = [model.get_submodule(layer.name).weight.data.data_ptr() for layer in layers]
    assert [i for i, (old, new) in enumerate(zip(storages, after, strict=True)) if old != new and i not in (2, 9)] == []


def test_a_switch_keeps_its_own_copy_of_the_configuration(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama()
    base = QuantizedBase(model, find_target_layers(model), small_space)
    base.switch(configuration)
    expected = _copy(model)
    given = (configuration + 1) % len(small_space)
    base.switch(given)
    given[:] = configuration  # by the caller, for its own ends
    base.switch(configuration)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _copy(model).items())


def test_the_cache_is_used_and_stays_below_its_limit(tiny_llama, small_space, monkeypatch) -> None:
    model = tiny_llama()
    layers = find_target_layers(model)
    N, scheme = len(layers), small_space.scheme
    size = [sum(scheme.packed_nbytes(choice, layer.shape) for layer in layers) for choice in small_space.choices]
    limit = max(size[k] + size[k + 1] for k in range(len(size) - 1))
    base = QuantizedBase(model, layers, small_space, cache_bytes=limit)
    calls = []
    quantize = scheme.quantize_packed
    monkeypatch.setattr(type(scheme), "quantize_packed", lambda self, *given: calls.append(1) or quantize(*given))
    for k in (0, 1, 0, 1):
        base.switch(np.full(N, k))
    assert len(calls) == 2 * N
    for k in range(len(small_space)):
        base.switch(np.full(N, k))
        cached = [tensor for packed in base.cache.values() for tensor in packed.values()]
        assert nbytes(cached) == base.cache.nbytes <= limit
    kept = {k for _, k in base.cache}
    assert {6, 7} <= kept  # the two used last
    for k in (6, 2):  # a hit counts as use
        base.switch(np.full(N, k))
    assert {6, 2} <= {k for _, k in base.cache}
    assert all((index, 6) in base.cache for index in range(N))


@pytest.mark.parametrize("cache_bytes", [0, 5_000, 1 << 28])
def test_the_cache_does_not_change_the_weights(tiny_llama, small_space, random_configurations, tables_for, cache_bytes):
    model, plain = tiny_llama(), tiny_llama()
    sequence = random_configurations(tables_for(model), 5)
    base = QuantizedBase(model, find_target_layers(model), small_space, cache_bytes=cache_bytes)
    for C in [*sequence, sequence[0]]:
        base.switch(C)
    QuantizedBase(plain, find_target_layers(plain), small_space).switch(sequence[0])
    expected = _copy(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _copy(model).items())
    assert base.cache.nbytes + base._slots.parked.nbytes <= cache_bytes


def test_on_a_cpu_a_switch_back_writes_nothing(tiny_llama, small_space, configuration, monkeypatch) -> None:
    model = tiny_llama()
    base = QuantizedBase(model, find_target_layers(model), small_space)
    base.switch(configuration)
    expected = _copy(model)
    base.switch((configuration + 1) % len(small_space))
    base.restore()
    monkeypatch.setattr(type(small_space.scheme), "dequantize_packed", None)  # would fail if it were called
    base.switch(configuration)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _copy(model).items())


def test_weights_that_an_evaluation_has_parked_serve_training(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama()
    base = QuantizedBase(model, find_target_layers(model), small_space)
    with torch.inference_mode():
        for step in (0, 1, 0):
            base.switch((configuration + step) % len(small_space))
    ids = torch.arange(8)[None]
    model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_(), labels=ids).loss.backward()


def test_a_switch_that_fails_leaves_no_layer_that_is_taken_for_whole(
    tiny_llama, small_space, configuration, monkeypatch
) -> None:
    model = tiny_llama()
    base = QuantizedBase(model, find_target_layers(model), small_space)
    base.switch(configuration)
    expected = _copy(model)
    with monkeypatch.context() as patched:
        patched.setattr(type(small_space.scheme), "dequantize_packed", _fails)
        with pytest.raises(MemoryError):
            base.switch((configuration + 1) % len(small_space))
    base.switch(configuration)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _copy(model).items())


def _fails(self, packed, choice, shape, out) -> None:
    out.fill_(7.0)
    raise MemoryError("no memory")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("before", [True, False], ids=["base made before PEFT", "base made after PEFT"])
def test_switching_goes_on_under_peft(tiny_models, small_space, configuration, family: str, before: bool) -> None:
    model, plain = tiny_models[family](), tiny_models[family]()
    layers = find_target_layers(model)
    C = configuration[: len(layers)]
    base = QuantizedBase(model, layers, small_space) if before else None
    kinds = [layer.kind for layer in layers]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=kinds, fan_in_fan_out=layers[0].transposed))
    base = base or QuantizedBase(model, layers, small_space)
    base.switch(C)
    QuantizedBase(plain, layers, small_space).switch(C)
    ids = torch.arange(12).view(2, 6) + 5
    # lora_B starts at zero: the adapted model is the quantized base.
    with torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_bfloat16_base_keeps_its_dtype(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama().to(torch.bfloat16)
    layers = find_target_layers(model)
    base = QuantizedBase(model, layers, small_space)
    base.switch(configuration)
    weight = model.get_submodule(layers[0].name).weight
    expected = small_space.scheme.fake_quantize(base.masters[0], small_space.choices[configuration[0]])
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (np.zeros(3, dtype=np.int64), r"shape \(3,\).*does not fit 2 target layers"),
        (np.zeros((2, 1), dtype=np.int64), r"shape \(2, 1\)"),
        (np.zeros(2), "dtype float64"),
        (np.array([True, False]), "dtype bool"),
        (np.array([0, 4]), "choices 0 to 4 are not all in .* from 0 to 3"),
        (np.array([-1, 2]), "choices -1 to 2 are not all"),
    ],
)
def test_a_wrong_configuration_is_refused(configuration, message: str) -> None:
    with pytest.raises(CoaloraError, match=message):
        check_configuration(configuration, 2, 4)


def test_a_refused_configuration_leaves_the_model_alone(tiny_llama, small_space, configuration) -> None:
    model = tiny_llama()
    base = QuantizedBase(model, find_target_layers(model), small_space)
    base.switch(configuration)
    before = _copy(model)
    wrong = configuration.copy()
    wrong[-1] = len(small_space)
    with pytest.raises(CoaloraError):
        base.switch(wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _copy(model).items())
    assert base.configuration.tolist() == configuration.tolist()


class CalibratedScheme(NFScheme):
    """nf under another flag: counts how often it quantizes, and with which statistics."""

    needs_statistics = True

    def __init__(self) -> None:
        self.seen: list[InputStatistics | None] = []

    def quantize(self, weight, choice, statistics=None):
        self.seen.append(statistics)
        return super().quantize(weight, choice, statistics)


@pytest.mark.parametrize(("master", "weights"), [("device", "dequantized"), ("cpu", "dequantized"), ("cpu", "packed")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_precision_for_a_while_computes_with_the_masters_and_keeps_what_was_held(
    tiny_models, small_space, configuration, master, weights, family
) -> None:
    model = tiny_models[family]()
    layers = find_target_layers(model)
    C, ids = configuration[: len(layers)], torch.arange(8)[None]
    original = model(ids).logits
    base = QuantizedBase(model, layers, small_space, master=master, weights=weights)
    base.switch(C)
    quantized = model(ids).logits
    with base.in_full_precision():
        assert torch.equal(model(ids).logits, original)
    held = base.masters_serve
    assert held == (weights == "packed" or (master == "device" and family != "gpt2"))
    assert (base.configuration == (C if held else FULL_PRECISION)).all()
    base.switch(C)
    assert torch.equal(model(ids).logits, quantized)


def test_by_default_the_cache_takes_a_share_of_the_memory_that_is_free(tiny_llama, small_space, monkeypatch) -> None:
    gib, found = 1 << 30, []
    for kilobytes in (4 << 20, 100 << 20, None):
        text = "" if kilobytes is None else f"MemTotal: 1 kB\nMemAvailable:   {kilobytes} kB\n"
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        model = tiny_llama()
        found.append(QuantizedBase(model, find_target_layers(model), small_space).cache.limit)
    assert found == [gib // 2, 2 * gib, gib // 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 24 * gib))
    assert share_of_free_memory(torch.device("cuda")) == 5 * gib
