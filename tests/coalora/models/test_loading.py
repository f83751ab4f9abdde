"""Loading: what is loaded is complete, frozen and what was asked for; everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, ViTConfig

from coalora.errors import CoaloraError
from coalora.models.loading import default_dtype, load_config, load_model, load_tokenizer, meta_model

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
        meta_model(load_config(bert_folder), "language-modeling")


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
