"""The demo's base model: it learns, is the same for the same seed, and is read like any other model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coalora.errors import CoaloraError
from coalora.files import file_sha256
from coalora.recipes import PretrainRecipe
from coalora.train.pretrain import llama_config, pretrain, train_tokenizer

RECIPE = PretrainRecipe(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=300,
    max_length=16,
    steps=24,
    batch_size=8,
    lr=1e-2,
)
TEXTS = [f"number {i} is followed by number {i + 1}, as always." for i in range(60)]
CPU = torch.device("cpu")


def _files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("pretrain") / "model"
    return folder, pretrain(TEXTS, RECIPE, folder, seed=1, device=CPU)


def test_the_loss_falls_and_the_schedule_decays_to_nearly_zero(trained) -> None:
    _, records = trained
    assert [record["step"] for record in records] == list(range(24))
    losses = [record["loss"] for record in records]
    assert losses[0] == pytest.approx(torch.tensor(300.0).log().item(), rel=0.05)  # an untrained model: uniform
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    rates = [record["lr"] for record in records]
    assert max(rates) == rates[0] == RECIPE.lr  # a twentieth of 24 steps warms up
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < RECIPE.lr / 10


def test_the_same_seed_gives_the_same_files_whatever_the_global_generator_did(trained, tmp_path: Path) -> None:
    folder, records = trained
    torch.rand(17)
    again = pretrain(TEXTS, RECIPE, tmp_path / "model", seed=1, device=CPU)
    assert again == records
    assert _files(tmp_path / "model") == _files(folder)


def test_another_seed_gives_another_model(tmp_path: Path, trained) -> None:
    recipe = dataclasses.replace(RECIPE, steps=2)
    records = pretrain(TEXTS, recipe, tmp_path / "model", seed=2, device=CPU)
    assert records[0]["loss"] != trained[1][0]["loss"]


def test_others_may_read_the_weights_as_they_may_the_config(trained) -> None:
    folder = trained[0]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_stock_transformers_reads_model_and_tokenizer(trained) -> None:
    folder, records = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) <= model.config.vocab_size == 300
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    ids = torch.tensor([tokenizer(TEXTS[5], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 0.75 * records[0]["loss"]


def test_the_tokenizer_is_lossless_for_any_text_and_the_same_every_time() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in [TEXTS[0], "  naïve — 東京 🦊\n\ttabs", ""]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    # tokenizers seeds its hash maps anew for each training: ties between pairs must not depend on it.
    again = train_tokenizer(TEXTS, 300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(CoaloraError, match="36 does not divide into 4 heads"):
        llama_config(dataclasses.replace(RECIPE, hidden_size=36, num_attention_heads=4))


def test_too_little_text_and_a_diverging_run_are_refused_before_anything_is_saved(tmp_path: Path) -> None:
    with pytest.raises(CoaloraError, match="make no block of 17 tokens"):
        pretrain(["short"], RECIPE, tmp_path / "a", seed=0, device=CPU)
    diverging = dataclasses.replace(RECIPE, steps=3)
    object.__setattr__(diverging, "lr", 1e30)  # far beyond what a recipe takes
    with pytest.raises(CoaloraError, match=r"ended with a loss of .*Lower model.pretrain.lr"):
        pretrain(TEXTS, diverging, tmp_path / "a", seed=0, device=CPU)
    assert not (tmp_path / "a").exists()
