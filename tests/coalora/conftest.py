"""Tiny models and their tables: real architectures with random weights, made in milliseconds and never downloaded.

The fixtures are factories, because what is tested writes into models; the factories themselves live for the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables, calibration_tables, error_table
from coalora.data.benchmark import Split, pad
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe
from coalora.train.pretrain import train_tokenizer
from tests.coalora.oracles import Oracle, oracle_process

# Matrices of 36 x 52 gain nothing from threads and lose much on a machine that is busy.
torch.set_num_threads(1)

ModelFactory = Callable[..., PreTrainedModel]
VOCAB = 320
# The shared pair and theta alone, whatever the task: a test adds what it is about.
SMALL = {"r": 4, "lora_alpha": 6, "theta": "all", "compensation_rank": 0, "expert_bits": 0, "expert_start": "zero"}
# No block size divides hidden 36 x intermediate 52, nor a row of either.
HIDDEN, INTERMEDIATE = 36, 52
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 130,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def _seeded(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # transformers starts biases at zero, where losing them would go unnoticed; its weights are so small that
        # a layer's effect on the loss would drown in rounding.
        if name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        elif parameter.dim() == 2:
            parameter.mul_(4)
    model.config.use_cache = False
    return model


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch may use two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama() -> ModelFactory:
    """`tiny_llama(seed=0, **config)`: a Llama decoder of 2 blocks, N=14, tied embeddings."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {**_DECODER, "tie_word_embeddings": True, **overrides}
        return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_qwen2() -> ModelFactory:
    """`tiny_qwen2(seed=0, **config)`: biases on q, k and v, tied embeddings, N=14."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {**_DECODER, "tie_word_embeddings": True, **overrides}
        return _seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_mistral() -> ModelFactory:
    """`tiny_mistral(seed=0, **config)`: untied embeddings, N=14."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {**_DECODER, "tie_word_embeddings": False, "head_dim": HIDDEN // 2, **overrides}
        return _seeded(lambda: MistralForCausalLM(MistralConfig(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> ModelFactory:
    """`tiny_gpt2(seed=0, **config)`: Conv1D layers with biases, tied embeddings, N=8."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_inner": INTERMEDIATE,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **overrides,
        }
        return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_bert_classifier() -> ModelFactory:
    """`tiny_bert_classifier(seed=0, **config)`: 2 classes, biases everywhere, segment embeddings, N=12."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {**_ENCODER, "pad_token_id": 0, **overrides}
        return _seeded(lambda: BertForSequenceClassification(BertConfig(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_roberta_classifier() -> ModelFactory:
    """`tiny_roberta_classifier(seed=0, **config)`: 2 classes, position ids counted from the padding token, N=12."""

    def make(seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1, **overrides}
        return _seeded(lambda: RobertaForSequenceClassification(RobertaConfig(**config)), seed)

    return make


@pytest.fixture(scope="session")
def tiny_models(
    tiny_llama: ModelFactory,
    tiny_qwen2: ModelFactory,
    tiny_mistral: ModelFactory,
    tiny_gpt2: ModelFactory,
    tiny_bert_classifier: ModelFactory,
    tiny_roberta_classifier: ModelFactory,
) -> dict[str, ModelFactory]:
    """Every factory by its config's `model_type`; the last two are classifiers."""
    return {
        "llama": tiny_llama,
        "qwen2": tiny_qwen2,
        "mistral": tiny_mistral,
        "gpt2": tiny_gpt2,
        "bert": tiny_bert_classifier,
        "roberta": tiny_roberta_classifier,
    }


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` tokens; ends and pads with token 0."""
    text = "the quick brown fox jumps over the lazy dog while a small model reads what the large one wrote. "
    return train_tokenizer([text * 4, "tokens, bytes and bits; weights and scales."], VOCAB)


@pytest.fixture(scope="session")
def small_space() -> ChoiceSpace:
    """K=8 choices: 2, 3, 4 and 8 bits, in blocks of 16 or 64."""
    return ChoiceSpace(
        "nf", bits=[2, 3, 4, 8], scale_bits=[8], scale_dtype=["bf16"], block_size=[16, 64], scale_block_size=[64]
    )


def input_statistics(layers: list[TargetLayer], seed: int) -> list[InputStatistics]:
    """Second moments as calibration would find them, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return [
        InputStatistics(torch.rand(layer.shape[1], generator=generator) + 0.1, rounding="absmax") for layer in layers
    ]


@pytest.fixture(scope="session")
def tables_for(small_space: ChoiceSpace) -> Callable[..., CalibrationTables]:
    """`tables_for(model, space=small_space)`: tables of the default target layers; input statistics drawn, seeded.

    Errors of the same weights are measured once: most tests begin with the same few models.
    """
    measured: dict[tuple[object, ...], np.ndarray] = {}

    def make(
        model: nn.Module, space: ChoiceSpace | None = None, *, base_digest: str = "0" * 64, seed: int = 0
    ) -> CalibrationTables:
        layers = find_target_layers(model)
        statistics = input_statistics(layers, seed)
        weights = [layer.matrix(model.get_submodule(layer.name).get_parameter("weight").data) for layer in layers]
        space = space or small_space
        content = sha256(b"".join(weight.contiguous().view(torch.uint8).numpy().tobytes() for weight in weights))
        key = (content.digest(), *((weight.dtype, weight.shape) for weight in weights), *space.choices, seed)
        if key not in measured:
            measured[key] = error_table(weights, statistics, space)
        return calibration_tables(layers, space, measured[key].copy(), base_digest)

    return make


@pytest.fixture(scope="session")
def random_configurations() -> Callable[..., np.ndarray]:
    """`random_configurations(tables, n, seed=0)`: int64 (n, N)."""

    def make(tables: CalibrationTables, n: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(len(tables.space), size=(n, len(tables.layers)))

    return make


@pytest.fixture(scope="session")
def text_split() -> Split:
    """10 texts of 3 to 16 tokens, 2.5 bytes a token."""
    generator = torch.Generator().manual_seed(11)
    lengths = [16, 3, 9, 12, 5, 16, 7, 4, 11, 8]
    split = pad([torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths], 0)
    return replace(split, bytes_per_token=2.5)


@pytest.fixture(scope="session")
def class_split() -> Split:
    """10 sentences of 3 to 16 tokens whose class is told by their first token."""
    generator = torch.Generator().manual_seed(12)
    labels = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0]
    lengths = [16, 3, 9, 12, 5, 16, 7, 4, 11, 8]
    rows = [
        [10 + label, *torch.randint(20, VOCAB, (n - 1,), generator=generator).tolist()]
        for label, n in zip(labels, lengths, strict=True)
    ]
    return pad(rows, 0, labels)


@pytest.fixture(scope="session")
def make_adapted(tables_for: Callable[..., CalibrationTables]) -> Callable[..., AdaptedModel]:
    """`make_adapted(model, method="coa", seed=0, perturb=0.0, **recipe)`: r=4; the model is wrapped in place.

    `perturb` moves every trained parameter, theta's last layer and lora_B included, away from its start.
    """

    def make(
        model: PreTrainedModel, method: str = "coa", *, seed: int = 0, perturb: float = 0.0, **recipe: object
    ) -> AdaptedModel:
        tables = tables_for(model)
        task = "classification" if "Classification" in type(model).__name__ else "language-modeling"
        adapted = AdaptedModel(
            model,
            tables.layers,
            tables.space,
            task,
            method=method,
            recipe=AdapterRecipe(**{**SMALL, **recipe}),
            seed=seed,
            statistics=input_statistics(tables.layers, 0),
        )
        generator = torch.Generator().manual_seed(99)
        for parameter in adapted.named_parameters().values():
            parameter.data += perturb * torch.randn(parameter.shape, generator=generator).to(parameter)
        return adapted

    return make


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    """`oracle(function of tests.coalora.oracles, *arguments)`."""
    with oracle_process() as call:
        yield call
