"""Base and adapter in GGUF, for llama.cpp and what is built on it: the export format ``gguf``.

`model.gguf` holds the base: target layers in the very bytes that were trained with (scheme `gguf`, or `float` for 16
bits), everything else in the smallest of F16, BF16 and F32 that holds its values exactly, hyperparameters, tokenizer
and chat template. `adapter.gguf` holds lora_A and lora_B, which llama.cpp adds at run time (``--lora``), not merged.

What differs from the model in memory is arithmetic alone: llama.cpp rounds a layer's inputs to 8 bits where its weight
is quantized, and to 16 where that is F16. Its `llama` rotates neighbouring features (RoPE) where transformers rotates
halves: rows of q and k are reordered for it, and so are those of their lora_B; a row of blocks moves as a whole. It
scales an adapter by alpha / r with one alpha for all layers: where ranks differ, lora_B takes up what is left.

A tokenizer is written as one of llama.cpp's own kinds, found by its structure and not by its name; one that llama.cpp
would split otherwise is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from coalora.errors import CoaloraError
from coalora.export.adapter import peft_key
from coalora.export.formats import ExportFormat, ExportSource

if TYPE_CHECKING:
    from coalora.calibrate.tables import CalibrationTables
    from coalora.recipes import Task

BASE, ADAPTER = "model.gguf", "adapter.gguf"
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' -> GGUF's
_FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_WORDS = (  # of Llama 3 (digits by three) and Qwen (one by one)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # of Mistral's Tekken
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KINDS = {  # how a byte-level tokenizer splits text -> llama.cpp's name for it, and whether it takes whole words first
    ("bytes",): ("gpt-2", False),
    ("digits", "bytes"): ("smollm", False),
    (_WORDS % "{1,3}", "bytes alone"): ("llama-bpe", True),
    (_WORDS % "", "bytes alone"): ("qwen2", False),
    (_CASED, "bytes alone"): ("tekken", True),
}


class GGUFFormat(ExportFormat):
    """`model.gguf` and `adapter.gguf`; see the module docstring."""

    folder = "gguf"
    keeps_model = True

    def check(self, tables: CalibrationTables, config: PretrainedConfig, task: Task) -> None:
        if find_spec("gguf") is None:
            raise CoaloraError(
                "Export format 'gguf' is written by the package gguf, not installed here",
                remedy="Install it with `pip install 'coalora[gguf]'`",
            )
        if task != "language-modeling":
            raise CoaloraError(
                f"A model for {task} has a head that llama.cpp does not run",
                remedy="Leave gguf out of export.formats, or train for language-modeling",
            )
        _check_architecture(config)
        space = tables.space
        for layer, may in zip(tables.layers, tables.allowed, strict=True):
            for k in np.flatnonzero(may):
                if space.scheme_of(int(k)).name not in ("gguf", "float"):
                    raise CoaloraError(
                        f"{layer.name} in {space.describe(int(k))} cannot be written in GGUF, which has its own types",
                        remedy="Train with the schemes gguf and float (choices.scheme: gguf), whose values GGUF holds",
                    )

    def write(self, folder: Path, source: ExportSource) -> None:
        model = source.load_model()
        _check_architecture(model.config)
        writers = {BASE: _base(model, source), ADAPTER: _adapter(model.config, source)}
        folder.mkdir(parents=True, exist_ok=True)  # all that can be refused has been
        for file, writer in writers.items():
            writer.write_header_to_file(folder / file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

    def start_line(self, export: Path) -> str:
        return f'llama-server -m "{export / self.folder / BASE}" --lora "{export / self.folder / ADAPTER}"'


def _base(model: PreTrainedModel, source: ExportSource) -> Any:
    """Writer of the base, with all it has to write."""
    import gguf

    config, writer, name_of = model.config, _writer(source, model.config, "model"), _names(model.config)
    _add_hyperparameters(writer, config, source.adapted.config.base_model_name_or_path)
    _add_tokenizer(writer, source.load_tokenizer(), config.vocab_size)
    for name, data, kind in _base_tensors(model, source):
        rows = _interleaved(data, name.rpartition(".")[0], config)
        writer.add_tensor(name_of(name), rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    return writer


def _adapter(config: PretrainedConfig, source: ExportSource) -> Any:
    """Writer of the adapter: lora_a (r, in) and lora_b (out, r) of every layer."""
    import gguf

    peft: Any = source.adapted.config
    writer, name_of = _writer(source, config, "adapter"), _names(config)
    alpha = float(peft.lora_alpha)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for layer in source.tables.layers:
        A, B = (source.adapted.tensors[peft_key(f"{layer.name}.lora_{side}.weight")].float() for side in "AB")
        scale = peft.alpha_pattern.get(layer.name, peft.lora_alpha) / peft.rank_pattern.get(layer.name, peft.r)
        B = B * (scale * len(A) / alpha)  # 1, and exact, where ranks are the same
        for side, factor in (("a", A), ("b", B)):
            rows, kind = _stored(factor.to(source.floating_dtype))
            rows = _interleaved(rows, layer.name, config) if side == "b" else rows
            name = f"{name_of(layer.name + '.weight')}.lora_{side}"
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    return writer


def _writer(source: ExportSource, config: PretrainedConfig, kind: str) -> Any:
    """A writer to no file yet, with what says which base and configuration the file belongs to."""
    import gguf

    writer = gguf.GGUFWriter(None, _ARCHITECTURES[config.model_type])
    writer.add_type(kind)
    for key in ("digest", "base_digest"):
        writer.add_string(f"coalora.{key}", source.adapted.content[key])
    return writer


def _names(config: PretrainedConfig) -> Callable[[str], str]:
    """GGUF's name of a tensor of a model."""
    import gguf

    architecture = _ARCHITECTURES[config.model_type]
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def name_of(tensor: str) -> str:
        found = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CoaloraError(
                f"{tensor} has no place in GGUF's architecture {architecture}",
                remedy="Leave gguf out of export.formats",
            )
        return found

    return name_of


