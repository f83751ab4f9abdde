"""Target layers: which layers are found, under which name, kind, block and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, Qwen2Config, RobertaConfig

from coalora.errors import CoaloraError
from coalora.models.architectures import ARCHITECTURES
from coalora.models.loading import meta_model
from coalora.models.targets import TargetLayer, find_target_layers


@pytest.mark.parametrize(
    ("config", "task", "n_layers", "n_weights"),
    [
        (
            RobertaConfig(
                vocab_size=50265,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                max_position_embeddings=514,
                type_vocab_size=1,
            ),
            "classification",
            144,
            301_989_888,
        ),
        (
            Qwen2Config(
                vocab_size=151936,
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            "language-modeling",
            196,
            1_310_195_712,
        ),
        (
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
            ),
            "language-modeling",
            224,
            6_476_005_376,
        ),
    ],
    ids=["RoBERTa-large", "Qwen2.5-1.5B", "Llama-2-7B"],
)
def test_the_papers_models_have_their_known_number_of_layers_and_weights(config, task, n_layers, n_weights) -> None:
    model = meta_model(config, task, num_labels=3)
    layers = find_target_layers(model)
    assert all(p.is_meta for p in model.parameters())
    assert len(layers) == n_layers
    assert sum(layer.n_weights for layer in layers) == n_weights
    assert {layer.block for layer in layers} == set(range(config.num_hidden_layers))


def test_every_family_finds_all_its_projections_in_every_block(tiny_models) -> None:
    for family, make in tiny_models.items():
        model = make()
        layers = find_target_layers(model)
        kinds = ARCHITECTURES[family].target_modules
        assert len(layers) == 2 * len(kinds), family
        assert {(layer.kind, layer.block) for layer in layers} == {(k, b) for k in kinds for b in (0, 1)}
        for layer in layers:
            assert layer.name.endswith("." + layer.kind)
            weight = model.get_submodule(layer.name).get_parameter("weight")
            assert tuple(layer.matrix(weight).shape) == layer.shape
        order = [name for name, _ in model.named_modules()]
        assert [order.index(layer.name) for layer in layers] == sorted(order.index(layer.name) for layer in layers)


def test_no_default_leaves_a_linear_layer_of_a_block_out(tiny_models) -> None:
    for make in tiny_models.values():
        model = make()
        found = {layer.name for layer in find_target_layers(model)}
        inside = {
            name
            for name, module in model.named_modules()
            if module.__class__.__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
        }
        assert found == inside


def test_all_linear_finds_what_the_registered_lists_name_and_poolers(tiny_models) -> None:
    for make in tiny_models.values():
        named = {layer.name: layer for layer in find_target_layers(make())}
        found = {layer.name: layer for layer in find_target_layers(make(), "all-linear")}
        assert {name: found[name] for name in named} == named
        assert all("pooler" in name for name in found.keys() - named.keys())


@pytest.mark.parametrize(
    ("model_type", "task", "kinds", "extra"),
    [
        ("opt", "language-modeling", ["self_attn.k_proj", "self_attn.out_proj", "fc1", "fc2"], {}),
        ("gpt_neox", "language-modeling", ["attention.query_key_value", "mlp.dense_4h_to_h"], {}),
        ("mixtral", "language-modeling", ["self_attn.q_proj"], {"num_local_experts": 2, "num_key_value_heads": 2}),
        ("distilbert", "classification", ["attention.q_lin", "ffn.lin1"], {"dim": 64, "n_heads": 2, "n_layers": 2}),
        ("electra", "classification", ["attention.self.query", "output.dense"], {"embedding_size": 64}),
    ],
)
def test_any_architecture_is_a_start(model_type: str, task, kinds: list[str], extra: dict) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **(extra if model_type == "distilbert" else {**sizes, **extra}))
    layers = find_target_layers(meta_model(config, task))
    assert {layer.block for layer in layers} == {0, 1}
    assert set(kinds) <= {layer.kind for layer in layers}
    assert not any(head in layer.name for layer in layers for head in ("lm_head", "embed_out", "classifier"))


def test_the_longest_suffix_decides_the_kind(tiny_bert_classifier) -> None:
    model = tiny_bert_classifier()
    layers = {layer.name: layer.kind for layer in find_target_layers(model, ["output.dense", "attention.output.dense"])}
    assert layers == {
        f"bert.encoder.layer.{b}.{kind}": kind for b in (0, 1) for kind in ("attention.output.dense", "output.dense")
    }


def test_a_pattern_whose_layers_all_go_to_longer_ones_is_no_mistake(tiny_llama) -> None:
    layers = find_target_layers(tiny_llama(), ["q_proj", "self_attn.q_proj"])
    assert [layer.kind for layer in layers] == ["self_attn.q_proj"] * 2


def test_suffixes_match_whole_parts_of_names_only(tiny_llama) -> None:
    with pytest.raises(CoaloraError, match=r"'proj' of target_modules matches no linear layer.*q_proj"):
        find_target_layers(tiny_llama(), ["q_proj", "proj"])


def test_globs_match_layers_and_pass_over_containers(tiny_llama) -> None:
    layers = find_target_layers(tiny_llama(), ["*.layers.1.mlp*"])
    assert [layer.name for layer in layers] == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert [layer.kind for layer in layers] == ["gate_proj", "up_proj", "down_proj"]
    assert {layer.block for layer in layers} == {1}


def test_a_layer_outside_of_blocks_has_block_0(tiny_mistral) -> None:
    (layer,) = find_target_layers(tiny_mistral(), ["lm_head"])
    assert (layer.name, layer.block) == ("lm_head", 0)


def test_conv1d_is_stored_transposed_and_its_matrix_writes_through(tiny_gpt2) -> None:
    model = tiny_gpt2()
    layer = next(layer for layer in find_target_layers(model) if layer.kind == "attn.c_attn")
    weight = model.get_submodule(layer.name).get_parameter("weight")
    assert layer.transposed
    assert layer.shape == (108, 36)
    assert tuple(weight.shape) == (36, 108)
    layer.matrix(weight.data)[5, 7] = 42.0
    assert weight[7, 5] == 42.0
    x = torch.randn(3, 36)
    module = model.get_submodule(layer.name)
    torch.testing.assert_close(module(x), nn.functional.linear(x, layer.matrix(weight), module.bias))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_tied_head_is_refused_with_both_names(tiny_models, family: str) -> None:
    with pytest.raises(CoaloraError, match=r"lm_head\.weight share one tensor.*Leave lm_head out") as caught:
        find_target_layers(tiny_models[family](), ["lm_head"])
    assert "embed_tokens.weight" in str(caught.value) or "wte.weight" in str(caught.value)


def test_a_model_of_another_library_takes_all_its_linear_layers_or_patterns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [layer.name for layer in find_target_layers(model)] == ["0", "2"]
    with pytest.raises(CoaloraError, match="ReLU has no linear layer"):
        find_target_layers(nn.ReLU())
    assert [layer.shape for layer in find_target_layers(model, ["0", "2"])] == [(4, 4), (2, 4)]


@pytest.mark.parametrize("patterns", [["nothing"], ["*.nothing"], ["q_proj", "nothing"], ["*layernorm*"]])
def test_a_pattern_that_matches_no_linear_layer_is_refused(tiny_llama, patterns: list[str]) -> None:
    with pytest.raises(CoaloraError, match=f"{patterns[-1]!r} of target_modules matches no".replace("*", r"\*")):
        find_target_layers(tiny_llama(), patterns)


@pytest.mark.parametrize("patterns", ["q_proj", []])
def test_a_bare_string_or_an_empty_list_is_refused(tiny_llama, patterns) -> None:
    with pytest.raises(CoaloraError, match=r"target_modules is (.q_proj.|\[\])"):
        find_target_layers(tiny_llama(), patterns)


def test_a_suffix_that_names_something_else_than_a_linear_layer_is_refused(tiny_llama) -> None:
    with pytest.raises(CoaloraError, match=r"model\.embed_tokens is Embedding"):
        find_target_layers(tiny_llama(), ["embed_tokens"])


def test_layers_round_trip_through_json_types(tiny_gpt2) -> None:
    for layer in find_target_layers(tiny_gpt2()):
        fields = layer.to_dict()
        assert TargetLayer.from_dict({**fields, "shape": list(layer.shape)}) == layer
