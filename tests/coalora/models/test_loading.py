"""Loading: what is loaded is complete, frozen and what was asked for; everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    DebertaV2Config,
    ElectraConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
    T5Model,
    ViTConfig,
    XLMRobertaConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from coalora.errors import CoaloraError
from coalora.models.loading import (
    check_causal,
    default_dtype,
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
    resolved,
    small_model,
)
from coalora.models.targets import head_modules
from coalora.recipes import RuntimeRecipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory, tiny_bert_classifier) -> Path:
    """A body without a head, as encoders are published."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert_classifier(num_labels=3).bert.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_comes_frozen_in_eval_mode_with_the_saved_weights(llama_folder: Path, tiny_llama) -> None:
    model = load_model(llama_folder, "language-modeling", device=CPU)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 == default_dtype(CPU)
    for (name, loaded), saved in zip(model.named_parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(loaded, saved), name


def test_the_seed_decides_a_new_head_and_nothing_else(bert_folder: Path) -> None:
    one, same, other = (load_model(bert_folder, "classification", num_labels=2, device=CPU, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.classifier.weight.shape == (2, 36)
    for (name, a), b in zip(one.bert.named_parameters(), other.bert.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_without_num_labels_a_saved_head_is_kept_and_another_number_is_refused(
    tmp_path: Path, tiny_roberta_classifier
) -> None:
    saved = tiny_roberta_classifier(num_labels=3)
    saved.save_pretrained(tmp_path)
    model = load_model(tmp_path, "classification", device=CPU)
    assert torch.equal(model.classifier.out_proj.weight, saved.classifier.out_proj.weight)
    with pytest.raises(CoaloraError, match=r"other shapes than a model with num_labels 2"):
        load_model(tmp_path, "classification", num_labels=2, device=CPU)


def test_a_checkpoint_that_lacks_weights_of_the_body_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    load_config(llama_folder).save_pretrained(tmp_path)
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CoaloraError, match=r"is without model\.layers\.1\.mlp\.up_proj\.weight \(1 missing\)"):
        load_model(tmp_path, "language-modeling", device=CPU)


def test_an_encoder_is_refused_as_a_language_model(bert_folder: Path) -> None:
    with pytest.raises(CoaloraError, match="Architecture 'bert' sees the tokens"):
        load_model(bert_folder, "language-modeling", device=CPU)
    with pytest.raises(CoaloraError, match="sees the tokens"):
        check_causal(small_model(load_config(bert_folder), "language-modeling"))


def test_a_missing_model_is_refused_by_every_loader(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for load in (lambda p: load_model(p, "language-modeling", device=CPU), load_config, load_tokenizer):
        with pytest.raises(CoaloraError, match=r"no base model.*Set model.name_or_path to a hub id"):
            load(missing)


def test_broken_and_pickled_weights_are_refused(tmp_path: Path, llama_folder: Path, tiny_llama) -> None:
    load_config(llama_folder).save_pretrained(tmp_path)
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CoaloraError, match="weights in safetensors"):
        load_model(tmp_path, "language-modeling", device=CPU)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file at all")
    with pytest.raises(CoaloraError, match="weights in safetensors"):
        load_model(tmp_path, "language-modeling", device=CPU)


def test_architectures_that_do_not_exist_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "martian"}', encoding="utf-8")
    with pytest.raises(CoaloraError, match=r"no architecture of .*martian"):
        load_config(tmp_path)
    with pytest.raises(CoaloraError, match="no architecture of vit for language-modeling"):
        meta_model(ViTConfig(hidden_size=32, num_hidden_layers=1), "language-modeling")


def test_a_folder_without_a_tokenizer_is_refused(bert_folder: Path) -> None:
    with pytest.raises(CoaloraError, match="has no tokenizer"):
        load_tokenizer(bert_folder)


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path: Path, llama_folder: Path) -> None:
    tokenizer = load_tokenizer(llama_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    load_config(llama_folder).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id == 0


def test_a_meta_model_holds_no_bytes_and_leaves_the_config_as_it_was() -> None:
    config = LlamaConfig(num_hidden_layers=1, num_labels=2)
    model = meta_model(config, "classification", num_labels=5)
    assert all(p.is_meta for p in model.parameters())
    assert model.config.num_labels == 5
    assert config.num_labels == 2


_SIZES = {
    "vocab_size": 320, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 66,
}  # fmt: skip
_SEQ2SEQ = {"vocab_size": 320, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
_BART = {
    "vocab_size": 320, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 66,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sees"),
    [
        (XLMRobertaConfig(**_SIZES), True),
        (ElectraConfig(**_SIZES, embedding_size=36), True),
        (BertConfig(**_SIZES), True),
        (BertConfig(**_SIZES, is_decoder=True), False),
        (BartConfig(**_BART), False),
        (GPT2Config(vocab_size=320, n_embd=36, n_layer=2, n_head=2), False),
        (OPTConfig(**_SIZES, word_embed_proj_dim=36, ffn_dim=52), False),
        (LlamaConfig(**_SIZES), False),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_language_model_that_sees_what_it_predicts_is_refused_whatever_its_name(
    tmp_path: Path, config: PretrainedConfig, sees: bool
) -> None:
    for model in (small_model(config, "language-modeling"), AutoModelForCausalLM.from_config(config).eval()):
        if sees:
            with pytest.raises(CoaloraError, match="sees the tokens that it would have to predict"):
                check_causal(model)
        else:
            check_causal(model)


@pytest.mark.parametrize(
    ("body", "heads"),
    [
        (lambda: BartModel(BartConfig(**_BART)), ["classification_head"]),
        (lambda: T5Model(T5Config(**_SEQ2SEQ)), ["classification_head"]),
        (lambda: _masked(BertConfig(**_SIZES)), ["classifier", "bert.pooler.dense"]),
        (lambda: _masked(AlbertConfig(**_SIZES, embedding_size=36)), ["classifier", "albert.pooler"]),
        (lambda: _masked(DebertaV2Config(**_SIZES)), ["classifier", "pooler"]),
        (lambda: GPT2Model(GPT2Config(vocab_size=320, n_embd=36, n_layer=2, n_head=2)), ["score"]),
    ],
    ids=["bart", "t5", "bert", "albert", "deberta", "gpt2"],
)
def test_what_a_checkpoint_lacks_is_the_head(tmp_path: Path, body, heads: list[str]) -> None:
    made = body()
    made.save_pretrained(tmp_path)
    model = load_model(tmp_path, "classification", num_labels=2, device=CPU)
    assert sorted(head_modules(model)) == sorted(heads)


def _masked(config: PretrainedConfig):
    """As masked language models are published: without a pooler."""
    return MODEL_FOR_MASKED_LM_MAPPING[type(config)](config)


def test_rows_are_filled_with_what_the_model_looks_for(tmp_path: Path, tiny_gpt2, tiny_tokenizer) -> None:
    tiny_gpt2(pad_token_id=7).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    pad = load_tokenizer(tmp_path).pad_token_id
    model = load_model(tmp_path, "classification", num_labels=2, device=CPU, pad_token_id=pad)
    assert model.config.pad_token_id == pad == 0
    row = torch.tensor([[5, 6, 7]])
    alone = model(input_ids=row).logits
    beside = model(
        input_ids=torch.tensor([[5, 6, 7, pad, pad], [9, 8, 7, 6, 5]]),
        attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    ).logits
    torch.testing.assert_close(beside[:1], alone)


def test_padding_outside_of_the_embedding_is_not_used(tmp_path: Path, tiny_llama, tiny_tokenizer) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokenizer.save_pretrained(tmp_path)
    assert len(tokenizer) > 300
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id == 0


def test_positions_counted_from_another_padding_are_refused(tmp_path: Path, tiny_roberta_classifier) -> None:
    tiny_roberta_classifier().save_pretrained(tmp_path)
    load_model(tmp_path, "classification", num_labels=2, device=CPU, pad_token_id=1)
    with pytest.raises(CoaloraError, match="its padding token 1, and its tokenizer pads with 0"):
        load_model(tmp_path, "classification", num_labels=2, device=CPU, pad_token_id=0)


def test_training_and_evaluation_have_one_kind_of_loss(tmp_path: Path, tiny_bert_classifier) -> None:
    tiny_bert_classifier(problem_type="multi_label_classification").save_pretrained(tmp_path)
    model = load_model(tmp_path, "classification", num_labels=2, device=CPU)
    found = model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1]))
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, torch.tensor([1])))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_quantized_base_is_refused(tmp_path: Path, tiny_llama, method: str) -> None:
    tiny_llama(quantization_config={"quant_method": method}).save_pretrained(tmp_path)
    with pytest.raises(CoaloraError, match=f"is quantized already .{method}"):
        load_model(tmp_path, "language-modeling", device=CPU)


@pytest.mark.parametrize(
    "damage",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "", "{}", "[]", '{"model": 5}', "null"],
)
def test_a_damaged_tokenizer_is_told(tmp_path: Path, llama_folder: Path, damage: str) -> None:
    load_config(llama_folder).save_pretrained(tmp_path)
    for file in llama_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(CoaloraError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CoaloraError, match="torch sees no GPU"):
        resolved(RuntimeRecipe(device="cuda"))
