"""A trained-looking bundle of any tiny model, and the model it was made from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.export.bundle import Bundle


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
