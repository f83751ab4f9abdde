"""GGUF files read back by the package gguf and by transformers; `engines/test_gguf.py` runs them in llama.cpp."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from coalora import Bundle, CoaLoraConfig, CoaLoraModel, InitialSetRecipe
from coalora.calibrate.tables import calibration_tables
from coalora.errors import CoaloraError
from coalora.export.adapter import peft_key
from coalora.export.device import export_for
from coalora.export.formats import EXPORT_FORMATS, ExportSource, write_export
from coalora.export.gguf import _add_tokenizer, _rope_factors
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from tests.coalora.export.gguf_exports import (
    SPACE,
    TEXTS,
    VOCAB,
    Made,
    decoder,
    export,
    sentencepiece_tokenizer,
    tokenizer_of,
)

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return export(tmp_path_factory.mktemp("llama"), decoder("llama"), tokenizer_of("smollm"))


def reader(made: Made, file: str = "model.gguf") -> gguf.GGUFReader:
    return gguf.GGUFReader(made.folder / file)


def value(content: gguf.GGUFReader, key: str) -> object:
    return content.fields[key].contents()


def test_target_layers_are_the_bytes_of_the_packed_weights_by_rows(llama: Made) -> None:
    tensors = {tensor.name: tensor for tensor in reader(llama).tensors}
    for name, layer in (("blk.0.attn_v", "v_proj"), ("blk.0.attn_q", "q_proj")):
        index = next(i for i, of in enumerate(llama.tables.layers) if of.name.endswith(f"layers.0.self_attn.{layer}"))
        choice = SPACE.choices[llama.configuration[index]]
        weight = llama.base.get_submodule(llama.tables.layers[index].name).weight
        (packed,) = SPACE.scheme_of(llama.configuration[index]).quantize_packed(weight, choice).values()
        found = tensors[f"{name}.weight"]
        assert found.tensor_type.name == str(choice)
        if layer == "q_proj":  # llama.cpp's order: of every head, the two halves in turn
            packed = packed.view(4, 2, 32, -1).transpose(1, 2).reshape(len(packed), -1)
        assert np.array_equal(found.data, packed.numpy())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_weights_that_were_trained_with(kind: str, tmp_path: Path) -> None:
    heads = {"head_dim": 128} if kind == "qwen3" else {}  # transformers takes no other size from a file
    made = export(tmp_path, decoder(kind, **heads), tokenizer_of("qwen2"))
    read = AutoModelForCausalLM.from_pretrained(
        made.folder,
        gguf_file="model.gguf",
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    for layer, k in zip(made.tables.layers, made.configuration, strict=True):
        weight = made.base.get_submodule(layer.name).weight
        ours = SPACE.scheme_of(k).fake_quantize(weight, SPACE.choices[k])
        assert torch.equal(read[f"{layer.name}.weight"], ours), layer.name
    targets = {f"{layer.name}.weight" for layer in made.tables.layers}
    for name, tensor in made.base.state_dict().items():
        if name not in targets:
            assert torch.equal(read[name], tensor), name


def test_the_adapter_is_folded_to_one_alpha_and_its_rows_are_reordered(llama: Made) -> None:
    content = reader(llama, "adapter.gguf")
    assert (value(content, "general.type"), value(content, "adapter.type")) == ("adapter", "lora")
    assert value(content, "general.architecture") == "llama"
    alpha = value(content, "adapter.lora.alpha")
    tensors = {tensor.name: tensor.data for tensor in content.tensors}
    assert len(tensors) == 2 * len(llama.tables.layers)
    ranks = set()
    for name, module, heads in (("attn_q", "self_attn.q_proj", 4), ("ffn_down", "mlp.down_proj", 0)):
        A, B = tensors[f"blk.1.{name}.weight.lora_a"], tensors[f"blk.1.{name}.weight.lora_b"]
        ranks.add(len(A))
        key = peft_key(f"model.layers.1.{module}.lora_%s.weight")
        ours_A, ours_B = (llama.adapter.tensors[key % side] for side in "AB")
        product = ours_B @ ours_A * 2.0  # lora_alpha 8 of r 4, for all ranks
        if heads:
            product = product.view(heads, 2, 32, -1).transpose(1, 2).reshape(product.shape)
        assert torch.allclose(torch.from_numpy(B @ A) * (alpha / len(A)), product, atol=1e-6)
    assert ranks == {8, 2}


def test_what_is_16_bits_stays_so_and_norms_are_wide(tmp_path: Path) -> None:
    base = decoder("qwen2")
    for name, parameter in base.named_parameters():
        parameter.copy_(parameter.to(torch.bfloat16 if "embed" in name else torch.float16).float())
    content = reader(export(tmp_path, base, tokenizer_of("qwen2"), adapter_dtype=torch.bfloat16))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in content.tensors}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    assert "output.weight" not in kinds  # tied
    read = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "gguf/adapter.gguf").tensors}
    assert set(read.values()) == {"BF16"}


def test_hyperparameters_and_provenance(llama: Made) -> None:
    content = reader(llama)
    expected = {
        "general.name": "base",
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCAB,
        "coalora.digest": llama.adapter.digest,
        "coalora.base_digest": "digest of the base",
    }
    assert {key: value(content, key) for key in expected} == expected
    assert value(reader(llama, "adapter.gguf"), "coalora.digest") == llama.adapter.digest
    assert value(content, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(llama.base.config.rms_norm_eps)


def test_the_tokenizer_is_whole(llama: Made) -> None:
    content, tokenizer = reader(llama), llama.tokenizer
    tokens = value(content, "tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = [gguf.TokenType(kind).name for kind in value(content, "tokenizer.ggml.token_type")]
    assert kinds[:2] == ["CONTROL", "CONTROL"]
    assert kinds[tokenizer.convert_tokens_to_ids("<tool>")] == "USER_DEFINED"
    assert set(kinds[len(tokenizer) :]) == {"UNUSED"}
    assert len(tokens) == VOCAB
    assert value(content, "tokenizer.ggml.pre") == "smollm"
    assert (value(content, "tokenizer.ggml.bos_token_id"), value(content, "tokenizer.ggml.eos_token_id")) == (1, 0)
    assert value(content, "tokenizer.ggml.add_bos_token") is False
    assert value(content, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize(
    ("kind", "pre", "bos"),
    [("gpt2", "gpt-2", False), ("llama3", "llama-bpe", True), ("qwen2", "qwen2", False), ("tekken", "tekken", False)],
)
def test_how_text_is_split_is_found_by_structure(kind: str, pre: str, bos: bool) -> None:
    found = tokenizer_fields(tokenizer_of(kind))
    assert (found["tokenizer.ggml.pre"], found["tokenizer.ggml.add_bos_token"]) == (pre, bos)


def test_pieces_of_sentencepiece_have_scores_in_the_order_of_merges() -> None:
    tokenizer = sentencepiece_tokenizer()
    found = tokenizer_fields(tokenizer)
    assert found["tokenizer.ggml.model"] == "llama"
    score = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert score["in"] > score["th"] > score["▁the"] > score["x"]
    assert found["tokenizer.ggml.add_bos_token"]
    assert found["tokenizer.ggml.add_space_prefix"]


def tokenizer_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    writer = gguf.GGUFWriter(None, "llama")
    _add_tokenizer(writer, tokenizer, VOCAB)
    return {key: field.value for key, field in writer.kv_data[0].items()}


def odd_tokenizer(**changes: object) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **changes.pop("model", {})))
    core.pre_tokenizer = changes.pop("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    for name, part in changes.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (odd_tokenizer(pre_tokenizer=pre_tokenizers.Whitespace()), "it splits text by Whitespace"),
        (odd_tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "it splits text by ByteLevel"),
        (odd_tokenizer(model={"ignore_merges": True}), "it splits text by bytes"),
        (odd_tokenizer(normalizer=normalizers.Lowercase()), "it normalizes text by Lowercase"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), "of type WordLevel"),
    ],
    ids=["words", "space", "whole words", "lower case", "no BPE"],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tokenizer: PreTrainedTokenizerFast, reason: str) -> None:
    with pytest.raises(CoaloraError, match=reason):
        tokenizer_fields(tokenizer)


def test_merges_that_sentencepiece_would_add_are_refused() -> None:
    content = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    content["model"]["merges"].remove(["▁", "th"])
    content["model"]["merges"].append(["▁t", "h"])
    content["model"]["vocab"]["▁t"] = len(content["model"]["vocab"])
    with pytest.raises(CoaloraError, match="never joins"):
        tokenizer_fields(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content))))


def test_frequencies_of_llama_3_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(head_dim=64, hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / torch.from_numpy(_rope_factors(config)), LlamaRotaryEmbedding(config).inv_freq)


def test_choices_and_architectures_without_a_place_are_refused_before_anything_is_written(
    llama: Made, tmp_path: Path
) -> None:
    layers, GGUF = find_target_layers(llama.base), EXPORT_FORMATS["gguf"]()
    other = ChoiceSpace.union([ChoiceSpace("int", bits=[4], group_size=[64]), ChoiceSpace("gguf", type=["Q4_K"])])
    tables = calibration_tables(layers, other, np.zeros((len(layers), len(other))), "")
    with pytest.raises(CoaloraError, match=r"q_proj in int4 g64 sym cannot be written in GGUF.*choices.scheme: gguf"):
        GGUF.check(tables, llama.base.config, "language-modeling")
    fits = np.full(len(layers), len(other) - 1)
    GGUF.check(tables.fixed(fits), llama.base.config, "language-modeling")
    for config, task, reason in (
        (BertConfig(), "language-modeling", "type bert"),
        (llama.base.config, "classification", "a head that llama.cpp does not run"),
        (LlamaConfig(hidden_act="gelu"), "language-modeling", "hidden_act 'gelu'"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "language-modeling",
            "rope_type 'dynamic'",
        ),
    ):
        with pytest.raises(CoaloraError, match=reason):
            GGUF.check(llama.tables, config, task)
    source = ExportSource(
        llama.adapter,
        llama.tables,
        "language-modeling",
        llama.base.config,
        load_model=lambda: llama.base,
        load_tokenizer=lambda: odd_tokenizer(pre_tokenizer=pre_tokenizers.Whitespace()),
        load_statistics=lambda: None,
    )
    with pytest.raises(CoaloraError, match="tokenizer is none that"):
        write_export(tmp_path / "out", ["gguf"], source)
    assert not (tmp_path / "out/gguf").exists()
    with pytest.raises(CoaloraError, match="type bert"):
        write_export(tmp_path / "none", ["gguf"], replace(source, config=BertConfig()))
    assert not (tmp_path / "none").exists()


def test_the_line_that_starts_the_engine_names_both_files(llama: Made) -> None:
    line = EXPORT_FORMATS["gguf"]().start_line(llama.folder.parent)
    assert [Path(part).is_file() for part in line.split('"')[1::2]] == [True, True]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    base = decoder("llama")
    before = copy.deepcopy(base.state_dict())
    export(tmp_path, base, tokenizer_of("gpt2"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_one_call_makes_the_files_of_a_budget_from_a_bundle(tmp_path: Path) -> None:
    decoder("llama").save_pretrained(tmp_path / "base")
    tokenizer_of("gpt2").save_pretrained(tmp_path / "base")
    space = ChoiceSpace("gguf", type=["Q2_K", "Q3_K", "Q4_0", "Q6_K"])
    config = CoaLoraConfig(r=2, choices=space, initial_set=InitialSetRecipe(size=3))
    model = CoaLoraModel.from_pretrained(tmp_path / "base", config, max_length=32)
    texts = [TEXTS[0][:400]]
    model.calibrate(texts)
    model.fit(texts, texts, steps=2, rounds=0)
    model.save_pretrained(tmp_path / "bundle")
    made = export_for(Bundle.load(tmp_path / "bundle"), tmp_path / "phone", bits=4.0, formats=["gguf"])
    assert made.adapted.average_bits <= 4
    tensors = gguf.GGUFReader(tmp_path / "phone/gguf/model.gguf").tensors
    stored = sum(tensor.n_bytes for tensor in tensors if tensor.tensor_type.name in space.field_values["type"])
    assert stored == model.tables.total_nbytes(made.adapted.choices)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "phone/gguf",
        gguf_file="model.gguf",
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.switch(made.adapted.choices)
    for index, layer in enumerate(model.layers):
        assert torch.equal(read.get_submodule(layer.name).weight.float(), model.adapted.base.weight(index)), layer.name
