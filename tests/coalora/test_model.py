"""The whole method on texts with labels: a classifier and a regression, from calibration to the exported device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, load_adapted
from coalora.errors import CoaloraError
from coalora.models.loading import load_model

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
