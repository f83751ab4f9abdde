"""Small decoders with rows of a multiple of 256, exported to GGUF in a mixed configuration with an adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet
from coalora.export.bundle import Adapted, Bundle
from coalora.export.formats import ExportSource, write_export
from coalora.export.gguf import _CASED, _WORDS
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe

TEXTS = tuple(topics[name] for name in ("for", "class", "strings", "numbers", "integers", "operator-summary"))
VOCAB = 512
SPACE = ChoiceSpace.union([ChoiceSpace("gguf"), ChoiceSpace("float")])
SPLITS = {  # as in the tokenizers of these models
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{
        name: [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name, pattern in (("llama3", _WORDS % "{1,3}"), ("qwen2", _WORDS % ""), ("tekken", _CASED))
    },
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits text as that of a model, with an added token and a chat template."""
    core = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    core.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[kind]) if len(SPLITS[kind]) > 1 else SPLITS[kind][0]
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=VOCAB - 5, special_tokens=special, initial_alphabet=alphabet)
    )
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    if kind == "llama3":  # which puts its BOS before every text
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 1)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|begin|>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    return made


@cache
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's and Mistral's: pieces with ▁ for a space, single bytes for what has none, every way to
    make a piece among the merges, the best piece first."""
    words = sorted({word for text in TEXTS for word in text.split() if word.isascii()})
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])
    pieces |= dict.fromkeys(sorted({c for word in words for c in word}))
    merges: list[tuple[str, str]] = []
    joined = "in th er ▁th ▁the on ing ▁in ▁a an nd ▁and st at or ator"
    for piece in joined.split():
        made = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces]
        merges += made
        if made:
            pieces[piece] = None
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # As transformers converts SentencePiece: all pairs that make a piece.
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys("".join(pair) for pair in merges))}
    every = [(p[:i], p[i:]) for p in ranks for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    every.sort(key=lambda pair: ranks["".join(pair)])
    core = Tokenizer(models.BPE(vocab, every, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def decoder(model_type: str, **overrides: object) -> PreTrainedModel:
    """A decoder of 2 blocks of random weights, large enough that every layer is heard in the log-probabilities."""
    config: PretrainedConfig = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCAB,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": None,
            "tie_word_embeddings": model_type != "mistral",
        }
        | overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 2:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Made:
    """What was exported, and the model in memory that runs it."""

    base: PreTrainedModel
    adapted: AdaptedModel
    tables: CalibrationTables
    configuration: np.ndarray
    adapter: Adapted
    tokenizer: PreTrainedTokenizerFast
    folder: Path

    @torch.no_grad()
    def log_probabilities(self, ids: Sequence[int], *, adapter: bool = True) -> Tensor:
        """(n, vocabulary) after each of `ids`."""
        model = self.adapted.peft_model
        if adapter:
            return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0], -1)
        with model.disable_adapter():
            return torch.log_softmax(model(torch.tensor([list(ids)])).logits[0], -1)


def mixed(n_layers: int) -> np.ndarray:
    """(N,): every type of the scheme and both 16-bit floats, in no order of bits."""
    return np.arange(n_layers) * 5 % len(SPACE)


def export(
    folder: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    configuration: np.ndarray | None = None,
    *,
    adapter_dtype: torch.dtype | None = None,
    **recipe: object,
) -> Made:
    """Write base and adapter in GGUF, of a configuration (N,) of `SPACE`."""
    layers = find_target_layers(base)
    C = mixed(len(layers)) if configuration is None else configuration
    tables = calibration_tables(layers, SPACE, np.zeros((len(layers), len(SPACE))), "digest of the base")
    sizes = AdapterRecipe(
        **{
            "r": 4,
            "lora_alpha": 8,
            "theta": "none",
            "compensation_rank": 0,
            "expert_bits": 0,
            "expert_start": "zero",
            "rank_pattern": {"*.q_proj": 8, "*.down_proj": 2},
        }
        | recipe
    )
    task = "language-modeling"
    adapted = AdaptedModel(copy.deepcopy(base), layers, SPACE, task, method="shared", recipe=sizes, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {k: 0.05 * torch.randn(v.shape, generator=generator) for k, v in adapted.state_dict().items()}
    adapted.load_state_dict(state)
    adapted.switch(C)
    adapted.peft_model.eval()
    members = ConfigurationSet(C[None], np.zeros(1), np.zeros(1, dtype=np.int64))
    made = Bundle(tables, members, state, adapted.recipe, task, base_model="some/base").adapt_to(C)
    source = ExportSource(
        made,
        tables,
        task,
        base.config,
        load_model=lambda: base,
        load_tokenizer=lambda: tokenizer,
        load_statistics=lambda: None,
        adapter_dtype=adapter_dtype,
    )
    write_export(folder, ["gguf"], source)
    return Made(base, adapted, tables, C, made, tokenizer, folder / "gguf")
