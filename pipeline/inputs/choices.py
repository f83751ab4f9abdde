"""The choice space that settings ask for over a model's target layers, and what budgets count of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from coalora.calibrate.latency import read_latency
from coalora.calibrate.tables import CalibrationTables
from coalora.export.adapter import adapter_nbytes
from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe
from pipeline.settings.sections import ChoiceSettings, CostSettings, RuleSettings


def choices_of(choices: ChoiceSettings, layers: Sequence[TargetLayer]) -> tuple[ChoiceSpace, NDArray[np.bool_]]:
    """K choices, and which of them each of the N layers may take, bool (N, K)."""

    def parts(of: ChoiceSettings | RuleSettings) -> tuple[Part, ...]:
        own = () if of.scheme is None else (Part(of.scheme, of.allow),)
        return (*own, *(Part(also.scheme, also.allow) for also in of.also))

    rules = [
        Rule(rule.layers, parts(rule), {} if rule.scheme else rule.allow, rule.min_bits, rule.max_bits)
        for rule in choices.rules
    ]
    return layer_choices(layers, parts(choices), rules, choices.tie)


def priced_tables(
    tables: CalibrationTables, cost: CostSettings, adapter: AdapterRecipe | None, adapter_dtype: str
) -> CalibrationTables:
    """The tables with the cost that settings ask for; what is stored of the adapter counts in `file_bytes` alone."""
    if cost.kind == "file_bytes" and adapter is not None:
        ranks, dtype = adapter.ranks(tables.layers), getattr(torch, adapter_dtype)
        return tables.of_files(adapter_nbytes(tables.layers, ranks, tables.head_size, dtype))
    table = None if cost.table is None else Path(cost.table)
    latency = None if table is None else read_latency(table, tables.layers, tables.space, tables.allowed)
    return replace(tables, cost_kind=cost.kind, latency=latency)
