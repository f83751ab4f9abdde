"""Configuration-aware LoRA for quantized models (CoA-LoRA, arXiv 2509.25214): train once, adapt to any bit-width.

    from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel

    model = CoaLoraModel.from_pretrained(folder, CoaLoraConfig(r=16, choices=ChoiceSpace("nf", bits=[2, 3, 4, 8])))
    model.calibrate(train)                          # input statistics, error tables
    model.fit(train, search, steps=320, rounds=2)   # initial set, training, Pareto rounds
    model.switch(budget=3.5)
    model.save_pretrained("bundle")
    CoaLoraModel.load_bundle("bundle").adapt(budget=3.5).save_pretrained("adapter")  # stock PEFT loads it

Names are imported when they are first used: `import coalora` costs milliseconds, and torch is imported by those that
need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coalora.adapt.compensation import compensation
    from coalora.adapt.methods import METHODS, Method
    from coalora.calibrate.tables import CalibrationTables
    from coalora.config import CoaLoraConfig
    from coalora.configurations import ConfigurationSet
    from coalora.data.benchmark import Split
    from coalora.errors import CoaloraError
    from coalora.evaluate.losses import LossMeter, Score
    from coalora.export.base import load_adapted, load_base
    from coalora.export.bundle import Adapted, Bundle
    from coalora.export.device import export_for
    from coalora.export.formats import EXPORT_FORMATS, ExportFormat
    from coalora.export.profile import DeviceProfile
    from coalora.method.initial import initial_set
    from coalora.method.loop import Fitted, fit
    from coalora.method.search import search_round
    from coalora.method.selection import select_budgets
    from coalora.model import CoaLoraModel
    from coalora.quant.quantize import QuantizedWeight, dequantize, quantize
    from coalora.quant.registry import SCHEMES
    from coalora.quant.scheme import Scheme
    from coalora.quant.space import ChoiceSpace
    from coalora.recipes import (
        AdapterRecipe,
        CalibrationRecipe,
        InitialSetRecipe,
        Objective,
        SearchRecipe,
        TrainingRecipe,
    )
    from coalora.registry import Registry
    from coalora.search.ehvi import log_ehvi
    from coalora.search.knapsack import allocate
    from coalora.search.pareto import hypervolume, is_non_dominated
    from coalora.search.proposals import propose
    from coalora.search.strategies import STRATEGIES
    from coalora.search.surrogate import Surrogate

# Module below `coalora` -> its public names.
_PUBLIC = {
    "adapt.compensation": ("compensation",),
    "adapt.methods": ("METHODS", "Method"),
    "calibrate.tables": ("CalibrationTables",),
    "config": ("CoaLoraConfig",),
    "configurations": ("ConfigurationSet",),
    "data.benchmark": ("Split",),
    "errors": ("CoaloraError",),
    "evaluate.losses": ("LossMeter", "Score"),
    "export.base": ("load_adapted", "load_base"),
    "export.bundle": ("Adapted", "Bundle"),
    "export.device": ("export_for",),
    "export.formats": ("EXPORT_FORMATS", "ExportFormat"),
    "export.profile": ("DeviceProfile",),
    "method.initial": ("initial_set",),
    "method.loop": ("Fitted", "fit"),
    "method.search": ("search_round",),
    "method.selection": ("select_budgets",),
    "model": ("CoaLoraModel",),
    "quant.quantize": ("QuantizedWeight", "dequantize", "quantize"),
    "quant.registry": ("SCHEMES",),
    "quant.scheme": ("Scheme",),
    "quant.space": ("ChoiceSpace",),
    "recipes": (
        "AdapterRecipe",
        "CalibrationRecipe",
        "InitialSetRecipe",
        "Objective",
        "SearchRecipe",
        "TrainingRecipe",
    ),
    "registry": ("Registry",),
    "search.ehvi": ("log_ehvi",),
    "search.knapsack": ("allocate",),
    "search.pareto": ("hypervolume", "is_non_dominated"),
    "search.proposals": ("propose",),
    "search.strategies": ("STRATEGIES",),
    "search.surrogate": ("Surrogate",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "EXPORT_FORMATS",
    "METHODS",
    "SCHEMES",
    "STRATEGIES",
    "Adapted",
    "AdapterRecipe",
    "Bundle",
    "CalibrationRecipe",
    "CalibrationTables",
    "ChoiceSpace",
    "CoaLoraConfig",
    "CoaLoraModel",
    "CoaloraError",
    "ConfigurationSet",
    "DeviceProfile",
    "ExportFormat",
    "Fitted",
    "InitialSetRecipe",
    "LossMeter",
    "Method",
    "Objective",
    "QuantizedWeight",
    "Registry",
    "Scheme",
    "Score",
    "SearchRecipe",
    "Split",
    "Surrogate",
    "TrainingRecipe",
    "allocate",
    "compensation",
    "dequantize",
    "export_for",
    "fit",
    "hypervolume",
    "initial_set",
    "is_non_dominated",
    "load_adapted",
    "load_base",
    "log_ehvi",
    "propose",
    "quantize",
    "search_round",
    "select_budgets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
