"""Exports in GPTQModel, with its torch kernel, and in transformers where one choice holds for all layers.

Both compute in float16, weights included. Stated agreement of log-probabilities over the whole vocabulary: within .003
on average and .03 at most, .01 and .05 in transformers, where GPTQModel chooses a kernel of bfloat16 for 4 bits.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from coalora.export.engines import log_probabilities, open_gptq
from coalora.export.formats import write_export

pytestmark = pytest.mark.engines
pytest.importorskip("gptqmodel", reason="`make test-gptq` installs gptqmodel")

TEXT = pydoc_data.topics.topics["for"][:400]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Nothing is compiled and no gradients are kept."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def written(made: Any, folder: Path) -> tuple[list[int], Tensor]:
    """Tokens of a text, and the log-probabilities of the model in memory."""
    write_export(folder, ["gptq"], made.source)
    tokens = AutoTokenizer.from_pretrained(folder / "gptq/base")(TEXT)["input_ids"][:120]
    return tokens, torch.log_softmax(made.adapted.peft_model(input_ids=torch.tensor([tokens])).logits[0], -1)


def agree(found: Tensor, wanted: Tensor, mean: float = 0.003, most: float = 0.03) -> None:
    apart = (found - wanted).abs()
    assert float(apart.mean()) < mean
    assert float(apart.max()) < most


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [("llama", "sym"), ("llama", "asym"), ("mistral", "asym"), ("qwen2", "asym"), ("qwen3", "sym")],
)
def test_gptqmodel_runs_a_mixed_pair_as_the_adapted_model_in_memory(
    integer_export: Callable, tmp_path: Path, architecture: str, mode: str
) -> None:
    made = integer_export(architecture, mode)
    tokens, wanted = written(made, tmp_path)
    agree(log_probabilities(tmp_path, "gptq", tokens), wanted)
    base = open_gptq(tmp_path / "gptq").get_base_model()
    for layer in made.source.tables.layers:
        weight = base.get_submodule(layer.name).base_layer.dequantize_weight().T
        assert torch.equal(weight, made.weight(layer.name).half())


def test_layers_that_are_no_targets_stay_in_full_precision(integer_export: Callable, tmp_path: Path) -> None:
    made = integer_export("llama", "sym", targets=("self_attn.q_proj", "mlp.down_proj"))
    tokens, wanted = written(made, tmp_path)
    agree(log_probabilities(tmp_path, "gptq", tokens), wanted)


@pytest.mark.parametrize(("mode", "choice"), [("sym", 2), ("sym", 4), ("asym", 5)])
def test_transformers_and_peft_run_a_pair_of_one_choice(
    integer_export: Callable, tmp_path: Path, mode: str, choice: int
) -> None:
    tokens, wanted = written(integer_export("llama", mode, uniform=choice), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq/base", device_map="cpu")
    model = PeftModel.from_pretrained(base, str(tmp_path / "gptq/adapter")).eval()
    agree(torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].float(), -1), wanted, 0.01, 0.05)