def _check_architecture(config: PretrainedConfig) -> None:
    """Refuse what llama.cpp would compute otherwise, or not at all.

    Raises:
        CoaloraError: an architecture, or a setting of it.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise CoaloraError(
            f"Models of type {kind} cannot be written in GGUF by this format",
            remedy=f"Take one of {', '.join(_ARCHITECTURES)}, or leave gguf out of export.formats",
        )
    rope = _rope(config)
    odd = {
        "hidden_act": config.hidden_act != "silu",
        "rope_type": rope["rope_type"]
        not in ("default", "linear", "yarn", *(["llama3"] if _ARCHITECTURES[kind] == "llama" else [])),
        "attention_factor": rope.get("attention_factor") is not None,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(getattr(config, "use_sliding_window", False)),
        "attention_bias": kind == "qwen3" and bool(config.attention_bias),
    }
    if wrong := [name for name, is_odd in odd.items() if is_odd]:
        value = getattr(config, wrong[0], rope.get(wrong[0]))
        raise CoaloraError(
            f"llama.cpp does not run a {kind} with {wrong[0]} {value!r}",
            remedy="Leave gguf out of export.formats, or take a model without it",
        )


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_hyperparameters(writer: Any, config: PretrainedConfig, base: str | None) -> None:
    rope = _rope(config)
    writer.add_name(Path(base).name if base else config.model_type)
    writer.add_quantization_version(2)
    # llama.cpp's `llama` attends to all that came before: a sliding window is right up to its length.
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31 - 1))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _rope_factors(config: PretrainedConfig) -> np.ndarray | None:
    """What llama.cpp divides the frequencies of RoPE by (head size / 2,), of Llama 3's scaling; None of others."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = _head_size(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    wavelength, original = 2 * math.pi / frequency, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).numpy()


def _base_tensors(model: PreTrainedModel, source: ExportSource) -> Iterator[tuple[str, np.ndarray, str]]:
    """Name, data and type of every tensor of the base."""
    from coalora.export.base import packed_layers
    from coalora.models.targets import other_tensors

    packed = packed_layers(model, source.tables, source.adapted.choices, source.load_statistics())
    for layer, choice, parts in packed:
        (data,) = parts.values()
        rows, kind = _stored(data)
        yield f"{layer.name}.weight", rows, kind if data.is_floating_point() else str(choice)
    for name, tensor in other_tensors(model, (layer.name for layer in source.tables.layers), None).items():
        # llama.cpp wants norms and biases in float32.
        yield name, *_stored(tensor.float() if tensor.dim() == 1 else _smallest(tensor))


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor in the smallest type that holds its values."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor.float()


