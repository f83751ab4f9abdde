"""Packed bases: the bytes that were reported, and the weights that were evaluated, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from coalora.calibrate.tables import calibration_tables, counted
from coalora.errors import CoaloraError
from coalora.export.adapter import adapter_nbytes
from coalora.export.base import load_adapted, load_base, write_base
from coalora.files import file_digests, folder_nbytes, read_tensors, write_tensors
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.train.pretrain import train_tokenizer

IDS = torch.arange(2 * 7).view(2, 7)
CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "bert", "roberta"]


def task_of(family: str) -> str:
    return "classification" if family in ("bert", "roberta") else "language-modeling"


def mixed(tables) -> np.ndarray:
    return np.arange(len(tables.layers)) % len(tables.space)


def rebind(folder) -> None:
    """Write the digests of the files that are there, as a tampered folder's author would."""
    path = folder / "configuration.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"files": file_digests(folder, content["files"])}))


def header_bytes(path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.fixture
def llama_base(tiny_llama, tables_for, tmp_path):
    model = tiny_llama()
    tables = tables_for(model)
    write_base(tmp_path / "base", model, tables, mixed(tables), task="language-modeling")
    return tmp_path / "base"


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_base_is_the_switched_model_bit_for_bit(tiny_models, tables_for, tmp_path, family) -> None:
    """Sizes 36 and 52 that no block size divides, biases, Conv1D, tied embeddings and buffers among them."""
    model = tiny_models[family]()
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task=task_of(family))
    QuantizedBase(model, tables.layers, tables.space).switch(mixed(tables))
    loaded = load_base(tmp_path, device=CPU)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, state[k]) or v.dtype != state[k].dtype] == []
    for one in (loaded, model):  # transformers 4 takes another path of attention with a cache
        one.config.use_cache = False
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_reported_bits_are_the_bytes_on_disk(tiny_models, tables_for, tmp_path, family) -> None:
    model = tiny_models[family]()
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task=task_of(family))
    path = tmp_path / "quantized.safetensors"
    stored = path.stat().st_size - header_bytes(path)
    assert stored == tables.total_nbytes(mixed(tables))
    assert sum(t.nbytes for t in load_file(path).values()) == stored
    reported = json.loads((tmp_path / "configuration.json").read_text())["average_bits"]
    n_weights = sum(model.get_submodule(layer.name).weight.numel() for layer in tables.layers)
    assert reported == pytest.approx(8 * stored / n_weights, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_file_bytes_are_the_files_of_base_and_adapter(tiny_models, make_bundle, tmp_path, family, dtype) -> None:
    """Never less, and more by no more than what headers and JSON are counted too long."""
    bundle, adapted = make_bundle(tiny_models[family])
    model, made = tiny_models[family](), bundle.adapt_to(mixed(bundle.tables))
    tokenizer = train_tokenizer(["a text of few words"], 300)
    tables = counted(bundle.tables, model, torch.float16, tokenizer)
    size = adapter_nbytes(tables.layers, bundle.ranks, tables.head_size, dtype)
    write_base(tmp_path / "base", model, tables, made.choices, task=task_of(family), rest_dtype=torch.float16)
    tokenizer.save_pretrained(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter", dtype=dtype)
    stored, tensors = folder_nbytes(tmp_path), sum(len(load_file(f)) for f in tmp_path.rglob("*.safetensors"))
    assert stored <= 1e6 * tables.of_files(size).costs(made.choices) <= stored + 64 * tensors
    assert folder_nbytes(tmp_path / "adapter") <= size
    assert tables.head_size == sum(p.numel() for name, p in adapted.named_parameters().items() if name[:4] == "head")
    tables, from_shapes = (counted(bundle.tables, m, None) for m in (model, _meta(model)))
    assert (from_shapes.rest_nbytes, from_shapes.head_size) == (tables.rest_nbytes, tables.head_size)


def _meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def test_reported_bits_agree_with_the_nominal_rule_within_a_percent_in_layers_of_real_size(tmp_path) -> None:
    """And the bytes of the whole file, its header included, do in a layer as large as those of real models."""
    space = ChoiceSpace("nf", bits=[3], scale_bits=[8], scale_dtype=["fp32"], block_size=[64], scale_block_size=[256])
    shape = (1024, 1030)
    nbytes = space.packed_nbytes_table([shape])[0, 0]
    assert 8 * nbytes / (1024 * 1030) == pytest.approx(float(space.nominal_bits[0]), rel=0.01)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    choice = space.choices[0]
    write_tensors(tmp_path / "one.safetensors", space.scheme.pack(space.scheme.quantize(weight, choice), choice, shape))
    assert (tmp_path / "one.safetensors").stat().st_size == pytest.approx(nbytes, rel=0.01)


@pytest.mark.parametrize("k", [0, 107, 215, 431])
def test_full_nf_space_round_trips(tiny_gpt2, tables_for, tmp_path, k) -> None:
    model, space = tiny_gpt2(), ChoiceSpace("nf")
    layers = find_target_layers(model)
    tables = calibration_tables(layers, space, np.ones((8, 432)), "1" * 64)
    write_base(tmp_path, model, tables, np.full(8, k), task="language-modeling")
    path = tmp_path / "quantized.safetensors"
    assert path.stat().st_size - header_bytes(path) == tables.total_nbytes(np.full(8, k))
    QuantizedBase(model, layers, space).switch(np.full(8, k))
    assert torch.equal(load_base(tmp_path, device=CPU)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_untied(tiny_llama, tables_for, tmp_path, tied) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task="language-modeling")
    assert ("lm_head.weight" in load_file(tmp_path / "rest.safetensors")) is not tied
    loaded = load_base(tmp_path, device=CPU)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_no_target_weight_is_stored_in_full_precision(llama_base, tiny_llama) -> None:
    rest = load_file(llama_base / "rest.safetensors")
    names = {f"{layer.name}.weight" for layer in find_target_layers(tiny_llama())}
    assert not names & rest.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= rest.keys()


def test_the_rest_is_stored_in_16_bit_exactly_where_that_loses_nothing(tiny_qwen2, tables_for, tmp_path) -> None:
    model = tiny_qwen2().to(torch.bfloat16).float()
    tables = tables_for(model)
    fine = model.get_submodule("model.layers.1.self_attn.q_proj").bias
    fine[3] = 1 + 2**-20
    write_base(tmp_path, model, tables, mixed(tables), task="language-modeling", rest_dtype=torch.bfloat16)
    rest = load_file(tmp_path / "rest.safetensors")
    wide = [name for name, tensor in rest.items() if tensor.dtype != torch.bfloat16]
    assert wide == ["model.layers.1.self_attn.q_proj.bias"]
    assert rest[wide[0]].dtype == torch.float32
    state = load_base(tmp_path, device=CPU).state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items() if k in rest)


def test_a_larger_type_for_the_rest_is_not_taken(tiny_llama, tables_for, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task="language-modeling", rest_dtype=torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "rest.safetensors").values()} == {torch.bfloat16}


