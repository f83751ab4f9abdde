"""The whole method on texts with labels: a classifier and a regression, from calibration to the exported device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    T5Config,
    T5Model,
)

from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, load_adapted
from coalora.contents import problems, run_in_engines
from coalora.errors import CoaloraError
from coalora.models.loading import load_config, load_model
from coalora.trust import TRUST_VARIABLE

TEXTS = [f"text {i}: the {word} fox jumps over the dog" for i in range(8) for word in ("quick", "slow")]
SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])


@pytest.fixture
def folder(tiny_bert_classifier, tiny_tokenizer, tmp_path) -> Path:
    """A body without a head, as encoders are published."""
    tiny_bert_classifier().base_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("num_labels", "labels", "metric"),
    [(2, [0, 1] * 8, "accuracy"), (1, np.linspace(0, 5, 16), "pearson")],
    ids=["classes", "values"],
)
def test_texts_with_labels_go_through_the_whole_method(folder, tmp_path, num_labels, labels, metric) -> None:
    config = CoaLoraConfig(r=4, choices=SPACE)
    model = CoaLoraModel.from_pretrained(folder, config, task="classification", num_labels=num_labels, max_length=16)
    tables = model.calibrate((TEXTS, labels))
    head = model.base.classifier.weight.clone()
    fitted = model.fit((TEXTS, labels), (TEXTS[:6], labels[:6]), steps=6, rounds=1, budgets=[3.0])
    assert len(fitted.history) == 6
    assert not torch.equal(model.adapted.state_dict()["head.classifier.weight"], head)
    model.switch(budget=3.0)
    assert tables.average_bits(model.adapted.base.configuration) <= 3.0
    assert metric in model.evaluate((TEXTS, labels)).metrics
    inputs = model.tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(**inputs).logits
    assert wanted.shape == (3, num_labels)
    model.export(tmp_path / "device", budget=3.0)
    with torch.no_grad():
        found = load_adapted(tmp_path / "device/base", tmp_path / "device/adapter", device=model.device)(
            **inputs
        ).logits
    torch.testing.assert_close(found, wanted)
    model.save_pretrained(tmp_path / "bundle")
    CoaLoraModel.load_bundle(tmp_path / "bundle").adapt(budget=3.0).save_pretrained(tmp_path / "adapter")
    base = load_model(folder, "classification", num_labels=num_labels, dtype=torch.float32, device=model.device)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).get_base_model()
    assert torch.equal(stock.classifier.weight, model.adapted.state_dict()["head.classifier.weight"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXTS, "A classifier learns from texts with labels"),
        ((TEXTS, ["yes"] * len(TEXTS)), "yes among the labels of data are no class indices"),
        ((TEXTS, [0, 2] * 8), "data has the label 2, and the model 2 classes"),
        ((TEXTS, [0, 1]), "data has 16 texts and 2 labels"),
    ],
    ids=["no labels", "words", "a third class", "fewer labels"],
)
def test_labels_that_do_not_fit_are_refused(folder, data, message: str) -> None:
    model = CoaLoraModel.from_pretrained(folder, CoaLoraConfig(choices=SPACE), task="classification", num_labels=2)
    with pytest.raises(CoaloraError, match=message):
        model.calibrate(data)


_SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": 320, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 66,
    "pad_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": 320, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "pad_token_id": 1,
    "eos_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (lambda: BartModel(BartConfig(**_BART)), ["classification_head.dense", "classification_head.out_proj"]),
        (lambda: T5Model(T5Config(**_T5)), ["classification_head.dense", "classification_head.out_proj"]),
        (lambda: BertForMaskedLM(BertConfig(**_SIZES)), ["classifier", "bert.pooler.dense"]),
        (lambda: AlbertForMaskedLM(AlbertConfig(**_SIZES, embedding_size=32)), ["classifier", "albert.pooler"]),
        (lambda: DebertaV2ForMaskedLM(DebertaV2Config(**_SIZES)), ["classifier", "pooler.dense"]),
    ],
    ids=["bart", "t5", "bert", "albert", "deberta"],
)
def test_what_the_checkpoint_lacks_is_trained_saved_and_exported(tiny_tokenizer, tmp_path, body, parts) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body().save_pretrained(tmp_path / "base")
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>", model_input_names=["input_ids"]
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(load_config(tmp_path / "base").pad_token_id)
    tokenizer.save_pretrained(tmp_path / "base")
    texts, labels = [text + "<|endoftext|>" for text in TEXTS], [0, 1] * 8
    model = CoaLoraModel.from_pretrained(
        tmp_path / "base", CoaLoraConfig(r=4, choices=SPACE), task="classification", num_labels=2, max_length=32
    )
    assert not {layer.name for layer in model.layers} & set(parts)
    model.calibrate((texts, labels))
    before = {part: model.base.get_submodule(part).weight.clone() for part in parts}
    model.fit((texts, labels), (texts[:6], labels[:6]), steps=4, rounds=0)
    trained = model.adapted.state_dict()
    for part, start in before.items():
        assert not torch.equal(trained[f"head.{part}.weight"], start), part
    model.switch(budget=3.0)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.export(tmp_path / "device", budget=3.0)
        found = load_adapted(tmp_path / "device/base", tmp_path / "device/adapter", device=model.device)
        torch.testing.assert_close(found(**inputs).logits, wanted)
    # Stock PEFT on a base whose missing parts were drawn otherwise.
    base = load_model(tmp_path / "base", "classification", num_labels=2, device=model.device, seed=7)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "device/adapter")).state_dict()
    for part in parts:
        (name,) = [k for k in stock if k.replace(".modules_to_save.default", "").endswith(f"model.{part}.weight")
                   and "original" not in k]  # fmt: skip
        assert torch.equal(stock[name], trained[f"head.{part}.weight"])


def test_a_device_generates_with_a_cache_and_stock_peft_finds_the_base(tiny_llama, tiny_tokenizer, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = CoaLoraModel.from_pretrained(tmp_path / "base", CoaLoraConfig(r=4, choices=SPACE), max_length=16)
    model.calibrate(TEXTS)
    model.fit(TEXTS, TEXTS[:8], steps=4, rounds=0)
    model.export(tmp_path / "device", budget=3.0)
    device = load_adapted(tmp_path / "device/base", tmp_path / "device/adapter", device=model.device)
    assert device(input_ids=torch.tensor([[5, 6, 7]])).past_key_values is not None
    stock = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "device/adapter"))
    assert torch.equal(stock.get_input_embeddings().weight, tiny_llama().get_input_embeddings().weight)
    new = tmp_path / "new"
    new.touch()
    for file in (tmp_path / "device").rglob("*.safetensors"):
        assert file.stat().st_mode == new.stat().st_mode, file


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_goes_with_its_export(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    (base / "mine.py").write_text(_CODE)
    own = {"model_type": "mine", "architectures": ["MineForCausalLM"],
           "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}}  # fmt: skip
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | own))
    config = CoaLoraConfig(r=4, choices=SPACE)
    with pytest.raises(CoaloraError):
        CoaLoraModel.from_pretrained(base, config)
    model = CoaLoraModel.from_pretrained(base, config, max_length=16, trust_remote_code=True)
    assert type(model.base).__name__ == "MineForCausalLM"
    model.calibrate(TEXTS)
    model.fit(TEXTS, TEXTS[:8], steps=4, rounds=0)
    model.export(tmp_path / "device", budget=3.0)
    model.switch(budget=3.0)
    places = tmp_path / "device/base", tmp_path / "device/adapter"
    with pytest.raises(CoaloraError):
        load_adapted(*places, device=model.device)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = load_adapted(*places, device=model.device, trust_remote_code=True)(ids).logits
        torch.testing.assert_close(found, model(ids).logits)
    # verify runs an export, and code in it where this machine's owner has agreed alone
    assert problems(tmp_path / "device")[1] == []
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    with pytest.raises(CoaloraError, match=TRUST_VARIABLE):
        run_in_engines(tmp_path / "device")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert run_in_engines(tmp_path / "device") == ["packed: run by coalora, 4 tokens"]
