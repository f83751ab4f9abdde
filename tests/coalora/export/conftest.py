"""A trained-looking bundle of any tiny model, and the model it was made from."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.configurations import ConfigurationSet
from coalora.export.bundle import Bundle
from coalora.export.formats import ExportSource
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, Tie


@pytest.fixture(scope="session")
def make_bundle(
    make_adapted: Callable[..., AdaptedModel], tables_for: Callable[..., CalibrationTables]
) -> Callable[..., tuple[Bundle, AdaptedModel]]:
    """`make_bundle(factory, method="coa", **recipe)`: (bundle, the in-memory model with the same parameters)."""

    def make(
        factory: Callable[..., PreTrainedModel], method: str = "coa", **recipe: object
    ) -> tuple[Bundle, AdaptedModel]:
        adapted, tables = make_adapted(factory(), method, perturb=0.05, **recipe), tables_for(factory())
        configurations = np.repeat(np.arange(8)[:, None], len(tables.layers), axis=1)
        members = ConfigurationSet(configurations, np.linspace(3, 2, 8), np.zeros(8, dtype=np.int64)).sorted(tables)
        task = "classification" if "Classification" in type(factory()).__name__ else "language-modeling"
        factors = adapted.compensation.factors(configurations) if adapted.compensation else None
        bundle = Bundle(
            tables,
            members,
            adapted.state_dict(),
            adapted.recipe,
            task,
            base_model="some/base",
            compensation=factors,
        )
        return bundle, adapted

    return make


@pytest.fixture(scope="session")
def quantized() -> Callable[..., PreTrainedModel]:
    """`quantized(model, tables, configuration)`: the model with weights rounded layer by layer, without this
    project's weight switching."""

    def make(model: PreTrainedModel, tables: CalibrationTables, configuration: np.ndarray) -> PreTrainedModel:
        with torch.no_grad():
            for layer, k in zip(tables.layers, configuration, strict=True):
                weight = model.get_submodule(layer.name).weight
                stored = weight.T.contiguous() if layer.transposed else weight
                rounded = tables.space.scheme.fake_quantize(stored, tables.space.choices[k])
                weight.copy_(rounded.T if layer.transposed else rounded)
        return model

    return make


@dataclass(frozen=True)
class IntegerExport:
    """A mixed, tied configuration of scheme `int` with its adapter: the source of an export, and the same in memory."""

    source: ExportSource
    adapted: AdaptedModel

    def weight(self, name: str) -> torch.Tensor:
        """Quantized weight of a layer, float32, without this project's weight switching."""
        tables, names = self.source.tables, [layer.name for layer in self.source.tables.layers]
        choice = tables.space.choices[self.source.adapted.choices[names.index(name)]]
        weight = self.source.load_model().get_submodule(name).get_parameter("weight").detach()
        return tables.space.scheme.fake_quantize(weight, choice)


@pytest.fixture(scope="session")
def integer_export(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., IntegerExport]:
    """`integer_export(architecture, mode, dtype=torch.float32, tie="fused")`: bits 2 to 8, groups of 32 and 64, ranks
    4 and 6; `dtype` is the checkpoint's; `uniform` the one choice of all layers, `targets` some of them."""

    def make(
        architecture: str = "llama", mode: str = "asym", dtype: torch.dtype = torch.float32, tie: Tie = "fused",
        uniform: int | None = None, targets: tuple[str, ...] | None = None,
    ) -> IntegerExport:  # fmt: skip
        config = AutoConfig.for_model(
            architecture, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=320, max_position_embeddings=128, pad_token_id=0,
            bos_token_id=None, eos_token_id=0, tie_word_embeddings=architecture != "mistral", dtype=dtype,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )  # fmt: skip

        def load() -> PreTrainedModel:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32).eval()
                for name, parameter in model.named_parameters():
                    # Effects that do not drown in rounding, and biases that are not zero.
                    drawn = torch.randn_like(parameter) * 0.1 if name.endswith("bias") else parameter * 4
                    parameter.data = (drawn if "norm" not in name else parameter).detach().to(dtype).float()
            model.config.use_cache = False
            return model

        space = ChoiceSpace("int", bits=[2, 3, 4, 8], group_size=[32, 64], mode=[mode])
        layers = find_target_layers(load(), targets)
        err = np.repeat(4.0 ** -space.nominal_bits[None], len(layers), 0)
        tables = calibration_tables(layers, space, err, "0" * 64, tie=tie)
        choices = np.random.default_rng(0).integers(len(space), size=len(tables.search_err))
        if uniform is not None:
            choices[:] = uniform
        recipe = AdapterRecipe(
            r=4, lora_alpha=6, expert_bits=0, compensation_rank=0, theta="all", rank_pattern={"mlp.down_proj": 6}
        )
        adapted = AdaptedModel(load(), layers, space, "language-modeling", method="coa", recipe=recipe, seed=0)
        generator = torch.Generator().manual_seed(99)
        for parameter in adapted.named_parameters().values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        members = ConfigurationSet.unmeasured(tables.expand(choices)[None])
        bundle = Bundle(tables, members, adapted.state_dict(), adapted.recipe, "language-modeling")
        source = ExportSource(
            bundle.adapt_to(members.configurations[0]),
            tables,
            "language-modeling",
            config,
            load_model=load,
            load_tokenizer=lambda: tiny_tokenizer,
            load_statistics=lambda: None,
        )
        with torch.no_grad():
            adapted.switch(members.configurations[0])
        adapted.peft_model.eval()
        return IntegerExport(source, adapted)

    return make
