"""Exports in GGUF run by llama.cpp (xllamacpp): log-probabilities of the model in memory, tokens of its tokenizer.

Stated agreement, of log-probabilities over the whole vocabulary after each token of a text: of quantized types, for
which llama.cpp rounds a layer's inputs to 8 bits, .03 on average and .25 at most; of F16 .003 and .02.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import AutoTokenizer, LlamaTokenizer

from coalora.export.engines import LlamaCpp
from coalora.quant.gguf.blocks import TYPES
from tests.coalora.export.gguf_exports import (
    SPACE,
    TEXTS,
    Made,
    decoder,
    export,
    sentencepiece_tokenizer,
    tokenizer_of,
)

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make test-engines")
pytestmark = pytest.mark.engines

F16 = len(SPACE) - 1
ODD_TEXTS = (
    "Hello world, it's 1234 + 56.7!",
    "  two spaces\n\n\nand\tlines \r\n that end ",
    "def f(x):\n    return x**2  # naïve café, 東京, 🙂",
    "I'LL they've don't WE'D 3rd 100,000 <tool> <b>",
    TEXTS[0][:1000],
)


class Engine(LlamaCpp):
    """The engine on what was made, with or without an adapter."""

    def __init__(self, made: Made, *, adapter: bool = True) -> None:
        super().__init__(made.folder, adapter=adapter)

    def tokens(self, text: str) -> list[int]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": True, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]


@pytest.fixture
def ids() -> Callable[[Made, int], list[int]]:
    return lambda made, n: made.tokenizer(TEXTS[1])["input_ids"][:n]


def difference(engine: Engine, made: Made, ids: Sequence[int], *, adapter: bool = True) -> Tensor:
    return (engine.log_probabilities(ids) - made.log_probabilities(ids, adapter=adapter)).abs()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_configuration_with_its_adapter_runs_as_in_memory(
    kind: str, tmp_path: Path, ids: Callable[[Made, int], list[int]]
) -> None:
    made = export(tmp_path, decoder(kind), tokenizer_of("qwen2"))
    text = ids(made, 48)
    apart = difference(Engine(made), made, text)
    assert float(apart.mean()) < 0.03
    assert float(apart.max()) < 0.25
    bare = difference(Engine(made, adapter=False), made, text, adapter=False)
    assert float(bare.mean()) < 0.03
    assert float((made.log_probabilities(text) - made.log_probabilities(text, adapter=False)).abs().mean()) > 0.2


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_decoded_as_it_was_trained_with(
    name: str, tmp_path: Path, ids: Callable[[Made, int], list[int]]
) -> None:
    layers = len(export(tmp_path / "any", decoder("llama"), tokenizer_of("gpt2")).tables.layers)
    C = np.full(layers, list(TYPES).index(name))
    made = export(tmp_path / name, decoder("llama"), tokenizer_of("gpt2"), C)
    apart = difference(Engine(made), made, ids(made, 16))
    assert float(apart.mean()) < 0.03
    assert float(apart.max()) < 0.25


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "default": {},
}


@pytest.mark.parametrize(
    ("kind", "rope"), [*(("llama", rope) for rope in ROPES), ("qwen2", "yarn"), ("qwen3", "default")]
)
def test_scaled_positions_are_those_of_transformers(
    kind: str, rope: str, tmp_path: Path, ids: Callable[[Made, int], list[int]]
) -> None:
    base = decoder(kind, rope_parameters={"rope_type": rope, "rope_theta": 5e5, **ROPES[rope]})
    made = export(tmp_path, base, tokenizer_of("gpt2"), np.full(14, F16))
    text = ids(made, 160)
    apart = (Engine(made).after(text) - made.log_probabilities(text)[-1]).abs()
    assert float(apart.mean()) < 0.003
    assert float(apart.max()) < 0.02


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen2", "tekken"])
def test_a_byte_level_tokenizer_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    made = export(tmp_path, decoder("llama"), tokenizer_of(kind), np.full(14, F16))
    engine = Engine(made)
    for text in ODD_TEXTS:
        assert engine.tokens(text) == made.tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("read_by", [None, LlamaTokenizer, AutoTokenizer])
def test_a_tokenizer_of_sentencepiece_gives_the_same_tokens(read_by: Any, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer() if read_by is None else trained(tmp_path, read_by)
    made = export(tmp_path, decoder("mistral"), tokenizer, np.full(14, F16))
    engine = Engine(made)
    # Of LlamaTokenizer a text that starts with a space gets no other before it, unlike in SentencePiece and llama.cpp.
    for text in ODD_TEXTS if read_by is not LlamaTokenizer else [text.strip(" ") for text in ODD_TEXTS]:
        assert engine.tokens(text) == made.tokenizer(text)["input_ids"], text


def trained(folder: Path, read_by: Any) -> Any:
    """SentencePiece's own file, as one of transformers' classes reads it: spaces before a text are put or not."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: make test-engines")
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in TEXTS for line in text.splitlines() if line.strip()),
            model_writer=file,
            vocab_size=500,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return read_by.from_pretrained(folder)