def _stored(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Data as the writer takes them, and the name of their type; bytes have none by themselves."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy
        return tensor.view(torch.uint8).numpy(), "BF16"
    return tensor.numpy(), _FLOATS.get(tensor.dtype, "")


def _interleaved(rows: np.ndarray, module: str, config: PretrainedConfig) -> np.ndarray:
    """Rows of q and k of the `llama` architecture in llama.cpp's order; of other modules as they are."""
    kind = module.rpartition(".")[2]
    if _ARCHITECTURES[config.model_type] != "llama" or kind not in ("q_proj", "k_proj"):
        return rows
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Tokens, how text is split into them, special tokens and chat template.

    Raises:
        CoaloraError: a tokenizer that llama.cpp does not have.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _unknown(f"{type(tokenizer).__name__} is no tokenizer of the library `tokenizers`")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"] or []}
    if model["type"] != "BPE":
        raise _unknown(f"It is of type {model['type']}")
    tokens = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if max(tokens) >= vocab_size:
        raise _unknown(f"Token {max(tokens)} is beyond the model's {vocab_size} embeddings")
    import gguf

    kinds = {i: gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED for i, t in added.items()}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        _check_sentencepiece(content, merges, set(model["vocab"]))
        for i, token in tokens.items():
            if len(token) == 6 and token.startswith("<0x"):
                kinds[i] = gguf.TokenType.BYTE
        if model["unk_token"] is not None:
            kinds[model["vocab"][model["unk_token"]]] = gguf.TokenType.UNKNOWN
        rank: dict[str, int] = {}
        for place, (left, right) in enumerate(merges):
            rank.setdefault(left + right, place)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(rank.get(tokens.get(i, ""), len(merges))) for i in range(vocab_size)])
        writer.add_add_space_prefix(_prepends(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_kind_of_splits(content))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    normal = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    writer.add_token_types([(normal | kinds).get(i, gguf.TokenType.UNUSED) for i in range(vocab_size)])
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    for kind, adds in zip(("bos", "eos"), _surrounds(tokenizer), strict=True):
        getattr(writer, f"add_add_{kind}_token")(adds)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _unknown(problem: str) -> CoaloraError:
    return CoaloraError(
        f"The model's tokenizer is none that llama.cpp has: {problem[:1].lower()}{problem[1:]}",
        remedy="Leave gguf out of export.formats, or take a model with a tokenizer of Llama, Mistral, Qwen or GPT-2",
    )


def _kind_of_splits(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text into words (`tokenizer.ggml.pre`)."""
    if content["normalizer"] is not None and content["normalizer"] != {"type": "NFC"}:
        raise _unknown(f"It normalizes text by {content['normalizer']['type']}")
    step = content["pre_tokenizer"] or {"type": "nothing"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    described = tuple(map(_split, steps))
    name, whole = _KINDS.get(described, ("", False))
    if not name or bool(content["model"].get("ignore_merges")) != whole:
        raise _unknown(f"It splits text by {', '.join(described)}")
    return name


def _split(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes" if step["use_regex"] else "bytes alone"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return str(step["type"])


def _prepends(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, by what writes spaces as the sign of SentencePiece."""
    normalizer, splits = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splits.get("pretokenizers", [splits])]
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)


def _check_sentencepiece(content: Mapping[str, Any], merges: list[tuple[str, ...]], pieces: set[str]) -> None:
    """llama.cpp merges any two neighbours that make a piece, the piece of the best score first; here a list of merges
    decides. Both are the same where every way to make a piece is listed.
    """
    known = set(merges)
    unlisted = (
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces and (piece[:i], piece[i:]) not in known
    )
    made = {"".join(pair) for pair in merges}
    if odd := next((pair for pair in unlisted if "".join(pair) in made), None):
        raise _unknown(f"It never joins {odd[0]!r} and {odd[1]!r}, which llama.cpp would")
    text = json.dumps([content["normalizer"], content["pre_tokenizer"]])
    if "▁" not in text and "\\u2581" not in text:
        raise _unknown("It has single bytes for tokens, and no sign for a space")


def _surrounds(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text and its EOS behind."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos, eos = whole[:1] == [tokenizer.bos_token_id], whole[-1:] == [tokenizer.eos_token_id] and whole != bare
    bos = bos and whole != bare
    if whole != [*([tokenizer.bos_token_id] if bos else []), *bare, *([tokenizer.eos_token_id] if eos else [])]:
        raise _unknown(f"It makes {whole} of a text of {bare}")
    return bos, eos