def test_a_bfloat16_model_round_trips_bit_for_bit(tiny_gpt2, tables_for, tmp_path) -> None:
    model = tiny_gpt2().to(torch.bfloat16)
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task="language-modeling")
    QuantizedBase(model, tables.layers, tables.space).switch(mixed(tables))
    state = load_base(tmp_path, device=CPU, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_loaded_base_knows_its_digest(llama_base) -> None:
    content = json.loads((llama_base / "configuration.json").read_text())
    assert load_base(llama_base, device=CPU).coalora_digest == content["digest"]


def test_base_with_its_adapter_equals_the_model_in_memory(tiny_models, make_bundle, tmp_path) -> None:
    for family in ("llama", "bert", "gpt2"):
        bundle, adapted = make_bundle(tiny_models[family])
        configuration, folder = mixed(bundle.tables), tmp_path / family
        bundle.write(bundle.adapt_to(configuration), folder)
        write_base(folder / "base", tiny_models[family](), bundle.tables, configuration, task=bundle.task)
        adapted.switch(configuration)
        logits = load_adapted(folder / "base", folder / "adapter", device=CPU)(IDS).logits
        torch.testing.assert_close(logits, adapted.peft_model.eval()(IDS).logits, rtol=1e-5, atol=1e-5)


def test_adapter_of_another_configuration_is_refused_with_both_digests(tiny_llama, make_bundle, llama_base, tmp_path):
    bundle, _ = make_bundle(tiny_llama)
    made = bundle.adapt_to(np.zeros(14, dtype=np.int64))
    bundle.write(made, tmp_path / "other")
    with pytest.raises(CoaloraError) as error:
        load_adapted(llama_base, tmp_path / "other" / "adapter", device=CPU)
    assert made.digest in str(error.value)
    assert json.loads((llama_base / "configuration.json").read_text())["digest"] in str(error.value)


def test_the_same_configuration_of_another_model_has_another_digest(tiny_llama, tables_for, tmp_path) -> None:
    digests = set()
    for seed, base_digest in ((0, "a" * 64), (1, "b" * 64)):
        model = tiny_llama(seed)
        tables = tables_for(model, base_digest=base_digest)
        write_base(tmp_path / str(seed), model, tables, mixed(tables), task="language-modeling")
        digests.add(load_base(tmp_path / str(seed), device=CPU).coalora_digest)
    assert len(digests) == 2


@pytest.mark.parametrize("key", ["base_digest", "layers", "digest"])
def test_a_tampered_configuration_is_refused(llama_base, key) -> None:
    path = llama_base / "configuration.json"
    content = json.loads(path.read_text())
    digest = content["digest"]
    if key == "layers":
        content["layers"]["model.layers.0.mlp.up_proj"]["bits"] = 8
    else:
        content[key] = "f" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(CoaloraError, match="names the digest") as error:
        load_base(llama_base, device=CPU)
    assert (digest if key != "digest" else "f" * 64) in str(error.value)


def test_packed_tensors_of_another_configuration_are_refused(tiny_llama, tables_for, llama_base, tmp_path) -> None:
    model = tiny_llama()
    write_base(tmp_path / "other", model, tables_for(model), np.full(14, 7), task="language-modeling")
    (tmp_path / "other" / "quantized.safetensors").rename(llama_base / "quantized.safetensors")
    with pytest.raises(CoaloraError, match=r"quantized\.safetensors of .* has sha256 .* was exported"):
        load_base(llama_base, device=CPU)
    rebind(llama_base)
    with pytest.raises(CoaloraError, match="is not that of a weight of shape"):
        load_base(llama_base, device=CPU)


@pytest.mark.parametrize("file", ["quantized.safetensors", "rest.safetensors", "configuration.json", "config.json"])
def test_an_incomplete_folder_is_refused(llama_base, file) -> None:
    (llama_base / file).unlink()
    with pytest.raises(CoaloraError, match=f"no {file}"):
        load_base(llama_base, device=CPU)
    with pytest.raises(CoaloraError, match=f"no {file}"):
        load_adapted(llama_base, llama_base)


@pytest.mark.parametrize("file", ["quantized", "rest"])
def test_a_missing_tensor_is_refused_instead_of_made_up(llama_base, file) -> None:
    path = llama_base / f"{file}.safetensors"
    tensors, header = read_tensors(path)
    gone = "model.layers.0.mlp.up_proj.codes" if file == "quantized" else "model.norm.weight"
    del tensors[gone]
    write_tensors(path, tensors, header)
    rebind(llama_base)
    words = "is not that of a weight of shape" if file == "quantized" else r"model\.norm\.weight"
    with pytest.raises(CoaloraError, match=words):
        load_base(llama_base, device=CPU)


@pytest.mark.parametrize("name", ["no.such.layer.codes", "model.layers.0.mlp.up_proj.more"])
def test_a_surplus_packed_tensor_is_refused(llama_base, name) -> None:
    path = llama_base / "quantized.safetensors"
    tensors, header = read_tensors(path)
    write_tensors(path, tensors | {name: torch.zeros(3)}, header)
    rebind(llama_base)
    with pytest.raises(CoaloraError, match=r"no\.such\.layer\.codes|more: "):
        load_base(llama_base, device=CPU)


@pytest.mark.parametrize("file", ["quantized", "rest"])
def test_a_byte_that_was_changed_is_refused(llama_base, file) -> None:
    path = llama_base / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CoaloraError, match=rf"{file}\.safetensors of .* has sha256"):
        load_base(llama_base, device=CPU)


