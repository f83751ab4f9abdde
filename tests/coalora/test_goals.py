"""Both goals through the whole library: a model that is itself again, and one that has learnt a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, TrainingRecipe
from coalora.errors import CoaloraError

TEXTS = [f"line {i}: the quick brown fox jumps over the lazy dog, and bits become bytes" for i in range(40)]
SPACE = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])


@pytest.fixture
def folder(tiny_llama, tiny_tokenizer, tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fitted(folder: Path, goal: str) -> tuple[CoaLoraModel, dict[str, float], dict[str, float]]:
    """The model, and its metrics at 2 bits before and after training."""
    training = TrainingRecipe(lr=0.01, batch_size=8, warmup_steps=2)
    model = CoaLoraModel.from_pretrained(
        folder, CoaLoraConfig(r=8, choices=SPACE, goal=goal, training=training, expert_start="zero"), max_length=16
    )  # fmt: skip
    model.calibrate(TEXTS)
    lowest = np.zeros(len(model.layers), dtype=np.int64)
    metrics = []
    for steps in (1, 40):
        model.fit(TEXTS[:30], TEXTS[30:], steps=steps, rounds=0)
        model.switch(lowest)
        metrics.append(model.evaluate(TEXTS[30:]).metrics)
    return model, metrics[0], metrics[1]


def test_to_recover_is_to_come_near_the_base(folder) -> None:
    model, before, after = fitted(folder, "recover")
    assert after["kl_divergence"] < 0.7 * before["kl_divergence"]
    assert after["top1_agreement"] > before["top1_agreement"]
    # The losses that the search has seen are divergences from the base.
    model.switch(model.members.configurations[0])
    assert model.members.losses[0] == pytest.approx(model.evaluate(TEXTS[30:]).metrics["kl_divergence"])


def test_to_fine_tune_is_to_learn_the_text(folder) -> None:
    model, before, after = fitted(folder, "fine-tune")
    assert after["bits_per_byte"] < 0.7 * before["bits_per_byte"]
    model.switch(model.members.configurations[0])
    found = model.evaluate(TEXTS[30:])
    assert model.members.losses[0] == pytest.approx(found.loss)
    assert found.metrics["kl_divergence"] > 0.1  # random weights know nothing of the text: the base is left behind


def test_a_classifier_has_nothing_to_recover(tiny_bert_classifier, tiny_tokenizer, tmp_path) -> None:
    tiny_bert_classifier().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CoaloraError, match=r"no trained head yet\. Set goal to fine-tune"):
        CoaLoraModel.from_pretrained(tmp_path, CoaLoraConfig(goal="recover"), task="classification", num_labels=2)