def test_a_base_without_digests_of_its_files_is_refused(llama_base) -> None:
    path = llama_base / "configuration.json"
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps(content))
    with pytest.raises(CoaloraError, match="carries no sha256"):
        load_base(llama_base, device=CPU)


@pytest.mark.parametrize("change", ["half", "more"])
def test_an_adapter_with_missing_or_surplus_tensors_is_refused(
    tiny_bert_classifier, make_bundle, tmp_path, change
) -> None:
    bundle, _ = make_bundle(tiny_bert_classifier)
    adapted = bundle.adapt_to(mixed(bundle.tables))
    write_base(tmp_path / "base", tiny_bert_classifier(), bundle.tables, mixed(bundle.tables), task=bundle.task)
    tensors = dict(list(adapted.tensors.items())[::2]) if change == "half" else dict(adapted.tensors)
    tensors |= {"base_model.model.more.weight": torch.zeros(2)} if change == "more" else {}
    replace(adapted, tensors=tensors).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CoaloraError, match=r"are missing or unknown|a tensor is missing"):
        load_adapted(tmp_path / "base", tmp_path / "adapter", device=CPU)


def test_a_model_that_peft_has_wrapped_is_refused(tiny_llama, tables_for, make_adapted, tmp_path) -> None:
    model = tiny_llama()
    tables = tables_for(model)
    make_adapted(model)
    with pytest.raises(CoaloraError, match="or PEFT wraps it"):
        write_base(tmp_path / "base", model, tables, mixed(tables), task="language-modeling")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("configuration", [np.zeros(13, dtype=np.int64), np.full(14, 8), np.full(14, -1)])
def test_a_wrong_configuration_is_refused_before_anything_is_written(
    tiny_llama, tables_for, tmp_path, configuration
) -> None:
    model = tiny_llama()
    with pytest.raises(CoaloraError, match="configuration"):
        write_base(tmp_path / "base", model, tables_for(model), configuration, task="language-modeling")
    assert not (tmp_path / "base").exists()


def test_writing_leaves_the_model_as_it_was(tiny_gpt2, tables_for, tmp_path) -> None:
    model = tiny_gpt2()
    tables = tables_for(model)
    write_base(tmp_path, model, tables, mixed(tables), task="language-modeling")
    fresh = tiny_gpt2().state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())
